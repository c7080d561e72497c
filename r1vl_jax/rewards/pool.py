"""Scoring in worker processes, with a hard limit of time and memory for each answer.

A model in training writes text that no one has seen. math-verify hands it to SymPy, which can compute for minutes
(10^10^10^10), fill the memory, or die; its own time limits do not interrupt arithmetic that runs in C. So answers are
scored in processes that can be killed: a slow, failing or dying answer costs its own reward, and nothing else.

The workers import r1vl_jax.rewards only, and are started without fork and without the parent's main module, so the
pool is safe beside JAX. POSIX only.
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

from r1vl_jax.rewards.rules import Rules, get_rules
from r1vl_jax.rewards.scoring import Score, check_lengths

START_TIMEOUT_S = 120.0
AHEAD_BYTES = 16_384  # a message that waits in a worker's pipe must fit it: sending it may not block
MAX_FAILED_STARTS = 3  # in a row: one may be killed for memory in mid-run, three mean that none will start

Job = tuple[int, tuple]  # an answer's index, and what the worker is sent


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    conn: connection.Connection
    deadline: float  # time.monotonic() at which its start, or its answer, has taken too long
    ready: bool = False
    jobs: deque[Job] = dataclasses.field(default_factory=deque)  # the answer that it is scoring, and one that waits

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()  # leaves no zombie
        self.conn.close()
        self.ready = True  # nothing to wait for; a dead worker is replaced when next needed
        self.jobs.clear()


class ScorerPool:
    """Worker processes that score answers; use as a context manager.

    Args:
      workers: number of processes. They start at once and stay, so that the first call, not each, pays for imports.
      timeout_s: wall-clock seconds for one answer. The default leaves math-verify's own limits (5 s each for parsing
        the answer, parsing the solution and comparing them) the chance to end it with the key steps' reward kept.
      memory_gib: address space of a worker.
      function: "module:name" of the scorer; called as `score_answer` is.

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
    ):
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

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers, at once; the pool cannot be used again."""
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
        """The scores of N answers, in their order; see `score_answer` for the arguments.

        An answer that takes longer than the limit, raises, or ends its worker has 0 rewards and the status "timeout",
        "error" or "crash". `on_result` is called with each score as it arrives, in any order.

        Raises:
          ValueError: different lengths, or no preset has this name.
          RuntimeError: the pool is closed, or its workers cannot be started.
        """
        check_lengths(completions, solutions, key_steps)
        options = {"rules": get_rules(rules), "alpha": alpha}
        rows = zip(completions, solutions, key_steps, strict=True)
        jobs = deque((index, (row, options)) for index, row in enumerate(rows))
        with self._scoring:  # one call at a time: a second one would take the first one's replies
            return self._score(jobs, on_result)

    def _score(self, jobs: deque[Job], on_result: Callable[[Score], None] | None) -> list[Score]:
        scores: list[Score | None] = [None] * len(jobs)
        missing = len(jobs)
        try:
            while missing:
                if self._closed:
                    raise RuntimeError("the scorer pool is closed")
                for index, score in [*self._hand_out(jobs), *self._collect(jobs)]:
                    scores[index] = score
                    missing -= 1
                    if on_result is not None:
                        on_result(score)
        except BaseException as error:
            if self._closed and isinstance(error, OSError | ValueError):  # of a pipe that `close` took away
                raise RuntimeError("the scorer pool was closed while it scored") from error
            # The next call would take the replies that are still to come for its own.
            for worker in self._workers:
                if worker.jobs:
                    worker.kill()
            raise
        return scores

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        # As multiprocessing does: what the parent can import, its workers can.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # Threads of numerical libraries reserve address space by the number of cores, and nothing here uses them.
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
        return _Worker(process, ours, time.monotonic() + START_TIMEOUT_S)

    def _hand_out(self, jobs: deque[Job]) -> Iterator[tuple[int, Score]]:
        """Gives each idle worker an answer, and each busy one the next; yields the scores of those not to be sent."""
        for slot, worker in enumerate(self._workers):
            if jobs and worker.ready and not worker.jobs and worker.process.poll() is not None:
                worker.conn.close()
                self._workers[slot] = self._start()
        for waiting in (0, 1):
            for worker in self._workers:
                # The last answers are left to whoever is idle first.
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
        except OSError as error:
            yield from self._lose(
                worker, jobs, Score(status="crash", note=f"the worker died: {error}"), (index, message)
            )
        except Exception as error:  # whatever pickle says of the row: it belongs to this row alone
            yield index, Score(status="error", note=f"cannot be sent to a worker: {type(error).__name__}: {error}")
        else:
            worker.jobs.append((index, message))
            if len(worker.jobs) == 1:
                worker.deadline = time.monotonic() + self._timeout_s

    def _lose(self, worker: _Worker, jobs: deque[Job], score: Score, *unsent: Job) -> Iterator[tuple[int, Score]]:
        """Kills a worker: the answer that it was scoring gets this score, and what waited behind it another worker."""
        (index, _), *rest = [*worker.jobs, *unsent]
        worker.kill()
        jobs.extendleft(reversed(rest))
        yield index, score

    def _collect(self, jobs: deque[Job]) -> Iterator[tuple[int, Score]]:
        """Waits for the next message or the next deadline; yields the scores that are then known."""
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
            try:
                code = worker.process.wait(timeout=1)
            except subprocess.TimeoutExpired:  # it closed its pipe and lives
                worker.process.kill()
                code = worker.process.wait()
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
            raise RuntimeError(f"scorer processes do not start, the last one {how}; stderr says why")
