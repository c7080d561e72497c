"""Runs the command line of r1vl_jax.keysteps: parses the arguments, chooses the function per row, calls jobs.run."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from r1vl_jax.common.arguments import Parser, non_negative_float, positive_float, positive_int, seconds, whole, workers
from r1vl_jax.common.endpoint import Endpoint
from r1vl_jax.keysteps import lint, prompts
from r1vl_jax.keysteps.augment import augment_row
from r1vl_jax.keysteps.convert import FIELDS, convert_row
from r1vl_jax.keysteps.jobs import Job, Made, run
from r1vl_jax.keysteps.refine import refine_row
from r1vl_jax.keysteps.rows import InputError, read_rows
from r1vl_jax.keysteps.rules import rules_row
from r1vl_jax.rewards.formats import FORMATS

Work = Callable[[dict[str, Any]], Made | dict[str, Any]]

_DESCRIPTION = """\
Make the key steps of R1-VL-10K rows. StepGRPO pays answers for the key steps that they contain.

Usual order:
  python -m r1vl_jax.keysteps extract rows.json made.jsonl --url http://localhost:8000/v1 --model my-model
  python -m r1vl_jax.keysteps refine  made.jsonl  short.jsonl
  python -m r1vl_jax.keysteps augment short.jsonl final.jsonl
  python -m r1vl_jax.keysteps lint    final.jsonl

or, without a model, `rules` instead of `extract`. `NAME --help` describes each command.
"""
_FILES = """\

IN is a JSON array or JSONL of rows {"image_path", "problem", "solution", "key_steps"}; all other fields are kept.
OUT is JSONL, or a JSON array if its name ends in .json. Image paths are not changed, so write OUT to the folder of IN.

Each finished row is saved at once in OUT.partial. After an interruption, --limit or failed rows, the same command goes
on with the missing rows. A row that fails stays in OUT as it was, and OUT.failed.jsonl says why; an entry that is not a
JSON object is left out. Rows count from 0.
Exit code: 0; 1 if rows failed; 2 if the input, the arguments or the endpoint cannot be used; 130 after Ctrl-C.
"""
# For each command: a summary line, more text, and an example.
_TEXTS = {
    "extract": (
        "ask a model for the key steps of each solution",
        """\
OPENAI_BASE_URL and OPENAI_MODEL replace --url and --model if these are missing. The key is always read from
OPENAI_API_KEY; your own server usually needs none.""",
        "extract rows.json made.jsonl --url http://localhost:8000/v1 --model my-model --limit 20",
    ),
    "rules": (
        "take key steps from each solution without any model",
        """\
Takes equations ("12/2 = 6") and named relations ("AD is a median") word for word from the steps. None occurs in the
question, and each occurs in the solution under every preset of the rewards.""",
        "rules rows.json made.jsonl --per-step 2",
    ),
    "refine": (
        "shorten key steps and drop repeated ones",
        """\
By rule: removes numbering, labels, quotes, "So", "Therefore", closing marks, empty and repeated texts. With --url or
--model, a model shortens them first; if its reply does not fit, only the rules apply, and the summary counts such rows.
Refine before you augment: texts that differ only in LaTeX or spacing count as repeated here.""",
        "refine made.jsonl short.jsonl",
    ),
    "augment": (
        "add other ways to state each key step",
        """\
