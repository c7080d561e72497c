"""A run that was cut off and resumed is, bit for bit, the run that was not; and what a run leaves in its folder."""

from __future__ import annotations

import contextlib
import json
import shutil
from functools import partial

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.tiny_jax import FakeScorerPool, batch_of, questions, read_lines, run_config, write_run_inputs

from r1vl_jax.checkpoint.hf import load_hf
from r1vl_jax.errors import ConfigError, RowError
from r1vl_jax.model.config import load_config
from r1vl_jax.model.qwen2_vl import prompt_logits
from r1vl_jax.train import train
from r1vl_jax.training.stage import Stage

STAGES = ("sft", "step_grpo")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Each `train` makes its functions anew; their programs are the same and are kept on disk."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


POOL = FakeScorerPool()  # rewards that differ within a group: those of a random model are all 0, without a signal


def cut(patch, stage, step):
    """The next run dies behind that step: after its log, and after its checkpoint if one was due."""
    whole = Stage.finish_step

    def finish_step(self, at, *args):
        whole(self, at, *args)
        if (self.name, at) == (stage, step):
            self.checkpoints.close()  # what is being written in the background arrives
            raise KeyboardInterrupt

    patch.setattr(Stage, "finish_step", finish_step)
    patch.setattr(Stage, "saved_at_the_end", lambda self: contextlib.nullcontext())  # a killed process saves nothing


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """(folder of a run in one go, folder of a run that was cut after step 3 of each stage; a checkpoint every 2)."""
    folder = tmp_path_factory.mktemp("runs")
    held = {"data": {"heldout": {"path": str(inputs / "task" / "heldout.json")}}}
    held["eval"] = {"rows": 3, "batch_size": 2, "max_new_tokens": 6}
    straight, broken = run_config(inputs, folder / "straight", **held), run_config(inputs, folder / "broken", **held)
    train(straight, pool=POOL)
    for number, stage in enumerate(STAGES):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            cut(patch, stage, 3)
            train(broken, resume=number > 0, pool=POOL)
        assert sorted(int(path.name) for path in (folder / "broken" / "checkpoints" / stage).glob("[0-9]*")) == [2]
        assert [row["step"] for row in steps(folder / "broken", stage)] == [1, 2, 3]
    train(broken, resume=True, pool=POOL)
    return folder / "straight", folder / "broken"


def steps(folder, stage):
    return [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == stage and "event" not in row]


