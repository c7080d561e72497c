"""Compares the values of formulas.

A formula is a tuple, plain data: ("num", value, decimal places as written), ("sym", name), ("const", "pi" or "e" or "i"
or "∞"), ("fn", name, argument), or an operator and its operands: "+", "*", "/", "^", "neg", "!", "deg",
"root" (radicand, index), "log" (argument, base), "binom". formulas.py makes them from text.

`size_bits` bounds the digits of every intermediate value before anything is computed, so 10^10^10^10 is never computed.
Rational formulas are compared as fractions. SymPy evaluates the others, under math-verify's limit of 5 s.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Formula = tuple[Any, ...]

MAX_BITS = 200_000
MIN_DECIMALS = 4  # a decimal with as many places stands for the number that it rounds: 0.3333 for 1/3
TIMEOUT_S = 5
# Values at which formulas with letters are compared: of both signs, small and large, and no special points.
_POINTS = (Fraction(347, 211), Fraction(-529, 307), Fraction(41, 113), Fraction(1277, 101))
_DIGITS, _TOLERANCE = 30, 1e-20


def number(value: Fraction | int, decimals: int = 0) -> Formula:
    """Returns the formula of a number. `decimals` counts the decimal places with which it was written."""
    return ("num", Fraction(value), decimals)


def size_bits(formula: Formula) -> float:
    """Returns an upper bound of the bits that the value of a formula, or any value on the way to it, takes.

    Raises:
      OverflowError: the bound is beyond the range of floats.
    """
    kind, *parts = formula
    if kind == "num":
        return max(parts[0].numerator.bit_length(), parts[0].denominator.bit_length(), 1)
    if kind in ("sym", "const"):
        return 4
    if kind == "fn":
        inner = size_bits(parts[1])
        return 2.0**inner * 2 if parts[0] in ("exp", "sinh", "cosh") else inner + 16
    bits = [size_bits(part) for part in parts]
    if kind == "^":
        exponent = exact(parts[1]) if bits[1] < 64 else None
        return bits[0] * float(2.0 ** bits[1] if exponent is None else max(1, abs(exponent))) + bits[1]
    if kind in ("!", "binom"):
        return 2.0 ** bits[0] * (bits[0] + 1)
    return sum(bits) + len(bits) - 1


def exact(formula: Formula) -> Fraction | None:
    """Returns the value of a formula if it is rational and found by arithmetic; None otherwise, or if it has none."""
    kind, *parts = formula
    if kind == "num":
        return parts[0]
    if kind in ("sym", "const", "fn", "log", "deg"):
        return None
    values = [exact(part) for part in parts]
    if any(value is None for value in values):
        return None
    a, b = (*values, Fraction(0))[:2]
    assert a is not None and b is not None
    if kind == "+":
        return a + b
    if kind == "*":
        return a * b
    if kind == "neg":
        return -a
    if kind == "/":
        return a / b if b else None
    if kind == "^":
        return a ** int(b) if b.denominator == 1 and (a or b > 0) else None
    if kind == "root":
        return _exact_root(a, b)
    if kind == "!":
        return Fraction(math.factorial(int(a))) if a.denominator == 1 and a >= 0 else None
    whole = a.denominator == b.denominator == 1 and a >= 0 and b >= 0  # of a binomial
    return Fraction(math.comb(int(a), int(b))) if whole else None


def _exact_root(a: Fraction, index: Fraction) -> Fraction | None:
    """Returns the square root of a square; None for any other root."""
    if index != 2 or a < 0:
        return None
    top, bottom = math.isqrt(a.numerator), math.isqrt(a.denominator)
    return Fraction(top, bottom) if top * top == a.numerator and bottom * bottom == a.denominator else None


def letters(formula: Formula) -> frozenset[str]:
    """Returns the names in a formula that stand for unknown values."""
    if formula[0] == "sym":
        return frozenset([formula[1]])
    return frozenset().union(*(letters(part) for part in formula[1:] if isinstance(part, tuple)))


def is_carried_out(formula: Formula) -> bool:
    """Returns whether a formula is a number as people write it: 3, -3/4, 2 1/2, 1.5 * 10^3, 2^10; not 15 - 10."""
    kind, *parts = formula
    if kind == "*":
        return parts[0][0] == "num" and parts[1][:2] == ("^", number(10)) and is_carried_out(parts[1])
    return kind == "num" or (kind in ("neg", "/", "^") and all(map(is_carried_out, parts)))


def without_degrees(formula: Formula) -> tuple[Formula, bool]:
    """Removes degree signs outside functions. Returns the formula, and whether it had one."""
    kind, *parts = formula
    if kind == "deg":
        return parts[0], True
    if kind not in ("+", "neg", "*", "/"):
        return formula, False
    inner = [without_degrees(part) for part in parts]
    return (kind, *(part for part, _ in inner)), any(found for _, found in inner)


def same_value(answer: Formula, gold: Formula) -> bool:
    """Returns whether two formulas have the same value, for all values of their letters.

    Raises:
      RuntimeError: SymPy is needed outside the main thread, where no time limit stops it.
    """
    if answer == gold:
        return True
    a, g = exact(answer), exact(gold)
    if a is not None and g is not None:
        return a == g or _rounds(answer, g) or _rounds(gold, a)
    if letters(answer) != letters(gold):
        return False
    constant = not letters(gold)

    def compare() -> bool:
        # With letters only real values count: ln(x^2) is 2 ln(x) where x is positive.
        found = [(_value(answer, point), _value(gold, point)) for point in _points(gold)]
        values = [(a, g) for a, g in found if a is not None and g is not None]
        values = [(a, g) for a, g in values if constant or (a.is_real and g.is_real)]
        return bool(values) and all(_close(a, g, answer, gold) for a, g in values)

    return _limited(compare)


def proportional(answer: Formula, gold: Formula, positive: bool = False) -> bool:
    """Returns whether one formula is a constant times the other, as the sides of equal equations are.

    Args:
      positive: only a positive constant counts, as between the sides of equal inequalities.

    Raises:
      RuntimeError: as in `same_value`.
    """
    if letters(answer) != letters(gold) or not letters(gold):
        return False

    def compare() -> bool:
        ratios = []
        for point in _points(gold):
            a, g = _value(answer, point), _value(gold, point)
            if a is None or g is None or abs(a) < _TOLERANCE or abs(g) < _TOLERANCE:
                return False
            ratios.append(a / g)
        first = ratios[0]
        constant = all(abs(ratio - first) <= _TOLERANCE * abs(first) for ratio in ratios)
        return constant and (not positive or bool(first.is_positive))

    return _limited(compare)


def rounds(first: Formula, second: Formula) -> bool:
    """Returns whether one of two formulas without letters is a decimal that rounds the other: 1.41 and the root of 2.

    Raises:
      RuntimeError: as in `same_value`.
    """

    def compare() -> bool:
        a, b = _value(first, {}), _value(second, {})
        places = [part[2] for part in (first, second) if part[0] == "num"]
        return a is not None and b is not None and bool(places) and abs(a - b) <= 0.5 * 10 ** -min(places)

    return _limited(compare)


def _rounds(formula: Formula, value: Fraction) -> bool:
    """Returns whether a formula is a decimal with many places that rounds a value that no decimal equals."""
    sign, plain = (-1, formula[1]) if formula[0] == "neg" else (1, formula)
    if plain[0] != "num" or plain[2] < MIN_DECIMALS:
        return False
    rest = value.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    return rest > 1 and abs(sign * plain[1] - value) <= Fraction(1, 2 * 10 ** plain[2])


def _close(a: Any, g: Any, answer: Formula, gold: Formula) -> bool:
    places = [part[2] for part in (answer, gold) if part[0] == "num" and part[2] >= MIN_DECIMALS]
    if places:
        return abs(a - g) <= 0.5 * 10 ** -max(places)
    return abs(a - g) <= _TOLERANCE * max(abs(a), abs(g)) or max(abs(a), abs(g)) < 1e-100


def _points(formula: Formula) -> list[dict[str, Fraction]]:
    names = sorted(letters(formula))
    count = len(_POINTS) if names else 1
    return [
        {name: _POINTS[(i + k) % len(_POINTS)] + Fraction(k, 7 + i) for k, name in enumerate(names)}
        for i in range(count)
    ]


def _limited(compare: Callable[[], bool]) -> bool:
    """Runs `compare` under math-verify's time limit. Returns False if it fails or takes too long."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("answers can only be checked in the main thread (math-verify uses SIGALRM): use ScorerPool")
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    try:
        return timeout(TIMEOUT_S)(compare)()
    except MemoryError:  # the pool handles it: such an answer loses its whole reward
        raise
    except (Exception, TimeoutException):  # TimeoutException is not an Exception
        return False


