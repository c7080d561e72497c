"""Reads, checks and selects the input rows of the score command.

A row is a single completion, a question of a run's rollouts.jsonl with all its answers, or a problem to attack.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from r1vl_jax.common.files import parse_rows
from r1vl_jax.common.text import shorten
from r1vl_jax.errors import RowError

MAX_PLACES = 20  # maximum number of stages and steps listed in an error message


def read_rows(path: str, problems: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads and checks the rows of a JSONL file, or of a file with one JSON array. "-" reads standard input.

    Messages count rows from 0 and lines from 1. Blank lines are not rows.

    Args:
      problems: True if the rows are problems to attack, which need a question but no answer.

    Returns:
      rows: the usable rows.
      faults: one line of text per unusable row, with the file, the row and the field.

    Raises:
      OSError: the file cannot be read.
    """
    name, data = ("standard input", sys.stdin.buffer.read()) if path == "-" else (path, Path(path).read_bytes())
    rows, faults = [], []
    for entry in parse_rows(data)[0]:
        try:
            if entry.error is not None:
                raise entry.error
            _check_row(entry.value, problems)
        except (ValueError, RecursionError) as error:  # a bad field; bad UTF-8, bad JSON; nested too deep
            where = f"row {entry.index}" if entry.line is None else f"row {entry.index} (line {entry.line})"
            faults.append(f"{name}, {where}: {error}")
        else:
            rows.append(entry.value)
    return rows, faults


def is_run_row(row: dict[str, Any]) -> bool:
    """Returns True for a question with its answers, as in a run's rollouts.jsonl; False for a single completion."""
    return "answers" in row and "completion" not in row


def question_of(row: dict[str, Any]) -> str:
    """Returns the field `question`, or else the field `problem`; "" if the row has neither."""
    return row.get("question", row.get("problem", ""))


def select(
    rows: list[dict[str, Any]], name: str, stage: str | None, steps: tuple[float, float] | None, limit: int | None
) -> list[dict[str, Any]]:
    """Returns the rows of one stage and a range of training steps.

    If `stage` and `steps` are both None, all rows except held-out rows are selected; if the input has only held-out
    rows, these are selected.

    Args:
      name: the input's name, for error messages.
      stage: a stage of a run, or "heldout" for the held-out rows. None selects every stage.
      steps: first and last step, both included. None selects every step.
      limit: maximum number of rows. None means no limit.

    Raises:
      RowError: `stage` or `steps` is given, and no row matches.
    """
    if stage is None and steps is None:
        # Held-out rows have one greedy answer per question, and would distort the means over a stage's groups.
        return ([row for row in rows if "event" not in row] or rows)[:limit]
    chosen = [row for row in rows if stage in (None, _stage(row)) and _within(row, steps)]
    if not chosen:
        places = list(dict.fromkeys(f"{_stage(row)} {row.get('step')}" for row in rows if "step" in row))
        there = f"{', '.join(places[:MAX_PLACES])}{', ...' * (len(places) > MAX_PLACES)}" if places else "none"
        raise RowError(f"{name}: no row of the stage and steps asked for; stages and steps there: {there}")
    return chosen[:limit]


def _stage(row: dict[str, Any]) -> Any:
    return row.get("event", row.get("stage"))


def _within(row: dict[str, Any], steps: tuple[float, float] | None) -> bool:
    return steps is None or (isinstance(row.get("step"), int) and steps[0] <= row["step"] <= steps[1])


def _check_row(row: Any, problem: bool) -> None:
    """Raises ValueError if a row cannot be used. The message names the field and the expected value."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {_shown(row)}")
    run = is_run_row(row)
    for field in ("solution",) if problem or run else ("completion", "solution"):
        if field not in row:
            raise ValueError(f"field {field!r} is missing, expected a text")
        if not isinstance(row[field], str):
            raise ValueError(f"field {field!r}: expected a text, got {_shown(row[field])}")
    if run and not problem:
        _check_run_row(row)
    if problem and not isinstance(question_of(row), str):
        raise ValueError(f"field 'question' or 'problem': expected a text, got {_shown(question_of(row))}")
    steps = row.get("key_steps")
    if not isinstance(steps, dict | list | None):
        raise ValueError(f"field 'key_steps': expected an object with Steps, a list or null, got {_shown(steps)}")
    if isinstance(steps, dict) and steps and "Steps" not in steps:
        raise ValueError(f"field 'key_steps': expected 'Steps' in it, got {_shown(list(steps))}")
    if isinstance(steps, dict) and not isinstance(steps.get("Steps"), list | None):
        raise ValueError(f"field 'key_steps': expected a list under 'Steps', got {_shown(steps['Steps'])}")


def _check_run_row(row: dict[str, Any]) -> None:
    """Checks the fields `answers` and `step` of a row of rollouts.jsonl. Raises ValueError."""
    answers = row["answers"]
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"field 'answers': expected a list of at least one answer, got {_shown(answers)}")
    for index, answer in enumerate(answers):
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise ValueError(f"field 'answers[{index}]': expected an object with a text 'text', got {_shown(answer)}")
    if not isinstance(row.get("step", 0), int):
        raise ValueError(f"field 'step': expected a whole number, got {_shown(row['step'])}")


def _shown(value: object) -> str:
    """Returns a value as JSON, shortened."""
    return shorten(json.dumps(value), 60)
