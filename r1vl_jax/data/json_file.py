"""Finds the rows of a JSON file, which is read once from start to end. The file has one of these forms:

[{...}, {...}]                           a JSON array
{...}\\n{...}\\n                           JSONL: one row a line
{"train": [{...}, ...], "test": [...]}   an object of splits
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from tqdm import tqdm

from r1vl_jax.common.text import first_few, shown
from r1vl_jax.data.rows import question_fields
from r1vl_jax.errors import RowError

CHUNK = 1 << 20  # bytes read at once
MAX_ROW = 256 << 20  # characters; in a longer "row" the closing bracket is missing
EXPECTED = "expected a JSON array, or one JSON object a line"

# (row number, first byte, bytes, the row's JSON value or a RowError that says why it cannot be read)
Row = tuple[int, int, int, object]


def scan(path: str, split: str = "train", on_bytes: Callable[[bytes], None] = lambda data: None) -> Iterator[Row]:
    """Yields the rows of a file.

    Args:
      split: the key of the rows in an object of splits. A file without splits has only "train".
      on_bytes: called with each block of bytes that is read.
    Raises: RowError if the file is missing, has another form, or has no such split.
    """
    check_file(path)
    with open(path, "rb") as file:
        begin, splits, array = _form(file, path)
        if split != "train" and not splits:
            raise RowError(f"{path}: one list of rows; expected an object with the split {split!r}, or the split train")
        size, label = os.path.getsize(path), f"reading {os.path.basename(path)}"
        with tqdm(total=size, unit="B", unit_scale=True, desc=label, delay=2, leave=False) as bar:
            if splits:
                on_bytes(split.encode())
                rows = _scan_splits(_Window(file, path, begin, on_bytes), split)
            else:
                rows = (_scan_array if array else _scan_lines)(file, path, begin, on_bytes)
            for row in rows:
                yield row
                bar.update(row[1] + row[2] - bar.n)


def check_file(path: str) -> None:
    """Raises RowError if `path` is not a file."""
    if not os.path.isfile(path):
        problem = "a folder" if os.path.isdir(path) else "no such file"
        raise RowError(f"{path}: {problem}; expected a JSON array or JSONL file")


def _form(file: BinaryIO, path: str) -> tuple[int, bool, bool]:
    """Returns the first byte after a byte-order mark, whether the file is an object of splits, and whether an array.

    Raises: RowError if the file is not UTF-8, or if its first object is over several lines and has no splits.
    """
    start = file.read(4)
    if (encoding := json.detect_encoding(start)) not in ("utf-8", "utf-8-sig"):
        name = encoding.upper()
        raise RowError(f"{path}: {name} text; expected UTF-8, as `iconv -f {name} -t UTF-8 FILE` writes it")
    begin = 3 if start.startswith(codecs.BOM_UTF8) else 0
    file.seek(begin)
    text = _Window(file, path, begin)
    mark, first = text.peek(), text.at
    splits = False
    if mark == "{":
        try:
            splits = _has_splits(text)
        except RowError:  # not JSON; _scan_lines says what is wrong with the first line
            text.at = first
        file.seek(first)
        if not splits and text.at > first + len(file.readline()):
            raise RowError(f"{path}: one object over several lines; {EXPECTED}, as `jq -c . FILE` writes them")
    file.seek(begin)
    return begin, splits, mark == "["


def _has_splits(text: _Window) -> bool:
    """Reads an object, and returns whether it is an object of splits: one of its values is a list of rows.

    Moves past the object if it is not. A row has other lists of objects (turns, images), but not of rows.
    """
    keys = {}
    mark = text.take_mark()  # the opening brace
    while mark in ("{", ","):
        if text.peek() == "}" and mark == "{":
            text.take_mark()
            break
        keys[_take_key(text)] = True
        if text.peek() == "[":
            rows = _scan_elements(text)
            _, _, _, first = next(rows, (0, 0, 0, None))
            if isinstance(first, dict) and question_fields(first) and not question_fields(keys):
                return True
            for _ in rows:
                pass
        else:
            text.take_value()
        mark = text.take_mark()
    return False


def _take_key(text: _Window) -> str:
    """Moves past a key of an object and the colon after it. Returns the key."""
    text.peek()
    key, mark = text.take_value(), text.take_mark()
    if not isinstance(key, str) or mark != ":":
        raise text.fail(f"expected a key and a colon, found {shown(key)} {mark}")
    return key


def _scan_splits(text: _Window, split: str) -> Iterator[Row]:
    """Yields the rows of one split of an object of splits."""
    keys = []
    mark = text.take_mark()  # the opening brace
    while mark in ("{", ","):
        keys.append(_take_key(text))
        if text.peek() == "[":
            for row in _scan_elements(text):
                if keys[-1] == split:
                    yield row
        elif keys[-1] == split:
            raise text.fail(f"{split} is no list")
        else:
            text.take_value()
        mark = text.take_mark()
    if mark != "}":
        raise text.fail(f"expected a comma or the closing brace, found {mark!r}")
    if rest := text.peek():
        raise text.fail(f"expected nothing after the object, found {rest!r}")
    if split not in keys:
        raise RowError(f"{text.path}: an object with the keys {first_few(keys)}; expected the split {split!r}")


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
            if first and not isinstance(row, dict):  # another kind of file
                problem = problem or f"not JSON of rows (line {number} holds {shown(row)})"
                raise RowError(f"{path}: {problem}; {EXPECTED}")
            yield number, at, len(line), RowError(f"{path}, row {number}: {problem}") if problem else row
            first = False
        at += len(line)


def _scan_array(file: BinaryIO, path: str, at: int, on_bytes: Callable[[bytes], None]) -> Iterator[Row]:
    """Yields the rows of a file that is one JSON array."""
    text = _Window(file, path, at, on_bytes)
    text.peek()
    yield from _scan_elements(text)
    if rest := text.peek():
        raise text.fail(f"expected nothing after the array, found {rest!r}")


def _scan_elements(text: _Window) -> Iterator[Row]:
    """Yields the elements of the array that begins at the current position, parsed one by one."""
    text.row = 0
    text.take_mark()  # the opening bracket
    if text.peek() == "]":
        text.take_mark()
        return
    mark = ","
    while mark == ",":
        text.peek()
        start, row = text.at, text.take_value()
        yield text.row, start, text.at - start, row
        mark = text.take_mark()
        text.row += 1
    if mark != "]":
        raise text.fail(f"expected a comma or the closing bracket, found {mark!r}")


class _Window:
    """The part of a file that is being parsed.

    Bytes that are not UTF-8 become lone surrogates, so only the row that contains such bytes is unusable.

    Attributes:
      path: path of the file, for messages.
      at: current position in the file, in bytes.
      row: number of the current row, for messages.
    """

    def __init__(
        self, file: BinaryIO, path: str, at: int, on_bytes: Callable[[bytes], None] = lambda data: None
    ) -> None:
        self._file, self._on_bytes = file, on_bytes
        self.path, self.at, self.row = path, at, 0
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._place, self._complete = "", 0, False

    def fail(self, problem: object) -> RowError:
        """Returns an error that names the file and the current position."""
        return RowError(
            f"{self.path}: not JSON ({problem}; row {self.row}, byte {self.at}); expected one array of objects"
        )

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
        """Returns the JSON value at the current position, and moves past it. Raises RowError if it is not valid."""
        while True:
            try:
                value, end = self._parse(self._text, self._place)
            except ValueError as error:
                if self._complete or len(self._text) - self._place > MAX_ROW:
                    # Without its position, which is relative to the window.
                    raise self.fail(error.msg if isinstance(error, json.JSONDecodeError) else error) from error
            except RecursionError as error:
                raise self.fail(error) from error
            else:
                if end < len(self._text) or self._complete:  # else a number might continue in the unread part
                    self._advance(end)
                    return value
            self._more()
