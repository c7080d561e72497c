"""Parses a formula in plain notation (latex.py) whole: a part that is left unread makes the text no formula."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from r1vl_jax.rewards.algebra import MAX_BITS, Formula, number, size_bits
from r1vl_jax.rewards.units import parse_unit

MAX_TOKENS = 150
MAX_DEPTH = 30

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,6}(?![\d.]))?)|(?P<word>[A-Za-z]+|[\u0370-\u03ffΩ∞])"
    r"|(?P<sign>[-+*/^_()\[\]|!°'√%,{}]))"
)
_FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh exp ln lg abs floor ceil"
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_HEADS = _FUNCTIONS | {"sqrt", "frac", "binom", "log", "pi"}
_CONSTANTS = {"π": "pi", "pi": "pi", "Pi": "pi", "e": "e", "i": "i", "∞": "∞", "infinity": "∞", "inf": "∞"}
MULTIPLIERS = {
    **dict(hundred=100, thousand=1000, million=10**6, billion=10**9, trillion=10**12, dozen=12),
    **dict(half=Fraction(1, 2), halves=Fraction(1, 2), third=Fraction(1, 3), thirds=Fraction(1, 3)),
    **dict(quarter=Fraction(1, 4), quarters=Fraction(1, 4), fourths=Fraction(1, 4), fifth=Fraction(1, 5)),
    **dict(fifths=Fraction(1, 5), sixths=Fraction(1, 6), eighths=Fraction(1, 8), tenths=Fraction(1, 10)),
}


class _Unreadable(Exception):
    """The text is not a whole formula."""


@functools.lru_cache(maxsize=8192)
def parse_formula(text: str) -> Formula | None:
    """Returns the formula that the whole text is; None if a part is unread, or if its value is too large to compute."""
    try:
        tokens = _tokens(text)
        if not tokens:
            return None
        parser = _Parser(tokens)
        formula = parser.sum()
        if parser.place < len(tokens) or size_bits(formula) > MAX_BITS:
            return None
        return formula
    except (_Unreadable, OverflowError):
        return None


def _tokens(text: str) -> list[tuple[str, str, bool]]:
    """Returns (kind, text, whether a blank comes before) of each token, with names split into letters."""
    tokens, place, text = [], 0, text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or len(tokens) > MAX_TOKENS:
            raise _Unreadable
        place, kind, token = match.end(), str(match.lastgroup), match[0].strip()
        blank = match[0][:1].isspace() or not tokens
        if kind != "word":
            tokens.append((kind, token, blank))
        else:
            touches = bool(tokens) and not blank and tokens[-1][1][-1:] in "0123456789)"
            tokens += [("word", name, blank and not i) for i, name in enumerate(_names(token, touches, text[place:]))]
    return tokens


def _names(word: str, touches: bool, rest: str) -> list[str]:
    """Splits a run of letters into names: "xy" is x times y, "AB" is one name, "apples" is no formula."""
    if len(word) == 1 or word in _HEADS or word in _CONSTANTS or word in MULTIPLIERS or word.isupper():
        return [word]
    for head in ("sqrt", "frac", *sorted(_FUNCTIONS, key=len, reverse=True), "pi"):  # "xsin", "rsqrt", "pir"
        before, found, after = word.partition(head)
        if found and len(before) <= 2 and len(after) <= 1:
            return [*before, head, *after]
    if parse_unit(word) is not None:
        raise _Unreadable
    product = word.islower() and len(word) <= 3 and (touches or rest[:1] in ("^", "(") or not set(word) & set("aeiou"))
    if not product:
        raise _Unreadable
    return list(word)


class _Parser:
    """A recursive-descent parser over tokens; each method reads one rule of the grammar."""

    def __init__(self, tokens: list[tuple[str, str, bool]]) -> None:
        self.tokens, self.place, self.depth = tokens, 0, 0

    def peek(self, ahead: int = 0) -> tuple[str, str, bool]:
        index = self.place + ahead
        return self.tokens[index] if index < len(self.tokens) else ("end", "", True)

    def before(self) -> str:
        """Returns the text of the token before the one that was read last."""
        return self.tokens[self.place - 2][1] if self.place > 1 else ""

    def take(self, sign: str) -> bool:
        """Reads a sign if it is next, and returns whether it was."""
        found = self.peek()[0] == "sign" and self.peek()[1] == sign
        self.place += found
        return found

    def expect(self, sign: str) -> None:
        if not self.take(sign):
            raise _Unreadable

    def sum(self) -> Formula:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unreadable
        total = self.signed()
        while self.peek()[1] in ("+", "-") and self.peek()[0] == "sign":
            negative = self.take("-") or not self.take("+")
            term = self.product()
            total = ("+", total, ("neg", term) if negative else term)
        self.depth -= 1
        return total

    def signed(self) -> Formula:
        if self.take("-"):
            return ("neg", self.signed())
        return self.signed() if self.take("+") else self.product()

    def product(self) -> Formula:
        value = self.power()
        while True:
            if self.take("*"):
                value = ("*", value, ("neg", self.power()) if self.take("-") else self.power())
            elif self.take("/"):
                value = ("/", value, ("neg", self.power()) if self.take("-") else self.power())
            elif self.starts_factor():
                value = ("*", value, self.power())
            else:
                return value

    def starts_factor(self) -> bool:
        kind, token, _ = self.peek()
        return kind == "word" or (kind == "sign" and token in "({√")

    def power(self) -> Formula:
        base = self.postfix(self.atom())
        if not self.take("^"):
            return base
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unreadable
        exponent = ("neg", self.power()) if self.take("-") else self.power()
        self.depth -= 1
        return self.postfix(("^", base, exponent))

    def postfix(self, value: Formula) -> Formula:
        while True:
            if self.take("!"):
                value = ("!", value)
            elif self.take("°"):
                value = ("deg", value)
            else:
                return value

    def atom(self) -> Formula:
        kind, token, _ = self.peek()
        self.place += 1
        if kind == "number":
            return self.number(token)
        if kind == "word":
            return number(MULTIPLIERS[token]) if token == "half" else self.word(token)
        if kind == "sign" and token == "√":
            return ("root", self.argument(), number(2))
        if kind == "sign" and token in "([{|":
            inner = self.sum()
            self.expect({"(": ")", "[": "]", "{": "}", "|": "|"}[token])
            return ("fn", "abs", inner) if token == "|" else inner
        raise _Unreadable

    def number(self, token: str) -> Formula:
        digits, _, power = token.lower().partition("e")
        if power:
            return ("*", _decimal(digits), ("^", number(10), number(int(power))))
        value = _decimal(token)
        kind, word, _ = self.peek()
        if kind == "word" and word in MULTIPLIERS:
            self.place += 1
            return number(value[1] * MULTIPLIERS[word])
        whole = token.isdecimal() and self.before() not in ("/", "^")
        fraction = self.fraction_part() if whole else None
        if fraction is None:
            if self.peek()[0] == "number":
                raise _Unreadable  # "4 10/3" and "2 3" are no numbers
            return value
        return number(value[1] + fraction)

    def fraction_part(self) -> Fraction | None:
        """Reads the fraction of a mixed number, 1/2 or frac(1)(2), if that is next."""
        start = self.place
        if self.peek()[0] == "number" and self.peek(1)[1] == "/" and self.peek(2)[0] == "number":
            top, bottom = self.peek()[1], self.peek(2)[1]
            self.place += 3
        elif self.peek()[1] == "frac" and [self.peek(i)[1] for i in (1, 3, 4, 6)] == ["(", ")", "(", ")"]:
            top, bottom = self.peek(2)[1], self.peek(5)[1]
            self.place += 7
        else:
            return None
        if top.isdecimal() and bottom.isdecimal() and max(len(top), len(bottom)) < 50:
            if int(top) < int(bottom):
                return Fraction(int(top), int(bottom))
            raise _Unreadable
        self.place = start
        return None

    def word(self, name: str) -> Formula:
        if name == "frac":
            return ("/", self.group(), self.group())
        if name == "binom":
            return ("binom", self.group(), self.group())
        if name == "sqrt":
            index = number(2)
            if self.take("["):
                index = self.sum()
                self.expect("]")
            return ("root", self.argument(), index)
        if name == "log":
            base = self.subscript() if self.take("_") else number(10)
            return ("log", self.argument(), base)
        if name in _FUNCTIONS:
            power = (self.take("-"), self.power()) if self.take("^") else None
            value = ("fn", name, self.argument())
            if power is None:
                return value
            if power[0] or power[1][0] == "neg":  # sin^-1 is arcsin
                return ("fn", f"arc{name}", value[2])
            return ("^", value, power[1])
        if name in MULTIPLIERS:
            raise _Unreadable
        if name in _CONSTANTS and not self.index_follows():
            return ("const", _CONSTANTS[name])
        return ("sym", name + self.index())

    def index_follows(self) -> bool:
        kind, token, blank = self.peek()
        return not blank and (kind == "number" or token in ("_", "'")) and self.tokens[self.place - 1][1] != "π"

    def index(self) -> str:
        """Reads what belongs to a name: digits (x1), an index (x_1) and primes."""
        text = ""
        while self.index_follows():
            kind, token, _ = self.peek()
            self.place += 1
            if token == "_":
                start = self.place
                self.subscript()
                text += "_" + "".join(part for _, part, _ in self.tokens[start : self.place]).strip("()")
            else:
                text += f"_{token}" if kind == "number" else token
        return text

    def subscript(self) -> Formula:
        if self.peek()[1] == "(":
            return self.group()
        kind, token, _ = self.peek()
        if kind != "number":
            return self.atom()
        self.place += 1
        return _decimal(token)

    def group(self) -> Formula:
        self.expect("(")
        inner = self.sum()
        self.expect(")")
        return inner

    def argument(self) -> Formula:
        """Reads the argument of a function: a group, or the factors up to the next sign (sin 2x)."""
        if self.peek()[1] == "(":
            return self.postfix(self.group())
        value = self.power()
        while self.peek()[0] == "word" and self.peek()[1] not in _HEADS - {"pi"} and not self.peek()[2]:
            value = ("*", value, self.power())
        return value


def _decimal(digits: str) -> Formula:
    return number(Fraction(digits), len(digits.partition(".")[2]))