def _value(formula: Formula, point: dict[str, Fraction]) -> Any:
    """Returns the value at a point, as a number of SymPy with _DIGITS digits; None if it has none there."""
    value = _sympy(formula, point).evalf(_DIGITS)
    return value if value.is_number and value.is_finite else None


def _sympy(formula: Formula, point: dict[str, Fraction]) -> Any:
    import sympy

    kind, *parts = formula
    if kind in ("num", "sym"):
        value = parts[0] if kind == "num" else point[parts[0]]
        return sympy.Rational(value.numerator, value.denominator)
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "∞": sympy.oo}[parts[0]]
    if kind == "fn":
        name, argument = str(parts[0]), _sympy(parts[1], point)
        if name == "lg":
            return sympy.log(argument, 10)
        name = {"abs": "Abs", "ceil": "ceiling", "ln": "log"}.get(name, name)
        return getattr(sympy, name.replace("arc", "a"))(argument)  # arcsin is asin
    values = [_sympy(part, point) for part in parts]
    if kind == "neg":
        return -values[0]
    if kind == "deg":
        return values[0] * sympy.pi / 180
    if kind == "!":
        return sympy.factorial(values[0])
    a, b = values
    operations = {
        "+": lambda: a + b,
        "*": lambda: a * b,
        "/": lambda: a / b,
        "^": lambda: a**b,
        "root": lambda: sympy.real_root(a, b) if b.is_odd and a.is_real else a ** (1 / b),
        "log": lambda: sympy.log(a, b),
        "binom": lambda: sympy.binomial(a, b),
    }
    return operations[kind]()
