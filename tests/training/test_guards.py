"""Guards: skipped updates, the certificate, alarms, truncated answers; by hand, and with the fault itself in a run."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tiny_jax import FakeScorerPool, read_lines, run_config, write_run_inputs
from test_resume import checkpoint, compiled_once, cut, steps  # noqa: F401 (the fixture is used by being here)

from r1vl_jax.checkpoint.folder import SUMS
from r1vl_jax.checkpoint.hf import load_hf, save_hf
from r1vl_jax.config import GuardsSection
from r1vl_jax.config_stages import OptimizerSection
from r1vl_jax.errors import CheckpointError, GuardError
from r1vl_jax.model.config import load_config
from r1vl_jax.rewards.length import overlong_penalty
from r1vl_jax.train import main, train
from r1vl_jax.training import optimizer as optimizers
from r1vl_jax.training.context import Run
from r1vl_jax.training.guards import Guards, token_metrics
from r1vl_jax.training.stage import Stage
from r1vl_jax.types import TrainBatch, TrainState

# The update.


def adamw():
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)
    )


def state_of(optimizer, n=4):
    params = {"text": {"a": jnp.arange(n, dtype=jnp.float32), "b": jnp.ones((2, n))}, "vision": {"c": jnp.ones(3)}}
    return TrainState(jnp.int32(0), params, optimizer.init({"text": params["text"]}))


def gradients(value=0.5, n=4):
    return {"text": {"a": jnp.full(n, value), "b": jnp.full((2, n), -0.25)}}


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))]


@pytest.mark.parametrize(
    "grads, loss",
    [
        (gradients(np.nan), 1.0),
        (gradients(np.inf), 1.0),
        (gradients(1e30), 1.0),  # its norm is not finite
        (gradients(), np.nan),
        (gradients(), -np.inf),
    ],
)
def test_an_update_that_is_not_finite_changes_nothing(grads, loss):
    """Parameters, moments and the schedule's count; the updates after it are those of a run without it."""
    optimizer = adamw()
    run = jax.jit(partial(optimizers.update, optimizer=optimizer))
    good = run(state_of(optimizer), gradients(), jnp.float32(1.0))[0]
    skipped, norm = run(good, grads, jnp.float32(loss))
    assert int(skipped.step) == 2 and not (math.isfinite(norm) and math.isfinite(loss))
    for before, after in zip(leaves(good), leaves(skipped), strict=True):
        np.testing.assert_array_equal(before, after)
    straight, after = (run(state, gradients(0.1), jnp.float32(1.0))[0] for state in (good, skipped))
    for a, b in zip(leaves(straight), leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(leaves(good), leaves(after), strict=True))


def test_the_choice_reads_no_array_again():
    """It depends on two numbers that are there anyway: the same reductions as in the update without it."""
    optimizer = adamw()

    def plain(state, grads, loss):
        trained = {"text": state.params["text"]}
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = state.params | optax.apply_updates(trained, updates)
        return TrainState(state.step + 1, params, opt_state), optax.global_norm(grads)

    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (
            jax.jit(f).lower(state_of(optimizer), gradients(), jnp.float32(0)).as_text().count("stablehlo.reduce")
            for f in (partial(optimizers.update, optimizer=optimizer), plain)
        )
    assert ours == theirs > 0


def test_updates_within_the_limits_of_the_configuration_stay_finite():
    """The largest rate, decay and gradient that OptimizerSection takes, from weights of any finite size."""
    section = OptimizerSection(learning_rate=1000.0, max_grad_norm=1e12, weight_decay=1e-3, b2=0.99999)
    optimizer = optax.chain(
        optax.clip_by_global_norm(section.max_grad_norm),
        optax.adamw(section.learning_rate, b2=section.b2, weight_decay=section.weight_decay),
    )
    params = {"text": {"a": jnp.array([0.0, 1e30, -1e30, 1e-30])}}
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    run = jax.jit(partial(optimizers.update, optimizer=optimizer))
    for size in (1e12, 1e-12, 1e18, 0.0, 1e12):
        state, norm = run(state, {"text": {"a": size * jnp.array([1.0, -1.0, 0.0, 1.0])}}, jnp.float32(0.0))
        assert math.isfinite(norm)
    assert all(np.isfinite(leaf).all() for leaf in leaves(state))


# Metrics of tokens, alarms, penalties.


