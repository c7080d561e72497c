"""The ways of StepGRPO that are not the default, through the training loop: per-step credit, resampling, skipping,
user rewards that fail. A tiny random model; rewards by a stand-in where its answers must differ."""

from __future__ import annotations

import json
import shutil
import zlib

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny_jax import FakeScorerPool, read_lines, run_config, write_run_inputs
from test_resume import compiled_once, cut, steps  # noqa: F401 (the fixture is used by being here)

from r1vl_jax.checkpoint.folder import SUMS
from r1vl_jax.checkpoint.hf import load_hf
from r1vl_jax.errors import RewardError
from r1vl_jax.model.config import load_config
from r1vl_jax.rewards import Score, score_answer
from r1vl_jax.train import main, train
from r1vl_jax.training import micro_batches, step_grpo
from r1vl_jax.training.programs import enable_compilation_cache


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


class SteppedScorerPool(FakeScorerPool):
    """Two steps where the text has characters enough; each earns what its text says, often nothing."""

    def score(self, completions, solutions, key_steps, rules="paper", alpha=0.1):
        return [self.one(text) for text in completions]

    def one(self, text: str) -> Score:
        plain = [i for i, char in enumerate(text) if char.isascii()]
        starts = (plain[len(plain) // 3], plain[2 * len(plain) // 3]) if len(plain) > 6 else ()
        earned = [float(zlib.crc32(f"{k}{text}".encode()) % 3 == 0) for k in range(max(1, len(starts)))]
        return Score(accuracy=sum(earned), reward=sum(earned), step_starts=starts, step_rewards=tuple(earned))


class ConstantScorerPool(FakeScorerPool):
    def score(self, completions, solutions, key_steps, rules="paper", alpha=0.1):
        return [Score(accuracy=0.5, reward=0.5, step_rewards=(0.5,)) for _ in completions]


def rl(inputs, folder, **options):
    options = {"steps": 4, "max_new_tokens": 12} | options
    return run_config(inputs, folder, stages=["step_grpo"], rl=options)


def resumes(inputs, folder, pool, **options):
    """Trains once whole, in folder/straight, and once cut off and resumed, in folder/broken: the same bytes."""
    straight, broken = (rl(inputs, folder / name, **options) for name in ("straight", "broken"))
    whole = train(straight, pool=pool)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut(patch, "step_grpo", 3)
        train(broken, pool=pool)
    resumed = train(broken, resume=True, pool=pool)
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def params(folder):
    return load_hf(folder, load_config(folder))


def test_steps_and_resampling_resume_bit_for_bit(inputs, tmp_path):
    resumes(inputs, tmp_path, SteppedScorerPool(), advantage="step", zero_variance="resample", max_resamples=2)
    assert read_lines(tmp_path / "straight" / "rollouts.jsonl") == read_lines(tmp_path / "broken" / "rollouts.jsonl")
    rows = steps(tmp_path / "straight", "step_grpo")
    questions = [row["questions"] for row in rows]
    assert max(questions) > 4 and all(count in (4, 8, 12) for count in questions)
    assert all(row["zero_variance"] > 0 for row in rows if row["questions"] > 4)
    sampled = [row for row in read_lines(tmp_path / "straight" / "rollouts.jsonl") if row["step"] == 1]
    assert len(sampled) == questions[0]
    texts = [answer["text"] for row in sampled for answer in row["answers"]]
    assert len(set(texts)) == len(texts)  # further questions get random numbers of their own


def test_steps_train_otherwise_than_trajectories(inputs, tmp_path):
    configs = [rl(inputs, tmp_path / name, steps=1, advantage=name) for name in ("trajectory", "step")]
    exports = [train(config, pool=SteppedScorerPool()) for config in configs]
    first, second = ([row["answers"] for row in read_lines(export.parent / "rollouts.jsonl")] for export in exports)
    assert first == second  # the same answers and scores
    assert (exports[0] / "model.safetensors").read_bytes() != (exports[1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("mode", ["skip", "resample"])
def test_groups_that_teach_nothing_move_nothing(inputs, tmp_path, mode):
    """Under keep, the KL of later steps still would; here, not even that. Nothing divides by no groups."""
    config = rl(inputs, tmp_path / mode, steps=2, zero_variance=mode, max_resamples=1)
    export = train(config, pool=ConstantScorerPool())
    rows = steps(tmp_path / mode, "step_grpo")
    assert [row["questions"] for row in rows] == [4, 4] if mode == "skip" else [8, 8]
    assert all(row["zero_variance"] == 1 and "loss" not in row and "grad_norm" not in row for row in rows)
    assert [row["step"] for row in rows] == [1, 2]
    before, after = params(inputs / "model"), params(export)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_step_without_a_lesson_leaves_parameters_and_moments(inputs, tmp_path):
    """Adam's moments of the first step would go on moving the parameters."""

    class OnceScorerPool(SteppedScorerPool):
        calls = 0

        def score(self, completions, *args, **options):
            OnceScorerPool.calls += 1
            pool = SteppedScorerPool if OnceScorerPool.calls == 1 else ConstantScorerPool
            return pool.score(self, completions, *args, **options)

    options = {"zero_variance": "skip", "optimizer": {"learning_rate": 1e-2, "schedule": "constant"}}
    first = train(rl(inputs, tmp_path / "first", steps=1, **options), pool=OnceScorerPool())
    OnceScorerPool.calls = 0
    third = train(rl(inputs, tmp_path / "third", steps=3, **options), pool=OnceScorerPool())
    assert ["loss" in row for row in steps(tmp_path / "third", "step_grpo")] == [True, False, False]
    assert (first / "model.safetensors").read_bytes() == (third / "model.safetensors").read_bytes()
    before = jax.tree.leaves(params(inputs / "model"))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params(first)), before, strict=True))


REWARD = """
import os

def mine(completions, examples):
    calls = int(os.environ["R1VL_CALLS"])
    os.environ["R1VL_CALLS"] = str(calls + 1)
    if calls == 2 and "R1VL_FIXED" not in os.environ:
        return [0.0] * (len(completions) - 1)
    return [len(text) for text in completions]
"""


@pytest.mark.parametrize(
    ("answer_format", "answer"), [("think", "<think>a</think><answer>3</answer>"), ("boxed", "a \\boxed{3}")]
)
def test_answers_are_scored_in_their_format(inputs, tmp_path, answer_format, answer):
    """Training hands the format to the rewards, and the prompt texts to the model."""
    seen = []

    class Pool(FakeScorerPool):
        def score(self, completions, solutions, key_steps, rules="paper", alpha=0.1):
            seen.append(rules)
            return [score_answer(answer, solution, None, rules=rules) for solution in solutions]

    options = {"format": answer_format, "rules": "robust", "max_new_tokens": 4, "steps": 1}
    config = run_config(
        inputs, tmp_path / "run", stages=["step_grpo"], rl=options, data={"question_suffix": " Box it."}
    )
    train(config, pool=Pool())
    assert {rules.format for rules in seen} == {answer_format}
    assert [row["validity"] for row in steps(tmp_path / "run", "step_grpo")] == [1.0]


def test_a_user_reward_that_fails_loses_no_step(inputs, tmp_path, monkeypatch, capsys):
    """The run ends with a message that names it, the steps before are saved, and --resume goes on."""
    (tmp_path / "failing_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("R1VL_CALLS", "0")
    config = rl(inputs, tmp_path / "run", rewards=["step_validity", "failing_reward:mine"], steps=3)
    with pytest.raises(RewardError, match="failing_reward:mine"):
        train(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / "step_grpo").glob("[0-9]*")] == ["2"]
    file = str((tmp_path / "run").with_suffix(".yaml"))
    monkeypatch.setenv("R1VL_CALLS", "2")
    assert main(["--config", file, "--resume"]) == 3
    assert "failing_reward:mine" in capsys.readouterr().err.splitlines()[-2]
    monkeypatch.setenv("R1VL_FIXED", "1")
    train(config, resume=True)
    rows = steps(tmp_path / "run", "step_grpo")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["reward"] == row["reward/failing_reward:mine"] > 0 for row in rows)


