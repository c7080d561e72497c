"""Defines argument types for `argparse`. The error for a wrong value says which values are expected."""

from __future__ import annotations

import argparse
import math


def non_negative_int(text: str, least: int = 0) -> int:
    """Parses a whole number of at least `least`."""
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def positive_int(text: str) -> int:
    """Parses a whole number of at least 1."""
    return non_negative_int(text, 1)


def finite_float(text: str) -> float:
    """Parses a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """Parses a finite number above 0."""
    try:
        value = finite_float(text)
    except argparse.ArgumentTypeError:
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
