"""The command line of r1vl_jax.keysteps: reads the arguments, picks the work, and hands it to jobs.run."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from r1vl_jax.common.arguments import finite_float, non_negative_int, positive_float, positive_int
from r1vl_jax.common.endpoint import Endpoint
from r1vl_jax.keysteps import lint, prompts
from r1vl_jax.keysteps.augment import augment_row
from r1vl_jax.keysteps.convert import FIELDS, convert_row
from r1vl_jax.keysteps.jobs import Job, run
from r1vl_jax.keysteps.refine import refine_row
from r1vl_jax.keysteps.rows import InputError, read_rows
from r1vl_jax.keysteps.rules import rules_row

_DESCRIPTION = """\
Make the key steps of R1-VL-10K rows: what the answers of StepGRPO are paid for on the way.

A usual course:
  python -m r1vl_jax.keysteps extract rows.json made.jsonl --url http://localhost:8000/v1 --model my-model
  python -m r1vl_jax.keysteps refine  made.jsonl  short.jsonl
  python -m r1vl_jax.keysteps augment short.jsonl final.jsonl
  python -m r1vl_jax.keysteps lint    final.jsonl

or, with no model at all, `rules` in place of the first. `NAME --help` says more about each.
"""
_FILES = """\

IN is a JSON array or JSONL of rows {"image_path", "problem", "solution", "key_steps"}; all other fields are kept.
OUT is JSONL, or a JSON array where its name ends in .json. Image paths stay as they are, so write OUT beside IN.

Finished rows are kept at once in OUT.partial. Interrupted, or with rows left by --limit or failed, the same command
goes on with the rest. A row that fails stays in OUT as it was, and OUT.failed.jsonl says why; what is no JSON object is
left out. Rows count from 0.
Exit code: 0; 1 if rows failed; 2 if the input, the arguments or the endpoint are unusable; 130 on Ctrl-C.
"""
# Of each: one line, what else there is to know, an example.
_TEXTS = {
    "extract": (
        "ask a model for the key steps of each solution",
        """\
OPENAI_BASE_URL and OPENAI_MODEL stand in for --url and --model. The key comes from OPENAI_API_KEY alone; a server of
your own mostly needs none.""",
        "extract rows.json made.jsonl --url http://localhost:8000/v1 --model my-model --limit 20",
    ),
    "rules": (
        "take key steps from each solution without any model",
        """\
Equations ("12/2 = 6") and named relations ("AD is a median") of the "### Step k" sections, as they stand there. None
is in the question, and each is found in the solution under every preset of the rewards.""",
        "rules rows.json made.jsonl --per-step 2",
    ),
    "refine": (
        "shorten key steps and drop what is there twice",
        """\
By rule: numbering, labels, quotes, "So", "Therefore", closing marks, empty and repeated texts go. With --url or --model
a model shortens them first; where its reply does not fit, the rules alone do, and the summary counts it. Refine before
you augment: texts that differ only in LaTeX or spacing count as repeated here.""",
        "refine made.jsonl short.jsonl",
    ),
    "augment": (
        "add other ways to say each key step",
        """\
By rule: LaTeX as plain text, sides and terms exchanged, signs for words and words for signs, other spacing. With --url
or --model a model's wordings come before those.""",
        "augment short.jsonl final.jsonl --max-alternatives 6",
    ),
    "convert": (
        "turn raw model output into R1-VL-10K rows",
        """\
Reads image or images as image_path, question as problem, and key steps from a text such as '{"Steps": [...]}',
"Steps: 1. ... 2. ...", a fenced block or the text of a Python dict.""",
        "convert raw.jsonl rows.jsonl --field response",
    ),
}
_WITH_ENDPOINT = ("extract", "refine", "augment")
_LINT = """\
Report what is wrong with key steps; nothing is written.
Exit code: 0; 1 for findings under --strict; 2 for unusable input.

Example:
  python -m r1vl_jax.keysteps lint final.jsonl --strict

Findings:
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code."""
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
    """The work that the arguments ask for, and the settings that its result depends on."""
    endpoint = _endpoint(args)
    settings: dict[str, Any] = {}
    if endpoint is not None:
        settings = {"model": endpoint.model, "temperature": args.temperature, "max_tokens": args.max_tokens}
    if args.command == "extract":
        prompt = prompts.read_prompt(args.prompt) if args.prompt else prompts.EXTRACT
        images = Path(args.input).parent if args.image else None
        settings |= {"prompt": hashlib.sha256(prompt.encode()).hexdigest()[:16], "image": args.image}
        work = partial(prompts.extract, endpoint=endpoint, prompt=prompt, images=images)
    elif args.command == "refine":
        work = partial(prompts.refine, endpoint=endpoint) if endpoint else refine_row
    elif args.command == "augment":
        settings["max_alternatives"] = most = args.max_alternatives
        by_model = partial(prompts.augment, endpoint=endpoint, most=most)
        work = by_model if endpoint else partial(augment_row, most=most)
    elif args.command == "rules":
        settings["per_step"] = args.per_step
        work = partial(rules_row, per_step=args.per_step)
    else:
        settings["fields"] = fields = [args.field] if args.field else list(FIELDS)
        work = partial(convert_row, fields=fields)
    return Job(args.command, settings, work, args.concurrency if endpoint else 0)


