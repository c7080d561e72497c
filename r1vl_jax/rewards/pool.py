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
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe, connection
from typing import Any

from r1vl_jax.rewards.rules import Rules, get_rules
from r1vl_jax.rewards.scoring import Score, check_lengths

START_TIMEOUT_S = 120.0
MAX_FAILED_STARTS = 3  # in a row: one may be killed for memory in mid-run, three mean that none will start


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    conn: connection.Connection
    deadline: float  # time.monotonic() at which its start, or its answer, has taken too long
    ready: bool = False
    job: int | None = None  # the answer that it is scoring

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()  # leaves no zombie
        self.conn.close()
        self.ready, self.job = True, None  # nothing to wait for; a dead worker is replaced when next needed


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
        if not self._workers:
            raise RuntimeError("the scorer pool is closed")
        check_lengths(completions, solutions, key_steps)
        options = {"rules": get_rules(rules), "alpha": alpha}
        rows = zip(completions, solutions, key_steps, strict=True)
        jobs = deque((index, (row, options)) for index, row in enumerate(rows))
        scores: list[Score | None] = [None] * len(jobs)
        missing = len(jobs)
        try:
            while missing:
                for index, score in [*self._hand_out(jobs), *self._collect()]:
                    scores[index] = score
                    missing -= 1
                    if on_result is not None:
                        on_result(score)
        except BaseException:
            # The next call would take the replies that are still to come for its own.
            for worker in self._workers:
                if worker.job is not None:
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

    def _hand_out(self, jobs: deque) -> Iterator[tuple[int, Score]]:
        """Gives each idle worker an answer; yields the scores of those that could not be sent."""
        for slot, worker in enumerate(self._workers):
            if not jobs:
                return
            if worker.ready and worker.job is None and worker.process.poll() is not None:
                worker.conn.close()
                self._workers[slot] = worker = self._start()
            if not worker.ready or worker.job is not None:
                continue
            index, message = jobs.popleft()
            try:
                worker.conn.send(message)
            except OSError as error:
                worker.kill()
                yield index, Score(status="crash", note=f"the worker died: {error}")
            except Exception as error:  # whatever pickle says of the row: it belongs to this row alone
                yield index, Score(status="error", note=f"cannot be sent to a worker: {type(error).__name__}: {error}")
            else:
                worker.job, worker.deadline = index, time.monotonic() + self._timeout_s

    def _collect(self) -> Iterator[tuple[int, Score]]:
        """Waits for the next message or the next deadline; yields the scores that are then known."""
        watched = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        if not watched:
            return
        left = min(worker.deadline for worker in watched) - time.monotonic()
        readable = connection.wait([worker.conn for worker in watched], max(0.0, left))
        for worker in watched:
            if worker.conn in readable:
                yield from self._receive(worker)
            elif time.monotonic() >= worker.deadline:
                index, started = worker.job, worker.ready
                worker.kill()
                if not started:
                    self._start_failed(f"took longer than {START_TIMEOUT_S:g} s")
                    continue
                yield index, Score(status="timeout", note=f"took longer than {self._timeout_s:g} s")

    def _receive(self, worker: _Worker) -> Iterator[tuple[int, Score]]:
        try:
            message = worker.conn.recv()
        except (EOFError, OSError):
            index, started = worker.job, worker.ready
            worker.kill()
            code = worker.process.returncode
            if started:
                yield index, Score(status="crash", note=f"the worker ended with code {code}")
            else:
                self._start_failed(f"ended with code {code}")
            return
        if not worker.ready:
            worker.ready, self._failed_starts = True, 0
            return
        index, worker.job = worker.job, None
        kind, value = message
        yield index, value if kind == "ok" else Score(status="error", note=value)

    def _start_failed(self, how: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(f"scorer processes do not start, the last one {how}; stderr says why")
