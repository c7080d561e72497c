"""Reading a JSON object that a checkpoint folder must hold; nothing of r1vl_jax is imported here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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


def inner_object(table: dict[str, Any], key: str, path: Path | str) -> dict[str, Any]:
    """The object under `key`, empty where the key is missing or null. Raises ValueError naming file and key."""
    value = table.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {value!r}; expected an object")
    return value or {}
