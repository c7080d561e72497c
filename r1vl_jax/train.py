"""Trains a checkpoint in the two stages of R1-VL: `python -m r1vl_jax.train --config F`.

    sft          rows -> prompts, answers -> cross-entropy -> AdamW
    step_grpo    questions -> M answers each (rollout) -> step rewards -> group advantages -> policy gradient -> AdamW

The stages are in training/; training/step_grpo.py contains the algorithm.
"""

from __future__ import annotations

import argparse
import signal
import sys

from r1vl_jax import config as configs
from r1vl_jax.common.arguments import Parser
from r1vl_jax.errors import EXPECTED
from r1vl_jax.training.run import train

UNUSABLE, FAILED = 2, 3  # exit codes
_EXIT = f"""\
exit codes:
  0    the run is complete
  {UNUSABLE}    the input cannot be used; nothing was trained
  {FAILED}    an error in a stage (data, a reward function, a scorer, the disk); the last finished step is saved
  129, 130, 143
       SIGHUP, SIGINT (Ctrl-C) or SIGTERM; an update under way was finished, and the last finished step is saved.
       A second signal ends the run at once, without saving.
--resume goes on from the newest checkpoint that is not damaged."""


def _parser() -> argparse.ArgumentParser:
    keys = "\n".join(f"  --{key} {default!r}\n        {text}" for key, default, text in configs.describe())
    parser = Parser(
        prog="python -m r1vl_jax.train",
        description="The two stages of R1-VL, from questions with images to a trained checkpoint.",
        epilog=f"keys of the configuration, each also an override (with its default):\n{keys}\n\n{_EXIT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="remove the run folder and start anew")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: see the end of --help."""
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        train(configs.load(arguments.config, overrides), resume=arguments.resume, overwrite=arguments.overwrite)
    except EXPECTED as error:
        notes = getattr(error, "__notes__", [])
        print("\n".join([f"error: {error}", *notes]), file=sys.stderr)
        return FAILED if notes else UNUSABLE
    except KeyboardInterrupt as error:
        print("\n".join([str(error) or "interrupted", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
