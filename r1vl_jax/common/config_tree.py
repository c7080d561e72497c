"""Converts the mapping in a YAML file to a frozen dataclass of sections, and back.

A wrong key or value raises ConfigError, and the message names the key. From r1vl_jax, only errors, common.limits and
common.text are imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from r1vl_jax.common.limits import MAX_WHOLE
from r1vl_jax.common.text import nearest, one_line, shorten, shown
from r1vl_jax.errors import ConfigError

MAX_BYTES = 1 << 16  # of a configuration file: every key is 8 kB. PyYAML reads 100 kB a second
MAX_VALUES = 10_000  # in a configuration, each alias counted as often as it is used
MAX_BRACKETS = 300  # PyYAML's time grows with the square of those that are open
MAX_SHOWN = 60  # characters of a value in a message
_SURROGATE = re.compile("[\ud800-\udfff]")  # UTF-8 cannot write it
_KEY = re.compile(r"\w+(\.\w+)*")
# PyYAML's errors on values that it cannot convert: 2001-99-99, !!int x, !!bool x, 5,000 digits, 5,000 brackets.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


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
        raise ConfigError(f"{key} is {shown(value, MAX_SHOWN)}, expected {expected}")


def one_of(key: str, value: Any, known: tuple[str, ...]) -> None:
    require(value in known, key, value, "one of " + ", ".join(known))


def at_least(section: str, config: Any, **bounds: float) -> None:
    """Checks that each named field of a section is None or at least its bound. Raises ConfigError."""
    for key, bound in bounds.items():
        value = getattr(config, key)
        require(value is None or value >= bound, f"{section}.{key}", value, f"at least {bound}")


def at_most(section: str, config: Any, **bounds: float) -> None:
    """Checks that each named field of a section is None or at most its bound. Raises ConfigError."""
    for key, bound in bounds.items():
        value = getattr(config, key)
        require(value is None or value <= bound, f"{section}.{key}", value, f"at most {bound}")


def divides(key: str, value: int, by_key: str, by: int) -> None:
    require(value % by == 0, key, value, f"a multiple of {by_key} = {by}")


class _Loader(yaml.SafeLoader):
    """Reads plain YAML, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """Returns the value that a YAML text holds. Raises ValueError that says in one line what is wrong with it."""
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise ValueError(f"more than {MAX_BRACKETS} brackets")
    try:
        value = yaml.load(text, _Loader)
    except _YAML_ERRORS as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ValueError(f"not YAML: {problem}") from error
    left, count = [value], 0
    while left:  # without recursion: an alias may stand inside of what it names
        item = left.pop()
        count += 1
        if count + len(left) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values, with aliases written out")
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return value


def read(path: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file; an empty file is an empty mapping. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected a YAML file")
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: more than {MAX_BYTES:,} bytes; expected a YAML file with the keys of --help")
    try:
        tree = parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {shown(tree, MAX_SHOWN)}; expected a mapping of sections at the top")
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
        key, has_value, value = head.removeprefix("--").partition("=")
        if not head.startswith("--") or not _KEY.fullmatch(key):
            raise ConfigError(f"argument {shown(head, MAX_SHOWN)}: expected an override such as --rl.beta 0.02")
        if not has_value:
            if not rest:
                raise ConfigError(f"--{key}: a value is missing")
            value = rest.pop(0)
        try:
            values.append((key, parse(value)))
        except ValueError as error:
            raise ConfigError(
                f"--{key} is {shown(value, MAX_SHOWN)}, expected a value as YAML writes it ({error})"
            ) from error
    return values


def build(cls: type, tree: Any) -> Any:
    """Returns an instance of the dataclass `cls` and its sections from a tree of plain values. Raises ConfigError."""
    return _build(cls, tree, "", cls)


def _build(cls: type, tree: Any, prefix: str, root: type) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'the file'} is {shown(tree, MAX_SHOWN)}, expected a section with keys"
        )
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            here = nearest(key, hints)
            near = prefix + here if here else _in_another_section(str(key), root, prefix)
            hint = f"; did you mean {near}?" if near else f"; known: {', '.join(hints)}"
            raise ConfigError(f"{prefix}{shorten(str(key), MAX_SHOWN)} is not a known key{hint}")
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
            raise ConfigError(f"{key} is {shown(value, MAX_SHOWN)}, expected a list")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, one, f"{key}[{i}]", root) for i, one in enumerate(value))
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-5, without a point, as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is int and hint in (int, float):
        require(abs(value) <= MAX_WHOLE, key, value, f"at most {MAX_WHOLE:,}")
        value = hint(value)
    require(type(value) is hint, key, value, hint.__name__)
    if isinstance(value, float):
        require(math.isfinite(value), key, value, "a finite number")
    if isinstance(value, str):
        require("\0" not in value and not _SURROGATE.search(value), key, value, "text in Unicode without NUL")
    return value


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
