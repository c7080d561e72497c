"""Kills a run at random moments, resumes it, and compares it bit for bit with a run that was not killed.

    straight run -> killed run: start, wait for the moment, SIGKILL, start again ... until it is complete -> comparison

Runs are processes of `python -m r1vl_jax.train`, so that a kill is real. A moment is a point of a run's progress that
its folder shows, such as a checkpoint that is being written, and a random delay.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from r1vl_jax.common.files import read_json_lines

# Metrics that depend on the machine and on where a process began, not on what is computed.
_NOT_COMPARED = ("seconds/", "tokens_per_second", "compilations")
_POLL_S = 0.005
Moment = Callable[[Path], bool]  # whether a run folder shows that the moment has come


def _exists(pattern: str) -> Moment:
    return lambda folder: any(folder.glob(pattern))


def _steps(number: int) -> Moment:
    """The moment at which a process has logged `number` rows."""
    seen: list[int] = []

    def reached(folder: Path) -> bool:
        try:
            rows = (folder / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            rows = 0
        seen.append(rows)
        return rows - min(seen) >= number  # resuming removes rows, so the smallest count is the start

    return reached


# Name -> the moment that is waited for, and the longest random delay after it in seconds.
MOMENTS: dict[str, tuple[Callable[[random.Random], Moment], float]] = {
    "at the start": (lambda rng: lambda folder: True, 15.0),
    "after some steps": (lambda rng: _steps(rng.randint(1, 4)), 1.0),
    "while a checkpoint is written": (lambda rng: _exists("checkpoints/*/*tmp*"), 0.05),
    "after a checkpoint": (lambda rng: _steps(2), 0.2),
    "while a model is exported": (lambda rng: _exists(".*.partial"), 0.03),
    "between the stages": (lambda rng: _exists("warmup/config.json"), 3.0),
}


@dataclasses.dataclass
class Proof:
    """The result: how often a run was killed at which moments, and how it differs from the straight run."""

    kills: dict[str, int] = dataclasses.field(default_factory=dict)
    starts: int = 0
    differences: list[str] = dataclasses.field(default_factory=list)

    @property
    def killed(self) -> int:
        """How often the run was killed."""
        return sum(self.kills.values())


def prove(
    arguments: Sequence[str], straight: Path, killed: Path, *, kills: int, seed: int, say: Callable[[str], None] = print
) -> Proof:
    """Kills a run up to `kills` times, completes it, and compares it with the straight run.

    Args:
      arguments: of `python -m r1vl_jax.train`, without output_dir.
      straight: folder of the run that is not killed; made here unless it is complete.
      killed: folder of the run that is killed; must not exist.
      seed: of the moments.
    Raises: RuntimeError, with the end of its output, if a run fails by itself.
    """
    rng, proof = random.Random(seed), Proof()
    if not (straight / "export" / "config.json").exists():
        say(f"{straight}: the straight run")
        _complete(arguments, straight)
    while proof.killed < kills:
        name = rng.choice(list(MOMENTS))
        make, delay = MOMENTS[name]
        proof.starts += 1
        if _killed(arguments, killed, make(rng), rng.uniform(0, delay)):
            proof.kills[name] = proof.kills.get(name, 0) + 1
            say(f"{killed}: kill {proof.killed} of {kills}, {name}")
        else:
            break  # it was complete before the moment came
    proof.starts += 1
    _complete(arguments, killed)
    proof.differences = list(differences(straight, killed))
    return proof


def _command(arguments: Sequence[str], folder: Path) -> list[str]:
    return [sys.executable, "-m", "r1vl_jax.train", *arguments, "--output_dir", str(folder), "--resume"]


def _complete(arguments: Sequence[str], folder: Path) -> None:
    done = subprocess.run(_command(arguments, folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder}: exit code {done.returncode}:\n{done.stdout[-3000:]}")


def _killed(arguments: Sequence[str], folder: Path, moment: Moment, delay: float) -> bool:
    """Starts the run and kills it `delay` seconds after the moment. Returns False if it ended before that."""
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(_command(arguments, folder), stdout=nowhere, stderr=nowhere, start_new_session=True)
    try:
        while process.poll() is None and not moment(folder):
            time.sleep(_POLL_S)
        deadline = time.monotonic() + delay
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if process.poll() is None:
            process.kill()
            return True
        if process.returncode:
            raise RuntimeError(f"{folder}: the run ended by itself with exit code {process.returncode}")
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def differences(straight: Path, killed: Path) -> Iterator[str]:
    """Yields what differs between two complete runs: files of the models, train states, metrics, answers."""
    for folder in ("warmup", "export"):
        names = {path.name for run in (straight, killed) for path in (run / folder).glob("*")}
        for name in sorted(names):
            paths = straight / folder / name, killed / folder / name
            if not all(path.exists() for path in paths) or paths[0].read_bytes() != paths[1].read_bytes():
                yield f"{folder}/{name}"
    for stage in sorted(path.name for path in (straight / "checkpoints").glob("*")):
        if _last_state(straight / "checkpoints" / stage) != _last_state(killed / "checkpoints" / stage):
            yield f"checkpoints/{stage}: the last train state"
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        ours, theirs = ([_compared(row) for row in read_json_lines(run / name)] for run in (straight, killed))
        if len(ours) != len(theirs):
            yield f"{name}: {len(ours)} and {len(theirs)} rows"
        for row, other in zip(ours, theirs, strict=False):
            if row != other:
                keys = sorted(key for key in row.keys() | other.keys() if row.get(key) != other.get(key))
                yield f"{name}: {row['stage']} step {row['step']}: {', '.join(keys)}"
                break


def _last_state(folder: Path) -> tuple[int, Any]:
    """Returns the step of a stage's last train state and what its host state says: checksums and position."""
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    return step, json.loads((folder / str(step) / "host" / "metadata").read_text())


def _compared(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(_NOT_COMPARED)}
