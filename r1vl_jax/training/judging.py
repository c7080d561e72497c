"""Sampled answers judged: texts, scores and lengths; as rewards by step, as metrics, as rows of rollouts.jsonl."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from r1vl_jax.config import RLSection
from r1vl_jax.errors import ConfigError, RewardError
from r1vl_jax.processing.processor import Processor
from r1vl_jax.rewards import Rules, Score, ScorerPool, get_rules
from r1vl_jax.rewards.user import UserReward, load_reward, user_reward
from r1vl_jax.types import Example, Rollout

BUILT_IN = ("step_accuracy", "step_validity")


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """What an answer is paid for: rules and weights of StepRAR and StepRVR, the user's functions with theirs."""

    rules: Rules
    alpha: float
    accuracy: float
    validity: float
    user: tuple[tuple[UserReward, float], ...]

    @classmethod
    def from_config(cls, config: RLSection) -> RewardSpec:
        """Raises ConfigError where a name is neither built in nor a function that can be imported."""
        weights = dict(zip(config.rewards, config.reward_weights or [1.0] * len(config.rewards), strict=True))
        accuracy, validity = (weights.pop(name, 0.0) for name in BUILT_IN)
        try:
            user = tuple((load_reward(name), weight) for name, weight in weights.items())
        except RewardError as error:
            raise ConfigError(f"rl.rewards: {error}; built in: {', '.join(BUILT_IN)}") from error
        return cls(get_rules(config.rules, config.rule_options), config.alpha, accuracy, validity, user)


@dataclasses.dataclass(frozen=True)
class ScoredAnswer:
    """One answer.

    Attributes:
      text, tokens: what it says, and how many tokens that takes.
      truncated: it was cut off before a stop token.
      score: by the rules.
      user: what each of the user's functions gave.
      reward: the weighted sum of all, no gate applied.
      step_tokens: the token at which each step begins; empty unless asked for.
    """

    text: str
    tokens: int
    truncated: bool
    score: Score
    user: dict[str, float]
    reward: float
    step_tokens: tuple[int, ...]


def start_judging(
    examples: list[Example],
    answers: Rollout,
    processor: Processor,
    pool: ScorerPool,
    paid: RewardSpec,
    *,
    by_step: bool = False,
) -> Callable[[], list[list[ScoredAnswer]]]:
    """Decodes G answers to each of B questions (NumPy arrays (B, G, T)), and starts scoring them in the background.

    Returns a function that waits for the scores and gives B lists of G. The user's functions run in it, in this
    process. Raises RewardError, from there, where one of them fails.
    """
    G = answers.tokens_BGT.shape[1]
    owners = [example for example in examples for _ in range(G)]
    rows = [tokens[mask] for tokens, mask in zip(*map(_rows, (answers.tokens_BGT, answers.mask_BGT)), strict=True)]
    texts = [processor.decode(tokens) for tokens in rows]
    solutions, key_steps = [owner.answer for owner in owners], [owner.key_steps for owner in owners]
    with_rules = partial(pool.score, rules=paid.rules, alpha=paid.alpha)
    thread = ThreadPoolExecutor(1)  # it only waits for the worker processes
    pending = thread.submit(with_rules, texts, solutions, key_steps)
    thread.shutdown(wait=False)

    def finish() -> list[list[ScoredAnswer]]:
        try:
            given = {reward.name: user_reward(reward, texts, owners).tolist() for reward, _ in paid.user}
        finally:
            scores = pending.result()
        judged = []
        for i, (text, tokens, score) in enumerate(zip(texts, rows, scores, strict=True)):
            user = {name: values[i] for name, values in given.items()}
            reward = paid.accuracy * score.accuracy + paid.validity * score.validity
            reward += sum(weight * user[function.name] for function, weight in paid.user)
            truncated = not np.isin(tokens, processor.stop_ids).any()
            steps = processor.token_at(tokens, text, score.step_starts) if by_step else ()
            judged.append(ScoredAnswer(text, len(tokens), truncated, score, user, reward, tuple(steps)))
        return [judged[i : i + G] for i in range(0, len(judged), G)]

    return finish


