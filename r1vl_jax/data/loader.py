"""Makes an endless sequence of batches of encoded rows from a data set.

Rows are shuffled, divided among the hosts and read ahead, and reading can resume.

Flow: source -> grain (order, this host's shard, threads or worker processes) -> encode -> usable rows -> make.

grain returns the rows in the same order whatever the number of threads or worker processes. So the number of rows read
from this host's shard is enough to resume, even with another number of worker processes.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grain
from absl import flags

from r1vl_jax.common.text import one_line
from r1vl_jax.data.image_index import difference
from r1vl_jax.data.sources import Source
from r1vl_jax.errors import RowError, WorkerError
from r1vl_jax.types import Example

THREADS = 4  # in each process that reads rows; decoding and resizing images release Python's lock
READ_AHEAD = 32  # rows, over all workers
SHARED_MEMORY = 512 << 20  # bytes that worker processes need: 2 * READ_AHEAD rows of 4 MB, and a margin

Row = tuple[Example, Any]  # an example, and the result of `encode`


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a loader has read, which is all that is needed to resume.

    Attributes:
      rows: number of rows read from this host's shard, including rows that were dropped.
      dropped: names of the rows that could not be used.
      fingerprint: fingerprint of the data source. If it differs on resume, the data have changed.
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
    """Reads rows as (name, (example, encoded)), or as (name, RowError) if reading or `encode` raised a RowError.

    Args:
      encode: encodes an example. It is called in threads, or in worker processes, for which it is pickled.
      seed: seed of an endless shuffled order, in which each epoch has every row once. None: every row once, in the
        order of the source.
      start: number of rows of this host's shard to skip.
      host, hosts: this host's shard is every `hosts`-th row of the order, beginning with row number `host`.
      workers: number of worker processes that read; 0: threads of this process read.
    """
    data = grain.MapDataset.source(_Encoded(source, encode))
    if seed is not None:
        data = data.seed(seed).shuffle().repeat()
    ahead = max(1, READ_AHEAD // max(1, workers))
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=ahead)
    rows = data[host::hosts][start:].to_iter_dataset(options)
    if workers:
        _check_shared_memory()
        if not flags.FLAGS.is_parsed():  # grain reads an absl flag, and no command here parses absl's flags
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        rows = rows.mp_prefetch(processes, worker_init_fn=_end_with_parent)
    return iter(rows)


def _check_shared_memory() -> None:
    """Raises OSError if too little shared memory is free. A worker would be killed by a signal, without a message."""
    if os.path.isdir("/dev/shm") and (free := shutil.disk_usage("/dev/shm").free) < SHARED_MEMORY:
        raise OSError(
            f"data.workers: {free >> 20} MB of shared memory (/dev/shm) are free, expected {SHARED_MEMORY >> 20}; give "
            "more (docker: --shm-size 2g), or set data.workers to 0"
        )


def _end_with_parent(index: int, count: int) -> None:
    """Makes a worker process end with its parent, even if that is killed, and leave signals for all to the parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # grain calls this only in worker processes

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A sequence of a source's encoded rows. If a row cannot be used, its item is the RowError that says why."""

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
            return name, (dataclasses.replace(example, image_bytes=None), encoded)  # no longer needed
        except RowError as error:
            return name, error


class Loader:
    """Makes batches of usable rows. A thread makes the next batch while the caller uses the current one.

    Args:
      source, encode, seed, host, hosts, workers: see `read_rows`.
      count: rows per batch on this host.
      make: makes a batch from a list of rows. It runs in the thread, and may pad the rows and put them on the device.
      position: the `position` attribute of the loader to resume from; None: start at the beginning.
      on_drop: called with the error of each row that cannot be used, once per row.
    Raises: RowError if the source's fingerprint differs from that of `position`.
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
    ) -> None:
        self.position = position or Position()
        if self.position.rows and (what := difference(self.position.fingerprint, source.fingerprint)):
            raise RowError(
                f"{source.name}: has changed since this run began ({what}); a run continues on the same rows and images"
            )
        self._source, self._count, self._make, self._on_drop = source, count, make, on_drop
        start, self._workers = self.position.rows, workers
        self._open = lambda: read_rows(source, encode, seed=seed, start=start, host=host, hosts=hosts, workers=workers)
        self._rows: grain.DatasetIterator | None = None
        self._closed = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: Future | None = None

    def take(self) -> Any:
        """Returns the next batch, as returned by `make`. Raises RowError if a whole epoch has no usable row."""
        pending = self._next or self._thread.submit(self._read, self.position)
        batch, self.position = pending.result()
        self._next = self._thread.submit(self._read, self.position)
        return batch

    @property
    def dropped(self) -> int:
        """The number of rows that could not be used so far, including rows that the source could not read."""
        return len(self._source.errors) + len(self.position.dropped)

    def close(self) -> None:
        """Ends the thread and the worker processes."""
        self._closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._rows is not None:
            self._rows.close()
        self._rows = self._next = None
        gc.collect()  # frees the workers' shared memory, which grain's iterators keep in reference cycles

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, position: Position) -> tuple[Any, Position]:
        """Reads rows from `position` on and makes a batch of them. Returns the batch and the position after it."""
        if self._rows is None:
            self._rows = self._open()
        rows, count, dropped, failures = [], position.rows, set(position.dropped), 0
        while len(rows) < self._count:
            if failures >= 2 * len(self._source):  # a run of failures of that length contains a whole epoch
                raise RowError(f"no usable row among the {len(self._source)} that were read; see the messages above")
            if self._closed.is_set():  # `close` waits for this thread; the batch is not needed
                raise CancelledError
            try:
                name, row = next(self._rows)
            except RuntimeError as error:  # grain's, for a worker process that was killed, such as for its memory
                if not self._workers:
                    raise
                raise WorkerError(f"a process that reads rows ended ({one_line(error)}); see data.workers") from error
            count += 1
            if isinstance(row, RowError):
                failures += 1
                if name not in dropped:
                    dropped.add(name)
                    self._on_drop(row)
            else:
                failures = 0
                rows.append(row)
        return self._make(rows), Position(count, frozenset(dropped), self._source.fingerprint)
