"""Scores groups of answers under several reward rules, and makes one report that compares the rules.

The report consists of plain values that JSON can store. The reward of each answer is a sum of three parts:

    reward = outcome + key steps + validity          (R1-VL, arXiv 2503.12937, section 3.3)

A part's share of the reward is mean(part) / mean(reward). A part's share of the variance is
cov(part, reward) / var(reward); it is 0 for a part that is the same in all answers. The advantages depend only on how
rewards vary within a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from r1vl_jax.reward_lab.rows import is_run_row, question_of
from r1vl_jax.reward_lab.scoring import Scorer
from r1vl_jax.rewards import Score
from r1vl_jax.step_grpo.advantages import EQUAL, group_advantages

PARTS = ("outcome", "key_steps", "validity")
PLACE = ("stage", "step", "event", "row", "source")  # fields that say from which place of the run a row comes
_NOISE = 1e-6  # a smaller advantage is a rounding error of an answer at the group's mean, and is set to 0


@dataclasses.dataclass(frozen=True)
class Group:
    """A question with G answers.

    Attributes:
      place: the fields of `PLACE` that the row has.
      question, solution, key_steps: as in the row.
      texts: the G answers.
    """

    place: dict[str, Any]
    question: str
    solution: str
    key_steps: Any
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The rewards and advantages of a group under one set of rules.

    Attributes:
      scores: the scores of the G answers.
      parts_3G: outcome, key steps and validity of each answer.
      advantages_G: trajectory advantages of the answers.
      flips_G: True for each answer whose advantage has the opposite sign under the first rules.
    """

    scores: list[Score]
    parts_3G: np.ndarray
    advantages_G: np.ndarray
    flips_G: np.ndarray

    @property
    def rewards_G(self) -> np.ndarray:
        return np.array([score.reward for score in self.scores])

    @property
    def single(self) -> bool:
        """Returns whether the group has one answer only."""
        return len(self.scores) == 1

    @property
    def equal_rewards(self) -> bool:
        """Returns whether all rewards are equal."""
        return bool(np.ptp(self.rewards_G) < EQUAL)

    @property
    def shaping_only(self) -> bool:
        """Returns whether the rewards differ although the outcomes are equal."""
        return not self.equal_rewards and bool(np.ptp(self.parts_3G[0]) == 0)


