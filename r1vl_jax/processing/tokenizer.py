"""Reads a checkpoint's tokenizer and the ids of its special tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many types, even Exception itself
        raise ValueError(f"{folder}: the tokenizer or its chat template cannot be read ({error})") from error


def special_ids(folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Returns the special ids. Image and video ids are read from config.json, the others from the tokenizer."""
    vocabulary = tokenizer.get_vocab()

    def from_config(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or value not in known:
            raise ValueError(f"{folder / 'config.json'}: {key} is {value!r}; expected the id of one of its tokens")
        return value

    def from_tokenizer(token: str) -> int:
        if token not in vocabulary:
            raise ValueError(f"{folder}: the tokenizer (tokenizer.json, tokenizer_config.json) has no {token!r}")
        return vocabulary[token]

    known = set(vocabulary.values())
    return SpecialIds(
        image=from_config("image_token_id"),
        video=from_config("video_token_id"),
        vision_start=from_config("vision_start_token_id"),
        vision_end=from_config("vision_end_token_id"),
        im_end=from_tokenizer(IM_END),
        end_of_text=from_tokenizer(END_OF_TEXT),
    )
