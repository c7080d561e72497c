"""Formats the lab's reports as text tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from unicodedata import east_asian_width

import numpy as np

from r1vl_jax.reward_lab.rescoring import PARTS, PLACE

WIDTH = 120  # columns of the terminal
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


def rescore_table(report: dict[str, Any], shown: int) -> str:
    """Formats the totals and the first `shown` groups of a report of `rescore`, as lines that fit WIDTH columns."""
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


def _totals_lines(totals: list[dict[str, Any]], columns: list[str]) -> list[str]:
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


def _group_lines(number: int, group: dict[str, Any], columns: list[str]) -> list[str]:
    place = ", ".join(f"{field} {_printable(group[field])}" for field in PLACE if group.get(field) is not None)
    views = list(group["rules"].values())
    rows = [["   rules", "mean", "std", *(f"{_title(part)} / var." for part in PARTS), "flips", ""]]
    for view, column in zip(views, columns, strict=True):
        std = "-" if view["std"] is None else f"{view['std']:.3f}"
        shares = [" / ".join(_percent((view[key] or {}).get(part)) for key in _SHARES) for part in PARTS]
        note = "shaping alone" if view["shaping_only"] else "equal rewards" if view["zero_variance"] else ""
        rows += [[f"   {column}", f"{view['mean']:.3f}", std, *shares, str(view["sign_flips"]), note]]
    lines = [f"{number}. {place}", f"   {_printable(group['question'])} (expected: {_printable(group['expected'])})"]
    lines += _aligned(rows)
    for part in _slices(views, 4):
        lines += _answer_lines([view["answers"] for view in views[part]], columns[part])
    return lines


def _answer_lines(answers: list[list[dict[str, Any]]], columns: list[str]) -> list[str]:
    rows = [["   answer", *columns, "final answer"]]
    for number, views in enumerate(zip(*answers, strict=True), 1):
        cells = [f"{view['reward']:.3f} {view['advantage']:+.3f} {_mark(view)}" for view in views]
        rows += [[f"   {number}", *cells, _printable(views[0]["answer"] or "")]]
    return _aligned(rows, left=(0, len(columns) + 1))


def _mark(view: dict[str, Any]) -> str:
    """Returns r for a right answer, w wrong, - missing, ! not scored; and * if the sign of its advantage differs."""
    verdict = "!" if view["status"] != "ok" else "r" if view["correct"] else "-" if view["answer"] is None else "w"
    return verdict + ("*" if view["flip"] else " ")


def probe_table(report: dict[str, Any]) -> str:
    """Formats a report of `probe` as lines that fit WIDTH columns."""
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


def _probe_cell(cell: dict[str, Any]) -> str:
    return f"{cell['mean']:.3f} {cell['max']:.3f} {cell['excess']:+.3f} {'!' if cell['exceeds'] else ' '}"


def _columns(names: list[str]) -> list[str]:
    """Returns the headings of the columns: the name of each set of rules, or its number if the name is long."""
    return [name if len(name) <= 14 else f"[{number}]" for number, name in enumerate(names, 1)]


def _legend(names: list[str], columns: list[str]) -> list[str]:
    """Returns lines that explain the numbers in the headings; none if there are no numbers."""
    lines = [f"{column} {name}" for name, column in zip(names, columns, strict=True) if name != column]
    return [*lines, ""] if lines else []


def _slices(items: Sequence[Any], size: int) -> list[slice]:
    """Returns slices of at most `size` items. A table that is too wide is printed in several blocks."""
    return [slice(start, start + size) for start in range(0, len(items), size)]


def _title(part: str) -> str:
    return part.replace("_", " ")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{round(share, 3) + 0.0:.1%}"  # + 0.0: no "-0.0%"


def _aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Returns one line per row. Columns with an index in `left` are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _printable(value: Any) -> str:
    """Returns a value's text for one line of the terminal: without line ends, control characters or lone surrogates."""
    text = " ".join(str(value)[: 2 * WIDTH].split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _text(lines: Iterable[str]) -> str:
    return "\n".join(map(_clipped, lines)).rstrip() + "\n"


def _clipped(line: str) -> str:
    """Cuts a line to WIDTH columns. Some characters, such as Chinese characters, take two columns."""
    ends = np.cumsum([1 + (east_asian_width(char) in "WF") for char in line])
    fits = int(np.searchsorted(ends, WIDTH, side="right"))
    return (line if fits == len(line) else line[: fits - 3] + "...").rstrip()
