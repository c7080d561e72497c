"""The benchmarks run at toy size, in processes as users start them, and say what they should."""

import json
import subprocess
import sys

import pytest
from helpers.paths import SCRIPTS


def run(script: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / script), "--size", "tiny", "--repeats", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == code
    return done


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_flops(scripts):
    """The count of PERFORMANCE.md: TFLOP of a training step on a group, 2B and 7B."""
    from bench_common import SIZES, training_flops

    assert training_flops(SIZES["2b"], 1) / 1e12 == pytest.approx(75.6, abs=0.1)
    assert training_flops(SIZES["7b"], 1) / 1e12 == pytest.approx(293.9, abs=0.1)
    assert training_flops(SIZES["2b"], 16) == 16 * training_flops(SIZES["2b"], 1)


@pytest.mark.slow
def test_cpu(tmp_path):
    """Ours and torch agree before they are timed."""
    pytest.importorskip("torch")
    run("bench_cpu.py", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert max(found["differences"].values()) < 1e-4
    for row in found["workloads"].values():
        assert row["ratio"] == row[row["fastest"]]["seconds"] / row["ours"]["seconds"] > 0


@pytest.mark.parametrize("platform, attention", [("cuda", "xla"), ("tpu", "splash")])
def test_every_program_of_a_step_lowers(scripts, monkeypatch, platform, attention):
    """As scripts/hlo_report.py compiles them, short of compiling: with the kernels, for accelerators not there."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    import jax
    from bench_common import SIZES
    from bench_programs import step_calls
    from jax.sharding import AbstractDevice

    from r1vl_jax.parallel.sharding import make_mesh
    from r1vl_jax.planning.calls import device_bytes

    size, mesh = SIZES["tiny"], make_mesh(1, 2, 1, devices=jax.devices()[:2])
    cfg = size.cfg.with_backend(attention, "pallas")
    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")  # jax 0.11 wants to know which GPU
    target = mesh.abstract_mesh.update(abstract_device=h100) if platform == "cuda" else mesh.abstract_mesh
    lowered = {}
    for call in step_calls(cfg, size, mesh, questions=2, micro=2, remat="matmuls"):
        with jax.set_mesh(mesh), jax.sharding.use_abstract_mesh(target):
            lowered[call.name] = call.program.trace(*call.args).lower(lowering_platforms=(platform,)).as_text()
        assert sum(map(device_bytes, call.beside)) > 0
    call = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}[platform]
    with_kernels = {name for name, text in lowered.items() if call in text}
    expected = {"decode", "advantages", "gradient"} | ({"prefill", "reference"} if attention == "splash" else set())
    assert with_kernels == expected
    assert {"rollout_weights", "update"} < set(lowered)