def test_mismatch_by_hand():
    """Three questions of two answers; the last fills the micro-batch and does not count, nor does what is masked.

    No image: 0.1 and 0.3; two images: 0.5. The mean of all is 0.3. One token has ref - lp = 21.
    """
    sampled = np.array([[[-1.0, -2.0, 9.0], [-1.0, 9.0, 9.0]], [[-3.0, 9.0, 9.0], [9.0, 9.0, 9.0]], [[9.0] * 3] * 2])
    ours = np.array([[[-3.5, np.nan], [np.nan, np.nan]], [[np.nan] * 2] * 2])  # of questions 1 and 2
    other = np.array([[[-0.9, np.nan], [-1.3, np.inf]]])  # of question 0, whose second token is masked
    weights = [np.array([[[0.5, 0], [0, 0]], [[0, 0], [0, 0]]]), np.array([[[0.25, 0], [0.25, 0]]])]
    refs = [np.full((2, 2, 2), 17.5), np.full((1, 2, 2), 19.0)]
    batches = [
        (part, TrainBatch(None, None, weight, ref_logprobs_BGT=ref))
        for part, weight, ref in zip((np.array([1, 2]), np.array([0])), weights, refs, strict=True)
    ]
    got = token_metrics(sampled, np.array([0, 2, 1]), batches, [ours, other])
    assert got.pop("kl_cut") == 2  # 17.5 + 3.5 = 21 and 19 + 1.3 = 20.3, not 19 + 0.9
    assert got == pytest.approx({
        "mismatch/mean": 0.3, "mismatch/max": 0.5, "mismatch/mean/images_0": 0.2, "mismatch/max/images_0": 0.3,
        "mismatch/mean/images_2": 0.5, "mismatch/max/images_2": 0.5,
    })  # fmt: skip


class Log:
    def __init__(self):
        self.said, self.rows = [], []
        self.say, self.nonfinite, self.folder = self.said.append, self.rows.append, "RUN"


def guards(dtype="float32", **section):
    config = SimpleNamespace(
        guards=GuardsSection(**section), model=SimpleNamespace(dtype=dtype), rl=SimpleNamespace(max_new_tokens=100)
    )
    return Guards(config, Log(), "step_grpo")


def mismatch(mean, largest=0.5):
    return {"mismatch/mean": 0.0, "mismatch/mean/images_1": mean, "mismatch/max/images_1": largest}


@pytest.mark.parametrize(
    "mean, dtype, section, refused",
    [
        (1e-6, "float32", {}, False), (2e-4, "float32", {}, True), (2e-4, "bfloat16", {}, False),
        (0.06, "bfloat16", {}, True), (0.06, "bfloat16", {"mismatch": 0.07}, False),
        (1e-6, "float32", {"mismatch": 1e-7}, True), (100.0, "float32", {"mismatch": 0.0}, False),
        (math.nan, "float32", {}, True),
    ],
)  # fmt: skip
def test_the_gate(mean, dtype, section, refused):
    """Each number of images counts for itself; only the first certificate of a process is refused."""
    watch = guards(dtype, **section)
    watch.certify(1, {"reward": 1.0})  # a step without an update has none
    if not refused:
        return watch.certify(2, mismatch(mean))
    with pytest.raises(GuardError, match="questions with 1 images .* expected at most .*guards.mismatch.* temperature"):
        watch.certify(2, mismatch(mean))
    watch.certify(3, mismatch(mean))


def test_an_alarm_is_said_when_it_begins():
    watch = guards(kl=2.0, length=0.5)
    values = [
        ({"kl": 1.0, "length": 50.0}, 0), ({"kl": 3.0, "length": 51.0}, 2), ({"kl": 4.0, "length": 40.0}, 1),
        ({}, 0), ({"kl": 2.5}, 1), ({"kl": math.nan}, 1),
    ]  # fmt: skip
    assert [watch.alarms(step, metrics) for step, (metrics, _) in enumerate(values)] == [count for _, count in values]
    said = [line.split(": ")[1:3] for line in watch._log.said]
    assert said == [
        ["step_grpo step 1", "kl is 3, above 2 (guards.kl)"],
        ["step_grpo step 1", "length is 51, above 50 (guards.length)"],
        ["step_grpo step 4", "kl is 2.5, above 2 (guards.kl)"],
    ]
    off = guards(kl=0.0, length=1.0, mismatch=0.0)
    assert off.alarms(1, {"kl": 1e9, "length": 100.0, "mismatch/mean": 9.0}) == 0


