"""Bad rows are dropped, named in one line each and counted; a wrong start ends with exit code 2 and one clear line."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.tiny_jax import read_lines, run_config, write_run_inputs

from r1vl_jax.checkpoint.folder import SUMS
from r1vl_jax.train import main, train

LONG = "How many circles are there? " * 60


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


def sft_row(image, question="How many?", answer="### The final answer is: 3"):
    turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": image}


def rl_row(image, problem="How many?", **fields):
    return {"image_path": image, "problem": problem, "solution": "### The final answer is: 3", **fields}


@pytest.fixture(scope="module")
def dirty(inputs, tmp_path_factory):
    """A folder with sft.json, rl.jsonl and heldout.json, each with good and bad rows."""
    folder = tmp_path_factory.mktemp("dirty")
    shutil.copytree(inputs / "task" / "images", folder / "images")
    good = [f"images/sft-{i:05d}.png" for i in range(4)]
    (folder / "text.png").write_text("not an image")
    whole = (folder / good[0]).read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    sft = [
        sft_row(good[0]),
        sft_row("nowhere.png"),
        sft_row("text.png"),
        {"question": "what fields?"},
        sft_row(good[1]),
        sft_row(good[0], question=LONG),
        sft_row(good[0], answer="it is <|im_end|> here"),
        sft_row(good[0], answer=LONG),
        sft_row("half.png"),
        sft_row(good[2]),
        sft_row(good[3]),
    ]
    (folder / "sft.json").write_text(json.dumps(sft))
    rl = [
        rl_row(good[0]),
        rl_row("nowhere.png"),
        rl_row("text.png"),
        {"problem": "no solution"},
        rl_row(good[1], key_steps={"Steps": None}),
        rl_row(good[2], problem=LONG),
        rl_row(good[2], key_steps={"Steps": [["a", "b"], "c"]}),
        rl_row(good[3]),
    ]
    lines = [json.dumps(row) for row in rl] + ["{half a row"]
    (folder / "rl.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "heldout.json").write_text(json.dumps([rl_row("nowhere.png"), rl_row(good[0])]))
    return folder


# What the one line about each bad row says.
BAD_SFT = {
    1: "nowhere.png",
    2: "text.png",
    3: "expected image_path, problem, solution",
    5: "expected at most 256",
    6: "special token '<|im_end|>'",
    7: "expected at most 100",
    8: "half.png",
}
BAD_RL = {1: "nowhere.png", 2: "text.png", 3: "solution", 5: "expected at most 256", 8: "not JSON"}


def test_bad_rows_are_dropped_named_and_counted(inputs, dirty, tmp_path, capsys):
    """Both stages, with the real scorers: the run ends well, on the good rows alone."""
    paths = {"sft": "sft.json", "rl": "rl.jsonl", "heldout": "heldout.json"}
    config = run_config(
        inputs, tmp_path / "run",
        data={name: {"path": str(dirty / file)} for name, file in paths.items()},
        sft={"steps": 2, "max_answer_tokens": 100},
        rl={"steps": 2},
        eval={"rows": 2, "batch_size": 2, "max_new_tokens": 4},
    )  # fmt: skip
    train(config)
    said = capsys.readouterr().err.splitlines()
    assert said.count(f"{dirty / 'sft.json'}: keys that are not read: question") == 1
    dropped = [line for line in said if line.startswith("dropped: ")]
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    for stage, file, bad in (("sft", "sft.json", BAD_SFT), ("step_grpo", "rl.jsonl", BAD_RL)):
        lines = [line for line in dropped if str(dirty / file) in line]
        for row, says in bad.items():
            # Two updates go over the rows at least once, so that each bad row is met.
            about = [line for line in lines if f"{file}, row {row}" in line]
            assert about and all(says in line for line in about), (row, about)
        assert not [line for line in lines if not any(f"{file}, row {row}" in line for row in bad)]
        counts = [row["rows_dropped"] for row in metrics if row["stage"] == stage and "event" not in row]
        assert counts == sorted(counts) and counts[-1] == len(lines)
    assert any(str(dirty / "heldout.json") in line for line in dropped)
    assert {row["rows"] for row in metrics if row.get("event") == "heldout"} == {1}
    rollouts = [row for row in read_lines(tmp_path / "run" / "rollouts.jsonl") if row.get("event") != "heldout"]
    assert {row["row"] for row in rollouts} == {0, 4, 6, 7}
    assert {answer["status"] for row in rollouts for answer in row["answers"]} == {"ok"}


@pytest.fixture
def command(inputs, tmp_path, capsys):
    """Runs the training command on a configuration that is right but for what is given: (exit code, error line)."""

    def run(*overrides, **sections):
        run_config(inputs, tmp_path / "run", **sections)
        code = main(["--config", str(tmp_path / "run.yaml"), *map(str, overrides)])
        err = capsys.readouterr().err.splitlines()
        (line,) = [line for line in err if line.startswith("error: ")]
        assert err[-1] == line
        return code, line

    return run


def test_unknown_key(command):
    code, line = command("--rl.betta", 1)
    assert (code, line) == (2, "error: rl.betta is not a known key; did you mean rl.beta?")


def test_missing_data_file(command, tmp_path):
    code, line = command("--data.sft.path", tmp_path / "nowhere.json")
    assert code == 2 and f"data.sft.path: {tmp_path / 'nowhere.json'}: no such file" in line


@pytest.mark.parametrize(
    "text, says", [("", "empty"), ("[{", "not JSON"), ("[]", "empty"), ("[1, {}]", "no usable row")]
)
def test_data_files_without_a_usable_row(command, tmp_path, text, says):
    path = tmp_path / "data.json"
    path.write_text(text)
    code, line = command("--data.sft.path", path)
    assert code == 2 and str(path) in line and says in line


@pytest.mark.parametrize("text", [None, "<html>", '[{"problem'], ids=["folder", "html", "cut"])
def test_an_old_run_stays_where_the_input_is_wrong(command, tmp_path, text):
    """What can be seen at once is seen before --overwrite removes anything."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).write_text("precious")
    path = tmp_path / "data.json"
    path.mkdir() if text is None else path.write_text(text)
    code, line = command("--data.sft.path", path, "--overwrite")
    assert code == 2 and f"{path}: " in line
    assert (run / "metrics.jsonl").read_text() == "precious"


