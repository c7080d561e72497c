"""Makes a TFDS data set in ArrayRecord from a JSON file and the image files that the JSON file names.

    python -m r1vl_jax.data.build mulberry_sft --source Mulberry-SFT/ --out ~/tensorflow_datasets
    python -m r1vl_jax.data.build r1vl_10k --source R1-VL-10K/r1vl_10k.json --image-root images/ --out DIR
    python -m r1vl_jax.data.build shapes --out DIR

Records are in the order of the file, and image files are stored byte for byte. So training on the data set gets the
same batches as training on the file. If a build is interrupted or killed, at most one shard is lost; run the same
command again to continue.
"""

from __future__ import annotations

import argparse
import sys

from r1vl_jax.common.arguments import Parser, non_negative_int, positive_int, whole
from r1vl_jax.common.limits import MAX_ROWS
from r1vl_jax.data.builders import BUILDERS
from r1vl_jax.data.builders.build import build
from r1vl_jax.data.builders.shards import ROWS_PER_SHARD
from r1vl_jax.data.builders.work_folder import BuildError
from r1vl_jax.errors import RowError
from r1vl_jax.shapes.task import DEFAULTS


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m r1vl_jax.data.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=BUILDERS, help=", ".join(BUILDERS))
    parser.add_argument("--source", metavar="PATH", help="JSON array or JSONL, or the folder that holds one")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder of TFDS data sets")
    parser.add_argument(
        "--image-root", metavar="DIR", help="folder that image paths start from (default: the file's own folder)"
    )
    parser.add_argument(
        "--allow-outside", action="store_true", help="also read images outside of that folder, links resolved"
    )
    parser.add_argument(
        "--drop-matching",
        metavar="TEXT",
        action="append",
        help="leave out rows whose answer holds this text; may be given several times; an empty text keeps all rows "
        f"(default: nothing, but for mulberry_sft {BUILDERS['mulberry_sft'].DROP_MATCHING[0]!r})",
    )
    parser.add_argument(
        "--rows-per-shard",
        type=positive_int,
        default=ROWS_PER_SHARD,
        metavar="N",
        help=f"rows of a file ({ROWS_PER_SHARD})",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a complete data set, or an unfinished one of other settings"
    )
    group = parser.add_argument_group("shapes without --source: the task to make")
    for name, default in DEFAULTS.items():
        kind = non_negative_int if name == "seed" else whole(0, MAX_ROWS)
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"(default: {default})")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 0, 2 with one line on standard error, or 130 on Ctrl-C."""
    args = _parser().parse_args(argv)
    task = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    try:
        if task and (args.name != "shapes" or args.source):
            raise BuildError(f"--{next(iter(task)).replace('_', '-')} is for shapes without --source")
        line = build(
            args.name,
            args.out,
            source=args.source,
            image_root=args.image_root,
            allow_outside=args.allow_outside,
            drop_matching=None if args.drop_matching is None else tuple(args.drop_matching),
            rows_per_shard=args.rows_per_shard,
            overwrite=args.overwrite,
            task=task,
        )
    except (BuildError, RowError, OSError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; complete shards are kept, and the same command goes on with the others", file=sys.stderr)
        return 130
    print(line)
    return 0
