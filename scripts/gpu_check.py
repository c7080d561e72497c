"""One check of a GPU in stages, each a process of its own with a limit of its own. In the repository's root:

    python scripts/gpu_check.py --out DIR --budget 330 --stages env,right,step,train
    python scripts/gpu_check.py --out DIR --budget 270 --stages R1,S,T1,torch,K,R4,profile,R2

The first line checks that results are right: 330 seconds. The second measures speed: 270 seconds, worth nothing before
the first says RIGHT. Give them different folders for --out. What else a stage does is at the top of its script; R1 to
K and torch are the workloads of bench_gpu.py. Needs jax[cuda13] and, where they are missing (six packages that a CUDA
machine with jax and torch often lacks): grain, array_record, portpicker, math-verify 0.9.0, latex2sympy2_extended
1.11.0, antlr4-python3-runtime 4.13.2.

DIR/gpu_check.json is written again after each stage: {"arguments": [...], "rows": [{"stage", "name", figures or
"error"}, ...]}. "ok" says whether a row is right, where that can be judged. The last row of a stage is named "process"
and holds its exit code. DIR/logs.txt holds all that the stages print. The command prints RIGHT and returns 0, or prints
the rows that fail and returns 1.

Compiled programs and autotune results are kept in KEEP/cache and packed into DIR/cache0.tar, cache1.tar, ... at the
end. On another machine of the same kind, unpack them first (tar -xf DIR/cache0.tar -C KEEP/cache): nothing is compiled
again. --cpu runs every stage on a CPU, with tiny models and kernels in interpret mode: a test of this check itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from gpu_check_common import MARK

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
CPU_SLOWER = 10  # times the limits of a GPU, which are for hangs
LEAST_SHARE = 0.3  # of its limit that must be left for a stage to start
END_S = 5  # of the budget for packing
PART_BYTES, PARTS = 14_000_000, 4  # of the packed cache, so that each file is small enough to send

Row = dict[str, Any]


class Stage(NamedTuple):
    """seconds: its limit; script: gets the stage's name and `stage_arguments` (gpu_check_common.py)."""

    seconds: float
    script: str


