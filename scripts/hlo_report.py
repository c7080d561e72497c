"""Reports what the programs of a StepGRPO step do on a GPU, by compiling them without that GPU.

    python scripts/hlo_report.py --size 2b --questions 16 --micro 4

Needs `pip install -e '.[plan-gpu]'` and no GPU. Where `python -m r1vl_jax.plan` says what a run needs, this says what a
compiler made of each program. For each it prints

    peak      GB of its arguments and temporaries, and of everything else that is on the device at that time: fp32
              parameters and both moments, the reference, the rollout's weights, gradients
    kernels   the operations that a GPU starts; of decode, for one token of every answer, with full caches
    moved     GB that they read and write; elementwise: those that are neither matmuls, attention nor our own kernels
    TFLOP     of matmuls, without attention
    passes    how often a chunk of logits is written or read
    compile   seconds to trace, to lower and to compile it on this machine

The programs do not run, so nothing is said about their time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # for everything that is not compiled for the target

import jax  # noqa: E402 (it reads the environment when it is imported)
from bench_common import SIZES, Size  # noqa: E402
from bench_programs import sft_calls, step_calls  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from r1vl_jax.config import REMAT  # noqa: E402
from r1vl_jax.parallel.sharding import make_mesh  # noqa: E402
from r1vl_jax.planning.calls import Call, device_bytes  # noqa: E402
from r1vl_jax.planning.hlo import program_cost  # noqa: E402
from r1vl_jax.planning.targets import parse_target  # noqa: E402


def with_pixels(size: Size, pixels: int) -> Size:
    """Returns the same workload with larger or smaller images; the questions keep the rest of their tokens."""
    rows = int(math.sqrt(pixels / 28**2 * 34 / 60))
    grid = (1, 2 * rows, 2 * int(pixels / 28**2 / rows))
    return dataclasses.replace(size, grid=grid, prompt=size.prompt + (math.prod(grid) - math.prod(size.grid)) // 4)


def lower(call: Call, mesh: Mesh, platform: str) -> jax.stages.Lowered:
    with jax.set_mesh(mesh):
        return call.program.trace(*call.args).lower(lowering_platforms=(platform,))


def report_row(call: Call, mesh: Mesh, logits: int, save: Path | None = None) -> dict[str, Any]:
    """Compiles a program for the target. Returns its figures, per device.

    Args:
      logits: the number of elements of a chunk of the program's logits.
      save: a folder in which the optimized HLO is written.
    """
    clock = [time.perf_counter()]
    with jax.set_mesh(mesh):
        traced = call.program.trace(*call.args)
        clock.append(time.perf_counter())
        lowered = traced.lower(lowering_platforms=("cuda",))
    clock.append(time.perf_counter())
    compiled = lowered.compile()
    clock.append(time.perf_counter())
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if save:
        (save / f"{call.name}.hlo.txt").write_text(text)
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    own += memory.temp_size_in_bytes
    beside = sum(map(device_bytes, call.beside))
    cost = program_cost(text, logits)
    return {
        "program": call.name,
        "peak_gb": (own + beside) / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "kernels": cost.kernels,
        "moved_gb": cost.bytes / 1e9,
        "elementwise_gb": cost.elementwise_bytes / 1e9,
        "tflop": cost.flops / 1e12,
        "logit_passes": cost.logit_passes,
        "attention_calls": cost.attention_calls,
        **{f"{name}_s": clock[i + 1] - clock[i] for i, name in enumerate(("trace", "lower", "compile"))},
    }


HEADINGS = (
    f"{'':<16}{'peak, GB':>9}{'temporaries':>12}{'kernels':>9}{'moved, GB':>11}{'elementwise':>12}{'TFLOP':>8}"
    f"{'passes':>8}{'attention':>10}{'compile, s':>16}"
)
ROW = (
    "{program:<16}{peak_gb:>9.1f}{temporaries_gb:>12.2f}{kernels:>9}{moved_gb:>11.2f}{elementwise_gb:>12.2f}"
    "{tflop:>8.2f}{logit_passes:>8}{attention_calls:>10}{trace_s:>6.1f}{lower_s:>5.1f}{compile_s:>5.0f}"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--target", default="h100", help="a name of r1vl_jax/planning/devices, or a file (default h100)")
    add("--devices", type=int, default=1, help="GPUs (default 1); the train state is split over them (fsdp)")
    add("--size", choices=sorted(SIZES), default="2b", help="model (default 2b)")
    add("--questions", type=int, default=16, help="questions in a rollout (default 16: workload S)")
    add("--stage", choices=["sft", "step_grpo"], default="step_grpo", help="default step_grpo")
    add("--micro", type=int, default=4, help="questions (sft: rows) in a micro-batch, over all GPUs (default 4)")
    add("--pixels", type=int, default=400_000, help="of an image (default 400000)")
    add("--attention", default="cudnn", help="default cudnn")
    add("--kernels", default="pallas", help="default pallas")
    add("--remat", choices=REMAT, default="full", help="what the backward pass recomputes (default full)")
    add(
        "--limit", type=float, default=78, help="GB that JAX may use; exit code 1 above it (default 78: an H100's 92%%)"
    )
    add("--only", type=lambda text: text.split(","), metavar="A,B", help="these programs (default: all)")
    add("--save", type=Path, metavar="DIR", help="write each program's optimized HLO here")
    add("--json", type=Path, help="write the figures here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 1 if a program does not fit."""
    args = _parser().parse_args(argv)
    target = parse_target(f"{args.target}:{args.devices}")
    mesh = make_mesh(1, args.devices, 1, devices=target.devices())
    size = with_pixels(SIZES[args.size], args.pixels)
    cfg = size.cfg.with_backend(args.attention, args.kernels)
    print(
        f"{args.size}, {args.stage} on {args.devices} GPU(s), {args.questions} questions x {size.group}, prompt "
        f"{size.prompt}, {size.new} new tokens, micro-batches of {args.micro}, remat {args.remat}, attention "
        f"{args.attention}, kernels {args.kernels}\n\n{HEADINGS}"
    )
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
    rows = []
    shared = {"micro": args.micro, "remat": args.remat}
    of_grpo = partial(step_calls, cfg, size, mesh, questions=args.questions)
    for call in sft_calls(cfg, size, mesh, **shared) if args.stage == "sft" else of_grpo(**shared):
        if args.only and call.name not in args.only:
            continue
        chunk = args.questions * size.group // args.devices if call.name == "decode" else cfg.logit_rows
        rows.append(report_row(call, mesh, chunk * cfg.vocab, args.save))
        print(ROW.format(**rows[-1]), flush=True)
    peak = max(rows, key=lambda row: row["peak_gb"])
    fits = peak["peak_gb"] <= args.limit
    print(
        f"\npeak {peak['peak_gb']:.1f} GB, in {peak['program']}: "
        f"{'fits' if fits else 'does not fit'} in {args.limit:.0f} GB"
    )
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), "programs": rows}, default=str, indent=1))
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
