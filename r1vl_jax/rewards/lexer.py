"""Splits a text into the tokens of the normal form (normal.py). Different spellings of one thing get equal tokens.

A regular expression cuts the text into lexemes. A table maps each lexeme to its tokens, independent of the text around
the lexeme. The same pass handles braces, fractions, powers of units and brackets, which do depend on that text.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from r1vl_jax.rewards.context import resolve_signs
from r1vl_jax.rewards.signs import COMMANDS, FRACTIONS, GREEK, RAISED, RELATIONS, SIGNS, UNITS

END = "."  # the token that ends a sentence; key_steps.py also puts one after each step

_IDEOGRAPHS = r"\u0370-\u03ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_OPTION = r"(?:[Oo]ption|OPTION|[Cc]hoice)\s+(?:\([A-Ja-j]\)|[A-J]\b)"
_FRACTION = r"[dtc]?frac\s*+\{"
# The kinds of lexemes, the most frequent first. Every character of a text belongs to one lexeme.
_KINDS = {
    "blank": r"\s*\n[ \t]*[-*+•](?=\s)|\s+",  # white space, with the bullets of lists
    "word": rf"(?!{_FRACTION}|{_OPTION})[^\W\d_º²³¹½¼¾⅓⅔⁰⁴-⁹₀-₉{_IDEOGRAPHS}]+",
    "number": r"(?:\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+",
    "ideograph": f"[{_IDEOGRAPHS}]",
    "option": rf"{_OPTION}|(?<![\w)\]])\([A-J]\)",
    "fraction": rf"\\?(?={_FRACTION})[dtc]?frac\s*\{{",
    "digits": r"\\[dtc]?frac\s*\d\s*\d",
    "degrees": r"\^\s*\\circ\b|\^\{\s*(?:\\circ\b|°)\s*\}|\^?[°º˚]|\\(?:text)?degree\b",
    "command": r"\\[A-Za-z\u0370-\u04ff]+",
    "percent": r"\\%",
    "nothing": r"\\.?|\*\*+|__+|\#+|(?<![^\n])[-*+•]\s",  # escapes, emphasis, headers, bullets: no tokens
    "open": r"\{",
    "close": r"\}",
    "relation": r"<=|>=|!=|==|=>|->|\|\|",
    "index": r"_[ \t]*(?:\d+|\{[ \t]*\d+[ \t]*\})|[₀-₉]+",
    "symbol": r"\S",
}
_LEXEMES = re.compile("|".join(_KINDS.values()), re.DOTALL)

_SYMBOL_TOKENS = {
    **SIGNS,
    **RELATIONS,
    **dict.fromkeys(".;!?—。！？；\u2026", END),
    **dict.fromkeys(",:$\"'`“”‘’，：、\u200b\u200c\u200d\u2060\ufeff\\&", ""),
    **{"∠": "angle", "△": "triangle", "▵": "triangle", "√": "sqrt", "~": ""},
    **FRACTIONS,
    **{raised: f"^ {digit}" for digit, raised in enumerate(RAISED)},
}
# "mеdian" with a Cyrillic "е" becomes "median". Otherwise copied words in look-alike letters would count as new words.
_CYRILLIC_LOOKALIKES = str.maketrans("авекмнорстухіјѕһԁ", "abekmhopctyxijshd")
_WORD_TOKENS = GREEK | UNITS
UNIT_SIGNS = frozenset(UNITS.values())
_POWER_WORDS = {"square": "2", "sq": "2", "cubic": "3"}  # "square metres" becomes m ^ 2
_TAKES_GROUP = frozenset(("^", "_", "sqrt"))
# The three meanings of a "{", and for each the tokens that its "}" becomes.
_BRACE, _GROUP, _NUMERATOR = range(3)
_CLOSING: tuple[tuple[str, ...], ...] = ((), (")",), (")", "/"))
_LOOKS_BACK = UNIT_SIGNS | {")"}  # tokens that can change the tokens before them


class Tokens(NamedTuple):
    """The tokens of a text. `words[i]` comes from the characters `starts[i]` to `ends[i]` of `text`."""

    text: str  # the input as context.py rewrites it, character by character
    words: list[str]
    starts: list[int]
    ends: list[int]


def tokenize(text: str, start: int, end: int) -> Tokens:
    """Returns the tokens of text[start:end], with their places in `text`."""
    words, starts, ends = [], [], []
    opened = []  # for each open brace: _NUMERATOR of a fraction, _GROUP of an operator, or plain _BRACE
    coming = _BRACE  # the meaning of the next brace
    text = resolve_signs(text)  # one character for one character: places stay the same
    last = start
    for lexeme in _LEXEMES.findall(text, start, end):
        first, last = last, last + len(lexeme)
        tokens = _FOLDED[lexeme]
        if tokens is _BLANK:
            continue
        if tokens is _OPEN:
            opened.append(coming)
            tokens, coming = () if coming is _BRACE else ("(",), _BRACE
        elif tokens is _FRACTION_OPEN:
            opened.append(_NUMERATOR)
            tokens, coming, first = ("(",), _BRACE, last - 1
        elif tokens is _CLOSE:
            closed = opened.pop() if opened else _BRACE
            tokens, coming = _CLOSING[closed], _GROUP if closed is _NUMERATOR else _BRACE
        else:
            coming = _GROUP if tokens and tokens[-1] in _TAKES_GROUP else _BRACE
        for word in tokens:
            if word in _LOOKS_BACK:
                if word == ")" and words[-2:-1] == ["("] and not _is_call(words, starts, ends):
                    del words[-2], starts[-2], ends[-2]  # brackets around one token change nothing
                    continue
                if word != ")" and _is_counted_power(words):
                    words[-1:] = [word, "^", _POWER_WORDS[words[-1]]]
                    starts += [first, first]
                    ends[-1:] = [last, last, last]
                    continue
            words.append(word)
            starts.append(first)
            ends.append(last)
    return Tokens(text, words, starts, ends)


def _is_call(words: list[str], starts: list[int], ends: list[int]) -> bool:
    """Returns whether the bracket before the last token opens the argument of a function, as in f(x)."""
    return len(words) > 2 and ends[-3] == starts[-2] and words[-3][0].isalpha() and words[-3] != "sqrt"


def _is_counted_power(words: list[str]) -> bool:
    """Returns whether the tokens end with a number and "square", "sq" or "cubic": "5 square" of "5 square metres"."""
    return len(words) > 1 and words[-1] in _POWER_WORDS and words[-2][0].isdecimal()


def _number(text: str) -> str:
    """Returns one spelling per value: "1000" for 1,000 and 1000, "0.5" for 0.50 and .5, "6" for 6.0 and 6."""
    if "," in text:
        text = text.replace("{,}", "").replace("\\,", "").replace(",", "")
    whole, _, part = text.partition(".")
    if not whole.isascii() or not part.isascii():
        whole, part = (unicodedata.normalize("NFKC", digits) for digits in (whole, part))
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    return f"{whole}.{part}" if part else whole


def _word(lexeme: str) -> str:
    word = lexeme.lower()
    if not word.isascii():
        word = unicodedata.normalize("NFKC", word)
        latin = word.translate(_CYRILLIC_LOOKALIKES)
        word = latin if latin.isascii() else word
    return _WORD_TOKENS.get(word, word)


def _command(lexeme: str) -> str:
    name = lexeme[1:]
    token = COMMANDS.get(name)
    return _word(name) if token is None else token


# For each kind, a function from a lexeme to its tokens, separated by spaces.
_FOLD = {
    "word": _word,
    "index": lambda lexeme: _number(unicodedata.normalize("NFKC", lexeme).strip("_{} \t")),  # x_1, x_{1}, x₁ as x1
    "number": _number,
    "symbol": lambda lexeme: _SYMBOL_TOKENS.get(lexeme, lexeme),
    "relation": lambda lexeme: _SYMBOL_TOKENS[lexeme],
    "command": _command,
    "option": lambda lexeme: "option:" + lexeme.rstrip(")")[-1].lower(),
    "digits": lambda lexeme: " / ".join(filter(str.isdecimal, lexeme)),  # \\frac12
    "degrees": lambda lexeme: "°",
    "percent": lambda lexeme: "%",
    "ideograph": str.lower,
    "nothing": lambda lexeme: "",
}
# Marks for the kinds whose tokens depend on the text around them. They are compared by identity.
_BLANK, _OPEN, _CLOSE, _FRACTION_OPEN = ("blank",), ("open",), ("close",), ("fraction",)
_MARKS = {"blank": _BLANK, "open": _OPEN, "close": _CLOSE, "fraction": _FRACTION_OPEN}


class _Folded(dict[str, tuple[str, ...]]):
    """A cache that maps each lexeme to its tokens. The tokens are computed on first use."""

    _KIND = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _KINDS.items()), re.DOTALL)

    def __missing__(self, lexeme: str) -> tuple[str, ...]:
        kind = self._kind(lexeme)
        tokens = _MARKS.get(kind) or tuple(_FOLD[kind](lexeme).split())
        if len(self) > 50_000:  # limits the memory if a model writes nonsense
            self.clear()
        if len(lexeme) < 50:
            self[lexeme] = tokens
        return tokens

    def _kind(self, lexeme: str) -> str:
        # The kind follows from the lexeme alone. For this reason a fraction's lexeme includes its brace.
        match = self._KIND.match(lexeme)
        assert match is not None and match.lastgroup is not None  # _KINDS cover every character
        return match.lastgroup


_FOLDED = _Folded()