def test_a_reward_that_is_not_there_is_said_before_anything_is_written(inputs, tmp_path, capsys):
    config = rl(inputs, tmp_path / "run", rewards=["no_such_module:mine"])
    file = str((tmp_path / "run").with_suffix(".yaml"))
    assert main(["--config", file]) == 2 and config
    error = capsys.readouterr().err
    assert "rl.rewards" in error and "no_such_module" in error and "step_accuracy, step_validity" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_parquet_with_images_inside_trains_and_resumes_as_json_does(inputs, tmp_path):
    rows = json.loads((inputs / "task" / "rl.json").read_text())
    for row in rows:
        path = row.pop("image_path")
        row["images"] = [{"bytes": (inputs / "task" / path).read_bytes(), "path": path}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rl.parquet", row_group_size=5)
    files = {"rl": {"path": str(tmp_path / "rl.parquet")}}
    pool, options = FakeScorerPool(), {"stages": ["step_grpo"]}
    as_json = train(run_config(inputs, tmp_path / "json", **options), pool=pool)
    config = run_config(inputs, tmp_path / "run", data=files, **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut(patch, "step_grpo", 3)
        train(config, pool=pool)
    resumed = train(config, resume=True, pool=pool)
    assert (as_json / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    ours, theirs = (read_lines(tmp_path / name / "rollouts.jsonl") for name in ("run", "json"))
    assert [row["answers"] for row in ours] == [row["answers"] for row in theirs]
    assert {row["source"] for row in ours} == {files["rl"]["path"]}


@pytest.mark.slow
def test_a_checkpoint_with_other_pixel_means(inputs, tmp_path, capsys):
    """Its images are normalised its own way, in both stages, and the export takes it along.

    Its chat template is also a base model's, which writes no turns: the run says so.
    """
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model, ignore=shutil.ignore_patterns(SUMS))
    fields = json.loads((model / "preprocessor_config.json").read_text())
    fields |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.3, 0.4]}
    (model / "preprocessor_config.json").write_text(json.dumps(fields))
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['text'] }}"}))
    losses = []
    for name, path in (("own", model), ("clip", inputs / "model")):
        sections = {"model": {"path": str(path)}, "sft": {"steps": 1}, "rl": {"steps": 1, "max_new_tokens": 4}}
        export = train(run_config(inputs, tmp_path / name, **sections))
        losses.append(steps(tmp_path / name, "sft")[0]["loss"])
        assert (export / "preprocessor_config.json").read_bytes() == (path / "preprocessor_config.json").read_bytes()
        assert ("the built-in ChatML is used" in capsys.readouterr().err) == (name == "own")
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_another_number_of_workers_resumes_bit_for_bit(inputs, tmp_path):
    """Begun with worker processes, gone on with threads."""
    sections = {"stages": ["sft"], "sft": {"steps": 4}}
    whole = train(run_config(inputs, tmp_path / "straight", **sections))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut(patch, "sft", 3)
        train(run_config(inputs, tmp_path / "broken", **sections, data={"workers": 1}))
    resumed = train(run_config(inputs, tmp_path / "broken", **sections), resume=True)
    for a, b in zip(jax.tree.leaves(params(whole)), jax.tree.leaves(params(resumed)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_prompt_once_for_all_answers_or_once_each(inputs, tmp_path):
    """`model.shared_prefix` and what the gradient keeps of the layers change no number but by rounding."""
    rows = {}
    for name, model in {"once": {}, "each": {"shared_prefix": False}, "kept": {"remat": "matmuls"}}.items():
        config = run_config(inputs, tmp_path / name, stages=["step_grpo"], model=model, rl={"steps": 1})
        train(config, pool=FakeScorerPool())
        rows[name] = steps(tmp_path / name, "step_grpo")[0]
    for name in ("each", "kept"):
        for key in ("loss", "kl", "entropy", "grad_norm", "reward"):
            np.testing.assert_allclose(rows[name][key], rows["once"][key], rtol=1e-4, atol=1e-6)
    assert rows["once"]["grad_norm"] > 1e-3


@pytest.mark.slow
def test_several_updates_a_rollout(inputs, tmp_path):
    """They move the policy further, count as updates of the schedule, and resume bit for bit."""
    options = {"updates_per_rollout": 3, "clip_high": 0.28}
    rates = {"optimizer": {"learning_rate": 1e-3, "schedule": "linear", "warmup_ratio": 0.0}}
    resumes(inputs, tmp_path, FakeScorerPool(), **options, **rates)
    rows = steps(tmp_path / "straight", "step_grpo")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # The rate of a step's last update: number 3, 6, 9, 12 of 12, on the way from 1e-3 to 0.
    expected = [1e-3 * (1 - update / 12) for update in (2, 5, 8, 11)]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], expected, rtol=1e-5)
    train(rl(inputs, tmp_path / "one", **rates), pool=FakeScorerPool())
    assert steps(tmp_path / "one", "step_grpo")[0]["kl"] < rows[0]["kl"]  # after one update, and after three


