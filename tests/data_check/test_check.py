"""The data check: its numbers against hand-made rows, and against what training drops, plans and pads."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny_jax import FakeScorerPool, run_config, write_run_inputs
from PIL import Image

from r1vl_jax.data.batching import collate_pairs, in_micro_batches, padding, plan_shapes, size_of
from r1vl_jax.data.loader import read_rows
from r1vl_jax.data.sources import open_source
from r1vl_jax.data_check import command as check
from r1vl_jax.data_check import reading
from r1vl_jax.errors import RowError
from r1vl_jax.keysteps.__main__ import main as lint
from r1vl_jax.processing.processor import Processor
from r1vl_jax.train import train
from r1vl_jax.training.context import Run
from r1vl_jax.training.stage import Stage
from r1vl_jax.training.step_grpo import StepGRPO
from r1vl_jax.types import Rollout

LONG = "How many circles are there? " * 60
ANSWER = "### Step 1:\nThere are three.\n\n### The final answer is: 3"
REFLECTIVE = "I think I have made a mistake. Let me rethink it."
SFT_PIXELS, RL_PIXELS = 56 * 56, 112 * 112


def talk(images, *turns):
    roles = [{"role": "user", "content": turns[0]}, {"role": "assistant", "content": turns[1]}]
    return {"messages": roles + (talk(None, *turns[2:])["messages"] if turns[2:] else []), "images": images}


def question(image, problem, steps=("There are three",)):
    return {"image_path": image, "problem": problem, "solution": ANSWER, "key_steps": {"Steps": list(steps)}}


SFT = [
    talk("a.png", "<image>How many?", ANSWER),
    talk("nowhere.png", "<image>How many?", ANSWER),
    talk("a.png", f"<image>{LONG}", ANSWER),
    talk("a.png", "<image>How many?", LONG),
    talk("a.png", "<image>How many?", "it is <|im_end|> here"),
    talk("half.png", "<image>How many?", ANSWER),
    talk("a.png", "<image>How many?", REFLECTIVE),
    talk(None, "What is 2 + 2?", "4"),
    talk(["a.png", "b.png"], "<image> or <image>?", "The first."),
    talk("b.png", "<image>Which colour?", "Red.", "And why?", "It is."),
    {"question": "what fields?"},
    talk("a.bmp", "<image>Question: how  MANY?", ANSWER),  # row 0 again
    talk("wide.png", "<image>How wide?", "Two."),
    talk("b.png", "<video>and<image>?", "The video.") | {"videos": [["a.png", "b.png"]]},
]
SFT_DROPPED = {"unread": [10], "image": [1, 5], "prompt": [2], "answer": [3], "special": [4]}
SFT_USABLE = 8  # rows 0, 7, 8, both turns of 9, 11, 12, 13
RL = [
    question("a.png", "How many?"),
    question("b.png", "Which colour?", ["3"]),
    "{half a row",
    question("wide.png", "How large?", []),
    question("nowhere.png", "How many?"),
    question("b.png", LONG),
    question("a.png", "Who drew it?"),
]
HELDOUT = [
    question("a.bmp", "HOW many?"),
    question("small.png", "How small?"),
    question("wide.png", "How large?"),
    question("nowhere.png", "Not read: eval.rows is 3"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """sft.json, rl.jsonl and heldout.json with their images, and a model's folder."""
    folder = tmp_path_factory.mktemp("inputs")
    write_run_inputs(folder)
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a": (56, 56), "b": (56, 56), "wide": (112, 56), "small": (20, 30)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    Image.open(folder / "a.png").save(folder / "a.bmp")
    (folder / "half.png").write_bytes((folder / "a.png").read_bytes()[:4000])
    (folder / "sft.json").write_text(json.dumps(SFT))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in RL]
    (folder / "rl.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "heldout.json").write_text(json.dumps(HELDOUT))
    return folder


def config_of(folder, output, **sections):
    files = {"sft": "sft.json", "rl": "rl.jsonl", "heldout": "heldout.json"}
    tree = {
        "data": {name: {"path": str(folder / file)} for name, file in files.items()} | {"pad_multiple": 16},
        "sft": {"max_answer_tokens": 100, "max_pixels": SFT_PIXELS, "steps": 3},
        "rl": {"max_pixels": RL_PIXELS, "steps": 1},
        "eval": {"rows": 3, "batch_size": 2, "max_new_tokens": 4},
    }
    return run_config(folder, output, **(tree | sections))


@pytest.fixture(scope="module")
def checked(folder, tmp_path_factory):
    """(the configuration, check.json, the exit code, the folder of the report)."""
    output = tmp_path_factory.mktemp("checked") / "run"
    config = config_of(folder, output)
    code = check.main(["--config", str(output.with_suffix(".yaml"))])
    report = output.with_name("run-check")
    return config, json.loads((report / "check.json").read_text()), code, report


def rows_of(messages):
    """The numbers of the rows that messages name."""
    return [int(message.split(", row ")[1].split(",")[0].split(":")[0]) for message in messages]


def test_every_number_of_the_warm_up(checked, folder):
    config, numbers, code, _ = checked
    sft = numbers["sets"]["data.sft"]
    assert code == 0 and numbers["complete"]
    assert sft["source"] == str(folder / "sft.json")
    assert (sft["rows"], sft["filtered"], sft["usable"]) == (len(SFT), 1, SFT_USABLE)
    assert sft["examples"] == {"read": 13, "wanted": 13, "there": 13} and sft["turns"] == {"1": 11, "2": 1}
    assert {reason: rows_of(messages) for reason, messages in sft["dropped"].items()} == SFT_DROPPED
    # 0: a; 7: none; 8: a and b; 9, twice: b; 11: a; 12: wide, of 112 x 56 pixels, becomes 56 x 28; 13: b and a video.
    assert sft["images"] == {
        "of_an_example": {"0": 1, "1": 6, "2": 1}, "all": 8, "distinct": 3, "shrunk": 1, "enlarged": 0,
    }  # fmt: skip
    assert sft["videos"] == 1
    # Rows over a budget are measured too: 2 and 3 show a. A token of an image is 28 x 28 pixels.
    tokens, pixels = [4, 0, 8, 4, 4, 4, 2, 8, 4, 4], [3136] * 9 + [6272]
    assert_quantiles(sft, "image_tokens", tokens)
    assert_quantiles(sft, "patches", [4 * count for count in tokens])
    assert_quantiles(sft, "pixels", pixels)
    processor = Processor.from_folder(folder / "model", max_pixels=SFT_PIXELS)
    source = open_source(config.data.sft)
    pairs = {}
    for index in range(len(source)):
        try:
            pairs[source[index].row, len(source[index].history)] = processor.encode_pair(source[index])
        except RowError:
            continue
    assert sorted(pairs) == [(0, 0), (2, 0), (3, 0), (7, 0), (8, 0), (9, 0), (9, 1), (11, 0), (12, 0), (13, 0)]
    assert_quantiles(sft, "prompt_tokens", [len(prompt.tokens_T) for prompt, _ in pairs.values()])
    assert_quantiles(sft, "answer_tokens", [len(answer) for _, answer in pairs.values()])
    assert sft["alike"] == {
        "image": {"rows": 4, "pairs": [[0, 8], [8, 9], [0, 11], [8, 13]]},
        "question": {"rows": 1, "pairs": [[0, 11]]},
        "both": {"rows": 1, "pairs": [[0, 11]]},
    }
    assert sft["budgets"]["pixels"] == {"sft.min_pixels": 3136, "sft.max_pixels": 3136}
    assert sft["budgets"]["prompt_tokens"] == {"data.max_prompt_tokens": 256}
    assert sft["budgets"]["answer_tokens"] == {"sft.max_answer_tokens": 100}


def assert_quantiles(found, series, values):
    low, five, median, most, high = np.percentile(values, [0, 5, 50, 95, 100])
    expected = {"min": low, "5%": five, "median": median, "mean": np.mean(values), "95%": most, "max": high}
    assert found["quantiles"][series] == pytest.approx(expected), series


def test_every_number_of_the_questions(checked, folder, capsys):
    _, numbers, _, _ = checked
    rl, held = numbers["sets"]["data.rl"], numbers["sets"]["data.heldout"]
    assert (rl["rows"], rl["filtered"], rl["usable"]) == (7, 0, 4)
    assert {reason: rows_of(messages) for reason, messages in rl["dropped"].items()} == {
        "unread": [2], "image": [4], "prompt": [5],
    }  # fmt: skip
    assert rl["images"] == {"of_an_example": {"1": 4}, "all": 4, "distinct": 3, "shrunk": 0, "enlarged": 0}
    assert_quantiles(rl, "image_tokens", [4, 4, 8, 4, 4])  # rows 0, 1, 3, 5, 6
    assert rl["alike"]["image"] == {"rows": 1, "pairs": [[0, 6]]} and not rl["alike"]["question"]["rows"]
    assert lint(["lint", str(folder / "rl.jsonl"), "--json"]) == 0
    findings = [row for row in json.loads(capsys.readouterr().out) if row["row"] != 2]  # which no source gives
    assert [{"file": str(folder / "rl.jsonl"), **finding} for finding in rl["key_steps"]["findings"]] == findings
    assert rl["key_steps"]["kinds"] == {"missing": 1, "short": 1, "general": 4, "absent": 5}
    assert rl["key_steps"]["rows"] == 6
    assert (held["rows"], held["usable"], held["dropped"]) == (3, 3, {})
    assert held["examples"] == {"read": 3, "wanted": 3, "there": 4}
    assert_quantiles(held, "image_tokens", [4, 6, 8])  # 20 x 30 pixels become 56 x 84
    assert held["images"]["enlarged"] == 1
    # The wide image is shrunk for the warm-up alone, and is yet the same.
    assert numbers["heldout_like"]["data.sft"] == {
        "image": {"rows": 2, "pairs": [[0, 0], [12, 2]]},
        "question": {"rows": 1, "pairs": [[0, 0]]},
        "both": {"rows": 1, "pairs": [[0, 0]]},
    }
    assert numbers["heldout_like"]["data.rl"] == {
        "image": {"rows": 2, "pairs": [[0, 0], [3, 2]]},
        "question": {"rows": 2, "pairs": [[0, 0], [3, 2]]},
        "both": {"rows": 2, "pairs": [[0, 0], [3, 2]]},
    }
    assert (numbers["rows_leaked"], numbers["rows_dropped"]) == (2, 9)


def test_training_drops_the_same_rows_and_plans_the_same_shapes(checked, folder, tmp_path, capsys, monkeypatch):
    """A run whose updates go over all rows once, so that each bad row is met. Nothing is computed in it."""

    def answers(self, weights, prompts, sampling, *, group, **where):
        shape = (len(prompts.next_position_B), group, sampling.max_new_tokens)
        return Rollout(np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.ones(shape, bool))

    def plan(self, *args, plan=Run.plan, **options):
        planned.append(plan(self, *args, **options))
        return planned[-1]

    planned = []
    monkeypatch.setattr(Run, "plan", plan)
    monkeypatch.setattr(Run, "sample", answers)
    monkeypatch.setattr(StepGRPO, "logprobs", lambda self, params, rows, tokens, mask: np.zeros(mask.shape))
    monkeypatch.setattr(
        Stage, "update", lambda self, batches: ({"skipped_updates": 0}, [np.zeros(b.weight_BGT.shape) for b in batches])
    )
    train(config_of(folder, tmp_path / "run"), pool=FakeScorerPool())
    sets, said = checked[1]["sets"], capsys.readouterr().err.splitlines()
    for found in sets.values():
        dropped = {line.removeprefix("dropped: ") for line in said if line.startswith(f"dropped: {found['source']}")}
        assert dropped == {message for messages in found["dropped"].values() for message in messages}
    sft, rollout, step_grpo, held, after_sft, after_rl = [[dataclasses.asdict(s) for s in p.shapes] for p in planned]
    assert held == after_sft == after_rl == shapes(sets["data.heldout"]["batches"]["held out"])
    assert sft == shapes(sets["data.sft"]["batches"]["sft"])
    assert rollout == shapes(sets["data.rl"]["batches"]["rollout"])
    assert step_grpo == shapes(sets["data.rl"]["batches"]["step_grpo"])


def shapes(batches):
    """The planned ones."""
    sides = ("prompt", "answer", "rows", "patches")
    return [{side: shape[side] for side in sides} for shape in batches["shapes"] if shape["planned"]]


def test_padding_is_that_of_the_batches(checked, folder):
    config, numbers, _, _ = checked
    processor = Processor.from_folder(folder / "model").for_stage(config.sft, config.data)
    encode = partial(processor.encode_pair, max_tokens=256, max_answer_tokens=100)
    rows = islice(read_rows(open_source(config.data.sft), encode, seed=0), 13)
    pairs = [row[1] for _, row in rows if not isinstance(row, RowError)]
    batches = in_micro_batches([size_of(*pair) for pair in pairs], 4, 2)
    buckets = plan_shapes(batches, count=config.data.buckets, multiple=16, merge=2, shards=1)
    ordered = [sorted(pairs[i : i + 4], key=lambda pair: size_of(*pair).tokens) for i in (0, 4)]
    parts = [update[i : i + 2] for update in ordered for i in (0, 2)]
    share = padding([collate_pairs(part, buckets)[0] for part in parts])
    found = numbers["sets"]["data.sft"]["batches"]["sft"]
    assert found["planned_from"] == len(pairs) == SFT_USABLE
    assert sum(shape["batches"] for shape in found["shapes"]) == len(parts) == 4
    assert found["padding_tokens"] == pytest.approx(share["padding/tokens"])
    assert found["padding_patches"] == pytest.approx(share["padding/patches"])


def test_the_picture(checked):
    with Image.open(checked[-1] / "check.png") as image:
        image.load()
        assert image.size == (1440, 1100)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_strict_and_text(folder, tmp_path, capsys):
    config_of(folder, tmp_path / "run")
    command = ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"), "--strict"]
    assert check.main(command) == 1
    said = capsys.readouterr().out
    for line in (
        "LEAK: 2 held-out rows are also in data.rl, with the same question and images",
        "LEAK: 1 held-out rows are also in data.sft, with the same question and images",
        "row 1, images[0]: ", "row 2: the prompt has ", "row 3, answer: ", "the special token '<|im_end|>'",
        "training drops 9 rows and sees 2 held-out rows",
    ):  # fmt: skip
        assert line in said, line
    assert said.splitlines()[-1] == f"written: {tmp_path / 'out' / 'check.json'}, {tmp_path / 'out' / 'check.png'}"
    (folder / "clean.json").write_text(json.dumps([SFT[0], SFT[12]]))
    (folder / "other.json").write_text(json.dumps([question("small.png", "How small?")]))
    clean = ["--data.sft.path", str(folder / "clean.json"), "--data.heldout.path", str(folder / "other.json")]
    assert check.main([*command, *clean, "--stages", "[sft]"]) == 0
    assert "training drops 0 rows and sees 0 held-out rows" in capsys.readouterr().out


REACHED = ["A", "<answer> A </answer>", "So \\boxed{3}", "Answer: B", ANSWER, f"{ANSWER} or 4"]
UNREACHED = ["### The final answer is:", "### Step 1:\nIt is 3.\n\n### The final answer is: \n\n### Notes:\n3"]


def test_solutions_that_no_answer_reaches(folder, tmp_path, capsys):
    """Of questions and of held-out ones, in every frame of an answer; dropped rows are not scored."""
    rows = [question("a.png", "How many?") | {"solution": text} for text in [*REACHED, *UNREACHED, UNREACHED[0]]]
    rows.append(question("nowhere.png", "How many?") | {"solution": UNREACHED[0]})
    (folder / "solutions.json").write_text(json.dumps(rows))
    config_of(folder, tmp_path / "run", eval={"rows": len(rows), "batch_size": 2, "max_new_tokens": 4})
    path = str(folder / "solutions.json")
    command = ["--config", str(tmp_path / "run.yaml"), "--stages", "[step_grpo]"]
    assert check.main([*command, "--data.rl.path", path, "--data.heldout.path", path]) == 0
    sets = json.loads((tmp_path / "run-check" / "check.json").read_text())["sets"]
    for name in ("data.rl", "data.heldout"):
        assert [found["row"] for found in sets[name]["unreachable"]] == [
            len(REACHED),
            len(REACHED) + 1,
            len(REACHED) + 2,
        ]
    said = capsys.readouterr().out
    assert said.count("solutions: 3 that earn no accuracy when they are scored against themselves") == 2
    assert "row 7: ''" in said


@pytest.mark.parametrize("answer_format", ["think", "boxed"])
def test_solutions_are_scored_in_the_format_of_answers(answer_format, folder, tmp_path):
    """Whatever their own format is; key steps are searched where the format has its steps."""
    steps = {"key_steps": {"Steps": [["12/2 = 6"]]}}
    texts = [
        "### Step 1: So 12/2 = 6 holds.\n### The final answer is: 3",
        "12/2 = 6, so\n#### 3",
        "3",
        "<answer>3</answer>",
    ]
    rows = [question("a.png", "How many?") | steps | {"solution": text} for text in [*texts, UNREACHED[0]]]
    (folder / "formats.json").write_text(json.dumps(rows))
    config_of(folder, tmp_path / "run", data={"rl": {"path": str(folder / "formats.json")}}, eval={})
    command = ["--config", str(tmp_path / "run.yaml"), "--stages", "[step_grpo]", "--rl.format", answer_format]
    assert check.main(command) == 0
    found = json.loads((tmp_path / "run-check" / "check.json").read_text())["sets"]["data.rl"]
    assert [row["row"] for row in found["unreachable"]] == [4]


def test_keys_that_nobody_reads(folder, tmp_path, capsys):
    (folder / "keys.json").write_text(json.dumps([SFT[0] | {"label": 1}]))
    config_of(folder, tmp_path / "run", data={"sft": {"path": str(folder / "keys.json")}}, eval={}, stages=["sft"])
    assert check.main(["--config", str(tmp_path / "run.yaml")]) == 0
    numbers = json.loads((tmp_path / "run-check" / "check.json").read_text())["sets"]["data.sft"]
    assert numbers["notes"] == [f"{folder / 'keys.json'}: keys that are not read: label"]
    assert "  keys that are not read: label\n" in capsys.readouterr().out


def test_parquet_is_checked_as_json(checked, folder, tmp_path):
    """The same rows with the images inside. What is wrong with a row is found when it is read."""
    rows = [
        {
            "image": {"bytes": path.read_bytes()} if (path := folder / row["image_path"]).is_file() else None,
            "image_path": None if path.is_file() else row["image_path"],
        }
        | {key: row[key] for key in ("problem", "solution", "key_steps")}
        for row in RL
        if not isinstance(row, str)
    ]
    pq.write_table(pa.Table.from_pylist([*rows, {"problem": "x"}]), folder / "rl.parquet", row_group_size=2)
    config_of(
        folder, tmp_path / "run", data={"rl": {"path": str(folder / "rl.parquet")}}, eval={}, stages=["step_grpo"]
    )
    assert check.main(["--config", str(tmp_path / "run.yaml")]) == 0
    found = json.loads((tmp_path / "run-check" / "check.json").read_text())["sets"]["data.rl"]
    expected = checked[1]["sets"]["data.rl"]
    for key in ("rows", "usable", "images", "quantiles"):
        assert found[key] == expected[key], key
    assert [len(found["dropped"][reason]) for reason in ("unread", "image", "prompt")] == [1, 1, 1]
    assert found["dropped"]["unread"] == [
        f"{folder / 'rl.parquet'}, row 6, solution: None; expected a text that is not empty"
    ]


def test_named_rows(folder, tmp_path, capsys):
    rows = [talk(f"no-{i}.png", "<image>How many?", ANSWER) for i in range(7)] + [SFT[0]]
    (folder / "many.json").write_text(json.dumps(rows))
    config_of(folder, tmp_path / "run", data={"sft": {"path": str(folder / "many.json")}}, eval={}, stages=["sft"])
    command = ["--config", str(tmp_path / "run.yaml")]
    assert check.main(command) == 0
    said = capsys.readouterr().out
    assert "row 4, images[0]" in said and "row 5, images[0]" not in said and "and 2 more" in said
    assert check.main([*command, "--all"]) == 0
    said = capsys.readouterr().out
    assert "row 6, images[0]" in said and " more" not in said


def test_bad_input(folder, tmp_path, capsys):
    config_of(folder, tmp_path / "run")
    command = ["--config", str(tmp_path / "run.yaml")]
    (folder / "bad.json").write_text(json.dumps([SFT[1], SFT[10]]))
    (folder / "worse.json").write_text(json.dumps([SFT[10], 3]))
    for overrides, says in (
        (["--rl.betta", "1"], "did you mean rl.beta"),
        (["--data.sft.path", str(tmp_path / "nothing")], f"{tmp_path / 'nothing'}: no such file"),
        (["--model.path", str(tmp_path / "nothing")], f"{tmp_path / 'nothing'}: no such folder"),
        (["--out", str(tmp_path / "run" / "check")], "is inside output_dir"),
        (["--data.sft.path", str(folder / "bad.json"), "--stages", "[sft]"], "bad.json: no usable row"),
        (["--data.sft.path", str(folder / "worse.json"), "--stages", "[sft]"], "worse.json: no usable row"),
    ):
        assert check.main([*command, *overrides]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and says in error[0], (overrides, error)


def test_interrupted(folder, tmp_path, capsys, monkeypatch):
    config_of(folder, tmp_path / "run")

    def some(*args, whole=reading.read, **options):
        yield from islice(whole(*args, **options), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "read", some)
    assert check.main(["--config", str(tmp_path / "run.yaml")]) == 130
    said = capsys.readouterr().out
    assert "the first 3 of 13 examples" in said and "data.rl" not in said
    assert said.splitlines()[-1] == "interrupted: a report on what had been read; no file is written"
    assert not list((tmp_path / "run-check").iterdir())


def test_the_command_with_workers(checked, folder, tmp_path):
    """As it is called: worker processes give the same report, with no backend of jax and none of the weights."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    config_of(folder, tmp_path / "run", model={"path": str(model)})
    command = [sys.executable, "-m", "r1vl_jax.data.check", "--config", str(tmp_path / "run.yaml"), "--workers", "2"]
    done = subprocess.run(
        [*command, "--stages", "[sft]"],
        env=os.environ | {"JAX_PLATFORMS": "nowhere"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "run-check" / "check.json").read_text())
    expected = checked[1]
    for key in ("data.sft", "data.heldout"):
        assert numbers["sets"][key] == expected["sets"][key]
    assert numbers["heldout_like"] == {"data.sft": expected["heldout_like"]["data.sft"]}
