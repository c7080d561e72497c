"""Types of command-line arguments, for `argparse`: what they refuse, they explain."""

from __future__ import annotations

import argparse
import math


def whole(text: str, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def at_least_one(text: str) -> int:
    return whole(text, 1)


def finite(text: str) -> float:
    """A number, neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = finite(text)
    except argparse.ArgumentTypeError:
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
