"""Sets what XLA must know before it uses a device (memory, repeatability), and chooses the precision of matmuls."""

from __future__ import annotations

import os

MEMORY_FRACTION = "0.92"  # of a GPU's memory, taken at the start; JAX's own default is 0.75
PRECISIONS = ("auto", "default", "high", "highest")


def prepare_devices(*, deterministic: bool = False) -> None:
    """Sets environment variables that XLA reads when a device is first used; later it has no effect.

    Values that the user has set are kept.

    Args:
      deterministic: XLA takes only operations that give the same bits every time. Without it, a GPU adds in any order
        where several threads add to one number, as in the gradient of an embedding and in cuDNN's backward pass.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def matmul_precision(choice: str, dtype: str) -> str:
    """Returns the value for jax.default_matmul_precision.

    Only matmuls of float32 arrays depend on it. By default a GPU rounds their inputs to TF32 (10 bits) and a TPU to
    bfloat16 (7 bits); who asks for float32 does not expect that.

    Args:
      choice: one of PRECISIONS; auto: highest for dtype float32, otherwise default.
    """
    return ("highest" if dtype == "float32" else "default") if choice == "auto" else choice
