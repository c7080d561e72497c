"""The memory that is planned for a CPU is that of a real run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

from r1vl_jax.checkpoint.folder import SUMS

HERE = Path(__file__).parent


def command(folder, *arguments):
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)  # what is freed goes back to the system, and is not kept for later
    env |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    command(folder, HERE / "memory_of_a_run.py", "make", folder)
    assert (folder / "model" / SUMS).exists()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "step_grpo"])
def test_planned_memory_is_that_of_a_run(folder, stage):
    """Within 15% of the peak of the process less what it had before it loaded weights; 2.2 GB of it are train state."""
    measured = json.loads(command(folder, HERE / "memory_of_a_run.py", "run", folder, stage).splitlines()[-1])
    config = ["--config", folder / "run.yaml", "--stages", f"[{stage}]", "--sft.max_answer_tokens", "64"]
    command(folder, "-m", "r1vl_jax.plan", *config, "--target", "cpu:1", "--prompt", "64", "--json", folder / "p.json")
    (plan,) = json.loads((folder / "p.json").read_text())
    assert plan["peak"] > 12 * 180e6
    print(f"{stage}: planned {plan['peak'] / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")
    assert abs(plan["peak"] / measured - 1) < 0.15
