"""The reward lab: one set of answers under several reward rules, and what attacks on the rules earn.

In the flow: score.py reads rows and has them scored; `rescore` and `probe` make reports of the scores (plain data,
ready for JSON), and lab_tables.py shows them on a terminal. In a group of answers to one question

    reward = outcome + key steps + validity          (R1-VL, arXiv 2503.12937, section 3.3)

a part's share of the reward is mean(part) / mean(reward), its share of the variance, that is, of what the advantage is
made of, cov(part, reward) / var(reward): a part that is the same in all answers has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from r1vl_jax.rewards import Score
from r1vl_jax.step_grpo.advantages import EQUAL, group_advantages

PARTS = ("outcome", "key_steps", "validity")
PLACE = ("stage", "step", "event", "row", "source")  # fields of a run's row that say where it comes from
_NOISE = 1e-6  # an advantage below this is the rounding of an answer at the group's mean, and has no sign


@dataclasses.dataclass(frozen=True)
class Group:
    """G answers to one question, and where they come from (fields of `PLACE`)."""

    place: dict[str, Any]
    question: str
    solution: str
    key_steps: Any
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A group under one set of rules: scores, parts of the rewards, advantages, and which of those have another sign
    than under the first rules."""

    scores: list[Score]
    parts_3G: np.ndarray
    advantages_G: np.ndarray
    flips_G: np.ndarray

    @property
    def rewards_G(self) -> np.ndarray:
        return np.array([score.reward for score in self.scores])

    @property
    def alone(self) -> bool:
        return len(self.scores) == 1

    @property
    def flat(self) -> bool:
        """All rewards are equal."""
        return bool(np.ptp(self.rewards_G) < EQUAL)

    @property
    def shaping_only(self) -> bool:
        """The rewards differ, but no answer is more right than another."""
        return not self.flat and bool(np.ptp(self.parts_3G[0]) == 0)


def of_a_run(row: dict) -> bool:
    """Whether a row is a question of a run's rollouts.jsonl, with all its answers; else it is a single completion."""
    return "answers" in row and "completion" not in row


def groups_of(rows: Iterable[dict]) -> list[Group]:
    """The groups in checked rows: a run's rows as they are; of single completions, consecutive ones that have the same
    question (or problem), solution and key steps. A completion whose row has no question stands alone."""
    groups = []
    for (question, *_), members in groupby(enumerate(rows), key=lambda item: _question_key(*item)):
        members = [row for _, row in members]
        first = members[0]
        texts = [answer["text"] for answer in first["answers"]] if of_a_run(first) else None
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


def _question_key(index: int, row: dict) -> tuple:
    question = row.get("question", row.get("problem"))
    shown = question if isinstance(question, str) else ""
    groups = shown and not of_a_run(row)
    return (shown, row["solution"], repr(row.get("key_steps"))) if groups else (shown, index)


# --- reports ----------------------------------------------------------------------------------------------------------


def rescore(groups: Sequence[Group], scores: dict[str, Sequence[Score]]) -> dict[str, Any]:
    """The report of all groups.

    Args:
      groups: as scored.
      scores: by the rules' name, one score for each answer, in the order of the groups. The first rules are what the
        others are compared with.

    Returns:
      {"rules": names, "totals": {name: ...}, "groups": [...]}, the groups with the largest disagreement first: the sum
      of |advantage - advantage under the first rules| over the answers, for the rules where it is largest; the
      rewards' standard deviation where only one set of rules is given. `--help` of the command has all fields.
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
    # Accuracy is 0, and not the outcome, for a right answer that the rules do not find in its place.
    outcome = np.array([float(score.correct and score.accuracy != 0) for score in scores])
    accuracy, validity = (np.array([getattr(score, name) for score in scores]) for name in ("accuracy", "validity"))
    parts = np.stack([outcome, accuracy - outcome, validity])
    advantages = group_advantages(np.array([[score.reward for score in scores]]))[0]
    advantages = np.where(np.abs(advantages) < _NOISE, 0.0, advantages)
    flips = np.zeros(len(scores), bool) if first is None else advantages * first.advantages_G < 0
    return Judgement(scores, parts, advantages, flips)


def _shares(views: Sequence[Judgement]) -> dict[str, dict[str, float] | None]:
    """Each part's share of the rewards, and of their variance inside the groups; None where those are 0."""
    parts = np.concatenate([view.parts_3G for view in views], axis=1)
    centred = np.concatenate([view.parts_3G - view.parts_3G.mean(axis=1, keepdims=True) for view in views], axis=1)
    varies = any(not view.flat for view in views)
    total, spread = parts.sum(), centred.sum(axis=0)
    return {
        "reward_share": _named(parts.sum(axis=1) / total) if total else None,
        "variance_share": _named(centred @ spread / (spread @ spread)) if varies else None,
    }


def _named(values_3: np.ndarray) -> dict[str, float]:
    return dict(zip(PARTS, map(float, values_3), strict=True))


def _totals(views: Sequence[Judgement]) -> dict[str, Any]:
    """Means over all answers; shares of the groups and answers that are not alone; counts."""
    scores = [score for view in views for score in view.scores]
    groups = [view for view in views if not view.alone]

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
        "zero_variance": mean(view.flat for view in groups),
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
        "std": None if view.alone else float(rewards.std(ddof=1)),
        **_shares([view]),
        "zero_variance": view.flat,
        "shaping_only": view.shaping_only,
        "sign_flips": int(view.flips_G.sum()),
        "answers": [
            {
                "reward": score.reward,
                **_named(parts),
                "k": score.k,
                "correct": score.correct,
                "answer": score.answer,
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


def probe(cases: Sequence[tuple[int, str]], scores: dict[str, Sequence[Score]], honest: Sequence[str]) -> dict:
    """The report of a probe.

    Args:
      cases: (problem's index, completion's name) of every scored completion.
      scores: by the rules' name, one score for each case.
      honest: names that are no attacks; the last is the honest wrong answer. Its reward without key steps, that is,
        its validity, is what a completion's excess is counted from.

    Returns:
      {"rules": names, "problems": count, "completions": [{"name", "attack", "rules": {name: ...}}]}; `--help` of the
      command has all fields.
    """
    places: dict[str, list[int]] = {}
    for place, (_, name) in enumerate(cases):
        places.setdefault(name, []).append(place)
    rows = [{"name": name, "attack": name not in honest, "rules": {}} for name in places]
    for rules, column in scores.items():
        base = {cases[place][0]: column[place].validity for place in places[honest[-1]]}
        for row in rows:
            own = [(column[place], cases[place][0]) for place in places[row["name"]]]
            excess, worst = max((score.reward - base[problem], -problem) for score, problem in own)
            row["rules"][rules] = {
                "mean": sum(score.reward for score, _ in own) / len(own),
                "max": max(score.reward for score, _ in own),
                "excess": excess,
                "problem": -worst,
                "exceeds": row["attack"] and excess > EQUAL,
                "failures": sum(score.status != "ok" for score, _ in own),
            }
    return {"rules": list(scores), "problems": len(places[honest[-1]]), "completions": rows}
