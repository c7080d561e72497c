"""Formats the numbers of check.json as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r1vl_jax.common.text import shown
from r1vl_jax.data_check.numbers import ALIKE, SERIES
from r1vl_jax.data_check.records import REASONS
from r1vl_jax.keysteps import lint

INDENT = " " * 13
NAMED = 5  # maximum number of rows of each kind named in the text; check.json has all


def report_text(numbers: dict[str, Any], named: int | None) -> str:
    """Formats the whole report. `named`: maximum number of rows to name of each kind; None: all."""
    blocks = [set_text(key, part, named) for key, part in numbers["sets"].items()]
    blocks += [leak_text(key, alike, named) for key, alike in numbers["heldout_like"].items()]
    dropped, leaked = numbers["rows_dropped"], numbers["rows_leaked"]
    if not numbers["complete"]:
        blocks += ["interrupted: a report on what had been read; no file is written"]
    elif numbers["heldout_like"]:
        blocks += [f"training drops {dropped:,} rows and sees {leaked:,} held-out rows"]
    else:
        blocks += [f"training drops {dropped:,} rows"]
    return "\n\n".join(blocks)


def set_text(key: str, numbers: dict[str, Any], named: int | None) -> str:
    """Formats the numbers of one data set."""
    budgets = [f"{name} {value:,}" for limits in numbers["budgets"].values() for name, value in limits.items()]
    lines = [f"{key}: {numbers['source']}", f"{INDENT}{', '.join(budgets[:-2])}", f"{INDENT}{', '.join(budgets[-2:])}"]
    lines += [f"{INDENT}{note.removeprefix(numbers['source'] + ': ')}" for note in numbers["notes"]]
    lines += _row_lines(numbers, named)
    lines += _image_lines(numbers)
    lines += ["", *_quantile_table(numbers["quantiles"])]
    for name, batches in numbers["batches"].items():
        lines += ["", *_batch_lines(name, batches)]
    lines += ["", "  rows like an earlier one", *_alike_table(numbers["alike"], named)]
    if "key_steps" in numbers:
        steps = numbers["key_steps"]
        lines += ["", f"  key steps: {len(steps['findings']):,} findings in {steps['rows']:,} rows"]
        lines += [_line(count, f"{kind}: {lint.KINDS[kind]}") for kind, count in steps["kinds"].items()]
        lines += _some([_finding(finding) for finding in steps["findings"]], named)
    if "unreachable" in numbers:
        questions = numbers["unreachable"]
        lines += ["", f"  solutions: {len(questions):,} that earn no accuracy when they are scored against themselves"]
        lines += _some([_question(question) for question in questions], named)
    return "\n".join(lines)


def leak_text(key: str, alike: dict[str, Any], named: int | None) -> str:
    """Formats which held-out rows are like a row of the training set `key`."""
    lines = [f"data.heldout: rows like one of {key}", *_alike_table(alike, named)]
    if leaked := alike["both"]["rows"]:
        lines += [f"  LEAK: {leaked:,} held-out rows are also in {key}, with the same question and images"]
    return "\n".join(lines)


def _row_lines(numbers: dict[str, Any], named: int | None) -> list[str]:
    """Formats the numbers of rows, of rows left out, of dropped rows (with their errors) and of usable examples."""
    examples, source = numbers["examples"], numbers["source"]
    rows = ", ".join(["rows", *(f"{count:,} of {n} turn{'s' * (n != '1')}" for n, count in numbers["turns"].items())])
    if examples["read"] < examples["there"]:
        rows += f"; the first {examples['read']:,} of {examples['there']:,} examples"
    lines = [_line(numbers["rows"], rows)]
    lines += [_line(numbers["filtered"], "left out by drop_matching")]
    lines += [_line(sum(map(len, numbers["dropped"].values())), "dropped by training")]
    for reason, messages in numbers["dropped"].items():
        lines += [_line(len(messages), REASONS[reason][1], 4)]
        lines += _some([message.removeprefix(f"{source}, ") for message in messages], named)
    return [*lines, _line(numbers["usable"], "usable examples: an answer with all turns before it")]


def _image_lines(numbers: dict[str, Any]) -> list[str]:
    images = numbers["images"]
    each = ", ".join(f"{n} in {count:,}" for n, count in images["of_an_example"].items())
    lines = [_line(images["all"], f"images, {images['distinct']:,} different; of an example: {each}")]
    for change in ("shrunk", "enlarged"):
        share = images[change] / max(1, images["all"])
        lines += [_line(images[change], f"{change} to the pixel budget ({share:.1%})", 4)]
    return [*lines, _line(numbers["videos"], "videos")]


def _batch_lines(name: str, batches: dict[str, Any]) -> list[str]:
    """Formats the shapes of a plan's batches, and their padding."""
    lines = [f"  {name}: batches of one epoch on one device, shapes planned from {batches['planned_from']:,} examples"]
    for shape in batches["shapes"]:
        size = f"of {shape['prompt']} tokens a row and {shape['rows']} x {shape['patches']} patches"
        lines += [_line(shape["batches"], size + " (not planned)" * (not shape["planned"]))]
    shares = f"{batches['padding_tokens']:.1%} of the tokens, {batches['padding_patches']:.1%} of the patches"
    return [*lines, f"{INDENT}padding: {shares}"]


def _line(count: int, what: str, deeper: int = 0) -> str:
    """Formats a count and the name of the counted things. `deeper`: number of extra spaces before the count."""
    return f"{'':{deeper}}{count:>12,} {what}"


def _some(messages: Sequence[str], named: int | None) -> list[str]:
    """Formats the first `named` messages, one per line, and the number of further messages."""
    more = len(messages) - len(messages[:named])
    return [f"{INDENT}    {message}" for message in messages[:named]] + [f"{INDENT}    and {more:,} more"] * bool(more)


def _finding(finding: dict[str, Any]) -> str:
    group = "" if finding["group"] is None else f", group {finding['group']}"
    return f"row {finding['row']}{group}: {finding['kind']}: {finding['detail']}"


def _question(question: dict[str, Any]) -> str:
    why = f" ({question['why']})" if question["why"] else ""
    return f"row {question['row']}: {shown(question['expected'])}{why}"


def _alike_table(alike: dict[str, Any], named: int | None) -> list[str]:
    """Formats, for each kind of likeness, the number of rows and the pairs."""
    lines = []
    for kind, (label, _) in ALIKE.items():
        pairs = alike[kind]["pairs"]
        texts = [f"{second} like {first}" for first, second in pairs[:named]]
        texts += ["..."] * (len(texts) < len(pairs))
        lines += [_line(alike[kind]["rows"], f"{label}{': ' * bool(pairs)}{', '.join(texts)}")]
    return lines


def _quantile_table(quantiles: dict[str, Any]) -> list[str]:
    heads = ("min", "5%", "median", "mean", "95%", "max")
    lines = [f"{INDENT}{'':17}" + "".join(f"{head:>12}" for head in heads)]
    for series, (label, _) in SERIES.items():
        row = quantiles[series] or {}
        cells = "".join(f"{f'{row[head]:,.0f}' if row else '-':>12}" for head in heads)
        lines += [f"{INDENT}{label:<17}{cells}"]
    return lines
