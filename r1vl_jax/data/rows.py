"""Parses one row of a file into `Example`s. Opens no image.

A row has one of two schemas, whatever kind of file it is from:

    {"image_path": "a.png", "problem": "...", "solution": "...", "key_steps": {"Steps": [["a", "or b"], "c"]}}
    {"messages": [{"role": "user", "content": "<image>..."}, {"role": "assistant", "content": "..."}],
     "images": "a.png"}

The first is R1-VL-10K's (arXiv 2503.12937), for RL; `answer` may stand for `solution`. The second is OpenAI's form of a
conversation, as in Mulberry-SFT (arXiv 2412.18319); ShareGPT's form ("conversations" of {"from", "value"}) is read too.
A conversation may have several pairs of question and answer; each answer becomes one `Example`. Images and videos are
in one of the fields of MEDIA, or in the parts of a turn (row_media.py).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from r1vl_jax.common.text import first_few, one_line, shown
from r1vl_jax.data.row_media import (
    AUDIO,
    IMAGE,
    MEDIA,
    VIDEO,
    content_text,
    image_files,
    is_nothing,
    media_field,
    split_contents,
    video_files,
)
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example

PROBLEM, ANSWERS, TURNS = "problem", ("solution", "answer"), ("messages", "conversations")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
COMMON_FIELDS = frozenset(("system", *(field for fields in MEDIA.values() for field in fields)))
SHOWN_FIELDS = frozenset(MEDIA[IMAGE] + MEDIA[VIDEO])
READ_FIELDS = (PROBLEM, *ANSWERS, "key_steps", *TURNS, *sorted(COMMON_FIELDS))


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
    fields = question_fields(row)
    system, key_steps, in_turns = None, None, {kind: [] for kind in MEDIA}
    if fields[:1] == (PROBLEM,):
        turns = [(_text(row[PROBLEM], f"{name}, {PROBLEM}"), _text(row.get(fields[1]), f"{name}, {fields[1]}"))]
        key_steps = _key_steps(row.get("key_steps"), f"{name}, key_steps")
    elif fields:
        system, turns = _conversation(row[fields[0]], f"{name}, {fields[0]}", in_turns)
    else:
        raise RowError(
            f"{name}: has the keys {shown(sorted(row), 200)}; expected image_path, problem, solution, key_steps (RL), "
            "or messages or conversations, and images"
        )
    system = _system(row, system, name)
    questions = [question for question, _ in turns]
    _check_media(row, "".join(questions), in_turns, f"{name}, {'image_path' if fields[0] == PROBLEM else 'images'}")
    field, value = media_field(row, IMAGE, in_turns, name)
    files = image_files(value, f"{name}, {field}", image_root)
    video_field, value = media_field(row, VIDEO, in_turns, name)
    videos = video_files(value, f"{name}, {video_field}", image_root)
    questions[0] = _with_placeholders(questions, VIDEO, len(videos), f"{name}, {video_field}")
    questions[0] = _with_placeholders(questions, IMAGE, len(files), f"{name}, {field}")
    images, contents = split_contents(files, f"{name}, {field}")
    examples = []
    for i, (_, answer) in enumerate(turns):
        text = "".join(questions[: i + 1])
        history = tuple((question, earlier) for question, (_, earlier) in zip(questions[:i], turns[:i], strict=True))
        count = text.count(IMAGE)
        examples.append(
            Example(
                source, number, images[:count], questions[i], answer, key_steps,
                videos=videos[: text.count(VIDEO)], system=system, history=history,
                image_bytes=contents and contents[:count],
            )
        )  # fmt: skip
    return examples


def question_fields(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the fields of a row that have its question and answer; () if the row has none of either schema."""
    if row.get(PROBLEM) is not None:
        return PROBLEM, next((field for field in ANSWERS if row.get(field) not in (None, "")), ANSWERS[0]), "key_steps"
    for field in TURNS:
        if row.get(field) is not None:
            return (field,)
    return ()


def unread_keys(row: object) -> list[str]:
    """Returns the keys of a row that `parse_row` does not read. A key without a value (null) is not one of them."""
    if not isinstance(row, dict):
        return []
    fields = question_fields(row)
    keys = [key for key in row if key not in COMMON_FIELDS and key not in fields and row[key] is not None]
    turns = row[fields[0]] if fields and fields[0] in TURNS else None
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and len(turn) > 2:  # else it has its role and its content, and nothing more
            read = turn_fields(turn)
            keys += [f"{fields[0]}[].{key}" for key in turn if key not in read and turn[key] is not None]
    return keys


