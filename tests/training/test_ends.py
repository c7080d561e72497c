"""A run that is asked to end, or that fails, saves its last finished step, and goes on from there bit for bit."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
from helpers.tiny_jax import read_lines, run_config, write_run_inputs
from test_resume import compiled_once, steps  # noqa: F401 (the fixture is used by being here)

from r1vl_jax.errors import ConfigError
from r1vl_jax.train import main
from r1vl_jax.training.run_folder import LOCK, RunLog
from r1vl_jax.training.signals import SIGNALS
from r1vl_jax.training.stage import Stage

# A user's reward function does what a test wants in the middle of step 3, once: the test names it in the environment.
EVENTS = """
import os, signal

def mine(completions, examples):
    calls = int(os.environ["R1VL_CALLS"])
    os.environ["R1VL_CALLS"] = str(calls + 1)
    if calls == int(os.environ.get("R1VL_WHEN", 2)):
        exec(os.environ.get("R1VL_EVENT", ""))
    return [len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run(inputs, tmp_path, monkeypatch):
    """Runs the command, with `event` in step 3 of StepGRPO. Returns the exit code."""
    (tmp_path / "events.py").write_text(EVENTS)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}  # nohup, for one, ignores SIGHUP
    monkeypatch.syspath_prepend(tmp_path)
    # A checkpoint after step 4 alone: what is there after step 3 was saved at the end.
    every = {"rl": {"rewards": ["events:mine"], "steps": 4, "questions_per_step": 2}, "checkpoint": {"every": 4}}

    def run(name, event="", *flags, **sections):
        sections = {key: every.get(key, {}) | sections.get(key, {}) for key in {*every, *sections}}
        run_config(inputs, tmp_path / name, stages=["step_grpo"], **sections)
        monkeypatch.setenv("R1VL_CALLS", "3" if "--resume" in flags else "0")
        monkeypatch.setenv("R1VL_EVENT", event)
        return main(["--config", str(tmp_path / f"{name}.yaml"), *flags])

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def weights(folder):
    return (folder / "export" / "model.safetensors").read_bytes()


def states(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints" / "step_grpo").glob("[0-9]*"))


def test_signals_save_the_last_finished_step(run, tmp_path, capsys):
    """Real signals, in the middle of a step. The handlers of before are there again afterwards."""
    assert run("straight") == 0
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        assert run(name, f"os.kill(os.getpid(), signal.{name})") == 128 + getattr(signal, name)
        assert states(tmp_path / name) == [2]
        error = capsys.readouterr().err
        assert f"stopped by {name}" in error and "step_grpo: saved after step 2; --resume goes on from there" in error
    assert run("SIGTERM", "", "--resume") == 0
    assert weights(tmp_path / "SIGTERM") == weights(tmp_path / "straight")
    rows = [read_lines(tmp_path / folder / "rollouts.jsonl") for folder in ("SIGTERM", "straight")]
    assert rows[0] == rows[1]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


def test_a_signal_during_an_update_waits_for_its_end(run, tmp_path, monkeypatch, capsys):
    """The state is never between two steps when it is saved."""
    whole, times = Stage.update, []

    def update(self, batches):
        times.append(len(times))
        if len(times) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, batches)

    monkeypatch.setattr(Stage, "update", update)
    assert run("run") == 143
    assert states(tmp_path / "run") == [3] and [row["step"] for row in steps(tmp_path / "run", "step_grpo")] == [
        1,
        2,
        3,
    ]
    assert "saved after step 3" in capsys.readouterr().err


