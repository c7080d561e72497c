"""Scores a file of answers with the rewards of StepGRPO: `python -m r1vl_jax.score --rules paper IN.jsonl OUT.jsonl`.

A thin command around r1vl_jax.rewards (R1-VL, arXiv 2503.12937, section 3.3); no JAX. Every row is checked before the
first is scored, and OUT appears complete or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from r1vl_jax.rewards import PRESETS, Score, ScorerPool

MAX_REPORTED = 20

_DESCRIPTION = """\
Score answers with the step-wise rewards of R1-VL.

IN has one JSON object a line:
  completion   text, the answer to score
  solution     text, the reference; its "### The final answer is:" section, or all of it
  key_steps    {"Steps": [["a", "other words for a"], "b"]}, or that list; may be null or missing (k = 0)

OUT has the same rows in the same order, with all fields kept, and these added (or replaced):
  accuracy, validity, reward            reward = accuracy + validity
  answer, expected                      the final answer found (null: none) and the solution's
  key_steps_matched, key_steps_total    indices of the key steps found, and how many the question has
  faults                                why the answer is not valid; [] if it is
  status, note                          ok, timeout, error or crash (the last three score 0), and a remark
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 where the input or the arguments are unusable."""
    args = _arguments(argv)
    try:
        rows, faults = read_rows(args.input)
    except OSError as error:
        print(f"{args.input}: cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    try:
        _check_output(args.output)
    except OSError as error:
        print(f"{args.output}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    for fault in faults[:MAX_REPORTED]:
        print(fault, file=sys.stderr)
    if len(faults) > MAX_REPORTED:
        print(f"... and {len(faults) - MAX_REPORTED} more bad rows", file=sys.stderr)
    if faults and not args.skip_bad:
        print(f"{len(faults)} bad rows, nothing scored; --skip-bad leaves them out", file=sys.stderr)
        return 2
    scores = score_rows(rows, args)
    with _writing(args.output) as out:
        for row, score in zip(rows, scores, strict=True):
            # ASCII: escapes carry lone surrogates, which UTF-8 cannot
            out.write(json.dumps(row | score_fields(score)) + "\n")
    print(summary(scores, args.rules, len(faults)), file=sys.stderr)
    return 0


def read_rows(path: str) -> tuple[list[dict], list[str]]:
    """The usable rows of a JSONL file ("-": standard input), and one line about each other row.

    Blank lines are skipped. Rows count from 0 as everywhere in this project, lines from 1 as in editors.
    """
    name = "standard input" if path == "-" else path
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    rows, faults = [], []
    for index, (number, line) in enumerate(lines):
        try:
            row = json.loads(line.decode("utf-8-sig"))  # -sig: a byte-order mark may stand first
            _check_row(row)
        except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, bad field; nested too deep
            faults.append(f"{name}, row {index} (line {number}): {error}")
        else:
            rows.append(row)
    return rows, faults


def _check_row(row: object) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {_shown(row)}")
    for field in ("completion", "solution"):
        if field not in row:
            raise ValueError(f"field {field!r} is missing, expected a text")
        if not isinstance(row[field], str):
            raise ValueError(f"field {field!r}: expected a text, got {_shown(row[field])}")
    steps = row.get("key_steps")
    if not isinstance(steps, dict | list | None):
        raise ValueError(f"field 'key_steps': expected an object with Steps, a list or null, got {_shown(steps)}")
    if isinstance(steps, dict) and not isinstance(steps.get("Steps"), list | None):
        raise ValueError(f"field 'key_steps': expected a list under 'Steps', got {_shown(steps['Steps'])}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def score_rows(rows: list[dict], args: argparse.Namespace) -> list[Score]:
    """The scores of all rows, in order, with a progress bar on standard error."""
    if not rows:
        return []
    columns = ([row.get(field) for row in rows] for field in ("completion", "solution", "key_steps"))
    with (
        tqdm(total=len(rows), unit="row", desc="score", file=sys.stderr) as bar,
        ScorerPool(min(args.workers, len(rows)), args.timeout) as pool,
    ):
        return pool.score(*columns, rules=args.rules, alpha=args.alpha, on_result=lambda _: bar.update())


def score_fields(score: Score) -> dict:
    """The fields that a score adds to its row."""
    return {
        "accuracy": score.accuracy,
        "validity": score.validity,
        "reward": score.reward,
        "answer": score.answer,
        "expected": score.expected,
        "key_steps_matched": list(score.matched),
        "key_steps_total": score.total,
        "faults": list(score.faults),
        "status": score.status,
        "note": score.note,
    }


def summary(scores: list[Score], rules: str, skipped: int) -> str:
    """One line about all scores."""
    rows = max(1, len(scores))
    means = ", ".join(
        f"{name} {sum(getattr(score, name) for score in scores) / rows:.4f}"
        for name in ("accuracy", "validity", "reward")
    )
    answered = sum(score.answer is not None for score in scores) / rows
    failed = ", ".join(
        f"{sum(score.status == status for score in scores)} {status}" for status in ("timeout", "error", "crash")
    )
    noted = sum(score.status == "ok" and bool(score.note) for score in scores)  # a scored row's notes: its key steps
    text = f"{len(scores)} rows, rules {rules}: {means}; final answer found in {answered:.1%}; {failed}"
    text += f"; {noted} with missing, empty or faulty key steps" if noted else ""
    return text + (f"; {skipped} bad rows skipped" if skipped else "")


def _check_output(path: str) -> None:
    """Raises OSError now, not after the scoring, where OUT cannot be written."""
    if path != "-":
        with _writing(path, replace=False):
            pass


@contextlib.contextmanager
def _writing(path: str, replace: bool = True) -> Iterator[TextIO]:
    """A file that takes its name only when it is complete; "-" is standard output."""
    if path == "-":
        yield sys.stdout
        return
    target = Path(path)
    if target.exists() and not target.is_file():  # a folder; or a device, which must not be replaced
        raise OSError(errno.EINVAL, "it exists and is not a plain file")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        if replace:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m r1vl_jax.score", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN.jsonl", help="answers to score; - reads standard input")
    parser.add_argument("output", metavar="OUT.jsonl", help="where scores go, whole or not at all; - writes to stdout")
    parser.add_argument("--rules", choices=list(PRESETS), default="paper", help="reward rules (default: paper)")
    parser.add_argument("--alpha", type=float, default=0.1, help="weight of the key steps (default: 0.1)")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=_at_least_one, default=cores, help=f"processes (default: {cores}, the cores)")
    parser.add_argument("--timeout", type=_seconds, default=20.0, help="seconds for one answer (default: 20)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be read, and count them")
    return parser.parse_args(argv)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