def test_answers_of_a_micro_batch_are_alike(inputs, tmp_path, monkeypatch):
    """Questions are trained in the order of their longest answer, padded to it and no further; nothing is lost."""
    monkeypatch.setattr(micro_batches, "ANSWER_UNIT", 4)
    seen, taken = [], step_grpo.rl_batches

    def watched(groups, *args, **options):
        batches = list(taken(groups, *args, **options))
        seen.append((groups, [batch for _, batch in batches]))
        return iter(batches)

    monkeypatch.setattr(step_grpo, "rl_batches", watched)
    config = run_config(
        inputs, tmp_path / "run", stages=["step_grpo"], data={"pad_multiple": 4},
        rl={"steps": 3, "max_new_tokens": 24, "temperature": 4.0},
    )  # fmt: skip
    train(config, pool=FakeScorerPool())
    assert len(seen) == 3
    for groups, batches in seen:
        lengths = [batch.tokens_BGT.shape[2] for batch in batches]
        longest = sorted(groups.mask_BGT.any(axis=1).sum(axis=1))
        assert lengths == [-(-longest[i + 1] // 4) * 4 for i in (0, 2)]
        trained = np.concatenate([batch.weight_BGT.sum(axis=2).ravel() for batch in batches])
        np.testing.assert_allclose(trained, 1 / trained.size, rtol=1e-6)  # every answer, with the weight of its own
        tokens = sum(int((batch.weight_BGT > 0).sum()) for batch in batches)
        assert tokens == groups.mask_BGT.sum()


@pytest.mark.parametrize("value", ["auto", "off", "own"])
def test_compiled_programs_are_kept(tmp_path, monkeypatch, value):
    """By default in the user's cache folder; `off` keeps none, and a folder that JAX was given stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    expected = {"auto": str(tmp_path / "r1vl_jax"), "off": None, "own": "own"}[value]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache(value)
        assert jax.config.jax_compilation_cache_dir == expected
        jax.config.update("jax_compilation_cache_dir", "given")
        enable_compilation_cache(value)
        assert jax.config.jax_compilation_cache_dir == "given"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
def test_where_the_reference_is_changes_no_bit(inputs, tmp_path):
    """On the host it gives the same metrics; without it, at beta 0, the same weights and no KL."""
    rows, weights = {}, {}
    for name, options in {
        "device": {},
        "host": {"reference": "host"},
        "beta 0": {"beta": 0.0},
        "none": {"beta": 0.0, "reference": "none"},
    }.items():
        folder = tmp_path / name
        export = train(rl(inputs, folder, steps=2, **options), pool=SteppedScorerPool())
        timed = ("seconds/", "tokens_per_second", "compilations")
        rows[name] = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in steps(folder, "step_grpo")]
        weights[name] = (export / "model.safetensors").read_bytes()
    assert rows["host"] == rows["device"] and rows["device"][-1]["kl"] > 0
    assert weights["host"] == weights["device"] != weights["beta 0"] == weights["none"]
    assert not {"kl", "kl_cut"} & rows["none"][-1].keys()
    assert [{k: v for k, v in row.items() if k not in ("kl", "kl_cut")} for row in rows["beta 0"]] == rows["none"]


@pytest.mark.slow
def test_a_first_moment_in_bfloat16_resumes_bit_for_bit(inputs, tmp_path):
    resumes(inputs, tmp_path, SteppedScorerPool(), optimizer={"learning_rate": 1e-2, "first_moment": "bfloat16"})
