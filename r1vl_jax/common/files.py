"""Reading JSON files, and writing files that appear only when they are complete. Imports nothing of r1vl_jax."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO


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
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


class ParsedRow(NamedTuple):
    """One entry of a row file.

    Attributes:
      index: counts the entries, from 0; blank lines do not count.
      line: the number of its line, from 1; None in a JSON array.
      value: what the entry holds; None if it cannot be parsed.
      error: why it cannot be parsed; None if it can.
    """

    index: int
    line: int | None
    value: Any
    error: Exception | None


def parse_rows(data: bytes) -> tuple[list[ParsedRow], Exception | None]:
    """The entries of a row file: one JSON array, or one JSON value a line.

    Blank lines are skipped; a byte-order mark before the array or a line is ignored. A line that is not UTF-8 or not
    JSON does not stop the others: its entry has the error.

    Returns:
      rows: all entries, in order.
      array_error: None, or why a file that begins with "[" is not one JSON array. Then the entries are its lines.
    """
    array_error: Exception | None = None
    if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        try:
            values = json.loads(data.decode("utf-8-sig"))
            return [ParsedRow(index, None, value, None) for index, value in enumerate(values)], None
        except (ValueError, RecursionError) as error:
            array_error = error
    rows: list[ParsedRow] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        value, line_error = None, None
        try:
            text = line.decode("utf-8-sig")
            if not text.strip():
                continue
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON; nested too deep
            line_error = error
        rows.append(ParsedRow(len(rows), number, value, line_error))
    return rows, array_error
