"""Runs in the worker processes of `ScorerPool`: receives answers over a pipe, and sends back each score.

The pool starts this module as `python -m r1vl_jax.rewards.worker FD FUNCTION TIMEOUT_S MEMORY_BYTES`; no module imports
it. The pool does not use multiprocessing's spawn, because spawn imports the parent's main module again, which loads JAX
in training.
"""

from __future__ import annotations

import importlib
import logging
import math
import resource
import signal
import sys
from multiprocessing.connection import Connection

from math_verify import parse
from math_verify.errors import TimeoutException

READY = "ready"


def main(fd: int, function: str, timeout_s: float, memory_bytes: int) -> None:
    """Scores answers until the pipe closes.

    Args:
      fd: file descriptor of the pipe to the parent.
      function: "module:name" of the scorer.
      timeout_s: time limit of one answer, in seconds. The limit of processor time is 5 to 6 s longer.
      memory_bytes: limit of the address space, in bytes.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they may reach all processes of a job
        signal.signal(number, signal.SIG_IGN)  # the parent ends this one
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it logs the whole text at every timeout
    module, _, name = function.partition(":")
    score = getattr(importlib.import_module(module), name)
    parse("$1$")  # math-verify compiles its regular expressions on first use; this must not count as an answer's time
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    conn = Connection(fd)
    conn.send(READY)
    while True:
        try:
            args, options = conn.recv()
        except EOFError:  # the parent closed the pool, or has ended
            return
        # The parent kills a slow worker. If the parent has ended, this limit makes the kernel kill it a little later.
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + timeout_s) + 5)
        try:
            reply = ("ok", score(*args, **options))
        except (Exception, TimeoutException) as error:  # TimeoutException is not an Exception
            reply = ("error", f"{type(error).__name__}: {error}"[:300])
        try:
            conn.send(reply)
        except Exception as error:  # a score that cannot be sent
            conn.send(("error", f"{type(error).__name__}: {error}"[:300]))


def _limit(kind: int, value: int) -> None:
    """Sets a soft resource limit; logs a warning if the system refuses it.

    The hard limit is not changed, so that the soft limit can be raised again.
    """
    _, hard = resource.getrlimit(kind)
    try:
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    except (ValueError, OSError) as error:  # macOS cannot limit the address space
        logging.getLogger(__name__).warning("no resource limit %s: %s", kind, error)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