By rule: LaTeX as plain text, exchanged sides and terms, signs for words and words for signs, other spacing. With --url
or --model, a model's wordings are added before these.""",
        "augment short.jsonl final.jsonl --max-alternatives 6",
    ),
    "convert": (
        "turn raw model output into R1-VL-10K rows",
        """\
Renames image or images to image_path and question to problem, and reads key steps from a text such as
'{"Steps": [...]}', "Steps: 1. ... 2. ...", a fenced block or the text of a Python dict. It also reads replies to the
prompt that R1-VL published: 'Image Description: [...]; Rationales: [...]; Step 1: ["a", "b"], Step 2: ["c"]'. Each text
of a step is then one key step, and the other two lists are dropped.""",
        "convert raw.jsonl rows.jsonl --field response",
    ),
}
_WITH_ENDPOINT = ("extract", "refine", "augment")
_LINT = """\
Report what is wrong with key steps; no file is written.
Exit code: 0; 1 if there are findings and --strict is given; 2 if the input cannot be used.

Example:
  python -m r1vl_jax.keysteps lint final.jsonl --strict

Findings:
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "lint":
            return _lint(args)
        return run(_job(args), args.input, args.output, limit=args.limit, overwrite=args.overwrite)
    except (InputError, OSError) as error:
        print(f"keysteps {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"keysteps {args.command}: interrupted", file=sys.stderr)
        return 130


def _job(args: argparse.Namespace) -> Job:
    """Returns the job of the command: the function to call on each row, and the settings that its result depends on.

    A job that uses a model runs in --concurrency threads.
    """
    endpoint = _endpoint(args)
    if endpoint is None:
        settings, work = _work_by_rule(args)
        return Job(args.command, settings, work)
    settings, work = _work_by_model(args, endpoint)
    sampling = {"model": endpoint.model, "temperature": args.temperature, "max_tokens": args.max_tokens}
    return Job(args.command, sampling | settings, work, args.concurrency)


def _work_by_model(args: argparse.Namespace, endpoint: Endpoint) -> tuple[dict[str, Any], Work]:
    """Returns the settings and the function per row of `extract`, and of `refine` and `augment` with a model."""
    if args.command == "extract":
        prompt = prompts.read_prompt(args.prompt) if args.prompt else prompts.EXTRACT
        images = Path(args.input).parent if args.image else None
        settings = {"prompt": hashlib.sha256(prompt.encode()).hexdigest()[:16], "image": args.image}
        options = {"prompt": prompt, "images": images, "allow_outside": args.allow_outside}
        return settings, partial(prompts.extract, endpoint=endpoint, **options)
    if args.command == "refine":
        return {}, partial(prompts.refine, endpoint=endpoint)
    most = args.max_alternatives
    return {"max_alternatives": most}, partial(prompts.augment, endpoint=endpoint, most=most)


def _work_by_rule(args: argparse.Namespace) -> tuple[dict[str, Any], Work]:
    """Returns the settings and the function per row of a command that uses no model."""
    if args.command == "refine":
        return {}, refine_row
    if args.command == "augment":
        return {"max_alternatives": args.max_alternatives}, partial(augment_row, most=args.max_alternatives)
    if args.command == "rules":
        settings = {"per_step": args.per_step, "answer_format": args.answer_format}
        return settings, partial(rules_row, **settings)
    fields = [args.field] if args.field else list(FIELDS)
    return {"fields": fields}, partial(convert_row, fields=fields)


def _endpoint(args: argparse.Namespace) -> Endpoint | None:
    """Returns the endpoint that the arguments and the environment name; None if the command uses no model."""
    if args.command not in _WITH_ENDPOINT or (args.command != "extract" and not (args.url or args.model)):
        return None
    url = _given(args.url, "--url", "OPENAI_BASE_URL")
    model = _given(args.model, "--model", "OPENAI_MODEL")
    sampling = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    try:
        return Endpoint(url, model, timeout=args.timeout, retries=args.retries, **sampling)
    except ValueError as error:
        raise InputError(str(error)) from error


def _given(value: str | None, option: str, variable: str) -> str:
    """Returns the value of an option, or else of an environment variable. Raises InputError if both are missing."""
    value = value or os.environ.get(variable)
    if not value:
        raise InputError(f"no {option} and no {variable} in the environment; expected one of them")
    return value


def _lint(args: argparse.Namespace) -> int:
    """Runs the command `lint`: prints the findings and returns the exit code."""
    rows, _ = read_rows(args.input)
    usable = [(row.number, row.value) for row in rows if not row.fault]
    findings = [lint.Finding(row.number, None, "unusable", row.fault) for row in rows if row.fault]
    bar = tqdm(usable, unit="row", desc="lint", file=sys.stderr)
    limits = {"max_groups": args.max_groups, "common_share": args.common_share}
    findings += lint.lint_rows(bar, **limits, answer_format=args.answer_format)
    findings.sort(key=lambda finding: finding.row)
    if args.json:
        print(json.dumps([{"file": args.input, **dataclasses.asdict(finding)} for finding in findings], indent=1))
    else:
        for one in findings:
            group = "" if one.group is None else f", group {one.group}"
            print(f"{args.input}, row {one.row}{group}: {one.kind}: {one.detail}".encode("utf-8", "replace").decode())
        print("\n" * bool(findings) + _table(findings, len(rows)))
    return 1 if findings and args.strict else 0


def _table(findings: list[lint.Finding], rows: int) -> str:
    """Formats the number of findings per kind, and the number of rows that have a finding."""
    counts = lint.counts(findings)
    lines = [f"{counts[kind]:>8}  {kind:<10} {what}" for kind, what in lint.KINDS.items() if counts[kind]]
    touched = len({finding.row for finding in findings})
    return "\n".join([*lines, f"{len(findings)} findings in {touched} of {rows} rows"])


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m r1vl_jax.keysteps", description=_DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    made = {}
    for name, (line, more, example) in _TEXTS.items():
        text = f"{line[0].upper()}{line[1:]}.\n{more}\n\nExample:\n  python -m r1vl_jax.keysteps {example}\n{_FILES}"
        made[name] = command = commands.add_parser(name, help=line, description=text, formatter_class=raw)
        command.add_argument("input", metavar="IN", help="rows to read")
        command.add_argument("output", metavar="OUT", help="rows to write; the file appears when it is complete")
        command.add_argument("--limit", type=positive_int, metavar="N", help="only the first N rows, for a trial")
        command.add_argument("--overwrite", action="store_true", help="replace OUT and start over")
        if name in _WITH_ENDPOINT:
            _add_endpoint(command.add_argument_group("the model, an OpenAI-compatible endpoint"))
    made["extract"].add_argument("--prompt", metavar="FILE", help="your own prompt, with {problem} and {solution}")
    made["extract"].add_argument("--image", action="store_true", help="also send the image, from the folder of IN")
    made["extract"].add_argument("--allow-outside", action="store_true", help="also send images outside of that folder")
    made["rules"].add_argument(
        "--per-step", type=positive_int, default=3, metavar="N", help="largest number of key steps from one step (3)"
    )
    most = "largest number of alternatives in a group, including the given ones (8)"
    made["augment"].add_argument("--max-alternatives", type=positive_int, default=8, metavar="N", help=most)
    field = f"the field with the key steps (default: the first that a row has of {', '.join(FIELDS)})"
    made["convert"].add_argument("--field", metavar="NAME", help=field)
    _add_format(made["rules"])
    kinds = "\n".join(f"  {kind:<10} {what}" for kind, what in lint.KINDS.items())
    line = "report what is wrong with key steps"
    checker = commands.add_parser("lint", help=line, description=_LINT + kinds, formatter_class=raw)
    checker.add_argument("input", metavar="IN", help="rows to read, a JSON array or JSONL")
    _add_format(checker)
    checker.add_argument("--json", action="store_true", help="findings as JSON on standard output")
    checker.add_argument("--strict", action="store_true", help="exit code 1 if there are findings")
    checker.add_argument(
        "--max-groups", type=positive_int, default=15, metavar="N", help="largest number of groups in a row (15)"
    )
    share = "a text that occurs in the solutions of more than this share of the other rows is too general (0.2)"
    checker.add_argument("--common-share", type=positive_float, default=0.2, metavar="X", help=share)
    return parser


def _add_format(command: argparse.ArgumentParser) -> None:
    formats = f"where the steps of the solutions are: {', '.join(FORMATS)} (r1vl)"
    command.add_argument("--answer-format", choices=tuple(FORMATS), default="r1vl", help=formats)


def _add_endpoint(group: Any) -> None:
    """Adds the options of the endpoint to a group of arguments."""
    group.add_argument("--url", help="base URL (default for extract: OPENAI_BASE_URL)")
    group.add_argument("--model", help="the model's name on that server (default: OPENAI_MODEL)")
    group.add_argument("--concurrency", type=workers, default=8, metavar="N", help="requests at a time (8)")
    group.add_argument(
        "--retries", type=whole(0, 1000), default=4, metavar="N", help="tries of a request after the first (4)"
    )
    group.add_argument("--timeout", type=seconds, default=120.0, metavar="S", help="seconds for one try (120)")
    group.add_argument(
        "--temperature", type=non_negative_float, default=0.0, metavar="X", help="sampling temperature (0)"
    )
    group.add_argument(
        "--max-tokens", type=positive_int, default=2048, metavar="N", help="largest length of a reply (2048)"
    )


if __name__ == "__main__":
    sys.exit(main())
