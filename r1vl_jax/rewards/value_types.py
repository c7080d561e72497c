"""The values that answers can be. A text may have several readings, and each is a value of its own.

12 cm^2           Quantity: formula 12, unit cm^2          x = 3             Named "x", Quantity 3
(3, 4)            Sequence "(", and Interval               3x + y = 2        Equation
2 and -3          Sequence in any order                    x < 3, (-∞, 3)    Interval
1:2:3             Ratio                                    3:45 PM           Time
"""

from __future__ import annotations

import dataclasses

from r1vl_jax.rewards.algebra import Formula
from r1vl_jax.rewards.units import Unit


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A formula, and its unit or the name of what it counts."""

    formula: Formula
    unit: Unit | None = None


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio of two or more parts, none of them 0. `spelled`: written "2 to 3", which may also mean a range."""

    parts: tuple[Formula, ...]
    spelled: bool


@dataclasses.dataclass(frozen=True)
class Time:
    """A time of day. `clock` is "a" for am, "p" for pm, "24" for an hour after 12, and "" if the text does not say."""

    seconds: int
    clock: str


@dataclasses.dataclass(frozen=True)
class Text:
    """Words, as `text_key` folds them; read only as the item of a list, or after a name."""

    key: str


@dataclasses.dataclass(frozen=True)
class Named:
    """A value behind its name or names: x = 3. `value` holds its readings."""

    names: frozenset[str]
    value: tuple[Value, ...]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Several values, each as its readings. `bracket` is "(" or "[" if the order counts, and "" if it does not."""

    items: tuple[tuple[Value, ...], ...]
    bracket: str = ""


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers between two ends; `closed` says for each end whether it belongs to them."""

    low: Formula
    high: Formula
    closed: tuple[bool, bool]


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation or inequality: `relation` ("=", "<", "≤", "≠") holds between `difference` and 0."""

    difference: Formula
    relation: str = "="


Value = Quantity | Text | Named | Sequence | Interval | Equation | Ratio | Time
