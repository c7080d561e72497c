"""Runs the speed stages of gpu_check.py: the workloads, torch, and `profile` (time per kernel)."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import shutil
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from bench_common import SIZES, single_device
from gpu_check_common import run_check, stage_arguments
from gpu_check_workloads import measure_workload, rollout_call

END_S = 12  # seconds of a stage's limit that are reserved for its start and its end
PROFILED_QUESTIONS, PROFILED_TOKENS = 16, 64
LARGEST_TRACE = 15_000_000  # bytes that are copied to --out


def torch_stage(args: argparse.Namespace, until: float) -> None:
    from torch_baseline import Baseline  # imported here, because the other stages run without torch

    baseline = Baseline(SIZES[args.size])
    half = (time.monotonic() + until) / 2
    run_check("torch rollout", lambda: baseline.rollout(args.repeats, half))
    run_check("torch step", lambda: baseline.step(args.repeats, until))


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Profiles a rollout of R1's questions with few tokens. Returns its time, and the time of each kernel by name."""
    size = SIZES[args.size]
    size = dataclasses.replace(size, new=min(PROFILED_TOKENS, size.new))
    folder = args.keep / "trace"
    shutil.rmtree(folder, ignore_errors=True)
    with jax.set_mesh(single_device()):
        rollout = rollout_call(size, PROFILED_QUESTIONS)
        rollout()  # compiles
        start = time.perf_counter()
        rollout()
        wall_s = time.perf_counter() - start
        with jax.profiler.trace(str(folder)):
            rollout()
    file = next(folder.rglob("*.xplane.pb"))
    if file.stat().st_size < LARGEST_TRACE:
        shutil.copy(file, args.out / "decode.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    events = cpu_events(planes) if args.cpu else gpu_events(planes)
    return {"wall_ms_a_token": 1e3 * wall_s / size.new, **by_kernel(events)}


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
    until = time.monotonic() + args.seconds - END_S
    if args.stage == "torch":
        jax.config.update("jax_platforms", "cpu")  # leaves the GPU's memory to torch
        torch_stage(args, until)
    elif args.stage == "profile":
        run_check("profile", partial(profile, args))
    else:
        run_check(args.stage, partial(measure_workload, args, until))


if __name__ == "__main__":
    main()
