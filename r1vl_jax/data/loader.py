"""From a source to batches of encoded rows, endlessly: shuffled, sharded by host, read ahead, and resumable.

Flow: source -> grain (order, host's share, threads or worker processes) -> encode -> rows that can be used -> make.

grain keeps the order whatever reads ahead, so that one number, the host's position in its endless order, fixes all
that follows, in how many worker processes ever.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import grain
from absl import flags

from r1vl_jax.data.sources import Source
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example

THREADS = 4  # of each process that reads rows; decoding and resizing images leave Python's lock
READ_AHEAD = 32  # rows, over all workers
SHARED_MEMORY = 512 << 20  # bytes that workers need: twice what is read ahead, at 4 MB a row, and a margin

Row = tuple[Example, Any]


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a loader stands.

    Attributes:
      rows: how many of its host's share have been read.
      dropped: the names of those that could not be used.
      fingerprint: that of the source, by which one that was changed is known.
    """

    rows: int = 0
    dropped: frozenset[str] = frozenset()
    fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"dropped": sorted(self.dropped)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Position:
        return cls(value["rows"], frozenset(value["dropped"]), value["fingerprint"])


def read_rows(
    source: Source,
    encode: Callable[[Example], Any],
    *,
    seed: int | None,
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator:
    """Rows as (name, (example, encoded) or the RowError that `encode` raised).

    Args:
      encode: runs in threads, or in worker processes, where it must pickle.
      seed: an endless order, in which each epoch has every row once; None: the rows once, as they lie.
      start: how many rows of this host's share are passed over.
      host, hosts: the share is every `hosts`-th row of the whole order, from `host` on.
      workers: processes; 0 reads in threads of this one.
    """
    data = grain.MapDataset.source(_Encoded(source, encode))
    if seed is not None:
        data = data.seed(seed).shuffle().repeat()
    ahead = max(1, READ_AHEAD // max(1, workers))
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=ahead)
    rows = data[host::hosts][start:].to_iter_dataset(options)
    if workers:
        _check_shared_memory()
        if not flags.FLAGS.is_parsed():  # grain reads a flag of its own, and r1vl_jax has no absl command line
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        rows = rows.mp_prefetch(processes, worker_init_fn=_end_with_parent)
    return iter(rows)


def _check_shared_memory() -> None:
    """Rows come from workers in shared memory; one that finds none dies of a signal, which says nothing."""
    if os.path.isdir("/dev/shm") and (free := shutil.disk_usage("/dev/shm").free) < SHARED_MEMORY:
        raise OSError(
            f"data.workers: {free >> 20} MB of shared memory (/dev/shm) are free, expected {SHARED_MEMORY >> 20}; give "
            "more (docker: --shm-size 2g), or set data.workers to 0"
        )


def _end_with_parent(index: int, count: int) -> None:
    """A worker ends with the process that it works for, if that is killed too, and not by a Ctrl-C of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A source whose rows are encoded; a row that cannot be is the error that says why."""

    source: Source
    encode: Callable[[Example], Any]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, Row | RowError]:
        name = f"{self.source.name}, example {index}"
        try:
            example = self.source[int(index)]
            name = example.name
            encoded = self.encode(example)
            return name, (dataclasses.replace(example, image_bytes=None), encoded)  # files are not needed any more
        except RowError as error:
            return name, error


class Loader:
    """Batches of usable rows, one of them made ahead in a thread.

    Args:
      source, encode, seed, host, hosts, workers: see `read_rows`.
      count: rows in a batch of this host.
      make: what becomes of a batch, in the thread: collation, say, and the way to the device.
      position: where to go on; a loader goes on as the one would have that `position` was taken from.
      on_drop: is told of each row that cannot be used, once.
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[Example], Any],
        *,
        count: int,
        seed: int,
        make: Callable[[list[Row]], Any] = lambda rows: rows,
        position: Position | None = None,
        host: int = 0,
        hosts: int = 1,
        workers: int = 0,
        on_drop: Callable[[RowError], None] = lambda error: None,
    ):
        self.position = position or Position()
        if self.position.rows and self.position.fingerprint != source.fingerprint:
            raise RowError(f"{source.name}: has changed since this run began; a run goes on with the same rows")
        self._source, self._count, self._make, self._on_drop = source, count, make, on_drop
        start = self.position.rows
        self._open = lambda: read_rows(source, encode, seed=seed, start=start, host=host, hosts=hosts, workers=workers)
        self._rows: Iterator | None = None
        self._closed = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: Future | None = None

    def take(self) -> Any:
        """The next batch, as `make` gave it. Raises RowError where a whole epoch has no usable row."""
        pending = self._next or self._thread.submit(self._read, self.position)
        made, self.position = pending.result()
        self._next = self._thread.submit(self._read, self.position)
        return made

    @property
    def dropped(self) -> int:
        """Rows that could not be used so far, those that could not be read among them."""
        return len(self._source.errors) + len(self.position.dropped)

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._rows is not None:
            self._rows.close()
        self._rows = self._next = None
        gc.collect()  # grain's iterators are cycles, and hold rows from workers in shared memory

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _read(self, position: Position) -> tuple[Any, Position]:
        if self._rows is None:
            self._rows = self._open()
        rows, seen, dropped, failures = [], position.rows, set(position.dropped), 0
        while len(rows) < self._count:
            if failures >= 2 * len(self._source):  # in a row, wherever an epoch starts: a whole one is among them
                raise RowError(f"no usable row among the {len(self._source)} that were read; see the messages above")
            if self._closed.is_set():  # nobody waits for this batch
                raise CancelledError
            name, row = next(self._rows)
            seen += 1
            if isinstance(row, RowError):
                failures += 1
                if name not in dropped:
                    dropped.add(name)
                    self._on_drop(row)
            else:
                failures = 0
                rows.append(row)
        return self._make(rows), Position(seen, frozenset(dropped), self._source.fingerprint)
