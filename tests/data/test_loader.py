"""The loader: order, drops, hosts, worker processes, and that a resumed one goes on exactly where the first stood."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from itertools import islice
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest
from helpers.waiting import HANG_S, wait_until

from r1vl_jax.data.loader import Loader, Position, read_rows
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example


@dataclasses.dataclass
class Numbers:
    """A source of rows that are their numbers."""

    count: int = 7
    name: str = "file.json"
    fingerprint: str = "a"
    errors: tuple = ()
    filtered: int = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Example(self.name, index, (), "question", "answer")


def encode(example):
    return -example.row


def picky(example):
    if example.row in (2, 5):
        raise RowError(f"{example.name}: bad")
    return np.full((100, 50), example.row)


def loader(encode=encode, **options):
    return Loader(Numbers(), encode, **{"count": 1, "seed": 0, **options})


def numbers(batch):
    return [example.row for example, _ in batch]


def take(count, **options):
    """The numbers of `count` rows in a row."""
    with loader(**{"count": count, **options}) as rows:
        return numbers(rows.take())


def test_each_epoch_has_every_row_once_in_another_order():
    with loader(seed=0, make=lambda rows: rows, count=21) as rows:
        batch = rows.take()
    assert [encoded for _, encoded in batch] == [-row for row in numbers(batch)]
    epochs = [tuple(numbers(batch)[i : i + 7]) for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 3 and tuple(range(7)) not in epochs
    assert take(7, seed=1) != list(epochs[0])


def test_without_a_seed_rows_come_once_as_they_lie():
    rows = list(read_rows(Numbers(), picky, seed=None))
    assert [row if isinstance(row, RowError) else row[0].row for _, row in rows][:2] == [0, 1]
    assert [name for name, row in rows if isinstance(row, RowError)] == ["file.json, row 2", "file.json, row 5"]
    assert len(rows) == 7


@pytest.mark.parametrize("count", [1, 3, 9, 16])
def test_batches_cut_the_same_order(count):
    whole = take(48, seed=3)
    with loader(seed=3, count=count) as rows:
        assert sum((numbers(rows.take()) for _ in range(48 // count)), []) == whole[: 48 // count * count]


def test_bad_rows_are_dropped_named_and_counted():
    named = []
    on_drop = lambda error: named.append(str(error))  # noqa: E731
    with loader(encode=picky, count=11, on_drop=on_drop) as rows:
        assert rows.dropped == 0
        taken = numbers(rows.take())
        read, dropped = rows.position.rows, rows.position.dropped
        assert rows.dropped == len(dropped)
    seen = take(read, seed=0)
    assert taken == [row for row in seen if row not in (2, 5)]
    met = [row for row in seen if row in (2, 5)]
    assert len(met) > 2 and named == [f"file.json, row {row}: bad" for row in dict.fromkeys(met)]  # each once
    assert dropped == {"file.json, row 2", "file.json, row 5"}


def test_rows_that_could_not_be_read_count_too():
    source = Numbers(errors=(RowError("a"), RowError("b")))
    with Loader(source, encode, count=2, seed=0) as rows:
        rows.take()
        assert rows.dropped == 2


def refuse(example):
    raise RowError("bad")


def only_four(example):
    return encode(example) if example.row == 4 else refuse(example)


def test_no_usable_row_is_an_error():
    with loader(encode=refuse) as rows, pytest.raises(RowError, match="no usable row among the 7 that were read"):
        rows.take()
    # One usable row is enough, however often it has to be taken.
    assert take(3, encode=only_four) == [4, 4, 4]


def broken(example):
    raise ZeroDivisionError("a bug, not a bad row")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_are_not_swallowed(workers):
    with loader(encode=broken, workers=workers) as rows, pytest.raises(Exception, match="a bug"):
        rows.take()


def test_a_batch_is_made_ahead_in_another_thread():
    made, ready = [], threading.Semaphore(0)

    def make(rows):
        made.append(threading.current_thread())
        ready.release()
        return numbers(rows)

    with loader(make=make, count=2) as rows:
        first = rows.take()
        assert ready.acquire(timeout=HANG_S) and ready.acquire(timeout=HANG_S)  # the second without being asked for
        assert rows.position.rows == 2  # and is not counted before it is taken
        assert rows.take() != first and rows.position.rows == 4
    assert all(thread is not threading.current_thread() for thread in made)


# Resuming.


def stream(steps, *, position=None, **options):
    """(rows, hash of what they were encoded to, position behind them) of so many batches."""
    with Loader(Numbers(23), picky, count=4, seed=5, position=position, **options) as rows:
        found = []
        for _ in range(steps):
            batch = rows.take()
            digest = hashlib.sha256(b"".join(array.tobytes() for _, array in batch)).hexdigest()
            found.append((numbers(batch), digest, rows.position))
        return found


@pytest.mark.parametrize("host, hosts", [(0, 1), (0, 2), (1, 2)])
def test_resumed_after_any_step(host, hosts):
    """The rest is the same, over epochs, with rows dropped on the way, through JSON."""
    whole = stream(14, host=host, hosts=hosts)
    for step in range(14):
        position = Position.from_json(whole[step - 1][2].to_json()) if step else None
        assert stream(14 - step, position=position, host=host, hosts=hosts) == whole[step:]


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_change_nothing(workers):
    """Nor does another number of them after a resume."""
    whole = stream(14)
    assert stream(6, workers=workers) == whole[:6]
    assert stream(8, workers=workers, position=whole[5][2]) == whole[6:]


def test_a_source_that_was_changed_is_refused():
    with loader(count=3) as rows:
        rows.take()
        position = rows.position
    with pytest.raises(RowError, match="file.json: has changed since this run began"):
        Loader(Numbers(fingerprint="b"), encode, count=3, seed=0, position=position)


def test_hosts_share_the_order():
    """Two hosts with half a batch each read, together, what one reads: every row of an epoch once."""
    with Loader(Numbers(23), encode, count=4, seed=5) as rows:
        one = [numbers(rows.take()) for _ in range(12)]
    both = []
    for host in range(2):
        with Loader(Numbers(23), encode, count=2, seed=5, host=host, hosts=2) as rows:
            both.append([numbers(rows.take()) for _ in range(12)])
    assert [sorted(a + b) for a, b in zip(*both, strict=True)] == [sorted(batch) for batch in one]
    whole = [row for batch in zip(*both, strict=True) for a, b in zip(*batch, strict=True) for row in (a, b)]
    assert sorted(whole[:23]) == sorted(whole[23:46]) == list(range(23))


KILLED = """
import sys
sys.path[:0] = {paths!r}
from test_loader import Numbers, picky, numbers
from r1vl_jax.data.loader import Loader, Position
import hashlib, json, os, pathlib, signal

