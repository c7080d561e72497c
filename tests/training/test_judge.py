"""From sampled tokens to rewards by step and token advantages, through the real rules and a real tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from helpers.tiny_tokenizer import write_checkpoint
from r1vl_kernels.reference import step_advantages, token_advantages

from r1vl_jax.config import RLSection
from r1vl_jax.errors import ConfigError, RewardError
from r1vl_jax.processing.spans import decode, token_at
from r1vl_jax.rewards import Score, ScorerPool
from r1vl_jax.step_grpo.advantages import gate_rewards
from r1vl_jax.training.judging import (
    RewardSpec,
    correct,
    reward_metrics,
    rewards_by_step,
    rollout_rows,
    start_scoring,
    token_steps,
)
from r1vl_jax.types import Example, Rollout

HEAD = "### Image Description: 😀\n### Rationales: r\n### Let's think step by step.\n"
KEY_STEPS = (("one apple",), ("two pears", "2 pears"))
THREE = HEAD + "### Step 1: We see one apple.\n### Step 2: More.\n### Step 3: So two pears.\n### The final answer is: 3"
TWO = HEAD + "### Step 1: Nothing.\n### Step 2: There are 2 pears, 面.\n### The final answer is: 4"
NONE = "I do not know."
EXAMPLE = Example("rl.json", 0, (), "How many?", "### The final answer is: 3", KEY_STEPS)


@pytest.fixture(scope="module")
def pool():
    with ScorerPool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))
    stops = tuple(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    return SimpleNamespace(
        tokenizer=tokenizer,
        stop_ids=stops,
        decode=lambda tokens: decode(tokenizer, np.asarray(tokens).tolist()),
        token_at=lambda tokens, text, chars: token_at(tokenizer, tokens, text, chars),
    )


def answers(processor, texts):
    rows = [
        processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [processor.stop_ids[0]] for text in texts
    ]
    tokens = np.zeros((1, len(rows), max(map(len, rows)) + 3), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for g, row in enumerate(rows):
        tokens[0, g, : len(row)], mask[0, g, : len(row)] = row, True
    return Rollout(tokens, np.zeros(tokens.shape, np.float32), mask)


def judged(pool, processor, texts, *, by_step, **config):
    paid = RewardSpec.from_config(RLSection(**config))
    sampled = answers(processor, texts)
    return sampled, paid, start_scoring([EXAMPLE], sampled, processor, pool, paid, by_step=by_step)()


def test_rewards_by_step_by_hand(pool, processor):
    """alpha/|v| = 0.05 for each key step where it first stands; right answer and validity fall on the last step."""
    _, paid, groups = judged(pool, processor, [THREE, TWO, NONE], by_step=True)
    outcome, shaping, mask = rewards_by_step(groups, paid, by_step=True)
    np.testing.assert_allclose(outcome, [[[0, 0, 1], [0, 0, 0], [0, 0, 0]]], atol=1e-12)
    np.testing.assert_allclose(shaping, [[[0.05, 0, 1.05], [0, 1.05, 0], [0, 0, 0]]], atol=1e-12)
    np.testing.assert_array_equal(mask, [[[1, 1, 1], [1, 1, 0], [1, 0, 0]]])
    np.testing.assert_array_equal(correct(groups), [[True, False, False]])
    outcome, shaping, mask = rewards_by_step(groups, paid, by_step=False)
    np.testing.assert_allclose(outcome + shaping, [[[2.1], [1.05], [0]]])
    assert mask.all() and mask.shape == (1, 3, 1)


def test_every_token_gets_its_steps_advantage(pool, processor):
    """Returns [2.1, 2.05, 2.05], [1.05, 1.05], [0]; the advantages are those of test_step_grpo's hand-computed case."""
    sampled, paid, groups = judged(pool, processor, [THREE, TWO, NONE], by_step=True)
    outcome, shaping, mask = rewards_by_step(groups, paid, by_step=True)
    advantages = step_advantages(gate_rewards(outcome, shaping, correct(groups), "none"), mask)
    steps = token_steps(groups, sampled.tokens_BGT.shape[2])
    tokens = token_advantages(advantages, steps)
    first, second = 1.05 / 1.0501, 0.5 / (0.5**0.5 + 1e-4)
    for g, (text, values) in enumerate([(THREE, [first, second, 0]), (TWO, [0, -second]), (NONE, [-first])]):
        starts = [text.index(f"### Step {k + 1}:") for k in range(len(values))] if "Step" in text else [0]
        here = sampled.tokens_BGT[0, g][sampled.mask_BGT[0, g]]
        for t in range(len(here)):
            said = len(processor.decode(here[: t + 1]).rstrip("\ufffd"))  # characters up to and with this token
            step = max(0, sum(said > start for start in starts) - 1)
            assert steps[0, g, t] == step, (g, t)
            assert tokens[0, g, t] == pytest.approx(values[step], abs=1e-6)


