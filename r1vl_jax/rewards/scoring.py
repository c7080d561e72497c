"""StepRAR + StepRVR of one answer (R1-VL, arXiv 2503.12937, section 3.3).

    accuracy = [the final answer is right] + alpha * k      (preset paper: 0 if there is no final answer)
    validity = 1 if the answer is complete and in order, else 0
    reward   = accuracy + validity

In the flow: rollout samples completions, these functions score them, step_grpo turns the rewards of a group into
advantages. Score model output in `ScorerPool`. Here, in the caller's process, only math-verify's own time limits (5 s
for each parse and comparison) stop a hostile answer such as 10^10^10^10, and they do not stop all arithmetic.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from r1vl_jax.rewards.answer import expected_answer, final_answer, is_correct
from r1vl_jax.rewards.key_steps import Hit, key_step_groups, key_step_hits
from r1vl_jax.rewards.rules import Rules, get_rules
from r1vl_jax.rewards.steps import section_faults, step_starts


@dataclasses.dataclass(frozen=True)
class Score:
    """The rewards of one answer, and the reasons.

    Attributes:
      accuracy, validity, reward: StepRAR, StepRVR and their sum.
      correct: the final answer is right.
      answer: the final answer of the completion; None if there is none.
      expected: the solution's final answer.
      matched: indices of the key-step groups that occur, ascending.
      total: number of key-step groups of the question.
      k: len(matched) / total; 0 if there are no groups.
      hits: where each matched group first occurs: (group, start, end) in characters of the completion.
      step_starts: the character at which each step's header begins.
      step_rewards: the key steps' part of the accuracy by step: alpha / total for each hit in it. One entry for each
        step; one entry for an answer without steps.
      faults: why the answer is not valid, as short phrases.
      status: "ok"; "timeout", "error" or "crash" if the pool could not score the answer. Then all rewards are 0, and
        the other fields are empty.
      note: what is wrong with the key steps, or why the answer could not be scored.
    """

    accuracy: float = 0.0
    validity: float = 0.0
    reward: float = 0.0
    correct: bool = False
    answer: str | None = None
    expected: str = ""
    matched: tuple[int, ...] = ()
    total: int = 0
    k: float = 0.0
    hits: tuple[Hit, ...] = ()
    step_starts: tuple[int, ...] = ()
    step_rewards: tuple[float, ...] = (0.0,)
    faults: tuple[str, ...] = ()
    status: str = "ok"
    note: str = ""


def score_answer(
    completion: str, solution: str, key_steps: Any, *, rules: str | Rules = "paper", alpha: float = 0.1
) -> Score:
    """The score of one completion, computed in this process and thread.

    Args:
      completion: the answer to score.
      solution: the reference; its final-answer section is compared, or all of it if it has none.
      key_steps: `{"Steps": groups}`, or the groups; if missing, empty or null, k is 0 and the score has a note.
      rules: a preset's name, or a `Rules`.
      alpha: weight of the key steps.

    Raises:
      TypeError: completion or solution is not a text.
      ValueError: no preset has this name.
      RuntimeError: math-verify is needed, and this is not the main thread (see answer.is_correct).
    """
    rules = get_rules(rules)
    for name, value in (("completion", completion), ("solution", solution)):
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected a text, got {type(value).__name__}")
    answer = final_answer(completion, rules)
    groups, notes = key_step_groups(key_steps)
    hits = key_step_hits(completion, groups, rules)
    k = len(hits) / len(groups) if groups else 0.0
    correct = is_correct(completion, solution, rules)
    unanswered = rules.require_answer and answer is None
    accuracy = 0.0 if unanswered else float(correct) + alpha * k
    starts = step_starts(completion)
    faults = section_faults(completion, rules)
    validity = 0.0 if faults else 1.0
    return Score(
        accuracy=accuracy,
        validity=validity,
        reward=accuracy + validity,
        correct=correct,
        answer=answer,
        expected=expected_answer(solution, rules),
        matched=tuple(hit.group for hit in hits),
        total=len(groups),
        k=k,
        hits=hits,
        step_starts=starts,
        step_rewards=_step_rewards(() if unanswered else hits, starts, alpha / max(1, len(groups))),
        faults=faults,
        note="; ".join(notes),
    )


def _step_rewards(hits: Sequence[Hit], starts: Sequence[int], each: float) -> tuple[float, ...]:
    """The rewards of hits by the step in which each hit ends. A hit before the first step counts for the first."""
    rewards = [0.0] * max(1, len(starts))
    for hit in hits:
        rewards[max(0, bisect_right(starts, max(hit.start, hit.end - 1)) - 1)] += each
    return tuple(rewards)


def step_accuracy(
    completions: Sequence[str],
    solutions: Sequence[str],
    key_steps: Sequence[Any],
    *,
    rules: str | Rules = "paper",
    alpha: float = 0.1,
) -> np.ndarray:
    """StepRAR of N answers, float64 of shape (N,), computed in this process.

    Raises:
      ValueError: the arguments have different lengths, or no preset has this name.
      TypeError: a completion or solution is not a text.
    """
    check_lengths(completions, solutions, key_steps)
    rules = get_rules(rules)
    rows = zip(completions, solutions, key_steps, strict=True)
    return np.array([score_answer(*row, rules=rules, alpha=alpha).accuracy for row in rows], np.float64)


def step_validity(completions: Sequence[str], *, rules: str | Rules = "paper") -> np.ndarray:
    """StepRVR of N answers, float64 of shape (N,): 1 if an answer is complete and in order, else 0.

    Raises:
      ValueError: no preset has this name.
    """
    rules = get_rules(rules)
    return np.array([0.0 if section_faults(text, rules) else 1.0 for text in completions], np.float64)


def check_lengths(completions: Sequence[str], solutions: Sequence[str], key_steps: Sequence[Any]) -> None:
    """Checks that the three have one entry for each answer.

    Raises:
      ValueError: the lengths differ, or one is a single text or object rather than a sequence.
    """
    columns = {"completions": completions, "solutions": solutions, "key_steps": key_steps}
    for name, column in columns.items():
        if isinstance(column, str | dict):
            raise ValueError(f"{name}: expected one entry for each answer, got a single {type(column).__name__}")
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"expected one entry of each for every answer, got {lengths}")
