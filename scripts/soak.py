"""Kills runs on the built-in task at random moments and compares them with a run that was not killed, bit for bit.

    python scripts/soak.py --kills 100 [--folder DIR]

Each run is killed up to --per-run times (at checkpoint writes, at exports, between the stages, at the start, in steps),
then completed and compared; then the next run begins. Prints a line per run and a summary.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
import time
from pathlib import Path

from r1vl_jax.training.prove import prove

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "shapes.sft_rows": 200, "shapes.rl_rows": 60, "shapes.heldout_rows": 8, "checkpoint.every": 2, "eval.rows": 4,
    "eval.batch_size": 4, "eval.max_new_tokens": 16, "sft.steps": 7, "sft.batch_size": 8, "sft.micro_batch_size": 4,
    "rl.steps": 7, "rl.questions_per_step": 4, "rl.micro_batch_size": 2, "rl.group_size": 4, "rl.max_new_tokens": 16,
}  # fmt: skip


def main() -> int:
    """Runs the command. Returns 0 if every run ended with the bits of the straight run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-run", type=int, default=12, help="most kills of one run (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the runs are made; default: a temporary folder, removed")
    args = parser.parse_args()
    folder, started = Path(args.folder or tempfile.mkdtemp(prefix="soak")), time.monotonic()
    settings = SETTINGS | {"shapes.dir": folder / "shapes"}
    arguments = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
    arguments += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    kills: collections.Counter[str] = collections.Counter()
    runs, different = 0, 0
    while sum(kills.values()) < args.kills:
        left = args.kills - sum(kills.values())
        proof = prove(
            arguments, folder / "straight", folder / "killed",
            kills=min(left, args.per_run), seed=args.seed + runs, say=lambda text: None,
        )  # fmt: skip
        shutil.rmtree(folder / "killed")
        kills.update(proof.kills)
        runs += 1
        different += bool(proof.differences)
        print(
            f"run {runs}: {proof.killed} kills, {proof.starts} starts: {proof.differences or 'same bits'}", flush=True
        )
    moments = ", ".join(f"{count} {name}" for name, count in kills.most_common())
    minutes = (time.monotonic() - started) / 60
    print(
        f"{runs - different} of {runs} runs bit-identical after {sum(kills.values())} kills "
        f"({moments}), {minutes:.0f} min"
    )
    if not args.folder:
        shutil.rmtree(folder)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
