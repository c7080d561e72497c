"""Waiting for what must happen, and telling linear work from quadratic work, whatever else the machine does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

HANG_S = 600  # ends what would never end; nothing is expected to come near it

FACTOR = 16  # between the two sizes; quadratic work grows by its square
MARGIN = 3  # growth above FACTOR that noise, caches and logarithms may cause


def wait_until(happened: Callable[[], Any], still_possible: Callable[[], Any] = lambda: True) -> None:
    """Looks until something has happened that another process does and cannot tell of."""
    end = time.monotonic() + HANG_S
    while not happened():
        assert still_possible(), "it can no longer happen"
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.02)


def assert_linear(work: Callable[[Any], Any], make: Callable[[int], Any], size: int) -> Any:
    """Asserts that `work(make(size))` costs about FACTOR times the processor time of a FACTOR-th of the size.

    The best of several tries counts, so that a busy machine does not matter. Returns what the work returned.
    """
    small, large = make(size // FACTOR), make(size)
    unit = max(min(_cost(work, small)[0] for _ in range(3)), 1e-4)
    best = float("inf")
    for _ in range(5):
        seconds, result = _cost(work, large)
        best = min(best, seconds)
        if best <= MARGIN * FACTOR * unit:
            return result
    raise AssertionError(f"{FACTOR} times the size costs {best / unit:.0f} times as much")


def _cost(work: Callable[[Any], Any], argument: Any) -> tuple[float, Any]:
    """Processor seconds of this thread, and the result."""
    start = time.thread_time()
    result = work(argument)
    return time.thread_time() - start, result
