"""Defines `Source`, random access to the usable `Example`s of a data set, and `JsonSource`, which reads a JSON file.

`open_source` opens the JSON file, the parquet files, the Hub or the TFDS data set that a section of the configuration
names.
`JsonSource` keeps an index of the file in memory, not the rows.

Flow: data (here) -> processing.

    file.json -> scan: each row and its position -> parse_row, drop_matching -> index of the examples -> source[i]
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np

from r1vl_jax.common.text import first_few
from r1vl_jax.config import SourceSection
from r1vl_jax.data.image_index import Indexer
from r1vl_jax.data.json_file import check_file, scan
from r1vl_jax.data.row_media import check_places
from r1vl_jax.data.rows import parse_row, unread_keys, unread_notes
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example

HUB = "hub:"  # begins the name of a Hub data set


class Source(Protocol):
    """Random access to the usable rows of a data set. grain reads from it in threads and in worker processes.

    Attributes:
      name: path of the data set, for messages.
      fingerprint: a text that changes when the rows change; ROWS-IMAGES where images that change are noticed, too.
      errors: a RowError for each row that is known to be unusable before any image is opened.
      filtered: number of rows left out by `drop_matching`.
      notes: what else should be known about the data set, such as keys that are not read. One line each.
    """

    name: str
    fingerprint: str
    errors: list[RowError]
    filtered: int
    notes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def open_source(section: SourceSection, *, watch_images: bool = True) -> Source:
    """Opens the data set that a section of the configuration names. Raises RowError if it cannot be used.

    Args:
      watch_images: False: images of JSON files may change unnoticed, and are not read to notice it.
    """
    if section.tfds:
        from r1vl_jax.data.tfds_source import TfdsSource  # needs tensorflow-datasets, which JSON does not

        return TfdsSource(
            section.tfds, data_dir=section.tfds_dir, split=section.split, drop_matching=section.drop_matching
        )
    path, split, name = section.path, section.split, None
    if path.startswith(HUB):
        from r1vl_jax.data.hub import fetch

        path, split, name = os.fspath(fetch(path, split)), "train", f"{path}/{split}"
    options: dict[str, Any] = {"image_root": section.image_root, "drop_matching": section.drop_matching}
    options["allow_outside"] = section.allow_outside
    if _is_parquet(path):
        from r1vl_jax.data.parquet_source import ParquetSource  # pyarrow takes a while to import

        return ParquetSource(path, split=split, name=name, **options)
    return JsonSource(path, split=split, image_digests=section.image_digests if watch_images else None, **options)


def check_source(section: SourceSection) -> None:
    """Checks quickly that the data set exists and begins with rows. Raises RowError if not."""
    if section.tfds or section.path.startswith(HUB) or _is_parquet(section.path):
        open_source(section)
    else:
        next(scan(section.path, section.split), None)


def _is_parquet(path: str) -> bool:
    """Returns whether a path is a folder, or a file that is parquet by its name or its first bytes."""
    if not os.path.isfile(path):
        return os.path.isdir(path)
    with open(path, "rb") as file:
        return path.endswith(".parquet") or file.read(4) == b"PAR1"


class JsonSource:
    """Reads rows from a JSON array, a JSONL file, or an object of splits.

    The file is read once to check every row and to make an index with 24 bytes per example. Reading an example raises
    OSError if the file, or an image or a video of the example, has changed since then.

    Args:
      path: the file; json_file.py has its forms. The keys of a row determine its schema.
      split: the key of the rows in an object of splits.
      image_root: folder to which image paths are relative; None: the folder of `path`.
      allow_outside: images and videos may be outside of that folder. Otherwise reading such a row raises RowError.
      drop_matching: rows with one of these texts in an answer are left out and counted in `filtered`.
      image_digests: whether all bytes of images and videos are compared, to notice if they change (image_index.py), or
        only the sizes; None: they may change.
    Raises: RowError if the file is missing, empty or not JSON.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str = "train",
        image_root: str | os.PathLike | None = None,
        allow_outside: bool = False,
        drop_matching: tuple[str, ...] = (),
        image_digests: bool | None = None,
    ) -> None:
        self.name = os.fspath(path)
        self._allow_outside = allow_outside
        self._path = os.path.abspath(self.name)
        self._root = os.path.abspath(os.path.dirname(self.name) if image_root is None else image_root)
        self.errors: list[RowError] = []
        self.filtered = 0
        check_file(self.name)
        self._stamp = _stamp(os.stat(self._path))
        images, self._images = None, None
        if image_digests is not None:
            name, root = "\0".join((self._path, split, self._root)), None if allow_outside else self._root
            images = Indexer(name, root=root, digests=image_digests)
        places = list(self._index(split, drop_matching, images))
        if images is not None:
            self._images, contents = images.finish()
            self.fingerprint += f"-{contents}" if contents else ""
            if images.changed:
                changed = first_few([os.path.relpath(path, self._root) for path in images.changed])
                self.notes.append(f"{self.name}: images or videos that have changed since the last start: {changed}")
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
        text = os.pread(descriptor, length, start).decode("utf-8", "surrogateescape")  # as `scan` reads it
        example = self._parse(json.loads(text), number)[turn]
        if not self._allow_outside:
            check_places(example, self._root)
        if self._images is not None:
            self._images.check(example)
        return example

    def __getstate__(self) -> dict[str, Any]:
        """Returns all attributes but the open file, which cannot be pickled."""
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    @functools.cached_property
    def _file(self) -> BinaryIO:
        """The open file. Each process opens the file itself."""
        return open(self._path, "rb")  # noqa: SIM115 (open as long as the source exists)

    def _index(
        self, split: str, drop_matching: tuple[str, ...], images: Indexer | None
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yields (first byte, number of bytes, row number, turn) of each usable example.

        Adds its files to `images` and unusable rows to `errors`, and counts the rows that `drop_matching` leaves out in
        `filtered`.
        """
        digest = hashlib.blake2b(digest_size=8)
        unread: dict[str, None] = {}
        for number, start, length, row in scan(self.name, split, digest.update):
            if isinstance(row, RowError):
                self.errors.append(row)
                continue
            for key in unread_keys(row):
                unread[key] = None
            try:
                examples = self._parse(row, number)
            except RowError as error:
                self.errors.append(error)
                continue
            if any(text in example.answer for text in drop_matching for example in examples):
                self.filtered += 1
                continue
            if images is not None:
                images.add(examples[-1])  # the last turn has the files of all turns
            yield from ((start, length, number, turn) for turn in range(len(examples)))
        self.fingerprint = digest.hexdigest()
        self.notes = unread_notes(self.name, unread)

    def _parse(self, row: object, number: int) -> list[Example]:
        return parse_row(row, source=self.name, number=number, image_root=self._root)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """Returns a file's size and time of change. If one of them differs later, the file has changed."""
    return status.st_size, status.st_mtime_ns
