"""Notices image and video files that have changed: since a run began, and while it runs.

    rows -> paths -> size, times and digest of each file -> ImageIndex -> fingerprint; later: check(example)

The digests are kept in the user's cache folder. A file whose size and times are as they were is not read again. There
are two times: programs that copy files set the time of the last write back (mtime), but none can set that of the last
change (ctime).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from r1vl_jax.common.files import atomic_write, cache_folder, outside
from r1vl_jax.data.row_media import paths_of
from r1vl_jax.types import Example

THREADS = 16  # they wait for the disk most of the time
BATCH, PART = 1024, 64  # paths that are looked up together, and by one thread
SIZES = "sizes"  # begins the digest of images of which only sizes are compared

State = tuple[int, int, int, int]  # of a file: its size, its mtime and ctime in ns, and the digest of its bytes
ABSENT: State = (-1, 0, 0, 0)  # no regular file, or one that cannot be read


class ImageIndex:
    """What the files of a data set were when they were indexed. Instances can be pickled.

    Args:
      table: int64 (5, files): in each column the digest of a file's path, and its State; ascending. 40 bytes a file.
      digests: whether the bytes of files are compared, or only their sizes.
    """

    def __init__(self, table: np.ndarray, digests: bool) -> None:
        self.table, self._digests = table, digests

    def check(self, example: Example) -> None:
        """Raises OSError if a file of an example has changed."""
        for _, path in paths_of(example):
            key = _digest(os.fsencode(path))
            was = self.find(key)
            now = look(path, self._digests, was)
            if not _same(now, was):
                problem = "can no longer be read" if now == ABSENT else "has changed since it was indexed"
                raise OSError(f"{example.name}: {path}: the file {problem}; start again")
            if now != was:  # only a time: the file need not be read again
                self.table[1:, np.searchsorted(self.table[0], key)] = now

    def find(self, key: int) -> State | None:
        """Returns the state of the file whose path has the digest `key`; None if it is not in the index."""
        keys = self.table[0]
        place = int(np.searchsorted(keys, key))
        return tuple(self.table[1:, place].tolist()) if place < len(keys) and keys[place] == key else None


class Indexer:
    """Makes an ImageIndex.

    Args:
      name: what names the data set in the cache folder.
      root: files outside of this folder, links resolved, are not looked at; None: files may be anywhere.
      digests: False: only the sizes of files are kept, no file is read, and nothing is stored.
    Attributes:
      changed: the paths of files that are not as they were at the last start.
    """

    def __init__(self, name: str, *, root: str | None, digests: bool) -> None:
        self.changed: list[str] = []
        file = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
        self._cache = cache_folder() / "images" / file if digests else None
        self._root, self._digests = root, digests
        self._known = ImageIndex(_load(self._cache), digests)
        self._seen: set[int] = set()
        self._waiting: list[tuple[int, str]] = []
        self._tables: list[np.ndarray] = []
        self._outside = functools.lru_cache(outside)  # of folders, which many files share

    def add(self, example: Example) -> None:
        """Adds the files of an example. Once for each BATCH of files it waits until they are looked up."""
        for _, path in paths_of(example):
            key = _digest(os.fsencode(path))
            if key not in self._seen:
                self._seen.add(key)
                self._waiting.append((key, path))
        if len(self._waiting) >= BATCH:
            self._look_up()

    def finish(self) -> tuple[ImageIndex, str]:
        """Returns the index, and a digest of what all files hold, in the order of the rows; "" if there are none."""
        self._look_up()
        if not self._seen:
            return ImageIndex(np.empty((5, 0), np.int64), self._digests), ""
        files = np.concatenate(self._tables)
        contents = hashlib.blake2b(files[:, [1, 4]].tobytes(), digest_size=8).hexdigest()
        table = np.ascontiguousarray(files[np.argsort(files[:, 0])].T)
        if self._cache is not None and not np.array_equal(table, self._known.table):
            _store(self._cache, table)
        return ImageIndex(table, self._digests), contents if self._digests else SIZES + contents

    def _look_up(self) -> None:
        """Looks up the files that are waiting."""
        parts = [self._waiting[start : start + PART] for start in range(0, len(self._waiting), PART)]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="image-index") as pool:
            for files, changed in pool.map(self._look_up_part, parts):
                self._tables.append(np.array(files))
                self.changed += changed
        self._waiting = []

    def _look_up_part(self, part: list[tuple[int, str]]) -> tuple[list[tuple[int, ...]], list[str]]:
        """Returns columns of the table, and the paths of files that have changed since the last start."""
        files, changed = [], []
        for key, path in part:
            was = self._known.find(key)
            now = look(path, self._digests, was) if self._may_read(path) else ABSENT
            files.append((key, *now))
            if was is not None and not _same(was, now):
                changed.append(path)
        return files, changed

    def _may_read(self, path: str) -> bool:
        """Returns whether a file is in the folder, as row_media.check_places does."""
        if self._root is None:
            return True
        if os.path.islink(path):
            return not outside(path, self._root)
        return not self._outside(os.path.dirname(path), self._root)


def look(path: str, digests: bool, was: State | None) -> State:
    """Returns the state of a file. It is not read if its size and times are those of `was`, or without `digests`.

    Opens only regular files: a pipe would wait for a writer, and a device may do anything.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return ABSENT
        if was is not None and was[:3] == _stamp(status):
            return was
        if not digests:
            return *_stamp(status), 0
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())  # before reading: a file that is written meanwhile is read again
            if not stat.S_ISREG(status.st_mode):  # it was replaced just now
                return ABSENT
            digest = hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=8)).digest()
            return *_stamp(status), _number(digest)
    except OSError:
        return ABSENT


def difference(old: str, new: str) -> str:
    """Returns what differs between two fingerprints of a data set: its rows, its images, or image_digests; "": nothing.

    Train states of earlier versions have fingerprints of the rows alone. These are equal if the rows are.
    """
    old_rows, _, old_images = old.partition("-")
    rows, _, images = new.partition("-")
    if old_rows != rows:
        return "rows"
    if old_images in ("", images):
        return ""
    return "images" if old_images.startswith(SIZES) == images.startswith(SIZES) else "image_digests"


def _same(one: State | None, other: State | None) -> bool:
    """Returns whether two states have the same size and bytes."""
    return one is not None and other is not None and (one[0], one[3]) == (other[0], other[3])


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest(data: bytes) -> int:
    return _number(hashlib.blake2b(data, digest_size=8).digest())


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little", signed=True)


# A file of the cache: a digest of the table's bytes, then these.


def _load(path: Path | None) -> np.ndarray:
    """Returns the table in a file; an empty one if there is no such file, or it is damaged."""
    data = b""
    if path is not None:
        with contextlib.suppress(OSError):
            data = path.read_bytes()
    digest, table = data[:8], data[8:]
    whole = len(table) % 40 == 0 and hashlib.blake2b(table, digest_size=8).digest() == digest
    return np.frombuffer(table if whole else b"", np.int64).reshape(5, -1)


def _store(path: Path, table: np.ndarray) -> None:
    """Writes a table. Where that is not possible, the next start reads all files again."""
    data = table.tobytes()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.buffer.write(hashlib.blake2b(data, digest_size=8).digest() + data)
