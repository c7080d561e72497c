"""The GPU check: limits, rows and verdict, by stages of a few lines; all its own stages at tiny size (slow)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import ROOT

SCRIPTS = ROOT / "scripts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def check(monkeypatch, tmp_path):
    """check(seconds=, budget=, first=source of a stage, ...) -> (exit code, rows); rows are those of gpu_check.json."""
    import gpu_check

    def run(seconds: float = 60, budget: float = 600, **sources: str):
        stages = {}
        for name, source in sources.items():
            script = tmp_path / f"{name}.py"
            script.write_text(source)
            stages[name] = gpu_check.Stage(seconds, str(script))
        monkeypatch.setattr(gpu_check, "STAGES", stages)
        options = ["--out", str(tmp_path / "out"), "--keep", str(tmp_path / "keep"), "--budget", str(budget)]
        code = gpu_check.main([*options, "--stages", ",".join(stages)])
        result = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
        assert result["arguments"][:2] == options[:2]
        return code, result["rows"]

    return run


ROW = 'print(\'ROW {"name": "a", "ok": true}\', flush=True)\n'


def test_arguments(capsys):
    from gpu_check import STAGES, parse_arguments

    args = parse_arguments(["--out", "x"])
    assert (args.size, args.stages, args.out) == ("2b", list(STAGES), Path("x").resolve())
    args = parse_arguments(["--out", "x", "--cpu", "--stages", "R1,env"])
    assert (args.size, args.stages) == ("tiny", ["R1", "env"])
    assert parse_arguments(["--out", "x", "--cpu", "--size", "2b"]).size == "2b"
    with pytest.raises(SystemExit):
        parse_arguments(["--out", "x", "--stages", "env,R9,R8"])
    assert "no stage R9, R8; there are env, right, step" in capsys.readouterr().err


def test_every_stage_has_a_script():
    from gpu_check import STAGES

    assert all((SCRIPTS / stage.script).is_file() for stage in STAGES.values())


def test_environment(monkeypatch):
    from gpu_check import parse_arguments, stage_environment

    monkeypatch.setenv("XLA_FLAGS", "--a")
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.delenv("JAX_PLATFORMS")
    environment = stage_environment(parse_arguments(["--out", "x", "--flags=--b"]))
    assert environment["XLA_FLAGS"] == "--a --b" and environment["JAX_PLATFORMS"] == "cuda,cpu"
    assert environment["PYTHONPATH"].split(os.pathsep)[1:] == [str(SCRIPTS.parent / "kernels"), str(SCRIPTS), "mine"]
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert stage_environment(parse_arguments(["--out", "x", "--cpu"]))["JAX_PLATFORMS"] == "cpu"


def test_verdict(capsys):
    from gpu_check import print_verdict

    right = [{"stage": "a", "name": "b", "ok": True}, {"stage": "a", "name": "process", "code": 0}]
    assert print_verdict(right) == 0 and capsys.readouterr().out == "RIGHT\n"
    wrong = [{"stage": "a", "name": "c", "ok": False}, {"stage": "a", "name": "d", "error": "no"}]
    assert print_verdict([*right, *wrong]) == 1
    *rows, last = capsys.readouterr().out.splitlines()
    assert [json.loads(row.removeprefix("FAILS ")) for row in rows] == wrong and last == "WRONG: 2 of 4 rows fail"


def test_right(check, capsys, tmp_path):
    code, rows = check(one=ROW + "print('said')")
    assert code == 0 and capsys.readouterr().out.endswith("\nRIGHT\n")
    assert rows[0] == {"stage": "one", "name": "a", "ok": True}
    assert rows[1].pop("wall_s") >= 0 and rows[1] == {"stage": "one", "name": "process", "code": 0}
    assert rows[2:] == [{"stage": "pack", "name": "cache", "files": 0, "left_out": 0}]
    assert (tmp_path / "out" / "logs.txt").read_text().endswith("said\n")


def test_result_is_written_after_each_stage(check, tmp_path):
    """The second stage reads what the file holds when it starts."""
    second = f"print('ROW ' + open({str(tmp_path / 'out' / 'gpu_check.json')!r}).read().replace('\\n', ''))"
    _, rows = check(first=ROW, second=second)
    assert [row["stage"] for row in rows[2]["rows"]] == ["first", "first"]
    assert [row["stage"] for row in rows] == ["first", "first", "second", "second", "pack"]


def test_a_stage_that_fails(check):
    """Its rows count, the reason is in the last one, and the next stage runs."""
    code, rows = check(fails=ROW + "raise MemoryError('too large')", silent="", fine=ROW)
    assert code == 1
    assert [(row["name"], row.get("code"), "error" in row) for row in rows[:-1]] == [
        ("a", None, False), ("process", 1, True), ("process", 0, True), ("a", None, False), ("process", 0, False),
    ]  # fmt: skip
    assert rows[1]["error"].startswith("code 1, 1 rows: ") and rows[1]["error"].endswith("MemoryError: too large")
    assert rows[2]["error"] == "code 0, 0 rows: it printed nothing"


def test_a_stage_that_takes_too_long(check, capsys, tmp_path):
    """It is killed with the processes that it started; what it printed counts."""
    other = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    source = f"import subprocess, sys\n{ROW}subprocess.run([sys.executable, '-c', {other!r}])\n"
    code, rows = check(seconds=5, slow=source)
    assert code == 1 and rows[0] == {"stage": "slow", "name": "a", "ok": True}
    assert rows[1]["code"] is None and rows[1]["error"] == "killed: its limit of 5 s was up"
    child = int((tmp_path / "out" / "logs.txt").read_text().split()[-1])
    for _ in range(100):  # until init has waited for it
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {child} lives")


def test_no_time_left(check, tmp_path):
    code, rows = check(budget=0, one=f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert code == 1 and rows[0] == {"stage": "one", "name": "process", "error": "left out: 0 s were left"}
    assert not (tmp_path / "ran").exists()


def test_pack(monkeypatch, tmp_path):
    """Small files first; a file that is too large and what exceeds the number of parts are counted as left out."""
    import gpu_check

    monkeypatch.setattr(gpu_check, "PART_BYTES", 10)
    monkeypatch.setattr(gpu_check, "PARTS", 2)
    cache = tmp_path / "cache" / "deep"
    cache.mkdir(parents=True)
    for size in (1, 4, 5, 6, 7, 11):
        (cache / str(size)).write_bytes(bytes(size))
    (tmp_path / "cache9.tar").write_text("of an earlier call")
    row = gpu_check.pack_cache(tmp_path / "cache", tmp_path)
    assert row == {"stage": "pack", "name": "cache", "files": 4, "left_out": 2}
    names = {}
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            names[path.name] = tar.getnames()
    assert names == {"cache0.tar": ["deep/1", "deep/4", "deep/5"], "cache1.tar": ["deep/6"]}


def test_kernels_of_a_trace():
    from gpu_check_speed import by_kernel, cpu_events, gpu_events

    def line(name, *events):
        return SimpleNamespace(
            name=name,
            events=[SimpleNamespace(name=n, start_ns=s, duration_ns=d) for n, s, d in events],
        )

    planes = [
        SimpleNamespace(name="/host:CPU", lines=[line("tf_XLAEigen", ("add.2", 0, 5), ("end: add.2", 5, 1))]),
        SimpleNamespace(
            name="/device:GPU:0",
            lines=[line("Stream #1", ("gemm_3", 1e6, 2e6), ("gemm.17", 4e6, 1e6)), line("XLA Ops", ("all", 0, 9e6))],
        ),
    ]
    row = by_kernel(gpu_events(planes))
    assert row == {"events": 2, "busy_ms": 3.0, "span_ms": 4.0, "top_ms": {"gemm": 3.0}, "ok": True}
    assert by_kernel(cpu_events(planes))["top_ms"] == {"add": 0.0}
    assert by_kernel(gpu_events(planes[:1]))["ok"] is False


def test_what_right_judges():
    """A value or a gradient that is off or not finite fails."""
    from gpu_check_right import Setup, compare, distance

    setup = Setup("interpret", "xla", small=True)
    arrays = [setup.draw(3, 5, dtype="float32")]
    same = compare(setup, jnp.sin, jnp.sin, arrays, gradients=(0,), dtype="float32")
    assert same["ok"] and same["gradient_repeats"] and same["value_distance"] == same["gradient_distance"] == 0
    value = compare(setup, lambda x: jnp.sin(x) * 1.001, jnp.sin, arrays, dtype="float32")
    assert not value["ok"] and value["value_distance"] == pytest.approx(1e-3, rel=0.01)
    gradient = compare(setup, jnp.round, lambda x: jnp.round(x) + x * 1e-9, arrays, gradients=(0,), dtype="float32")
    assert not gradient["ok"] and gradient["value_distance"] < 1e-5 < gradient["gradient_distance"]
    assert distance({"a": np.array([1.0, math.nan])}, {"a": np.ones(2)}) == 9


def test_what_step_judges():
    from gpu_check_step import METRICS, WAYS, compare_runs, compare_with_cpu

    limits = WAYS["bfloat16"][1]
    names = ("tokens", "rollout_logprobs", "recomputed", "reference", "change")
    expected = {name: np.arange(1.0, 5.0) for name in names} | {name: np.float64(2) for name in METRICS}
    assert compare_runs(expected, expected, limits)["ok"] and compare_with_cpu(expected, expected, limits)["ok"]
    for name, value in (("loss0", np.float64(math.nan)), ("kl1", np.float64(2.1)), ("reference", np.ones(4)),
                        ("change", -expected["change"])):  # fmt: skip
        assert not compare_with_cpu(expected | {name: value}, expected, limits)["ok"], name
    assert not compare_runs(expected | {"recomputed": np.zeros(4)}, expected, limits)["ok"]
    assert not compare_runs(expected, expected | {"tokens": np.zeros(4)}, limits)["ok"]
    assert compare_runs(expected, expected | {"change": np.zeros(4)}, limits)["ok"]


@pytest.mark.slow
def test_every_stage_on_a_cpu(tmp_path):
    """All stages end with code 0 and the verdict is RIGHT; the cache is packed, the trace kept."""
    pytest.importorskip("torch")
    from gpu_check import STAGES

    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--cpu", "--repeats", "1", "--budget", "3000"]
    command += ["--out", str(out), "--keep", str(tmp_path / "keep")]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, as the check wants
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    print(done.stdout, done.stderr)
    rows = json.loads((out / "gpu_check.json").read_text())["rows"]
    codes = {row["stage"]: row["code"] for row in rows if row["name"] == "process"}
    assert codes == dict.fromkeys(STAGES, 0)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "RIGHT")
    assert {"R1", "torch rollout", "torch step", "loss head", "train", "profile"} <= {row["name"] for row in rows}
    assert {path.name for path in out.iterdir()} == {"gpu_check.json", "logs.txt", "decode.xplane.pb", "cache0.tar"}
