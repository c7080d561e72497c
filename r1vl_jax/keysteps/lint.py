"""Finds faulty key steps: key steps that can never be paid, that are paid for nothing, or that are paid twice.

The check searches the key steps of each row in the row's own solution under the robust rules, as training searches them
in an answer.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from r1vl_jax.common.text import shown
from r1vl_jax.keysteps.rows import normal_key
from r1vl_jax.rewards.formats import FORMATS, Format
from r1vl_jax.rewards.key_steps import key_step_groups, key_step_hits
from r1vl_jax.rewards.normal import normal_text
from r1vl_jax.rewards.rules import Rules, get_rules

KINDS = {
    "unusable": "problem or solution is missing or not a text",
    "missing": "no key steps",
    "not_text": "an alternative that is not a text",
    "empty": "a group or an alternative without text",
    "duplicate": "an alternative that occurs twice, in one group or in two",
    "short": "a single character or just a small number",
    "general": "one common word, or it occurs in the solutions of many other rows",
    "absent": "no alternative occurs in the steps of the row's own solution",
    "question": "it occurs in the question: a copy of the question would pay",
    "many": "more groups than --max-groups",
}
_COMMON = re.compile(
    "the|an?|is|are|answer|angles?|triangles?|circles?|lines?|sides?|equal|equals|total|number|value|step|so|therefore|image"
    "|first|given|question|solution|figure|calculate|find|yes|no|and|option|correct|sum|length|area"
)
_MAX_PHRASE = 8  # tokens; longer texts are not searched in other rows
_MIN_OTHERS = 3  # a text that occurs in fewer other rows is not general, even if there are few rows


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fault of one row.

    Attributes:
      row: the row's number.
      group: index of the group of key steps; None for a fault of the whole row.
      kind: one of KINDS.
      detail: the faulty text, and what is wrong with it.
    """

    row: int
    group: int | None
    kind: str
    detail: str


def lint_rows(
    rows: Iterable[tuple[int, dict[str, Any]]],
    *,
    max_groups: int = 15,
    common_share: float = 0.2,
    answer_format: str = "r1vl",
) -> list[Finding]:
    """Returns all findings, sorted by row and group.

    Args:
      rows: pairs of a row's number and the row, as in R1-VL-10K.
      max_groups: maximum number of groups per row; a row with more groups is a finding.
      common_share: a text that occurs in the solutions of more than this share of the other rows is too general.
      answer_format: the format of the solutions: r1vl, think or boxed.
    """
    findings: list[Finding] = []
    phrases: dict[tuple[str, ...], list[tuple[int, int, str]]] = {}  # text -> (row, group, text) that have it
    solutions: dict[int, list[str]] = {}
    for number, row in rows:
        findings += (Finding(number, *finding) for finding in _row_findings(row, max_groups, answer_format))
        solutions[number] = _step_words(row.get("solution"), FORMATS[answer_format])
        for index, group in enumerate(key_step_groups(row.get("key_steps"))[0]):
            for text in group:
                phrases.setdefault(normal_key(text), []).append((number, index, text))
    findings += _general(phrases, solutions, common_share)
    return sorted(findings, key=lambda one: (one.row, -1 if one.group is None else one.group))


def counts(findings: Iterable[Finding]) -> Counter[str]:
    """Counts the findings of each kind, in the order of KINDS."""
    numbers = Counter(finding.kind for finding in findings)
    return Counter({kind: numbers[kind] for kind in KINDS})


