"""Proves that a configuration resumes bit for bit: `python -m r1vl_jax.prove_resume --config F`."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from r1vl_jax import config as configs
from r1vl_jax.common.arguments import Parser, non_negative_int, positive_int
from r1vl_jax.errors import EXPECTED
from r1vl_jax.training.prove import prove

_DESCRIPTION = """\
Run a configuration for a few steps, kill it (SIGKILL) at random moments, resume it, and compare it with a run that was
not killed: the weights after each stage, the last train states, the metrics and the sampled answers, bit for bit.

Both runs are made in --folder. They use your data, model, mesh and options; only the numbers of steps and what is
written differ. A GPU repeats its bits only with --deterministic true.
"""
_EPILOG = """\
exit code: 0 if nothing differs; 1 if something does; 2 if the configuration cannot be run

example:
  python -m r1vl_jax.prove_resume --config configs/quickstart.yaml --kills 10
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    parser = Parser(
        prog="python -m r1vl_jax.prove_resume",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file; its keys can be overridden as in training")
    parser.add_argument("--steps", type=positive_int, default=6, help="steps of each stage (default 6)")
    parser.add_argument("--kills", type=positive_int, default=5, help="number of kills (default 5)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the moments (default 0)")
    parser.add_argument("--folder", help="where the runs are made; default: a temporary folder, kept if they differ")
    args, overrides = parser.parse_known_args(argv)
    short = [
        *("--sft.steps", str(args.steps), "--rl.steps", str(args.steps)),
        *("--checkpoint.every", "2", "--checkpoint.keep", "2", "--eval.rows", "0"),
    ]
    try:
        configs.load(args.config, [*overrides, *short])
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = Path(args.folder or tempfile.mkdtemp(prefix="prove_resume"))
    if (folder / "killed").exists():
        print(f"error: --folder: {folder / 'killed'} exists; name another folder", file=sys.stderr)
        return 2
    try:
        proof = prove(
            ["--config", args.config, *overrides, *short], folder / "straight", folder / "killed",
            kills=args.kills, seed=args.seed,
        )  # fmt: skip
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    moments = ", ".join(f"{count} {name}" for name, count in proof.kills.items())
    print(f"{proof.killed} kills ({moments}), {proof.starts} starts")
    if proof.differences:
        print("\n".join([*(f"differs: {text}" for text in proof.differences), f"both runs are in {folder}"]))
        return 1
    print("every bit is the same")
    if not args.folder:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
