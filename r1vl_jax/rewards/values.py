"""Parses a normalised answer whole into values. What leaves anything unread but a unit or a name is no value.

(0, 3) is a point and an interval, 3:45 a ratio and a time, 1,234 a number and a list. So a parse returns all readings,
and compare.py looks for two that agree.
"""

from __future__ import annotations

import re

from r1vl_jax.rewards.algebra import Formula, letters, number, rounds, same_value
from r1vl_jax.rewards.answer_text import text_key
from r1vl_jax.rewards.formulas import parse_formula
from r1vl_jax.rewards.quantities import read_compound, read_single
from r1vl_jax.rewards.units import name_unit, parse_unit
from r1vl_jax.rewards.value_types import Equation, Interval, Named, Quantity, Sequence, Text, Value

MAX_CHARS = 500  # a longer text is no value; some patterns take quadratic time
MAX_ITEMS = 50
MAX_DEPTH = 6

_INFINITE: Formula = ("const", "∞")
_REALS = frozenset(["all real numbers", "all reals", "real numbers", "r"])
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,\d{3})+(?![\d,])|(?<!\d \d)(?: \d{3})+(?![\d/]| \d))")
_ZEROS = re.compile(r"[1-9]\d{0,2},0\d\d(?!\d)")  # belongs to a number: no list has the item 000
_DECIMAL_COMMA = re.compile(r"-?(?:0,|\d+,(?!\d{3}(?!\d)))\d+(?:\s?[^\d,]*)")
_SEPARATORS = re.compile(r"[(\[{]|[)\]}]|[,;&∪]|\s+U\s+(?=[(\[])|\s*\b(?:and|or)\b\s*|\s*[和或与且]\s*")
_RELATION = re.compile(r"[(\[{]|[)\]}]|[=<>≤≥≠≈∈]")
_VERB = (
    "is|are|was|were|equals|(?:will|would|must|should) be|has|have|had|costs?|takes?|needs?|weighs?|measures?"
    "|contains?|makes?|made|gets?|paid|spent|earned|bought|sold"
)
_IS = re.compile(
    rf"(?P<name>[^\W\d][^\d=<>≤≥≈≠∈,;$()]{{0,80}}?(?:\s\d{{1,2}})?)\s+(?:{_VERB})\s+(?=\S)"
    r"|(?P<topic>∠?[^\W\d_]{1,20}(?<!不))(?:等于|为|是)\s*(?=\S)"
    r"|(?P<label>[^\W\d_]{3,}(?: [^\W\d_]+){0,5}):\s+(?=\S)",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:not|never|no|nor|neither|cannot|unless|except|false|wrong)\b|n't\b|[不非没无]", re.I)
_ATOM = r"[^\W\d_]+[\d'|]*(?:_?\([^()=]*\)|_\w+)?"
_PHRASE = r"[^\W\d_]+(?:(?:[ ']|-(?=..))[∠△]?[^\W\d_]+){1,8}(?: \d{1,2})?"
_NAME = re.compile(
    rf"(?:(?:m|sin|cos|tan)?\s*∠\s*|S?△\s*|\|\s*)?(?:{_ATOM}(?:\s*[:/]\s*{_ATOM})*|{_PHRASE})"
    rf"|∠\s*\d+|\({_ATOM}(?:, ?{_ATOM})+\)|frac\({_ATOM}\)\({_ATOM}\)"
)
_IDLE_NAME = re.compile(
    r"\s(?:is|are|was|were)?\s*(?:approximately)?$|[△|\s]|m?∠|的.*"
    r"|\b(?:an?|the)\b(?=\s)|\b(?:values?|measure|length|size|number|coordinates?|of|angle|side|point|total)\b",
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"([A-Z]\w?'?|matrix)?\s*([(\[{])(.*)([)\]}])", re.DOTALL)
_NAMED_NUMBER = re.compile(r"(?<=\d)\s*([^\W\d_]+)(?![(\w])")
_CONJUNCTION = re.compile(r"\b(?:and|or)\b|[和或]")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def parse(text: str) -> tuple[Value, ...]:
    """Returns the readings of a normalised answer; none if no reading takes the whole text."""
    if len(text) > MAX_CHARS:
        return ()
    spellings = [_THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text)]
    if not _ZEROS.search(text):
        spellings.append(text)
    if _DECIMAL_COMMA.fullmatch(text):
        spellings.append(text.replace(",", "."))
    return tuple(dict.fromkeys(value for spelling in dict.fromkeys(spellings) for value in _side(spelling, 0)))


