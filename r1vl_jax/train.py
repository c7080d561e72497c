"""Trains a checkpoint in the two stages of R1-VL: `python -m r1vl_jax.train --config F`.

    sft          rows -> prompts, answers -> cross-entropy -> AdamW
    step_grpo    questions -> M answers each (rollout) -> step rewards -> group advantages -> policy gradient -> AdamW

The stages are in training/; training/step_grpo.py contains the algorithm.
"""

from __future__ import annotations

import argparse
import sys

from r1vl_jax import config as configs
from r1vl_jax.errors import CheckpointError, ConfigError, GuardError, RewardError, RowError
from r1vl_jax.training.run import train


def _parser() -> argparse.ArgumentParser:
    keys = "\n".join(f"  --{key} {default!r}\n        {text}" for key, default, text in configs.describe())
    parser = argparse.ArgumentParser(
        prog="python -m r1vl_jax.train",
        description="The two stages of R1-VL, from questions with images to a trained checkpoint.",
        epilog=f"keys of the configuration, each also an override on the command line (with its default):\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="remove the run folder and start anew")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 2 if the input is wrong, 130 if the run was interrupted."""
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        train(configs.load(arguments.config, overrides), resume=arguments.resume, overwrite=arguments.overwrite)
    except (ConfigError, CheckpointError, RowError, RewardError, GuardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
