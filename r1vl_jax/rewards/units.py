"""Reads units: their size in base units, and their dimensions. 12 cm^2 has the size 1/10000 and the dimension m^2.

A word after a number that is no known unit is a name ("3 apples"). It has a dimension of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from fractions import Fraction

from r1vl_jax.rewards.latex import MONEY
from r1vl_jax.rewards.signs import UNITS

ANY = "unit"  # the base of "12 units" and "12 square units", which agree with every unit of the same power
PERCENT = "%"
DEGREE = "°"

_PREFIXES = {"k": 1000, "c": Fraction(1, 100), "m": Fraction(1, 1000), "d": Fraction(1, 10), "n": Fraction(1, 10**9)}
_PREFIXED = ("m", "g", "Hz", "W", "V", "J", "N", "Pa", "s", "cal", "A")
_BASES = {
    **{base: (base, 1) for base in _PREFIXED},
    **{
        prefix + base: (base, size)
        for base in _PREFIXED
        for prefix, size in _PREFIXES.items()
        if prefix + base not in ("cs", "ds", "dg", "ks", "dN", "cN", "nN", "dA", "cA", "nA")
    },
    **{"µm": ("m", Fraction(1, 10**6)), "in": ("m", Fraction(254, 10000)), "ft": ("m", Fraction(3048, 10000))},
    **{"yd": ("m", Fraction(9144, 10000)), "mi": ("m", Fraction(1609344, 1000))},
    **{"lb": ("lb", 1), "oz": ("lb", Fraction(1, 16)), "mol": ("mol", 1)},
    **{"min": ("s", 60), "h": ("s", 3600), "day": ("s", 86400), "week": ("s", 7 * 86400), "month": ("month", 1)},
    **{"year": ("month", 12), "°": (DEGREE, 1), "'": (DEGREE, Fraction(1, 60)), '"': (DEGREE, Fraction(1, 3600))},
    **{"rad": ("rad", 1), "°C": ("°C", 1), "°F": ("°F", 1), "K": ("K", 1), "Ω": ("Ω", 1)},
    **{MONEY: (MONEY, 1), "¢": (MONEY, Fraction(1, 100)), "€": ("€", 1), "£": ("£", 1), "¥": ("¥", 1), "₹": ("₹", 1)},
    **{PERCENT: (PERCENT, 1), ANY: (ANY, 1), "tonne": ("g", 10**6), "gallon": ("gallon", 1)},
}  # fmt: skip
_LITRES = {"L": 1, "l": 1, "cl": Fraction(1, 100), **dict.fromkeys(["mL", "ml", "cc"], Fraction(1, 1000))}
_SPELLINGS = {
    **{"mm": "毫米", "cm": "厘米", "dm": "decimeter decimeters 分米", "m": "米", "km": "千米 公里", "g": "克"},
    **{"kg": "kilo kilos 千克 公斤", "tonne": "tonnes ton tons 吨", "gallon": "gallons gal", "L": "升"},
    **{"mL": "milliliter milliliters millilitre millilitres 毫升", "s": "秒", "min": "mins 分钟 分", "h": "小时 时"},
    **{"day": "d days 天", "week": "weeks", "month": "months", "year": "years yr yrs 年", "°": "度", "°C": "celsius"},
    **{"°F": "fahrenheit", "K": "kelvin", "rad": "radian radians", "A": "amp amps ampere amperes", "Ω": "ohm ohms"},
    **{"W": "watt watts", "V": "volt volts", "J": "joule joules", "N": "newton newtons", "%": "pct percentage"},
    **{"Hz": "hertz", "mol": "mole moles"},
    **{MONEY: "$ dollar dollars usd buck bucks", "¢": "cent cents", "€": "euro euros eur", "£": "gbp"},
    **{"¥": "yuan yen rmb cny 元", "₹": "rupee rupees rs", ANY: "units u"},
}
_WORDS = UNITS | {word: unit for unit, words in _SPELLINGS.items() for word in words.split()}
_COMPOUNDS = dict(mph="mi/h", kph="km/h", kmh="km/h", kmph="km/h", kwh="kW*h", sqm="m^2", sqft="ft^2")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
_RAISED = {"squared": 2, "cubed": 3}
# Words beside a unit that change nothing ("5 cm long").
_IDLE_WORDS = "long wide tall high deep old away apart left total each altogether"
_IDLE = frozenset(_IDLE_WORDS.split())
# Words that no name of what is counted has: they compute ("3 less than"), count ("5 tens") or date ("5 May").
_OTHER_WORDS = (
    "more less fewer than minus plus or and not of over divided by to from out per percent if when is are was "
    "no factorial mod half halves third thirds quarter quarters but at in on squared cubed root square cubic as with "
    "for the a an it sqrt sin cos tan log ln pi negative only except without either neither nor both maybe below "
    "above under zero tens hundred hundreds thousand thousands million millions billion billions trillion dozen dozens "
    "tenths hundredths thousandths am pm bc ad bce ce st nd rd th repeating recurring january february march "
    "april may june july august september october november december"
)
_NO_NAMES = frozenset(_OTHER_WORDS.split())
_TOKEN = re.compile(
    r"\^\s*\(?\s*(?P<power>-?\d)\s*\)?|(?P<digit>\d)|(?:°|degrees?)\s?(?P<scale>C|F|celsius|fahrenheit)\b"
    r"|平方|立方|[^\W\d_]+|[^\s\w]",
    re.IGNORECASE,
)
_PLACE = re.compile(r"(.+?) ((?:in|on|at) (?:the|this|each|every|his|her|their) [^\W\d_]+(?: [^\W\d_]+){0,2})")
_FRACTION = re.compile(r"frac\(([^()]+)\)\((.+)\)")
_CHINESE_SENTENCE = re.compile("[不是错对非没无或和与]")
_NAME = re.compile(r"[^\W\d_\u0370-\u03ff]+(?:[ -][^\W\d_\u0370-\u03ff]+){0,2}")


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit or name: `dimensions` are sorted (base, power) pairs, `size` is one unit in these bases.

    `place` says where the counted things are: "3 cups on the table".
    """

    dimensions: tuple[tuple[str, int], ...]
    size: Fraction
    place: str = ""

    def agrees(self, other: Unit) -> bool:
        """Returns whether both measure the same kind of thing. A place may be missing."""
        if self.place and other.place and self.place != other.place:
            return False
        if self.dimensions == other.dimensions:
            return True
        mine, others = self.dimensions, other.dimensions
        generic = any(len(dims) == 1 and dims[0][0] == ANY for dims in (mine, others))
        return generic and len(mine) == len(others) == 1 and mine[0][1] == others[0][1]


