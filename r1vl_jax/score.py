"""Scores a file of answers with the rewards of StepGRPO: `python -m r1vl_jax.score --rules paper IN.jsonl OUT.jsonl`.

The command can also compare several rules on groups of answers, and test the rules with attacks (`--probe`). This
module parses the arguments, calls r1vl_jax/reward_lab and prints the results. All rows are checked before the first row
is scored. OUT is written to a temporary file and then renamed. The command does not use JAX.
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

from r1vl_jax.common.arguments import Parser, non_negative_float, non_negative_int, positive_int, seconds, workers
from r1vl_jax.common.files import atomic_write
from r1vl_jax.errors import RowError
from r1vl_jax.reward_lab.probe import probe
from r1vl_jax.reward_lab.problems import built_in, problems_of
from r1vl_jax.reward_lab.rescoring import groups_of, rescore, score_groups
from r1vl_jax.reward_lab.rows import is_run_row, read_rows, select
from r1vl_jax.reward_lab.scoring import Scorer, score_rows, scored_lines, summary
from r1vl_jax.reward_lab.tables import probe_table, rescore_table
from r1vl_jax.rewards import PRESETS, Rules, get_rules
from r1vl_jax.rewards.formats import FORMATS
from r1vl_jax.rewards.key_steps import key_step_groups

MAX_REPORTED = 20  # maximum number of bad rows listed on standard error

_DESCRIPTION = """\
Score answers with the step-wise rewards of R1-VL, and test the rules that score them.

IN has one JSON object a line, or is one JSON array of objects:
  completion   text, the answer to score, in the format that --answer-format names
  solution     text, the reference; its "### The final answer is:" section counts, or else what it marks as its answer:
               <answer>, \\boxed{}, ####, "Answer:", or the last line
  key_steps    {"Steps": [["a", "other words for a"], "b"]}, or that list; may be null or missing (then k = 0)
or IN is a run's rollouts.jsonl. Its rows have solution, key_steps and answers: [{"text": ...}, ...], a group of answers
to one question.

1. Scores. With single completions, one preset and OUT: OUT has the same rows in the same order with the same fields,
and these added (or replaced):
  accuracy, validity, reward            reward = accuracy + validity
  answer, expected                      the final answer of the completion (null: none) and of the solution
  reason                                the step of the answer check that decided whether they agree, and why
  key_steps_matched, key_steps_total    indices of the key steps that occur, and how many the question has
  faults                                why the answer is not valid; [] if it is
  status, note                          ok, timeout, error or crash (the last three score 0), and a remark

2. Report. With a run's rows, several presets, --json, or no OUT: every answer is scored under each preset. The report
shows the totals, and the --groups groups whose advantages differ most from those under the first preset. Single
completions in consecutive rows with the same question (or problem), solution and key_steps are a group; any other is a
group of one. OUT, if given, has every group as a line, in the form of --json.

3. Probe. With --probe: attacks on the rules, made from the problems in IN (rows with solution, key_steps, and question
or problem) or from five built-in ones. Attacks named "key steps ..." know the key steps; those named "the answer ..."
know the right answer, and change it. An honest wrong answer is complete and in order, in its own words, without key
steps, and wrong: it earns only its validity. Some attacks are not tried because no rule on texts can tell them from
honest work; under every preset they earn up to alpha: key steps among other words, whether these are sentences that
are true, guessed or denied ("it is not so that ..."), a template ("Thus ...") or words without meaning; and key steps
that the question already states, which any copy of the question contains. Leave such key steps out.
"""
_EPILOG = """\
JSON of the report:
  rules, alpha   as given; "totals" and each group's "rules" are objects with these names as keys
  totals         answers, groups, groups_of_one; means over the answers: reward, correct, validity, key_steps (k),
                 no_answer; reward_share, variance_share: {outcome, key_steps, validity}, their shares of the reward and
                 of its variance inside groups, or null; shares of the groups with several answers: zero_variance (all
                 rewards are equal), shaping_only (rewards differ, but all answers are right or all are wrong);
                 sign_flips: share of their answers whose advantage has another sign than under the first rules;
                 failures, key_step_faults: numbers of answers not scored, and of answers with faulty key steps
  groups         stage, step, event, source, row (if the row has them); question, expected, texts; disagreement: the sum
                 over answers of |advantage - advantage under the first rules|; rules: mean, std, reward_share,
                 variance_share, zero_variance, shaping_only, sign_flips (a number), and answers: [{reward, outcome,
                 key_steps, validity, k, correct, answer, reason, advantage, flip, faults, status}]
