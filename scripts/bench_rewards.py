"""Measures how many answers per second the rewards score: `python scripts/bench_rewards.py` (about a minute; --help).

Three figures for each preset. Each is the median of several repeats, with new answers in each because SymPy caches:

    rules   key steps and validity only, in this process
    text    whole scores in the pool; comparing texts or letters decides the final answers
    math    whole scores in the pool; the final answers are compared as values (released: by math-verify)

Also: which kinds of values are slow under `paper`, and what an answer that hangs costs under `released`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

from r1vl_jax.common.arguments import positive_int
from r1vl_jax.rewards import PRESETS, Rules, ScorerPool
from r1vl_jax.rewards.key_steps import key_step_groups, key_step_hits
from r1vl_jax.rewards.steps import section_faults

Row = tuple[str, str, dict[str, Any]]  # completion, solution, key steps
Kind = Callable[[random.Random], tuple[str, str]]  # makes an answer and its solution
GROUP = 4  # answers to one question, as in training
BOMB = "10^10^10^10"
TARGETS = {"rules": 2000, "text": 2000, "math": 200}  # answers per second and core
DETAILED = "paper"
HANGING = "released"  # the other presets compute nothing of the size of BOMB

_SENTENCES = (
    "Since AD is a median of triangle ABC, BD = DC = {a} and the two parts have equal area.",
    "The area is $\\frac{{{a}}}{{2}} \\cdot {b} = {c}$, which is the number we are looking for here.",
    "By the theorem of Pythagoras $AB^2 = {a}^2 + {b}^2$, so that $AB = \\sqrt{{{c}}}$.",
    "The angle at the vertex B is ${a}^\\circ$, so the remaining two angles add up to {b} degrees.",
    "From the table we read {a} for the first year and {b} for the second, {c} in total.",
)


def _fraction(rng: random.Random) -> tuple[str, str]:
    """A fraction, and the same one expanded, or a different one."""
    top, bottom, factor = rng.randrange(1, 99), rng.randrange(2, 99), rng.choice((2, 3))
    other = top * factor + rng.randrange(2)
    return f"$\\frac{{{top}}}{{{bottom}}}$", f"$\\frac{{{other}}}{{{bottom * factor}}}$"


def _wrong_number(rng: random.Random) -> tuple[str, str]:
    value = rng.randrange(1, 999)
    return str(value), str(value + rng.randrange(1, 99))


def _decimal(rng: random.Random) -> tuple[str, str]:
    value = rng.randrange(1, 9999)
    return f"{value / 100:.2f} cm", f"{(value + rng.randrange(2)) / 100:.3f}"


def _root(rng: random.Random) -> tuple[str, str]:
    factor, base = rng.randrange(2, 99), rng.choice((2, 3, 5, 7))
    return f"${factor}\\sqrt{{{base}}}$", f"$\\sqrt{{{(factor + rng.randrange(2)) ** 2 * base}}}$"


def _formula(rng: random.Random) -> tuple[str, str]:
    slope, height = rng.randrange(2, 99), rng.randrange(2, 99)
    return f"${slope}x + {height}$", f"${height + rng.randrange(2)} + {slope}x$"


def _text(rng: random.Random) -> tuple[str, str]:
    text = f"{rng.choice(('red', 'blue', 'green'))} {rng.choice(('circle', 'square'))} {rng.randrange(99)}"
    return text, text


def _letter(rng: random.Random) -> tuple[str, str]:
    return rng.choice("ABCD"), f"({rng.choice('ABCD')})"


MATH_KINDS = {
    "fraction": _fraction,
    "wrong number": _wrong_number,
    "decimal, unit": _decimal,
    "root": _root,
    "formula": _formula,
}


def make_rows(rng: random.Random, count: int, kinds: list[Kind]) -> list[Row]:
    """Answers of about 1,000 characters in 5 steps. Each question has GROUP answers, and 5 key steps of 3 alternatives.

    Args:
      count: number of rows.
      kinds: makers of final answers, used in turn.
    """
    rows = []
    values: list[tuple[int, int]] = []
    key_steps: list[list[str]] = []
    for number in range(count):
        if number % GROUP == 0:
            values = [(rng.randrange(2, 99), rng.randrange(2, 99)) for _ in range(5)]
            key_steps = [_alternatives(a, b, a * b + rng.randrange(2)) for a, b in values]  # about half are right
        answer, gold = kinds[number % len(kinds)](rng)
        rows.append((_completion(rng, values, answer), f"### The final answer is: {gold}", {"Steps": key_steps}))
    return rows


def _alternatives(a: int, b: int, product: int) -> list[str]:
    return [f"frac{{{a}}}{{2}} \\cdot {b} = {product}", f"{a}/2*{b} = {product}", f"{product} in total"]


def _completion(rng: random.Random, values: list[tuple[int, int]], answer: str) -> str:
    steps = [
        f"### Step {number}:\n" + " ".join(text.format(a=a, b=b, c=a * b) for text in rng.sample(_SENTENCES, 2))
        for number, (a, b) in enumerate(values, 1)
    ]
    return (
        "### Image Description:\nThe figure shows a triangle ABC with a point D on BC.\n\n"
        "### Rationales:\nThe question asks for a length or an area, so we use the median.\n\n"
        "### Let's think step by step.\n\n" + "\n\n".join(steps) + f"\n\n### The final answer is: {answer}"
    )


def measure(rows_of: Callable[[int], list[Row]], score: Callable[[list[Row]], object], repeats: int) -> float:
    """Answers per second: the median of `repeats`, each with its own rows, after scoring the first row as a warm-up."""
    rates = []
    for repeat in range(repeats):
        rows = rows_of(repeat)
        score(rows[:1])
        start = time.perf_counter()
        score(rows)
        rates.append(len(rows) / (time.perf_counter() - start))
    return statistics.median(rates)


def score_rules(rows: list[Row], rules: Rules) -> None:
    """Scores key steps and validity in this process."""
    for completion, _, key_steps in rows:
        groups, _ = key_step_groups(key_steps)
        key_step_hits(completion, groups, rules)
        section_faults(completion, rules)


def score_pool(rows: list[Row], rules: Rules, pool: ScorerPool) -> None:
    """Scores answers in the pool. Raises RuntimeError if one fails: failing is fast and would falsify the figure."""
    scores = pool.score(*zip(*rows, strict=True), rules=rules)
    failed = [score for score in scores if score.status != "ok"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(rows)} answers were not scored, the first: {failed[0].note}")


def measure_hang(rows: list[Row], workers: int, limit_s: float) -> dict[str, Any]:
    """What one answer that hangs costs: when it is given up, and how many others are scored meanwhile.

    Args:
      rows: the other answers; the one that hangs is sent first.
      limit_s: seconds for one answer.
    """
    bomb = (f"### The final answer is: {BOMB}", "### The final answer is: 3", None)
    arrived: list[tuple[float, str]] = []  # seconds and status of each score, as they arrive
    with ScorerPool(workers, limit_s) as pool:
        score_pool(rows[: 4 * workers], PRESETS[HANGING], pool)
        start = time.perf_counter()
        scores = pool.score(
            *zip(bomb, *rows, strict=True),
            rules=HANGING,
            on_result=lambda score: arrived.append((time.perf_counter() - start, score.status)),
        )
    place = next((place for place, (_, status) in enumerate(arrived) if status != "ok"), None)
    return {
        "limit_s": limit_s,
        "status": scores[0].status,
        "ended_after_s": None if place is None else arrived[place][0],
        "others": len(rows),
        "others_scored": sum(status == "ok" for _, status in arrived),
        "others_scored_meanwhile": place,
        "all_after_s": arrived[-1][0],
    }


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, in the form that --json prints."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used, load = min(args.workers, cores), os.getloadavg()[0]

    def rows_of(kinds: list[Kind], share: float = 1.0) -> Callable[[int], list[Row]]:
        count = max(len(kinds), round(args.answers * share))
        return lambda repeat: make_rows(
            random.Random(f"{args.seed} {repeat} {[kind.__name__ for kind in kinds]}"), count, kinds
        )

    presets, math = {}, list(MATH_KINDS.values())
    with ScorerPool(args.workers) as pool:
        score_pool(
            make_rows(random.Random(0), 4 * args.workers, [_letter]), PRESETS["paper"], pool
        )  # starts all workers
        for name in args.presets:
            rules = PRESETS[name]
            text = [_text, _letter] if rules.check_answer else [_text]
            rates = {
                "rules": measure(rows_of(text), partial(score_rules, rules=rules), args.repeats),
                "text": measure(rows_of(text), partial(score_pool, rules=rules, pool=pool), args.repeats),
                "math": measure(rows_of(math, 0.25), partial(score_pool, rules=rules, pool=pool), args.repeats),
            }
            presets[name] = {
                column: {"per_s": rate, "per_s_core": rate / (1 if column == "rules" else used)}
                for column, rate in rates.items()
            }
        rules = PRESETS[DETAILED]
        kinds = {
            name: measure(rows_of([kind], 0.1), partial(score_pool, rules=rules, pool=pool), args.repeats) / used
            for name, kind in MATH_KINDS.items()
        }
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "load": load,
        "math_verify": metadata.version("math-verify"),
        "workers": args.workers,
        "answers": args.answers,
        "repeats": args.repeats,
        "characters": statistics.mean(len(row[0]) for row in rows_of([_text])(0)),
        "targets_per_s_core": TARGETS,
        "presets": presets,
        "math_kinds_per_s_core": kinds,
        "hang": measure_hang(rows_of([_text], 0.5)(0), args.workers, args.hang_limit),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as a text table."""
    lines = [
        f"{figures['date']}, Python {figures['python']}, {figures['machine']}, {figures['cores']} cores "
        f"(load {figures['load']:.1f} before), {figures['workers']} workers, math-verify {figures['math_verify']}",
        f"{figures['answers']} answers of {figures['characters']:.0f} characters (math: a quarter), median of "
        f"{figures['repeats']}; answers/s, and answers/s a core",
        "",
        f"{'preset':<10}{'rules alone, in process':>26}{'pool, text decides':>26}{'pool, values':>26}",
    ]
    for name, columns in figures["presets"].items():
        cells = (f"{rate['per_s']:>14,.0f}{rate['per_s_core']:>12,.0f}" for rate in columns.values())
        lines.append(f"{name:<10}" + "".join(cells))
    lines.append(f"{'target':<10}" + "".join(f"{target:>26,}" for target in figures["targets_per_s_core"].values()))
    kinds = ", ".join(f"{name} {rate:,.0f}" for name, rate in figures["math_kinds_per_s_core"].items())
    hang = figures["hang"]
    end = (
        "did not end early"
        if hang["ended_after_s"] is None
        else f"{hang['status']} after {hang['ended_after_s']:.2f} s"
    )
    meanwhile = "" if hang["ended_after_s"] is None else f", {hang['others_scored_meanwhile']} of them meanwhile"
    return "\n".join(
        [
            *lines,
            "",
            f"values by kind of answer (preset {DETAILED}), answers/s a core: {kinds}",
            f"{BOMB} with a limit of {hang['limit_s']:g} s: {end}; {hang['others_scored']} of {hang['others']} others "
            f"scored{meanwhile}; all in {hang['all_after_s']:.2f} s",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints its figures. Returns the exit code."""
    args = _arguments(argv)
    figures = bench(args)
    print(json.dumps(figures, indent=2) if args.json else table(figures))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    known = ", ".join(PRESETS)
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=list(PRESETS),
        default=list(PRESETS),
        metavar="NAME",
        help=f"of {known} (default: all)",
    )
    parser.add_argument("--answers", type=positive_int, default=1000, help="answers in each repeat (default: 1000)")
    parser.add_argument(
        "--repeats", type=positive_int, default=5, help="runs of each figure; the median counts (default: 5)"
    )
    parser.add_argument(
        "--workers", type=positive_int, default=cores, help=f"worker processes (default: {cores}, the number of cores)"
    )
    parser.add_argument(
        "--hang-limit", type=positive_int, default=2, metavar="S", help="seconds for one answer (default: 2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the answers (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
