"""Runs stage `env` of gpu_check.py: checks imports and the device, and times a matmul and a copy."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu_check_common import nvidia_smi, run_check, stage_arguments

PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-cublas", "numpy", "flax", "optax",
    "orbax-checkpoint", "transformers", "torch", "triton", "grain", "array_record", "portpicker", "math-verify",
    "latex2sympy2_extended", "antlr4-python3-runtime",
)  # fmt: skip
MODULES = (
    "r1vl_jax.train", "r1vl_jax.generate", "r1vl_jax.convert", "r1vl_jax.data.check", "r1vl_jax.rewards.worker",
    "gpu_check_workloads", "bench_kernels",
)  # fmt: skip


def versions() -> dict[str, Any]:
    result: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = None
    return {"versions": result}


def card() -> dict[str, Any]:
    return {"card": nvidia_smi("name,memory.total,driver_version,clocks.sm,clocks.mem")}


def imports() -> dict[str, Any]:
    """Returns the errors of the project's modules that cannot be imported."""
    failed = {}
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # a module may fail in any way
            failed[name] = f"{type(error).__name__}: {error}"
    return {"failed": failed, "ok": not failed}


def device(args: argparse.Namespace) -> dict[str, Any]:
    """Computes on the device. exp and erf are functions of libdevice, a file that XLA must find on the machine."""
    import jax
    import jax.numpy as jnp

    first = jax.devices()[0]
    value = float(jax.jit(lambda x: jnp.exp(jax.scipy.special.erf(x)))(jnp.float32(0.5)))
    right = abs(value - math.exp(math.erf(0.5))) < 1e-5
    wanted = "cpu" if args.cpu else "gpu"
    return {"kind": first.device_kind, "exp_erf": value, "ok": right and first.platform == wanted}


def ceilings(args: argparse.Namespace) -> dict[str, Any]:
    """Measures TFLOP/s of a bf16 matmul, and TB/s of reading and writing a large array."""
    import jax
    import jax.numpy as jnp

    width, elements = (256, 2**20) if args.size == "tiny" else (8192, 2**30)
    left, right = (jax.random.normal(jax.random.key(seed), (width, width), jnp.bfloat16) for seed in (0, 1))
    matmul = _seconds_a_call(partial(jax.jit(jnp.matmul), left, right), 20)
    array = jnp.zeros(elements, jnp.float32)
    copy = _seconds_a_call(partial(jax.jit(lambda x: x + 1), array), 10)
    return {"bf16_tflops": 2 * width**3 / matmul / 1e12, "copy_tb_per_s": 2 * array.nbytes / copy / 1e12}


def _seconds_a_call(call: Callable[[], Any], count: int) -> float:
    call().block_until_ready()  # compiles
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    result.block_until_ready()
    return (time.perf_counter() - start) / count


def main() -> None:
    args = stage_arguments()
    run_check("versions", versions)
    if not args.cpu:
        run_check("card", card)
    run_check("imports", imports)
    run_check("device", partial(device, args))
    run_check("ceilings", partial(ceilings, args))


if __name__ == "__main__":
    main()
