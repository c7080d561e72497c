"""`python -m r1vl_jax.data.shapes --out DIR`: makes the built-in task by hand (train.py makes it by itself)."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

from r1vl_jax.shapes.task import make_task


def main(argv: Sequence[str] | None = None) -> None:
    defaults = {name: p.default for name, p in inspect.signature(make_task).parameters.items()}
    parser = argparse.ArgumentParser(
        prog="python -m r1vl_jax.data.shapes",
        description="Make the built-in task: pictures of coloured shapes with questions, step-by-step solutions and "
        "key steps. Writes sft.json (ShareGPT rows), rl.json and heldout.json (R1-VL-10K rows), images/ and "
        "task.json. A folder that the same parameters made is left as it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--seed", type=int, default=defaults["seed"], help="every byte follows from it")
    parser.add_argument("--sft-rows", type=int, default=defaults["sft_rows"], help="rows for the SFT warm-up")
    parser.add_argument("--rl-rows", type=int, default=defaults["rl_rows"], help="rows for StepGRPO")
    parser.add_argument("--heldout-rows", type=int, default=defaults["heldout_rows"], help="rows for evaluation")
    args = parser.parse_args(argv)
    try:
        make_task(
            args.out, seed=args.seed, sft_rows=args.sft_rows, rl_rows=args.rl_rows, heldout_rows=args.heldout_rows
        )
    except (FileExistsError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{args.out}: {args.sft_rows} SFT, {args.rl_rows} RL and {args.heldout_rows} held-out rows, seed {args.seed}")
