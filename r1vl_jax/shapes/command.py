"""Implements `python -m r1vl_jax.data.shapes --out DIR`, which makes the built-in task."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from r1vl_jax.common.arguments import Parser, non_negative_int, whole
from r1vl_jax.common.limits import MAX_ROWS
from r1vl_jax.rewards.formats import FORMATS
from r1vl_jax.shapes.draw import ShapesConfig
from r1vl_jax.shapes.task import DEFAULTS, make_task


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 0, or 2 with one line on standard error."""
    parser = Parser(
        prog="python -m r1vl_jax.data.shapes",
        description="Make the built-in task: pictures of coloured shapes with questions, step-by-step solutions and "
        "key steps. Writes sft.json (ShareGPT rows), rl.json and heldout.json (R1-VL-10K rows), images/ and "
        "task.json. A folder that was made with the same parameters is left as it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--seed", type=non_negative_int, default=DEFAULTS["seed"], help="determines every byte of the files"
    )
    parser.add_argument(
        "--sft-rows", type=whole(0, MAX_ROWS), default=DEFAULTS["sft_rows"], help="rows for the SFT warm-up"
    )
    parser.add_argument("--rl-rows", type=whole(0, MAX_ROWS), default=DEFAULTS["rl_rows"], help="rows for StepGRPO")
    parser.add_argument(
        "--heldout-rows", type=whole(0, MAX_ROWS), default=DEFAULTS["heldout_rows"], help="rows for evaluation"
    )
    parser.add_argument("--answer-format", choices=tuple(FORMATS), default="r1vl", help="the solutions' format")
    args = parser.parse_args(argv)
    try:
        make_task(
            args.out, seed=args.seed, sft_rows=args.sft_rows, rl_rows=args.rl_rows, heldout_rows=args.heldout_rows,
            cfg=ShapesConfig(answer_format=args.answer_format),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.sft_rows} SFT, {args.rl_rows} RL and {args.heldout_rows} held-out rows, seed {args.seed}")
    return 0
