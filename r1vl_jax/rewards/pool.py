"""Scores answers in worker processes, with hard time and memory limits for each answer.

A model in training writes text that nobody has checked. math-verify passes this text to SymPy, which can compute for
minutes (10^10^10^10), fill the memory, or crash. The time limits of math-verify do not interrupt arithmetic that runs
in C. So answers are scored in processes that can be killed: an answer that hangs, fails or crashes loses its own
reward, and the other answers are not affected.

The workers do not load JAX. They start without fork and without the parent's main module, so the pool is safe in a
process that runs JAX. The pool needs a POSIX system.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe, connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from r1vl_jax.errors import WorkerError
from r1vl_jax.rewards.rules import Rules, get_rules
from r1vl_jax.rewards.scoring import Score, check_lengths

START_TIMEOUT_S = 120.0
AHEAD_BYTES = 16_384  # size limit of a message to a busy worker: a larger one may not fit into the pipe and would block
MAX_FAILED_STARTS = 3  # in a row. One worker may be killed for lack of memory; after three the pool gives up

Job = tuple[int, tuple[Any, ...]]  # an answer's index, and the message for the worker


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    conn: connection.Connection
    deadline: float  # time.monotonic() at which the start of the worker, or its current answer, times out
    ready: bool = False
    jobs: deque[Job] = dataclasses.field(default_factory=deque)  # the answer being scored, then at most one that waits

    def kill(self) -> None:
        """Kills the process, closes its pipe and clears `jobs`."""
        self.process.kill()
        self.process.wait()  # without this a zombie process remains
        self.conn.close()
        self.ready = True  # so that the pool does not wait for its start; `_hand_out` replaces a dead worker
        self.jobs.clear()


class ScorerPool:
    """A pool of worker processes that score answers; use it as a context manager.

    Args:
      workers: number of processes. They start at once and stay until `close`, so each imports its modules only once.
      timeout_s: time limit of one answer, in wall-clock seconds. With the default, the limits of math-verify (5 s each
        to parse the answer, parse the solution and compare them) usually end first, and the key steps still pay.
      memory_gib: limit of a worker's address space, in GiB.
      function: "module:name" of the scorer, which takes the arguments of `score_answer`.

    Raises:
      ValueError: an argument is out of range.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 20.0,
        *,
        memory_gib: float = 4.0,
        function: str = "r1vl_jax.rewards.scoring:score_answer",
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected seconds above 0, got {timeout_s}")
        if not memory_gib > 0:
            raise ValueError(f"memory_gib: expected GiB above 0, got {memory_gib}")
        self._timeout_s = timeout_s
        self._arguments = [function, str(timeout_s), str(int(memory_gib * 2**30))]
        self._failed_starts = 0
        self._closed = False
        self._scoring = threading.Lock()
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ScorerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills all workers. The pool cannot be used again."""
        self._closed = True
        while self._workers:
            self._workers.pop().kill()

    def score(
        self,
        completions: Sequence[str],
        solutions: Sequence[str],
        key_steps: Sequence[Any],
        rules: str | Rules = "paper",
        alpha: float = 0.1,
        on_result: Callable[[Score], None] | None = None,
    ) -> list[Score]:
        """Returns the scores of N answers, in their order; `score_answer` describes the arguments.

        If an answer takes longer than the limit, raises an error or ends its worker, its rewards are 0 and its status
        is "timeout", "error" or "crash". `on_result` is called with each score when it arrives, in any order.

        Raises:
          ValueError: the lengths differ, or no preset has this name.
          RuntimeError: the pool is closed; WorkerError: its workers cannot be started.
        """
        check_lengths(completions, solutions, key_steps)
        options = {"rules": get_rules(rules), "alpha": alpha}
        rows = zip(completions, solutions, key_steps, strict=True)
        jobs = deque((index, (row, options)) for index, row in enumerate(rows))
        with self._scoring:  # one call at a time: a second call would receive the replies of the first
            return self._score(jobs, on_result)

    def _score(self, jobs: deque[Job], on_result: Callable[[Score], None] | None) -> list[Score]:
        scores: dict[int, Score] = {}
        count = len(jobs)
        try:
            while len(scores) < count:
                if self._closed:
                    raise RuntimeError("the scorer pool is closed")
                for index, score in [*self._hand_out(jobs), *self._collect(jobs)]:
                    scores[index] = score
                    if on_result is not None:
                        on_result(score)
        except BaseException as error:
            if self._closed and isinstance(error, OSError | ValueError):  # `close` closed the pipe
                raise RuntimeError("the scorer pool was closed while it scored") from error
            # Kills the busy workers: otherwise the next call would read their pending replies as its own.
            for worker in self._workers:
                if worker.jobs:
                    worker.kill()
            raise
        return [scores[index] for index in range(count)]

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        # As in multiprocessing, the workers can import all modules that the parent can import.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # Numerical libraries reserve address space for a thread per core, and the workers do not need these threads.
        environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "r1vl_jax.rewards.worker", str(theirs.fileno()), *self._arguments]
        with theirs:
            process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        # typeshed declares the Windows class for Pipe() if the checker does not know the platform.
        return _Worker(process, ours, deadline)  # pyright: ignore[reportArgumentType]

    def _hand_out(self, jobs: deque[Job]) -> Iterator[tuple[int, Score]]:
        """Sends an answer to each idle worker, then a waiting answer to each busy worker that has none.

        Yields (index, score) of each answer that fails because it cannot be sent.
        """
        for slot, worker in enumerate(self._workers):
            if jobs and worker.ready and not worker.jobs and worker.process.poll() is not None:
                worker.conn.close()
                self._workers[slot] = self._start()
        for waiting in (0, 1):
            for worker in self._workers:
                # If few answers are left, none is sent to a busy worker: the first idle worker takes the next one.
                if worker.ready and len(worker.jobs) == waiting and len(jobs) > waiting * len(self._workers):
                    yield from self._send(worker, jobs)

    def _send(self, worker: _Worker, jobs: deque[Job]) -> Iterator[tuple[int, Score]]:
        index, message = jobs.popleft()
        try:
            data = ForkingPickler.dumps(message)
            if worker.jobs and len(data) > AHEAD_BYTES:
                jobs.appendleft((index, message))
                return
            worker.conn.send_bytes(data)
        except OSError:  # the worker has died
            note = f"the worker ended with code {_exit_code(worker)}"
            yield from self._lose(worker, jobs, Score(status="crash", note=note), (index, message))
        except Exception as error:  # pickling may raise any error; only this answer fails
            yield index, Score(status="error", note=f"cannot be sent to a worker: {type(error).__name__}: {error}")
        else:
            worker.jobs.append((index, message))
            if len(worker.jobs) == 1:
                worker.deadline = time.monotonic() + self._timeout_s

    def _lose(self, worker: _Worker, jobs: deque[Job], score: Score, *unsent: Job) -> Iterator[tuple[int, Score]]:
        """Kills a worker. Yields `score` for the answer that the worker was scoring; if it scored none, for `unsent`.

        The other answers, waiting or unsent, go back to `jobs`.
        """
        (index, _), *rest = [*worker.jobs, *unsent]
        worker.kill()
        jobs.extendleft(reversed(rest))
        yield index, score

    def _collect(self, jobs: deque[Job]) -> Iterator[tuple[int, Score]]:
        """Waits for the next message or deadline. Yields (index, score) of each answer that was scored or failed."""
        watched = [worker for worker in self._workers if worker.jobs or not worker.ready]
        if not watched:
            return
        left = min(worker.deadline for worker in watched) - time.monotonic()
        readable = connection.wait([worker.conn for worker in watched], max(0.0, left))
        for worker in watched:
            if worker.conn in readable:
                yield from self._receive(worker, jobs)
            elif time.monotonic() >= worker.deadline:
                if worker.ready:
                    late = Score(status="timeout", note=f"took longer than {self._timeout_s:g} s")
                    yield from self._lose(worker, jobs, late)
                else:
                    worker.kill()
                    self._start_failed(f"took longer than {START_TIMEOUT_S:g} s")

    def _receive(self, worker: _Worker, jobs: deque[Job]) -> Iterator[tuple[int, Score]]:
        try:
            message = worker.conn.recv()
        except (EOFError, OSError):
            code = _exit_code(worker)
            if worker.ready:
                yield from self._lose(worker, jobs, Score(status="crash", note=f"the worker ended with code {code}"))
            else:
                worker.kill()
                self._start_failed(f"ended with code {code}")
            return
        if not worker.ready:
            worker.ready, self._failed_starts = True, 0
            return
        index, _ = worker.jobs.popleft()
        worker.deadline = time.monotonic() + self._timeout_s
        kind, value = message
        yield index, value if kind == "ok" else Score(status="error", note=value)

    def _start_failed(self, how: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise WorkerError(f"scorer processes do not start, the last one {how}; stderr says why")


def _exit_code(worker: _Worker) -> int:
    """Waits for a worker whose pipe is closed and returns its exit code; kills a worker that still runs."""
    try:
        return worker.process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        worker.process.kill()
        return worker.process.wait()