def test_trajectory_is_what_it_was(pool, processor):
    """One advantage for all tokens of an answer: that of its whole reward."""
    sampled, paid, groups = judged(pool, processor, [THREE, TWO, NONE], by_step=False)
    steps = token_steps(groups, 5)
    assert not steps.any() and steps.shape == (1, 3, 5)
    assert [answer.reward for answer in groups[0]] == pytest.approx([2.1, 1.05, 0])


def test_weights_and_user_rewards(pool, processor, tmp_path, monkeypatch):
    (tmp_path / "judge_rewards.py").write_text(
        "def short(completions, examples):\n    return [len(t) < 20 for t in completions]\n"
        "def broken(completions, examples):\n    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = ("step_accuracy", "step_validity", "judge_rewards:short")
    _, paid, groups = judged(
        pool, processor, [THREE, TWO, NONE], by_step=True, rewards=names, reward_weights=(2.0, 0.5, 10.0), alpha=0.2
    )
    assert [answer.reward for answer in groups[0]] == pytest.approx([2 * 1.2 + 0.5, 2 * 0.1 + 0.5, 10.0])
    outcome, shaping, _ = rewards_by_step(groups, paid, by_step=True)
    np.testing.assert_allclose(outcome, [[[0, 0, 2], [0, 0, 0], [10, 0, 0]]], atol=1e-12)
    np.testing.assert_allclose(shaping, [[[0.2, 0, 0.7], [0, 0.7, 0], [0, 0, 0]]], atol=1e-12)
    metrics = reward_metrics(groups)
    assert metrics["reward/judge_rewards:short"] == pytest.approx(1 / 3)
    assert metrics["reward"] == pytest.approx((2.9 + 0.7 + 10) / 3)
    row = rollout_rows([EXAMPLE], groups, step=1)[0]["answers"][2]
    assert row["user_rewards"] == {"judge_rewards:short": 1.0} and row["reward"] == 10.0
    with pytest.raises(RewardError, match="judge_rewards:broken"):
        judged(pool, processor, [THREE, TWO], by_step=False, rewards=("judge_rewards:broken",))
    with pytest.raises(ConfigError, match=r"rl.rewards: .*judge_rewards:shrt.*did you mean 'short'"):
        judged(pool, processor, [THREE], by_step=False, rewards=("judge_rewards:shrt",))


def test_validity_alone(pool, processor):
    _, paid, groups = judged(pool, processor, [THREE, NONE], by_step=True, rewards=("step_validity",))
    outcome, shaping, _ = rewards_by_step(groups, paid, by_step=True)
    assert not outcome.any()
    np.testing.assert_allclose(shaping, [[[0, 0, 1], [0, 0, 0]]])


def test_a_failed_answer_is_one_step_of_no_reward(pool, processor):
    """What the pool gives for a time-out: no reward, no steps, and still an answer of its group."""

    class Failing:
        def score(self, *args, **options):
            _, *rest = pool.score(*args, **options)
            return [Score(status="timeout", note="took longer than 1 s"), *rest]

    paid = RewardSpec.from_config(RLSection())
    groups = start_scoring([EXAMPLE], answers(processor, [THREE, TWO]), processor, Failing(), paid, by_step=True)()
    outcome, shaping, mask = rewards_by_step(groups, paid, by_step=True)
    np.testing.assert_allclose(outcome + shaping, [[[0, 0], [0, 1.05]]], atol=1e-12)
    np.testing.assert_array_equal(mask, [[[1, 0], [1, 1]]])
    metrics = reward_metrics(groups)
    assert [metrics[f"scoring/{kind}"] for kind in ("timeout", "error", "crash")] == [1, 0, 0]