log = pathlib.Path({log!r})
done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
position = Position.from_json(done[-1]["state"]) if done else None
if __name__ == "__main__":
    with Loader(Numbers(23), picky, count=4, seed=5, position=position, workers={workers}, host=1, hosts=2) as rows:
        for step in range(len(done), 14):
            batch = rows.take()
            digest = hashlib.sha256(b"".join(array.tobytes() for _, array in batch)).hexdigest()
            with log.open("a") as file:
                file.write(json.dumps(dict(rows=numbers(batch), digest=digest, state=rows.position.to_json())) + "\\n")
            if step == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_processes_go_on(tmp_path, workers):
    """A process that is killed (SIGKILL) after a step, with batches and worker processes ahead of it."""
    script, log = tmp_path / "main.py", tmp_path / "log.jsonl"
    here = Path(__file__).parent
    script.write_text(KILLED.format(paths=[str(here), str(here.parent)], log=str(log), workers=workers))
    for last in (3, 4, 9):
        # The workers hold stderr open: reading it to its end waits until they are gone too.
        done = subprocess.run([sys.executable, script, str(last)], capture_output=True)
        assert done.returncode == -signal.SIGKILL
    assert subprocess.run([sys.executable, script, "-1"], capture_output=True).returncode == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    expected = stream(14, host=1, hosts=2)
    assert [(line["rows"], line["digest"]) for line in lines] == [(rows, digest) for rows, digest, _ in expected]


@dataclasses.dataclass
class Named:
    """Encodes as `picky`, in a process whose shared memory has names of its own: others use this machine too."""

    prefix: str

    def __call__(self, example):
        shared_memory._SHM_NAME_PREFIX = f"/{self.prefix}"
        return picky(example)

    def segments(self):
        return [name for name in os.listdir("/dev/shm") if name.startswith(self.prefix)]


def test_threads_processes_and_shared_memory_end():
    named = Named(f"ld{os.getpid():x}_")
    with loader(named, workers=1, count=4) as rows:
        rows.take()
        assert named.segments()
        processes = multiprocessing.active_children()
        assert processes
    for child in processes:
        child.join(HANG_S)
    assert not any(child.is_alive() for child in processes)
    wait_until(lambda: not named.segments())  # grain frees them in a thread of its own, a little later
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_closing_does_not_wait_for_a_batch():
    """Neither for one that is being read, nor through rows that cannot be used: a few rows pass, and not thousands."""
    for use in (encode, refuse):
        allowed, begun, passed = threading.Semaphore(0), threading.Semaphore(0), 0

        def one_by_one(example, use=use, allowed=allowed, begun=begun):
            begun.release()
            allowed.acquire()
            return use(example)

        rows = Loader(Numbers(20_000), one_by_one, count=20_000, seed=0)
        reader = threading.Thread(target=take_quietly, args=[rows])
        reader.start()
        for _ in range(100):
            allowed.release()
            assert begun.acquire(timeout=HANG_S)
        closing = threading.Thread(target=rows.close)
        closing.start()
        while closing.is_alive() and passed < 2000:
            allowed.release()
            passed += 1
            closing.join(0.01)
        allowed.release(10**6)  # for whatever still reads
        closing.join(HANG_S)
        reader.join(HANG_S)
        assert passed < 2000 and not reader.is_alive()


def take_quietly(rows):
    with contextlib.suppress(CancelledError, RowError):
        rows.take()


def test_workers_ask_for_shared_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    with pytest.raises(OSError, match="data.workers: 64 MB of shared memory .*docker: --shm-size 2g"):
        read_rows(Numbers(), encode, seed=0, workers=1)
    assert len(list(read_rows(Numbers(), encode, seed=None))) == 7


def test_reading_stops_where_it_is_not_needed():
    assert len(list(islice(read_rows(Numbers(3), encode, seed=0), 10))) == 10
