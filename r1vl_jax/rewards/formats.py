r"""Defines the formats of an answer: which sections it has, where its steps begin, and where its final answer is.

    r1vl                               think                     boxed
    ### Image Description: ...         <think>                   Paragraphs, or lines
    ### Rationales: ...                Paragraphs, or lines      Step 1: ...
    ### Let's think step by step.      Step 1: ...               Step 2: ...
    ### Step 1: ...                    Step 2: ...               The final answer is \boxed{3}.
    ### The final answer is: 3         </think>
                                       <answer>3</answer>

`r1vl` is R1-VL's format (arXiv 2503.12937, the prompt of the released data). In `think`, "<think>" may stand in the
prompt instead of the answer. In `think` and `boxed`, a step is a line that begins with "Step k" and the text up to the
next one; where no line begins so, each paragraph is a step.

Every function takes time linear in the length of the text, because a model may write megabytes or thousands of steps.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from r1vl_jax.rewards.answer_text import boxed_parts, last_run

Place = tuple[int, int]  # a range of characters: start and end

ANSWER_HEADER = "### The final answer is:"
SAYS_SOMETHING = re.compile(r"[^\s.,:;!?*_#~`'\"|\\/()\[\]{}<>$&\x00-\x1f-]")  # a word, number or symbol


class Section(NamedTuple):
    """One kind of section.

    Attributes:
      name: its name in messages.
      required: an answer is complete only with it.
      filled: it must say something if the rules ask for sections that are not empty.
      near: a regular expression for headers that look like this section's; "" where none is known.
    """

    name: str
    required: bool = True
    filled: bool = True
    near: str = ""


class Mark(NamedTuple):
    """One section of an answer.

    Attributes:
      section: the index of its kind in `Format.sections`.
      start: where its header begins. The header ends where the body begins.
      body, end: the range of its body.
      number: the digits in a step's header; "" if there are none.
    """

    section: int
    start: int
    body: int
    end: int
    number: str = ""


@dataclasses.dataclass(frozen=True)
class Format:
    """How an answer is written.

    Attributes:
      sections: the kinds of section, in the order in which they must come.
      step: the index of the kind that may occur several times.
      outline: returns the sections of a text, in the order in which they occur.
      step_bodies: returns the ranges of a text in which key steps are searched, one per step.
      final_answer: returns the text of the final answer, stripped; None if there is none.
      opening: writes the part before the final answer, from a description, a rationale and the texts of the steps.
        Without a rationale (None), its section is left out. `line` is between a header and its text, `gap` between
        sections.
      ending: writes the final answer.
    """

    sections: tuple[Section, ...]
    step: int
    outline: Callable[[str], list[Mark]]
    step_bodies: Callable[[str], list[Place]]
    final_answer: Callable[[str], str | None]
    opening: Callable[[str, str | None, Sequence[str], str, str], str]
    ending: Callable[[str], str]

    def write(
        self,
        description: str,
        rationale: str | None,
        steps: Sequence[str],
        answer: str,
        *,
        line: str = "\n",
        gap: str = "\n\n",
    ) -> str:
        """Writes an answer in this format."""
        return self.opening(description, rationale, steps, line, gap) + self.ending(answer)

    def step_starts(self, text: str) -> tuple[int, ...]:
        """Returns the index of the first character of each step. A step ends where the next one starts."""
        return tuple(mark.start for mark in self.outline(text) if mark.section == self.step)


# R1-VL's headers

_HEADER = re.compile(
    r"^### (?:(Image Description:)|(Rationales:)|(Let's think step by step\.)|Step (\d+):|(The final answer is:))",
    re.MULTILINE,
)
_STEP = 3
# As in the released code, a step's text ends before the next line that starts with ###, whether or not this line is a
# known header. White space after the header is skipped first, so the text of an empty step is the whole next step.
_STEP_BODY = re.compile(r"### Step \d+:\s*(.*?)(?=\n###|\Z)", re.DOTALL)


def _header_outline(text: str) -> list[Mark]:
    headers = list(_HEADER.finditer(text))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    return [
        Mark((header.lastindex or 0) - 1, header.start(), header.end(), end, header[_STEP + 1] or "")
        for header, end in zip(headers, ends, strict=False)  # without headers, `ends` still has the end of the text
    ]


def _header_bodies(text: str) -> list[Place]:
    return [match.span(1) for match in _STEP_BODY.finditer(text)]


def _answer_section(text: str) -> str | None:
    """Returns the text after the first final-answer header that starts a line, up to the next line that starts ###.

    The first header counts and not the last, because all steps must come before the header, and a second header would
    be a second guess.
    """
    start = 0 if text.startswith(ANSWER_HEADER) else text.find("\n" + ANSWER_HEADER) + 1
    if not text.startswith(ANSWER_HEADER, start):
        return None
    start += len(ANSWER_HEADER)
    end = text.find("\n###", start)
    return text[start : end if end >= 0 else len(text)].strip()


def _with_headers(description: str, rationale: str | None, steps: Sequence[str], line: str, gap: str) -> str:
    sections = [f"### Image Description:{line}{description}"]
    if rationale is not None:
        sections += [f"### Rationales:{line}{rationale}", "### Let's think step by step."]
    sections += [f"### Step {number}:{line}{text}" for number, text in enumerate(steps, 1)]
    return "".join(section + gap for section in sections)


_AT_LINE_START = r"^[#*_>\- \t]{0,12}"  # a bound, so that the search stays linear
_NEAR_ANSWER = _AT_LINE_START + r"(?:the\s+)?(?:final\s+)?answer\b"

R1VL = Format(
    sections=(
        Section("image description", near=_AT_LINE_START + r"image\s+descriptions?\b"),
        Section("rationale", near=_AT_LINE_START + r"rationales?\b"),
        Section('line "Let\'s think step by step."', required=False, filled=False),
        Section("step", near=_AT_LINE_START + r"step\s*\d"),
        Section("final answer", near=_NEAR_ANSWER),
    ),
    step=_STEP,
    outline=_header_outline,
    step_bodies=_header_bodies,
    final_answer=_answer_section,
    opening=_with_headers,
    ending=(ANSWER_HEADER + " {}").format,
)

# Free steps, in tags or before a box

_STEP_LINE = re.compile(r"^[ \t]*(?:[#>*_-]{1,8}[ \t]*)?[Ss]tep[ \t]*(\d+)\b[*_]{0,3}[:.)]?[*_]{0,3}", re.MULTILINE)
_PARAGRAPH = re.compile(r"\S[^\n]*(?:\n(?![^\S\n]*(?:\n|\Z))[^\n]*)*")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def _free_steps(text: str, start: int, end: int, section: int) -> list[Mark]:
    """Returns the steps in text[start:end]: from each line "Step k" to the next, or else the paragraphs with words."""
    part = text[start:end]
    lines = list(_STEP_LINE.finditer(part))
    if not lines:
        found = (match.span() for match in _PARAGRAPH.finditer(part) if SAYS_SOMETHING.search(match[0]))
        return [Mark(section, start + first, start + first, start + last) for first, last in found]
    ends = [line.start() for line in lines[1:]] + [len(part)]
    return [
        Mark(section, start + line.start(), start + line.end(), start + last, line[1])
        for line, last in zip(lines, ends, strict=True)
    ]


def _free_bodies(outline: Callable[[str], list[Mark]], step: int) -> Callable[[str], list[Place]]:
    return lambda text: [(mark.body, mark.end) for mark in outline(text) if mark.section == step]


def _numbered(description: str, rationale: str | None, steps: Sequence[str], line: str, gap: str) -> str:
    lines = (f"Step {number}:{line}{text}" for number, text in enumerate(steps, 1))
    return "".join(text + gap for text in (description, *([] if rationale is None else [rationale]), *lines))


_TAG = re.compile(r"(<think>)|(</think>)|(<answer>)|(</answer>)")
_OUTSIDE, _THINK, _THOUGHT, _END_THINK, _ANSWER, _END_ANSWER = range(6)
_TAG_SECTIONS = (_THINK, _END_THINK, _ANSWER, _END_ANSWER)


def _tag_outline(text: str) -> list[Mark]:
    """Returns the tags, the steps of the thinking, and what is outside: other text, and tags that occur again.

    The text before the first tag is thinking, because "<think>" may stand in the prompt.
    """
    tags = list(_TAG.finditer(text))
    marks: list[Mark] = []
    starts, ends = [0, *(tag.end() for tag in tags)], [*(tag.start() for tag in tags), len(text)]
    sections = [_THINK, *(_TAG_SECTIONS[(tag.lastindex or 0) - 1] for tag in tags)]
    seen: set[int] = set()
    for number, (section, start, end) in enumerate(zip(sections, starts, ends, strict=True)):
        if number:
            marks.append(Mark(_OUTSIDE if section in seen else section, tags[number - 1].start(), start, end))
            seen.add(section)
        if section == _THINK:
            marks += _free_steps(text, start, end, _THOUGHT)
        elif section != _ANSWER and text[start:end].strip():
            marks.append(Mark(_OUTSIDE, start, start, end))
    return marks


def _tagged_answer(text: str) -> str | None:
    """Returns the text of the first <answer>...</answer> after the first </think>, or of the first in the text."""
    start = text.find("<answer>", max(0, text.find("</think>")))
    end = text.find("</answer>", start)
    inner = text[start + len("<answer>") : end]
    return None if min(start, end) < 0 or "<answer>" in inner else inner.strip()


THINK = Format(
    sections=(
        Section("text outside the tags", required=False, filled=False),
        Section("<think>", required=False, filled=False),
        Section("step"),
        Section("</think>", filled=False, near=r"<\s?/\s?think\s?>|<\s?/?\s?(?:thinking|reasoning)\s?>"),
        Section("<answer>", near=r"<\s?(?:final[_ ]?)?answer\s?>|" + _NEAR_ANSWER),
        Section("</answer>", filled=False, near=r"<\s?/\s?(?:final[_ ]?)?answer\s?>"),
    ),
    step=_THOUGHT,
    outline=_tag_outline,
    step_bodies=_free_bodies(_tag_outline, _THOUGHT),
    final_answer=_tagged_answer,
    opening=lambda *parts: f"<think>\n{_numbered(*parts).rstrip()}\n</think>\n",
    ending="<answer>{}</answer>".format,
)

_AFTER_BOX, _BEFORE_BOX, _BOX = range(3)


# "Therefore the final answer is $" before a box. These words belong to the answer and not to the last step.
_LEAD_IN = re.compile(
    r"(?:\b(?:so|thus|hence|therefore),?\s{1,3})?(?:\b(?:the|my|our)\s{1,3})?(?:\b(?:final|correct)\s{1,3})?\banswer"
    r"(?:\s{1,3}is)?[*_]{0,3}:?[*_]{0,3}\s{0,3}[$*_\\(\[]{0,4}\s{0,3}\Z",
    re.IGNORECASE,
)
_LOOK_BACK = 60  # characters in which a lead-in is looked for


def _boxed_answer(text: str) -> tuple[Mark, str] | None:
    """Returns the place and the content of the last \\boxed{...} and of the boxes listed with it; None without a box.

    The place starts with the words that introduce the answer, if there are any.
    """
    boxes = [box for box in boxed_parts(text) if box[2] < len(text)]
    if not boxes:
        return None
    run = last_run(text, boxes)
    contents = dict.fromkeys(text[start:close].strip() for _, start, close in run)
    start = run[0][0]
    lead = _LEAD_IN.search(text, max(0, start - _LOOK_BACK), start)
    return Mark(_BOX, lead.start() if lead else start, run[0][1], run[-1][2] + 1), ", ".join(contents)


def _box_outline(text: str) -> list[Mark]:
    """Returns the steps before the final answer, the answer, and the text from the next paragraph on."""
    box = _boxed_answer(text)
    if box is None:
        return _free_steps(text, 0, len(text), _BEFORE_BOX)
    mark, _ = box
    marks = [*_free_steps(text, 0, mark.start, _BEFORE_BOX), mark]
    blank = _BLANK_LINE.search(text, mark.end)
    if blank is not None and text[blank.end() :].strip():
        marks.append(Mark(_AFTER_BOX, blank.end(), blank.end(), len(text)))
    return marks


def _in_box(text: str) -> str | None:
    box = _boxed_answer(text)
    return None if box is None else box[1]


BOXED = Format(
    sections=(
        Section("paragraph", required=False, filled=False),
        Section("step"),
        Section("final answer", near=r"\\?\b[a-z]?box(?:ed)?\s?[{(]|" + _NEAR_ANSWER),
    ),
    step=_BEFORE_BOX,
    outline=_box_outline,
    step_bodies=_free_bodies(_box_outline, _BEFORE_BOX),
    final_answer=_in_box,
    opening=_numbered,
    ending="The final answer is \\boxed{{{}}}.".format,
)

FORMATS = {"r1vl": R1VL, "think": THINK, "boxed": BOXED}


def near_miss(text: str, section: Section) -> str:
    """Returns the start of the first line that looks like this section's header but is not; "" if there is none."""
    match = re.search(section.near, text, re.IGNORECASE | re.MULTILINE) if section.near else None
    return "" if match is None else text[match.start() : match.start() + 40].strip().partition("\n")[0]
