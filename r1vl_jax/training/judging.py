"""Scores sampled answers: token ids -> texts -> scores -> rewards per step, metrics, and rows of rollouts.jsonl."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from r1vl_jax.config import RLSection
from r1vl_jax.errors import ConfigError, RewardError
from r1vl_jax.processing.processor import Processor
from r1vl_jax.rewards import Rules, Score, ScorerPool
from r1vl_jax.rewards.user import UserReward, load_reward, user_reward
from r1vl_jax.types import Example, Rollout

BUILT_IN = ("step_accuracy", "step_validity")


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """The rewards that are summed into an answer's reward, with their weights.

    Attributes:
      rules: the answer rules of the built-in rewards StepRAR and StepRVR.
      alpha: the weight of the key steps in StepRAR.
      accuracy, validity: the weights of StepRAR and StepRVR.
      user: the user's functions with their weights.
    """

    rules: Rules
    alpha: float
    accuracy: float
    validity: float
    user: tuple[tuple[UserReward, float], ...]

    @classmethod
    def from_config(cls, config: RLSection) -> RewardSpec:
        """Builds the spec. Raises ConfigError for a name that is neither built in nor an importable function."""
        weights = dict(zip(config.rewards, config.reward_weights or [1.0] * len(config.rewards), strict=True))
        accuracy, validity = (weights.pop(name, 0.0) for name in BUILT_IN)
        try:
            user = tuple((load_reward(name), weight) for name, weight in weights.items())
        except RewardError as error:
            raise ConfigError(f"rl.rewards: {error}; built in: {', '.join(BUILT_IN)}") from error
        return cls(config.reward_rules, config.alpha, accuracy, validity, user)


@dataclasses.dataclass(frozen=True)
class ScoredAnswer:
    """One answer with its score and reward.

    Attributes:
      text: decoded, special tokens left out.
      tokens: the number of tokens, the stop token included.
      truncated: True if the answer reached the length limit without a stop token.
      score: the score under the rules.
      user: the value of each of the user's functions, by the function's name.
      reward: the weighted sum of all rewards, before any gate, plus `overlong`.
      step_tokens: the index of the token at which each step begins; empty unless start_scoring has `by_step`.
      overlong: the penalty for a long answer, 0 or less; None unless start_scoring has `overlong`.
    """

    text: str
    tokens: int
    truncated: bool
    score: Score
    user: dict[str, float]
    reward: float
    step_tokens: tuple[int, ...]
    overlong: float | None = None


ScoredGroups = list[list[ScoredAnswer]]  # B lists of G answers


def start_scoring(
    examples: Sequence[Example],
    answers: Rollout,
    processor: Processor,
    pool: ScorerPool,
    spec: RewardSpec,
    *,
    by_step: bool = False,
    overlong: Callable[[int], float] | None = None,
) -> Callable[[], ScoredGroups]:
    """Decodes the answers to B questions and starts to score them in worker processes.

    Args:
      answers: NumPy arrays (B, G, T).
      by_step: also find the token at which each step begins.
      overlong: returns the penalty for an answer's number of tokens, which is added to its reward.
    Returns:
      a function that waits for the scores; it runs the user's functions in this process.
    Raises: RewardError, from the returned function, if a user's function fails.
    """
    G = answers.tokens_BGT.shape[1]
    owners = [example for example in examples for _ in range(G)]
    tokens_RT, mask_RT = (array.reshape(len(owners), -1) for array in (answers.tokens_BGT, answers.mask_BGT))
    rows = [tokens[mask] for tokens, mask in zip(tokens_RT, mask_RT, strict=True)]
    texts = [processor.decode(tokens) for tokens in rows]
    columns = (texts, [owner.answer for owner in owners], [owner.key_steps for owner in owners])
    thread = ThreadPoolExecutor(1)  # it only waits for the worker processes
    pending = thread.submit(pool.score, *columns, rules=spec.rules, alpha=spec.alpha)
    thread.shutdown(wait=False)

    def finish() -> ScoredGroups:
        try:
            values = {reward.name: user_reward(reward, texts, owners).tolist() for reward, _ in spec.user}
        finally:
            scores = pending.result()
        scored = []
        for i, (text, tokens, score) in enumerate(zip(texts, rows, scores, strict=True)):
            user = {name: column[i] for name, column in values.items()}
            reward = spec.accuracy * score.accuracy + spec.validity * score.validity
            reward += sum(weight * user[function.name] for function, weight in spec.user)
            penalty = overlong and overlong(len(tokens))
            truncated = not np.isin(tokens, processor.stop_ids).any()
            steps = processor.token_at(tokens, text, score.step_starts) if by_step else ()
            reward += penalty or 0.0
            scored.append(ScoredAnswer(text, len(tokens), truncated, score, user, reward, tuple(steps), penalty))
        return [scored[i : i + G] for i in range(0, len(scored), G)]

    return finish


class StepRewards(NamedTuple):
    """The rewards of each step: index [b, g, j] is step j of answer g to question b.

    Attributes:
      outcome_BGJ: for the right answer, from the user's functions and for length; on the answer's last step.
      shaping_BGJ: for key steps, on the step where each first appears, and for validity, on the last step.
      mask_BGJ: True for the steps that an answer has.
    """

    outcome_BGJ: np.ndarray
    shaping_BGJ: np.ndarray
    mask_BGJ: np.ndarray


def rewards_by_step(scored: ScoredGroups, spec: RewardSpec, *, by_step: bool) -> StepRewards:
    """Returns the rewards of all answers, per step.

    An answer without steps counts as one step. Without `by_step`, every answer counts as one step.
    """
    counts = [[len(answer.score.step_rewards) if by_step else 1 for answer in group] for group in scored]
    shape = (len(scored), len(scored[0]), max(map(max, counts)))
    outcome_BGJ, shaping_BGJ, mask_BGJ = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for b, group in enumerate(scored):
        for g, answer in enumerate(group):
            score, count = answer.score, counts[b][g]
            key_steps = score.step_rewards if by_step else [sum(score.step_rewards)]
            shaping_BGJ[b, g, :count] = spec.accuracy * np.asarray(key_steps)
            shaping_BGJ[b, g, count - 1] += spec.validity * score.validity
            outcome_BGJ[b, g, count - 1] = answer.reward - shaping_BGJ[b, g].sum()
            mask_BGJ[b, g, :count] = True
    return StepRewards(outcome_BGJ, shaping_BGJ, mask_BGJ)


def correct(scored: ScoredGroups) -> np.ndarray:
    """Returns True for answers whose final result is right, (B, G)."""
    return np.array([[answer.score.correct for answer in group] for group in scored])


def truncated(scored: ScoredGroups) -> np.ndarray:
    """Returns True for answers that reached the length limit without a stop token, (B, G)."""
    return np.array([[answer.truncated for answer in group] for group in scored])


def token_steps(scored: ScoredGroups, length: int) -> np.ndarray:
    """Returns the step of each token, from 0, (B, G, length). Tokens before the first step belong to the first step."""
    places = np.arange(length)
    return np.array(
        [[np.searchsorted(answer.step_tokens[1:], places, side="right") for answer in group] for group in scored]
    )


def reward_metrics(scored: ScoredGroups) -> dict[str, float]:
    """Returns means over all answers, and counts of answers that could not be scored and of faulty key steps."""
    flat = [answer for group in scored for answer in group]
    scores, lengths = [answer.score for answer in flat], [answer.tokens for answer in flat]

    def mean(name: str) -> float:
        return float(np.mean([float(getattr(score, name)) for score in scores]))

    user = {f"reward/{name}": float(np.mean([answer.user[name] for answer in flat])) for name in flat[0].user}
    if flat[0].overlong is not None:
        user["reward/overlong"] = float(np.mean([answer.overlong or 0.0 for answer in flat]))
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


def reward_faults(scored: ScoredGroups) -> list[str]:
    """Returns the names of the rewards that are not finite in fp32 for some answer."""
    flat = [answer for group in scored for answer in group]
    faults = [f"reward/{name}" for name in flat[0].user if not all(finite32(answer.user[name]) for answer in flat)]
    return faults or ([] if all(finite32(answer.reward) for answer in flat) else ["reward"])


def finite32(value: float) -> bool:
    """Returns whether a number is finite as an fp32 number. False for NaN."""
    return abs(value) <= float(np.finfo(np.float32).max)


def rollout_rows(examples: Sequence[Example], scored: ScoredGroups, **where: Any) -> list[dict[str, Any]]:
    """Returns rows of rollouts.jsonl, one per question; each begins with `where` (stage, step)."""
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
        for example, group in zip(examples, scored, strict=True)
    ]


def _answer_row(answer: ScoredAnswer) -> dict[str, Any]:
    def plain(value: float) -> float | None:
        return value if np.isfinite(value) else None  # JSON has no NaN

    score = dataclasses.asdict(answer.score) | {"reward": plain(answer.reward)}
    user = {"user_rewards": {name: plain(value) for name, value in answer.user.items()}} if answer.user else {}
    user |= {} if answer.overlong is None else {"overlong": answer.overlong}
    return {"text": answer.text, **score, **user, "tokens": answer.tokens, "truncated": answer.truncated}
