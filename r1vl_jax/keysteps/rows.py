"""Rows of R1-VL-10K as the key-step commands see them: read from a file, with their fields and groups.

    {"image_path": "a.png", "problem": "...", "solution": "...", "key_steps": {"Steps": [["a", "or b"], "c"]}}

Fields that no command knows stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from r1vl_jax.rewards.key_steps import key_step_groups
from r1vl_jax.rewards.normal import END, normal_text

Groups = list[list[str]]


class InputError(ValueError):
    """A file or an option cannot be used; the message says which and why."""


class RowFault(ValueError):
    """One row cannot be worked on; the message says why."""


class Row(NamedTuple):
    """One row of a file.

    Attributes:
      number: its place in the array, or its line, from 0.
      value: the row; None where it is unusable.
      fault: why it is; empty for a usable row.
    """

    number: int
    value: dict[str, Any] | None
    fault: str = ""


def read_rows(path: str | Path) -> tuple[list[Row], str]:
    """All rows of a JSON array or JSONL file, unusable ones too, and the file's SHA-256.

    Raises:
      InputError: the file is missing, empty, not UTF-8 or an array that is not JSON.
    """
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")  # -sig: a byte-order mark may stand first
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); expected a JSON array or JSONL") from error
    if text.lstrip().startswith("["):
        try:
            rows = [_row(number, value) for number, value in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error}); expected one array of objects") from error
    else:
        rows = [_parsed(number, line) for number, line in enumerate(text.split("\n")) if line.strip()]
    if not rows:
        raise InputError(f"{path}: empty; expected at least one row")
    return rows, hashlib.sha256(data).hexdigest()


def _parsed(number: int, line: str) -> Row:
    try:
        return _row(number, json.loads(line))
    except (ValueError, RecursionError) as error:
        return Row(number, None, f"not JSON ({error}); expected one object a line")


def _row(number: int, value: object) -> Row:
    if isinstance(value, dict):
        return Row(number, value)
    return Row(number, None, f"holds {shown(value)}; expected an object")


def text_field(row: dict[str, Any], field: str) -> str:
    """A field's text. Raises RowFault where it is missing, empty or no text."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        what = shown(value) if field in row else "missing"
        raise RowFault(f"field {field!r}: {what}; expected a text that is not empty")
    return value


def groups_of(row: dict[str, Any]) -> Groups:
    """The groups of a row's key steps; what is not text is left out. Raises RowFault where there are no key steps."""
    groups, notes = key_step_groups(row.get("key_steps"))
    if not groups:
        raise RowFault(f"field 'key_steps': {'; '.join(notes)}; expected {{\"Steps\": [...]}}")
    return [list(group) for group in groups]


def with_groups(row: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """The row with these key steps, and all else as it was."""
    return row | {"key_steps": {"Steps": groups}}


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def normal_key(text: str) -> tuple[str, ...]:
    """What two texts share that the robust rules take for the same; empty for a text that says nothing."""
    return tuple(word for word in normal_text(text).words if word != END)
