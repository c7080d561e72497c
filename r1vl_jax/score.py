"""Scores a file of answers with the rewards of StepGRPO: `python -m r1vl_jax.score --rules paper IN.jsonl OUT.jsonl`,
and is the reward lab: answers in groups under several rules side by side, attacks on the rules (`--probe`).

A thin command around r1vl_jax.rewards (R1-VL, arXiv 2503.12937, section 3.3) and r1vl_jax.lab; no JAX. Every row is
checked before the first is scored, and OUT appears complete or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from tqdm import tqdm

from r1vl_jax.common.arguments import finite_float, non_negative_int, positive_float, positive_int
from r1vl_jax.common.files import atomic_write
from r1vl_jax.reward_lab import attacks
from r1vl_jax.reward_lab import rescoring as lab
from r1vl_jax.reward_lab.rows import question_of, read_rows
from r1vl_jax.reward_lab.tables import probe_table, rescore_table
from r1vl_jax.rewards import PRESETS, Rules, Score, ScorerPool, get_rules
from r1vl_jax.rewards.key_steps import key_step_groups

MAX_REPORTED = 20

_DESCRIPTION = """\
Score answers with the step-wise rewards of R1-VL, and try the rules that score them.

IN has one JSON object a line, or is one JSON array of them:
  completion   text, the answer to score
  solution     text, the reference; its "### The final answer is:" section, or all of it
  key_steps    {"Steps": [["a", "other words for a"], "b"]}, or that list; may be null or missing (k = 0)
or is a run's rollouts.jsonl, whose rows have solution, key_steps and answers: [{"text": ...}, ...], a group of answers
to one question.

1. Scores. With single completions, one preset and OUT: OUT has the same rows in the same order, with all fields kept,
and these added (or replaced):
  accuracy, validity, reward            reward = accuracy + validity
  answer, expected                      the final answer found (null: none) and the solution's
  key_steps_matched, key_steps_total    indices of the key steps found, and how many the question has
  faults                                why the answer is not valid; [] if it is
  status, note                          ok, timeout, error or crash (the last three score 0), and a remark

2. Report. With a run's rows, several presets, --json, or no OUT: every answer is scored under each preset. Shown are
the totals, and the --groups groups where advantages differ most from those under the first preset. Single completions
in consecutive rows with the same question (or problem), solution and key_steps are a group, others stand alone. OUT,
if given, has every group as a line, as in --json.

3. Probe. With --probe: attacks on the rules, from the problems in IN (rows with solution, key_steps, and question or
problem) or from five built-in ones. No attack knows the right answer; those called "key steps ..." know the key steps.
An honest wrong answer is complete and in order, in its own words, without key steps, and wrong: it earns its validity.
What no rule on texts can catch, no attack tries, and pays up to alpha under every preset: key steps among other words,
be these sentences that are true, guessed or denied ("it is not so that ..."), a template ("Thus ...") or words without
meaning; and key steps that the question already says, which a copy of the question contains: leave such ones out.
"""
_EPILOG = """\
JSON of the report:
  rules, alpha   as given; "totals" and each group's "rules" are objects by these names
  totals         answers, groups, groups_of_one; means of the answers: reward, correct, validity, key_steps (k),
                 no_answer; reward_share, variance_share: {outcome, key_steps, validity} of the reward, and of its
                 variance inside groups, or null; zero_variance (all rewards are equal), shaping_only (rewards differ,
                 and no answer is more right than another): shares of the groups of several answers; sign_flips: share
                 of their answers whose advantage has another sign than under the first rules; failures,
                 key_step_faults: answers not scored, answers with faulty key steps
  groups         stage, step, event, source, row (where the row has them); question, expected, texts; disagreement: sum
                 over answers of |advantage - advantage under the first rules|; rules: mean, std, reward_share,
                 variance_share, zero_variance, shaping_only, sign_flips (a count), and answers: [{reward, outcome,
                 key_steps, validity, k, correct, answer, advantage, flip, faults, status}]
