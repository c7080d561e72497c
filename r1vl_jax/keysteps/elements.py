"""Reads the reply to the extraction prompt that R1-VL published (prompts/extract_key_steps.py in its repository).

    Key Elements:
    Image Description: ["parallel lines"]; Rationales: ["interior angles"]; Step 1: ["a + b = 180"], Step 2: ["b = 123"]

Each text in the list of a step is a key step. The lists of Image Description and Rationales are dropped, because key
steps are searched in the steps of an answer alone. Models vary the form: marks around the names, bullets, lists without
quotes, or one JSON object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from r1vl_jax.keysteps.literals import closing, parsed, restored, texts_in
from r1vl_jax.keysteps.rows import Groups

_TITLE = r"key[\s_]?elements?"
_SECTION = r"(?:image[\s_]?descriptions?|rationales?|step[\s_]?(?P<step>\d{1,3}))"
_MARKS = r"[\s\"'*_`]{0,9}"
_LABEL = re.compile(
    rf"(?<![A-Za-z]){_SECTION}{_MARKS}(?:[:=][\"'*_`]{{0,3}}|(?=\[))(?:{_MARKS}(?=(?P<list>\[)))?", re.I
)
_LINE_END = re.compile(r"\\n(?=[A-Z*#-])")  # a line end that was written as a backslash and "n"
_AFTER_LIST = re.compile(r"[ \t]*(?:[;,.}\"'*`\n]|\Z)")
_BULLET = re.compile(r"\s*[-*•]\s+(\S.*)")
_THOUSAND = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NOTHING = ("", "none", "n/a")


class _Section(NamedTuple):
    """One section of a text of the published form.

    Attributes:
      is_step: whether it is a step, and not one that is dropped.
      quoted: whether its name is in quotes, as in JSON.
      source: the text of its list, with brackets; "" if the list is not closed; None if no list follows the name.
      text: what follows the name, up to the next section.
    """

    is_step: bool
    quoted: bool
    source: str | None
    text: str


def read_elements(text: str) -> Groups | None:
    """Returns the key steps in a text of the published form; None if the text has another form.

    There are no groups if there is no step, if a list was cut off, or if a step has something else than a list, such as
    the sentences of an answer with the same headers: nothing is read by halves.
    """
    sections = list(_sections(_LINE_END.sub("\n", text)))
    steps = [section for section in sections if section.is_step]
    titled = re.search(_TITLE, text, re.I) is not None
    if not steps:
        return [] if any(section.source is not None for section in sections) else None
    if len(steps) == len(sections) and not titled and any(step.quoted or step.source is None for step in steps):
        return None
    groups: Groups = []
    for step in steps:
        items = _unlisted(step.text, titled) if step.source is None else _listed(step.source)
        if items is None:
            return []
        groups += items
    return groups


def elements_in(value: Any) -> Groups | None:
    """Returns the key steps in an object of the published form: its keys are the names of the sections; else None."""
    titled = False
    if isinstance(value, dict) and len(value) == 1:
        ((name, inner),) = value.items()
        titled = re.fullmatch(rf"\W*{_TITLE}\W*", str(name), re.I) is not None
        value = inner if titled else value
    if titled and isinstance(value, str):
        return read_elements(value)
    if not isinstance(value, dict):
        return None
    names = {name: re.fullmatch(rf"\W*{_SECTION}\W*", str(name), re.I) for name in value}
    if not titled and not any(match and not match["step"] for match in names.values()):
        return None
    return [group for name, match in names.items() if match and match["step"] for group in _groups(value[name])]


def _sections(text: str) -> Iterator[_Section]:
    label = _LABEL.search(text)
    while label is not None:
        source, end = None, label.end()
        if label["list"]:
            closed = closing(text, end)
            if closed is None:  # the rest of the text is not searched again for every other section
                yield _Section(bool(label["step"]), False, "", "")
                return
            if _AFTER_LIST.match(text, closed):
                source, end = text[end:closed], closed
        following = _LABEL.search(text, end)
        rest = text[label.end() : len(text) if following is None else following.start()]
        yield _Section(bool(label["step"]), text[label.start() - 1 : label.start()] in ("'", '"'), source, rest)
        label = following


def _listed(source: str) -> Groups | None:
    """Returns the groups in the text of a list; None if the list is not closed."""
    if not source:
        return None
    value = parsed(source.translate({ord("“"): '"', ord("”"): '"'})) if re.search("[\"'“]", source) else None
    return _groups(value) if isinstance(value, list) else _split(source[1:-1])


def _groups(value: Any) -> Groups:
    """Returns a group for each item of a parsed list; an item that is a list itself has alternatives."""
    groups = [[restored(text) for text in texts_in(item)] for item in (value if isinstance(value, list) else [value])]
    return [kept for group in groups if (kept := [text for text in group if text])]


def _unlisted(text: str, titled: bool) -> Groups | None:
    """Returns the groups in bullets; under a title, also those in one line. None if the text is neither."""
    lines = [line for line in text.rstrip(" \t\r\n*_#\"'•-;.").splitlines() if line.strip()]
    bullets = [_BULLET.fullmatch(line) for line in lines]
    if all(bullets):
        return [group for bullet in bullets if bullet for group in [[_plain(bullet[1])]] if group[0]]
    return _split(lines[0]) if titled and len(lines) == 1 else None


def _split(text: str) -> Groups:
    """Returns a group for each part of a text between commas or semicolons outside brackets and quotes."""
    parts, start, depth, quoted = [], 0, 0, False
    for i, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char in ",;" and depth <= 0 and not quoted and not _THOUSAND.match(text, i):
            parts.append(text[start:i])
            start = i + 1
    return [[part] for part in map(_plain, [*parts, text[start:]]) if part.lower() not in _NOTHING]


def _plain(text: str) -> str:
    """Returns a text without white space, quotes and marks of emphasis around it."""
    text = text.strip().strip('"“”`*').strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == "'" else text
