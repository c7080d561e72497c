"""The reward lab: one set of answers under several reward rules, and what attacks on the rules earn.

In the flow: score.py reads rows and has them scored; `rescore` and `probe` make reports of the scores (plain data,
ready for JSON), `rescore_table` and `probe_table` show them on a terminal. In a group of answers to one question

    reward = outcome + key steps + validity          (R1-VL, arXiv 2503.12937, section 3.3)

a part's share of the reward is mean(part) / mean(reward), its share of the variance, that is, of what the advantage is
made of, cov(part, reward) / var(reward): a part that is the same in all answers has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any
from unicodedata import east_asian_width

import numpy as np

from r1vl_jax.rewards import Score
from r1vl_jax.step_grpo.advantages import group_advantages

PARTS = ("outcome", "key_steps", "validity")
WIDTH = 120
_PLACE = ("stage", "step", "event", "row", "source")  # fields of a run's row that say where it comes from
_NOISE = 1e-6  # an advantage below this is the rounding of an answer at the group's mean, and has no sign
_EQUAL = 1e-9  # rewards that lie closer are the same
_SHARES = {"reward_share": "  from", "variance_share": "  its variance from"}
_TOTALS = {
    "answers right": "correct",
    "answers valid": "validity",
    "key steps found (k)": "key_steps",
    "answers without a final answer": "no_answer",
    "groups with equal rewards": "zero_variance",
    "groups moved by shaping alone": "shaping_only",
    "advantages of another sign": "sign_flips",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """G answers to one question, and where they come from (fields of `_PLACE`)."""

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
        return bool(np.ptp(self.rewards_G) < _EQUAL)

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
                {field: first[field] for field in _PLACE if field in first},
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
                "exceeds": row["attack"] and excess > _EQUAL,
                "failures": sum(score.status != "ok" for score, _ in own),
            }
    return {"rules": list(scores), "problems": len(places[honest[-1]]), "completions": rows}


# --- tables -----------------------------------------------------------------------------------------------------------


def rescore_table(report: dict[str, Any], shown: int) -> str:
    """The totals and the first `shown` groups of a report, as lines that fit WIDTH columns."""
    names, columns = report["rules"], _columns(report["rules"])
    lines = _legend(names, columns)
    for part in _slices(names, 6):
        lines += [*_totals_lines([report["totals"][name] for name in names[part]], columns[part]), ""]
    groups = report["groups"][:shown]
    if groups:
        what = f"where others disagree most with {names[0]}" if len(names) > 1 else "whose rewards differ most"
        lines += [f"The {len(groups)} of {len(report['groups'])} groups {what}."]
        lines += [
            "Of each part: share of the reward / of its variance. Of an answer: reward, advantage; r right, w wrong,"
        ]
        lines += [f"- none, ! not scored; * an advantage of another sign than under {names[0]}."]
    for number, group in enumerate(groups, 1):
        lines += ["", *_group_lines(number, group, columns)]
    return _text(lines)


def _totals_lines(totals: list[dict], columns: list[str]) -> list[str]:
    first = totals[0]
    alone = f" ({first['groups_of_one']} of one answer)" if first["groups_of_one"] else ""
    rows = [[f"{first['answers']} answers, {first['groups']} groups{alone}", *columns]]
    rows += [["mean reward", *(f"{total['reward']:.3f}" for total in totals)]]
    for key, title in _SHARES.items():
        for part in PARTS:
            rows += [[f"{title} {_title(part)}", *(_percent((total[key] or {}).get(part)) for total in totals)]]
    for title, key in _TOTALS.items():
        rows += [[title, *(_percent(total[key]) for total in totals)]]
    for title, key in (("answers not scored", "failures"), ("answers with faulty key steps", "key_step_faults")):
        rows += [[title, *(str(total[key]) for total in totals)]]
    return _aligned(rows)


def _group_lines(number: int, group: dict, columns: list[str]) -> list[str]:
    place = ", ".join(f"{field} {_shown(group[field])}" for field in _PLACE if group.get(field) is not None)
    views = list(group["rules"].values())
    rows = [["   rules", "mean", "std", *(f"{_title(part)} / var." for part in PARTS), "flips", ""]]
    for view, column in zip(views, columns, strict=True):
        std = "-" if view["std"] is None else f"{view['std']:.3f}"
        shares = [" / ".join(_percent((view[key] or {}).get(part)) for key in _SHARES) for part in PARTS]
        note = "shaping alone" if view["shaping_only"] else "equal rewards" if view["zero_variance"] else ""
        rows += [[f"   {column}", f"{view['mean']:.3f}", std, *shares, str(view["sign_flips"]), note]]
    lines = [f"{number}. {place}", f"   {_shown(group['question'])} (expected: {_shown(group['expected'])})"]
    lines += _aligned(rows)
    for part in _slices(views, 4):
        lines += _answer_lines([view["answers"] for view in views[part]], columns[part])
    return lines


def _answer_lines(answers: list[list[dict]], columns: list[str]) -> list[str]:
    rows = [["   answer", *columns, "final answer"]]
    for number, views in enumerate(zip(*answers, strict=True), 1):
        cells = [f"{view['reward']:.3f} {view['advantage']:+.3f} {_mark(view)}" for view in views]
        rows += [[f"   {number}", *cells, _shown(views[0]["answer"] or "")]]
    return _aligned(rows, left=(0, len(columns) + 1))


def _mark(view: dict) -> str:
    verdict = "!" if view["status"] != "ok" else "r" if view["correct"] else "-" if view["answer"] is None else "w"
    return verdict + ("*" if view["flip"] else " ")


def probe_table(report: dict[str, Any]) -> str:
    """A probe's report as lines that fit WIDTH columns."""
    names, columns = report["rules"], _columns(report["rules"])
    lines = _legend(names, columns)
    lines += [f"Rewards over {report['problems']} problems: mean, max, and the most that one exceeds an honest wrong"]
    lines += ["answer (without key steps) by; ! marks attacks that do.", ""]
    for part in _slices(names, 3):
        rows = [["completion", *columns[part]], ["", *["mean   max  excess  "] * len(columns[part])]]
        for row in report["completions"]:
            cells = [row["rules"][name] for name in names[part]]
            rows += [[row["name"], *(_probe_cell(cell) for cell in cells)]]
        lines += [*_aligned(rows), ""]
    attacks = [row for row in report["completions"] if row["attack"]]
    for name in names:
        beaten = sum(row["rules"][name]["exceeds"] for row in attacks)
        failed = sum(row["rules"][name]["failures"] for row in report["completions"])
        failed = f"; {failed} completions could not be scored and earned 0" if failed else ""
        lines += [f"{name}: {beaten} of {len(attacks)} attacks earn more than an honest wrong answer{failed}"]
    return _text(lines)