@functools.lru_cache(maxsize=4096)
def parse_unit(text: str) -> Unit | None:
    """Returns the unit that the whole text spells ("cm^2", "square metres", "km per hour"); None if it spells none."""
    text = _FRACTION.sub(r"\1/\2", _without_brackets(text))
    powers: dict[str, int] = {}
    size = Fraction(1)
    power, sign = 1, 1  # of the next unit
    last: tuple[str, Fraction, int, int] | None = None  # base, size, power of the base in it, and its power
    for token in _TOKEN.finditer(_COMPOUNDS.get(text.lower(), text)):
        word = token[0].lower()
        raised = token["power"] or token["digit"] or _RAISED.get(word)
        if word in _POWERS:
            power = _POWERS[word]
        elif word in ("/", "per", "每"):
            sign = -1
        elif raised is not None:
            if last is None or int(raised) not in (2, 3, -1, -2, -3) or last[0] in (PERCENT, MONEY):
                return None
            (base, factor, own, used), more = last, int(raised) - 1
            powers[base] += own * used * more
            size *= factor ** (used * more)
            last = None  # a power of a power is no unit
        elif word not in _IDLE and word not in "*.":
            known = _known(token["scale"] and f"°{token['scale'][0].upper()}" or token[0])
            if known is None:
                return None
            base, factor, own = known
            last = (base, factor, own, power * sign)
            powers[base] = powers.get(base, 0) + own * power * sign
            size *= factor ** (power * sign)
            power = 1
    dimensions = tuple(sorted((base, count) for base, count in powers.items() if count))
    return Unit(dimensions, size) if dimensions and power == 1 else None


def name_unit(text: str) -> Unit | None:
    """Returns the unit of a counted thing ("apples", "red cubes"); None if the text is no such name."""
    match = _PLACE.fullmatch(text.lower())
    name, place = match.groups() if match else (text.lower(), "")
    words = [word for word in name.split() if word not in _IDLE] or name.split()
    plain = " ".join(words)
    if not _NAME.fullmatch(plain) or not _NO_NAMES.isdisjoint(re.split("[ -]", plain) + place.split()[2:]):
        return None
    if any((len(word) < 2 and word < "\u2e80") or _CHINESE_SENTENCE.search(word) for word in words):
        return None
    singular = " ".join(re.sub(r"(?<=..[^s])s$", "", word) for word in words)
    return Unit(((singular, 1),), Fraction(1), place)


def _known(word: str) -> tuple[str, Fraction, int] | None:
    """Returns the base of a unit, its size, and the power of the base in it (3 for litres)."""
    name = word
    if name not in _BASES and name not in _LITRES:
        name = _WORDS.get(name) or _WORDS.get(name.lower()) or name
    if name in _LITRES:
        return "m", Fraction(_LITRES[name]) / 1000, 3
    if name not in _BASES:
        return None
    base, size = _BASES[name]
    return base, Fraction(size), 1


def _without_brackets(text: str) -> str:
    text = text.strip()
    return text[1:-1].strip() if text[:1] in "([" and text[-1:] in ")]" else text
