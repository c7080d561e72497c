"""Turns the signals that ask a run to end into an exception at a moment at which its state can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end.

    Attributes:
      signal: its number. The exit code of the command is 128 + this number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Signals:
    """A context manager in which the first of SIGNALS raises `Stopped`, and the second ends the process at once.

    Only the main thread of a process gets signals; elsewhere the context manager does nothing. A signal that is ignored
    stays ignored, as SIGHUP under nohup.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._held, self._pending = 0, 0

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._on_signal)
                for number in SIGNALS
                if signal.getsignal(number) is not signal.SIG_IGN
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        if self._held:
            self._pending = number
        else:
            raise Stopped(number)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """A block that a signal does not interrupt: `Stopped` is raised at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._pending:
            raise Stopped(self._pending)