def test_a_second_signal_ends_the_process_at_once():
    code = """
        import os, signal, sys
        from r1vl_jax.training.signals import Signals, Stopped
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with Signals() as signals:
                os.kill(os.getpid(), signal.SIGHUP)  # ignored from the start, as under nohup
                with signals.hold():
                    os.kill(os.getpid(), signal.SIGTERM)
                    print("held", flush=True)
        except Stopped as stopped:
            print(stopped, stopped.signal, flush=True)
        try:
            with Signals():
                os.kill(os.getpid(), signal.SIGINT)
        except Stopped:
            os.kill(os.getpid(), signal.SIGTERM)  # outside, the handlers of before are back
        print("not reached")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.split("\n")) == (-signal.SIGTERM, ["held", "stopped by SIGTERM 15", ""])
    again = code.partition("except Stopped as stopped")[0].replace(
        'print("held", flush=True)', "os.kill(os.getpid(), signal.SIGTERM)"
    )
    again = textwrap.dedent(again + "finally:\n            pass")
    ended = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM


def test_an_error_saves_the_last_finished_step(run, tmp_path, capsys):
    assert run("run", "raise ValueError('no such thing')") == 3
    assert states(tmp_path / "run") == [2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("error: reward 'events:mine'") and "no such thing" in lines[-2]
    assert lines[-1] == "step_grpo: saved after step 2; --resume goes on from there"


def test_an_error_before_the_first_step_is_wrong_input(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("R1VL_WHEN", "0")
    assert run("run", "raise ValueError('at once')") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: reward 'events:mine'")
    assert states(tmp_path / "run") == []


@pytest.mark.slow
def test_a_killed_reader_saves_the_last_finished_step(run, tmp_path, capsys):
    """The system kills processes for their memory."""
    event = "import multiprocessing\nfor child in multiprocessing.active_children(): os.kill(child.pid, signal.SIGKILL)"
    assert (
        run("run", event, data={"workers": 1}, rl={"steps": 60, "questions_per_step": 8}, checkpoint={"every": 99}) == 3
    )
    [step] = states(tmp_path / "run")
    error = capsys.readouterr().err
    assert step >= 2 and "error: a process that reads rows ended" in error and f"saved after step {step}" in error
    assert not multiprocessing.active_children()


def test_a_full_disk(run, tmp_path, capsys):
    """No file may grow beyond a limit: no log, and no checkpoint of step 3. What was saved before is untouched."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    event = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, {hard}))"
    try:
        code = run("run", event, checkpoint={"every": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 3 and states(tmp_path / "run") == [2]
    error = capsys.readouterr().err
    assert "File too large" in error and "step_grpo: saved after step 2" in error
    assert run("run", "", "--resume") == 0
    assert [row["step"] for row in steps(tmp_path / "run", "step_grpo")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_checkpoints_by_the_clock(run, tmp_path, monkeypatch):
    assert run("run", checkpoint={"minutes": 1e-9, "keep": 9}) == 0
    assert states(tmp_path / "run") == [1, 2, 3, 4]


def test_a_second_run_in_a_folder_is_refused(inputs, tmp_path):
    """Another process holds the lock; neither --resume nor --overwrite touches its folder."""
    config = run_config(inputs, tmp_path / "run")
    RunLog(config).metrics("sft", 1, {})
    code = f"""
        import fcntl, sys
        file = open({str(tmp_path / "run" / LOCK)!r}, "a+")
        fcntl.flock(file, fcntl.LOCK_EX)
        print("locked", flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError, match=r"output_dir: .*run is in use by process \d+ on .*; choose another"):
                RunLog(config, **flags)
        assert read_lines(tmp_path / "run" / "metrics.jsonl") == [{"stage": "sft", "step": 1}]
        other.stdin.close()
        other.wait()
    log = RunLog(config, overwrite=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(ConfigError, match="is in use by"):
        RunLog(config)
    log.close()
    RunLog(config, resume=True).close()


def test_a_file_system_without_locks(inputs, tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    RunLog(run_config(inputs, tmp_path / "run")).close()
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_damaged_lines_are_set_aside_and_named(inputs, tmp_path, capsys):
    config = run_config(inputs, tmp_path / "run")
    log = RunLog(config)
    rows = [{"stage": "sft", "step": step} for step in (1, 2, 3)]
    bad = [b"\x00\x00\n", b'{"stage": "sft"}\n', b"[1]\n", b'{"stage": "sft", "step": "2"}\n', b"[" * 10_000 + b"\n"]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    path = log.folder / "metrics.jsonl"
    path.write_bytes(b"".join([lines[0], *bad, lines[1], lines[2], b'{"stage": "sf']))
    log.truncate_after("sft", 2)
    assert read_lines(path) == rows[:2]
    assert (log.folder / "metrics.jsonl.damaged").read_bytes() == b"".join(bad)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0].rpartition(" ")[2] for line in said] == ["2", "3", "4", "5", "6"]
    assert said[0].endswith("metrics.jsonl, line 2: not a row; moved to metrics.jsonl.damaged")