JSON of the probe:
  rules, alpha   as given
  problems       their number
  completions    name; attack (false: honest); rules, by name: mean and max reward over the problems; excess: the most
                 over the honest wrong answer; problem: where (from 0); exceeds; failures: how many were not scored

Examples:
  python -m r1vl_jax.score --rules paper answers.jsonl scored.jsonl
  python -m r1vl_jax.score --rules paper robust released --stage step_grpo --steps 30:40 runs/quickstart/rollouts.jsonl
  python -m r1vl_jax.score --rules paper paper,require_answer=false --json runs/quickstart/rollouts.jsonl > report.json
  python -m r1vl_jax.score --rules paper robust --probe
  python -m r1vl_jax.score --rules robust --probe --limit 50 r1vl_10k.json

Exit code: 0, or 2 for unusable input or arguments.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 where the input or the arguments are unusable."""
    args = _arguments(argv)
    try:
        rows, faults = ([], []) if args.input is None else read_rows(args.input, args.probe)
    except OSError as error:
        print(f"{args.input}: cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    if args.output and args.output != "-" and os.path.realpath(args.output) == os.path.realpath(args.input):
        print(f"{args.output}: is the input; expected another file to write", file=sys.stderr)
        return 2
    try:
        _check_output(args.output)
    except OSError as error:
        print(f"{args.output}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    for fault in faults[:MAX_REPORTED]:
        print(fault, file=sys.stderr)
    if len(faults) > MAX_REPORTED:
        print(f"... and {len(faults) - MAX_REPORTED} more bad rows", file=sys.stderr)
    if faults and not args.skip_bad:
        print(f"{len(faults)} bad rows, nothing scored; --skip-bad leaves them out", file=sys.stderr)
        return 2
    try:
        rows = select(rows, args)
        if args.probe:
            show_probe(rows, args)
        elif args.output and not args.json and len(args.rules) == 1 and not any(map(lab.of_a_run, rows)):
            write_scores(rows, args, len(faults))
        else:
            show_groups(rows, args)
    except _Unusable as error:
        print(error, file=sys.stderr)
        return 2
    return 0


class _Unusable(ValueError):
    """Rows or arguments that cannot be used together; the message is for the user."""


def select(rows: list[dict], args: argparse.Namespace) -> list[dict]:
    """The rows of the stage and steps asked for, at most as many as the limit."""
    if args.stage is None and args.steps is None:
        # Held-out answers are greedy, one to a question: with a stage's groups they would only be averaged away.
        return ([row for row in rows if "event" not in row] or rows)[: args.limit]
    chosen = [row for row in rows if args.stage in (None, _stage(row)) and _within(row, args.steps)]
    if not chosen:
        there = list(dict.fromkeys(f"{_stage(row)} {row.get('step')}" for row in rows if "step" in row))
        there = f"{', '.join(there[:MAX_REPORTED])}{', ...' * (len(there) > MAX_REPORTED)}" if there else "none"
        raise _Unusable(f"{args.input}: no row of the stage and steps asked for; stages and steps there: {there}")
    return chosen[: args.limit]


def _stage(row: dict) -> Any:
    return row.get("event", row.get("stage"))


def _within(row: dict, steps: tuple[float, float] | None) -> bool:
    return steps is None or (isinstance(row.get("step"), int) and steps[0] <= row["step"] <= steps[1])


def write_scores(rows: list[dict], args: argparse.Namespace, skipped: int) -> None:
    """OUT: the rows with their scores; a summary on standard error."""
    scores = score_rows(rows, args)
    with _output(args.output) as out:
        for row, score in zip(rows, scores, strict=True):
            # ASCII: escapes carry lone surrogates, which UTF-8 cannot
            out.write(json.dumps(row | score_fields(score)) + "\n")
    print(summary(scores, args.rules[0][0], skipped), file=sys.stderr)


def show_groups(rows: list[dict], args: argparse.Namespace) -> None:
    """The report of all groups on standard output, and every group as a line of OUT."""
    if args.output == "-":
        raise _Unusable("OUT.jsonl: expected a file, got -: the report goes to standard output")
    groups = lab.groups_of(rows)
    if not groups:
        raise _Unusable(f"{args.input}: no usable row, expected at least one to report on")
    owners = [group for group in groups for _ in group.texts]
    texts = [text for group in groups for text in group.texts]
    report = lab.rescore(groups, _score_all(texts, owners, args))
    if args.output:
        with _output(args.output) as out:
            out.writelines(json.dumps(group) + "\n" for group in report["groups"])
    shown = report | {"alpha": args.alpha, "groups": report["groups"][: args.groups]}
    _say(json.dumps(shown, indent=1) + "\n" if args.json else rescore_table(report, args.groups))


def show_probe(rows: list[dict], args: argparse.Namespace) -> None:
    """The report of all attacks on the problems in `rows`, or on the built-in ones, on standard output."""
    if args.input is not None and not rows:
        raise _Unusable(f"{args.input}: no usable row, expected at least one problem")
    asked = {json.dumps([question_of(row), row["solution"], row.get("key_steps")]): row for row in rows}
    problems = [attacks.problem(question_of(row), row["solution"], row.get("key_steps")) for row in asked.values()]
    problems = problems or attacks.BUILT_IN
    if bare := sum(not key_step_groups(problem.key_steps)[0] for problem in problems):
        print(f"{bare} of {len(problems)} problems have no key steps to attack with", file=sys.stderr)
    texts, cases, owners = [], [], []
    for index, problem in enumerate(problems):
        for name, text in (attacks.honest(problem) | attacks.attacks(problem)).items():
            texts.append(text)
            cases.append((index, name))
            owners.append(problem)
    report = lab.probe(cases, _score_all(texts, owners, args), list(attacks.honest(problems[0])))
    _say(json.dumps(report | {"alpha": args.alpha}, indent=1) + "\n" if args.json else probe_table(report))


def _say(text: str) -> None:
    """Writes to standard output, whatever characters it can take."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def score_rows(rows: list[dict], args: argparse.Namespace) -> list[Score]:
    """The scores of all rows under the first rules, in order, with a progress bar on standard error."""
    columns = [[row.get(field) for row in rows] for field in ("completion", "solution", "key_steps")]
    return _pooled(columns, args.rules[:1], args)[args.rules[0][0]]


