"""The rows that the score command reads: single completions, questions of a run with their answers, or problems."""

from __future__ import annotations

import contextlib
import json
import sys

from r1vl_jax.reward_lab.rescoring import of_a_run


def read_rows(path: str, problems: bool = False) -> tuple[list[dict], list[str]]:
    """The usable rows of a JSONL file or a file with one JSON array ("-": standard input), and one line about each
    other row; with `problems` a row needs no answer.

    Blank lines are skipped. Rows count from 0 as everywhere in this project, lines from 1 as in editors.
    """
    name = "standard input" if path == "-" else path
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        lines = [(f"row {index} (line {number})", line) for index, (number, line) in enumerate(filled)]
    rows, faults = [], []
    array = _array(lines)
    for where, value in lines if array is None else ((f"row {index}", row) for index, row in enumerate(array)):
        try:
            row = json.loads(value.decode("utf-8-sig")) if array is None else value  # -sig: a byte-order mark first
            _check_row(row, problems)
        except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, bad field; nested too deep
            faults.append(f"{name}, {where}: {error}")
        else:
            rows.append(row)
    return rows, faults


def _array(lines: list[tuple[str, bytes]]) -> list | None:
    """The rows of a file that is one JSON array; None where it is not, and its lines say what is wrong with it."""
    if not lines or lines[0][1].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
        return None
    try:
        return json.loads(b"".join(line for _, line in lines).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _check_row(row: object, problem: bool = False) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {_shown(row)}")
    run = of_a_run(row)
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


def _check_run_row(row: dict) -> None:
    """What a row of rollouts.jsonl has beyond a problem."""
    answers = row["answers"]
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"field 'answers': expected a list of at least one answer, got {_shown(answers)}")
    for index, answer in enumerate(answers):
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise ValueError(f"field 'answers[{index}]': expected an object with a text 'text', got {_shown(answer)}")
    if not isinstance(row.get("step", 0), int):
        raise ValueError(f"field 'step': expected a whole number, got {_shown(row['step'])}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def question_of(row: dict) -> str:
    """The text of the question, by either name; empty where the row has none."""
    return row.get("question", row.get("problem", ""))
