"""Reading JSON files, and writing files that appear only when they are complete. Imports nothing of r1vl_jax."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


def read_text(path: Path) -> str:
    """A file's text. Raises ValueError naming the file if it is not there or not UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a checkpoint folder in Hugging Face layout")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """A file's one JSON object. Raises ValueError naming the file if it is not there or holds anything else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file of a run, one by one; none where there is no file.

    A last line that a killed run left half written is left out. Raises ValueError naming file and line for any other.
    """
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                if next(file, None) is None:
                    return
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error


def inner_object(table: dict[str, Any], key: str, path: Path | str) -> dict[str, Any]:
    """The object under `key`, empty where the key is missing or null. Raises ValueError naming file and key."""
    value = table.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {value!r}; expected an object")
    return value or {}


@contextlib.contextmanager
def atomic_write(path: Path | str, *, replace: bool = True) -> Iterator[TextIO]:
    """A text file that gets its name only when it is complete. `replace=False` only tests whether it can be written.

    Raises OSError where it cannot be written, or where the name is that of a folder or a device.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it exists and is not a plain file")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        if replace:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
