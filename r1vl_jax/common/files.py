"""Reads JSON files, and writes files that appear only when they are complete. Imports no other module of r1vl_jax."""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO


def read_text(path: Path) -> str:
    """Returns a file's text. Raises ValueError, with the file's name, if the file is missing or not UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a checkpoint folder in Hugging Face layout")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises ValueError if the file is missing or contains anything else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def read_json_lines(
    path: str | Path, on_damage: Callable[[int, bytes], object] | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSONL file of a run; no rows if the file does not exist.

    A row is an object with the keys stage and step. A last line that is none is skipped, because a killed run may have
    written only half of it.

    Args:
      on_damage: called with the number and the bytes of any other line that is no row; None: raise ValueError, with
        file and line.
    """
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if not (isinstance(row, dict) and isinstance(row.get("stage"), str) and type(row.get("step")) is int):
                    raise ValueError("expected an object with stage and step")
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                if on_damage is None:
                    raise ValueError(f"{path}, line {number}: not a row ({error})") from error
                on_damage(number, line)
                continue
            yield row


def cache_folder() -> Path:
    """Returns the folder of what can be made again: r1vl_jax in $XDG_CACHE_HOME, which is ~/.cache by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "r1vl_jax"


def outside(path: str, root: str) -> str:
    """Returns a text that says where a file is, if it is outside of a folder when symbolic links are resolved; else "".

    A row of a data set may name any file of the machine.
    """
    real, folder = os.path.realpath(path), os.path.realpath(root)
    if Path(real).is_relative_to(folder):
        return ""
    return f"{path}: outside of {folder}" + (f" (it is a link to {real})" if real != os.path.abspath(path) else "")


def inner_object(table: dict[str, Any], key: str, path: Path | str, prefix: str = "") -> dict[str, Any]:
    """Returns the object at `key`; {} if `key` is missing or null. Raises ValueError if the value is not an object.

    `path` and `prefix` name the file and the place of `table` in it, for the message.
    """
    value = table.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: {prefix}{key} is {value!r:.80}; expected an object")
    return value or {}


def sync(path: Path | str) -> None:
    """Asks the system to write a file, or a folder with all files and folders in it, to disk now."""
    path = Path(path)
    for below in (*path.rglob("*"), path, path.parent) if path.is_dir() else (path,):
        descriptor = os.open(below, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path | str) -> Iterator[None]:
    """Context manager that one process at a time is in; others wait. The file `path` is made and stays."""
    with open(path, "a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def atomic_write(path: Path | str, *, replace: bool = True) -> Iterator[TextIO]:
    """Context manager that yields a text file.

    Writes to a temporary file in the same folder, and renames it to `path` if the block ends without an error. With
    `replace=False` it only checks that `path` is writable, and leaves `path` unchanged.

    Raises:
      OSError: the file cannot be written, or `path` is a folder or a device.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it exists and is not a plain file")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            if replace:
                file.flush()
                os.fsync(file.fileno())
        if replace:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path | str, *, replace: bool = True) -> Iterator[Path]:
    """Context manager that yields a new folder under a temporary name.

    The folder is renamed to `path` if the block ends without an error, and deleted if the block raises.

    Args:
      replace: True replaces an older folder at `path`, and deletes the temporary folder of an earlier process that was
        killed. With False, several processes may make the same folder at once: the first to finish renames its folder,
        and the others raise OSError, as they also do if `path` was a folder that is not empty.
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
        sync(temporary)
        replace_folder(temporary, target)


def replace_folder(new: Path, target: Path) -> None:
    """Renames the complete folder `new` to `target`. An older folder at `target` is moved aside first, then deleted."""
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
      index: index of the entry, from 0; blank lines do not count.
      line: line number of the entry, from 1; None in a JSON array.
      value: the parsed value; None if the entry cannot be parsed.
      error: the error of the parser; None if the entry could be parsed.
    """

    index: int
    line: int | None
    value: Any
    error: Exception | None


def parse_rows(data: bytes) -> tuple[list[ParsedRow], Exception | None]:
    """Parses a row file: one JSON array, or one JSON value per line.

    Blank lines are skipped. A byte-order mark before the array or a line is ignored. If a line is not UTF-8 or not
    JSON, its entry has the error, and the other lines are still parsed.

    Returns:
      rows: all entries, in order.
      array_error: the error if the file begins with "[" but is not one JSON array; its lines are then parsed one by
        one. Otherwise None.
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
