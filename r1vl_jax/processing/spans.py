"""Finds the token that a character of a decoded answer comes from, so that each step's tokens get its advantage."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Returns the text of tokens, without the special tokens."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # one row of tokens; for several rows it would be a list
    return text


def token_at(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int] | np.ndarray, text: str, chars: Sequence[int]
) -> list[int]:
    """For each of `chars`, returns the index of the first token that text[char] comes from.

    If the tokens are the same as those of the encoded text, the tokenizer's offsets say which token contains a
    character. Sampled tokens may differ from these. Then, for each character, finds the shortest prefix of the tokens
    whose text contains the character.

    Args:
      text: `decode` of all of `tokens`.
      chars: ascending indices of characters of `text`. None of these characters may be U+FFFD, to which broken bytes
        decode.
    """
    if not chars:
        return []
    tokens = np.asarray(tokens)
    plain = np.flatnonzero(~np.isin(tokens, tokenizer.all_special_ids))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] == tokens[plain].tolist():
        ends = np.maximum.accumulate([end for _, end in encoded["offset_mapping"]])
        return [int(plain[np.searchsorted(ends, char, side="right")]) for char in chars]
    indices: list[int] = []
    ids = tokens.tolist()
    for char in chars:
        # A prefix that ends within a character decodes to U+FFFD there, so it does not equal the text yet.
        index = bisect_left(
            range(len(ids)),
            True,
            lo=indices[-1] if indices else 0,
            key=lambda i: decode(tokenizer, ids[: i + 1])[: char + 1] == text[: char + 1],  # noqa: B023 (called at once)
        )
        indices.append(index)
    return indices
