"""What is set before a device is used: what the user has set stays."""

from __future__ import annotations

import os

import pytest

from r1vl_jax.parallel import devices


@pytest.fixture
def environment(monkeypatch):
    values = {}
    monkeypatch.setattr(os, "environ", values)
    return values


def test_defaults(environment):
    devices.prepare_devices()
    assert {name: value for name, value in environment.items() if "XLA" in name} == {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"
    }


def test_what_the_user_has_set_is_kept(environment):
    environment |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "XLA_FLAGS": "--xla_gpu_autotune_level=2"}
    devices.prepare_devices(deterministic=True)
    devices.prepare_devices(deterministic=True)
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert environment["XLA_FLAGS"] == "--xla_gpu_autotune_level=2 --xla_gpu_deterministic_ops=true"
    environment["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=false"
    devices.prepare_devices(deterministic=True)
    assert environment["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false"


@pytest.mark.parametrize(
    "choice, dtype, precision",
    [("auto", "float32", "highest"), ("auto", "bfloat16", "default"), ("high", "float32", "high")],
)
def test_precision(choice, dtype, precision):
    assert devices.matmul_precision(choice, dtype) == precision