JSON of the probe:
  rules, alpha   as given
  problems       their number
  completions    name; attack (false: honest); rules, with an object for each name: mean and max reward over the
                 problems; excess: the largest difference to the honest wrong answer; problem: where that is (from 0);
                 exceeds: whether an attack earns more; failures: how many were not scored

Examples:
  python -m r1vl_jax.score --rules paper answers.jsonl scored.jsonl
  python -m r1vl_jax.score --rules paper robust released --stage step_grpo --steps 30:40 runs/quickstart/rollouts.jsonl
  python -m r1vl_jax.score --rules paper paper,require_answer=false --json runs/quickstart/rollouts.jsonl > report.json
  python -m r1vl_jax.score --rules paper robust --probe
  python -m r1vl_jax.score --rules robust --probe --limit 50 r1vl_10k.json

Exit code: 0, or 2 for unusable input or arguments.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, or 2 if the input or the arguments cannot be used."""
    args = _arguments(argv)
    try:
        rows, faults = ([], []) if args.input is None else read_rows(args.input, args.probe)
    except OSError as error:
        return _refuse(f"{args.input}: cannot be read: {error.strerror}")
    if args.output and args.output != "-" and args.input and _same_file(args.output, args.input):
        return _refuse(f"{args.output}: is the input; expected another file to write")
    try:
        _check_output(args.output)
    except OSError as error:
        return _refuse(f"{args.output}: cannot be written: {error.strerror}")
    for fault in faults[:MAX_REPORTED]:
        print(fault, file=sys.stderr)
    if len(faults) > MAX_REPORTED:
        print(f"... and {len(faults) - MAX_REPORTED} more bad rows", file=sys.stderr)
    if faults and not args.skip_bad:
        return _refuse(f"{len(faults)} bad rows, nothing scored; --skip-bad leaves them out")
    try:
        rows = select(rows, args.input or "the built-in problems", args.stage, args.steps, args.limit)
        scorer = Scorer(dict(args.rules), args.alpha, args.workers, args.timeout)
        if args.probe:
            _probe(rows, scorer, args)
        elif args.output and not args.json and len(args.rules) == 1 and not any(map(is_run_row, rows)):
            _score(rows, scorer, args, len(faults))
        else:
            _report(rows, scorer, args)
    except RowError as error:
        return _refuse(str(error))
    return 0


def _refuse(message: str) -> int:
    """Prints a message on standard error. Returns 2, the exit code for unusable input."""
    print(message, file=sys.stderr)
    return 2


def _score(rows: list[dict[str, Any]], scorer: Scorer, args: argparse.Namespace, skipped: int) -> None:
    """Writes the rows with their scores to OUT, and a summary to standard error."""
    scores = score_rows(rows, scorer)
    with _output(args.output) as out:
        out.writelines(scored_lines(rows, scores))
    print(summary(scores, args.rules[0][0], skipped), file=sys.stderr)


def _report(rows: list[dict[str, Any]], scorer: Scorer, args: argparse.Namespace) -> None:
    """Prints the report of all groups, and writes each group as a line of OUT if OUT is given."""
    if args.output == "-":
        raise RowError("OUT.jsonl: expected a file, got -: the report goes to standard output")
    groups = groups_of(rows)
    if not groups:
        raise RowError(f"{args.input}: no usable row, expected at least one to report on")
    report = rescore(groups, score_groups(groups, scorer))
    if args.output:
        with _output(args.output) as out:
            out.writelines(json.dumps(group) + "\n" for group in report["groups"])
    shown = report | {"alpha": args.alpha, "groups": report["groups"][: args.groups]}
    _print(json.dumps(shown, indent=1) + "\n" if args.json else rescore_table(report, args.groups))


def _probe(rows: list[dict[str, Any]], scorer: Scorer, args: argparse.Namespace) -> None:
    """Prints the rewards of the attacks on the problems in `rows`, or on the built-in problems if there is no input."""
    if args.input is not None and not rows:
        raise RowError(f"{args.input}: no usable row, expected at least one problem")
    problems = problems_of(rows, args.answer_format) or built_in(args.answer_format)
    if bare := sum(not key_step_groups(problem.key_steps)[0] for problem in problems):
        print(f"{bare} of {len(problems)} problems have no key steps to attack with", file=sys.stderr)
    report = probe(problems, scorer)
    _print(json.dumps(report | {"alpha": args.alpha}, indent=1) + "\n" if args.json else probe_table(report))


def _print(text: str) -> None:
    """Writes a text to standard output. Characters that standard output cannot encode are written as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _same_file(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _check_output(path: str | None) -> None:
    """Raises OSError if OUT cannot be written. Called before scoring, because scoring may take long."""
    if path not in ("-", None):
        with atomic_write(path, replace=False):
            pass


def _output(path: str) -> contextlib.AbstractContextManager[TextIO]:
    return contextlib.nullcontext(sys.stdout) if path == "-" else atomic_write(path)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m r1vl_jax.score",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="IN", nargs="?", help="answers or problems; - reads standard input")
    parser.add_argument(
        "output", metavar="OUT.jsonl", nargs="?", help="written completely or not at all; - writes standard output"
    )
    rules = f"{', '.join(PRESETS)}; options after commas; several presets are compared (default: paper)"
    parser.add_argument("--rules", metavar="PRESET[,OPTION=true|false]", type=_rules, action="append", help=rules)
    parser.add_argument(
        "--answer-format", choices=tuple(FORMATS), default="r1vl", help="format of the answers (default: r1vl)"
    )
    parser.add_argument("--alpha", type=non_negative_float, default=0.1, help="weight of the key steps (default: 0.1)")
    parser.add_argument(
        "--stage", help="only a run's rows of this stage, or heldout (default: all; without --steps not heldout)"
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--step", metavar="N", dest="steps", type=_step, help="only a run's rows of step N")
    steps.add_argument(
        "--steps", metavar="A:B", type=_steps, help="only a run's rows from step A to step B, both included"
    )
    parser.add_argument(
        "--limit", metavar="N", type=positive_int, help="only the first N rows, after --stage and --steps"
    )
    parser.add_argument("--groups", metavar="N", type=non_negative_int, default=5, help="groups to show (default: 5)")
    parser.add_argument("--probe", action="store_true", help="score attacks on the rules")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=workers, default=cores, help=f"worker processes (default: {cores}, the number of cores)"
    )
    parser.add_argument("--timeout", type=seconds, default=20.0, help="seconds for one answer (default: 20)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be used, and count them")
    args = parser.parse_intermixed_args(_one_by_one(sys.argv[1:] if argv is None else argv))
    args.rules = args.rules or [_rules("paper")]
    try:
        args.rules = [(name, get_rules(rules, answer_format=args.answer_format)) for name, rules in args.rules]
    except ValueError as error:
        parser.error(f"argument --answer-format: {error}")
    names = [name for name, _ in args.rules]
    if len(set(names)) < len(names):
        parser.error(f"argument --rules: expected each once, got {' '.join(names)}")
    if args.input is None and not args.probe:
        parser.error("argument IN: missing; expected a file, or - for standard input (only --probe can do without)")
    if args.output is not None and args.probe:
        parser.error(f"argument OUT.jsonl: {args.output!r}; expected none, as --probe reports on standard output")
    return args


def _one_by_one(argv: Sequence[str]) -> list[str]:
    """Rewrites `--rules a b IN` as `--rules a --rules b IN`: argparse cannot tell where the list of presets ends."""
    words: list[str] = []
    for word in argv:
        more = len(words) > 1 and words[-2] == "--rules" and word.partition(",")[0] in PRESETS
        words += ["--rules", word] if more else [word]
    return words


def _rules(text: str) -> tuple[str, Rules]:
    """Parses a value of --rules, such as "paper" or "paper,require_answer=false". Returns the text and its rules."""
    preset, *pairs = text.split(",")
    options = {}
    for name, sign, value in (pair.partition("=") for pair in pairs):
        if not sign or value not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{text!r}: expected OPTION=true or OPTION=false after each comma")
        options[name] = value == "true"
    try:
        return text, get_rules(preset, options)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _step(text: str) -> tuple[int, int]:
    """Parses the value N of --step. Returns the range from N to N."""
    step = non_negative_int(text)
    return step, step


def _steps(text: str) -> tuple[float, float]:
    """Parses the value A:B of --steps. Returns (A, B); a missing A is 0, a missing B is infinite."""
    low, colon, high = text.partition(":")
    if not colon or not low + high:
        raise argparse.ArgumentTypeError(f"expected A:B, A: or :B, got {text!r}")
    return non_negative_int(low or "0"), non_negative_int(high) if high else math.inf


if __name__ == "__main__":
    sys.exit(main())
