"""Reads key steps from a model's reply: JSON, faulty JSON, a Python literal or a list, with text around it.

    Sure! ```json {"Steps": [["AD is a median", "median is AD"], "equal area",]} ```
    Steps: 1. AD is a median 2. equal area

and the reply to R1-VL's own prompt, see elements.py.

The form of a reply may be faulty, but no key step is invented: a reply without key steps raises RowError.
"""

from __future__ import annotations

import json
import re
from typing import Any

from r1vl_jax.common.text import one_line
from r1vl_jax.errors import RowError
from r1vl_jax.keysteps.elements import elements_in, read_elements
from r1vl_jax.keysteps.literals import restored, texts_in, values_in
from r1vl_jax.keysteps.rows import Groups

MAX_CHARS = 100_000  # a reply is cut to this length, because the worst case takes quadratic time

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)
_ESCAPED_LIST = re.compile(r'[\[{]\s*\\"')
_STEPS_KEY = re.compile(r"\W*(?:key)?[\s_-]*steps?\W*", re.I)
_LABEL = re.compile(r"steps[\"']?\s*[:=]\s*(?=[\[{])", re.I)
_WORDS = re.compile(r"[^\W\d]{2}|[=<>]")
_NUMBERED = re.compile(r"(?:^|(?<=\s))\**(?:step\s+)?(\d{1,3})\s*[.):]\**\s+", re.I)
_BULLET = re.compile(r"^\s*[-*•]\s+(.+)$", re.M)


def read_groups(text: str) -> Groups:
    """Returns the groups of alternatives in a model's reply.

    Raises:
      RowError: the reply has no groups. The message quotes the start of the reply.
    """
    body = _decoded(_THOUGHT.sub("", text[:MAX_CHARS]))
    values = list(values_in(body))
    named = [groups for groups in map(groups_in, filter(_has_steps, values)) if groups]
    elements = read_elements(body)
    label = _LABEL.search(body)
    if named:
        best = named[-1]
    elif elements is not None:
        best = elements
    elif label:  # "Steps: [...]" without braces. If the list was cut off, no part of it may be used as the whole list
        best = groups_in(next(values_in(body[label.end() :], starts=1), None))
    else:
        best = next((groups for groups in map(groups_in, values) if _says_something(groups)), None) or _listed(body)
    if not best:
        raise RowError(f"no key steps in the text that starts {one_line(text, 120)!r}")
    return best


def _decoded(text: str) -> str:
    """Returns the text inside a JSON string. Of any other text, removes backslashes before the quotes of lists."""
    if text.strip()[:1] == '"':
        try:
            inner = json.loads(text, strict=False)
        except ValueError:
            pass
        else:
            return inner
    return text.replace('\\"', '"') if _ESCAPED_LIST.search(text) else text


def groups_in(value: Any) -> Groups:
    """Returns the groups in a parsed value.

    The value is a list or an object, also under the key "Steps". Each item is a group: a text, or a value with texts.
    """
    named = _named_steps(value)
    if isinstance(named, str):
        return _listed(named) or groups_in([named])
    if named is not None:
        value = named
    elements = elements_in(value)
    if elements is not None:
        return elements
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    groups = [[text for text in map(restored, texts_in(item)) if text] for item in items]
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
