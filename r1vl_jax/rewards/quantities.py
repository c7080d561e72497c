"""Reads single values: numbers and formulas with their units or names, ratios, and times of day."""

from __future__ import annotations

import re
from fractions import Fraction

from r1vl_jax.rewards.algebra import exact, letters, number, without_degrees
from r1vl_jax.rewards.formulas import MULTIPLIERS, parse_formula
from r1vl_jax.rewards.latex import MONEY
from r1vl_jax.rewards.units import DEGREE, name_unit, parse_unit
from r1vl_jax.rewards.value_types import Quantity, Ratio, Time

_RATIO_SIGN = re.compile(r"\s*:\s*|(?<=\d)\s+to\s+(?=\d)")
_TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(°|'{1,2}|\"|[^\W\d_]+)\s*(?:and\s+|,\s*)?")
_OF_DEGREES = {"minute": "'", "minutes": "'", "分": "'", "second": '"', "seconds": '"', "秒": '"', "''": '"'}
_FEET = {"'": "ft", "''": "in", '"': "in"}  # the other meaning of the signs for minutes and seconds
_UNIT_START = re.compile(r"(?<![^\W\d_])(?=[^\W\d_]|[°%'\"$¢€£¥₹¤(])")
_MONEY_FIRST = re.compile(
    rf"(-?)\s*(?:US|CA|AU|HK)?\s*([{MONEY}€£¥₹]|USD|EUR|GBP|RMB|CNY|Rs\.?)\s*(?=[\d.(-])", re.IGNORECASE
)
_UNIT_CHARS = 50  # a unit or a name is not longer
_TIGHT_UNITS = frozenset("mgLJW")  # single letters that are units right after a number: "5m", but not "2x"


def read_single(text: str) -> list[Quantity | Ratio | Time]:
    """Returns the readings of a text as one value; none if no reading takes the whole text."""
    times = _time(text)
    return [*([] if times and times[0].clock in ("a", "p") else _ratio(text)), *times, *_quantity(text)]


def read_compound(text: str) -> list[Quantity]:
    """Reads a quantity in several units: 45°30', 5 ft 8 in, 1 hour and 30 minutes. The result is in the first unit."""
    parts = list(_PART.finditer(text))
    if len(parts) < 2 or "".join(part[0] for part in parts) != text:
        return []
    signs = _FEET if parts[0][2] == "'" else _OF_DEGREES if parts[0][2] in "°度" else {"''": '"'}
    units = [parse_unit(signs.get(part[2], part[2])) for part in parts]
    known = [unit for unit in units if unit is not None]
    first, sizes = known[0] if known else None, [unit.size for unit in known]
    same_kind = len({unit.dimensions for unit in known}) == 1 and len(known) == len(units)
    if first is None or not same_kind or sorted(set(sizes), reverse=True) != sizes:
        return []
    total = sum((Fraction(part[1]) * size for part, size in zip(parts, sizes, strict=True)), Fraction(0))
    return [Quantity(number(total / first.size), first)]


def _ratio(text: str) -> list[Ratio]:
    parts = [parse_formula(part) for part in _RATIO_SIGN.split(text)]
    if not 2 <= len(parts) <= 5 or any(part is None or exact(part) == 0 for part in parts):
        return []
    return [Ratio(tuple(part for part in parts if part is not None), ":" not in text)]


def _time(text: str) -> list[Time]:
    match = _TIME.fullmatch(text)
    if match is None or not (match[2] or match[4]) or int(match[1]) > 24:
        return []
    half, hours = (match[4] or "").lower(), int(match[1])
    clock = half or ("24" if hours > 12 else "")
    if half:
        hours = hours % 12 + 12 * (half == "p")
    return [Time(3600 * hours + 60 * int(match[2] or 0) + int(match[3] or 0), clock)]


def _quantity(text: str) -> list[Quantity]:
    """Reads a formula, alone or with a unit or a name behind it."""
    money = _MONEY_FIRST.match(text)
    if money:
        unit = parse_unit(money[2])
        amounts = _quantity(money[1] + text[money.end() :])
        return [Quantity(amount.formula, unit) for amount in amounts if amount.unit in (None, unit)]
    found = []
    for match in _UNIT_START.finditer(text, max(1, len(text) - _UNIT_CHARS)):
        formula, behind = parse_formula(text[: match.start()]), text[match.start() :]
        if formula is None or without_degrees(formula)[1] or _is_variable(behind, text[match.start() - 1]):
            continue
        unit = parse_unit(behind)
        if unit is None and exact(formula) is not None and _may_be_name(behind, text[match.start() - 1]):
            unit = name_unit(behind)
        if unit is not None:
            feet = parse_unit(_FEET[behind]) if behind in _FEET else None
            found += [Quantity(formula, one) for one in (unit, feet) if one is not None]
            if len(behind) > 1 and not letters(formula):
                return found
            break  # "3 m" and "m g h" may be products, too
    formula = parse_formula(text)
    if formula is not None:
        plain, degrees = without_degrees(formula)
        found.append(Quantity(plain, parse_unit(DEGREE) if degrees else None))
    return found


def _may_be_name(word: str, before: str) -> bool:
    """Returns whether the last words of a text may name what is counted: "3 cups", but not "3xy" and "3 million"."""
    return (before.isspace() or len(word) > 3 or not word.isascii()) and word.split()[0].lower() not in MULTIPLIERS


def _is_variable(letter: str, before: str) -> bool:
    """Returns whether the last letter of a text is a factor and no unit: "2x", but not "2 m"."""
    single = len(letter) == 1 and letter.isascii() and letter.isalpha()
    return single and not before.isspace() and letter not in _TIGHT_UNITS
