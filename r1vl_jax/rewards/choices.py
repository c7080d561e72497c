"""Reads multiple-choice letters, and yes, no, true and false, in normalised answers."""

from __future__ import annotations

import dataclasses
import re

from r1vl_jax.rewards.answer_text import normalise


@dataclasses.dataclass(frozen=True)
class Choice:
    """Multiple-choice letters, in upper case, and the text of the option, if it is given.

    `guess`: the letters are joined by "or", so the text does not decide.
    """

    letters: frozenset[str]
    text: str = ""
    guess: bool = False


_LETTER = r"(?:\(\s*[A-Za-z]\s*\)|\[\s*[A-Za-z]\s*\]|<[A-Z]>|(?<![A-Za-z])[A-Z](?![A-Za-z]))"
_JOINED = r"(?:(?:\s*(?:,|/|&|\+|\band\b|\bor\b|[和或与])\s*)+|\s+)"
_LETTERS = re.compile(rf"{_LETTER}[.)]?(?:{_JOINED}{_LETTER}[.)]?)+")
_CHOICE = re.compile(
    r"(?P<word>(?:option|choice|point|figure|graph|statement|panel|diagram|picture|image)\s*)?"
    r"(?:(?P<open>[(\[<])\s*(?P<marked>[A-Za-z])\s*[)\]>]|(?P<bare>[A-Za-z])(?![A-Za-z\d_'^])(?P<closed>\))?)(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_AFTER_BARE = re.compile(r"\s*(?:\.\s*|,\s*(?=\d)|:\s+|:(?![A-Za-z])|\s-\s+|\s(?=[\d$¤√(]))(?=\S)(.*)", re.DOTALL)
_AFTER_MARKED = re.compile(
    r"\s*(?:[.:,]\s*|\s-\s+)?(?![-+*/^=<>!]|(?:or|and|is|are|was|isn't|cannot)\b)(?=\S)(.*)", re.DOTALL | re.IGNORECASE
)
_ANOTHER = re.compile(r"(?<![A-Za-z\d])(?:\(([A-Z])\)|([A-Z])(?:[):]|\.\s*\S)|\b(?:or|and)\s+([A-Z])(?![A-Za-z]))")
_OF_OPTIONS = re.compile(r"(?:both|either|neither|all|only)\b", re.IGNORECASE)  # the text of an option about others
_REJECTED = re.compile(r"\b(?:is|are) (?:wrong|incorrect|not (?:right|correct|the answer))$", re.IGNORECASE)
FUSED = re.compile(r"[A-J]{2,10}")


def read_choice(text: str) -> Choice | None:
    """Returns the multiple-choice letters of a normalised answer; None if it is no choice.

    These are choices: "B", "(b)", "B: 12", "B.12", "(B) 12", "B - 12", "option b", "A, C". These are not: "b" (a
    variable), "A triangle", "A:B = 1:2", "(A) + 1". A letter with the letters of other options is no choice.
    """
    if _LETTERS.fullmatch(text.removeprefix("both ")):
        found = re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", text)
        return Choice(frozenset(letter.upper() for letter in found), guess=re.search(r"\bor\b|或|/", text) is not None)
    match = _CHOICE.fullmatch(text)
    if match is None:
        return None
    letter, rest, marked = match["marked"] or match["bare"], match["rest"], bool(match["open"] or match["closed"])
    if letter.islower() and not (match["word"] or (marked and letter in "abcdefgh")):
        return None
    if rest.strip() in ("", ".", ")", ":"):
        return Choice(frozenset(letter.upper()))
    after = (_AFTER_MARKED if marked else _AFTER_BARE).fullmatch(rest)
    if after is None:
        return None
    others = any({*found} - {"", letter} for found in _ANOTHER.findall(after[1]))
    if (others and not _OF_OPTIONS.match(after[1])) or _REJECTED.search(after[1]):
        return None
    return Choice(frozenset(letter.upper()), after[1].strip())


def choice_letter(text: str) -> str | None:
    """Returns the one multiple-choice letter that an answer names, in upper case; None if it names none or several."""
    choice = read_choice(normalise(text))
    return next(iter(choice.letters)) if choice is not None and len(choice.letters) == 1 else None


DECISIONS = {
    **dict(yes=True, no=False, true=True, false=False),
    **dict.fromkeys(["是的", "对的"], True),
    **{"是": True, "否": False, "对": True, "错": False, "正确": True, "错误": False, "不是": False, "不对": False},
}
_PRONOUNS = "it|they|he|she|there|this|that|these|those|we|you|i|not|because|since"
_DECISION = re.compile(
    rf"({'|'.join(sorted(DECISIONS, key=len, reverse=True))})(?:$|\s*[,.;:!(-]\s*(.*)|\s+((?:{_PRONOUNS})\b.*))",
    re.IGNORECASE | re.DOTALL,
)
_OPPOSITE = re.compile(r"(?:(?:and|or|maybe|but)\s+)?(?:yes|no|true|false|maybe|perhaps)[\s.!]*", re.IGNORECASE)


def read_decision(text: str) -> str | None:
    """Returns the leading yes, no, true or false of a text, in lower case; None if there is none, or two."""
    match = _DECISION.fullmatch(text)
    if match is None or _OPPOSITE.fullmatch(match[2] or match[3] or "") or (match[2] or "")[:1].isdigit():
        return None
    return match[1].lower()
