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
from helpers.paths import SCRIPTS

from r1vl_jax import config

FIGURES = {"value", "unit", "seconds", "min", "max", "repeats", "compile_s", "peak_gb", "card"}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def check(monkeypatch, tmp_path):
    """check(option, ..., first=source of a stage, ...) -> (exit code, rows); rows are those of gpu_check.json."""
    import gpu_check

    def run(*more: str, seconds: float = 60, budget: float = 600, **sources: str):
        stages = {}
        for name, source in sources.items():
            script = tmp_path / f"{name}.py"
            script.write_text(source)
            stages[name] = gpu_check.Stage(seconds, str(script))
        monkeypatch.setattr(gpu_check, "STAGES", stages)
        options = ["--out", str(tmp_path / "out"), "--keep", str(tmp_path / "keep"), "--budget", str(budget)]
        code = gpu_check.main([*options, "--stages", ",".join(stages), *more])
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
    assert parse_arguments(["--out", "x", "--cpu", "--budget", "0"]).budget == 0
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


def test_what_stages_are_told(check):
    """They read their arguments as gpu_check.py writes them."""
    source = "import gpu_check_common as c; a = c.stage_arguments()\n"
    source += "c.print_row(a.stage, size=a.size, repeats=a.repeats, micro=a.micro, remat=a.remat, cpu=a.cpu)"
    rows = check("--cpu", "--micro", "2", "--remat", "full", first=source)[1]
    told = {"size": "tiny", "repeats": 3, "micro": 2, "remat": "full", "cpu": True}
    assert rows[0] == {"stage": "first", "name": "first"} | told
    rows = check(first=source)[1]
    assert rows[0] == {"stage": "first", "name": "first"} | told | {
        "size": "2b", "micro": None, "remat": None, "cpu": False
    }  # fmt: skip


def test_remat():
    """The parent knows the choices of the configuration, which it cannot import on a bare machine."""
    from gpu_check_common import REMAT

    assert REMAT == config.REMAT


def test_a_check_that_raises(capsys):
    """Its row has the error's first line."""
    from gpu_check_common import MARK, run_check

    def fail():
        raise MemoryError("out of memory\nand more")

    run_check("T2", fail)
    row = json.loads(capsys.readouterr().out.removeprefix(MARK))
    assert row.pop("wall_s") >= 0 and row == {"name": "T2", "error": "MemoryError: out of memory"}


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


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("stage", ["R3", "S", "T1", "T2", "K", "torch"])
def test_speed_stages(stage, monkeypatch, capsys, tmp_path):
    """Every way to measure, at tiny size in this process. The table takes the rows as they are."""
    if stage == "torch":
        pytest.importorskip("torch")
    from gpu_check_common import MARK
    from gpu_check_speed import main
    from gpu_check_table import report

    options = ["--cpu", "--size", "tiny", "--repeats", "1", "--out", str(tmp_path), "--keep", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_check_speed.py", stage, *options])
    main()
    marked = [line for line in capsys.readouterr().out.splitlines() if line.startswith(MARK)]
    rows = {row["name"]: row for row in (json.loads(line.removeprefix(MARK)) for line in marked)}
    assert set(rows) == ({"torch rollout", "torch step"} if stage == "torch" else {stage})
    for row in rows.values():
        assert row.keys() >= FIGURES and row["value"] > 0 and row["repeats"] == 1 and row["card"] == "cpu", row
    if stage == "S":
        assert set(rows["S"]["phases"]) == {"rollout", "reference", "score", "update"}
    if stage in ("S", "T1"):
        assert (rows[stage]["micro"], rows[stage]["remat"]) == (1, "matmuls")
    lines = report({"size": "tiny", "date": "today", "rows": list(rows.values())}).splitlines()
    assert lines[0] == "tiny, cpu, today" and [line[:14].rstrip() for line in lines[3 : 3 + len(rows)]] == list(rows)


def test_micro_batches_fit_the_card():
    from gpu_check_workloads import micro_and_remat

    choices = {memory: micro_and_remat("2b", memory) for memory in (137, 77, 60, 0)}
    assert choices == {137: (4, "matmuls"), 77: (2, "matmuls"), 60: (4, "full"), 0: (4, "full")}
    assert micro_and_remat("7b", 137) == (4, "full")


def speed_row(name, value, unit, card, **more):
    times = {"seconds": 2.0, "min": 1.5, "max": 2.5, "repeats": 3, "compile_s": 9.0}
    return {"stage": name, "name": name, "value": value, "unit": unit, "card": card, "peak_gb": 66.6} | times | more


def test_table(tmp_path):
    """Floors and targets are those of the card and of the 2B; ratios are against torch in the same run."""
    from gpu_check_table import report

    def result(card, size="2b"):
        return {"size": size, "date": "2026-11-28", "rows": [
            {"stage": "R1", "name": "R1", "error": "MemoryError"},
            speed_row("R2", 60_000.0, "tokens/s", card, mfu=0.123),
            speed_row("R3", 50_000.0, "tokens/s", card, mfu=None),
            speed_row("S", 4.5, "s", card, micro=2, remat="matmuls", phases={"rollout": 3.0, "update": 1.5}),
            speed_row("T1", 2.5, "s", card, answers=64, micro=2, remat="matmuls"),
            speed_row("torch rollout", 160.0, "tokens/s", card),
            speed_row("torch step", 0.125, "s an answer", card),
            {"stage": "R2", "name": "process", "code": 0},
        ]}  # fmt: skip

    lines = report(result("NVIDIA H100 80GB HBM3")).splitlines()
    assert lines[0] == "2b, NVIDIA H100 80GB HBM3, 2026-11-28"
    cells = {line[:14].rstrip(): line[14:].split() for line in lines[3:9]}
    assert list(cells) == ["R2", "R3", "S", "T1", "torch rollout", "torch step"]
    expected = "60,000 tokens/s 80,000 56,000 2 (1.5 to 2.5) 3 12% 66.6 9.0"
    assert " ".join(cells["R2"]) == expected
    assert cells["R3"][2:4] == ["-", "54,000"] and cells["S"][2:4] == ["4", "5"]
    assert lines[10:] == [
        "S: micro-batches of 2 questions, remat matmuls",
        "S: rollout 3.00 s, update 1.50 s",
        "S: peak 66.6 GB (target: at most 70)",
        "T1: micro-batches of 2 questions, remat matmuls",
        "rollout, R2 against torch: 375.0x (target 10x)",
        "training step, T1 against torch: 3.2x (target 2.5x)",
    ]
    (tmp_path / "check.json").write_text(json.dumps(result("NVIDIA H200")))
    command = [sys.executable, str(SCRIPTS / "gpu_check_table.py"), str(tmp_path / "check.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == report(result("NVIDIA H200")) + "\n" and "114,000" in printed and "(target: " not in printed
    for unknown in (result("NVIDIA A100"), result("NVIDIA H100", size="7b")):
        assert "(target" not in report(unknown) and "80,000" not in report(unknown)
    assert report({"size": "2b", "date": "2026-11-28", "rows": [{"name": "process", "code": 0}]}) == ""


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
    assert "\ntorch step " in done.stdout
    assert {path.name for path in out.iterdir()} == {"gpu_check.json", "logs.txt", "decode.xplane.pb", "cache0.tar"}
