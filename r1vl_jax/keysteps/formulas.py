"""Finds equations and inequalities in running text, as ranges of characters.

    "ED = AD - AE = 27 - 12 = 15."  contains  "ED = AD - AE" and "27 - 12 = 15"

A formula ends before a word that is not a variable, function, unit or name of a quantity. If a formula chains three or
more relations, only the first and the last relation are returned, because they state the approach and the result.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

_COMMANDS_REL = "leqslant|geqslant|leq?|geq?|neq?|lt|gt|approx|cong|sim|perp|parallel|equiv"
RELATION = re.compile(rf"<=|>=|!=|==|[=<>≤≥≠≈≅∼⊥⟂∥≡]|\\(?:{_COMMANDS_REL})(?![A-Za-z])")
_TOKEN = re.compile(
    rf"""
    (?P<space>\s*\\(?:left|right|quad|qquad|[,;!:\x20])(?![A-Za-z])|[^\S\n]+)
  | (?P<stop>=>|->|→|⇒|∴|\\(?:Rightarrow|rightarrow|implies|therefore|to)(?![A-Za-z]) | \$+ | \\[()\[\]\\]
        | \n | [;?…] | \.(?!\d) | ,(?!\d{{3}}(?!\d)) | :(?=\s|\Z))
  | (?P<relation>{RELATION.pattern})
  | (?P<named>\\(?:text|mathrm|textbf)\s*\{{[^{{}}\n]*\}})
  | (?P<number>\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
  | (?P<post>\\%|[%°!′'²³]|\^\s*\\circ|\^\s*\{{\s*\\circ\s*\}})
  | (?P<command>\\[A-Za-z]+|[πθαβγ∠△√])
  | (?P<word>[^\W\d_]+)
  | (?P<open>[(\[{{])
  | (?P<close>[)\]}}])
  | (?P<operator>[-+*/^_×·÷±−–:,])
  | (?P<other>.)
    """,
    re.VERBOSE,
)
_FUNCTION = re.compile("sin|cos|tan|cot|sec|csc|log|ln|sqrt|arc(?:sin|cos|tan)|frac|pi|theta|alpha|beta")
_NOUN = re.compile("angles?|arc|triangle|segment|side|chord|line|area|perimeter|radius|diameter")
_UNIT = re.compile("[ckm]?m|k?g|ft|in|degrees?|units?|meters?|inch(?:es)?|feet|square|sq|dollars|percent")
# English words of two letters are not products of two variables. The single letters may be articles or "I".
_SHORT_WORD = re.compile("is|of|to|so|in|we|by|at|an|as|or|on|if|be|it|no|do|he|me|us|up|my|go|am")
_ARTICLES = frozenset("aAI")


class _Token(NamedTuple):
    kind: str
    start: int
    end: int
    text: str


def equations(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Returns the character ranges of the equations and inequalities in text[start:end], from left to right."""
    tokens = [
        _Token(match.lastgroup or "other", *match.span(), match[0])
        for match in _TOKEN.finditer(text, start, end)
        if match.lastgroup != "space"
    ]
    partner = _partners(tokens)
    places: list[tuple[int, int]] = []
    run: list[_Token] = []  # the tokens of the current formula
    braces = 0  # number of open braces in `run`
    for i, token in enumerate(tokens):
        if _breaks(tokens, i, partner, in_braces=braces > 0):
            places += _pairs(text, run, partner)
            run, braces = [], 0
        else:
            run.append(token)
            braces += (token.text == "{") - (token.text == "}")
    return places + _pairs(text, run, partner)


def split_relation(text: str) -> tuple[str, str, str] | None:
    """Returns the left side, relation and right side of a text; None if it is not one equation or inequality."""
    places = top_level(text, RELATION)
    if len(places) != 1:
        return None
    left, right = text[: places[0][0]].strip(), text[places[0][1] :].strip()
    return (left, text[slice(*places[0])], right) if left and right else None


def top_level(text: str, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
    """Returns the character ranges of the matches of `pattern` outside all brackets."""
    depths, depth = [], 0
    for char in text:
        depth += char in "([{"
        depths.append(depth)
        depth -= char in ")]}"
    return [match.span() for match in pattern.finditer(text) if depths[match.start()] == 0]


def _partners(tokens: list[_Token]) -> dict[int, int]:
    """Maps the start of each bracket to the start of its partner. A bracket without a partner is left out."""
    partner, opened = {}, []
    for token in tokens:
        if token.kind == "stop":
            opened = []
        elif token.kind == "open":
            opened.append(token)
        elif token.kind == "close" and opened and opened[-1].text + token.text in ("()", "[]", "{}"):
            other = opened.pop()
            partner[token.start], partner[other.start] = other.start, token.start
    return partner


def _breaks(tokens: list[_Token], i: int, partner: dict[int, int], in_braces: bool) -> bool:
    """Returns whether token i ends a formula."""
    token = tokens[i]
    if token.kind in ("stop", "other"):
        return True
    if token.kind in ("open", "close"):
        return token.start not in partner
    return token.kind in ("word", "named") and not in_braces and not _is_operand_word(tokens, i)


def _is_operand_word(tokens: list[_Token], i: int) -> bool:
    """Returns whether the word token i belongs to a formula: a variable, function, unit or name of a quantity."""
    token = tokens[i]
    word, lower = token.text, token.text.lower()
    before = tokens[i - 1] if i else None
    after = tokens[i + 1] if i + 1 < len(tokens) else None
    after_number = before is not None and before.kind in ("number", "close", "post")
    if before is not None and after_number and _UNIT.fullmatch(lower) and (before.end < token.start or len(word) > 1):
        return after is not None and after.kind in ("operator", "relation")  # in 5 cm + 3 cm = 8 cm, not the last cm
    if token.kind == "word" and _reads_as_operand(word, lower, after):
        return True
    if after is not None and after.kind == "relation" and len(word) > 2:
        return before is None or before.kind not in ("number", "close")
    return _spaced_operator(before, token) or _spaced_operator(token, after)


def _reads_as_operand(word: str, lower: str, after: _Token | None) -> bool:
    """Returns whether a word is a variable, a function, a product such as xy, or a noun before a name ("angle A")."""
    if len(word) == 1 or _FUNCTION.fullmatch(lower) or (word.isupper() and len(word) <= 4):
        return True
    if len(word) == 2 and word.isascii() and not (_SHORT_WORD.fullmatch(lower) or _UNIT.fullmatch(lower)):
        return True
    named = after is not None and (after.kind == "command" or _is_name(after))
    return named and _NOUN.fullmatch(lower) is not None


def _is_name(token: _Token) -> bool:
    return token.kind == "word" and token.text.isupper() and len(token.text) <= 4


def _spaced_operator(left: _Token | None, right: _Token | None) -> bool:
    """Returns whether a space separates two neighbours of which one is an operator.

    True for "base * height", False for "right-angled".
    """
    if left is None or right is None or left.end == right.start:
        return False
    return any(token.kind == "operator" and token.text in "+*/×·÷−" for token in (left, right))


def _pairs(text: str, run: list[_Token], partner: dict[int, int]) -> list[tuple[int, int]]:
    """Cuts a formula at each bracket whose partner is not in the formula. Returns the relations of the pieces."""
    pieces: list[list[_Token]] = [[]]
    for token in run:
        if token.start in partner and not run[0].start <= partner[token.start] <= run[-1].start:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [pair for piece in pieces for pair in _ends_of_chain(text, piece, partner)]


def _ends_of_chain(text: str, run: list[_Token], partner: dict[int, int]) -> list[tuple[int, int]]:
    """Returns the character ranges of the relations of a chain, with both sides.

    If there are three or more relations, only the first and the last are returned.
    """
    while run and run[0].kind == "open" and partner[run[0].start] == run[-1].start:
        run = run[1:-1]
    sides: list[list[_Token]] = [[]]
    depth = 0
    for token in run:
        depth += (token.kind == "open") - (token.kind == "close")
        if token.kind == "relation" and depth == 0:
            sides.append([])
        else:
            sides[-1].append(token)
    trimmed = [_trimmed(side, first=i == 0) for i, side in enumerate(sides)]
    pairs = [
        (left[0].start, right[-1].end)
        for left, right in itertools.pairwise(trimmed)
        if left and right and text[left[0].start : left[-1].end] != text[right[0].start : right[-1].end]
    ]
    return pairs if len(pairs) < 3 else [pairs[0], pairs[-1]]


def _trimmed(side: list[_Token], first: bool) -> list[_Token]:
    """Removes stray operators and articles from the ends of a side of a relation; empty if no operand is left."""
    while side and _is_stray(side[0], side[1:2], first):
        side = side[1:]
    while side and (side[-1].kind == "operator" or (side[-1].text in _ARTICLES and _apart(side[-2:]))):
        side = side[:-1]
    return side if any(token.kind in ("number", "word", "named", "command") for token in side) else []


def _is_stray(token: _Token, following: list[_Token], first: bool) -> bool:
    """Returns whether `token`, which starts a side of an equation, does not belong to the formula.

    That is a unit, an operator other than a sign, or an article before the equation's first side.

    Args:
      following: the tokens after it.
      first: whether the side is the first one of the equation.
    """
    if token.kind == "operator":
        sign = token.text in "-−+±" and bool(following) and token.end == following[0].start
        return not sign
    if token.kind == "post":
        return True
    return first and token.text in _ARTICLES and _apart([token, *following])


def _apart(two: list[_Token]) -> bool:
    """Returns whether these are two tokens, the second a word, number or command after a space."""
    return len(two) == 2 and two[1].kind in ("word", "number", "command") and two[0].end < two[1].start
