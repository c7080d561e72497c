"""Defines `Source`, random access to the usable `Example`s of a data set, and `JsonSource`, which reads a JSON file.

`JsonSource` keeps an index of the file in memory, not the rows. `open_source` opens the JSON file or the TFDS data set
that a section of the configuration names.

Flow: data (here) -> processing.

    file.json -> scan: each row and its position -> parse_row, drop_matching -> index of the examples -> source[i]
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np
from tqdm import tqdm

from r1vl_jax.common.text import shown
from r1vl_jax.config import SourceSection
from r1vl_jax.data.rows import parse_row
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example

CHUNK = 1 << 20  # bytes read at once
MAX_ROW = 256 << 20  # characters; in a longer "row" the closing bracket is missing


class Source(Protocol):
    """Random access to the usable rows of a data set. grain reads from it in threads and in worker processes.

    Attributes:
      name: path of the data set, for messages.
      fingerprint: a text that changes when the rows change.
      errors: a RowError for each row that is known to be unusable before any image is opened.
      filtered: number of rows left out by `drop_matching`.
    """

    name: str
    fingerprint: str
    errors: list[RowError]
    filtered: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def open_source(section: SourceSection) -> Source:
    """Opens the data set that a section of the configuration names. Raises RowError if it cannot be used."""
    if section.tfds:
        from r1vl_jax.data.tfds_source import TfdsSource  # needs tensorflow-datasets, which JSON does not

        return TfdsSource(
            section.tfds, data_dir=section.tfds_dir, split=section.split, drop_matching=section.drop_matching
        )
    return JsonSource(section.path, image_root=section.image_root, drop_matching=section.drop_matching)


def check_source(section: SourceSection) -> None:
    """Checks quickly that the data set exists and begins with rows. Raises RowError if not."""
    if section.tfds:
        open_source(section)
    else:
        next(_scan(section.path), None)


class JsonSource:
    """Reads rows from a JSON array or a JSONL file.

    The file is read once to check every row and to make an index with 24 bytes per example. Reading an example raises
    OSError if the file has changed since then.

    Args:
      path: a file with a JSON array, or with one JSON object per line. The keys of a row determine its schema.
      image_root: folder to which image paths are relative; None: the folder of `path`.
      drop_matching: rows with one of these texts in an answer are left out and counted in `filtered`.
    Raises: RowError if the file is missing, empty or not JSON.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        image_root: str | os.PathLike | None = None,
        drop_matching: tuple[str, ...] = (),
    ) -> None:
        self.name = os.fspath(path)
        self._path = os.path.abspath(self.name)
        self._root = os.path.abspath(os.path.dirname(self.name) if image_root is None else image_root)
        self.errors: list[RowError] = []
        self.filtered = 0
        _check_file(self.name)
        self._stamp = _stamp(os.stat(self._path))
        places = list(self._index(drop_matching))
        if not places and not self.errors and not self.filtered:
            raise RowError(f"{self.name}: empty; expected at least one row")
        kinds = {"start": "i8", "length": "i8", "number": "i4", "turn": "i4"}
        self._places = np.array(places, list(kinds.items()))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        start, length, number, turn = self._places[index].tolist()
        descriptor = self._file.fileno()
        if _stamp(os.fstat(descriptor)) != self._stamp:
            raise OSError(f"{self.name}: the file has changed since it was indexed; start again")
        return self._parse(json.loads(os.pread(descriptor, length, start)), number)[turn]

    def __getstate__(self) -> dict[str, Any]:
        """Returns all attributes but the open file, which cannot be pickled."""
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    @functools.cached_property
    def _file(self) -> BinaryIO:
        """The open file. Each process opens the file itself."""
        return open(self._path, "rb")  # noqa: SIM115 (open as long as the source exists)

    def _index(self, drop_matching: tuple[str, ...]) -> Iterator[tuple[int, int, int, int]]:
        """Yields (first byte, number of bytes, row number, turn) of each usable example.

        Adds unusable rows to `errors`, and counts the rows that `drop_matching` leaves out in `filtered`.
        """
        digest = hashlib.blake2b(digest_size=8)
        for number, start, length, row in _scan(self.name, digest.update):
            if isinstance(row, RowError):
                self.errors.append(row)
                continue
            try:
                examples = self._parse(row, number)
            except RowError as error:
                self.errors.append(error)
                continue
            if any(text in example.answer for text in drop_matching for example in examples):
                self.filtered += 1
                continue
            yield from ((start, length, number, turn) for turn in range(len(examples)))
        self.fingerprint = digest.hexdigest()

    def _parse(self, row: object, number: int) -> list[Example]:
        return parse_row(row, source=self.name, number=number, image_root=self._root)


def _check_file(path: str) -> None:
    """Raises RowError if `path` is not a file."""
    if not os.path.isfile(path):
        problem = "a folder" if os.path.isdir(path) else "no such file"
        raise RowError(f"{path}: {problem}; expected a JSON array or JSONL file")


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """Returns a file's size and time of change. If one of them differs later, the file has changed."""
    return status.st_size, status.st_mtime_ns


