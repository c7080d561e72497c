"""Finds the sections of an answer, and checks that they are complete and in order.

This is the format of an answer (R1-VL, arXiv 2503.12937, the prompt of the released data):

    ### Image Description:
    ### Rationales:
    ### Let's think step by step.
    ### Step 1:             (and so on, numbered from 1)
    ### The final answer is: 3

StepRVR pays 1 for an answer that is complete (description, rationale, at least one step, final answer) and in order
(description and rationale before the steps, the steps before the final answer, steps numbered 1..n).

Every function takes time linear in the length of the text, because a model may write megabytes or thousands of steps.
"""

from __future__ import annotations

import re

from r1vl_jax.rewards.rules import Rules

ANSWER_HEADER = "### The final answer is:"
# The four texts whose presence makes an answer complete in the released code.
_SUBSTRINGS = {
    "### Image Description:": "image description",
    "### Rationales:": "rationale",
    "### Step 1:": "step 1",
    ANSWER_HEADER: "final answer",
}

_STEP_HEADER = re.compile(r"### Step (\d+):")
# As in the released code, a step's text ends before the next line that starts with ###, whether or not this line is a
# known header. White space after the header is skipped first, so the text of an empty step is the whole next step.
_STEP_BODY = re.compile(r"### Step \d+:\s*(.*?)(?=\n###|\Z)", re.DOTALL)
_STEP_LINE = re.compile(r"^### Step \d+:", re.MULTILINE)
_ANSWER_LINE = re.compile(r"### The final answer is:\s*\n?(.*)")

_NAMES = ("image description", "rationale", 'line "Let\'s think step by step."', "step", "final answer")
_OPTIONAL = 2  # the "Let's think" line is not a section and may be missing: only its place is checked
_STEP = 3
# One group for each name above, in the order of the format.
_HEADER = re.compile(
    r"^### (?:(Image Description:)|(Rationales:)|(Let's think step by step\.)|Step (\d+):|(The final answer is:))",
    re.MULTILINE,
)

_SAYS_SOMETHING = re.compile(r"[^\s.,:;!?*_#~`'\"|\\/()\[\]{}<>$&\x00-\x1f-]")


def step_bodies(text: str) -> list[tuple[int, int]]:
    """Returns the range of characters of each step's body. Key steps are searched in these ranges."""
    return [match.span(1) for match in _STEP_BODY.finditer(text)]


def step_starts(text: str) -> tuple[int, ...]:
    """Returns the index of the first character of each line "### Step k:".

    If rewards are assigned per step, a step ends where the next step starts.
    """
    return tuple(match.start() for match in _STEP_LINE.finditer(text))


def answer_line(text: str) -> str | None:
    """Returns the first line with text after the first final-answer header, stripped; None if there is no header.

    The text may be on the line of the header or on a later line.
    """
    match = _ANSWER_LINE.search(text)
    return None if match is None else match[1].strip()


def answer_section(text: str) -> str | None:
    """Returns the text after the first final-answer header that starts a line, stripped; None without such a header.

    The first header counts and not the last, because all steps must come before the header, and a second header would
    be a second guess. The section ends before the next line that starts with ###.
    """
    start = 0 if text.startswith(ANSWER_HEADER) else text.find("\n" + ANSWER_HEADER) + 1
    if not text.startswith(ANSWER_HEADER, start):
        return None
    start += len(ANSWER_HEADER)
    end = text.find("\n###", start)
    return text[start : end if end >= 0 else len(text)].strip()


def section_faults(text: str, rules: Rules) -> tuple[str, ...]:
    """Returns short phrases that say why an answer is not complete or not in order; empty for a valid answer."""
    headers = list(_HEADER.finditer(text))
    kinds = [_kind(header) for header in headers]
    if rules.sections_by_header:
        missing = [f"no {name}" for kind, name in enumerate(_NAMES) if kind not in kinds and kind != _OPTIONAL]
        numbers = [header[_STEP + 1] for header in headers if _kind(header) == _STEP]
    else:
        missing = [f"no {name}" for header, name in _SUBSTRINGS.items() if header not in text]
        numbers = _STEP_HEADER.findall(text)
    empty = _empty_sections(text, headers) if rules.nonempty_sections else []
    order = _order_faults(kinds) if rules.full_order else _answer_place_faults(text)
    return (*missing, *empty, *order, *_number_faults(numbers))


def _kind(header: re.Match[str]) -> int:
    """Returns the section that a match of _HEADER begins, as an index of _NAMES."""
    return (header.lastindex or 0) - 1


def _empty_sections(text: str, headers: list[re.Match[str]]) -> list[str]:
    """Names the kinds of section that are empty at least once: no word, number or symbol before the next header."""
    ends = [header.start() for header in headers[1:]] + [len(text)]
    kinds = {
        _kind(header)
        for header, end in zip(headers, ends, strict=False)  # without headers, `ends` still has the end of the text
        if not _SAYS_SOMETHING.search(text, header.end(), end)
    }
    return [f"empty {_NAMES[kind]}" for kind in sorted(kinds - {_OPTIONAL})]


def _order_faults(kinds: list[int]) -> list[str]:
    """Names each kind of header that comes after a header that should follow it."""
    latest, late = 0, set()
    for kind in kinds:
        if kind < latest:
            late.add((kind, latest))
        latest = max(latest, kind)
    return [f"{_NAMES[kind]} after {_NAMES[before]}" for kind, before in sorted(late)]


def _answer_place_faults(text: str) -> list[str]:
    """Returns the faults against the order rule of the authors' released code.

    The first final-answer header must come after the last step's header.
    """
    if text.strip().endswith(ANSWER_HEADER):
        return []
    last_step = max((header.end() for header in _STEP_HEADER.finditer(text)), default=0)
    place = text.find(ANSWER_HEADER)
    return ["final answer before the last step"] if 0 <= place < last_step else []


def _number_faults(numbers: list[str]) -> list[str]:
    # Python refuses to convert thousands of digits, and no answer has that many steps.
    values = [int(digits) if len(digits) <= 1000 else -1 for digits in numbers]
    return [] if values == list(range(1, len(values) + 1)) else ["steps not numbered 1..n"]
