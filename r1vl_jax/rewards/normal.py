"""Searches key steps in the normal form that `robust` uses: tokens in which different spellings are equal.

    "\\frac{12}{2} = 6"   "frac{12}{2} = 6"   "12/2=6"   "12 / 2 = 6.0"      all become   12 / 2 = 6
    "60^\\circ"           "60°"               "60 degrees"                   all become   60 °

The degree sign after a value is optional: "60" and "60°" are compared as equal.

Tokens are words (lower case), numbers (by value), symbols, and "." for the end of a sentence. An occurrence starts and
ends at token borders, and is not part of a larger expression: "2" is not in "12" or "12/2", "x = 1" is not in "x = 1/2"
or "2x = 1". A text that is only a number is compared by value: "0.50" occurs in "the share is 1/2".

lexer.py makes the tokens in one pass over the text, and returns the range of characters that each token came from.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from r1vl_jax.rewards.lexer import END, UNIT_SIGNS, tokenize

_SEP = "\x1f"  # separates tokens in a joined text; white space to the lexer, so no token contains it

_RELATIONS = frozenset("=<>≤≥≠≈≅∼")
_TIGHT = frozenset("/^_")  # these bind more tightly than anything inside a text to find
_LOOSE = frozenset("+-*±")  # operators between terms and factors
_FUNCTIONS = frozenset(["sqrt", "sin", "cos", "tan", "log", "ln"])
_MATH = frozenset("()[]πθ") | _FUNCTIONS
_DEGREES = "°"
_INDEX = "_₀₁₂₃₄₅₆₇₈₉"  # an index such as the 1 of x_1 starts with one of these
_SHORT = "so it by is as we the and or to of in on at an if for let get has are now but not"
_SHORT_WORDS = frozenset(_SHORT.split())  # English words that are not names of variables or segments


class NormalText:
    """The tokens of `text`, for searching. `words[i]` comes from the characters `starts[i]` to `ends[i]` of `text`."""

    __slots__ = (
        *("_bound_after", "_bound_before", "_compared", "_joined", "_numbers", "_offsets", "_places"),
        *("ends", "starts", "text", "words"),
    )

    def __init__(self, text: str, words: list[str], starts: list[int], ends: list[int]) -> None:
        self.text, self.words, self.starts, self.ends = text, words, starts, ends
        # These caches are filled on first use: one text is searched many times, often for equal normal forms.
        self._compared: list[int] = []
        self._joined: str | None = None
        self._offsets: list[int] | None = None
        self._numbers: dict[Fraction, list[tuple[int, int]]] | None = None
        self._bound_before: dict[int, bool] = {}
        self._bound_after: dict[int, bool] = {}
        self._places: dict[str, list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return len(self.words)

    def compared(self) -> list[str]:
        """Returns the words that are compared: all but the degree signs after values."""
        return [self.words[i] for i in self._compared_places()]

    def _compared_places(self) -> list[int]:
        words = self.words
        if _DEGREES not in words:
            return list(range(len(words)))
        return [i for i, word in enumerate(words) if word != _DEGREES or i == 0 or not _takes_degrees(words[i - 1])]

    def find(self, text: str) -> list[tuple[int, int]]:
        """Returns the ranges of characters in which `text` occurs, from left to right; none if `text` has no tokens.

        The ranges do not overlap, as in `str.count`.
        """
        needle = _needle(text)
        if needle.value is not None:
            return self._find_number(needle.value)
        places = self._places.get(needle.joined)
        if places is None:
            places = self._places[needle.joined] = list(self._find_words(needle))
        return places

    def _find_words(self, needle: _Needle) -> Iterator[tuple[int, int]]:
        if self._joined is None:
            self._compared = self._compared_places()
            self._joined = f"{_SEP}{_SEP.join([self.words[i] for i in self._compared])}{_SEP}"
        _, _, opens, closes, relational, _ = needle
        check = opens or closes or relational
        place = self._joined.find(needle.joined) if needle.length else -1
        at = -1  # index in the compared words
        while place >= 0:
            if self._offsets is None:
                lengths = (len(self.words[i]) + 1 for i in self._compared)
                self._offsets = list(itertools.accumulate(lengths, initial=0))
            # Checks the next token first because this check is cheap. The binary search finds places further on.
            at = at + 1 if self._offsets[at + 1] == place else bisect_right(self._offsets, place) - 1
            first, last = self._compared[at], self._with_degrees(self._compared[at + needle.length - 1])
            if check and self._cut_from_expression(first, last, opens, closes, relational):
                place += 1
            else:
                yield self.starts[first], self.ends[last]
                at, place = at + needle.length - 1, place + len(needle.joined) - 1
            place = self._joined.find(needle.joined, place)

    def _with_degrees(self, i: int) -> int:
        """Returns the index of the degree sign after token i; i if there is none."""
        return i + 1 if self.words[i + 1 : i + 2] == [_DEGREES] else i

    def _find_number(self, value: Fraction) -> list[tuple[int, int]]:
        if self._numbers is None:
            self._numbers = {}
            for number, place in self._bare_numbers():
                self._numbers.setdefault(number, []).append(place)
        return self._numbers.get(value, [])

    def _bare_numbers(self) -> Iterator[tuple[Fraction, tuple[int, int]]]:
        """Yields (value, character range) of the numbers and fractions that are not part of a larger expression.

        "3" is part of a larger expression in a power, an index, or a product such as 3x.
        """
        words, done = [*self.words, END, END], 0
        for first in [i for i, word in enumerate(words) if word[0].isdecimal()]:
            if first < done:
                continue
            done = first + 3 if words[first + 1] == "/" and words[first + 2][0].isdecimal() else first + 1
            end, signed = done, self._is_unary_minus(first - 1)
            if signed:
                first -= 1
            last = self._with_degrees(end - 1)
            if words[end] != "%" and not self._cut_from_expression(first, last, not signed, True, False):
                value = _value(tuple(words[first:end]))
                if value is not None:
                    yield value, (self.starts[first], self.ends[last])

    def _cut_from_expression(self, first: int, last: int, opens: bool, closes: bool, relational: bool) -> bool:
        """Returns whether the tokens first..last are part of a larger expression.

        If the tokens begin (`opens`) or end (`closes`) with mathematics, a neighbouring "/", "^", "_" or factor makes
        them part of one. If they contain a relation (`relational`), so do terms and functions: "x = 1" is not in
        "y + x = 1", "2 x = 1", "sin x = 1" or "x = 1 + z".
        """
        if (opens or relational) and self._is_bound_before(first):
            return True
        if (closes or relational) and self._is_bound_after(last):
            return True
        if not relational:
            return False
        words = self.words
        before = words[first - 1] if first > 0 else END
        after = words[last + 1] if last + 1 < len(words) else END
        near_before, near_after = self._touch(first - 1, first), self._touch(last, last + 1)
        if near_before and (before[0].isdecimal() or before in _FUNCTIONS or before == "π"):
            return True
        if near_after and (after in _FUNCTIONS or after == "π"):
            return True
        if near_after and words[last][0].isdecimal() and (after == "(" or after[0].isdecimal()):
            return True
        return self._is_operator(first - 1) or self._is_operator(last + 1)

    def _is_bound_before(self, i: int) -> bool:
        """Returns whether the token before token i binds to it: "/" in "2/x", "2" in "2x"."""
        bound = self._bound_before.get(i)
        if bound is None:
            bound = (
                (i > 0 and self.words[i - 1] in _TIGHT)
                or self._is_unary_minus(i - 1)
                or self._is_factor(i - 1, i)
                or self.text[self.starts[i]] in _INDEX
            )
            self._bound_before[i] = bound
        return bound

    def _is_bound_after(self, i: int) -> bool:
        """Returns whether the token after token i binds to it: "^" in "x^2"."""
        bound = self._bound_after.get(i)
        if bound is None:
            bound = (i + 1 < len(self.words) and self.words[i + 1] in _TIGHT) or self._is_factor(i, i + 1)
            self._bound_after[i] = bound
        return bound

    def _touch(self, left: int, right: int) -> bool:
        """Returns whether only spaces, dollar signs, backslashes, braces or parentheses are between two neighbours."""
        if left < 0 or right >= len(self.words):
            return False
        between = self.text[self.ends[left] : self.starts[right]]
        return not between.strip("{}() \\$")

    def _is_factor(self, left: int, right: int) -> bool:
        """Returns whether two neighbours without a space are a product such as 2x, or an index such as x2."""
        words = self.words
        if left < 0 or right >= len(words):
            return False
        a, b = words[left], words[right]
        number_last = b[0].isdecimal()
        if number_last == a[0].isdecimal() or self.ends[left] != self.starts[right]:  # usually neither is a number
            return False
        return a[0].isalpha() if number_last else b[0].isalpha() and b not in UNIT_SIGNS

    def _is_operator(self, i: int) -> bool:
        """Returns whether token i is +, -, * or ± between two operands, and not a dash or a mark of emphasis."""
        if not 0 < i < len(self.words) - 1 or self.words[i] not in _LOOSE:
            return False
        if not (_is_operand(self.words[i - 1]) and _is_operand(self.words[i + 1])):
            return False
        return self.words[i] in "+±" or (self.ends[i - 1] < self.starts[i]) == (self.ends[i] < self.starts[i + 1])

    def _is_unary_minus(self, i: int) -> bool:
        """Returns whether token i is the sign of the token after it."""
        if i < 0 or self.words[i] != "-" or i + 1 >= len(self.words) or self.ends[i] != self.starts[i + 1]:
            return False
        return i == 0 or not (_is_operand(self.words[i - 1]) or self.ends[i - 1] == self.starts[i])


def _takes_degrees(word: str) -> bool:
    """Returns whether a degree sign after a word is that of a value, and not the noun in "a polynomial of degree 2"."""
    return word[0].isdecimal() or word == ")" or len(word) == 1 and word.isalpha()


def _is_math(word: str) -> bool:
    return word[0].isdecimal() or len(word) == 1 and word.isalpha() or word in _MATH


def _is_operand(word: str) -> bool:
    """Returns whether a word is a number, bracket, function, unit, or a name of up to three letters such as x or AB."""
    if word in _SHORT_WORDS:
        return False
    return word[0].isdecimal() or word in _MATH or word in UNIT_SIGNS or (len(word) <= 3 and word.isalpha())


class _Needle(NamedTuple):
    """A text to find, with its tokens and the properties that the search needs."""

    joined: str  # the tokens of the text, each between two _SEP
    length: int  # number of tokens
    opens: bool  # it begins with mathematics
    closes: bool  # it ends with mathematics or a unit
    relational: bool  # it contains a relation such as "="
    value: Fraction | None  # the value, if the text is just a number


@functools.lru_cache(maxsize=8192)
def _needle(text: str) -> _Needle:
    """Prepares a text for `NormalText.find`. Sentence ends at the start and the end of the text are removed."""
    words = normal_text(text).compared()
    while words and words[-1] == END:
        words.pop()
    while words and words[0] == END:
        words.pop(0)
    relational = not _RELATIONS.isdisjoint(words)
    return _Needle(
        f"{_SEP}{_SEP.join(words)}{_SEP}",
        len(words),
        bool(words) and _is_math(words[0]),
        bool(words) and (_is_math(words[-1]) or words[-1] in UNIT_SIGNS),
        relational,
        _value(tuple(words)),
    )


@functools.lru_cache(maxsize=8192)
def _value(words: tuple[str, ...]) -> Fraction | None:
    """Returns the value of [-] number [/ number].

    Returns None for anything else, for a denominator of 0, and for a number of more than 100 characters.
    """
    sign = -1 if words[:1] == ("-",) else 1
    words = words[1:] if sign < 0 else words
    if len(words) not in (1, 3) or (len(words) == 3 and words[1] != "/"):
        return None
    if not all(word[0].isdecimal() and len(word) <= 100 for word in words[::2]):
        return None
    top, *rest = (Fraction(word) for word in words[::2])
    if rest and not rest[0]:
        return None
    return sign * top / rest[0] if rest else sign * top


def normal_text(text: str, start: int = 0, end: int | None = None) -> NormalText:
    """Returns the tokens of text[start:end], with their places in `text`. None for `end` is the end of the text."""
    return NormalText(*tokenize(text, start, len(text) if end is None else end))