def _side(text: str, depth: int) -> list[Value]:
    """Returns the readings of a text that may be a list."""
    if depth > MAX_DEPTH:
        return []
    compound: list[Value] = [*read_compound(text)]
    if ";" in text and "," in text:
        groups = _split(text, ";")
        if groups is not None and len(groups) > 1:
            return _listing([_side(group, depth + 1) for group in groups], False)
    parts = _split(text)
    if parts is None:
        return compound
    spread = [spelling for part in parts for spelling in _both_signs(part)]
    if len(spread) == 1:
        return compound + _item(spread[0], depth)
    if "∪" in text and all(part[0] == "{" and part[-1] == "}" for part in spread):  # the union of sets
        union = dict.fromkeys(item for part in spread for item in _split(part[1:-1]) or [])
        return _side("{" + ", ".join(union) + "}", depth + 1)
    alternatives = re.search(r"\bor\b|或", text) is not None  # "red or blue" is a guess, and "2 or 3" are two solutions
    items = [_item(part, depth + 1) or ([] if alternatives else _words(part)) for part in spread]
    return compound + _listing(items, len(parts) == 2 and not alternatives and "∪" not in text)


def _split(text: str, only: str = "") -> list[str] | None:
    """Splits a list outside brackets, at commas, "and" and "or", or `only` at one sign.

    Returns None if brackets do not match or items are missing.
    """
    parts, start, opened = [], 0, 0
    for match in _SEPARATORS.finditer(text):
        sign = match[0].strip()
        if sign in ("(", "[", "{"):
            opened += 1
        elif sign in (")", "]", "}"):
            opened -= 1
            if opened < 0:
                return None
        elif opened == 0 and (not only or sign == only):
            parts.append(text[start : match.start()].strip())
            start = match.end()
    parts.append(text[start:].strip())
    filled = [part for part in parts if part]
    # "2, and 3" has an empty part between its separators; "2,," has too many.
    return filled if opened == 0 and filled and len(parts) - len(filled) <= 1 and len(filled) <= MAX_ITEMS else None


def _both_signs(text: str) -> list[str]:
    """Returns a text with ± once with + and once with -."""
    if "±" not in text and "∓" not in text:
        return [text]
    return [text.replace("±", "+").replace("∓", "-"), text.replace("±", "-").replace("∓", "+")]


def _words(text: str) -> list[Value]:
    """Reads an item of a list that consists of words."""
    key = text_key(text)
    return [Text(key)] if re.fullmatch(r"[^\W\d_]{2,}(?:[ -][^\W\d_]+){0,3}", key) else []


def _listing(items: list[list[Value]], joined_by_and: bool) -> list[Value]:
    if not all(items):
        return []
    firsts = [item[0] for item in items]
    head = firsts[0]
    if any(isinstance(first, Text) for first in firsts) and not all(isinstance(first, Text) for first in firsts):
        return []
    if joined_by_and and all(isinstance(first, Named) for first in firsts):
        both = _intersection(firsts[0], firsts[1])
        if both is not None:
            return [both]
    if isinstance(head, Named):  # the name before the first item is that of all: x = 2 or -3
        pairs = zip(firsts, items, strict=True)
        named = [first if isinstance(first, Named) else Named(head.names, tuple(item)) for first, item in pairs]
        bases = frozenset(_without_index(name) for value in named for name in value.names)
        if len(bases) == 1:
            return [Named(bases, (Sequence(tuple(value.value for value in named)),))]
        if not all(isinstance(first, Named) for first in firsts):
            return []
    return [Sequence(tuple(map(tuple, items)))]


def _without_index(name: str) -> str:
    return name.rstrip("0123456789") or name


