"""Measures rollout and training speed on one GPU: `python scripts/bench_gpu.py` (under ten minutes on an H200; --help).

    R1, R2, R4   rollout of 16, 64 and 1 questions, 4 answers of 1,024 tokens each         tokens/s
    R3           like R2, with lognormal answer lengths of mean 400; only real tokens count tokens/s
    T1           training step on 16 questions: reference, policy and its gradient, AdamW  s
    T2           loss head alone on 16,384 rows, forward and gradient                      TFLOP/s
    S            a whole StepGRPO step on 16 questions: rollout, scores, reference, update s
    K            decode attention on R2's caches at full length                            TB/s
    torch        the released trainer's step, by transformers: see torch_baseline.py

Weights are random; a question has 768 tokens, 510 of them from its image; end of text is ignored. Workloads run in the
order of `WORKLOADS`; those for which no time is left are skipped and named. Each group of workloads runs in its own
process, so a failure or a hang does not stop the other groups. The processes share a compilation cache, so a program's
compile time counts in the first row that needs it. MFU uses the FLOPs that bench_common.py counts and a peak of 989
TFLOP/s. Peak memory is the process's peak so far. --size tiny runs everything on a CPU in about a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_common import SIZES, table
from bench_gpu_worker import GROUPS, TINY_GROUPS, WORKLOADS, work

from r1vl_jax.common.arguments import positive_int
from r1vl_jax.config import ATTENTION, KERNELS, REMAT

START_S = 15  # seconds that a process needs before it measures


# The parent: never touches the device, starts processes one after another and collects what they print.


def commands(args: argparse.Namespace) -> Iterator[tuple[list[str], list[str]]]:
    """Yields (names of workloads, command line) of each process, in order."""
    common = ["--size", args.size, "--repeats", str(args.repeats)]
    ours = ["--attention", args.attention, "--kernels", args.kernels, "--micro", str(args.micro), "--remat", args.remat]
    ours += ["--profile", str(args.profile)] if args.profile else []
    here = Path(__file__).resolve()
    processes: dict[Any, list[str]] = {}
    for name in WORKLOADS:
        if name in args.only:
            number = "ours" if args.size == "tiny" and name != "torch" else WORKLOADS[name].process
            processes.setdefault(number, []).append(name)
    for names in processes.values():
        if names == ["torch"]:
            yield names, [sys.executable, str(here.with_name("torch_baseline.py")), *common]
        else:
            yield names, [sys.executable, str(here), *common, *ours, "--worker", *names]


def run(names: list[str], command: list[str], seconds: float, limit: float, env: dict[str, str]) -> Iterator[dict]:
    """Yields the rows that a process prints; it is told to take `seconds` and is killed after `limit` seconds."""
    expected = ["torch rollout", "torch step"] if names == ["torch"] else list(names)
    env = env | {"JAX_PLATFORMS": "cpu"} if names == ["torch"] else env
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, "--seconds", f"{seconds:.0f}"], stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        )
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            for line in process.stdout or ():
                if line.startswith('{"name"'):
                    row = json.loads(line)
                    expected.remove(row["name"])
                    yield row
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
        errors.seek(0)
        last = ([line.strip() for line in errors if line.strip()] or ["nothing on stderr"])[-1]
    reason = "the time was up" if code == -signal.SIGKILL else f"the process ended with code {code}: {last}"
    yield from ({"name": name, "error": reason} for name in expected)


def bench(args: argparse.Namespace) -> dict:
    """Returns all rows; rewrites the file of --json after each row."""
    end = time.monotonic() + args.budget
    scale = 0.05 if args.size == "tiny" else 1.0
    found = {"date": datetime.date.today().isoformat(), "size": args.size, "arguments": sys.argv[1:], "rows": {}}
    with tempfile.TemporaryDirectory() as cache:
        env = {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ
        if args.xla_flags:
            env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {args.xla_flags}".strip()
        waiting = list(commands(args))
        while waiting:
            names, command = waiting.pop(0)
            left = end - time.monotonic()
            later = scale * sum(WORKLOADS[name].seconds for names, _ in waiting for name in names)
            need = scale * sum(WORKLOADS[name].seconds for name in names)
            if left < need / 2:
                rows = ({"name": name, "error": f"left out: {max(0, left):.0f} s were left"} for name in names)
            else:
                share = max(need, left - later)  # what comes later takes what it needs; one that hangs, twice that
                rows = run(names, command, share - scale * START_S, min(left, max(2 * need, share)), env)
            for row in rows:
                found["rows"][row.pop("name")] = row
                say(found, args)
    return found


def say(found: dict, args: argparse.Namespace) -> None:
    """Prints the newest row on stderr and writes all rows to the file."""
    name, row = list(found["rows"].items())[-1]
    print(f"{name}: {row.get('error') or format(row['value'], ',.4g')}", file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


UNITS = {"torch rollout": "tokens/s", "torch step": "s an answer"} | {name: w.unit for name, w in WORKLOADS.items()}


def goals(found: dict) -> dict[str, tuple[float | None, float | None]]:
    """Returns (floor, target) of each row; they are known for the 2B model only."""
    if found["size"] != "2b":
        return {}
    known = {name: (workload.floor, workload.target) for name, workload in WORKLOADS.items()}
    best = found["rows"].get("R2", {}).get("value")
    return known | {"R3": (None, best and 0.8 * best)}


def ratios(rows: dict[str, dict], size: str) -> Iterator[str]:
    """Yields our speed divided by that of transformers in the same run, if both were measured."""
    value = {name: row["value"] for name, row in rows.items() if "value" in row}
    for name in ("R4", "R1", "R2"):
        if name in value and "torch rollout" in value:
            yield f"rollout, {name} against torch: {value[name] / value['torch rollout']:.1f}x (target 8x)"
    if "T1" in value and "torch step" in value:
        answers = (TINY_GROUPS if size == "tiny" else GROUPS)["T1"] * SIZES[size].group
        ratio = value["torch step"] * answers / value["T1"]
        yield f"training step, an answer, T1 against torch: {ratio:.1f}x (target 2x)"


def details(rows: dict[str, dict]) -> Iterator[str]:
    """Yields further figures that only some rows have."""
    for name, row in rows.items():
        if "phases" in row:
            yield f"{name}: " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in row["phases"].items())
        if "extra_gb" in row:
            yield f"{name}: {row['extra_gb']:.2f} GB besides its inputs (target: at most 4)"
        if "reference" in row:
            yield f"{name}: the reference {row['reference']:.2f} TB/s"
        if "error" in row:
            yield f"{name}: {row['error']}"
    if peak := rows.get("S", {}).get("peak_gb"):
        yield f"S: peak {peak:.1f} GB (target: at most 90)"


def report(found: dict) -> str:
    """Returns the figures as text for a terminal."""

    def cell(value: float | None, form: str = ",.4g") -> str:
        return "-" if value is None else format(value, form)

    heads = ["", "measured", "unit", "floor", "target", "s: median (min to max)", "of", "MFU", "peak GB", "compile s"]
    lines, wanted = [heads], goals(found)
    for name, row in found["rows"].items():
        if "error" in row:
            continue
        floor, target = wanted.get(name, (None, None))
        lines.append([
            name, cell(row["value"]), UNITS[name], cell(floor), cell(target),
            f"{row['seconds']:.4g} ({row['min']:.4g} to {row['max']:.4g})", str(row["repeats"]),
            cell(row.get("mfu"), ".0%"), cell(row.get("peak_gb"), ".1f"), cell(row.get("compile_s"), ".1f"),
        ])  # fmt: skip
    notes = [*details(found["rows"]), *ratios(found["rows"], found["size"])]
    return "\n".join([f"{found['size']}, {found['date']}", "", table(lines), "", *notes])


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 1 if a workload failed."""
    args = _arguments(argv)
    if args.worker:
        work(args)
        return 0
    found = bench(args)
    print(report(found))
    return int(any("error" in row for row in found["rows"].values()))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--size", choices=["2b", "7b", "tiny"], default="2b", help="default: 2b")
    option("--only", type=lambda text: text.split(","), default=list(WORKLOADS), metavar="R1,T1", help="some of them")
    option("--budget", type=float, default=570, metavar="S", help="seconds for everything (default: 570)")
    option("--repeats", type=positive_int, default=5, help="the median is taken of these, if time allows (default: 5)")
    option("--micro", type=positive_int, default=4, help="questions in a micro-batch (default: 4)")
    option("--remat", choices=REMAT, default="matmuls", help="what the backward pass recomputes (default: matmuls)")
    option(
        "--attention",
        choices=ATTENTION,
        default="auto",
        help="default: what training would choose",
    )
    option("--kernels", choices=KERNELS, default="auto", help="default: what training would choose")
    option("--xla-flags", default="", metavar="FLAGS", help="for ours: '--xla_gpu_...', added to XLA_FLAGS")
    option("--profile", type=Path, metavar="DIR", help="where to write a trace of one more call of each workload")
    option("--json", type=Path, metavar="FILE", help="where all figures are written, after each workload")
    option("--worker", nargs="+", help=argparse.SUPPRESS)
    option("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(WORKLOADS):
        parser.error(f"--only: no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
