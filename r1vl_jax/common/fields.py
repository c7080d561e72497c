"""Reads fields of a JSON file with checks. Imports only text.py of r1vl_jax."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from r1vl_jax.common.text import shown


@dataclasses.dataclass(frozen=True)
class Fields:
    """Fields of a JSON file, each from the first of several objects that has it. null counts as missing.

    The methods raise ValueError naming the file, the field, its value and what was expected.

    Attributes:
      path: the file.
      tables: the objects, by the prefix that their fields get in messages.
    """

    path: str | Path
    tables: dict[str, dict[str, Any]]

    def find(self, key: str) -> tuple[str, Any]:
        """Returns a field's name in the file and its value, which is None if the field is missing."""
        for prefix, table in self.tables.items():
            if table.get(key) is not None:
                return prefix + key, table[key]
        return key, None

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Returns a whole number from `least`. Without a default, the field must be there."""
        name, value = self.find(key)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.path}: {key} is missing")
        if type(value) is not int or value < least:  # not isinstance, because True is an int
            raise ValueError(f"{self.path}: {name} is {shown(value)}, expected a whole number from {least}")
        return value

    def positive(self, key: str, default: float) -> float:
        """Returns a positive, finite number."""
        name, value = self.find(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{self.path}: {name} is {shown(value)}, expected a positive, finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        """Returns true or false; false if the field is missing."""
        name, value = self.find(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{self.path}: {name} is {shown(value)}, expected true or false")
        return bool(value)

    def only(self, key: str, expected: str) -> None:
        """Raises ValueError if the field has another value than `expected`."""
        name, value = self.find(key)
        if value not in (None, expected):
            raise ValueError(f"{self.path}: {name} is {shown(value)}, expected {expected!r}")