def unread_notes(name: str, keys: Iterable[str]) -> list[str]:
    """Returns the line that names the keys of a data set that are not read; no line if there are none.

    Keys that are similar to one that is read are named first, because they may be misspelt.
    """
    hints = {}
    for key in keys:
        known = key in READ_FIELDS or "[]" in key  # not misspelt: `answer` beside `solution`, and fields of turns
        near = [] if known else difflib.get_close_matches(key, READ_FIELDS, n=1, cutoff=0.8)
        hints[key] = f" (did you mean {near[0]!r}?)" if near else ""
    named = [one_line(key, 80) + hints[key] for key in sorted(hints, key=lambda key: not hints[key])]
    return [f"{name}: keys that are not read: {first_few(named, 10)}"] if named else []


def turn_fields(turn: dict[str, Any]) -> tuple[str, str]:
    """Returns the fields of a turn's role and content: OpenAI's, or ShareGPT's."""
    return ("role", "content") if turn.get("role") is not None else ("from", "value")


def _with_placeholders(questions: list[str], placeholder: str, files: int, name: str) -> str:
    """Returns the first question; puts `files` placeholders before it if no question has a placeholder.

    Raises: RowError if the questions have placeholders, but not `files` of them.
    """
    count = sum(question.count(placeholder) for question in questions)
    if count not in (0, files):
        kind = placeholder.strip("<>") + "s"
        raise RowError(f"{name}: {files} {kind} for {count} {placeholder} in the question; expected as many")
    return questions[0] if count else placeholder * files + questions[0]


def _check_media(row: dict[str, Any], question: str, in_turns: dict[str, list[Any]], name: str) -> None:
    """Raises RowError for audio, and for a row that most likely has its images under a key that is not read.

    Args:
      in_turns: what the parts of the turns hold, for each placeholder.
      name: name of the row and of the field that is expected to have the images.
    """
    for field in MEDIA[AUDIO]:
        if row.get(field) and not is_nothing(row[field]):
            raise RowError(f"{name.rpartition(', ')[0]}, {field}: audio is not read; expected images, videos or text")
    if AUDIO in question:
        raise RowError(f"{name.rpartition(', ')[0]}: {AUDIO} in the question; expected images, videos or text")
    has_media = not SHOWN_FIELDS.isdisjoint(row) or any(in_turns.values())
    if not has_media and (row.get(PROBLEM) is not None or IMAGE in question):
        others = first_few([one_line(key, 80) for key in unread_keys(row)])
        raise RowError(
            f"{name}: missing; expected a path, a list of paths, or null for a text-only question"
            + (f"; the row has the keys {others}, which are not read" if others else "")
        )


def _text(value: object, name: str) -> str:
    """Returns the value if it is a text. Raises RowError if it is empty or not a text."""
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name}: {shown(value)}; expected a text that is not empty")
    _check_unicode(value, name)
    return value


def _check_unicode(text: str, name: str) -> None:
    """Raises RowError if the text contains half of a surrogate pair, which JSON allows and tokenizers reject."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name}: not valid Unicode ({error})") from error


def _system(row: dict[str, Any], turn: str | None, name: str) -> str | None:
    """Returns the text of the system turn, which is a turn of the conversation or the field `system`."""
    if row.get("system") in (None, ""):
        return turn
    text = _text(row["system"], f"{name}, system")
    if turn not in (None, text):
        raise RowError(f"{name}, system: {shown(text)}, and a system turn with another text; expected one of them")
    return text


def _conversation(turns: object, name: str, in_turns: dict[str, list[Any]]) -> tuple[str | None, list[tuple[str, str]]]:
    """Returns the text of the system turn (None: there is none) and the (question, answer) pairs.

    Images and videos in the parts of the turns are added to `in_turns`.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"{name}: {shown(turns)}; expected a list of {{role, content}} or {{from, value}}")
    fields = [turn_fields(turn) for turn in turns]
    said = [turn.get(field) for turn, (field, _) in zip(turns, fields, strict=True)]
    roles = [ROLES.get(role, role) if isinstance(role, str) else role for role in said]
    first = int(roles[:1] == ["system"])
    pairs = len(roles[first:]) // 2
    if pairs == 0 or roles[first:] != ["user", "assistant"] * pairs:
        raise RowError(
            f"{name}: roles are {shown(said)}; expected user and assistant in turns, ending with assistant, after at "
            "most one system"
        )
    texts = []
    for i, (turn, (_, field)) in enumerate(zip(turns, fields, strict=True)):
        value, where = turn.get(field), f"{name}[{i}], {field}"
        if isinstance(value, list):
            value = content_text(value, where, in_turns if roles[i] == "user" else None)
        texts.append(_text(value, where))
    return texts[0] if first else None, list(zip(texts[first::2], texts[first + 1 :: 2], strict=True))


def _key_steps(value: object, name: str) -> tuple[tuple[str, ...], ...] | None:
    """Returns the key steps in {"Steps": [...]} or in a bare list, each as a tuple of alternative wordings.

    The value may also be JSON text of one of these. Returns None if the field is null, {}, blank or missing. A key step
    given as one text is the same as a list with that text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError(f"{name}: a text that is not JSON ({error}); expected groups, or JSON of them") from error
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
