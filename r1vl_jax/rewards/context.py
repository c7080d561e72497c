"""Rewrites signs whose meaning depends on the text around them, so that lexer.py can read each sign by itself.

    "3 x 4"       ->  "3 × 4"           a letter between two numbers
    "ABC ~ DEF"   ->  "ABC ∼ DEF"       elsewhere "~" is LaTeX's blank
    "AB // CD"    ->  "AB ∥  CD"        but not between numbers
    "a *median*"  ->  "a  median "      Markdown's emphasis; elsewhere "*" is a product
    "＝"          ->  "="               full-width forms, and other forms of one sign

Each character becomes one character, so places in the text stay the same.
"""

from __future__ import annotations

import functools
import re

from r1vl_jax.rewards.signs import FULL_WIDTH

_FORMS = FULL_WIDTH | str.maketrans("∽✕✖⨯‖", "∼×××∥")

# Each pattern starts with the sign itself and then looks back, because a search for a character is fast.
_TIMES = re.compile(r"[xX](?=\d|[ \t$]+[-−]?(?:[\d(√]|\.\d|\\(?:[dtc]?frac|sqrt)))")
_UNIT = r"[ \t]?(?:°|(?:[mck]?m|in|ft|yd|inch(?:es)?|feet|units?)[²³]?)"
_FIRST_FACTOR = re.compile(rf"[\d)}}](?:{_UNIT})?[ \t$]+\Z")
_LOOK_BACK = 12  # characters in which the end of the first factor is looked for
# "~" with blanks on both sides, or before a triangle or another figure, as in "ABC~DEF".
_SIMILAR = re.compile(r"~(?<=\s~)(?=\s)|~(?<=[A-Z$}\s]~)(?=[ $]*(?:\\?triangle\b|[△▵]|[A-Z]{3}))")
_PARALLEL = re.compile(r"//(?!\s*\d)|\\\|")
_HYPHEN = re.compile(r"-(?<=\d-)(?=(?:degree|[cmk]?m|inch|foot|unit)\b)")  # "a 60-degree angle"
_EMPHASIS = re.compile(
    r"""([*_])(?<![^\s(\[{"'“‘:,–—].)(?!\s|\1)(?:(?!\1)[^\n])*(?<!\s)\1"""
    r"""(?=\*\*(?!\*)|[\s.,;:!?)\]}"'”’–—]|\Z)"""
)


@functools.lru_cache(maxsize=4)  # the steps of one answer are read one by one, each in the text of the whole answer
def resolve_signs(text: str) -> str:
    """Returns the text with every sign that depends on its surroundings written as an unambiguous one."""
    if not text.isascii():
        text = text.translate(_FORMS)
    if "~" in text:
        text = _SIMILAR.sub("∼", text)
    if "//" in text or "\\|" in text:
        text = _PARALLEL.sub("∥ ", text)
    if "*" in text or "_" in text:
        text = text.replace("\\*", " *")  # a product that Markdown would not read as emphasis
        text = _EMPHASIS.sub(lambda match: f" {match[0][1:-1]} ", text)
    if "-" in text:
        text = _HYPHEN.sub(" ", text)
    return _TIMES.sub(_times, text)


def _times(match: re.Match[str]) -> str:
    """Returns "×" for an "x" between two factors, else the "x". Blanks are on both sides or on none."""
    text, place = match.string, match.start()
    if text[place + 1].isdecimal():
        return "×" if place and text[place - 1].isdecimal() else match[0]
    return "×" if _FIRST_FACTOR.search(text, max(0, place - _LOOK_BACK), place) else match[0]
