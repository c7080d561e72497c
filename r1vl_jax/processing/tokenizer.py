"""Reads a checkpoint's tokenizer and the ids of its special tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from r1vl_jax.common.text import one_line

IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids of the special tokens that this package uses, read from the checkpoint's files."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    im_end: int
    end_of_text: int


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Reads the folder's tokenizer. Raises ValueError if it cannot be read or has no vocabulary.

    The files are checked first, because transformers makes an empty tokenizer if there is no vocabulary.
    """
    if not (folder / "tokenizer.json").is_file():
        for path in (folder / "vocab.json", folder / "merges.txt"):
            if not path.is_file():
                raise ValueError(f"{path}: no such file; expected tokenizer.json, or vocab.json and merges.txt")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many types, even Exception itself
        raise ValueError(f"{folder}: the tokenizer or its chat template cannot be read ({one_line(error)})") from error


def special_ids(folder: Path, vision: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Returns the special ids: those of `vision` (see model/vision_ids.py), and those that the tokenizer knows."""
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())
    for key, value in vision.items():
        if value not in known:
            path = folder / "config.json"
            raise ValueError(f"{path}: {key} is {value}; expected the id of one of the tokenizer's tokens")
    for token in (IM_END, END_OF_TEXT):
        if token not in vocabulary:
            raise ValueError(f"{folder}: the tokenizer (tokenizer.json, tokenizer_config.json) has no {token!r}")
    return SpecialIds(
        image=vision["image_token_id"],
        video=vision["video_token_id"],
        vision_start=vision["vision_start_token_id"],
        vision_end=vision["vision_end_token_id"],
        im_end=vocabulary[IM_END],
        end_of_text=vocabulary[END_OF_TEXT],
    )
