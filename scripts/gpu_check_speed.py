"""Runs the speed stages of gpu_check.py: workloads of bench_gpu.py, torch, and `profile` (time per kernel)."""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check_common import nvidia_smi, print_row, run_check, stage_arguments

HERE = Path(__file__).resolve().parent
LARGE_CARD_MIB = 100_000  # above it a micro-batch of 4 questions fits with remat matmuls, below it one of 2
END_S = 12  # seconds by which a worker's time is shorter than its stage's limit, so that it can end by itself
PROFILED_QUESTIONS, PROFILED_TOKENS = 16, 64
LARGEST_TRACE = 15_000_000  # bytes that are copied to --out


def bench(args: argparse.Namespace) -> None:
    """Runs one workload by the worker of bench_gpu.py or by torch_baseline.py, which print their rows as JSON."""
    options = ["--size", args.size, "--repeats", str(args.repeats), "--seconds", f"{max(1, args.seconds - END_S):.0f}"]
    if args.stage == "torch":
        command = [sys.executable, str(HERE / "torch_baseline.py"), *options]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
    else:
        command = [sys.executable, str(HERE / "bench_gpu.py"), *options, "--worker", args.stage]
        command += ["--micro", str(micro_batch(args)), "--remat", "matmuls"]
        env = dict(os.environ)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout or ():
            if line.startswith('{"name"'):
                print_row(**json.loads(line))
            else:
                print(line, end="", flush=True)
    if process.returncode:
        print_row(args.stage, error=f"{Path(command[1]).name} ended with code {process.returncode}")


def micro_batch(args: argparse.Namespace) -> int:
    """Returns the number of questions per gradient computation that fits the card's memory."""
    if args.cpu:
        return 1
    memory = int(nvidia_smi("memory.total", "nounits").split()[0])
    return 4 if memory > LARGE_CARD_MIB else 2


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Profiles a rollout of R1's questions with few tokens. Returns its time, and the time of each kernel by name."""
    import jax  # imported here, because the other stages leave the device to the process that they start
    from gpu_check_model import rollout_call

    rollout, tokens = rollout_call(args.size, PROFILED_QUESTIONS, PROFILED_TOKENS)
    rollout()  # compiles
    start = time.perf_counter()
    rollout()
    wall_s = time.perf_counter() - start
    folder = args.keep / "trace"
    shutil.rmtree(folder, ignore_errors=True)
    with jax.profiler.trace(str(folder)):
        rollout()
    file = next(folder.rglob("*.xplane.pb"))
    if file.stat().st_size < LARGEST_TRACE:
        shutil.copy(file, args.out / "decode.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    events = cpu_events(planes) if args.cpu else gpu_events(planes)
    return {"wall_ms_a_token": 1e3 * wall_s / tokens, **by_kernel(events)}


def gpu_events(planes: list[Any]) -> Iterator[Any]:
    """Yields kernels and copies on their streams. Skips lines of steps, modules and ops: they repeat the same time."""
    for plane in planes:
        for line in plane.lines if "GPU" in plane.name else ():
            if "XLA" not in line.name and "Steps" not in line.name:
                yield from line.events


def cpu_events(planes: list[Any]) -> Iterator[Any]:
    """Yields the operations that XLA's threads ran; a trace of a CPU has no GPU plane."""
    other = ("end: ", "ThreadpoolListener", "ThunkExecutor")
    for plane in planes:
        for line in plane.lines:
            if line.name.startswith("tf_XLA"):
                yield from (event for event in line.events if not event.name.startswith(other))


def by_kernel(events: Iterator[Any]) -> dict[str, Any]:
    """Sums the events of a trace by name without its number; keeps the 25 names that take longest."""
    busy, count, starts, ends = collections.Counter(), 0, [], []
    for event in events:
        busy[re.sub(r"[._]\d+", "", event.name)[:60]] += event.duration_ns
        starts.append(event.start_ns)
        ends.append(event.start_ns + event.duration_ns)
        count += 1
    span = max(ends, default=0) - min(starts, default=0)
    top = {name: round(duration / 1e6, 3) for name, duration in busy.most_common(25)}
    return {
        "events": count,
        "busy_ms": busy.total() / 1e6,
        "span_ms": span / 1e6,
        "top_ms": top,
        "ok": count > 0,
    }


def main() -> None:
    args = stage_arguments()
    if args.stage == "profile":
        run_check("profile", partial(profile, args))
    else:
        bench(args)


if __name__ == "__main__":
    main()