def _rows(array_BGT: np.ndarray) -> np.ndarray:
    return array_BGT.reshape(-1, array_BGT.shape[-1])


def rewards_by_step(judged: list[list[ScoredAnswer]], paid: RewardSpec, *, by_step: bool) -> tuple[np.ndarray, ...]:
    """Outcome rewards, step rewards (key steps and validity) and the mask of the steps that there are, each (B, G, K).

    Outcome (the right answer, and what the user's functions gave) and validity fall on an answer's last step. An answer
    without steps is one step; without `by_step`, every answer is.
    """
    B, G = len(judged), len(judged[0])
    counts = [[len(answer.score.step_rewards) if by_step else 1 for answer in group] for group in judged]
    shape = (B, G, max(map(max, counts)))
    outcome_BGJ, shaping_BGJ, mask_BGJ = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for b, group in enumerate(judged):
        for g, answer in enumerate(group):
            score, count = answer.score, counts[b][g]
            key_steps = score.step_rewards if by_step else [sum(score.step_rewards)]
            shaping_BGJ[b, g, :count] = paid.accuracy * np.asarray(key_steps)
            shaping_BGJ[b, g, count - 1] += paid.validity * score.validity
            outcome_BGJ[b, g, count - 1] = answer.reward - shaping_BGJ[b, g].sum()
            mask_BGJ[b, g, :count] = True
    return outcome_BGJ, shaping_BGJ, mask_BGJ


def correct(judged: list[list[ScoredAnswer]]) -> np.ndarray:
    """True where the final answer is right, (B, G)."""
    return np.array([[answer.score.correct for answer in group] for group in judged])


def token_steps(judged: list[list[ScoredAnswer]], length: int) -> np.ndarray:
    """The step that each token stands in, from 0, (B, G, length). The tokens before the first step belong to it."""
    places = np.arange(length)
    return np.array(
        [[np.searchsorted(answer.step_tokens[1:], places, side="right") for answer in group] for group in judged]
    )


def reward_metrics(judged: list[list[ScoredAnswer]]) -> dict[str, float]:
    """Means over all answers. Counts: scoring/... (answers that could not be scored, by the reason) and key_step_faults
    (no key steps to find, say)."""
    flat = [answer for group in judged for answer in group]
    scores, lengths = [answer.score for answer in flat], [answer.tokens for answer in flat]

    def mean(name: str) -> float:
        return float(np.mean([float(getattr(score, name)) for score in scores]))

    user = {f"reward/{name}": float(np.mean([answer.user[name] for answer in flat])) for name in flat[0].user}
    return {
        "reward": float(np.mean([answer.reward for answer in flat])),
        "accuracy": mean("accuracy"),
        "validity": mean("validity"),
        "correct": mean("correct"),
        "key_steps": mean("k"),
        "no_answer": float(np.mean([score.answer is None for score in scores])),
        "length": float(np.mean(lengths)),
        "length_max": float(max(lengths)),
        "truncated": float(np.mean([answer.truncated for answer in flat])),
        **user,
        **{f"scoring/{kind}": sum(score.status == kind for score in scores) for kind in ("timeout", "error", "crash")},
        "key_step_faults": sum(score.status == "ok" and bool(score.note) for score in scores),
    }


def rollout_rows(examples: list[Example], judged: list[list[ScoredAnswer]], **where: Any) -> list[dict[str, Any]]:
    """Rows of rollouts.jsonl, one a question; `where` (stage, step) stands at the head of each."""
    return [
        {
            **where,
            "source": example.source,
            "row": example.row,
            "images": list(example.images),
            "question": example.question,
            "solution": example.answer,
            "key_steps": None if example.key_steps is None else {"Steps": [list(group) for group in example.key_steps]},
            "answers": [_answer_row(answer) for answer in group],
        }
        for example, group in zip(examples, judged, strict=True)
    ]


def _answer_row(answer: ScoredAnswer) -> dict[str, Any]:
    score = dataclasses.asdict(answer.score) | {"reward": answer.reward}
    user = {"user_rewards": answer.user} if answer.user else {}
    return {"text": answer.text, **score, **user, "tokens": answer.tokens, "truncated": answer.truncated}
