"""From rows to batches: the stream of rows, padding, and images packed into vision rows."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_jax import batch_of, questions, random_params, tiny_config

from r1vl_jax.data.batching import collate_pairs, collate_prompts, pad_answers, patch_coordinates
from r1vl_jax.data.buckets import Buckets, bucket
from r1vl_jax.model.answers import answer_logprobs
from r1vl_jax.model.vision import encode_images

A, B, C, VIDEO = ("image", (1, 4, 6)), ("image", (1, 2, 2)), ("image", (1, 8, 4)), ("video", (2, 4, 4))


@pytest.mark.parametrize("multiple", [1, 4, 32])
def test_bucket(multiple):
    """A multiple, not below the count, growing with it, at most eight sizes in an octave, waste below 1/8."""
    counts = range(1, 200 * multiple)
    sizes = [bucket(count, multiple) for count in counts]
    assert all(size >= count and size % multiple == 0 for size, count in zip(sizes, counts, strict=True))
    assert sizes == sorted(sizes)
    for size, count in zip(sizes, counts, strict=True):
        at_least = -(-count // multiple) * multiple
        assert size < at_least * 9 / 8 and bucket(size, multiple) == size
    for octave in range(3, 7):
        low, high = multiple << octave, multiple << (octave + 1)
        assert len({size for size in sizes if low < size <= high}) == 8
    assert [bucket(count, 4) for count in (1, 4, 5, 32, 33)] == [4, 4, 8, 32, 36]


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 4, 6), (2, 6, 4), (3, 2, 8)])
def test_patch_coordinates(grid):
    """Frame by frame, squares of 2 x 2 row by row, and the four patches of a square row by row."""
    t, h, w = grid
    expected = [
        (2 * i + k, 2 * j + m)
        for _ in range(t) for i in range(h // 2) for j in range(w // 2) for k in range(2) for m in range(2)
    ]  # fmt: skip
    np.testing.assert_array_equal(patch_coordinates(grid, 2), expected)


def test_text_is_padded_on_the_right():
    encoded = questions([5], [3, B, 2], [1])
    got = batch_of(encoded, pad_multiple=8)
    assert got.tokens_BT.shape == (3, 8) and got.positions_3BT.shape == (3, 3, 8)
    for b, prompt in enumerate(encoded):
        n = len(prompt.tokens_T)
        assert got.mask_BT[b].tolist() == [True] * n + [False] * (8 - n)
        np.testing.assert_array_equal(got.tokens_BT[b, :n], prompt.tokens_T)
        np.testing.assert_array_equal(got.positions_3BT[:, b, :n], prompt.positions_3T)
        assert got.next_position_B[b] == prompt.next_position
    # Three text tokens, the vision start, one image token (2 x 2 patches), the vision end.
    assert got.image_slot_BT.tolist() == [[-1] * 8, [-1] * 4 + [0] + [-1] * 3, [-1] * 8]


def test_no_images_no_vision_rows():
    got = batch_of(questions([5], [3]), pad_multiple=8, shards=8)
    assert got.patches_WPC.shape[0] == got.patch_hw_WP2.shape[0] == got.segment_WP.shape[0] == 0
    assert (got.image_slot_BT == -1).all()


def test_packing_by_hand():
    """Patches of 24, 4, 32, 4, 4 in rows of 32: [24, 4, 4], [32], and the last 4 where there is room again."""
    encoded = questions([A, 1, B], [2], [C, B], [3, B])
    got = batch_of(encoded, pad_multiple=8)
    assert got.patches_WPC.shape == (3, 32, 1176)
    frames = [[0] * 24 + [1] * 4 + [2] * 4, [0] * 32, [0] * 4 + [-1] * 28]
    np.testing.assert_array_equal(got.segment_WP, frames)
    slots = [row[row >= 0].tolist() for row in got.image_slot_BT]
    # Features are numbered through: 8 to a row.
    assert slots == [[0, 1, 2, 3, 4, 5, 6], [], [8, 9, 10, 11, 12, 13, 14, 15, 7], [16]]
    np.testing.assert_array_equal(got.patches_WPC[0, 24:28], encoded[0].patches_PC[24:])
    np.testing.assert_array_equal(got.patches_WPC[0, 28:32], encoded[2].patches_PC[32:])
    np.testing.assert_array_equal(got.patch_hw_WP2[1], patch_coordinates((1, 8, 4), 2))


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_vision_rows_divide_over_shards(shards):
    got = batch_of(questions([A, C], [2], [C, B], [3, A]), pad_multiple=8, shards=shards)
    assert got.patches_WPC.shape[0] % shards == 0
    assert (got.segment_WP >= 0).sum() == 24 + 32 + 32 + 4 + 24


def test_packed_images_encode_as_alone():
    """Every image token of a packed batch gets the feature that its image has when it is encoded by itself."""
    cfg = tiny_config().vision
    params = random_params(tiny_config())["vision"]
    encode = jax.jit(partial(encode_images, cfg=cfg))
    encoded = questions([2, A, 1, B], [4], [1, C, VIDEO, B], [B], [A, C])
    got = batch_of(encoded, pad_multiple=16)
    assert got.patches_WPC.shape[0] < sum(len(prompt.grids) for prompt in encoded) and got.segment_WP.max() > 1
    features = encode(params, patches_WPC=got.patches_WPC, hw_WP2=got.patch_hw_WP2, segment_WP=got.segment_WP)
    features = np.asarray(features).reshape(-1, features.shape[-1])

    alone, width = [], got.segment_WP.shape[1]
    for prompt in encoded:
        start, own = 0, []
        for grid in prompt.grids:
            size = math.prod(grid)
            # One row: this image, then padding of large values.
            patches = np.full((1, width, 1176), 50.0, np.float32)
            patches[0, :size] = prompt.patches_PC[start : start + size]
            hw, segment = np.zeros((1, width, 2), np.int32), np.full((1, width), -1, np.int32)
            hw[0, :size] = patch_coordinates(grid, 2)
            segment[0, :size] = np.repeat(np.arange(grid[0]), grid[1] * grid[2])
            own += list(np.asarray(encode(params, patches_WPC=patches, hw_WP2=hw, segment_WP=segment))[0, : size // 4])
            start += size
        alone.append(own)
    for slots, own in zip(got.image_slot_BT, alone, strict=True):
        placed = features[slots[slots >= 0]]
        assert len(placed) == len(own)
        if own:
            np.testing.assert_allclose(placed, own, atol=1e-5)
            assert np.std(own) > 0.1


def test_answers():
    answers = [[np.array([5, 6, 7]), np.array([8])], [np.array([9]), np.array([1, 2, 3, 4, 5])]]
    tokens, mask = pad_answers(answers, 8)
    assert tokens.shape == mask.shape == (2, 2, 8) and tokens.dtype == np.int32 and mask.dtype == bool
    for b, g in np.ndindex(2, 2):
        np.testing.assert_array_equal(tokens[b, g][mask[b, g]], answers[b][g])
        assert mask[b, g].tolist() == sorted(mask[b, g].tolist(), reverse=True)


def test_an_answer_behind_its_prompt_scores_as_one_that_shares_it():
    """SFT's rows hold prompt and answer, StepGRPO's answers share a cached prompt: the same values and gradients."""
    cfg = tiny_config()
    params = random_params(cfg)
    rng = np.random.default_rng(3)
    encoded = questions([3, A, 2], [5], [C, 1, VIDEO])
    answers = [rng.integers(0, 100, count).astype(np.int32) for count in (4, 9, 1)]
    pairs = list(zip(encoded, answers, strict=True))
    rows, start_B, tokens, mask = collate_pairs(pairs, Buckets(8))
    weights = rng.normal(size=mask.shape) * mask

    def scored(params, prompts, **options):
        logprobs, entropy = answer_logprobs(params, cfg, prompts, tokens, **options)
        return jnp.sum(jnp.where(mask, logprobs, 0) * weights), (logprobs, entropy)

    gradient = jax.jit(jax.value_and_grad(scored, has_aux=True))
    (_, joined), joined_grads = gradient(params, rows, start_B=start_B)
    (_, shared), shared_grads = gradient(params, collate_prompts(encoded, Buckets(8)))
    for ours, theirs in zip(joined, shared, strict=True):
        np.testing.assert_allclose(np.asarray(ours)[mask], np.asarray(theirs)[mask], atol=1e-5)
    assert np.std(np.asarray(joined[0])[mask]) > 0.1
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(joined_grads), jax.tree.leaves(shared_grads), strict=True
    ):
        scale = np.abs(np.asarray(b)).max()
        np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, 1), err_msg=jax.tree_util.keystr(path))
