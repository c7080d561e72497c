"""Converts the mapping in a YAML file to a frozen dataclass of sections, and back.

A wrong key or value raises ConfigError, and the message names the key. From r1vl_jax, only errors and common.text are
imported.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from r1vl_jax.common.text import nearest, shown
from r1vl_jax.errors import ConfigError


def field(default: Any, help: str) -> Any:
    """Returns a dataclass field for a value or a section.

    Args:
      default: the default value, or the dataclass of the section.
      help: the text that `--help` prints.
    """
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def require(holds: bool, key: str, value: Any, expected: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not holds:
        raise ConfigError(f"{key} is {value!r}, expected {expected}")


def one_of(key: str, value: Any, known: tuple[str, ...]) -> None:
    require(value in known, key, value, "one of " + ", ".join(known))


def at_least(section: str, config: Any, **bounds: float) -> None:
    """Checks that each named field of a section is None or at least its bound. Raises ConfigError."""
    for key, bound in bounds.items():
        value = getattr(config, key)
        require(value is None or value >= bound, f"{section}.{key}", value, f"at least {bound}")


def divides(key: str, value: int, by_key: str, by: int) -> None:
    require(value % by == 0, key, value, f"a multiple of {by_key} = {by}")


def read(path: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file; an empty file is an empty mapping. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections at the top")
    return tree


def get(tree: Any, key: str, default: Any = None) -> Any:
    """Returns the value at a dotted key, or `default` if the tree does not have the key."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets the value at a dotted key, and adds missing sections. Raises ConfigError if a section is a plain value."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{key}: {section} is a value, not a section")
    tree[last] = value


def pairs(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Parses command-line overrides: ["--rl.beta", "0.02"] or ["--rl.beta=0.02"] becomes [("rl.beta", 0.02)].

    Raises:
      ConfigError: an argument does not start with "--", has no value, or its value is not YAML.
    """
    values, rest = [], list(arguments)
    while rest:
        head = rest.pop(0)
        if not head.startswith("--"):
            raise ConfigError(f"argument {head!r}: expected an override such as --rl.beta 0.02")
        key, has_value, value = head[2:].partition("=")
        if not has_value:
            if not rest:
                raise ConfigError(f"--{key}: a value is missing")
            value = rest.pop(0)
        try:
            values.append((key, yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key} is {value!r}, expected a value as YAML writes it") from error
    return values


def build(cls: type, tree: Any) -> Any:
    """Returns an instance of the dataclass `cls` and its sections from a tree of plain values. Raises ConfigError."""
    return _build(cls, tree, "", cls)


def _build(cls: type, tree: Any, prefix: str, root: type) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the file'} is {tree!r}, expected a section with keys")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            here = nearest(key, hints)
            near = prefix + here if here else _in_another_section(str(key), root, prefix)
            hint = f"; did you mean {near}?" if near else f"; known: {', '.join(hints)}"
            raise ConfigError(f"{prefix}{key} is not a known key{hint}")
    values = {key: _convert(hints[key], value, prefix + key, root) for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError as error:  # the message has the name of the section; the sections around it are added here
        above = prefix.rstrip(".").rpartition(".")[0]
        raise ConfigError(f"{above}.{error}" if above else str(error)) from None


def _in_another_section(key: str, root: type, prefix: str) -> str | None:
    """The full name of a key that another section has, one inside this section first."""
    names = [name for name, *_ in describe(root) if name.rsplit(".", 1)[-1] == key]
    return next(iter(sorted(names, key=lambda name: not name.startswith(prefix))), None)


def _convert(hint: Any, value: Any, key: str, root: type) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key + ".", root)
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{key} is {value!r}, expected a list")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, one, f"{key}[{i}]", root) for i, one in enumerate(value))
    if hint is float and not isinstance(value, bool):
        return _finite(value, key)
    if type(value) is not hint:
        raise ConfigError(f"{key} is {value!r}, expected {hint.__name__}")
    return value


def _finite(value: Any, key: str) -> float:
    """Returns a number as a finite float. YAML 1.1 reads 1e-5, without a point, as a string."""
    try:
        number = float(value)
    except (ValueError, TypeError):
        raise ConfigError(f"{key} is {shown(value)}, expected float") from None
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    require(math.isfinite(number), key, number, "a finite number")
    return number


def describe(cls: type, prefix: str = "") -> list[tuple[str, Any, str]]:
    """Returns (dotted key, default, help text) of every field of the dataclass and its sections."""
    rows = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            rows += describe(hints[field.name], f"{prefix}{field.name}.")
        else:
            default = {} if field.default is dataclasses.MISSING else field.default
            rows.append((prefix + field.name, default, field.metadata["help"]))
    return rows


def dump(config: Any) -> str:
    """Returns the dataclass as YAML text."""
    return yaml.safe_dump(_with_lists(dataclasses.asdict(config)), sort_keys=False)


def _with_lists(value: Any) -> Any:
    """Replaces tuples by lists, because YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, tuple) else value
