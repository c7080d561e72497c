"""The rehearsal: it runs the shapes that the steps run, changes nothing, and shows a lack of memory at the start."""

from __future__ import annotations

import jax
import pytest
from helpers.tiny_jax import FakeScorerPool, read_lines, run_config, write_run_inputs

from r1vl_jax.train import UNUSABLE, main
from r1vl_jax.training import rehearsal, stage
from r1vl_jax.training.context import Run
from r1vl_jax.training.programs import gradient_step
from r1vl_jax.training.prove import differences
from r1vl_jax.training.run import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.parametrize("updates", [1, 2])
def test_a_rehearsal_runs_the_shapes_of_the_steps_and_changes_nothing(inputs, tmp_path, monkeypatch, updates):
    seen = {"rehearsal": [], "steps": []}

    def recorded(name):
        def step(programs, state, batches, *, use_buffer):
            batches = list(batches)
            seen[name] += [jax.tree.map(lambda a: (a.shape, a.dtype, str(a.sharding)), batch) for batch in batches]
            return gradient_step(programs, state, batches, use_buffer=use_buffer)

        return step

    monkeypatch.setattr(rehearsal, "gradient_step", recorded("rehearsal"))
    monkeypatch.setattr(stage, "gradient_step", recorded("steps"))
    sections = {
        "data": {"buckets": 1},
        "sft": {"steps": 1},
        "rl": {"steps": 1, "max_new_tokens": 4, "updates_per_rollout": updates},
        "checkpoint": {"every": 1},
    }
    folders = [tmp_path / mode for mode in ("never", "always")]
    for folder in folders:
        train(run_config(inputs, folder, **sections, rehearsal=folder.name), pool=FakeScorerPool())
        if folder.name == "never":
            assert not seen["rehearsal"]
    assert list(differences(*folders)) == []
    assert len(seen["rehearsal"]) == 4
    assert all(batch in seen["steps"] for batch in seen["rehearsal"])


SLOW = pytest.mark.slow


@pytest.mark.parametrize("reference", [pytest.param("device", marks=SLOW), "host", pytest.param("none", marks=SLOW)])
def test_a_rehearsal_has_on_the_devices_what_a_step_has(inputs, tmp_path, monkeypatch, reference):
    """Neither more, or runs that fit would be refused, nor less: bytes when sampling and when updating begin."""
    seen = {"rehearsal": {}, "steps": {}}

    def bytes_of_weights():
        arrays = [a for a in jax.live_arrays() if a.sharding.memory_kind == "device" and a.size > 64 and a.ndim < 4]
        return sum(a.nbytes for a in arrays if a.dtype in ("float32", "bfloat16"))

    def recorded(phase, call):
        def wrapped(*arguments, **options):
            before = seen["rehearsal" if phase not in seen["rehearsal"] else "steps"]
            before[phase] = bytes_of_weights() - base
            return call(*arguments, **options)

        return wrapped

    monkeypatch.setattr(Run, "sample", recorded("sample", Run.sample))
    for module in (rehearsal, stage):
        monkeypatch.setattr(module, "gradient_step", recorded("update", gradient_step))
    beta = 0.0 if reference == "none" else 0.04
    rl = {"steps": 1, "max_new_tokens": 4, "reference": reference, "beta": beta}
    config = run_config(inputs, tmp_path / "run", stages=["step_grpo"], data={"buckets": 1}, rl=rl, rehearsal="always")
    base = bytes_of_weights()
    train(config, pool=FakeScorerPool())
    assert seen["rehearsal"].keys() == seen["steps"].keys() == {"sample", "update"}
    for phase, size in seen["steps"].items():
        assert seen["rehearsal"][phase] == pytest.approx(size, rel=0.05), phase


@pytest.mark.parametrize("mode", ["always", "auto"])
def test_a_lack_of_memory_is_one_line(inputs, tmp_path, capsys, mode):
    """StepGRPO needs more than any machine has: known before stage 1 with a rehearsal, after it without one."""
    big = {"group_size": 1 << 16, "max_new_tokens": 1 << 20, "questions_per_step": 2, "steps": 1}
    sections = {"rl": big, "sft": {"steps": 2}, "checkpoint": {"every": 1}}
    run_config(inputs, tmp_path / "run", rehearsal=mode, **sections)
    assert main(["--config", str(tmp_path / "run.yaml")]) == (UNUSABLE if mode == "always" else 3)
    error = capsys.readouterr().err.strip().splitlines()
    place = {"always": "rehearsal of step_grpo, on the largest batch of", "auto": "step_grpo"}[mode]
    (line,) = [line for line in error if line.startswith("error: ")]
    assert line.startswith(f"error: {place}") and "too little memory" in line and "rl.reference host" in line
    assert ("rl.micro_batch_size" in line) == (mode == "always")  # a resumed run may not change it
    assert "Traceback" not in "\n".join(error)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert (error[-1] == "step_grpo: no step was finished; --resume goes on with this stage") == (mode == "auto")
    assert len(read_lines(metrics) if metrics.exists() else []) == {"always": 0, "auto": 2}[mode]
