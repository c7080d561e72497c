"""Implements `python -m r1vl_jax.data.check --config F`: reads all rows as training would, and reports on them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from r1vl_jax import config as configs
from r1vl_jax.common.arguments import Parser, whole
from r1vl_jax.common.files import atomic_write
from r1vl_jax.common.limits import MAX_WORKERS
from r1vl_jax.config import Config
from r1vl_jax.data_check.figure import plot
from r1vl_jax.data_check.numbers import report
from r1vl_jax.data_check.reading import Reading, read_all
from r1vl_jax.data_check.text import NAMED, report_text
from r1vl_jax.errors import EXPECTED, ConfigError, RowError


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m r1vl_jax.data.check",
        description="Reads all rows as training would, and reports what is in them.",
        epilog="Further arguments override keys of the configuration, as in r1vl_jax.train: --data.rl.path FILE. Exit "
        "code: 0; 1 with --strict where training drops rows or sees held-out ones; 2 for bad input; 130 on Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--strict", action="store_true", help="exit code 1 for dropped and for leaked rows")
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder for check.json and check.png; default: output_dir with -check added"
    )
    parser.add_argument(
        "--workers", type=whole(0, MAX_WORKERS), metavar="N", help="processes that read; default: data.workers"
    )
    parser.add_argument("--all", action="store_true", help=f"name all rows, not only {NAMED} of a kind")
    return parser


def _folder(config: Config, out: str | None) -> Path:
    """Returns the folder of the report. Raises ConfigError if it is inside the run folder."""
    run = Path(config.output_dir)
    folder = Path(out) if out else run.with_name(f"{run.name}-check")
    if folder.resolve().is_relative_to(run.resolve()):
        raise ConfigError(f"--out: {folder} is inside output_dir {run}, where only the run writes")
    return folder


def _write(reading: Reading, numbers: dict[str, Any], folder: Path) -> None:
    with atomic_write(folder / "check.json") as file:
        json.dump(numbers, file, indent=1)
    plot(reading.surveys, folder / "check.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        config = configs.load(arguments.config, overrides)
        folder = _folder(config, arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator
        if config.shapes.dir:
            from r1vl_jax.shapes.folder import make_shapes

            make_shapes(config.shapes)
        reading = read_all(config, config.data.workers if arguments.workers is None else arguments.workers)
        numbers = report(reading.surveys, reading.leaks, reading.complete)
        print(report_text(numbers, None if arguments.all else NAMED))
        if not reading.complete:
            return 130
        _write(reading, numbers, folder)
        print(f"written: {folder / 'check.json'}, {folder / 'check.png'}")
        for survey in reading.surveys:
            if not survey.usable:
                raise RowError(f"{survey.source.name}: no usable row; training would stop")
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1 if arguments.strict and (numbers["rows_dropped"] or numbers["rows_leaked"]) else 0
