"""Renders a question as chat text: system turn, user turn, assistant header.

Flow: data -> processing (here) -> rollout. If the checkpoint has a chat template, that template is used, since the
weights were trained with it. Without one, and if it renders no chat turns as those of base models, the format is that
of Qwen2-VL (arXiv 2409.12191, section 2.2.1), ChatML:

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>Find x.<|im_end|>\\n
    <|im_start|>assistant\\n
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from r1vl_jax.common.files import read_object, read_text
from r1vl_jax.common.text import one_line

SYSTEM = "You are a helpful assistant."
ASSISTANT_HEADER = "<|im_start|>assistant\n"
THINKING_HEADER = ASSISTANT_HEADER + "<think>\n"  # the answer begins in the middle of the thinking
PLACEHOLDERS = {"<image>": "image", "<video>": "video"}
# Limits of a chat template, which is a program from a checkpoint. transformers runs it in Jinja's sandbox.
MAX_TEMPLATE = 1 << 20  # characters
MAX_TEXT = 1 << 24  # characters that it may write
MAX_SECONDS = 10.0


def split_questions(questions: Sequence[str], *, images: int, videos: int = 0) -> list[list[dict[str, str]]]:
    """Cuts the user's turns at their placeholders into the parts of chat messages.

    If no turn has a placeholder, the first turn gets all of them at its start, images before videos.

    Args:
      questions: texts with "<image>" and "<video>" as placeholders.
      images, videos: number of images and of videos of the row.
    Returns: for each turn, a list of {"type": "text", "text": ...}, {"type": "image"} and {"type": "video"}, in order.
    Raises: ValueError if the number of placeholders differs from the number of images or videos.
    """
    turns = [re.split(f"({'|'.join(PLACEHOLDERS)})", question) for question in questions]
    if all(len(pieces) == 1 for pieces in turns):
        turns[0] = ["<image>"] * images + ["<video>"] * videos + turns[0]
    for placeholder, files in (("<image>", images), ("<video>", videos)):
        count = sum(pieces.count(placeholder) for pieces in turns)
        if count != files:
            raise ValueError(f"the text has {count} {placeholder} and the row has {files}; expected as many")
    return [
        [
            {"type": PLACEHOLDERS[piece]} if piece in PLACEHOLDERS else {"type": "text", "text": piece}
            for piece in pieces
            if piece
        ]
        for pieces in turns
    ]


def find_chat_template(folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the checkpoint's chat template; None if it has none.

    The processor's template (chat_template.jinja, chat_template.json) is preferred to the tokenizer's, because the
    tokenizer may come from a text-only model.

    Raises: ValueError naming the file and the missing key; also if the template is too long, or multiplies.
    """
    template = _read_template(folder, tokenizer)
    if template is None:
        return None
    if len(template) > MAX_TEMPLATE:
        raise ValueError(
            f"{folder}: the chat template has {len(template):,} characters, expected at most {MAX_TEMPLATE:,}"
        )
    with contextlib.suppress(jinja2.TemplateError):  # `render_chat` names what is no Jinja
        for line, kind, mark in jinja2.Environment().lex(template):
            # One operation could then take hours, as 10 ** 10 ** 10 does, and `_time_limit` acts between operations.
            if kind == "operator" and mark in ("*", "**"):
                raise ValueError(f"{folder}: the chat template multiplies ({mark} in line {line}); expected Qwen2-VL's")
    return template


def _read_template(folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the text of the template. Raises ValueError naming the file and the missing key."""
    jinja, as_json = Path(folder) / "chat_template.jinja", Path(folder) / "chat_template.json"
    if jinja.is_file():
        return read_text(jinja)
    if as_json.is_file():
        template = read_object(as_json).get("chat_template")
        if not isinstance(template, str):
            raise ValueError(f"{as_json}: no text under chat_template")
        return template
    if isinstance(tokenizer.chat_template, dict):
        return tokenizer.chat_template.get("default")
    return tokenizer.chat_template


def renders_turns(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Returns whether a chat template writes anything around a question, as the turns of a chat need.

    The template of a base model writes nothing, or the question alone. A template that cannot be used counts as one
    that writes turns: `render_chat` says what is wrong with it.
    """
    question = "Which?"
    for content in (question, [{"type": "text", "text": question}]):
        try:
            text = _apply(tokenizer, template, [{"role": "user", "content": content}])
        except Exception:  # a template may raise any
            return True
        for token in (question, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
            text = text.replace(str(token), "") if token else text
        if not text.strip():
            return False
    return True


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, Any]],
    *,
    vision: Mapping[str, str],
    template: str | None = None,
) -> str:
    """Returns the chat text up to and including the assistant header.

    Args:
      turns: a list of {"role", "content"}; the last turn is the user's. A content is a text, or the parts of one turn
        from `split_questions`. If there is no system turn, the text gets the default one.
      vision: texts for an "image" part and for a "video" part; used if `template` is None.
      template: Jinja text; None: the format at the top of this file.
    Raises: ValueError, naming the checkpoint, if the template is not Jinja, does not accept images, or does not begin
      the assistant's turn as Qwen2-VL does.
    """
    if template is None:
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": SYSTEM}, *turns]
        pairs = ((turn["role"], _plain(turn["content"], vision)) for turn in turns)
        return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs) + ASSISTANT_HEADER
    name = tokenizer.name_or_path
    try:
        text = _apply(tokenizer, template, turns)
    except TypeError as error:  # a text-only template concatenates a text and the list of parts
        raise ValueError(
            f"{name}: the chat template takes no message with images ({one_line(error)}); expected Qwen2-VL's"
        ) from error
    except Exception as error:  # a template may raise any
        raise ValueError(
            f"{name}: the chat template cannot be used ({one_line(error)}); expected Qwen2-VL's"
        ) from error
    if not text.endswith((ASSISTANT_HEADER, THINKING_HEADER)):
        raise ValueError(f"{name}: the chat template ends a prompt with {text[-40:]!r}; expected {ASSISTANT_HEADER!r}")
    return text


def _apply(tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[Mapping[str, Any]]) -> str:
    """Returns what a Jinja template makes of turns, with the header of the answer."""
    with _time_limit():
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    assert isinstance(text, str)  # with tokenize=False
    if len(text) > MAX_TEXT:
        raise jinja2.TemplateRuntimeError(f"it writes {len(text):,} characters, the limit is {MAX_TEXT:,}")
    return text


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raises TemplateRuntimeError at the template's next line, or next call, after the block has run MAX_SECONDS.

    A function of `sys.settrace` sees both. A signal would not reach the threads in which rows are encoded.
    """
    end, before = time.monotonic() + MAX_SECONDS, sys.gettrace()

    def check(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise jinja2.TemplateRuntimeError(f"it takes longer than {MAX_SECONDS:g} s")
        return check if frame.f_code.co_filename == "<template>" else None  # of other code, only calls are seen

    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)


def _plain(content: str | Sequence[Mapping[str, str]], vision: Mapping[str, str]) -> str:
    """Returns the content of a message as text."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else vision[part["type"]] for part in content)