# (row number, first byte, bytes, the row's JSON value or a RowError that says why it cannot be read)
Row = tuple[int, int, int, object]


def _scan(path: str, on_bytes: Callable[[bytes], None] = lambda data: None) -> Iterator[Row]:
    """Yields the rows of a file, which is read once from start to end.

    Args:
      on_bytes: called with each block of bytes that is read.
    Raises: RowError if the file is neither a JSON array nor JSONL.
    """
    _check_file(path)
    with open(path, "rb") as file:
        begin = 3 if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(begin)
        head = file.read(CHUNK)
        while head.isspace():
            head = file.read(CHUNK)
        file.seek(begin)
        size, label = os.path.getsize(path), f"reading {os.path.basename(path)}"
        with tqdm(total=size, unit="B", unit_scale=True, desc=label, delay=2, leave=False) as bar:
            rows = _scan_array if head.lstrip().startswith(b"[") else _scan_lines
            for row in rows(file, path, begin, on_bytes):
                yield row
                bar.update(row[1] + row[2] - bar.n)


def _scan_lines(file: BinaryIO, path: str, at: int, on_bytes: Callable[[bytes], None]) -> Iterator[Row]:
    """Yields the rows of a JSONL file. A row's number is the number of its line. Only a line feed ends a line."""
    first = True
    for number, line in enumerate(file):
        on_bytes(line)
        if line.strip():
            problem, row = None, None
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 text ({error})"
            except (ValueError, RecursionError) as error:
                problem = f"not JSON ({error})"
            if first and not isinstance(row, dict):  # another kind of file, or one object over many lines
                problem = problem or f"not JSON of rows (line {number} holds {shown(row)})"
                raise RowError(f"{path}: {problem}; expected a JSON array, or one JSON object a line")
            yield number, at, len(line), RowError(f"{path}, row {number}: {problem}") if problem else row
            first = False
        at += len(line)


def _scan_array(file: BinaryIO, path: str, at: int, on_bytes: Callable[[bytes], None]) -> Iterator[Row]:
    """Yields the rows of a JSON array, parsed one by one."""
    text, number = _Window(file, at, on_bytes), 0

    def fail(problem: object) -> RowError:
        return RowError(f"{path}: not JSON ({problem}; row {number}, byte {text.at}); expected one array of objects")

    text.take_mark()  # the opening bracket
    if text.peek() == "]":
        text.take_mark()
    else:
        mark = ","
        while mark == ",":
            text.peek()
            try:
                start, row = text.at, text.take_value()
            except json.JSONDecodeError as error:
                raise fail(error.msg) from error  # without its position, which is relative to the window
            except (ValueError, RecursionError) as error:
                raise fail(error) from error
            yield number, start, text.at - start, row
            mark = text.take_mark()
            number += 1
        if mark != "]":
            raise fail(f"expected a comma or the closing bracket, found {mark!r}")
    if rest := text.peek():
        raise fail(f"expected nothing after the array, found {rest!r}")


class _Window:
    """The part of a file that is being parsed.

    Bytes that are not UTF-8 become lone surrogates, so only the row that contains such bytes is unusable.

    Attributes:
      at: current position in the file, in bytes.
    """

    def __init__(self, file: BinaryIO, at: int, on_bytes: Callable[[bytes], None]) -> None:
        self._file, self._on_bytes, self.at = file, on_bytes, at
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._place, self._complete = "", 0, False

    def _advance(self, place: int) -> None:
        """Moves to the index `place` of the text."""
        self.at += len(self._text[self._place : place].encode("utf-8", "surrogateescape"))
        self._place = place

    def _more(self) -> None:
        """Reads more of the file: at least as much as is left in the window, so that a long row is parsed few times."""
        rest = self._text[self._place :]
        data = self._file.read(max(CHUNK, len(rest)))
        self._on_bytes(data)
        self._complete = not data
        self._text, self._place = rest + self._decode(data, final=self._complete), 0

    def peek(self) -> str:
        """Moves to the next character that is not white space, and returns it; returns "" at the end of the file."""
        while True:
            place = self._place
            while place < len(self._text) and self._text[place] in " \t\r\n":
                place += 1
            self._advance(place)
            if place < len(self._text) or self._complete:
                return self._text[place : place + 1]
            self._more()

    def take_mark(self) -> str:
        """Returns the next character that is not white space, and moves past it."""
        mark = self.peek()
        self._advance(self._place + len(mark))
        return mark

    def take_value(self) -> object:
        """Returns the JSON value at the current position, and moves past it.

        Raises: ValueError or RecursionError if there is no valid value.
        """
        while True:
            try:
                value, end = self._parse(self._text, self._place)
            except ValueError:
                if self._complete or len(self._text) - self._place > MAX_ROW:
                    raise
            else:
                if end < len(self._text) or self._complete:  # else a number might continue in the unread part
                    self._advance(end)
                    return value
            self._more()