def _score_all(texts: list[str], owners: Sequence, args: argparse.Namespace) -> dict[str, list[Score]]:
    columns = [texts, [owner.solution for owner in owners], [owner.key_steps for owner in owners]]
    return _pooled(columns, args.rules, args)


def _pooled(columns: list[list], rules: list[tuple[str, Rules]], args: argparse.Namespace) -> dict[str, list[Score]]:
    """Scores by the rules' name, one for each row of the columns."""
    count = len(columns[0])
    if not count:
        return {name: [] for name, _ in rules}
    with (
        tqdm(total=count * len(rules), unit="row", desc="score", file=sys.stderr) as bar,
        ScorerPool(min(args.workers, count), args.timeout) as pool,
    ):
        return {
            name: pool.score(*columns, rules=options, alpha=args.alpha, on_result=lambda _: bar.update())
            for name, options in rules
        }


def score_fields(score: Score) -> dict:
    """The fields that a score adds to its row."""
    return {
        "accuracy": score.accuracy,
        "validity": score.validity,
        "reward": score.reward,
        "answer": score.answer,
        "expected": score.expected,
        "key_steps_matched": list(score.matched),
        "key_steps_total": score.total,
        "faults": list(score.faults),
        "status": score.status,
        "note": score.note,
    }


def summary(scores: list[Score], rules: str, skipped: int) -> str:
    """One line about all scores."""
    rows = max(1, len(scores))
    means = ", ".join(
        f"{name} {sum(getattr(score, name) for score in scores) / rows:.4f}"
        for name in ("accuracy", "validity", "reward")
    )
    answered = sum(score.answer is not None for score in scores) / rows
    failed = ", ".join(
        f"{sum(score.status == status for score in scores)} {status}" for status in ("timeout", "error", "crash")
    )
    noted = sum(score.status == "ok" and bool(score.note) for score in scores)  # a scored row's notes: its key steps
    text = f"{len(scores)} rows, rules {rules}: {means}; final answer found in {answered:.1%}; {failed}"
    text += f"; {noted} with missing, empty or faulty key steps" if noted else ""
    return text + (f"; {skipped} bad rows skipped" if skipped else "")


