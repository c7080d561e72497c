"""Says what a run needs on machines that are not there: `python -m r1vl_jax.plan --config F --target h100:4`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from r1vl_jax import config as configs
from r1vl_jax.common.arguments import Parser, positive_int
from r1vl_jax.common.files import write_json
from r1vl_jax.errors import EXPECTED, ConfigError
from r1vl_jax.model.published import PUBLISHED
from r1vl_jax.planning.targets import parse_target, prepare

_DESCRIPTION = """\
Compile every program of a run for a target, on a machine that has no such device, and print what each needs: memory
against the device's, FLOPs, bytes moved and exchanged, the time at the roofline and what bounds it.

Shapes are those of full batches: every answer has the maximum length, every question one image of max_pixels and 256
further tokens (--prompt and --images change that). Not planned: held-out answers (eval.*), and the further rounds of
zero_variance resample.
"""
_EPILOG = """\
targets: h100, h200, v5e, v5p, v6e or cpu, or a YAML file with the facts of a device (see r1vl_jax/planning/devices);
  h100:8x4 is four hosts of eight. GPUs need `pip install -e '.[plan-gpu]'`, TPUs '.[plan-tpu]'; neither needs a device.

exit code: 0 if everything fits; 1 if something does not; 2 if the input cannot be used

examples:
  python -m r1vl_jax.plan --config configs/r1vl_7b_rl.yaml --target h100:4
  python -m r1vl_jax.plan --config configs/r1vl_2b_rl.yaml --target h100:1 --search --rl.questions_per_step 16
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m r1vl_jax.plan",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file; its keys can be overridden as in training")
    parser.add_argument("--target", required=True, help="NAME:COUNT, NAME:COUNTxHOSTS or FILE:COUNT")
    parser.add_argument("--size", choices=tuple(PUBLISHED), help="a published model, where model.path is not there")
    parser.add_argument("--prompt", type=positive_int, help="tokens of a question, its images included")
    parser.add_argument("--images", type=int, choices=range(65), metavar="N", help="images of a question (default 1)")
    parser.add_argument("--search", action="store_true", help="try meshes, micro-batches and remat; print the best")
    parser.add_argument("--json", metavar="FILE", help="write everything to this file, too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    args, overrides = _parser().parse_known_args(argv)
    try:
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise ConfigError(f"--json {args.json}: its folder does not exist")
        target = parse_target(args.target)
        prepare(target)
        from r1vl_jax.planning.planner import Planner  # uses devices

        planner = Planner(configs.load(args.config, overrides), target, args.size, args.prompt, args.images)
        plans = planner.search() if args.search else planner.run()
        if args.json:
            write_json(Path(args.json), [plan.to_json() for plan in plans])
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0 if all(plan.fits for plan in plans) else 1


if __name__ == "__main__":
    sys.exit(main())
