"""Reads R1-VL-10K rows from a file, and gets and sets their fields and groups of key steps.

    {"image_path": "a.png", "problem": "...", "solution": "...", "key_steps": {"Steps": [["a", "or b"], "c"]}}

All other fields are kept as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from r1vl_jax.common.files import ParsedRow, parse_rows
from r1vl_jax.common.text import shown
from r1vl_jax.errors import RowError
from r1vl_jax.rewards.key_steps import key_step_groups
from r1vl_jax.rewards.normal import END, normal_text

Groups = list[list[str]]


class InputError(ValueError):
    """A file or an option cannot be used. The message names the file or option, and the reason."""


class Row(NamedTuple):
    """One row of a file.

    Attributes:
      number: the index of the row in the array, or of its line in the file, from 0.
      value: the row; empty if the row cannot be used.
      fault: the reason why the row cannot be used; "" if it can.
    """

    number: int
    value: dict[str, Any]
    fault: str = ""


def read_rows(path: str | Path) -> tuple[list[Row], str]:
    """Reads all rows of a JSON array or JSONL file, including unusable rows. Returns them and the file's SHA-256.

    Raises:
      InputError: the file is missing, empty, not UTF-8, or an array that is not JSON.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    entries, array_error = parse_rows(data)
    for entry in entries:
        if isinstance(entry.error, UnicodeDecodeError):
            line = f", line {entry.line}"
            raise InputError(f"{path}{line}: not UTF-8 text ({entry.error}); expected a JSON array or JSONL")
    if array_error is not None:
        raise InputError(f"{path}: not JSON ({array_error}); expected one array of objects") from array_error
    if not entries:
        raise InputError(f"{path}: empty; expected at least one row")
    return [_row(entry) for entry in entries], hashlib.sha256(data).hexdigest()


def _row(entry: ParsedRow) -> Row:
    number = entry.index if entry.line is None else entry.line - 1
    if entry.error is not None:
        return Row(number, {}, f"not JSON ({entry.error}); expected one object a line")
    if not isinstance(entry.value, dict):
        return Row(number, {}, f"holds {shown(entry.value)}; expected an object")
    return Row(number, entry.value)


def text_field(row: dict[str, Any], field: str) -> str:
    """Returns a field's text. Raises RowError if the field is missing, empty or not a text."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        what = shown(value) if field in row else "missing"
        raise RowError(f"field {field!r}: {what}; expected a text that is not empty")
    return value


def groups_of(row: dict[str, Any]) -> Groups:
    """Returns the groups of a row's key steps. Alternatives that are not texts are left out.

    Raises:
      RowError: the row has no groups of key steps.
    """
    groups, notes = key_step_groups(row.get("key_steps"))
    if not groups:
        raise RowError(f"field 'key_steps': {'; '.join(notes)}; expected {{\"Steps\": [...]}}")
    return [list(group) for group in groups]


def with_groups(row: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """Returns the row with these groups as its key steps. The other fields stay."""
    return row | {"key_steps": {"Steps": groups}}


def normal_key(text: str) -> tuple[str, ...]:
    """Returns the tokens of a text in the normal form of the robust rules, without sentence ends.

    Two texts with equal tokens are the same statement.
    """
    return tuple(word for word in normal_text(text).compared() if word != END)
