"""Defines the commands' parser and its argument types. The error for a wrong value says which values are expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from r1vl_jax.common.limits import MAX_SECONDS, MAX_WHOLE, MAX_WORKERS
from r1vl_jax.common.text import shown


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong with the arguments, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole(least: int, most: int = MAX_WHOLE) -> Callable[[str], int]:
    """Returns a function that parses a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 19 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {shown(text)}")
        return int(text)

    return parse


def number(least: float, most: float = MAX_WHOLE, *, above: bool = False) -> Callable[[str], float]:
    """Returns a function that parses a number from `least` to `most`; with `above`, `least` is left out."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or (above and value == least):
            start = "above" if above else "from"
            raise argparse.ArgumentTypeError(f"expected a number {start} {least} to {most}, got {shown(text)}")
        return value

    return parse


non_negative_int = whole(0)
positive_int = whole(1)
workers = whole(1, MAX_WORKERS)
non_negative_float = number(0)
positive_float = number(0, above=True)
seconds = number(0, MAX_SECONDS, above=True)
