"""Compares the final answer of a completion with that of the solution: the answer check of `paper` and `robust`.

The steps, in this order; the first that applies decides, and the reason of a verdict names it:

    text     the normalised texts are equal
    choice   the solution's answer is a multiple-choice letter, alone or with its text
    yes/no   the solution's answer is yes, no, true or false
    value    the solution's answer is a value (values.py); the answer must be read whole, and be equal

Everything else is wrong. No step calls SymPy, except for the values of formulas that are not rational.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence as Readings

from r1vl_jax.rewards.algebra import Formula, exact, is_carried_out, number, proportional, same_value
from r1vl_jax.rewards.answer_text import normalise, text_key
from r1vl_jax.rewards.choices import DECISIONS, FUSED, Choice, read_choice, read_decision
from r1vl_jax.rewards.units import DEGREE, PERCENT, parse_unit
from r1vl_jax.rewards.value_types import Equation, Interval, Named, Quantity, Ratio, Sequence, Text, Time, Value
from r1vl_jax.rewards.values import parse


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and the step that decided, with a short phrase."""

    right: bool
    reason: str


@functools.lru_cache(maxsize=2048)  # answers of a group are often the same
def check_answer(answer: str, gold: str) -> Verdict:
    """Compares an answer with the solution's answer.

    Raises:
      RuntimeError: SymPy is needed outside the main thread, where no time limit stops it.
    """
    if answer.strip() == gold.strip():
        return Verdict(bool(answer.strip()), "text: the same")
    return _compare(normalise(answer), normalise(gold))


def _compare(a: str, g: str, choices: bool = True) -> Verdict:
    """Compares normalised texts. `choices`: they may be choices; the text of an option is none itself."""
    key = text_key(a)
    if key and key == text_key(g):
        return Verdict(True, "text: equal")
    by_choice = _by_choice(a, g) if choices else None
    return by_choice or _by_yes_no(a, g) or _by_value(a, g) or Verdict(False, "text: not equal")


# --- multiple choice --------------------------------------------------------------------------------------------------


def _by_choice(a: str, g: str) -> Verdict | None:
    answer, gold = read_choice(a), read_choice(g)
    if answer is not None and gold is not None:
        right = answer.letters == gold.letters and (gold.guess or not answer.guess)
        return Verdict(right, f"choice: {_spelled(answer)}, expected {_spelled(gold)}")
    for choice, text in ((answer, g), (gold, a)):  # A, C and AC
        if choice is not None and len(choice.letters) > 1 and FUSED.fullmatch(text):
            return Verdict("".join(sorted(choice.letters)) == text, f"choice: {_spelled(choice)} and {text}")
    if answer is not None and answer.text:
        verdict = _compare(answer.text, g, choices=False)
        return Verdict(True, f"choice: the option's text, {verdict.reason}") if verdict.right else None
    if gold is None:
        return None
    if gold.text:
        verdict = _compare(a, gold.text, choices=False)
        return Verdict(verdict.right, f"choice: the option's text, {verdict.reason}")
    return Verdict(False, f"choice: no option, expected {_spelled(gold)}")


def _spelled(choice: Choice) -> str:
    return ", ".join(sorted(choice.letters))


# --- yes and no -------------------------------------------------------------------------------------------------------


def _by_yes_no(a: str, g: str) -> Verdict | None:
    gold = read_decision(g)
    if gold is None:
        return None
    answer = read_decision(a)
    if answer is None:
        return Verdict(False, f"yes/no: neither, expected {gold}")
    return Verdict(DECISIONS[answer] == DECISIONS[gold], f"yes/no: {answer}, expected {gold}")


# --- values -----------------------------------------------------------------------------------------------------------


def _by_value(a: str, g: str) -> Verdict | None:
    gold, answer = parse(g), parse(a)
    if not gold and answer and isinstance(answer[0], Named):  # "The colour is blue" for "blue"
        gold = (Text(text_key(g)),)
    elif not answer and gold and isinstance(gold[0], Named):
        answer = (Text(text_key(a)),)
    if not gold:
        return None
    if not answer:
        return Verdict(False, "value: the answer is not read whole")
    reason = _difference(answer, gold)
    return Verdict(not reason, f"value: {reason or 'equal'}")


def _difference(answer: Readings[Value], gold: Readings[Value]) -> str:
    """Returns how the readings of two sides differ; "" if two of them are equal."""
    reasons = []
    for g in gold:
        for a in answer:
            reason = _unequal(a, g)
            if not reason:
                return ""
            reasons.append(reason)
    return next((reason for reason in reasons if reason != _OTHER_KIND), _OTHER_KIND)


_OTHER_KIND = "another kind of value"
_NOT_EQUAL = "not equal"


def _unequal(a: Value, g: Value) -> str:
    if isinstance(a, Named) or isinstance(g, Named):
        mine, others = _names(a), _names(g)
        coordinates = (_is_point(a) and isinstance(g, Sequence)) or (_is_point(g) and isinstance(a, Sequence))
        if mine and others and not coordinates and not _names_agree(mine, others):
            return "another name"
        return _difference(a.value if isinstance(a, Named) else (a,), g.value if isinstance(g, Named) else (g,))
    if isinstance(a, Sequence) and isinstance(g, Sequence):
        return _unequal_sequences(a, g)
    if isinstance(a, Quantity) and isinstance(g, Quantity):
        return _unequal_quantities(a, g)
    if isinstance(a, Ratio | Quantity) and isinstance(g, Ratio | Quantity):
        return _unequal_ratios(a, g)
    if isinstance(a, Interval) and isinstance(g, Interval):
        if a.closed != g.closed:
            return "another end of the interval"
        return "" if same_value(a.low, g.low) and same_value(a.high, g.high) else _NOT_EQUAL
    if isinstance(a, Equation) and isinstance(g, Equation):
        if a.relation != g.relation:
            return "another relation"
        return "" if proportional(a.difference, g.difference, positive=g.relation in "<≤") else _NOT_EQUAL
    if isinstance(a, Time) and isinstance(g, Time):
        return _unequal_times(a, g)
    if isinstance(a, Text) and isinstance(g, Text):
        return "" if a == g else _NOT_EQUAL
    if isinstance(a, Sequence | Quantity) and isinstance(g, Sequence | Quantity):
        return "another number of items"
    return _OTHER_KIND


