"""Reading a JSON object that a checkpoint folder must hold, and writing files that appear when they are complete.

Nothing of r1vl_jax is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
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


def inner_object(table: dict[str, Any], key: str, path: Path | str) -> dict[str, Any]:
    """The object under `key`, empty where the key is missing or null. Raises ValueError naming file and key."""
    value = table.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {value!r}; expected an object")
    return value or {}


@contextlib.contextmanager
def atomic_write(path: Path | str, *, replace: bool = True) -> Iterator[TextIO]:
    """A text file that takes its name only when it is complete; with `replace=False`, only whether it could be written.

    Raises OSError where that cannot be, or where the name is that of a folder or a device.
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


@contextlib.contextmanager
def atomic_folder(path: Path | str, *, replace: bool = True) -> Iterator[Path]:
    """Yields a new folder that is renamed to `path` when the block ends, and removed where the block raises.

    Args:
      replace: an older folder at `path` is replaced, and what a killed process left of an earlier try is removed. With
        False several processes may make the same folder at once: the first to finish wins, the others raise OSError,
        as they do where `path` is a folder that is not empty.
    """
    target = Path(path).absolute()
    temporary = target.with_name(f".{target.name}.partial" if replace else f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not replace:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if replace:
        replace_folder(temporary, target)


def replace_folder(new: Path, target: Path) -> None:
    """Renames the complete folder `new` to `target`; an older folder there is kept until then, and removed."""
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    new.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: Path | str, value: object, indent: int = 2) -> None:
    """Writes a value as indented JSON in UTF-8, with a line end at the end."""
    Path(path).write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
