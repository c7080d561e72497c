"""Defines `ParquetSource`, which reads rows from parquet files, often with the images inside, as on the Hub.

Opening reads the footers and, of conversations, the roles of the turns. A row is read when it is needed, with the row
group that it is in; the row groups that were read last are kept. So what is wrong with a row is found when it is read.

Flow: files -> number of examples -> index -> (file, row group, row) -> row group -> parse_row -> source[i]
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1vl_jax.common.text import one_line
from r1vl_jax.data.parquet_files import ParquetInfo, find_files, footer, read_info, stamp
from r1vl_jax.data.row_media import check_places
from r1vl_jax.data.rows import ROLES, parse_row, unread_notes
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example

KEPT = 32 << 20  # bytes of row groups that a process keeps; it always keeps the last one
ANSWERING = pa.array([role for role, kind in ROLES.items() if kind == "assistant"])


class ParquetSource:
    """Reads rows from a parquet file, or from the sorted files of a folder. A `Source`; instances can be pickled.

    Rows are numbered through all files. `errors` is empty and `filtered` is 0: reading a row that cannot be used, or
    that `drop_matching` leaves out, raises RowError. Reading raises OSError if a file has changed since it was opened.

    Args:
      path: a parquet file, or a folder of them; parquet_files.py says which of its files are read.
      split: the split of a folder of splits.
      image_root: folder to which paths of images and videos are relative; None: the folder of the files.
      allow_outside: images and videos may be outside of that folder. Otherwise reading such a row raises RowError.
      drop_matching: reading a row with one of these texts in an answer raises RowError.
      name: name of the data set in messages; None: `path`.
    Raises: RowError if there is no such file, or a file cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str = "train",
        image_root: str | os.PathLike | None = None,
        allow_outside: bool = False,
        drop_matching: tuple[str, ...] = (),
        name: str | None = None,
    ) -> None:
        self.name = name or os.fspath(path)
        self.errors: list[RowError] = []
        self.filtered = 0
        self._files = [read_info(file) for file in find_files(path, split)]
        self._root = os.path.abspath(os.path.dirname(self._files[0].path) if image_root is None else image_root)
        self._allow_outside, self._drop_matching = allow_outside, tuple(drop_matching)
        rows = [count for file in self._files for count in file.group_rows]
        self._groups = [(f, g) for f, file in enumerate(self._files) for g in range(len(file.group_rows))]
        self._group_start = np.cumsum([0, *rows])  # the number of the first row of each row group
        self._file_start = np.cumsum([0, *(sum(file.group_rows) for file in self._files)]).tolist()
        if not self._group_start[-1]:
            raise RowError(f"{self.name}: empty; expected at least one row")
        self._example_start = _example_start(self._files)
        digest = hashlib.blake2b(digest_size=8)
        for file in self._files:
            digest.update(file.digest)
        self.fingerprint = digest.hexdigest()
        self.notes = unread_notes(self.name, dict.fromkeys(key for file in self._files for key in file.unread))
        largest = max(size for file in self._files for size in file.group_bytes)
        if largest > KEPT:
            self.notes.append(
                f"{self.name}: row groups of {largest >> 20} MB, each read for every row of it; faster with row groups "
                "of 100 rows"
            )
        self._kept = _Kept(KEPT)

    def __len__(self) -> int:
        return int(self._group_start[-1] if self._example_start is None else self._example_start[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: no example {index}; there are {len(self)}")
        number, turn = index, 0
        if self._example_start is not None:
            number = int(np.searchsorted(self._example_start, index, "right")) - 1
            turn = index - int(self._example_start[number])
        place = int(np.searchsorted(self._group_start, number, "right")) - 1
        file = self._files[self._groups[place][0]]
        where = ""
        if len(self._files) > 1:  # the number of the row counts through all files; this names it in its own
            in_file = number - self._file_start[self._groups[place][0]]
            where = f"{os.path.basename(file.path)}, row {in_file}"
        if stamp(file.path) != file.stamp:
            raise OSError(f"{file.path}: the file has changed since it was opened; start again")
        try:
            table = self._kept.get(place, lambda: _read_group(file, self._groups[place][1]))
            (row,) = table.slice(number - int(self._group_start[place]), 1).to_pylist()
            example = self._parse(row, number)[turn]
            if not self._allow_outside:
                check_places(example, self._root)
        except RowError as error:
            if not where:
                raise
            raise RowError(f"{error} ({where})") from error
        if where and example.image_bytes is not None:
            return dataclasses.replace(example, images=tuple(f"{where}: {name}" for name in example.images))
        return example

    def _parse(self, row: dict[str, Any], number: int) -> list[Example]:
        """Returns the examples of a row. Raises RowError if it cannot be used, or is left out."""
        examples = parse_row(row, source=self.name, number=number, image_root=self._root)
        for text in self._drop_matching:
            if any(text in example.answer for example in examples):
                raise RowError(f"{examples[0].name}: left out by drop_matching ({text!r})")
        return examples


def _example_start(files: list[ParquetInfo]) -> np.ndarray | None:
    """Returns the number of each row's first example, and of all examples; None if every row is one example.

    A row has an example for each answer. A row without answers counts as one, so that reading it names what is wrong.
    """
    counts = [_answers(file) for file in files]
    if all(count is None for count in counts):
        return None
    rows = [np.ones(sum(file.group_rows), np.int64) for file in files]
    whole = np.concatenate([ones if count is None else count for ones, count in zip(rows, counts, strict=True)])
    return np.concatenate([[0], np.cumsum(np.maximum(whole, 1))])


def _answers(file: ParquetInfo) -> np.ndarray | None:
    """Returns the number of answers in each row of a file of conversations; None for questions."""
    if file.role is None:
        return None
    counts = []
    try:
        with pq.ParquetFile(file.path, metadata=footer(file.path, file.stamp)) as opened:
            for batch in opened.iter_batches(batch_size=10_000, columns=[file.role]):
                turns = batch.column(0)
                rows = pc.call_function("list_parent_indices", [turns]).to_numpy()
                roles = turns.flatten().field(0).cast(pa.string())
                answers = pc.call_function("is_in", [roles], pc.SetLookupOptions(ANSWERING))
                counts.append(np.bincount(rows[answers.to_numpy(zero_copy_only=False)], minlength=len(turns)))
    except (pa.ArrowException, OSError) as error:
        raise RowError(f"{file.path}, column {file.role}: cannot be read ({one_line(error)})") from error
    return np.concatenate(counts) if counts else np.zeros(0, np.int64)


def _read_group(file: ParquetInfo, group: int) -> pa.Table:
    """Reads the columns of a row group that rows are made of. Raises RowError if they are damaged."""
    try:
        with pq.ParquetFile(file.path, metadata=footer(file.path, file.stamp)) as opened:
            return opened.read_row_group(group, columns=[*file.columns], use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise RowError(f"{file.path}, row group {group}: cannot be read ({one_line(error)})") from error


class _Kept:
    """Keeps the tables that were used last, at most `limit` bytes of them but at least one. For several threads.

    A thread that asks for a table that another thread is reading waits for it. A copy in another process is empty.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._tables: dict[int, Future[pa.Table]] = {}  # the one that was used last at the end
        self._sizes: dict[int, int] = {}  # bytes of the tables that have been read

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return _Kept, (self._limit,)

    def get(self, key: int, read: Callable[[], pa.Table]) -> pa.Table:
        """Returns the table of `key`, and calls `read` to make it if it is not kept. Raises what `read` raises."""
        with self._lock:
            table = self._tables.pop(key, None)
            missing = table is None
            if table is None:
                table = Future()
            self._tables[key] = table
        if missing:
            try:
                table.set_result(read())
            except BaseException as error:
                table.set_exception(error)
            self._keep(key, table)
        return table.result()

    def _keep(self, key: int, table: Future[pa.Table]) -> None:
        """Keeps a table that has been read, and forgets those that were not used for longest; forgets a failure."""
        with self._lock:
            if table.exception():
                del self._tables[key]
                return
            self._sizes[key] = table.result().nbytes
            for other in [other for other in self._tables if other in self._sizes and other != key]:
                if sum(self._sizes.values()) <= self._limit:
                    break
                del self._tables[other], self._sizes[other]
