"""Questions from files: R1-VL-10K (RL) and ShareGPT (SFT) rows, as a JSON array or JSONL, to `Example`s.

Flow: data (here) -> processing. Nothing is decoded: images stay paths. Schemas as published with R1-VL (arXiv
2503.12937) and Mulberry-SFT (arXiv 2412.18319):

    {"image_path": "a.png", "problem": "...", "solution": "...", "key_steps": {"Steps": [["a", "or b"], "c"]}}
    {"messages": [{"role": "user", "content": "<image>..."}, {"role": "assistant", "content": "..."}],
     "images": "a.png"}

A bad row is reported and stops no other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from r1vl_jax.types import Example, RowError

PLACEHOLDER = "<image>"
SYSTEM = "You are a helpful assistant."  # the system turn that every prompt gets; a row may spell it out
REFLECTION = "I think I have made a mistake. Let me rethink it."  # marks the reflective rows of Mulberry-SFT


def read_examples(
    path: str | os.PathLike, *, image_root: str | os.PathLike | None = None
) -> tuple[list[Example], list[RowError]]:
    """Reads all rows of a file, whose schema is seen from each row's keys.

    Args:
      path: a JSON array, or one JSON object a line.
      image_root: the folder that image paths are relative to; None: the folder of `path`.
    Returns:
      the good rows in order, and one error for each bad row, whose message names file, row and field. In JSONL a row's
      number is its line's, from 0.
    Raises: RowError if the file is missing, empty or not JSON: it has no usable row.
    """
    source = os.fspath(path)
    root = os.path.abspath(os.path.dirname(source) if image_root is None else image_root)
    examples, errors = [], []
    for number, row in _read_rows(source):
        try:
            examples.append(parse_row(row, source=source, number=number, image_root=root))
        except RowError as error:
            errors.append(error)
    return examples, errors


def without_reflection(examples: Iterable[Example]) -> list[Example]:
    """Leaves out the rows whose answer takes itself back, as R1-VL's warm-up does."""
    return [example for example in examples if REFLECTION not in example.answer]


def parse_row(row: object, *, source: str, number: int, image_root: str) -> Example:
    """One row of either schema as an `Example`. RowError names file, row and field."""
    name = f"{source}, row {number}"
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"{name}: holds a {type(row).__name__}; expected an object")
    if "problem" in row:
        question, answer = _text(row, "problem", name), _text(row, "solution", name)
        image_field, key_steps = "image_path", _key_steps(row.get("key_steps"), f"{name}, key_steps")
    elif "messages" in row:
        question, answer = _single_turn(row["messages"], f"{name}, messages")
        image_field, key_steps = "images", None
    else:
        raise RowError(
            f"{name}: has the keys {sorted(row)}; expected image_path, problem, solution, key_steps (RL) or messages, "
            "images (ShareGPT)"
        )
    placeholders = question.count(PLACEHOLDER)
    if image_field not in row and (image_field == "image_path" or placeholders):
        # A misspelt key would train on questions about pictures that nobody sees.
        raise RowError(
            f"{name}, {image_field}: missing; expected a path, a list of paths, or null for a text-only question"
        )
    images = _images(row.get(image_field), f"{name}, {image_field}", image_root)
    if placeholders == 0:
        question = PLACEHOLDER * len(images) + question
    elif placeholders != len(images):
        raise RowError(
            f"{name}, {image_field}: {len(images)} images for {placeholders} {PLACEHOLDER} in the question; "
            "expected as many"
        )
    return Example(source, number, images, question, answer, key_steps)


def _read_rows(source: str) -> list[tuple[int, object]]:
    """(number, row) of each row; a line that is not JSON comes as the RowError that says so."""
    if not os.path.isfile(source):
        raise RowError(f"{source}: no such file; expected a JSON array or JSONL file")
    try:
        with open(source, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise RowError(f"{source}: not UTF-8 text ({error}); expected a JSON array or JSONL file") from error
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise RowError(f"{source}: not JSON ({error}); expected one array of objects") from error
    else:
        # Not splitlines(): JSON texts may hold U+2028 and the like, which are no line ends in JSONL.
        lines = enumerate(text.split("\n"))
        rows = [(number, _parse_line(line, source, number)) for number, line in lines if line.strip()]
    if not rows:
        raise RowError(f"{source}: empty; expected at least one row")
    if all(isinstance(row, RowError) for _, row in rows):
        raise RowError(f"{source}: not JSON ({rows[0][1]}); expected a JSON array or one JSON object a line")
    return rows


def _parse_line(line: str, source: str, number: int) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"{source}, row {number}: not JSON ({error})")


def _text(row: dict, field: str, name: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name}, {field}: {_short(value)}; expected a text that is not empty")
    _check_unicode(value, f"{name}, {field}")
    return value


def _check_unicode(text: str, name: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name}: not valid Unicode ({error})") from error


def _single_turn(messages: object, name: str) -> tuple[str, str]:
    """Question and answer of a conversation of one user and one assistant turn."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError(f"{name}: {_short(messages)}; expected a list of {{role, content}}")
    turns = list(messages)
    if turns and turns[0].get("role") == "system":
        if turns[0].get("content") != SYSTEM:
            raise RowError(f"{name}: system turn {_short(turns[0].get('content'))}; only {SYSTEM!r} is supported")
        turns = turns[1:]
    roles = [message.get("role") for message in turns]
    if roles != ["user", "assistant"]:
        raise RowError(f"{name}: roles are {_short(roles)}; only one user and one assistant turn are supported")
    question, answer = (_text(m, "content", f"{name}[{len(messages) - 2 + i}]") for i, m in enumerate(turns))
    return question, answer


def _images(value: object, name: str, root: str) -> tuple[str, ...]:
    """Absolute image paths; none for null and an empty list."""
    paths = [] if value is None else value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str) or not path.strip() or "://" in path or path.startswith("data:"):
            raise RowError(f"{name}: {_short(path)}; expected the path of a file, or a list of them")
        _check_unicode(path, name)
    return tuple(os.path.abspath(os.path.join(root, path)) for path in paths)


def _key_steps(value: object, name: str) -> tuple[tuple[str, ...], ...] | None:
    """Groups of alternatives; a group that is one text becomes a group of one. None for null, {} and a missing field.

    The groups may also be given without the object around them.
    """
    if isinstance(value, dict) and value:
        if "Steps" not in value:
            raise RowError(f'{name}: {_short(value)}; expected {{"Steps": [...]}} or a list of groups')
        name, value = f"{name}.Steps", value["Steps"]
    if value is None or value == {}:
        return None
    if not isinstance(value, list):
        raise RowError(f"{name}: {_short(value)}; expected a list of groups")
    groups = []
    for i, group in enumerate(value):
        alternatives = [group] if isinstance(group, str) else group
        if not isinstance(alternatives, list) or not all(isinstance(text, str) for text in alternatives):
            raise RowError(f"{name}[{i}]: {_short(group)}; expected a text or a list of texts")
        groups.append(tuple(alternatives))
    return tuple(groups)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
