"""Characters of a decoded text -> tokens, exactly, for tokens that no tokenizer would choose and for those it would."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from helpers.tiny_tokenizer import SPECIAL, byte_level, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1vl_jax.processing.spans import decode, token_at
from r1vl_jax.rewards.formats import R1VL

MERGES = 150_000


@cache
def quickstart_tokenizer():
    return make_tokenizer()


@cache
def large_tokenizer():
    """A byte-level BPE of Qwen2's shape: every pair of bytes is a token, most of the rest are triples, and a few long
    ones cross the borders that steps have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(itertools.product(alphabet, repeat=2))
    line = "\u010a"  # how byte-level BPE writes a line end
    long = [
        "." + line,
        line + line,
        "##",
        "###",
        "." + line + line,
        line + "###",
        line + line + "###",
        "\u0120Ste",
        "\u0120Step",
    ]
    merges, known = [], set(alphabet)
    for left, right in pairs:
        merges.append((left, right))
        known.add(left + right)
    for text in long:
        left = next(text[:i] for i in range(len(text) - 1, 0, -1) if text[:i] in known and text[i:] in known)
        if text not in known:
            merges.append((left, text[len(left) :]))
            known.add(text)
    for left, right in itertools.product([a + b for a, b in pairs[::97]], alphabet):
        if len(merges) >= MERGES:
            break
        if left + right not in known:
            merges.append((left, right))
            known.add(left + right)
    vocab = {token: i for i, token in enumerate([*alphabet, *dict.fromkeys(a + b for a, b in merges)])}
    tokenizer = byte_level(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(SPECIAL))


TOKENIZERS = {"quickstart": quickstart_tokenizer, "150k merges": large_tokenizer}
PIECES = st.one_of(
    st.sampled_from(
        ["### Step 1:", "\n### Step 2:", ".\n\n### Step 3:", "\r\n### Step 4:\r\n", "#", "##", "\n", "\r\n"]
    ),
    st.sampled_from(["😀", "👩‍👩‍👧", "面积相等", "e\u0301", "½", "İ", "\u00a0", "  ", "12/2 = 6", "So ", "the area"]),
    st.text(max_size=6),
)


def test_the_large_one_is_large():
    assert len(large_tokenizer().get_vocab()) > MERGES


def expected(tokenizer, tokens, text, char):
    """The first token after which the bytes up to and with text[char] are there; one decode for each token."""
    for i in range(len(tokens)):
        if decode(tokenizer, tokens[: i + 1])[: char + 1] == text[: char + 1]:
            return i
    raise AssertionError("the text does not come from the tokens")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_text_and_random_tokens(name, data):
    """The tokenizer's own tokens of a text, tokens of its pieces (merges crossed), and any tokens at all."""
    tokenizer = TOKENIZERS[name]()
    pieces = data.draw(st.lists(PIECES, max_size=12))
    pieces = [piece.encode("utf-8", "ignore").decode() for piece in pieces]
    kind = data.draw(st.sampled_from(["own", "pieces", "characters", "any"]))
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    if kind == "any":
        some = encode("### Step 1: a\n### Step 2: b")
        ids = st.one_of(st.integers(0, len(tokenizer) - 1), st.sampled_from(some))
        tokens = data.draw(st.lists(ids, max_size=40)) + encode("\n### Step 3:")
    else:
        texts = {"own": ["".join(pieces)], "pieces": pieces, "characters": list("".join(pieces))}[kind]
        tokens = [token for text in texts for token in encode(text)]
    tokens += [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    text = decode(tokenizer, tokens)
    chars = [i for i, char in enumerate(text) if char == "#"]
    got = token_at(tokenizer, np.array(tokens), text, chars)
    assert got == [expected(tokenizer, tokens, text, char) for char in chars]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_both_ways_agree(name, monkeypatch):
    """The tokenizer's offsets and the search give the same tokens, where both can be asked."""
    tokenizer = TOKENIZERS[name]()
    text = (
        "### Image Description: 😀 a\n\n### Step 1: 面积 12/2 = 6.\n\n### Step 2:\r\nSo e\n### The final answer is: 3"
    )
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    chars = R1VL.step_starts(text)
    by_offsets = token_at(tokenizer, tokens, text, chars)
    # A special token in the middle changes no text, and makes no difference but its own place.
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    shifted = token_at(tokenizer, [special, *tokens], text, chars)
    assert shifted == [i + 1 for i in by_offsets]
    split = [piece for char in text for piece in tokenizer(char, add_special_tokens=False)["input_ids"]]
    assert split != tokens
    by_search = token_at(tokenizer, split, text, chars)
    for i, j, char in zip(by_offsets, by_search, chars, strict=True):
        assert (
            decode(tokenizer, tokens[:i]).rstrip("\ufffd")
            == text[: len(decode(tokenizer, tokens[:i]).rstrip("\ufffd"))]
        )
        assert len(decode(tokenizer, tokens[:i])) <= char < len(decode(tokenizer, tokens[: i + 1]))
        assert decode(tokenizer, split[:j]) == text[:char]


def test_a_header_that_begins_inside_a_token_belongs_to_that_token():
    tokenizer = large_tokenizer()
    merged = tokenizer.convert_tokens_to_ids("\u010a\u010a###")
    tokens = [*tokenizer("a.", add_special_tokens=False)["input_ids"], merged]
    tokens += tokenizer(" Step 1: b", add_special_tokens=False)["input_ids"]
    text = decode(tokenizer, tokens)
    assert text == "a.\n\n### Step 1: b"
    assert token_at(tokenizer, tokens, text, R1VL.step_starts(text)) == [tokens.index(merged)]


def test_nothing_to_find():
    assert token_at(quickstart_tokenizer(), [], "", []) == []