def test_overlong_penalty_by_hand():
    """DAPO, equation 13, with its own numbers: 20,480 tokens, of which 4,096 are the window; and a window of one."""
    lengths = {1: 0.0, 16384: 0.0, 16385: -1 / 4096, 18432: -0.5, 20479: -4095 / 4096, 20480: -1.0, 30000: -1.0}
    for tokens, expected in lengths.items():
        assert overlong_penalty(tokens, 20480, 4096) == expected
    assert [overlong_penalty(tokens, 10, 1) for tokens in (8, 9, 10)] == [0.0, 0.0, -1.0]


# Runs, with the fault itself.

REWARD = """
import os
from pathlib import Path

calls = 0

def mine(completions, examples):
    global calls
    calls += 1
    if calls >= int(os.environ["R1VL_BAD_FROM"]):
        return [float("nan") for _ in completions]
    return [float(len(text) % 5) for text in completions]

def one_row(completions, examples):
    global calls
    calls += 1
    file = Path(os.environ["R1VL_BAD_ROW"])
    if calls == 2 and not file.exists():
        file.write_text(str(examples[-1].row))
    bad = file.exists() and int(file.read_text())
    values = [float(len(text) % 5) for text in completions]
    return [float("inf") if file.exists() and e.row == bad else v for e, v in zip(examples, values)]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module with REWARD, new for each test: its count of calls begins at 0."""
    name = f"guarded_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def rl(inputs, folder, **options):
    sections = {name: options.pop(name) for name in ("guards", "model", "checkpoint") if name in options}
    return run_config(inputs, folder, stages=["step_grpo"], rl={"steps": 4, "max_new_tokens": 8} | options, **sections)


