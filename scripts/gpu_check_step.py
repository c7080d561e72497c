"""Runs stages `step` and `train` of gpu_check.py: a small StepGRPO step compared with the CPU, and a training run.

`step` runs rollout, reference and two updates in fp32 at highest precision (as the command runs it), in fp32 at the
device's default precision, and in bfloat16, each twice. A second process runs the same step on this machine's CPU in
fp32. With --cpu the CPU's step runs twice and is compared with itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpu_check_common import print_row, run_check, stage_arguments
from gpu_check_model import Way, step

ROOT = Path(__file__).resolve().parent.parent


class Limits(NamedTuple):
    """Limits on the largest difference between log-probabilities, and on relative differences of metrics and change."""

    logprob: float
    metric: float
    change: float


CPU_WAY = Way("float32", "xla", "reference", "highest")
# The first is almost exact, the second may use TF32. On a CPU bfloat16 gave 0.03, 0.002 (0.014 if tiny) and 0.16.
WAYS = {
    "fp32, highest": (Way("float32", "xla", "pallas", "highest"), Limits(1e-3, 1e-3, 0.05)),
    "fp32, default": (Way("float32", "xla", "pallas", None), Limits(0.02, 0.01, 0.15)),
    "bfloat16": (Way("bfloat16", "cudnn", "pallas", None), Limits(0.1, 0.05, 0.3)),
}
METRICS = ("loss0", "kl0", "entropy0", "grad_norm0", "loss1", "kl1", "entropy1", "grad_norm1")
REPEATABLE = ("tokens", "rollout_logprobs", "recomputed", "reference")  # must be equal bit for bit in a second run

TRAINING = {
    "shapes.sft_rows": 200,
    "shapes.rl_rows": 60,
    "shapes.heldout_rows": 20,
    "data.pad_multiple": 64,  # one shape in each stage: little to compile
    "sft.steps": 4,
    "sft.batch_size": 16,
    "rl.steps": 2,
    "rl.questions_per_step": 4,
    "rl.micro_batch_size": 4,
    "rl.group_size": 4,
    "rl.max_new_tokens": 32,
    "eval.rows": 0,
}

Arrays = dict[str, np.ndarray]


def largest_difference(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(result.astype(np.float64) - expected).max())


def relative(result: np.ndarray, expected: np.ndarray) -> float:
    """Returns ||result - expected|| / ||expected||."""
    return float(np.linalg.norm(result - expected) / max(np.linalg.norm(expected), 1e-30))


def compare_runs(first: Arrays, second: Arrays, limits: Limits) -> dict[str, Any]:
    """Compares the decode program with the training program on the same tokens, and a first run with a second."""
    difference = largest_difference(first["rollout_logprobs"], first["recomputed"])
    repeats = {name: bool(np.array_equal(first[name], second[name])) for name in first}
    right = difference < limits.logprob and all(repeats[name] for name in REPEATABLE)
    return {"rollout_against_recomputed": difference, "repeats": repeats, "ok": right}


def compare_with_cpu(result: Arrays, expected: Arrays, limits: Limits) -> dict[str, Any]:
    """Compares one way's arrays with the CPU's. Sampled tokens are not judged: they diverge after one difference."""
    logprob = largest_difference(result["reference"], expected["reference"])
    metric = {name: relative(result[name], expected[name]) for name in METRICS}
    change = relative(result["change"], expected["change"])
    right = logprob < limits.logprob and max(metric.values()) < limits.metric and change < limits.change
    return {
        "tokens_same": float((result["tokens"] == expected["tokens"]).mean()),
        "reference_difference": logprob,
        "metrics": {name: [float(result[name]), float(expected[name])] for name in METRICS},
        "metric_difference": metric,
        "change_difference": change,
        "limits": limits._asdict(),
        "ok": right and all(math.isfinite(result[name]) for name in METRICS),
    }


def step_stage(args: argparse.Namespace) -> None:
    if args.save:
        save: Any = np.savez
        save(args.save, **step(args.size, CPU_WAY))
    elif args.cpu:
        check_way(args, "fp32, highest", CPU_WAY, WAYS["fp32, highest"][1])
    else:
        step_on_gpu(args)


def check_way(args: argparse.Namespace, name: str, way: Way, limits: Limits) -> Arrays | None:
    """Runs a way twice and prints a row for both runs. On a CPU, also compares the second run with the first."""
    runs: list[Arrays] = []

    def check() -> dict[str, Any]:
        runs.extend(step(args.size, way) for _ in range(2))
        return compare_runs(runs[0], runs[1], limits)

    run_check(f"step: {name}", check)
    if args.cpu and len(runs) == 2:
        run_check(f"step, second run: {name}", partial(compare_with_cpu, runs[1], runs[0], limits))
    return runs[0] if runs else None


def step_on_gpu(args: argparse.Namespace) -> None:
    path = args.keep / "step_cpu.npz"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "step", "--cpu", "--save", str(path)]
    command += ["--size", args.size, "--out", str(args.out), "--keep", str(args.keep)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # programs for this CPU are of no use on another
    with subprocess.Popen(command, env=env) as process:
        results = {name: check_way(args, name, *way) for name, way in WAYS.items()}
        process.wait()
    for name, result in results.items():
        if result is not None:
            check = partial(against_file, result, path, WAYS[name][1])
            run_check(f"step against CPU: {name}", check)


def against_file(result: Arrays, path: Path, limits: Limits) -> dict[str, Any]:
    return compare_with_cpu(result, dict(np.load(path)), limits)


def train_stage(args: argparse.Namespace) -> None:
    """Runs the training command on the built-in task: a few steps of both stages; on a GPU in bfloat16, with cuDNN."""
    folder = args.keep / "train"
    options = TRAINING | {
        "output_dir": folder,
        "shapes.dir": args.keep / "shapes",
        "model.dtype": "float32" if args.cpu else "bfloat16",
    }
    command = [sys.executable, "-m", "r1vl_jax.train", "--config", "configs/quickstart.yaml", "--overwrite"]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT).returncode
    wall_s = time.perf_counter() - start
    lines = (folder / "metrics.jsonl").read_text().splitlines() if code == 0 else []
    steps = [json.loads(line) for line in lines]
    finite = all(math.isfinite(step["loss"]) for step in steps)
    right = code == 0 and {step["stage"] for step in steps} == {"sft", "step_grpo"} and finite
    print_row("train", code=code, wall_s=round(wall_s, 1), last=steps[-1:], ok=right)


def main() -> None:
    args = stage_arguments()
    if args.stage == "train":
        train_stage(args)
    else:
        step_stage(args)


if __name__ == "__main__":
    main()