def groups_of(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """Returns the groups in rows that `read_rows` has checked.

    Each row of a run is a group. Single completions form a group if their rows are consecutive and have the same
    question (or problem), solution and key steps. A completion without a question is a group of one.
    """
    groups = []
    for (question, *_), members in groupby(enumerate(rows), key=lambda item: _question_key(*item)):
        members = [row for _, row in members]
        first = members[0]
        texts = [answer["text"] for answer in first["answers"]] if is_run_row(first) else None
        groups.append(
            Group(
                {field: first[field] for field in PLACE if field in first},
                question,
                first["solution"],
                first.get("key_steps"),
                tuple(texts or [row["completion"] for row in members]),
            )
        )
    return groups


def score_groups(groups: Sequence[Group], scorer: Scorer) -> dict[str, list[Score]]:
    """Scores all answers. Returns, for each name of rules, one score per answer in the order of the groups."""
    owners = [group for group in groups for _ in group.texts]
    texts = [text for group in groups for text in group.texts]
    return scorer.score(texts, [owner.solution for owner in owners], [owner.key_steps for owner in owners])


def _question_key(index: int, row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns a key that is equal for consecutive rows of one group; its first entry is the question.

    The key of a row that forms a group of its own contains the row's index.
    """
    question = question_of(row)
    text = question if isinstance(question, str) else ""
    shared = text and not is_run_row(row)
    return (text, row["solution"], repr(row.get("key_steps"))) if shared else (text, index)


def rescore(groups: Sequence[Group], scores: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
    """Returns the report of all groups.

    Args:
      groups: the groups that were scored.
      scores: maps the name of each set of rules to one score per answer, in the order of the groups. The other rules
        are compared with the first rules.

    Returns:
      {"rules": names, "totals": {name: ...}, "groups": [...]}, groups with the largest disagreement first. The
      disagreement of one set of rules is the sum over the answers of |advantage - advantage under the first rules|; a
      group's disagreement is the maximum over the rules. With only one set of rules, it is the standard deviation of
      the rewards. `python -m r1vl_jax.score --help` lists all fields.
    """
    ends = np.cumsum([len(group.texts) for group in groups])[:-1] if groups else []
    table: dict[str, list[Judgement]] = {}
    for name, column in scores.items():
        parts = [list(column[a:b]) for a, b in zip([0, *ends], [*ends, len(column)], strict=True)]
        firsts = next(iter(table.values()), [None] * len(parts))
        table[name] = [_judgement(part, first) for part, first in zip(parts, firsts, strict=True)]
    rows = [
        _group_report(group, dict(zip(table, views, strict=True)))
        for group, *views in zip(groups, *table.values(), strict=True)
    ]
    return {
        "rules": list(scores),
        "totals": {name: _totals(views) for name, views in table.items()},
        "groups": sorted(rows, key=lambda row: -row["disagreement"]),
    }


def _judgement(scores: list[Score], first: Judgement | None) -> Judgement:
    # A right answer earns no accuracy if the rules require a final-answer section and it has none. Its outcome is 0.
    outcome = np.array([float(score.correct and score.accuracy != 0) for score in scores])
    accuracy, validity = (np.array([getattr(score, name) for score in scores]) for name in ("accuracy", "validity"))
    parts = np.stack([outcome, accuracy - outcome, validity])
    advantages = group_advantages(np.array([[score.reward for score in scores]]))[0]
    advantages = np.where(np.abs(advantages) < _NOISE, 0.0, advantages)
    flips = np.zeros(len(scores), bool) if first is None else advantages * first.advantages_G < 0
    return Judgement(scores, parts, advantages, flips)


def _shares(views: Sequence[Judgement]) -> dict[str, dict[str, float] | None]:
    """Returns each part's share of the rewards, and of their variance within the groups.

    A share is None if the sum of the rewards, or their variance, is 0.
    """
    parts = np.concatenate([view.parts_3G for view in views], axis=1)
    centred = np.concatenate([view.parts_3G - view.parts_3G.mean(axis=1, keepdims=True) for view in views], axis=1)
    varies = any(not view.equal_rewards for view in views)
    total, spread = parts.sum(), centred.sum(axis=0)
    return {
        "reward_share": _named(parts.sum(axis=1) / total) if total else None,
        "variance_share": _named(centred @ spread / (spread @ spread)) if varies else None,
    }


def _named(values_3: np.ndarray) -> dict[str, float]:
    return dict(zip(PARTS, map(float, values_3), strict=True))


def _totals(views: Sequence[Judgement]) -> dict[str, Any]:
    """Returns the totals of one set of rules: means over all answers, shares, and counts.

    The shares are over the groups with several answers, and over the answers of these groups.
    """
    scores = [score for view in views for score in view.scores]
    groups = [view for view in views if not view.single]

    def mean(values: Iterable[float]) -> float | None:
        values = [float(value) for value in values]
        return sum(values) / len(values) if values else None

    return {
        "groups": len(views),
        "groups_of_one": len(views) - len(groups),
        "answers": len(scores),
        "reward": mean(score.reward for score in scores),
        "correct": mean(score.correct for score in scores),
        "validity": mean(score.validity for score in scores),
        "key_steps": mean(score.k for score in scores),
        "no_answer": mean(score.status == "ok" and score.answer is None for score in scores),
        **_shares(views),
        "zero_variance": mean(view.equal_rewards for view in groups),
        "shaping_only": mean(view.shaping_only for view in groups),
        "sign_flips": mean(flip for view in groups for flip in view.flips_G),
        "failures": sum(score.status != "ok" for score in scores),
        "key_step_faults": sum(score.status == "ok" and bool(score.note) for score in scores),
    }


def _group_report(group: Group, views: dict[str, Judgement]) -> dict[str, Any]:
    first, *others = views.values()
    gaps = [float(np.abs(view.advantages_G - first.advantages_G).sum()) for view in others]
    return {
        **group.place,
        "question": group.question,
        "expected": first.scores[0].expected,
        "disagreement": max(gaps) if gaps else float(np.std(first.rewards_G)),
        "texts": list(group.texts),
        "rules": {name: _view_report(view) for name, view in views.items()},
    }


def _view_report(view: Judgement) -> dict[str, Any]:
    rewards = view.rewards_G
    return {
        "mean": float(rewards.mean()),
        "std": None if view.single else float(rewards.std(ddof=1)),
        **_shares([view]),
        "zero_variance": view.equal_rewards,
        "shaping_only": view.shaping_only,
        "sign_flips": int(view.flips_G.sum()),
        "answers": [
            {
                "reward": score.reward,
                **_named(parts),
                "k": score.k,
                "correct": score.correct,
                "answer": score.answer,
                "reason": score.reason,
                "advantage": float(advantage),
                "flip": bool(flip),
                "faults": list(score.faults),
                "status": score.status,
            }
            for score, parts, advantage, flip in zip(
                view.scores, view.parts_3G.T, view.advantages_G, view.flips_G, strict=True
            )
        ],
    }
