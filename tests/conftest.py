"""Tests run on eight forced CPU devices, in fp32 at the highest matmul precision.

They compile many tiny programs and run each once or twice, so LLVM's optimisations are left out: half the time.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
)

import jax  # noqa: E402 (jax reads the environment when it is imported)

jax.config.update("jax_default_matmul_precision", "highest")
