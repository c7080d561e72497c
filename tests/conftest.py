"""Tests run on eight forced CPU devices, in fp32 at the highest matmul precision."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402 (jax reads the environment when it is imported)

jax.config.update("jax_default_matmul_precision", "highest")