def strict(path):
    """The rows of a file, which is JSON as the standard has it: without NaN."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def saved(folder, stage):
    return sorted(int(path.name) for path in (folder / "checkpoints" / stage).glob("[0-9]*"))


def test_one_reward_that_is_not_finite(inputs, tmp_path, monkeypatch, module, capsys):
    """Step 2 is skipped, counted and written down; its checkpoint comes after step 3. Resumed: the same bits."""
    monkeypatch.setenv("R1VL_BAD_ROW", str(tmp_path / "bad_row"))
    options = {"rewards": [f"{module}:one_row"]}
    whole = train(rl(inputs, tmp_path / "straight", **options), pool=FakeScorerPool())
    said = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert (
        len(said) == 1 and f"step_grpo step 2: not finite: reward/{module}:one_row; the update was skipped" in said[0]
    )
    rows = steps(tmp_path / "straight", "step_grpo")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0, 0]
    assert "loss" not in rows[1] and all(row["grad_norm"] > 0 for i, row in enumerate(rows) if i != 1)
    assert rows[1]["reward"] is None and strict(tmp_path / "straight" / "metrics.jsonl")
    (skipped,) = strict(tmp_path / "straight" / "nonfinite.jsonl")
    assert (skipped["stage"], skipped["step"], skipped["skipped_in_row"]) == ("step_grpo", 2, 1)
    assert skipped["not_finite"] == [f"reward/{module}:one_row"] and skipped["metrics"]["reward"] == "inf"
    sampled = [row for row in strict(tmp_path / "straight" / "rollouts.jsonl") if row["step"] == 2]
    assert [(q["source"], q["row"]) for q in skipped["questions"]] == [(row["source"], row["row"]) for row in sampled]
    bad = int((tmp_path / "bad_row").read_text())
    for question, row in zip(skipped["questions"], sampled, strict=True):
        assert (question["rewards"] == ["inf", "inf"]) == (row["row"] == bad)
        assert [answer["reward"] is None for answer in row["answers"]] == [row["row"] == bad] * 2
    assert saved(tmp_path / "straight", "step_grpo") == [3, 4]
    broken = rl(inputs, tmp_path / "broken", **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut(patch, "step_grpo", 3)
        train(broken, pool=FakeScorerPool())
    resumed = train(broken, resume=True, pool=FakeScorerPool())
    for name in ("nonfinite.jsonl", "rollouts.jsonl", "export/model.safetensors"):
        assert (whole.parent / name).read_bytes() == (resumed.parent / name).read_bytes(), name


def test_certificate_of_the_built_in_task(inputs, tmp_path):
    """fp32: mean below 1e-6, largest below 1e-4, in every step; top-k and top-p do not enter."""
    for name, options in {"plain": {}, "cut": {"top_k": 50, "top_p": 0.9}}.items():
        train(rl(inputs, tmp_path / name, steps=2, **options), pool=FakeScorerPool())
        for row in steps(tmp_path / name, "step_grpo"):
            assert 0 < row["mismatch/mean"] < 1e-6 and row["mismatch/mean"] < row["mismatch/max"] < 1e-4
            assert row["mismatch/max/images_1"] == row["mismatch/max"]
            assert row["kl_cut"] == row["skipped_updates"] == 0


def test_a_reward_that_stays_not_finite_stops_the_run(inputs, tmp_path, monkeypatch, module, capsys):
    """After guards.max_skipped steps: one line, exit code 3, the checkpoint of the last good step; --resume goes on."""
    monkeypatch.setenv("R1VL_BAD_FROM", "3")
    rl(inputs, tmp_path / "run", rewards=[f"{module}:mine"], steps=9, guards={"max_skipped": 4})
    file = str((tmp_path / "run").with_suffix(".yaml"))
    assert main(["--config", file]) == 3
    *_, line, note = capsys.readouterr().err.splitlines()
    assert note == "step_grpo: saved after step 2; --resume goes on from there"
    assert line.startswith("error: step_grpo step 6: the updates of 4 steps in a row were skipped")
    assert line.endswith("nonfinite.jsonl; --resume goes on after step 2")
    assert saved(tmp_path / "run", "step_grpo") == [2]
    assert [row["skipped_updates"] for row in steps(tmp_path / "run", "step_grpo")] == [0, 0, 1, 1, 1, 1]
    assert [row["skipped_in_row"] for row in strict(tmp_path / "run" / "nonfinite.jsonl")] == [1, 2, 3, 4]
    monkeypatch.setenv("R1VL_BAD_FROM", "1000")
    assert main(["--config", file, "--resume", "--rl.steps", "4"]) == 0
    assert [row["skipped_updates"] for row in steps(tmp_path / "run", "step_grpo")] == [0] * 4
    assert strict(tmp_path / "run" / "nonfinite.jsonl") == []


def test_pixel_values_that_are_not_finite(inputs, tmp_path, capsys):
    """A checkpoint whose pixel deviation is a slip of the pen: loss and gradient of every step are not finite."""
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model, ignore=shutil.ignore_patterns(SUMS))
    fields = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(fields | {"image_std": [1e-42] * 3}))
    config = run_config(
        inputs, tmp_path / "run", stages=["sft"], model={"path": str(model)}, guards={"max_skipped": 3},
        checkpoint={"every": 1},
    )  # fmt: skip
    with pytest.raises(GuardError, match="sft step 3: the updates of 3 steps .*; no checkpoint was written"):
        train(config)
    rows = strict(tmp_path / "run" / "nonfinite.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and saved(tmp_path / "run", "sft") == []
    for row in rows:
        assert row["not_finite"] == ["loss", "grad_norm"] and row["metrics"]["loss"] == "nan"
        assert len({question["row"] for question in row["questions"]}) == 4
        assert {question["source"] for question in row["questions"]} == {str(inputs / "task" / "sft.json")}


def poisoned(patch, stage, step):
    """A weight of the run turns to NaN after that step, as a fault of the memory would do it."""
    whole = Stage.finish_step

    def finish_step(self, at, *args):
        whole(self, at, *args)
        if (self.name, at) == (stage, step):
            head = self.state.params["text"]["embed"]
            self.state.params["text"]["embed"] = head.at[0, 0].set(jnp.nan)

    patch.setattr(Stage, "finish_step", finish_step)


@pytest.mark.parametrize("stage", ["sft", "step_grpo"])
def test_a_weight_that_is_not_finite(inputs, tmp_path, monkeypatch, stage):
    """Nothing can be skipped then: the run ends at once, names the weight, and keeps the checkpoint before it."""
    poisoned(monkeypatch, stage, 3)
    config = run_config(inputs, tmp_path / "run", stages=[stage], rl={"steps": 8}, sft={"steps": 8})
    with pytest.raises(
        GuardError, match=rf"{stage} step 4: not finite: params.text.embed; --resume goes on after step 2"
    ):
        train(config, pool=FakeScorerPool())
    assert saved(tmp_path / "run", stage) == [2]
    good = checkpoint(tmp_path / "run", stage, 2)
    assert all(np.isfinite(array).all() for array in good.values())


def test_a_checkpoint_with_weights_that_are_not_finite(inputs, tmp_path):
    """Also one that no row would touch: it is refused by name before the first step."""
    cfg = load_config(inputs / "model")
    params = load_hf(inputs / "model", cfg)
    params["text"]["embed"][300, 2] = np.inf
    save_hf(params, cfg, tmp_path / "model", source=inputs / "model")
    config = run_config(inputs, tmp_path / "run", stages=["sft"], model={"path": str(tmp_path / "model")})
    with pytest.raises(CheckpointError, match=r"model: weights that are not finite: params.text.embed$"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_sampler_that_computes_otherwise_is_refused(inputs, tmp_path, monkeypatch):
    """Another temperature, and weights that are stale after a resume: nothing is saved. Without a gate it is seen."""
    sample = Run.sample

    def hotter(self, weights, prompts, sampling, **options):
        return sample(self, weights, prompts, type(sampling)(1.5, max_new_tokens=sampling.max_new_tokens), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "sample", hotter)
        with pytest.raises(GuardError, match=r"step_grpo step 1: sampler and trainer differ .* 1 images .*temperature"):
            train(rl(inputs, tmp_path / "hot"), pool=FakeScorerPool())
        assert saved(tmp_path / "hot", "step_grpo") == []
        train(rl(inputs, tmp_path / "off", steps=1, guards={"mismatch": 0.0}), pool=FakeScorerPool())
        assert steps(tmp_path / "off", "step_grpo")[0]["mismatch/mean"] > 1e-2

    train(rl(inputs, tmp_path / "run", steps=2), pool=FakeScorerPool())
    old = load_hf(inputs / "model", load_config(inputs / "model"))
    monkeypatch.setattr(Stage, "rollout_weights", lambda self: self.programs.rollout_weights(old))
    with pytest.raises(GuardError, match=r"step_grpo step 3: sampler and trainer differ .*weights of the rollout"):
        train(rl(inputs, tmp_path / "run", steps=4), resume=True, pool=FakeScorerPool())
    assert saved(tmp_path / "run", "step_grpo") == [2]


def test_truncated_answers(inputs, tmp_path, monkeypatch):
    """keep: as they are; mask: none of their tokens has a weight; penalty: -1, and less in the window before."""
    from r1vl_jax.training import step_grpo

    taken, seen = step_grpo.rl_batches, {}

    def watched(groups, *args, **options):
        batches = list(taken(groups, *args, **options))
        seen["groups"], seen["batches"] = groups, batches
        return iter(batches)

    monkeypatch.setattr(step_grpo, "rl_batches", watched)
    rewards = {}
    for mode in ("keep", "mask", "penalty"):
        options = {"truncated": mode, "overlong_window": 6, "temperature": 5.0, "steps": 1}
        train(rl(inputs, tmp_path / mode, **options), pool=FakeScorerPool())
        groups, row = seen["groups"], steps(tmp_path / mode, "step_grpo")[0]
        flat = [answer for group in groups.scored for answer in group]
        cut_BG = np.array([[answer.truncated for answer in group] for group in groups.scored])
        assert 0 < cut_BG.sum() < cut_BG.size  # some answers of each kind
        for part, batch in seen["batches"]:
            trained = batch.weight_BGT.sum(axis=2)
            expected = np.where(cut_BG[part] & (mode == "mask"), 0.0, 1 / cut_BG.size)
            np.testing.assert_allclose(trained, expected, rtol=1e-6)
        rewards[mode] = np.array([answer.reward for answer in flat])
        if mode == "penalty":
            lost = np.array([-max(0.0, (answer.tokens - 2) / 6) for answer in flat])  # 8 - 6 = 2 tokens are free
            np.testing.assert_allclose(rewards[mode], rewards["keep"] + lost, atol=1e-12)
            assert row["reward/overlong"] == pytest.approx(lost.mean()) and lost.min() == -1.0
            answers = [a for r in read_lines(tmp_path / mode / "rollouts.jsonl") for a in r["answers"]]
            assert [answer["overlong"] for answer in answers] == pytest.approx(lost.tolist())
    np.testing.assert_array_equal(rewards["mask"], rewards["keep"])
