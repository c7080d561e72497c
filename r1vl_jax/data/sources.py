"""Where rows come from: `Source` gives the i-th usable `Example` of a file, which is indexed and never held in memory.

Flow: data (here) -> processing. `open_source` takes a configuration's section to a JSON file or to a TFDS dataset.

    file.json -> scan: (bytes of row, row) -> parse_row, drop_matching -> index: where each example lies -> source[i]
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import numpy as np
from tqdm import tqdm

from r1vl_jax.config import SourceSection
from r1vl_jax.data.rows import parse_row, short
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example

CHUNK = 1 << 20  # bytes read at once
MAX_ROW = 256 << 20  # characters; what is longer is no row but a bracket that nothing closes


class Source(Protocol):
    """Random access to the usable rows of a data set; grain reads it, in worker processes too.

    Attributes:
      name: what messages call it: a path.
      errors: a RowError for each row that cannot be used, as far as that shows without opening images.
      filtered: rows left out by `drop_matching`.
      fingerprint: another one means that rows have changed.
    """

    name: str
    fingerprint: str
    errors: list[RowError]
    filtered: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def open_source(section: SourceSection) -> Source:
    """The source that a configuration names. Raises RowError where it has no usable row."""
    if section.tfds:
        from r1vl_jax.data.tfds_source import TfdsSource  # needs tensorflow-datasets, which JSON does not

        return TfdsSource(
            section.tfds, data_dir=section.tfds_dir, split=section.split, drop_matching=section.drop_matching
        )
    return JsonSource(section.path, image_root=section.image_root, drop_matching=section.drop_matching)


def check_source(section: SourceSection) -> None:
    """Looks at what takes no time: is it there, and does it begin like rows? Raises RowError."""
    if section.tfds:
        open_source(section)
    else:
        next(_scan(section.path), None)


class JsonSource:
    """A JSON array or JSONL file. Reading it once checks every row and leaves an index of 24 bytes an example.

    Args:
      path: a JSON array, or one JSON object a line. The schema is seen from each row's keys.
      image_root: the folder that image paths are relative to; None: the folder of `path`.
      drop_matching: rows with one of these texts in an answer are left out and counted in `filtered`.
    Raises: RowError if the file is missing, empty or not JSON: it has no usable row. Reading an example raises OSError
      where the file has changed since.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        image_root: str | os.PathLike | None = None,
        drop_matching: tuple[str, ...] = (),
    ):
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

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    @functools.cached_property
    def _file(self) -> BinaryIO:
        """The open file, one for each process."""
        return open(self._path, "rb")  # noqa: SIM115 (open as long as the source is)

    def _index(self, drop_matching: tuple[str, ...]) -> Iterator[tuple[int, int, int, int]]:
        """(start, length, row number, turn) of each usable example; bad rows go to `errors`."""
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
    if not os.path.isfile(path):
        problem = "a folder" if os.path.isdir(path) else "no such file"
        raise RowError(f"{path}: {problem}; expected a JSON array or JSONL file")


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


# A row as `_scan` finds it: its number, its first byte, how many bytes, and what it holds or why it cannot be read.
Row = tuple[int, int, int, object]


def _scan(path: str, see: Callable[[bytes], None] = lambda data: None) -> Iterator[Row]:
    """The rows of a file, read once from front to end; `see` gets its bytes.

    Raises RowError where it is no JSON array and no JSONL.
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
            for row in rows(file, path, begin, see):
                yield row
                bar.update(row[1] + row[2] - bar.n)


def _scan_lines(file: BinaryIO, path: str, at: int, see: Callable[[bytes], None]) -> Iterator[Row]:
    """JSONL: a row's number is its line's. Lines end with a line feed and with nothing else that Unicode has."""
    first = True
    for number, line in enumerate(file):
        see(line)
        if line.strip():
            problem, row = None, None
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 text ({error})"
            except (ValueError, RecursionError) as error:
                problem = f"not JSON ({error})"
            if first and not isinstance(row, dict):  # a table, a picture, an object over many lines
                problem = problem or f"not JSON of rows (line {number} holds {short(row)})"
                raise RowError(f"{path}: {problem}; expected a JSON array, or one JSON object a line")
            yield number, at, len(line), RowError(f"{path}, row {number}: {problem}") if problem else row
            first = False
        at += len(line)


def _scan_array(file: BinaryIO, path: str, at: int, see: Callable[[bytes], None]) -> Iterator[Row]:
    """A JSON array, parsed row by row."""
    text, number = _Window(file, at, see), 0

    def fail(problem: object) -> RowError:
        return RowError(f"{path}: not JSON ({problem}; row {number}, byte {text.at}); expected one array of objects")

    text.mark()  # the bracket
    if text.peek() == "]":
        text.mark()
    else:
        mark = ","
        while mark == ",":
            text.peek()
            try:
                start, row = text.at, text.value()
            except json.JSONDecodeError as error:
                raise fail(error.msg) from error  # without its place, which is one in the window
            except (ValueError, RecursionError) as error:
                raise fail(error) from error
            yield number, start, text.at - start, row
            mark = text.mark()
            number += 1
        if mark != "]":
            raise fail(f"expected a comma or the closing bracket, found {mark!r}")
    if rest := text.peek():
        raise fail(f"expected nothing behind the array, found {rest!r}")


class _Window:
    """The part of a file that is being parsed; `at` is the place in bytes, from the file's start.

    Bytes that are no UTF-8 become lone surrogates: the row that they stand in is refused, and no other.
    """

    def __init__(self, file: BinaryIO, at: int, see: Callable[[bytes], None]):
        self._file, self._see, self.at = file, see, at
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._place, self._complete = "", 0, False

    def _advance(self, place: int) -> None:
        self.at += len(self._text[self._place : place].encode("utf-8", "surrogateescape"))
        self._place = place

    def _more(self) -> None:
        """Reads on: at least as much again as there is, so that a long row is not parsed too often."""
        rest = self._text[self._place :]
        data = self._file.read(max(CHUNK, len(rest)))
        self._see(data)
        self._complete = not data
        self._text, self._place = rest + self._decode(data, final=self._complete), 0

    def peek(self) -> str:
        """Goes to the next character that is no white space and gives it; "" at the end of the file."""
        while True:
            place = self._place
            while place < len(self._text) and self._text[place] in " \t\r\n":
                place += 1
            self._advance(place)
            if place < len(self._text) or self._complete:
                return self._text[place : place + 1]
            self._more()

    def mark(self) -> str:
        """Takes the next character that is no white space."""
        mark = self.peek()
        self._advance(self._place + len(mark))
        return mark

    def value(self) -> object:
        """Takes the JSON value that stands here. Raises ValueError or RecursionError where none does."""
        while True:
            try:
                value, end = self._parse(self._text, self._place)
            except ValueError:
                if self._complete or len(self._text) - self._place > MAX_ROW:
                    raise
            else:
                if end < len(self._text) or self._complete:  # a number could go on behind what has been read
                    self._advance(end)
                    return value
            self._more()
