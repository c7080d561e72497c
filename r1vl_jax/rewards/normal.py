"""The normal form in which `robust` compares key steps: tokens, with LaTeX, spacing, units and numbers folded.

    "\\frac{12}{2} = 6"   "frac{12}{2} = 6"   "12/2=6"   "12 / 2 = 6.0"      all give   12 / 2 = 6
    "60^\\circ"           "60°"               "60 degrees"                   all give   60 °

Tokens are words (lower case), numbers (by value), symbols, and "." for the end of a sentence. A text is found on token
borders only, and only where it is not a part of a larger expression: "2" is not in "12" or "12/2", "x = 1" not in
"x = 1/2" or "2x = 1". A text that is nothing but a number is compared by value: "0.50" is found where "1/2" stands.

One pass over the text; every token knows the characters that it came from.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

END = "."  # the end of a sentence; also stands between two steps
_SEP = "\x1f"  # white space to the lexer, so in no token

_IDEOGRAPHS = r"\u0370-\u03ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_OPTION = r"(?:[Oo]ption|OPTION|[Cc]hoice)\s+(?:\([A-Ja-j]\)|[A-J]\b)"
_FRACTION = r"[dtc]?frac\s*+\{"
# Lexemes stand side by side: every character is in one. The most frequent kinds come first.
_KINDS = {
    "blank": r"\s*\n[ \t]*[-*+•](?=\s)|\s+",  # with the bullets of lists
    "word": rf"(?!{_FRACTION}|{_OPTION})[^\W\d_º²³¹½¼¾⅓⅔⁰⁴-⁹₀-₉{_IDEOGRAPHS}]+",
    "number": r"(?:\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+",
    "ideograph": f"[{_IDEOGRAPHS}]",
    "option": rf"{_OPTION}|(?<![\w)\]])\([A-J]\)",
    "fraction": rf"\\?(?={_FRACTION})[dtc]?frac\s*\{{",
    "digits": r"\\[dtc]?frac\s*\d\s*\d",
    "degrees": r"\^\s*\\circ\b|\^\{\s*(?:\\circ\b|°)\s*\}|\^?[°º˚]|\\degree\b",
    "command": r"\\[A-Za-z\u0370-\u04ff]+",
    "percent": r"\\%",
    "nothing": r"\\.?|\*\*+|\#+|(?<![^\n])[-*+•]\s",  # escapes, emphasis, headers, a bullet
    "open": r"\{",
    "close": r"\}",
    "relation": r"<=|>=|!=|==|=>|->|\|\|",
    "symbol": r"\S",
}
_LEXEMES = re.compile("|".join(_KINDS.values()), re.DOTALL)

_SYMBOLS = {
    **dict.fromkeys("×·⋅∗•∙", "*"),
    **dict.fromkeys("÷⁄∕", "/"),
    **dict.fromkeys("−–‐‑", "-"),
    **dict.fromkeys(".;!?—。！？；\u2026", END),
    **dict.fromkeys(",:$\"'`“”‘’，：、\u200b\u200c\u200d\u2060\ufeff\\&", ""),
    **{"<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "=>": "→", "->": "→", "⇒": "→", "||": "∥", "⟂": "⊥"},
    **{"∠": "angle", "△": "triangle", "▵": "triangle", "√": "sqrt", "~": "", "％": "%"},
    **{"½": "1 / 2", "¼": "1 / 4", "¾": "3 / 4", "⅓": "1 / 3", "⅔": "2 / 3"},
    **{raised: f"^ {digit}" for digit, raised in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{lowered: f"_ {digit}" for digit, lowered in enumerate("₀₁₂₃₄₅₆₇₈₉")},
}
_FULL_WIDTH = {code + 0xFEE0: code for code in range(0x21, 0x7F)} | {0x3000: " "}
# "mеdian" with a Cyrillic "е" is "median": else copies in other letters would pass for words of one's own.
_CYRILLIC_LOOKALIKES = str.maketrans("авекмнорстухіјѕһԁ", "abekmhopctyxijshd")
_GREEK_NAMES = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi omega"
_GREEK = dict(zip(_GREEK_NAMES.split(), "αβγδεθλμπρστφω", strict=True))
# Commands that only change how their argument looks, or that are blanks.
_APPEARANCE = (
    "left right big Big bigg Bigg quad qquad text textbf textit textrm mathrm mathbf mathit mathsf operatorname boxed "
    "mbox overline underline widehat hat bar vec overrightarrow overleftrightarrow displaystyle limits"
)
_COMMANDS = {
    **dict.fromkeys(["times", "cdot", "ast"], "*"),
    **dict.fromkeys(["div"], "/"),
    **dict.fromkeys(["le", "leq", "leqslant"], "≤"),
    **dict.fromkeys(["ge", "geq", "geqslant"], "≥"),
    **dict.fromkeys(["ne", "neq"], "≠"),
    **dict.fromkeys(["to", "rightarrow", "Rightarrow", "implies", "Longrightarrow"], "→"),
    **dict(lt="<", gt=">", pm="±", approx="≈", cong="≅", sim="∼", perp="⊥", parallel="∥", infty="∞", percent="%"),
    **dict.fromkeys(_APPEARANCE.split(), ""),
}
_UNITS = {
    **{f"{prefix}{unit}": sign + "m" for prefix, sign in (("", ""), ("centi", "c"), ("milli", "m"), ("kilo", "k"))
       for unit in ("meter", "meters", "metre", "metres")},
    **{f"{prefix}{unit}": sign + "g" for prefix, sign in (("", ""), ("milli", "m"), ("kilo", "k"))
       for unit in ("gram", "grams")},
    **dict(inch="in", inches="in", foot="ft", feet="ft", yard="yd", yards="yd", mile="mi", miles="mi", liter="l"),
    **dict(liters="l", litre="l", litres="l", second="s", seconds="s", sec="s", secs="s", minute="min", minutes="min"),
    **dict(hour="h", hours="h", hr="h", hrs="h", pound="lb", pounds="lb", lbs="lb", ounce="oz", ounces="oz"),
    **dict(degree="°", degrees="°", deg="°", percent="%"),
}  # fmt: skip
_WORDS = _GREEK | _UNITS
_UNIT_SIGNS = frozenset(_UNITS.values())
_POWER_WORDS = {"square": "2", "sq": "2", "cubic": "3"}  # square metres = m^2
_TAKES_GROUP = frozenset(("^", "_", "sqrt"))
_RELATIONS = frozenset("=<>≤≥≠≈≅∼")
_TIGHT = frozenset("/^_")  # bind more tightly than any text that ends beside them
_LOOSE = frozenset("+-*±")
_FUNCTIONS = frozenset(["sqrt", "sin", "cos", "tan", "log", "ln"])
_MATH = frozenset("()[]πθ") | _FUNCTIONS
_LITTLE = "so it by is as we the and or to of in on at an if for let get has are now but not"
_SHORT_WORDS = frozenset(_LITTLE.split())  # too short not to look like names


class NormalText:
    """The tokens of `text`: `words[i]` came from its characters `starts[i]` to `ends[i]`."""

    __slots__ = (
        *("_bound_after", "_bound_before", "_joined", "_numbers", "_offsets", "_places"),
        *("ends", "starts", "text", "words"),
    )

    def __init__(self, text: str, words: list[str], starts: list[int], ends: list[int]):
        self.text, self.words, self.starts, self.ends = text, words, starts, ends
        self._joined = self._offsets = self._numbers = None
        # Found once, though many texts are looked for at one place, and many texts have one normal form.
        self._bound_before, self._bound_after, self._places = {}, {}, {}

    def __len__(self) -> int:
        return len(self.words)

    def find(self, text: str) -> list[tuple[int, int]]:
        """Where `text` occurs, as ranges of characters, from left to right; nowhere if it has no tokens.

        Two places do not overlap, as with `str.count`.
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
            self._joined = f"{_SEP}{_SEP.join(self.words)}{_SEP}"
        _, _, opens, closes, relational, _ = needle
        check = opens or closes or relational
        place, first = self._joined.find(needle.joined) if needle.length else -1, -1
        while place >= 0:
            if self._offsets is None:
                self._offsets = list(itertools.accumulate((len(word) + 1 for word in self.words), initial=0))
            # Mostly far on, and sometimes the very next token.
            first = first + 1 if self._offsets[first + 1] == place else bisect_right(self._offsets, place) - 1
            last = first + needle.length - 1
            if check and self._cut_from_expression(first, last, opens, closes, relational):
                place += 1
            else:
                yield self.starts[first], self.ends[last]
                first, place = last, place + len(needle.joined) - 1
            place = self._joined.find(needle.joined, place)

    def _find_number(self, value: Fraction) -> list[tuple[int, int]]:
        if self._numbers is None:
            self._numbers = {}
            for number, place in self._bare_numbers():
                self._numbers.setdefault(number, []).append(place)
        return self._numbers.get(value, [])

    def _bare_numbers(self) -> Iterator[tuple[Fraction, tuple[int, int]]]:
        """Every number and fraction of numbers that is not a part of a power, a product such as 3x, or an index."""
        words, behind = [*self.words, END, END], 0
        for first in [i for i, word in enumerate(words) if word[0].isdecimal()]:
            if first < behind:
                continue
            behind = first + 3 if words[first + 1] == "/" and words[first + 2][0].isdecimal() else first + 1
            end, signed = behind, self._is_unary_minus(first - 1)
            if signed:
                first -= 1
            if words[end] != "%" and not self._cut_from_expression(first, end - 1, not signed, True, False):
                value = _value(tuple(words[first:end]))
                if value is not None:
                    yield value, (self.starts[first], self.ends[end - 1])

    def _cut_from_expression(self, first: int, last: int, opens: bool, closes: bool, relational: bool) -> bool:
        """Whether the tokens around first..last make these a piece of a larger expression.

        Tight operators bind to whatever mathematics begins (`opens`) or ends (`closes`) beside them; an equation is
        also cut by terms, factors and functions: "x = 1" is neither in "y + x = 1" nor in "2 x = 1", "sin x = 1" or
        "x = 1 + z".
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
        """Whether something binds to mathematics that begins with token i."""
        bound = self._bound_before.get(i)
        if bound is None:
            bound = (i > 0 and self.words[i - 1] in _TIGHT) or self._is_unary_minus(i - 1) or self._is_factor(i - 1, i)
            self._bound_before[i] = bound
        return bound

    def _is_bound_after(self, i: int) -> bool:
        bound = self._bound_after.get(i)
        if bound is None:
            bound = (i + 1 < len(self.words) and self.words[i + 1] in _TIGHT) or self._is_factor(i, i + 1)
            self._bound_after[i] = bound
        return bound

    def _touch(self, left: int, right: int) -> bool:
        """Whether nothing but a blank, or what LaTeX groups with, stands between two neighbours."""
        if left < 0 or right >= len(self.words):
            return False
        between = self.text[self.ends[left] : self.starts[right]]
        return not between.strip("{}() \\$")

    def _is_factor(self, left: int, right: int) -> bool:
        """Whether two neighbours without a blank between them are a product such as 2x, or an index such as x2."""
        words = self.words
        if left < 0 or right >= len(words):
            return False
        a, b = words[left], words[right]
        number = b[0].isdecimal()
        if number == a[0].isdecimal() or self.ends[left] != self.starts[right]:  # most often: neither is a number
            return False
        return a[0].isalpha() if number else b[0].isalpha() and b not in _UNIT_SIGNS

    def _is_operator(self, i: int) -> bool:
        """Whether token i is +, -, *, ± between two operands, rather than a dash or a mark of emphasis."""
        if not 0 < i < len(self.words) - 1 or self.words[i] not in _LOOSE:
            return False
        if not (_is_operand(self.words[i - 1]) and _is_operand(self.words[i + 1])):
            return False
        return self.words[i] in "+±" or (self.ends[i - 1] < self.starts[i]) == (self.ends[i] < self.starts[i + 1])

    def _is_unary_minus(self, i: int) -> bool:
        """Whether token i is the sign of the token after it."""
        if i < 0 or self.words[i] != "-" or i + 1 >= len(self.words) or self.ends[i] != self.starts[i + 1]:
            return False
        return i == 0 or not (_is_operand(self.words[i - 1]) or self.ends[i - 1] == self.starts[i])


def _is_math(word: str) -> bool:
    return word[0].isdecimal() or len(word) == 1 and word.isalpha() or word in _MATH


def _is_operand(word: str) -> bool:
    """Numbers, brackets, units, and names of up to three letters: variables, and segments such as AB or ABC."""
    if word in _SHORT_WORDS:
        return False
    return word[0].isdecimal() or word in _MATH or word in _UNIT_SIGNS or (len(word) <= 3 and word.isalpha())


class _Needle(NamedTuple):
    """A text to find."""

    joined: str  # its tokens
    length: int  # their number
    opens: bool  # mathematics begins it
    closes: bool  # mathematics, or a unit, ends it
    relational: bool
    value: Fraction | None  # of a number


@functools.lru_cache(maxsize=8192)
def _needle(text: str) -> _Needle:
    """Sentence ends around the text do not count."""
    words = normal_text(text).words
    while words and words[-1] == END:
        words.pop()
    while words and words[0] == END:
        words.pop(0)
    relational = not _RELATIONS.isdisjoint(words)
    return _Needle(
        f"{_SEP}{_SEP.join(words)}{_SEP}",
        len(words),
        bool(words) and _is_math(words[0]),
        bool(words) and (_is_math(words[-1]) or words[-1] in _UNIT_SIGNS),
        relational,
        _value(tuple(words)),
    )


@functools.lru_cache(maxsize=8192)
def _value(words: tuple[str, ...]) -> Fraction | None:
    """The value of [-] number [/ number]; None for anything else, for zero below the line, and for endless digits."""
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


def _number(text: str) -> str:
    """One spelling for one value: 1,000 and 1000, 0.50 and .5, 6.0 and 6."""
    if "," in text:
        text = text.replace("{,}", "").replace("\\,", "").replace(",", "")
    whole, _, part = text.partition(".")
    if not whole.isascii() or not part.isascii():
        whole, part = (unicodedata.normalize("NFKC", digits) for digits in (whole, part))
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    return f"{whole}.{part}" if part else whole


def normal_text(text: str, start: int = 0, end: int | None = None) -> NormalText:
    """The tokens of text[start:end], with their places in `text`."""
    words, starts, ends = [], [], []
    opened = []  # of each open brace, what it is: a fraction's numerator, an operator's group, or only a brace
    coming = _BRACE  # what the next brace is
    if not text.isascii():
        text = text.translate(_FULL_WIDTH)  # a character for a character: places stay
    last = start
    for lexeme in _LEXEMES.findall(text, start, len(text) if end is None else end):
        first, last = last, last + len(lexeme)
        found = _FOLDED[lexeme]
        if found is _BLANK:
            continue
        if found is _OPEN:
            opened.append(coming)
            found, coming = () if coming is _BRACE else ("(",), _BRACE
        elif found is _FRACTION_OPEN:
            opened.append(_NUMERATOR)
            found, coming, first = ("(",), _BRACE, last - 1
        elif found is _CLOSE:
            closed = opened.pop() if opened else _BRACE
            found, coming = _CLOSED[closed], _GROUP if closed is _NUMERATOR else _BRACE
        else:
            coming = _GROUP if found and found[-1] in _TAKES_GROUP else _BRACE
        for word in found:
            if word in _LOOKS_BACK:
                if word == ")" and words[-2:-1] == ["("] and not _is_call(words, starts, ends):
                    del words[-2], starts[-2], ends[-2]  # brackets around one token say nothing
                    continue
                if (
                    word != ")"
                    and words[-1:]
                    and words[-1] in _POWER_WORDS
                    and words[-2:-1]
                    and words[-2][0].isdecimal()
                ):
                    words[-1:] = [word, "^", _POWER_WORDS[words[-1]]]
                    starts += [first, first]
                    ends[-1:] = [last, last, last]
                    continue
            words.append(word)
            starts.append(first)
            ends.append(last)
    return NormalText(text, words, starts, ends)


def _is_call(words: list[str], starts: list[int], ends: list[int]) -> bool:
    """Whether the bracket before the last token is that of f(x)."""
    return len(words) > 2 and ends[-3] == starts[-2] and words[-3][0].isalpha() and words[-3] != "sqrt"


_BRACE, _GROUP, _NUMERATOR = range(3)
_CLOSED = ((), (")",), (")", "/"))
_LOOKS_BACK = _UNIT_SIGNS | {")"}


def _word(lexeme: str) -> str:
    word = lexeme.lower()
    if not word.isascii():
        word = unicodedata.normalize("NFKC", word)
        latin = word.translate(_CYRILLIC_LOOKALIKES)
        word = latin if latin.isascii() else word
    return _WORDS.get(word, word)


def _command(lexeme: str) -> str:
    name = lexeme[1:]
    found = _COMMANDS.get(name)
    return _word(name) if found is None else found


# What a lexeme of each kind becomes: tokens with blanks between them.
_FOLD = {
    "word": _word,
    "number": _number,
    "symbol": lambda lexeme: _SYMBOLS.get(lexeme, lexeme),
    "relation": lambda lexeme: _SYMBOLS[lexeme],
    "command": _command,
    "option": lambda lexeme: "option:" + lexeme.rstrip(")")[-1].lower(),
    "digits": lambda lexeme: " / ".join(filter(str.isdecimal, lexeme)),  # \\frac12
    "degrees": lambda lexeme: "°",
    "percent": lambda lexeme: "%",
    "ideograph": str.lower,
    "nothing": lambda lexeme: "",
}
# What becomes of the other kinds depends on what stands around them.
_BLANK, _OPEN, _CLOSE, _FRACTION_OPEN = ("blank",), ("open",), ("close",), ("fraction",)
_STRUCTURE = {"blank": _BLANK, "open": _OPEN, "close": _CLOSE, "fraction": _FRACTION_OPEN}


class _Folded(dict):
    """The tokens of each lexeme, found out once; a lexeme's kind shows in itself."""

    _KIND = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _KINDS.items()), re.DOTALL)

    def __missing__(self, lexeme: str) -> tuple[str, ...]:
        kind = self._kind(lexeme)
        found = _STRUCTURE.get(kind) or tuple(_FOLD[kind](lexeme).split())
        if len(self) > 50_000:  # a model that writes nonsense must not fill the memory
            self.clear()
        if len(lexeme) < 50:
            self[lexeme] = found
        return found

    def _kind(self, lexeme: str) -> str:
        # Alone, a lexeme ends where it does; the brace makes "frac" the fraction that it was.
        return self._KIND.match(lexeme).lastgroup


_FOLDED = _Folded()
