"""Waiting for what must happen, and telling linear work from quadratic work, whatever else the machine does."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

HANG_S = 600  # ends what would never end; nothing is expected to come near it

FACTOR = 16  # between the two sizes; quadratic work grows by its square
MARGIN = 4  # growth above FACTOR that noise, caches and logarithms may cause


def wait_until(happened: Callable[[], Any], still_possible: Callable[[], Any] = lambda: True) -> None:
    """Looks until something has happened that another process does and cannot tell of."""
    end = time.monotonic() + HANG_S
    while not happened():
        assert still_possible(), "it can no longer happen"
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.02)


def assert_linear(work: Callable[[Any], Any], make: Callable[[int], Any], size: int) -> None:
    """Asserts that `work(make(size))` costs about FACTOR times the processor time of a FACTOR-th of the size.

    The best of several tries counts, so that a busy machine does not matter. A smaller size is looked at first: where
    the work is quadratic, it shows sooner.
    """
    for large in (size // FACTOR, size):
        small, argument = make(large // FACTOR), make(large)
        limit = MARGIN * FACTOR * max(min(_cost(work, small) for _ in range(3)), 1e-4)
        best = float("inf")
        for _ in range(5):
            best = min(best, _cost(work, argument))
            if not limit < best < 4 * limit:  # no other try would change it
                break
        assert best <= limit, f"{FACTOR} times {large // FACTOR}: {best:.3} s of processor time, expected {limit:.3} s"


def _cost(work: Callable[[Any], Any], argument: Any) -> float:
    """Processor seconds of this thread; the garbage of the whole process is not its cost."""
    gc.disable()
    try:
        start = time.thread_time()
        work(argument)
        return time.thread_time() - start
    finally:
        gc.enable()
