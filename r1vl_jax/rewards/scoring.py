"""Computes the StepRAR and StepRVR of answers (R1-VL, arXiv 2503.12937, section 3.3).

    accuracy = [the final answer is right] + alpha * k      (preset paper: 0 if there is no final answer)
    validity = 1 if the answer is complete and in order, else 0
    reward   = accuracy + validity

The package rollout samples completions, these functions score them, and step_grpo turns the rewards of a group into
advantages. Score model output with `ScorerPool`. The functions of this module run in the caller's process, where only
the time limits of math-verify (5 s per parse and per comparison) stop a hostile answer such as 10^10^10^10, and these
limits do not stop all arithmetic.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from r1vl_jax.rewards.answer import expected_answer, final_answer, judge
from r1vl_jax.rewards.formats import FORMATS
from r1vl_jax.rewards.key_steps import Hit, key_step_groups, key_step_hits
from r1vl_jax.rewards.rules import Rules, get_rules
from r1vl_jax.rewards.steps import section_faults


@dataclasses.dataclass(frozen=True)
class Score:
    """The rewards of one answer, and the reasons for them.

    Attributes:
      accuracy, validity, reward: StepRAR, StepRVR and their sum.
      correct: the final answer is right.
      reason: the step of the answer check that decided whether it is, and why ("choice: C, expected B").
      answer: the final answer of the completion; None if there is none.
      expected: the solution's final answer.
      matched: indices of the key-step groups that occur, ascending.
      total: number of key-step groups of the question.
      k: len(matched) / total; 0 if there are no groups.
      hits: the first occurrence of each matched group: (group, start, end) in characters of the completion.
      step_starts: the character at which each step's header begins.
      step_rewards: for each step, the part of the accuracy that its key steps earn: alpha / total per hit in the step.
        An answer without steps has one entry.
      faults: short phrases that say why the answer is not valid; empty for a valid answer.
      status: "ok"; "timeout", "error" or "crash" if the pool could not score the answer. In these cases all rewards are
        0, and the other fields except `note` have their defaults.
      note: the faults of the key steps, or the reason why the answer could not be scored.
    """

    accuracy: float = 0.0
    validity: float = 0.0
    reward: float = 0.0
    correct: bool = False
    reason: str = ""
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
    completion: str,
    solution: str,
    key_steps: Any,
    *,
    rules: str | Rules = "paper",
    alpha: float = 0.1,
    answer_format: str | None = None,
) -> Score:
    """Scores one completion in this process and thread.

    Args:
      completion: the answer to score.
      solution: the reference. Its final-answer section is compared, or what it marks as its answer otherwise
        (see answer.expected_answer).
      key_steps: `{"Steps": groups}`, or the groups. If None or empty, k is 0 and the score has a note.
      rules: a preset's name, or a `Rules`.
      alpha: weight of the key steps.
      answer_format: the format of the completion: r1vl, think or boxed; None: r1vl, or that of the given `Rules`. The
        solution may be in any format.

    Raises:
      TypeError: completion or solution is not a text.
      ValueError: no preset or format has this name, or the preset is only for R1-VL's format.
      RuntimeError: math-verify or SymPy is needed, and this is not the main thread (see answer.judge).
    """
    rules = get_rules(rules, answer_format=answer_format)
    for name, value in (("completion", completion), ("solution", solution)):
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected a text, got {type(value).__name__}")
    answer = final_answer(completion, rules)
    groups, notes = key_step_groups(key_steps)
    hits = key_step_hits(completion, groups, rules)
    k = len(hits) / len(groups) if groups else 0.0
    verdict = judge(completion, solution, rules)
    unanswered = rules.require_answer and answer is None
    accuracy = 0.0 if unanswered else float(verdict.right) + alpha * k
    starts = FORMATS[rules.format].step_starts(completion)
    faults = section_faults(completion, rules)
    validity = 0.0 if faults else 1.0
    return Score(
        accuracy=accuracy,
        validity=validity,
        reward=accuracy + validity,
        correct=verdict.right,
        reason=verdict.reason,
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
    """Returns the rewards of the hits, summed per step. A hit counts for the step in which it ends.

    A hit before the first step counts for the first step. `each` is the reward of one hit.
    """
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
    answer_format: str | None = None,
) -> np.ndarray:
    """Returns the StepRAR of N answers, float64 of shape (N,), computed in this process.

    Raises:
      ValueError: the arguments have different lengths, or as for `score_answer`.
      TypeError: a completion or solution is not a text.
    """
    check_lengths(completions, solutions, key_steps)
    rules = get_rules(rules, answer_format=answer_format)
    rows = zip(completions, solutions, key_steps, strict=True)
    return np.array([score_answer(*row, rules=rules, alpha=alpha).accuracy for row in rows], np.float64)


def step_validity(
    completions: Sequence[str], *, rules: str | Rules = "paper", answer_format: str | None = None
) -> np.ndarray:
    """Returns the StepRVR of N answers, float64 of shape (N,): 1 if an answer is complete and in order, else 0.

    Raises:
      ValueError: as for `score_answer`.
    """
    rules = get_rules(rules, answer_format=answer_format)
    return np.array([0.0 if section_faults(text, rules) else 1.0 for text in completions], np.float64)


def check_lengths(completions: Sequence[str], solutions: Sequence[str], key_steps: Sequence[Any]) -> None:
    """Checks that the three arguments are sequences of the same length.

    Raises:
      ValueError: the lengths differ, or an argument is a single text or object instead of a sequence.
    """
    columns = {"completions": completions, "solutions": solutions, "key_steps": key_steps}
    for name, column in columns.items():
        if isinstance(column, str | dict):
            raise ValueError(f"{name}: expected one entry for each answer, got a single {type(column).__name__}")
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"expected one entry of each for every answer, got {lengths}")