def _intersection(first: Value, second: Value) -> Value | None:
    """Returns the interval of "x > 1 and x < 5"; None for anything else."""
    if not (isinstance(first, Named) and isinstance(second, Named) and first.names == second.names):
        return None
    a, b = first.value[0], second.value[0]
    if not (isinstance(a, Interval) and isinstance(b, Interval)):
        return None
    if a.low != ("neg", _INFINITE):
        a, b = b, a
    if a.low == ("neg", _INFINITE) and b.high == _INFINITE:
        return Named(first.names, (Interval(b.low, a.high, (b.closed[0], a.closed[1])),))
    return None


def _item(text: str, depth: int) -> list[Value]:
    """Returns the readings of a text that is no list."""
    text = text.strip().removeprefix("≈").strip()
    if text_key(text) in _REALS:
        return [Interval(("neg", _INFINITE), _INFINITE, (False, False))]
    set_builder = re.fullmatch(r"\{\s*\w+\s*[|:](.*)\}", text)
    if set_builder:
        return _item(set_builder[1], depth + 1)
    sides, relations = _relations(text)
    match = _IS.match(sides[0])
    if match is not None and not _DENIED.search(match[0]) and match.end() < len(sides[0]):
        sides = [match["name"] or match["topic"] or match["label"], sides[0][match.end() :], *sides[1:]]
        relations = ["=", *relations]
    if relations:
        return _related(sides, relations, depth)
    return _bracketed(text, depth) or [*read_single(text)]


def _relations(text: str) -> tuple[list[str], list[str]]:
    """Splits a text at the relations outside brackets."""
    sides, relations, start, opened = [], [], 0, 0
    for match in _RELATION.finditer(text):
        if match[0] in "([{":
            opened += 1
        elif match[0] in ")]}":
            opened -= 1
        elif opened == 0:
            sides.append(text[start : match.start()].strip())
            relations.append(match[0])
            start = match.end()
    return [*sides, text[start:].strip()], relations


def _related(sides: list[str], relations: list[str], depth: int) -> list[Value]:
    if set(relations) <= {"=", "≈"}:
        return _chain(sides, "≈" in relations, depth)
    if relations == ["∈"]:
        everything = [Interval(("neg", _INFINITE), _INFINITE, (False, False))] if sides[1] == "R" else []
        inside = everything or _side(sides[1], depth + 1)
        return [Named(frozenset([name_key(sides[0])]), tuple(inside))] if _is_name(sides[0]) and inside else []
    if len(relations) == 1:
        return _inequality(sides[0], relations[0], sides[1])
    if len(relations) == 2 and _is_name(sides[1]) and (set(relations) <= {"<", "≤"} or set(relations) <= {">", "≥"}):
        low, high = parse_formula(sides[0]), parse_formula(sides[2])
        if low is None or high is None:
            return []
        closed = (relations[0] in "≤≥", relations[1] in "≤≥")
        if relations[0] in ">≥":
            low, high, closed = high, low, (closed[1], closed[0])
        return [Named(frozenset([name_key(sides[1])]), (Interval(low, high, closed),))]
    return []


def _chain(sides: list[str], approximate: bool, depth: int) -> list[Value]:
    """Reads equalities: a name and its value (x = 3), a computation with its result (2 + 1 = 3), or an equation."""
    if len(sides) == 2 and not _is_name(sides[0]) and _is_name(sides[1]) and parse_formula(sides[1]) is not None:
        sides = sides[::-1]  # 3 = x
    if len(sides) == 2 and sides[0].startswith("(") and _is_name(sides[0]):
        return _named_items(sides[0].strip("()").split(","), _side(sides[1], depth + 1))
    names: list[str] = []
    while len(sides) > 1 and _is_name(sides[0]):
        names, sides = [*names, sides[0]], sides[1:]
    readings = [_side(side, depth + 1) or _side(_without_units(side), depth + 1) for side in sides]
    values: list[Value] = list(readings[0])
    if len(sides) == 1 and names:
        values = values or _words(sides[0])
    elif all(readings) and _consistent([reading[0] for reading in readings], approximate):
        values = [value for reading in (readings if approximate else readings[-1:]) for value in reading]
    else:
        values = []
    found: list[Value] = [Named(frozenset(map(name_key, names)), tuple(values))] if names and values else values
    both = [*names[-1:], *sides]
    left, right = (parse_formula(side) for side in both[:2]) if len(both) == 2 else (None, None)
    if left is not None and right is not None and len(letters(left) | letters(right)) > (1 if names else 0):
        found.append(Equation(("+", left, ("neg", right))))
    return found


