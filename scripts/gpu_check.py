"""Checks a GPU in stages, each in its own process with its own time limit. Run it in the repository's root:

    python scripts/gpu_check.py --out DIR --budget 330 --stages env,right,step,train
    python scripts/gpu_check.py --out DIR --budget 270 --stages R1,S,T1,torch,K,R4,profile,R2

The first command checks that results are right, in 330 seconds. The second measures speed, in 270 seconds; its results
mean nothing unless the first command prints RIGHT. Use different folders for --out. The docstring of each stage's
script describes the stage; gpu_check_workloads.py has R1 to K. Needs jax[cuda13] and six packages that a CUDA machine
with jax and torch often lacks; install the missing ones: grain, array_record, portpicker, math-verify 0.9.0,
latex2sympy2_extended 1.11.0, antlr4-python3-runtime 4.13.2.

DIR/gpu_check.json is rewritten after each stage: {"date", "size", "arguments", "rows": [{"stage", "name", figures or
"error"}, ...]}. The field "ok" says whether a row is right, if that can be judged. The last row of a stage is named
"process" and holds its exit code. DIR/logs.txt contains everything that the stages print. The command ends with a table
of the measurements (gpu_check_table.py prints it again) and with RIGHT and exit code 0, or with the rows that fail and
exit code 1.

Compiled programs and autotune results are stored in KEEP/cache and packed into DIR/cache0.tar, cache1.tar, ... at the
end. On another machine of the same kind, unpack them first (tar -xf DIR/cache0.tar -C KEEP/cache), so that nothing is
compiled again. --cpu runs every stage on a CPU, with tiny models and kernels in interpret mode, to test this script.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from gpu_check_common import MARK, REMAT
from gpu_check_table import report

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
CPU_FLAGS = (  # tests/conftest.py says why
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
CPU_SLOWER = 10  # factor on the limits for a GPU; the limits only catch hangs
LEAST_SHARE = 0.3  # minimum share of its limit that must be left for a stage to start
END_S = 5  # seconds of the budget that are reserved for packing
PART_BYTES, PARTS = 14_000_000, 4  # of the packed cache, so that each file is small enough to send

Row = dict[str, Any]


class Stage(NamedTuple):
    """seconds: the time limit; script: is called with the stage's name and `stage_arguments` (gpu_check_common.py)."""

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
    "plan": Stage(150, "gpu_check_speed.py"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, required=True, metavar="DIR", help="where results are written")
    option("--budget", type=float, metavar="S", help="seconds for everything (default: 560; with --cpu: 3000)")
    option("--stages", type=stage_names, default=list(STAGES), metavar="A,B", help="in this order (default: all)")
    option("--keep", type=Path, default=Path("runs/gpu_check"), help="kept between calls (default: runs/gpu_check)")
    option("--repeats", type=int, default=3, metavar="N", help="the median is taken of these (default: 3)")
    option("--micro", type=int, metavar="N", help="questions in a micro-batch of T1 and S (default: by memory)")
    option("--remat", choices=REMAT, help="what T1 and S recompute in the backward pass (default: by memory)")
    option("--flags", default="", metavar="XLA", help="added to XLA_FLAGS")
    option("--size", choices=["tiny", "2b", "7b"], help="of the model (default: 2b; with --cpu: tiny)")
    option("--cpu", action="store_true", help="run everything on a CPU")
    args = parser.parse_args(argv)
    args.size = args.size or ("tiny" if args.cpu else "2b")
    args.budget = (3000 if args.cpu else 560) if args.budget is None else args.budget
    args.out, args.keep = args.out.resolve(), args.keep.resolve()
    return args


def stage_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return names


def stage_environment(args: argparse.Namespace) -> dict[str, str]:
    """Returns the environment variables of every stage.

    Variables that the caller has set keep their values, except XLA_FLAGS and PYTHONPATH, to which this function adds.
    """
    flags = [os.environ.get("XLA_FLAGS", ""), args.flags, CPU_FLAGS if args.cpu else ""]
    paths = [str(ROOT), str(ROOT / "kernels"), str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
    defaults = {
        "JAX_PLATFORMS": "cuda,cpu",  # raises if there is no GPU; the sampler is compared with the CPU's
        "JAX_COMPILATION_CACHE_DIR": str(args.keep / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "PYTHONUNBUFFERED": "1",
    }
    more = {"XLA_FLAGS": " ".join(filter(None, flags)), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return defaults | os.environ | more | ({"JAX_PLATFORMS": "cpu"} if args.cpu else {})


def run_stage(name: str, args: argparse.Namespace, left: float) -> list[Row]:
    """Runs a stage for at most `left` seconds. Returns its rows; the last row describes the stage's process."""
    seconds = STAGES[name].seconds
    limit = min(seconds * (CPU_SLOWER if args.cpu else 1), left - END_S)
    if limit < LEAST_SHARE * seconds:
        return [{"stage": name, "name": "process", "error": f"left out: {max(0, left):.0f} s were left"}]
    command = [sys.executable, str(SCRIPTS / STAGES[name].script), name, "--out", str(args.out)]
    command += ["--keep", str(args.keep), "--size", args.size, "--repeats", str(args.repeats)]
    command += ["--seconds", f"{limit:.0f}", *(["--cpu"] if args.cpu else [])]
    command += ["--micro", str(args.micro)] if args.micro else []
    command += ["--remat", args.remat] if args.remat else []
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
    """Returns the exit code, or None if the time limit was reached. Kills all processes that the command started."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, process_group=0
    )
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # if no process is left to kill
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Replaces the file in one operation, so that the file is complete even if this process is killed at any time."""
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
    """Prints RIGHT or the rows that fail. Returns the exit code."""
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
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "size": args.size}
    result |= {"arguments": sys.argv[1:] if argv is None else argv, "rows": []}
    for name in args.stages:
        rows = run_stage(name, args, end - time.monotonic())
        result["rows"] += rows
        write_result(args.out / "gpu_check.json", result)
        for row in rows:
            print(json.dumps(row)[:400], flush=True)
    result["rows"].append(pack_cache(args.keep / "cache", args.out))
    write_result(args.out / "gpu_check.json", result)
    if table := report(result):
        print(f"\n{table}\n")
    return print_verdict(result["rows"])


if __name__ == "__main__":
    sys.exit(main())