def _check_output(path: str | None) -> None:
    """Raises OSError now, not after the scoring, where OUT cannot be written."""
    if path not in ("-", None):
        with atomic_write(path, replace=False):
            pass


def _output(path: str) -> contextlib.AbstractContextManager[TextIO]:
    return contextlib.nullcontext(sys.stdout) if path == "-" else atomic_write(path)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m r1vl_jax.score",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="IN", nargs="?", help="answers or problems; - reads standard input")
    parser.add_argument("output", metavar="OUT.jsonl", nargs="?", help="written whole or not at all; - is stdout")
    rules = f"{', '.join(PRESETS)}; options behind commas; several to compare (default: paper)"
    parser.add_argument("--rules", metavar="PRESET[,OPTION=true|false]", type=_rules, action="append", help=rules)
    parser.add_argument("--alpha", type=finite_float, default=0.1, help="weight of the key steps (default: 0.1)")
    parser.add_argument("--stage", help="only a run's rows of this stage, or heldout (default: all but those)")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--step", metavar="N", dest="steps", type=_step, help="only a run's rows of step N")
    steps.add_argument("--steps", metavar="A:B", type=_steps, help="only those from step A to step B, both included")
    parser.add_argument("--limit", metavar="N", type=positive_int, help="only the first N of the rows chosen so far")
    parser.add_argument("--groups", metavar="N", type=non_negative_int, default=5, help="groups to show (default: 5)")
    parser.add_argument("--probe", action="store_true", help="attack the rules")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=positive_int, default=cores, help=f"processes (default: {cores}, the cores)")
    parser.add_argument("--timeout", type=positive_float, default=20.0, help="seconds for one answer (default: 20)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be read, and count them")
    args = parser.parse_intermixed_args(_one_by_one(sys.argv[1:] if argv is None else argv))
    args.rules = args.rules or [_rules("paper")]
    names = [name for name, _ in args.rules]
    if len(set(names)) < len(names):
        parser.error(f"argument --rules: expected each once, got {' '.join(names)}")
    if args.input is None and not args.probe:
        parser.error("argument IN: missing; expected a file, or - for standard input (only --probe can do without)")
    if args.output is not None and args.probe:
        parser.error(f"argument OUT.jsonl: {args.output!r}; expected none, as --probe reports on standard output")
    return args


def _one_by_one(argv: Sequence[str]) -> list[str]:
    """`--rules a b IN` as `--rules a --rules b IN`: argparse cannot tell where a list ends and IN begins."""
    out: list[str] = []
    for word in argv:
        more = len(out) > 1 and out[-2] == "--rules" and word.partition(",")[0] in PRESETS
        out += ["--rules", word] if more else [word]
    return out


def _rules(text: str) -> tuple[str, Rules]:
    """(name, rules) of "paper" or "paper,require_answer=false"."""
    preset, *pairs = text.split(",")
    options = {}
    for name, sign, value in (pair.partition("=") for pair in pairs):
        if not sign or value not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{text!r}: expected OPTION=true or OPTION=false behind each comma")
        options[name] = value == "true"
    try:
        return text, get_rules(preset, options)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _step(text: str) -> tuple[int, int]:
    return (non_negative_int(text),) * 2


def _steps(text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    if not colon or not low + high:
        raise argparse.ArgumentTypeError(f"expected A:B, A: or :B, got {text!r}")
    return non_negative_int(low or "0"), non_negative_int(high) if high else math.inf


if __name__ == "__main__":
    sys.exit(main())
