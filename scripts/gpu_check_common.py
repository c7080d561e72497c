"""Provides the code that the stages of gpu_check.py share: arguments, rows of results, nvidia-smi queries."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REMAT = ("none", "matmuls", "full")  # as in r1vl_jax.config, which the parent does without
MARK = "ROW "  # starts a line that holds a row as JSON


def stage_arguments() -> argparse.Namespace:
    """Parses the command line that gpu_check.py gives to each stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--size", default="2b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro", type=int)
    parser.add_argument("--remat", choices=REMAT)
    parser.add_argument("--seconds", type=float, default=100, help="after this long the stage is killed")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--save", type=Path, help="step alone: run the reference once and write its arrays here")
    return parser.parse_args()


def print_row(name: str, **fields: Any) -> None:
    print(MARK + json.dumps({"name": name, **fields}), flush=True)


def run_check(name: str, check: Callable[[], dict[str, Any]]) -> None:
    """Prints the row that `check` returns, or a row with its error, so that one failure does not stop other checks."""
    start = time.perf_counter()
    try:
        fields = check()
    except Exception as error:  # whatever it is, it goes into the row
        traceback.print_exc()
        first_line = (str(error).strip() or "no message").splitlines()[0]
        fields = {"error": f"{type(error).__name__}: {first_line[:300]}"}
    print_row(name, **fields, wall_s=round(time.perf_counter() - start, 2))


def nvidia_smi(query: str, *options: str) -> str:
    """Returns the output of `nvidia-smi --query-gpu=query` without its heading: one line per GPU."""
    form = ",".join(["csv", "noheader", *options])
    command = ["nvidia-smi", f"--query-gpu={query}", f"--format={form}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
