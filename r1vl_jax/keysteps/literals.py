"""Finds the objects and lists in a text and parses them: JSON, JSON with small faults, or a Python literal."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

MAX_STARTS = 64  # maximum number of opening brackets at which parsing is tried

_OPEN = re.compile(r"[\[{]")
_ESCAPE = re.compile(r'\\(?:["\\/]|u[0-9a-fA-F]{4}|[bfnrt])|\\')
_AFTER_TEXT = re.compile(r"\s{0,40}(?:[\])},:]|\Z)")
_TRAILING_COMMA = re.compile(r",(?=\s*[\]}])")

# Models forget to double backslashes, so JSON reads "\frac" as a form feed and "rac". _BROKEN finds such texts.
_CONTROLS = {"\a": "a", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t", "\v": "v"}
_BROKEN = re.compile(
    r"\a(?:ngle|lpha|pprox|rc|st)(?![a-z])"
    r"|\x08(?:ar|ecause|egin|eta|ig|inom|ot|oxed|ullet)(?![a-z])"
    r"|\f(?:rac|orall)(?![a-z])"
    r"|\n(?:abla|eq?|eg|cong|mid|otin|parallel|u)(?![a-z])"
    r"|\r(?:ight|angle|ightarrow|ho)(?![a-z])"
    r"|\t(?:an|au|ext|extbf|frac|herefore|heta|ilde|imes|op?|riangle)(?![a-z])"
    r"|\v(?:ec|ert)(?![a-z])"
)


def restored(text: str) -> str:
    """Restores the backslashes of LaTeX commands that JSON has read as escapes."""
    return _BROKEN.sub(lambda match: "\\" + _CONTROLS[match[0][0]] + match[0][1:], text).strip()


def values_in(text: str, starts: int = MAX_STARTS) -> Iterator[Any]:
    """Yields the outermost objects and lists in a text that can be parsed, from at most `starts` opening brackets."""
    place = 0
    for _ in range(starts):
        opening = _OPEN.search(text, place)
        if opening is None:
            return
        end = closing(text, opening.start())
        value = None if end is None else parsed(text[opening.start() : end])
        if end is None or value is None:
            place = opening.end()
        else:
            yield value
            place = end


def closing(text: str, start: int) -> int | None:
    """Returns the end of the bracket at `start`; None if it is not closed.

    A quote counts only at a place at which a JSON string can begin or end.
    """
    depth, quote, before = 0, "", ""
    for i in range(start, len(text)):
        char = text[i]
        if quote:
            if char == quote and not _escaped(text, i) and _AFTER_TEXT.match(text, i + 1):
                quote = ""
        elif char in "\"'" and before in ("[", "{", ",", ":", "("):
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
            if depth == 0:
                return i + 1
        if not char.isspace():
            before = char
    return None


def _escaped(text: str, place: int) -> bool:
    backslashes = 0
    while text[place - 1 - backslashes] == "\\":
        backslashes += 1
    return backslashes % 2 == 1


def parsed(text: str) -> Any:
    """Parses JSON, JSON with small faults, or a Python literal. Returns a list or object; None if empty or no such."""
    doubled = _ESCAPE.sub(lambda match: "\\\\" if match[0] == "\\" else match[0], text)
    for parse, variant in (
        (_json, doubled),
        (_json, _TRAILING_COMMA.sub("", doubled)),
        (_literal, text),
    ):
        try:
            value = parse(variant)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return value if isinstance(value, dict | list) and value else None
    return None


def _json(text: str) -> Any:
    return json.loads(text, strict=False)


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of escapes such as \s
        return ast.literal_eval(text)


def texts_in(value: Any) -> Iterator[str]:
    """Yields all texts and numbers inside a value, as texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)