def checkpoint(folder, stage, step):
    """The saved state by key path, as orbax finds it on disk."""
    path = folder / "checkpoints" / stage / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(path)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def host_state(folder, stage, step):
    return json.loads((folder / "checkpoints" / stage / str(step) / "host" / "metadata").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_and_optimizer_state(runs, stage):
    """Bit for bit, at the checkpoint before the cut and at the end."""
    for step in (2, 4):
        straight, broken = (checkpoint(folder, stage, step) for folder in runs)
        assert straight.keys() == broken.keys()
        assert any("params" in path for path in straight) and any("opt_state" in path for path in straight)
        for path, array in straight.items():
            assert array.dtype == broken[path].dtype
            np.testing.assert_array_equal(array, broken[path], err_msg=f"step {step}, {path}")
        assert host_state(runs[0], stage, step) == host_state(runs[1], stage, step)
    first, last = (checkpoint(runs[0], stage, step) for step in (2, 4))
    weights = [path for path in first if "params" in path and "kernel" in path]
    assert weights and all((first[path] != last[path]).any() for path in weights)


@pytest.mark.slow
def test_goes_on_with_another_mesh(tmp_path):
    """A checkpoint of fsdp 4 is resumed with fsdp 2 x tensor 2: the next step has the same numbers."""
    inputs, first, other = write_run_inputs(tmp_path, num_key_value_heads=2), tmp_path / "first", tmp_path / "other"
    options = {"stages": ["sft"], "sft": {"steps": 2, "micro_batch_size": 4}, "checkpoint": {"every": 1}}
    train(run_config(inputs, first, mesh={"data": 1, "fsdp": 4}, **options))
    shutil.copytree(first, other)
    shutil.rmtree(other / "checkpoints" / "sft" / "2")
    train(run_config(inputs, other, mesh={"data": 1, "fsdp": 2, "tensor": 2}, **options), resume=True)
    (one, two), (same, again) = steps(first, "sft"), steps(other, "sft")
    assert one == same and again["compilations"] > 0
    for key in ("loss", "grad_norm"):
        assert again[key] == pytest.approx(two[key], rel=1e-5) and again[key] != pytest.approx(one[key], rel=1e-3)


def without_times(rows):
    """Less what belongs to the process: seconds, and the programs that it had to build."""
    of_process = ("seconds/", "tokens_per_second", "compilations")
    return [{k: v for k, v in row.items() if not k.startswith(of_process)} for row in rows]


def test_metrics(runs):
    """Every step once, in order, with the same values; the held-out judgements too."""
    straight, broken = (without_times(read_lines(folder / "metrics.jsonl")) for folder in runs)
    assert straight == broken
    assert [row["step"] for row in steps(runs[1], "sft")] == [1, 2, 3, 4]
    assert [row["step"] for row in steps(runs[1], "step_grpo")] == [1, 2, 3, 4]
    heldout = [(row["stage"], row["step"]) for row in broken if row.get("event") == "heldout"]
    assert heldout == [("sft", 0), ("sft", 4), ("step_grpo", 4)]
    assert all(row["grad_norm"] > 0 for row in broken if "event" not in row)


def test_reference_is_the_warmed_up_model(runs):
    """The first update is made where policy and reference are one, in a resumed run too; then they part."""
    for folder in runs:
        kl = [row["kl"] for row in steps(folder, "step_grpo")]
        assert abs(kl[0]) < 1e-6 and min(kl[1:]) > 1e-3


def test_sampled_answers(runs):
    straight, broken = (read_lines(folder / "rollouts.jsonl") for folder in runs)
    assert straight == broken
    sampled = [row for row in broken if row.get("event") != "heldout"]
    assert [(row["stage"], row["step"]) for row in sampled] == [("step_grpo", 1 + i // 4) for i in range(16)]
    assert len({row["row"] for row in sampled}) == 16
    assert len({answer["text"] for row in sampled for answer in row["answers"]}) > 16
    assert len(broken) == 16 + 3 * 3


def test_exports_are_equal(runs):
    for name in ("warmup", "export"):
        for path in sorted((runs[0] / name).iterdir()):
            assert path.read_bytes() == (runs[1] / name / path.name).read_bytes(), path.name


def test_curves(runs):
    for folder in runs:
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_export_loads_in_transformers(runs):
    """The exported folder holds the last checkpoint's parameters, and transformers computes the same logits from it."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen2VLForConditionalGeneration

    export = runs[0] / "export"
    cfg = load_config(export)
    params = load_hf(export, cfg)
    saved = checkpoint(runs[0], "step_grpo", 4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        np.testing.assert_array_equal(saved["['params']" + jax.tree_util.keystr(path)], leaf)
    hf, report = Qwen2VLForConditionalGeneration.from_pretrained(
        export, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = np.arange(20, 32)
    with torch.no_grad():
        theirs = hf(input_ids=torch.tensor(tokens)[None]).logits[0].numpy()
    prompts = batch_of([encoded := questions([len(tokens)])[0]])
    prompts.tokens_BT[0, : len(encoded.tokens_T)] = tokens
    ours = jax.jit(partial(prompt_logits, cfg=cfg))(params, prompts=prompts)
    np.testing.assert_allclose(np.asarray(ours)[0, : len(tokens)], theirs, atol=1e-4)
    assert theirs.std() > 0.1


def test_existing_runs_are_not_overwritten(runs, inputs):
    """Without --resume or --overwrite a run folder is refused, and nothing in it changes."""
    folder = runs[0]
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="holds a run; add --resume, or --overwrite"):
        train(run_config(inputs, folder))
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_does_not_resume_on_other_images(runs, inputs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    held = {"data": {"heldout": {"path": str(inputs / "task" / "heldout.json")}}}
    config = run_config(inputs, folder, rl={"steps": 5}, **held)
    image = inputs / "task" / json.loads((inputs / "task" / "rl.json").read_text())[0]["image_path"]
    data = image.read_bytes()
    image.write_bytes(data + b"other")
    try:
        with pytest.raises(RowError, match=r"rl.json: has changed since this run began \(images\)"):
            train(config, resume=True, pool=POOL)
    finally:
        image.write_bytes(data)
    assert f"changed since the last start: {image.relative_to(inputs / 'task')}" in capsys.readouterr().err
    assert [row["step"] for row in steps(folder, "step_grpo")] == [1, 2, 3, 4]


def test_other_folders_are_not_touched(inputs, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="is not empty and not a run folder"):
            train(run_config(inputs, folder), **options)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_overwrite_starts_anew(inputs, tmp_path):
    """One step of RL from the model itself: the old run's files go, a step changes every part of the parameters."""
    config = run_config(inputs, tmp_path / "run", stages=["step_grpo"], rl={"steps": 1})
    train(config, pool=POOL)
    (tmp_path / "run" / "leftover").write_text("")
    export = train(config, overwrite=True, pool=POOL)
    assert not (tmp_path / "run" / "leftover").exists()
    assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1]
    cfg = load_config(export)
    before, after = load_hf(inputs / "model", cfg), load_hf(export, cfg)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before), strict=True):
        assert (a != b).any(), jax.tree_util.keystr(path)
