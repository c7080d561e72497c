"""The built-in task: its files, its answers (recomputed from the pictures' pixels) and its tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from r1vl_jax.config import ShapesSection, shapes_folder
from r1vl_jax.errors import ConfigError
from r1vl_jax.rewards import score_answer
from r1vl_jax.shapes import ShapesConfig, make_task
from r1vl_jax.shapes.command import main
from r1vl_jax.shapes.draw import COLOURS
from r1vl_jax.shapes.folder import make_shapes
from r1vl_jax.shapes.tokenizer import SPECIAL_TOKENS, task_texts, train_tokenizer, write_checkpoint_files

ROWS = {"sft_rows": 150, "rl_rows": 250, "heldout_rows": 50}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "task"
    make_task(out, seed=3, **ROWS, progress=False)
    return out


@pytest.fixture(scope="module")
def rows(task) -> list[dict]:
    """All rows as (image, question, solution, key steps or None); careless ones are in `careless`, not in solution."""
    table = []
    for row in _read(task / "sft.json"):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].startswith("<image>") and user["content"].count("<image>") == 1
        row = {"image": row["images"], "problem": user["content"][7:], "keys": None}
        kind = "solution" if "### Rationales:" in assistant["content"] else "careless"
        table.append({**row, kind: assistant["content"]})
    for name in ("rl", "heldout"):
        for row in _read(task / f"{name}.json"):
            assert set(row) == {"image_path", "problem", "solution", "key_steps"}
            keys = row["key_steps"]["Steps"]
            table.append(
                {"image": row["image_path"], "problem": row["problem"], "solution": row["solution"], "keys": keys}
            )
    assert len(table) == sum(ROWS.values())
    return table


@pytest.fixture(scope="module")
def solved(rows) -> list[dict]:
    """The rows with a whole solution."""
    return [row for row in rows if "solution" in row]


@pytest.fixture(scope="module")
def checkpoint(task, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint_files(out, train_tokenizer(task_texts(task), out))
    return out


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def _read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _see(path: Path) -> dict[int, tuple[str, str]]:
    """cell -> (colour, kind), from the pixels: the colour by name, the kind by how much of its box a shape fills."""
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (56, 56, 3) and pixels.dtype == np.uint8
    names = {rgb: name for name, rgb in COLOURS}
    found = {}
    for cell in range(4):
        y, x = 28 * (cell // 2), 28 * (cell % 2)
        square = pixels[y : y + 28, x : x + 28]
        drawn = (square != 255).any(-1)
        if not drawn.any():
            continue
        (colour,) = {tuple(int(v) for v in rgb) for rgb in square[drawn]}
        ys, xs = np.nonzero(drawn)
        assert ys.min() >= 1 and ys.max() <= 26 and xs.min() >= 1 and xs.max() <= 26, "a shape leaves its cell"
        height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
        assert 18 <= height <= 24 and abs(height - width) <= 1
        filled = drawn.sum() / (height * width)
        kind = "square" if filled == 1 else "circle" if filled > 0.7 else "triangle"
        found[cell] = (names[colour], kind)
    assert 2 <= len(found) <= 4
    return found


def _count(scene: dict, words: str) -> int:
    """The number of shapes that "red circles", "circles" or "red shapes" names."""
    *colour, noun = words.split()
    kind = noun.rstrip("s")
    return sum((not colour or c == colour[0]) and kind in (k, "shape") for c, k in scene.values())


def _recompute(problem: str, scene: dict) -> str:
    """The answer, by reading the question afresh."""
    if found := re.fullmatch(r"How many ([\w ]+?) are there\?", problem):
        return str(_count(scene, found[1]))
    if found := re.fullmatch(r"Remove all ([\w ]+?)\. How many (.+) are left\?", problem):
        left = {cell: item for cell, item in scene.items() if not _count({0: item}, found[1])}
        return str(_count(left, found[2]))
    if found := re.fullmatch(r"Are there more (.+) than (.+)\?", problem):
        return "yes" if _count(scene, found[1]) > _count(scene, found[2]) else "no"
    found = re.fullmatch(r"How many (.+) and (.+) are there in total\?", problem)
    assert found, f"unknown question: {problem}"
    return str(_count(scene, found[1]) + _count(scene, found[2]))


def _step_bodies(solution: str) -> str:
    bodies = re.findall(r"### Step \d+:(.*?)(?=\n###|\Z)", solution, flags=re.S)
    return " ".join(bodies).lower()


def test_same_seed_same_bytes(task, tmp_path):
    make_task(tmp_path / "again", seed=3, **ROWS, progress=False)
    assert _digest(tmp_path / "again") == _digest(task)
    make_task(tmp_path / "other", seed=4, **ROWS, progress=False)
    assert _read(tmp_path / "other/heldout.json") != _read(task / "heldout.json")


def test_heldout_does_not_depend_on_training_rows(task, tmp_path):
    make_task(tmp_path / "few", seed=3, sft_rows=1, rl_rows=0, heldout_rows=50, progress=False)
    few, many = _digest(tmp_path / "few"), _digest(task)
    assert all(few[name] == many[name] for name in many if "heldout" in name)
    assert _read(tmp_path / "few/rl.json") == []


def test_heldout_shares_no_picture(task, rows):
    scenes = {row["image"]: tuple(sorted(_see(task / row["image"]).items())) for row in rows}
    heldout = [scene for image, scene in scenes.items() if "heldout" in image]
    assert len(set(heldout)) == len(heldout) == ROWS["heldout_rows"]
    assert not set(heldout) & {scene for image, scene in scenes.items() if "heldout" not in image}
    assert {row["image"] for row in rows} == {f"images/{path.name}" for path in (task / "images").iterdir()}


def test_answers_descriptions_and_counts_agree_with_the_pixels(task, solved):
    for row in solved:
        scene = _see(task / row["image"])
        solution = row["solution"]
        assert solution.rpartition("### The final answer is: ")[2] == _recompute(row["problem"], scene), row
        described = re.match(r"### Image Description: (.*)\.\n", solution)[1]
        cells = [part for row in described.split("; ") for part in row.split(", ")]
        seen = {cell: tuple(part.split()) for cell, part in enumerate(cells) if part != "no shape"}
        assert len(cells) == 4 and seen == scene
        stated = re.findall(
            r"the number of ((?:\w+ )?(?:shape|circle|square|triangle)s) is (\d+)\.", _step_bodies(solution)
        )
        assert stated
        for name, number in stated:
            assert int(number) == _count(scene, name), row


def test_careless_answers_leap_to_a_guess(rows):
    careless = [row for row in rows if "careless" in row]
    assert 0.45 < len(careless) / ROWS["sft_rows"] < 0.75
    for row in careless:
        start, _, answer = row["careless"].rpartition("### The final answer is: ")
        assert answer in (("yes", "no") if row["problem"].startswith("Are ") else ("0", "1", "2", "3", "4"))
        assert re.fullmatch(r"### Image Description: .*\.\n(### Step \d: .*\n)+", start)


def test_equations_are_true(solved):
    words = {" plus ": "+", " minus ": "-", " is more than ": ">", " is less than ": "<", " is equal to ": "="}
    for row in solved:
        for sentence in re.findall(r"So (.*)\.", row["solution"]):
            for word, sign in words.items():
                sentence = sentence.replace(word, sign)
            sentence = sentence.replace(" is ", " = ").replace("=", "==")
            assert re.fullmatch(r"[\d +<>=-]+", sentence) and eval(sentence), row


def test_sections_stand_in_order(solved):
    for row in solved:
        headers = re.findall(r"^### ([^:.\n]+[:.])", row["solution"], flags=re.M)
        steps = len(headers) - 4
        assert steps >= 1
        assert headers == [
            "Image Description:",
            "Rationales:",
            "Let's think step by step.",
            *(f"Step {number}:" for number in range(1, steps + 1)),
            "The final answer is:",
        ]
        assert all(line.startswith("### ") for line in row["solution"].split("\n"))


def test_reference_solutions_hold_all_their_key_steps(solved):
    for row in solved:
        if row["keys"] is None:
            continue
        text = _step_bodies(row["solution"])
        assert row["keys"]
        for group in row["keys"]:
            assert len(group) >= 2 and all(group) and len(set(group)) == len(group)
            assert any(alternative.lower() in text for alternative in group), row


def test_questions_and_answers_are_varied(solved):
    answers = Counter(row["solution"].rpartition(" ")[2] for row in solved)
    assert set(answers) >= {"0", "1", "2", "3", "4", "yes", "no"}
    assert max(answers.values()) < 0.4 * len(solved)
    openings = Counter(row["problem"].split()[0] for row in solved)
    assert set(openings) == {"How", "Remove", "Are"}


def test_made_once(task):
    before = {path: path.stat().st_mtime_ns for path in task.rglob("*")}
    make_task(task, seed=3, **ROWS, progress=False)
    assert {path: path.stat().st_mtime_ns for path in task.rglob("*")} == before


def test_other_contents_are_refused(task, tmp_path):
    with pytest.raises(FileExistsError, match="other parameters"):
        make_task(task, seed=4, **ROWS, progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no task.json"):
        make_task(tmp_path, progress=False)
    with pytest.raises(ValueError, match="rl_rows = -1"):
        make_task(tmp_path / "new", rl_rows=-1, progress=False)


def test_failure_leaves_nothing_behind(tmp_path):
    cfg = ShapesConfig(picture_size=28, grid=1, min_shapes=1, max_shapes=1)
    with pytest.raises(ValueError, match="after 9 pictures"):
        make_task(tmp_path / "small", sft_rows=0, rl_rows=0, heldout_rows=13, cfg=cfg, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "field",
    [{"grid": 5}, {"kinds": ("circle", "star")}, {"colours": COLOURS[:1]}, {"max_shapes": 17}, {"max_size": 27}],
)
def test_impossible_configurations_name_the_field(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        ShapesConfig(**field)


def test_command(tmp_path, capsys):
    numbers = {"--seed": "5", "--sft-rows": "3", "--rl-rows": "2", "--heldout-rows": "1"}
    arguments = ["--out", str(tmp_path / "a"), *(word for pair in numbers.items() for word in pair)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}: 3 SFT, 2 RL and 1 held-out rows, seed 5\n"
    assert [len(_read(tmp_path / f"a/{name}.json")) for name in ("sft", "rl", "heldout")] == [3, 2, 1]
    assert main([*arguments, "--seed", "6"]) == 2
    assert "other parameters" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seed", "--sft-rows", "--rl-rows", "--heldout-rows"])
@pytest.mark.parametrize("value", ["-1", "1.5", "1e3", str(2**63), "9" * 5000])
def test_command_names_numbers_out_of_range(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "a"), option, value])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"argument {option}: expected a whole number from 0 to " in err


@pytest.mark.parametrize("where", ["file", "file/in", "a" * 300])
def test_command_says_where_it_cannot_write(tmp_path, capsys, where):
    (tmp_path / "file").write_text("mine")
    assert main(["--out", str(tmp_path / where), "--sft-rows", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_tokenizer_is_small_compact_and_repeatable(task, rows, checkpoint, tokenizer, tmp_path):
    assert len(tokenizer) <= 512
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert max(len(tokenizer(row.get("solution", ""))["input_ids"]) for row in rows) < 90
    train_tokenizer(task_texts(task), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="vocab_size = 263"):
        train_tokenizer(["a"], tmp_path, vocab_size=263)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  two  blanks \n\n\t",
        "图中有3个圆。",
        "\U0001f469\u200d\U0001f467 🙂",
        "\x00\x01\x7f\u200b\ufeff",
        "e\u0301 é \ufb01 \u212b",
        "\u0661\u0662 ½ 12 007",
        "a ,b 's",
    ],
)
def test_text_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_whole(tokenizer):
    text = "a" + "".join(SPECIAL_TOKENS) + " b"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 2 + len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b"


def test_chat_template(tokenizer, checkpoint):
    parts = [{"type": "image"}, {"type": "video", "video": "v.mp4"}, {"type": "text", "text": "How many?"}]
    messages = [{"role": "user", "content": parts}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
        "How many?<|im_end|>\n"
    )
    assert text == prompt + "<|im_start|>assistant\n"
    messages += [{"role": "assistant", "content": " 3 \n"}]
    closed = prompt + "<|im_start|>assistant\n 3 \n<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == closed
    own_system = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert tokenizer.apply_chat_template(own_system, tokenize=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    )
    assert _read(checkpoint / "chat_template.json")["chat_template"] == tokenizer.chat_template


def test_transformers_reads_the_checkpoint_files(checkpoint, tokenizer):
    config = AutoConfig.from_pretrained(checkpoint)
    text, vision = config.text_config, config.vision_config
    assert type(config).__name__ == "Qwen2VLConfig"
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (128, 4, 2)
    assert text.vocab_size == len(tokenizer) and text.rms_norm_eps == 1e-6 and config.tie_word_embeddings
    assert text.rope_parameters["mrope_section"] == [4, 6, 6] and text.rope_parameters["rope_theta"] == 10.0
    assert (vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size) == (2, 64, 4, 128)
    assert tokenizer.convert_ids_to_tokens(
        [config.vision_start_token_id, config.vision_end_token_id, config.image_token_id, config.video_token_id]
    ) == ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    generation = _read(checkpoint / "generation_config.json")
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == ["<|im_end|>", "<|endoftext|>"]
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    assert type(processor).__name__.startswith("Qwen2VLImageProcessor")
    grid = processor(Image.new("RGB", (112, 112)), return_tensors="np")["image_grid_thw"]
    assert grid.tolist() == [[1, 8, 8]]


def test_sizes_are_checked(tokenizer, tmp_path):
    for sizes, message in (
        ({"hidden": 64}, "unknown"),
        ({"hidden_size": 256}, "mrope_section"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"vision_num_heads": 3}, "vision_embed_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            write_checkpoint_files(tmp_path, tokenizer, sizes)
    assert list(tmp_path.iterdir()) == []
    write_checkpoint_files(tmp_path, tokenizer, {"hidden_size": 256, "mrope_section": [8, 12, 12]})
    assert _read(tmp_path / "config.json")["vision_config"]["hidden_size"] == 256


@pytest.mark.parametrize("answer_format", ["think", "boxed"])
def test_solutions_in_other_formats(tmp_path, answer_format):
    """The same questions; each solution is complete, in order and right in its format, and has all its key steps."""
    make_task(tmp_path / "r1vl", sft_rows=6, rl_rows=6, heldout_rows=2, progress=False)
    cfg = ShapesConfig(answer_format=answer_format)
    make_task(tmp_path / answer_format, sft_rows=6, rl_rows=6, heldout_rows=2, cfg=cfg, progress=False)
    plain, made = (json.loads((tmp_path / name / "rl.json").read_text()) for name in ("r1vl", answer_format))
    for before, row in zip(plain, made, strict=True):
        columns = ("image_path", "problem", "key_steps")
        assert [before[column] for column in columns] == [row[column] for column in columns]
        score = score_answer(
            row["solution"], before["solution"], row["key_steps"], rules="robust", answer_format=answer_format
        )
        assert score.reward == pytest.approx(2.1), score


def test_a_task_of_before_a_setting_is_kept(tmp_path):
    make_task(tmp_path / "task", sft_rows=1, rl_rows=1, heldout_rows=1, progress=False)
    record = json.loads((tmp_path / "task" / "task.json").read_text())
    del record["config"]["answer_format"]
    (tmp_path / "task" / "task.json").write_text(json.dumps(record))
    make_task(tmp_path / "task", sft_rows=1, rl_rows=1, heldout_rows=1, progress=False)
    with pytest.raises(FileExistsError, match="other parameters"):
        cfg = ShapesConfig(answer_format="boxed")
        make_task(tmp_path / "task", sft_rows=1, rl_rows=1, heldout_rows=1, cfg=cfg, progress=False)
    with pytest.raises(ValueError, match="answer_format = x: expected r1vl, think, boxed"):
        ShapesConfig(answer_format="x")


def test_each_setting_has_a_folder_of_its_own(tmp_path):
    """Nothing of one setting changes when another is made in the same `dir`; a folder of something else is refused."""
    settings = [ShapesSection(dir=str(tmp_path), seed=seed, sft_rows=3, rl_rows=2, heldout_rows=1) for seed in (0, 1)]
    folders = [shapes_folder(setting) for setting in settings]
    make_shapes(settings[0])
    before = {path: path.read_bytes() for path in folders[0].rglob("*") if path.is_file()}
    make_shapes(settings[1])
    make_shapes(dataclasses.replace(settings[0], format="boxed"))
    make_shapes(settings[0])  # kept as it is
    assert {path: path.read_bytes() for path in folders[0].rglob("*") if path.is_file()} == before
    assert len({*folders, *tmp_path.iterdir()}) == 3 and all((folder / "model").is_dir() for folder in folders)
    (folders[0] / "task" / "task.json").write_text("{}")
    with pytest.raises(FileExistsError, match="was made with other parameters"):
        make_shapes(settings[0])
    with pytest.raises(ConfigError, match="shapes.sft_rows is -1"):
        make_shapes(ShapesSection(dir=str(tmp_path), sft_rows=-1))


def test_two_processes_make_one_folder(tmp_path):
    """The second waits for the first, and both find a whole task and model."""
    code = (
        "from r1vl_jax.config import ShapesSection\\nfrom r1vl_jax.shapes.folder import make_shapes\\n"
        f"make_shapes(ShapesSection(dir={str(tmp_path)!r}, sft_rows=3, rl_rows=2, heldout_rows=1))"
    )
    code = code.replace("\\n", "\n")
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error.decode()
    [folder] = tmp_path.iterdir()
    assert (folder / "model" / "model.safetensors").is_file() and not (folder / "model.draft").exists()
