"""Parses one row of a file into `Example`s. Reads the schemas of R1-VL-10K (RL) and ShareGPT (SFT). Opens no image.

The schemas, as published with R1-VL (arXiv 2503.12937) and Mulberry-SFT (arXiv 2412.18319):

    {"image_path": "a.png", "problem": "...", "solution": "...", "key_steps": {"Steps": [["a", "or b"], "c"]}}
    {"messages": [{"role": "user", "content": "<image>..."}, {"role": "assistant", "content": "..."}],
     "images": "a.png"}

Rows of both schemas may have "videos": the path of a video file, a list of paths, or a list of lists of frames. A
conversation may have a system turn and several pairs of question and answer; each answer becomes one `Example`.
"""

from __future__ import annotations

import os
from typing import Any

from r1vl_jax.common.text import shown
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example

IMAGE, VIDEO = "<image>", "<video>"


def parse_row(row: object, *, source: str, number: int, image_root: str) -> list[Example]:
    """Parses one row of either schema. Returns one `Example` per answer.

    Args:
      source, number: name of the file and number of the row, for error messages.
      image_root: folder to which relative paths are relative.
    Raises: RowError naming file, row and field.
    """
    name = f"{source}, row {number}"
    if not isinstance(row, dict):
        raise RowError(f"{name}: holds a {type(row).__name__}; expected an object")
    key_steps, system = None, None
    if "problem" in row:
        turns = [(_text(row, "problem", name), _text(row, "solution", name))]
        field, key_steps = "image_path", _key_steps(row.get("key_steps"), f"{name}, key_steps")
    elif "messages" in row:
        system, turns = _conversation(row["messages"], f"{name}, messages")
        field = "images"
    else:
        raise RowError(
            f"{name}: has the keys {sorted(row)}; expected image_path, problem, solution, key_steps (RL) or messages, "
            "images (ShareGPT)"
        )
    questions = [question for question, _ in turns]
    if field not in row and "videos" not in row and (field == "image_path" or IMAGE in "".join(questions)):
        # Most likely the key is misspelt, and the model would be trained without the image.
        raise RowError(f"{name}, {field}: missing; expected a path, a list of paths, or null for a text-only question")
    images = _images(row.get(field), f"{name}, {field}", image_root)
    videos = _videos(row.get("videos"), f"{name}, videos", image_root)
    questions[0] = _with_placeholders(questions, VIDEO, len(videos), f"{name}, videos")
    questions[0] = _with_placeholders(questions, IMAGE, len(images), f"{name}, {field}")
    examples = []
    for i, (_, answer) in enumerate(turns):
        text = "".join(questions[: i + 1])
        history = tuple((question, earlier) for question, (_, earlier) in zip(questions[:i], turns[:i], strict=True))
        examples.append(
            Example(
                source, number, images[: text.count(IMAGE)], questions[i], answer, key_steps,
                videos=videos[: text.count(VIDEO)], system=system, history=history,
            )
        )  # fmt: skip
    return examples


def _with_placeholders(questions: list[str], placeholder: str, files: int, name: str) -> str:
    """Returns the first question; puts `files` placeholders before it if no question has a placeholder.

    Raises: RowError if the questions have placeholders, but not `files` of them.
    """
    count = sum(question.count(placeholder) for question in questions)
    if count not in (0, files):
        kind = placeholder.strip("<>") + "s"
        raise RowError(f"{name}: {files} {kind} for {count} {placeholder} in the question; expected as many")
    return questions[0] if count else placeholder * files + questions[0]


def _text(row: dict[str, Any], field: str, name: str) -> str:
    """Returns the text of a field. Raises RowError if it is empty or not a text."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name}, {field}: {shown(value)}; expected a text that is not empty")
    _check_unicode(value, f"{name}, {field}")
    return value


def _check_unicode(text: str, name: str) -> None:
    """Raises RowError if the text contains half of a surrogate pair, which JSON allows and tokenizers reject."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name}: not valid Unicode ({error})") from error


def _conversation(messages: object, name: str) -> tuple[str | None, list[tuple[str, str]]]:
    """Returns the text of the system turn (None: the default one) and the (question, answer) pairs."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError(f"{name}: {shown(messages)}; expected a list of {{role, content}}")
    roles = [message.get("role") for message in messages]
    first = int(roles[:1] == ["system"])
    turns = len(roles[first:]) // 2
    if turns == 0 or roles[first:] != ["user", "assistant"] * turns:
        raise RowError(
            f"{name}: roles are {shown(roles)}; expected user and assistant in turns, ending with assistant, after "
            "at most one system"
        )
    texts = [_text(message, "content", f"{name}[{i}]") for i, message in enumerate(messages)]
    return texts[0] if first else None, list(zip(texts[first::2], texts[first + 1 :: 2], strict=True))


def _path(value: object, name: str, root: str) -> str:
    """Returns the absolute path of a file. Raises RowError if the value is not a path, or is a URL."""
    if not isinstance(value, str) or not value.strip() or "\0" in value or "://" in value or value.startswith("data:"):
        raise RowError(f"{name}: {shown(value)}; expected the path of a file, or a list of them")
    _check_unicode(value, name)
    return os.path.abspath(os.path.join(root, value))


def _images(value: object, name: str, root: str) -> tuple[str, ...]:
    """Returns the absolute paths for a path or a list of paths; an empty tuple for None."""
    paths = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_path(path, name, root) for path in paths)


def _videos(value: object, name: str, root: str) -> tuple[str | tuple[str, ...], ...]:
    """Returns the absolute path of each video file. For a video given as a list of frames, returns a tuple of paths."""
    videos = [] if value is None else value if isinstance(value, list) else [value]
    paths = []
    for i, video in enumerate(videos):
        field = f"{name}[{i}]"
        if video == []:
            raise RowError(f"{field}: no frames; expected the path of a video file or of at least one frame")
        paths.append(_images(video, field, root) if isinstance(video, list) else _path(video, field, root))
    return tuple(paths)


def _key_steps(value: object, name: str) -> tuple[tuple[str, ...], ...] | None:
    """Returns the key steps in {"Steps": [...]} or in a bare list, each as a tuple of alternative wordings.

    Returns None if the field is null, {} or missing. A key step given as one text is the same as a list with that text.
    """
    if isinstance(value, dict) and value:
        if "Steps" not in value:
            raise RowError(f'{name}: {shown(value)}; expected {{"Steps": [...]}} or a list of groups')
        name, value = f"{name}.Steps", value["Steps"]
    if value is None or value == {}:
        return None
    if not isinstance(value, list):
        raise RowError(f"{name}: {shown(value)}; expected a list of groups")
    groups = []
    for i, group in enumerate(value):
        alternatives = [group] if isinstance(group, str) else group
        if not isinstance(alternatives, list) or not all(isinstance(text, str) for text in alternatives):
            raise RowError(f"{name}[{i}]: {shown(group)}; expected a text or a list of texts")
        groups.append(tuple(alternatives))
    return tuple(groups)