def _endpoint(args: argparse.Namespace) -> Endpoint | None:
    """The endpoint of the arguments and the environment; None for work by rule."""
    if args.command not in _WITH_ENDPOINT or (args.command != "extract" and not (args.url or args.model)):
        return None
    url, model = args.url or os.environ.get("OPENAI_BASE_URL"), args.model or os.environ.get("OPENAI_MODEL")
    for value, option, variable in ((url, "--url", "OPENAI_BASE_URL"), (model, "--model", "OPENAI_MODEL")):
        if not value:
            raise InputError(f"no {option} and no {variable} in the environment; expected one of them")
    sampling = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    try:
        return Endpoint(url, model, timeout=args.timeout, retries=args.retries, **sampling)
    except ValueError as error:
        raise InputError(str(error)) from error


def _lint(args: argparse.Namespace) -> int:
    rows, _ = read_rows(args.input)
    usable = [(row.number, row.value) for row in rows if row.value is not None]
    found = [lint.Finding(row.number, None, "unusable", row.fault) for row in rows if row.value is None]
    bar = tqdm(usable, unit="row", desc="lint", file=sys.stderr)
    found += lint.lint_rows(bar, max_groups=args.max_groups, common_share=args.common_share)
    found.sort(key=lambda finding: finding.row)
    if args.json:
        print(json.dumps([{"file": args.input, **dataclasses.asdict(finding)} for finding in found], indent=1))
    else:
        for one in found:
            group = "" if one.group is None else f", group {one.group}"
            print(f"{args.input}, row {one.row}{group}: {one.kind}: {one.detail}".encode("utf-8", "replace").decode())
        print("\n" * bool(found) + _table(found, len(rows)))
    return 1 if found and args.strict else 0


def _table(found: list[lint.Finding], rows: int) -> str:
    counts = lint.counts(found)
    lines = [f"{counts[kind]:>8}  {kind:<10} {what}" for kind, what in lint.KINDS.items() if counts[kind]]
    touched = len({finding.row for finding in found})
    return "\n".join([*lines, f"{len(found)} findings in {touched} of {rows} rows"])


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m r1vl_jax.keysteps", description=_DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    made = {}
    for name, (line, more, example) in _TEXTS.items():
        text = f"{line[0].upper()}{line[1:]}.\n{more}\n\nExample:\n  python -m r1vl_jax.keysteps {example}\n{_FILES}"
        made[name] = command = commands.add_parser(name, help=line, description=text, formatter_class=raw)
        command.add_argument("input", metavar="IN", help="rows to read")
        command.add_argument("output", metavar="OUT", help="rows to write; they appear when all is done")
        command.add_argument("--limit", type=positive_int, metavar="N", help="only the first N rows, to try it out")
        command.add_argument("--overwrite", action="store_true", help="replace OUT and start anew")
        if name in _WITH_ENDPOINT:
            _add_endpoint(command.add_argument_group("the model, an OpenAI-compatible endpoint"))
    made["extract"].add_argument("--prompt", metavar="FILE", help="a prompt of your own, with {problem} and {solution}")
    made["extract"].add_argument("--image", action="store_true", help="show the model the image, too")
    made["rules"].add_argument(
        "--per-step", type=positive_int, default=3, metavar="N", help="key steps of a step at most (3)"
    )
    most = "alternatives of a group at most, the given ones among them (8)"
    made["augment"].add_argument("--max-alternatives", type=positive_int, default=8, metavar="N", help=most)
    field = f"the field that has the key steps (default: the first there of {', '.join(FIELDS)})"
    made["convert"].add_argument("--field", metavar="NAME", help=field)
    kinds = "\n".join(f"  {kind:<10} {what}" for kind, what in lint.KINDS.items())
    line = "report what is wrong with key steps"
    checker = commands.add_parser("lint", help=line, description=_LINT + kinds, formatter_class=raw)
    checker.add_argument("input", metavar="IN", help="rows to read, a JSON array or JSONL")
    checker.add_argument("--json", action="store_true", help="findings as JSON on standard output")
    checker.add_argument("--strict", action="store_true", help="exit code 1 if there are findings")
    checker.add_argument(
        "--max-groups", type=positive_int, default=15, metavar="N", help="groups of a row at most (15)"
    )
    share = "a text in the solutions of more than this share of the other rows is too general (0.2)"
    checker.add_argument("--common-share", type=positive_float, default=0.2, metavar="X", help=share)
    return parser


def _add_endpoint(group: Any) -> None:
    group.add_argument("--url", help="base URL (default for extract: OPENAI_BASE_URL)")
    group.add_argument("--model", help="the model's name there (default: OPENAI_MODEL)")
    group.add_argument("--concurrency", type=positive_int, default=8, metavar="N", help="requests at a time (8)")
    group.add_argument(
        "--retries", type=non_negative_int, default=4, metavar="N", help="tries of a request after its first (4)"
    )
    group.add_argument("--timeout", type=positive_float, default=120.0, metavar="S", help="seconds for one try (120)")
    group.add_argument("--temperature", type=finite_float, default=0.0, metavar="X", help="of sampling (0)")
    group.add_argument("--max-tokens", type=positive_int, default=2048, metavar="N", help="of a reply (2048)")


if __name__ == "__main__":
    sys.exit(main())
