"""Says how much memory a device has, and names what needed more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from r1vl_jax.common.text import one_line
from r1vl_jax.errors import DeviceMemoryError


@contextlib.contextmanager
def out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Raises DeviceMemoryError, with one line, if the block needs more memory than a device or the host has.

    Args:
      what: what the block does.
      advice: what needs less memory.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        new = DeviceMemoryError(f"{what}: too little memory ({one_line(error)}); {advice}")
        for note in getattr(error, "__notes__", []):
            new.add_note(note)
        raise new from error


def memory_limit(device: Any) -> int | None:
    """Returns the bytes that JAX may use on a device; None if the device does not say, as a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")
