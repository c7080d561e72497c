"""Checks that an answer is complete and in order, for StepRVR (R1-VL, arXiv 2503.12937, section 3.3).

StepRVR pays 1 for an answer that is complete (in R1-VL's format: description, rationale, at least one step, final
answer) and in order (description and rationale before the steps, the steps before the final answer, steps numbered
1..n). formats.py says which sections a format has.

Every function takes time linear in the length of the text, because a model may write megabytes or thousands of steps.
"""

from __future__ import annotations

import re

from r1vl_jax.rewards.formats import ANSWER_HEADER, FORMATS, R1VL, SAYS_SOMETHING, Format, Mark, Section, near_miss
from r1vl_jax.rewards.rules import Rules

# The four texts whose presence makes an answer complete in the released code, and their sections.
_SUBSTRINGS = {
    "### Image Description:": R1VL.sections[0],
    "### Rationales:": R1VL.sections[1],
    "### Step 1:": R1VL.sections[R1VL.step]._replace(name="step 1"),
    ANSWER_HEADER: R1VL.sections[-1],
}
_STEP_HEADER = re.compile(r"### Step (\d+):")
_ANSWER_LINE = re.compile(r"### The final answer is:\s*\n?(.*)")


def answer_line(text: str) -> str | None:
    """Returns the first line with text after the first final-answer header, stripped; None if there is no header.

    The text may be on the line of the header or on a later line. The released functions compare this line.
    """
    match = _ANSWER_LINE.search(text)
    return None if match is None else match[1].strip()


def section_faults(text: str, rules: Rules) -> tuple[str, ...]:
    """Returns short phrases that say why an answer is not complete or not in order; empty for a valid answer.

    A line that looks like the header of a missing section is named, as in 'no rationale (found "### Rationale:")'.
    """
    form = FORMATS[rules.format]
    marks = form.outline(text)
    kinds = [mark.section for mark in marks]
    if rules.sections_by_header:
        missing = [section for kind, section in enumerate(form.sections) if section.required and kind not in kinds]
        numbers = [mark.number for mark in marks if mark.number]
    else:
        missing = [section for header, section in _SUBSTRINGS.items() if header not in text]
        numbers = _STEP_HEADER.findall(text)
    empty = _empty_sections(text, marks, form) if rules.nonempty_sections else []
    order = _order_faults(kinds, form) if rules.full_order else _answer_place_faults(text)
    return (*(_missing(text, section) for section in missing), *empty, *order, *_number_faults(numbers))


def _missing(text: str, section: Section) -> str:
    found = near_miss(text, section)
    return f"no {section.name}" + (f' (found "{found}")' if found else "")


def _empty_sections(text: str, marks: list[Mark], form: Format) -> list[str]:
    """Names the kinds of section that are empty at least once: no word, number or symbol before the next header."""
    kinds = {mark.section for mark in marks if not SAYS_SOMETHING.search(text, mark.body, mark.end)}
    return [f"empty {form.sections[kind].name}" for kind in sorted(kinds) if form.sections[kind].filled]


def _order_faults(kinds: list[int], form: Format) -> list[str]:
    """Names each kind of section that comes after a section that should follow it."""
    latest, late = 0, set()
    for kind in kinds:
        if kind < latest:
            late.add((kind, latest))
        latest = max(latest, kind)
    return [f"{form.sections[kind].name} after {form.sections[before].name}" for kind, before in sorted(late)]


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
