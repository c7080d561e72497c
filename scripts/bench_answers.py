"""Counts how many wrong answers several answer checks pay, and how many right ones they refuse.

    python scripts/bench_answers.py PAIRS.jsonl

Each line of PAIRS.jsonl is a JSON object with gold (a solution), answer, and right (whether the answer is right). The
checks are the three presets, math-verify on both texts inside $...$, and mathruler, EasyR1's rule, if it is installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from r1vl_jax.rewards import PRESETS, ScorerPool
from r1vl_jax.rewards.formats import ANSWER_HEADER

Pair = dict[str, Any]  # gold, answer, right


def judge_preset(pairs: list[Pair], rules: str) -> list[bool]:
    """Returns which answers a preset calls right."""
    with ScorerPool(2) as pool:
        scores = pool.score(
            [f"{ANSWER_HEADER} {pair['answer']}" for pair in pairs],
            [pair["gold"] for pair in pairs],
            [None] * len(pairs),
            rules=rules,
        )
    return [score.correct for score in scores]


def judge_math_verify(pairs: list[Pair]) -> list[bool]:
    """Returns which answers math-verify calls right, both texts as one formula each."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return [bool(verify(parse(f"${pair['gold']}$"), parse(f"${pair['answer']}$"))) for pair in pairs]


def judge_mathruler(pairs: list[Pair]) -> list[bool]:
    """Returns which answers mathruler calls right. Raises ImportError if it is not installed."""
    from mathruler.grader import grade_answer  # pyright: ignore[reportMissingImports]

    return [bool(grade_answer(pair["answer"], pair["gold"])) for pair in pairs]


def main(argv: list[str] | None = None) -> int:
    """Prints the table, and with --list the pairs that a check gets wrong. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, metavar="PAIRS.jsonl")
    parser.add_argument("--list", choices=list(PRESETS), help="print the pairs that this preset gets wrong")
    args = parser.parse_args(argv)
    pairs = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = sum(not pair["right"] for pair in pairs)
    checks: dict[str, Callable[[], list[bool]]] = {name: partial(judge_preset, pairs, name) for name in PRESETS}
    checks[f"math-verify {metadata.version('math-verify')} in $...$"] = partial(judge_math_verify, pairs)
    checks["mathruler"] = partial(judge_mathruler, pairs)
    print(f"{'':<30}{f'wrong paid, of {wrong}':>22}{f'right refused, of {len(pairs) - wrong}':>26}")
    for name, check in checks.items():
        try:
            judged = check()
        except ImportError:
            print(f"{name:<30}{'not installed':>22}")
            continue
        paid = sum(said and not pair["right"] for said, pair in zip(judged, pairs, strict=True))
        refused = sum(not said and pair["right"] for said, pair in zip(judged, pairs, strict=True))
        print(
            f"{name:<30}{paid:>14} ({paid / max(1, wrong):4.0%})"
            f"{refused:>18} ({refused / max(1, len(pairs) - wrong):4.0%})"
        )
        if args.list == name:
            for said, pair in zip(judged, pairs, strict=True):
                if said != pair["right"]:
                    print(f"  {'paid' if said else 'refused'}: {pair['answer']!r} for {pair['gold']!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