def _row_findings(row: dict[str, Any], max_groups: int, answer_format: str) -> Iterator[tuple[int | None, str, str]]:
    """Yields (group, kind, detail) of the findings that need only this row."""
    for field in ("problem", "solution"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            yield None, "unusable", f"field {field!r}: {shown(row.get(field))}; expected a text"
    groups, notes = key_step_groups(row.get("key_steps"))
    if not groups:
        yield None, "missing", f"field 'key_steps': {'; '.join(notes)}"
        return
    if len(groups) > max_groups:
        yield None, "many", f"{len(groups)} groups; expected at most {max_groups}"
    raw = row["key_steps"]["Steps"] if isinstance(row["key_steps"], dict) else row["key_steps"]
    for index, (group, given) in enumerate(zip(groups, raw, strict=True)):
        others = [text for text in given if not isinstance(text, str)] if isinstance(given, list | tuple) else [given]
        yield from ((index, "not_text", shown(other)) for other in others if not isinstance(other, str))
        if not group or not all(normal_key(text) for text in group):
            yield index, "empty", "no alternatives" if not group else "an alternative without words or symbols"
        for text in filter(_is_short, group):
            yield index, "short", shown(text)
        yield from ((index, "general", f"{shown(text)} is a common word") for text in group if _is_common(text))
    yield from _duplicates(groups)
    yield from _out_of_place(row, groups, get_rules("robust", answer_format=answer_format))


def _is_short(text: str) -> bool:
    text = text.strip()
    return len(text) == 1 or re.fullmatch(r"[-+]?\d{1,2}(?:\.0*)?", text) is not None


def _is_common(text: str) -> bool:
    return _COMMON.fullmatch(text.strip().lower()) is not None


def _duplicates(groups: tuple[tuple[str, ...], ...]) -> Iterator[tuple[int, str, str]]:
    """Yields (group, kind, detail) for each alternative that occurs twice.

    Within a group, only equal spellings count as the same alternative, because `released` and `paper` search letter by
    letter. Across groups, different spellings of the same statement count too.
    """
    owner: dict[tuple[str, ...], int] = {}
    for index, group in enumerate(groups):
        spelled = Counter(" ".join(text.lower().split()) for text in group)
        yield from ((index, "duplicate", f"{shown(text)} occurs {n} times") for text, n in spelled.items() if n > 1)
        for text in group:
            first = owner.setdefault(normal_key(text), index)
            if first != index and normal_key(text):
                yield index, "duplicate", f"{shown(text)} is in group {first} too"


def _out_of_place(
    row: dict[str, Any], groups: tuple[tuple[str, ...], ...], robust: Rules
) -> Iterator[tuple[int, str, str]]:
    """Yields findings for groups that do not occur in the row's solution, and for texts that occur in its question."""
    problem, solution = row.get("problem"), row.get("solution")
    if isinstance(solution, str):
        loose = dataclasses.replace(robust, refuse_stuffing=False)
        missed = set(range(len(groups))) - {hit.group for hit in key_step_hits(solution, groups, robust)}
        listed = {hit.group for hit in key_step_hits(solution, groups, loose)} if missed else set()
        for index in sorted(missed):
            where = "only in a step of the solution that lists key steps" if index in listed else "not in the solution"
            yield index, "absent", f"{shown(list(groups[index]))}: {where}"
    if isinstance(problem, str):
        question = normal_text(problem)
        for index, group in enumerate(groups):
            for text in group:
                if any(question.find(text)):
                    yield index, "question", shown(text)


def _step_words(solution: Any, form: Format) -> list[str]:
    """Returns the tokens of a solution's steps. A line end after each step keeps a phrase from spanning two steps."""
    if not isinstance(solution, str):
        return []
    # The words are interned to save memory: the words of all rows are in memory at once, and most words recur.
    bodies = (normal_text(solution, start, end).compared() for start, end in form.step_bodies(solution))
    return [sys.intern(word) for words in bodies for word in (*words, "\n")]


def _general(
    phrases: dict[tuple[str, ...], list[tuple[int, int, str]]], solutions: dict[int, list[str]], share: float
) -> Iterator[Finding]:
    """Yields a finding for each key step that occurs in the solutions of many other rows."""
    lengths: dict[str, set[int]] = {}
    for phrase in phrases:
        if 0 < len(phrase) <= _MAX_PHRASE:
            lengths.setdefault(phrase[0], set()).add(len(phrase))
    has: dict[tuple[str, ...], set[int]] = {phrase: set() for phrase in phrases}
    for number, words in solutions.items():
        here = {
            phrase
            for i, word in enumerate(words)
            for length in lengths.get(word, ())
            if (phrase := tuple(words[i : i + length])) in phrases
        }
        for phrase in here:
            has[phrase].add(number)
    for phrase, places in phrases.items():
        for number, index, text in dict.fromkeys(places):
            others = len(has[phrase] - {number})
            if others >= _MIN_OTHERS and others > share * (len(solutions) - 1):
                yield Finding(number, index, "general", f"{shown(text)} is in {others} other rows' solutions")