def test_data_that_the_run_folder_holds(command, tmp_path):
    """--overwrite would remove it."""
    (tmp_path / "run" / "tfds").mkdir(parents=True)
    for key in ("data.sft.tfds_dir", "data.sft.image_root"):
        options = ["--data.sft.tfds", "mulberry_sft"] if key.endswith("tfds_dir") else []
        code, line = command(*options, f"--{key}", tmp_path / "run" / "tfds")
        assert code == 2 and f"{key}: {tmp_path / 'run' / 'tfds'} is inside output_dir" in line
    code, line = command("--data.sft.image_root", tmp_path / "nowhere")
    assert code == 2 and f"data.sft.image_root: {tmp_path / 'nowhere'}: no such folder" in line


def test_no_row_that_can_be_encoded(command, dirty, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sft_row("nowhere.png")] * 3))
    code, line = command("--data.sft.path", path)
    assert code == 2 and "no usable row among the 3" in line


def test_a_checkpoint_of_another_model(command, inputs, tmp_path):
    model = tmp_path / "llama"
    shutil.copytree(inputs / "model", model, ignore=shutil.ignore_patterns(SUMS))
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    code, line = command("--model.path", model)
    assert code == 2 and f"{model / 'config.json'}: model_type is 'llama', expected 'qwen2_vl'" in line


def test_checkpoints_that_are_not_there_or_broken(command, inputs, tmp_path):
    code, line = command("--model.path", tmp_path / "nothing")
    assert code == 2 and f"{tmp_path / 'nothing'}: no such folder" in line
    model = tmp_path / "cut"
    shutil.copytree(inputs / "model", model, ignore=shutil.ignore_patterns(SUMS))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, line = command("--model.path", model, "--output_dir", tmp_path / "second")
    assert code == 2 and str(weights) in line


def test_no_such_configuration(tmp_path, capsys):
    assert main(["--config", str(tmp_path / "nothing.yaml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nothing.yaml'}: no such file; expected a YAML file\n"


def test_mesh_that_does_not_fit(command):
    code, line = command("--mesh.data", 3)
    assert code == 2 and "sft.micro_batch_size is 2, expected a multiple of mesh data*fsdp = 3" in line
    code, line = command("--mesh.data", 16)
    assert code == 2 and "needs 16 devices, there are 8" in line