def _probe_cell(cell: dict) -> str:
    return f"{cell['mean']:.3f} {cell['max']:.3f} {cell['excess']:+.3f} {'!' if cell['exceeds'] else ' '}"


def _columns(names: list[str]) -> list[str]:
    """Headings of columns: the rules' names, or numbers for long ones."""
    return [name if len(name) <= 14 else f"[{number}]" for number, name in enumerate(names, 1)]


def _legend(names: list[str], columns: list[str]) -> list[str]:
    lines = [f"{column} {name}" for name, column in zip(names, columns, strict=True) if name != column]
    return [*lines, ""] if lines else []


def _slices(items: Sequence, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(items), size)]


def _title(part: str) -> str:
    return part.replace("_", " ")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{round(share, 3) + 0.0:.1%}"  # + 0.0: no "-0.0%"


def _aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _shown(value: Any) -> str:
    """A value on one line of the terminal: no line ends, control characters or lone surrogates."""
    text = " ".join(str(value)[: 2 * WIDTH].split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _text(lines: Iterable[str]) -> str:
    return "\n".join(map(_clipped, lines)).rstrip() + "\n"


def _clipped(line: str) -> str:
    """The part of a line that fits WIDTH columns; Chinese characters, say, take two."""
    ends = np.cumsum([1 + (east_asian_width(char) in "WF") for char in line])
    fits = int(np.searchsorted(ends, WIDTH, side="right"))
    return (line if fits == len(line) else line[: fits - 3] + "...").rstrip()