STAGES = {
    "env": Stage(60, "gpu_check_env.py"),
    "right": Stage(150, "gpu_check_right.py"),
    "step": Stage(120, "gpu_check_step.py"),
    "train": Stage(150, "gpu_check_step.py"),
    "R1": Stage(100, "gpu_check_speed.py"),
    "S": Stage(150, "gpu_check_speed.py"),
    "T1": Stage(60, "gpu_check_speed.py"),
    "torch": Stage(80, "gpu_check_speed.py"),
    "K": Stage(40, "gpu_check_speed.py"),
    "T2": Stage(40, "gpu_check_speed.py"),
    "R4": Stage(60, "gpu_check_speed.py"),
    "profile": Stage(60, "gpu_check_speed.py"),
    "R2": Stage(100, "gpu_check_speed.py"),
    "R3": Stage(100, "gpu_check_speed.py"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, required=True, metavar="DIR", help="where results are written")
    option("--budget", type=float, default=560, metavar="S", help="seconds for everything (default: 560)")
    option("--stages", type=stage_names, default=list(STAGES), metavar="A,B", help="in this order (default: all)")
    option("--keep", type=Path, default=Path("runs/gpu_check"), help="kept between calls (default: runs/gpu_check)")
    option("--repeats", type=int, default=3, metavar="N", help="the median is taken of these (default: 3)")
    option("--flags", default="", metavar="XLA", help="added to XLA_FLAGS")
    option("--size", choices=["tiny", "2b", "7b"], help="of the model (default: 2b; with --cpu: tiny)")
    option("--cpu", action="store_true", help="run everything on a CPU")
    args = parser.parse_args(argv)
    args.size = args.size or ("tiny" if args.cpu else "2b")
    args.out, args.keep = args.out.resolve(), args.keep.resolve()
    return args


def stage_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return names


def stage_environment(args: argparse.Namespace) -> dict[str, str]:
    """What every stage runs with; of these, what the caller has set stays, but for the two that are added to."""
    flags = [os.environ.get("XLA_FLAGS", ""), args.flags, "--xla_backend_optimization_level=0" if args.cpu else ""]
    paths = [str(ROOT), str(ROOT / "kernels"), str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
    defaults = {
        "JAX_PLATFORMS": "cuda,cpu",  # raises where there is no GPU; the sampler is compared with the CPU's
        "JAX_COMPILATION_CACHE_DIR": str(args.keep / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "PYTHONUNBUFFERED": "1",
    }
    more = {"XLA_FLAGS": " ".join(filter(None, flags)), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return defaults | os.environ | more | ({"JAX_PLATFORMS": "cpu"} if args.cpu else {})


def run_stage(name: str, args: argparse.Namespace, left: float) -> list[Row]:
    """The rows of a stage in at most `left` seconds, and at their end that of its process."""
    seconds = STAGES[name].seconds
    limit = min(seconds * (CPU_SLOWER if args.cpu else 1), left - END_S)
    if limit < LEAST_SHARE * seconds:
        return [{"stage": name, "name": "process", "error": f"left out: {max(0, left):.0f} s were left"}]
    command = [sys.executable, str(SCRIPTS / STAGES[name].script), name, "--out", str(args.out)]
    command += ["--keep", str(args.keep), "--size", args.size, "--repeats", str(args.repeats)]
    command += ["--seconds", f"{limit:.0f}", *(["--cpu"] if args.cpu else [])]
    start = time.monotonic()
    with open(args.out / "logs.txt", "a+") as log:
        log.write(f"== {name}\n")
        log.flush()
        position = log.tell()
        code = run_process(command, log, limit, stage_environment(args))
        log.seek(position)
        text = log.read()
    rows = [json.loads(line.removeprefix(MARK)) for line in text.splitlines() if line.startswith(MARK)]
    process: Row = {"name": "process", "code": code, "wall_s": round(time.monotonic() - start, 1)}
    if code is None:
        process["error"] = f"killed: its limit of {limit:.0f} s was up"
    elif code or not rows:
        process["error"] = f"code {code}, {len(rows)} rows: {text[-600:].strip() or 'it printed nothing'}"
    return [{"stage": name, **row} for row in (*rows, process)]


def run_process(command: list[str], log: Any, limit: float, environment: dict[str, str]) -> int | None:
    """The exit code, or None where the limit was up. No process that it started outlives it."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, process_group=0
    )
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # where nothing is left to kill
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Replaces the file at once, so that it is complete whenever this process is killed."""
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)


def pack_cache(cache: Path, out: Path) -> Row:
    """Packs compiled programs and autotune results, small ones first, into files of at most PART_BYTES."""
    for old in out.glob("cache*.tar"):
        old.unlink()
    files = sorted((path for path in cache.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    parts: list[list[Path]] = [[]]
    total = 0
    for file in files:
        size = file.stat().st_size
        if total + size > PART_BYTES and parts[-1]:
            parts.append([])
            total = 0
        parts[-1].append(file)
        total += size
    packed = [part for part in parts if sum(file.stat().st_size for file in part) <= PART_BYTES][:PARTS]
    for number, part in enumerate(packed):
        with tarfile.open(out / f"cache{number}.tar", "w") as tar:
            for file in part:
                tar.add(file, file.relative_to(cache))
    count = sum(map(len, packed))
    return {"stage": "pack", "name": "cache", "files": count, "left_out": len(files) - count}


def fails(row: Row) -> bool:
    return "error" in row or row.get("ok") is False


def print_verdict(rows: list[Row]) -> int:
    """Prints RIGHT or the rows that fail; returns the exit code."""
    failing = [row for row in rows if fails(row)]
    for row in failing:
        print("FAILS " + json.dumps(row), flush=True)
    print(f"WRONG: {len(failing)} of {len(rows)} rows fail" if failing else "RIGHT")
    return int(bool(failing))


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    end = time.monotonic() + args.budget
    args.out.mkdir(parents=True, exist_ok=True)
    (args.keep / "cache").mkdir(parents=True, exist_ok=True)
    (args.out / "logs.txt").write_text("")
    result: dict[str, Any] = {"arguments": sys.argv[1:] if argv is None else argv, "rows": []}
    for name in args.stages:
        rows = run_stage(name, args, end - time.monotonic())
        result["rows"] += rows
        write_result(args.out / "gpu_check.json", result)
        for row in rows:
            print(json.dumps(row)[:400], flush=True)
    result["rows"].append(pack_cache(args.keep / "cache", args.out))
    write_result(args.out / "gpu_check.json", result)
    return print_verdict(result["rows"])


if __name__ == "__main__":
    sys.exit(main())