def _named_items(names: list[str], values: list[Value]) -> list[Value]:
    """Reads (x, y) = (1, 2)."""
    keys = [frozenset([name_key(name)]) for name in names]
    return [
        Sequence(tuple((Named(key, item),) for key, item in zip(keys, value.items, strict=True)))
        for value in values
        if isinstance(value, Sequence) and len(value.items) == len(keys)
    ]


def _without_units(text: str) -> str:
    """Removes the units and names in a computation: 60 cm - 20 cm."""
    return _NAMED_NUMBER.sub(lambda match: "" if parse_unit(match[1]) or name_unit(match[1]) else match[0], text)


def _consistent(values: list[Value], approximate: bool) -> bool:
    """Returns whether all are quantities without letters, and equal, or `approximate` and one rounds the other."""
    quantities = [value for value in values if isinstance(value, Quantity) and not letters(value.formula)]
    if len(quantities) < len(values):
        return False
    first, *rest = quantities
    for value in rest:
        formulas = first.formula, value.formula
        if first.unit and value.unit and first.unit.size != value.unit.size:
            formulas = ("*", number(first.unit.size), formulas[0]), ("*", number(value.unit.size), formulas[1])
        if not same_value(*formulas) and not (approximate and rounds(*formulas)):
            return False
    return True


def _inequality(left: str, relation: str, right: str) -> list[Value]:
    if relation != "≠" and _is_name(right) and not _is_name(left):
        left, relation, right = right, {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}[relation], left
    value = parse_formula(right)
    if value is None or (left and not _is_name(left) and parse_formula(left) is None):
        return []
    if relation in "<≤>≥" and not letters(value) and (not left or _is_name(left)):
        closed = relation in "≤≥"
        if relation in "<≤" and re.fullmatch(r"\|\s*[a-z]\s*\|", left):
            between = Interval(("neg", value), value, (closed, closed))
            return [Named(frozenset([name_key(left)]), (between,))]
        below = Interval(("neg", _INFINITE), value, (False, closed))
        interval = below if relation in "<≤" else Interval(value, _INFINITE, (closed, False))
        return [Named(frozenset([name_key(left)] if left else []), (interval,))]
    formula = parse_formula(left)
    if formula is None:
        return []
    difference: Formula = ("+", formula, ("neg", value))
    if relation in ">≥":
        difference, relation = ("neg", difference), {">": "<", "≥": "≤"}[relation]
    return [Equation(difference, relation)]


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and text not in ("π", "e", "i", "∞") and not _DENIED.search(text)


def name_key(text: str) -> str:
    """Returns a name without articles, case, and words such as "value of"."""
    return _IDLE_NAME.sub("", text.lower().replace("_", "")) or text.lower()


def _bracketed(text: str, depth: int) -> list[Value]:
    """Reads a tuple, an interval, a set, or brackets around one value; a name may stand before: A(3, 4)."""
    match = _BRACKETS.fullmatch(text)
    parts = None if match is None else _split(match[3])
    if match is None or parts is None:
        return []
    name, opening, inner, closing = match.groups()
    matching = _CLOSING[opening] == closing
    if name == "matrix" and "&" in inner and ";" in inner:
        rows = [_bracketed(f"[{row}]", depth + 1) for row in _split(inner, ";") or [""]]
        return [Sequence(tuple(map(tuple, rows)), "[")] if all(rows) else []
    if len(parts) < 2 or _CONJUNCTION.search(inner):
        return _side(inner, depth + 1) if matching and not name else []
    spread = [spelling for part in parts for spelling in _both_signs(part)]
    items = tuple(tuple(_item(part, depth + 1) or _words(part)) for part in spread)
    found: list[Value] = []
    if matching and all(items):
        found.append(Sequence(items, "" if opening == "{" else opening))
    ends = [parse_formula(part) for part in parts]
    if len(ends) == 2 and opening != "{" and closing != "}" and ends[0] is not None and ends[1] is not None:
        found.append(Interval(ends[0], ends[1], (opening == "[", closing == "]")))
    return [Named(frozenset([name_key(name)]), tuple(found))] if found and name not in (None, "matrix") else found