def _is_point(value: Value) -> bool:
    """Returns whether a value is a point with a name: A(3, 4)."""
    point = value.value[0] if isinstance(value, Named) else None
    return isinstance(point, Sequence) and bool(point.bracket)


def _names(value: Value) -> list[frozenset[str]]:
    """Returns the names of a value, or of each item of a list."""
    if isinstance(value, Sequence):
        return [names for item in value.items for names in _names(item[0])]
    return [value.names] if isinstance(value, Named) and value.names else []


def _names_agree(first: Readings[frozenset[str]], second: Readings[frozenset[str]]) -> bool:
    return all(
        any(a == b or (min(len(a), len(b)) > 3 and (a in b or b in a)) for a in mine for b in others)
        for mine in first
        for others in second
    )


def _unequal_quantities(a: Quantity, g: Quantity) -> str:
    answer, gold = a.formula, g.formula
    if not (a.unit and g.unit) and _in_radians(a, g):
        return ""
    value = exact(gold)
    if value is not None and is_carried_out(gold) and not is_carried_out(answer):
        return "arithmetic is not carried out"
    if value is not None and "+" in (answer[0], gold[0]) and answer[0] == gold[0]:
        return "" if answer == gold else _NOT_EQUAL  # 2019-2020 may be a range, and is not 2020-2021
    if a.unit and g.unit:
        if not a.unit.agrees(g.unit):
            return "another unit"
        if a.unit.size != g.unit.size and a.unit.dimensions == g.unit.dimensions:
            answer, gold = ("*", number(a.unit.size), answer), ("*", number(g.unit.size), gold)
        return "" if same_value(answer, gold) else _NOT_EQUAL
    share = _is_percent(a) and value is not None and abs(value) < 1
    if not share and same_value(answer, gold):  # 0.28% is not 0.28
        return ""
    for percent, plain in ((a, g), (g, a)):
        if _is_percent(percent) and same_value(_hundredths(percent.formula), plain.formula):
            return ""
    return _NOT_EQUAL


def _is_percent(quantity: Quantity) -> bool:
    return quantity.unit is not None and quantity.unit.dimensions == ((PERCENT, 1),)


def _hundredths(formula: Formula) -> Formula:
    if formula[0] == "num":
        return number(formula[1] / 100, formula[2] + 2)
    return ("/", formula, number(100))


def _in_radians(a: Quantity, g: Quantity) -> bool:
    """Returns whether one is an angle in degrees, and the other the same angle as a multiple of π."""
    return any(
        degrees.unit == parse_unit(DEGREE)
        and _has_pi(plain.formula)
        and same_value(("deg", degrees.formula), plain.formula)
        for degrees, plain in ((a, g), (g, a))
    )


def _has_pi(formula: Formula) -> bool:
    return formula == ("const", "pi") or any(isinstance(part, tuple) and _has_pi(part) for part in formula[1:])


def _unequal_ratios(a: Ratio | Quantity, g: Ratio | Quantity) -> str:
    spelled = [isinstance(value, Ratio) and value.spelled for value in (a, g)]
    if all(spelled):
        return "" if a == g else _NOT_EQUAL
    if any(spelled) and isinstance(a, Quantity) | isinstance(g, Quantity):
        return _OTHER_KIND
    sides = []
    for value in (a, g):
        if isinstance(value, Ratio):
            sides.append(value.parts)
        elif value.unit is not None:
            return _OTHER_KIND
        else:
            sides.append((value.formula, number(1)))
    answer, gold = sides
    if len(answer) != len(gold):
        return "another number of parts"
    first_a, first_g = answer[0], gold[0]
    rest = zip(answer[1:], gold[1:], strict=True)
    return "" if all(same_value(("*", x, first_g), ("*", y, first_a)) for x, y in rest) else _NOT_EQUAL


def _unequal_times(a: Time, g: Time) -> str:
    if a.clock and g.clock or "24" in (a.clock, g.clock):
        return "" if a.seconds == g.seconds else _NOT_EQUAL
    return "" if (a.seconds - g.seconds) % (12 * 3600) == 0 else _NOT_EQUAL


def _unequal_sequences(a: Sequence, g: Sequence) -> str:
    if len(a.items) != len(g.items):
        return f"{len(a.items)} items, expected {len(g.items)}"
    if a.bracket and g.bracket and a.bracket != g.bracket and len(g.items) == 2:
        return "other brackets"
    if a.bracket or g.bracket or _is_labelled(a) != _is_labelled(g):
        pairs = zip(a.items, g.items, strict=True)
        return next((reason for reason in (_difference(x, y) for x, y in pairs) if reason), "")
    left = list(g.items)
    for item in a.items:
        place = next((place for place, other in enumerate(left) if not _difference(item, other)), None)
        if place is None:
            return "another item"
        del left[place]
    return ""


def _is_labelled(sequence: Sequence) -> bool:
    """Returns whether each item of a list says what it is: by a name before it, or by units that differ."""
    firsts = [item[0] for item in sequence.items]
    units = {first.unit for first in firsts if isinstance(first, Quantity)}
    return all(isinstance(first, Named) for first in firsts) or (None not in units and len(units) > 1)
