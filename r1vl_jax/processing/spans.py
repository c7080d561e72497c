"""Where characters of a decoded text lie among the tokens it came from: the token spans of per-step credit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of tokens, special ones left out."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_at(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int] | np.ndarray, text: str, chars: Sequence[int]
) -> list[int]:
    """For each of `chars`, the index of the first token that text[char] comes from.

    Sampled tokens need not be those that the tokenizer would make of their text. Where they are, its own offsets say
    which token holds a character; where not, the shortest run of tokens is searched whose text holds it.

    Args:
      text: what `decode` gives for all of `tokens`.
      chars: ascending places of whole characters in `text`, never of U+FFFD, which stands for broken bytes.
    """
    if not chars:
        return []
    tokens = np.asarray(tokens)
    plain = np.flatnonzero(~np.isin(tokens, tokenizer.all_special_ids))
    own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if own["input_ids"] == tokens[plain].tolist():
        ends = np.maximum.accumulate([end for _, end in own["offset_mapping"]])
        return [int(plain[np.searchsorted(ends, char, side="right")]) for char in chars]
    found, ids = [], tokens.tolist()
    for char in chars:
        # A run of tokens that ends within a character decodes to U+FFFD there, and so not yet to the text.
        found.append(
            bisect_left(
                range(len(ids)),
                True,
                lo=found[-1] if found else 0,
                key=lambda i: decode(tokenizer, ids[: i + 1])[: char + 1] == text[: char + 1],  # noqa: B023
            )
        )
    return found
