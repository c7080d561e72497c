"""Reads key steps from a model's reply: JSON, faulty JSON, a Python literal or a list, with text around it.

    Sure! ```json {"Steps": [["AD is a median", "median is AD"], "equal area",]} ```
    Steps: 1. AD is a median 2. equal area

The form of a reply may be faulty, but no key step is invented: a reply without key steps raises RowError.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

from r1vl_jax.common.text import one_line
from r1vl_jax.errors import RowError
from r1vl_jax.keysteps.rows import Groups

MAX_CHARS = 100_000  # a reply is cut to this length, because the worst case takes quadratic time
_MAX_STARTS = 64  # maximum number of opening brackets at which parsing is tried

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)
_OPEN = re.compile(r"[\[{]")
_ESCAPE = re.compile(r'\\(?:["\\/]|u[0-9a-fA-F]{4}|[bfnrt])|\\')
_AFTER_TEXT = re.compile(r"\s{0,40}(?:[\])},:]|\Z)")
_TRAILING_COMMA = re.compile(r",(?=\s*[\]}])")
_STEPS_KEY = re.compile(r"\W*(?:key)?[\s_-]*steps?\W*", re.I)
_LABEL = re.compile(r"steps[\"']?\s*[:=]\s*(?=[\[{])", re.I)
_WORDS = re.compile(r"[^\W\d]{2}|[=<>]")
_NUMBERED = re.compile(r"(?:^|(?<=\s))\**(?:step\s+)?(\d{1,3})\s*[.):]\**\s+", re.I)
_BULLET = re.compile(r"^\s*[-*•]\s+(.+)$", re.M)

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


def read_groups(text: str) -> Groups:
    """Returns the groups of alternatives in a model's reply.

    Raises:
      RowError: the reply has no groups. The message quotes the start of the reply.
    """
    body = _THOUGHT.sub("", text[:MAX_CHARS])
    values = list(_values(body))
    named = [groups for groups in map(groups_in, filter(_has_steps, values)) if groups]
    label = _LABEL.search(body)
    if named:
        best = named[-1]
    elif label:  # "Steps: [...]" without braces. If the list was cut off, no part of it may be used as the whole list
        best = groups_in(next(_values(body[label.end() :], starts=1), None))
    else:
        best = next((groups for groups in map(groups_in, values) if _says_something(groups)), None) or _listed(body)
    if not best:
        raise RowError(f"no key steps in the text that starts {one_line(text, 120)!r}")
    return best


def groups_in(value: Any) -> Groups:
    """Returns the groups in a parsed value.

    The value is a list or an object, also under the key "Steps". Each item is a group: a text, or a value with texts.
    """
    named = _named_steps(value)
    if isinstance(named, str):
        return _listed(named) or groups_in([named])
    if named is not None:
        value = named
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    groups = [[text for text in map(_restored, _texts(item)) if text] for item in items]
    return [group for group in groups if group]


def _named_steps(value: Any) -> Any:
    """Returns the value of the key "Steps", in any spelling; None if there is no such key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(name, str) and _STEPS_KEY.fullmatch(name):
                deeper = _named_steps(inner)
                return inner if deeper is None else deeper
    return None


def _has_steps(value: Any) -> bool:
    return _named_steps(value) is not None


def _says_something(groups: Groups) -> bool:
    """Returns whether a text in the groups has a word or a relation. "[1]" has none: it is a footnote."""
    return any(_WORDS.search(text) for group in groups for text in group)


def _texts(item: Any) -> Iterator[str]:
    """Yields all texts and numbers inside a value, as texts."""
    if isinstance(item, str):
        yield item
    elif isinstance(item, int | float) and not isinstance(item, bool):
        yield str(item)
    elif isinstance(item, dict | list | tuple):
        for inner in item.values() if isinstance(item, dict) else item:
            yield from _texts(inner)


def _restored(text: str) -> str:
    """Restores the backslashes of LaTeX commands that JSON has read as escapes."""
    return _BROKEN.sub(lambda match: "\\" + _CONTROLS[match[0][0]] + match[0][1:], text).strip()


def _values(text: str, starts: int = _MAX_STARTS) -> Iterator[Any]:
    """Yields the outermost objects and lists in a text that can be parsed, from at most `starts` opening brackets."""
    place = 0
    for _ in range(starts):
        opening = _OPEN.search(text, place)
        if opening is None:
            return
        end = _closing(text, opening.start())
        value = None if end is None else _parsed(text[opening.start() : end])
        if end is None or value is None:
            place = opening.end()
        else:
            yield value
            place = end


def _closing(text: str, start: int) -> int | None:
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


def _parsed(text: str) -> Any:
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


def _listed(text: str) -> Groups:
    """Returns one group per item of a numbered list, or else of a bullet list.

    Each alternative is one line. Bullets below an item of a numbered list are further alternatives of its group.
    """
    items, number = [], 0
    for match in _NUMBERED.finditer(text):
        if int(match[1]) == number + 1:
            number += 1
            items.append(match)
    if not items:
        bullets = [_plain(item) for item in _BULLET.findall(text)]
        return [[item] for item in bullets if item] if len(bullets) > 1 else []
    ends = [match.start() for match in items[1:]] + [len(text)]
    groups = []
    for match, end in zip(items, ends, strict=True):
        lines = text[match.end() : end].split("\n\n")[0].split("\n")
        group = [_plain(line) for line in (lines[0], *(_BULLET.findall("\n".join(lines[1:]))))]
        groups.append([line for line in group if line])
    return [group for group in groups if group]


def _plain(line: str) -> str:
    return line.replace("**", "").replace("`", "").strip()
