"""The programs of a step compile for TPUs, ahead of time, with their kernels. There need not be a TPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT, SCRIPTS

WITHOUT_KERNELS = {"rollout_weights", "compact", "update", "sft update"}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no libtpu: pip install -e '.[plan-tpu]' brings it")
@pytest.mark.parametrize("topology, mesh", [("v5e:2x2", "1 2 2"), ("v5p:2x2x1", "1 1 1"), ("v5p:2x2x1", "1 2 2")])
def test_every_program_compiles(topology, mesh, tmp_path):
    """As training runs them, in a process without this one's flags; `mesh` is data, fsdp, tensor."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"TPU_LOG_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "compile_for_tpu.py"), topology, *mesh.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    kernels = {row["program"]: row["kernels"] for row in map(json.loads, done.stdout.splitlines())}
    assert {"rollout_weights", "prefill", "advantages", "reference", "gradient", "update"} < set(kernels)
    assert {"sft gradient", "sft update"} < set(kernels) and any(name.startswith("decode") for name in kernels)
    assert {name for name, count in kernels.items() if not count} == WITHOUT_KERNELS
