"""StepRAR + StepRVR of one answer (R1-VL, arXiv 2503.12937, section 3.3).

    accuracy = [the final answer is right] + alpha * k      (preset paper: 0 where no final answer is given)
    validity = 1 if the answer is complete and in order, else 0
    reward   = accuracy + validity

In the flow: rollout gives completions, these functions give rewards, step_grpo normalises them in the group. Text that
a model wrote belongs into `ScorerPool`: here, in the caller's process, only math-verify's own time limits (5 s for each
parse and comparison) stand between a hostile answer such as 10^10^10^10 and a hang, and some arithmetic escapes them.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from r1vl_jax.rewards.answer import expected_answer, found_answer, is_correct
from r1vl_jax.rewards.key_steps import Hit, key_step_groups, key_step_hits
from r1vl_jax.rewards.rules import Rules, get_rules
from r1vl_jax.rewards.steps import section_faults, step_starts


@dataclasses.dataclass(frozen=True)
class Score:
    """The rewards of one answer, and why.

    Attributes:
      accuracy, validity, reward: StepRAR, StepRVR and their sum.
      correct: the final answer is right.
      answer: the final answer found; None where there is none.
      expected: the solution's final answer.
      matched: indices of the key-step groups found, ascending.
      total: number of key-step groups of the question.
      k: len(matched) / total, 0 where there are no groups.
      hits: where each matched group is found first: (group, start, end) in characters of the completion.
      step_starts: the character at which each step's header begins.
      step_rewards: the key steps' part of the accuracy, alpha / total for each hit, by the step that it stands in; one
        entry for each step, one for an answer without steps.
      faults: what keeps the answer from being valid, as short phrases.
      status: "ok"; "timeout", "error" or "crash" where the pool could not score the answer. Then all rewards are 0,
        and the other fields are empty.
      note: what was wrong with the key steps, or with the scoring.
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
    """The score of one completion, in this process and thread (the main one: see answer.is_correct).

    Args:
      completion: the answer to score.
      solution: the reference; its final-answer section, or all of it.
      key_steps: `{"Steps": groups}`, or the groups; missing, empty and null ones give k = 0 and a note.
      rules: a preset's name, or options.
      alpha: weight of the key steps.

    Raises:
      TypeError: completion or solution is not a text.
      ValueError: no preset has this name.
    """
    rules = get_rules(rules)
    for name, value in (("completion", completion), ("solution", solution)):
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected a text, got {type(value).__name__}")
    answer = found_answer(completion, rules)
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
    """The rewards of hits by the step that each is complete in; what stands before the first step counts to it."""
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
    """StepRVR of N answers, float64 of shape (N,): 1 where an answer is complete and in order, else 0.

    Raises:
      ValueError: no preset has this name.
    """
    rules = get_rules(rules)
    return np.array([0.0 if section_faults(text, rules) else 1.0 for text in completions], np.float64)


def check_lengths(completions: Sequence, solutions: Sequence, key_steps: Sequence) -> None:
    """Raises ValueError unless the three have one entry for each answer (a lone text is not a sequence of answers)."""
    columns = {"completions": completions, "solutions": solutions, "key_steps": key_steps}
    for name, column in columns.items():
        if isinstance(column, str | dict):
            raise ValueError(f"{name}: expected one entry for each answer, got a single {type(column).__name__}")
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"expected one entry of each for every answer, got {lengths}")
