"""The shapes of batches: few, chosen from the data, and a shape for what the data did not show."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers.tiny_jax import questions

from r1vl_jax.data.batching import (
    Size,
    by_length,
    collate_pairs,
    collate_prompts,
    in_micro_batches,
    need_of,
    padding,
    plan_shapes,
    size_of,
)
from r1vl_jax.data.buckets import Buckets, Shape, plan


def test_two_kinds_of_batches_get_a_shape_each():
    """Short and long ones, with 1 to 4 more tokens here and there."""
    needs = [Shape(100 + i % 3, 50, 2, 64) for i in range(20)] + [Shape(400 + i % 5, 300, 6, 64) for i in range(5)]
    planned = plan(Buckets(8), needs, count=2, batch=4, answer_cost=1)
    assert planned.shapes == (Shape(104, 56, 2, 64), Shape(416, 320, 6, 64))
    one = plan(Buckets(8), needs, count=1, batch=4, answer_cost=1)
    assert one.shapes == (Shape(416, 320, 6, 64),)


def test_merging_adds_the_least_padding():
    """Three needs, two shapes: the two that are alike share one, however often the third comes."""
    near, nearer, far = Shape(64, 64, 1, 64), Shape(80, 64, 1, 64), Shape(640, 64, 1, 64)
    planned = plan(Buckets(16), [near, nearer] + [far] * 3, count=2, batch=1, answer_cost=1)
    assert planned.shapes == (nearer, far)
    # A shape that is met often is not made larger for one that is met once.
    planned = plan(Buckets(16), [near] * 9 + [nearer, Shape(112, 64, 1, 64)], count=2, batch=1, answer_cost=1)
    assert planned.shapes == (near, Shape(112, 64, 1, 64))


def test_answers_count_as_they_cost():
    needs = [Shape(64, 64, 1, 64), Shape(96, 64, 1, 64), Shape(64, 80, 1, 64)]
    assert plan(Buckets(16), needs, count=2, batch=1, answer_cost=1).shapes[-1] == Shape(96, 64, 1, 64)
    assert plan(Buckets(16), needs, count=2, batch=1, answer_cost=8).shapes[-1] == Shape(64, 80, 1, 64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_every_need_fits(seed, count):
    """More shapes never mean more padding, and each batch gets one that holds it."""
    rng = np.random.default_rng(seed)
    needs = [Shape(*map(int, row)) for row in rng.lognormal([6, 5, 1.5, 0], 0.5, (60, 4)).astype(int) + 1]
    needs = [dataclasses.replace(need, patches=96) for need in needs]
    work = []
    for shapes in range(1, count + 1):
        planned = plan(Buckets(16, shards=2), needs, count=shapes, batch=8, answer_cost=1)
        assert 1 <= len(planned.shapes) <= shapes
        fitted = [planned.fit(need) for need in needs]
        assert all(shape.holds(need) and shape in planned.shapes for shape, need in zip(fitted, needs, strict=True))
        assert all(s.prompt % 16 == s.answer % 16 == s.rows % 2 == s.patches % 16 == 0 for s in planned.shapes)
        work.append(sum(8 * (s.prompt + s.answer) + s.rows * s.patches / 2 for s in fitted))
    assert work == sorted(work, reverse=True)


def test_what_the_plan_did_not_foresee():
    """The largest shape, grown by quarters where it is too small: a whole run of outliers makes few shapes."""
    planned = plan(Buckets(16), [Shape(64, 32, 2, 64), Shape(100, 32, 2, 64)], count=2, batch=1, answer_cost=1)
    assert planned.shapes == (Shape(64, 32, 2, 64), Shape(112, 32, 2, 64))
    assert planned.fit(Shape(113, 32, 2, 64)) == Shape(144, 32, 2, 64)
    assert planned.fit(Shape(500, 10, 3, 65)) == Shape(608, 32, 3, 80)
    shapes = {planned.fit(Shape(prompt, 10, rows, 64)) for prompt in range(1, 1000) for rows in range(1, 9)}
    assert {s.prompt for s in shapes} == {64, 112, 144, 192, 240, 304, 384, 480, 608, 768, 960, 1200}
    assert {s.rows for s in shapes} == {2, 3, 4, 5, 7, 9}
    assert {(s.answer, s.patches) for s in shapes} == {(32, 64)}
    text = plan(Buckets(16), [Shape(64, 32, 0, 0)], count=2, batch=1, answer_cost=1)
    assert text.fit(Shape(200, 8, 0, 0)) == Shape(240, 32, 0, 0)  # no vision rows for text
    assert text.fit(Shape(60, 8, 3, 40)) == Shape(64, 32, 3, 48)


def test_without_a_plan_a_batch_is_rounded_up():
    assert Buckets(8, shards=4).fit(Shape(9, 1, 1, 6)) == Shape(16, 8, 4, 8)
    assert plan(Buckets(8), [], count=3, batch=1, answer_cost=1) == Buckets(8)


def sizes(rng, count, *, text=(20, 60), images=(1, 2), side=(2, 12)):
    found = []
    for _ in range(count):
        grids = [(1, *(2 * rng.integers(*side, 2)).tolist()) for _ in range(rng.integers(*images))]
        prompt = int(rng.integers(*text)) + sum(h * w // 4 for _, h, w in grids)
        answer = int(rng.integers(50, 400))
        found.append(Size(prompt + answer, answer, tuple(grids)))
    return found


def test_a_handful_of_shapes_wastes_little():
    """600 rows of images of every size: four shapes, and less padding than one shape has."""
    rows = sizes(np.random.default_rng(0), 600)
    batches = in_micro_batches(rows[:300], 100, 10)
    shares = []
    for count in (1, 4):
        buckets = plan_shapes(batches, count=count, multiple=32, merge=2, shards=1)
        fitted = [(batch, buckets.fit(need_of(batch, buckets))) for batch in in_micro_batches(rows[300:], 100, 10)]
        assert len({shape for _, shape in fitted}) <= count + 1
        real = sum(size.tokens for batch, _ in fitted for size in batch)
        shares.append(1 - real / sum(10 * shape.prompt for _, shape in fitted))
    assert shares[1] < 0.3 and shares[0] > 0.4


def test_vision_rows_are_as_long_as_packs_well():
    """Images of 100 patches in rows of 112 or 128 waste an eighth; of three in a row, less."""
    rows = [[Size(30, 10, ((1, 10, 10),))] * 12] * 4
    buckets = plan_shapes(rows, count=1, multiple=64, merge=2, shards=1)
    (shape,) = buckets.shapes
    assert 1200 / (shape.rows * shape.patches) > 0.85
    assert buckets.row_length(100) == shape.patches


def test_batches_are_alike_and_whole():
    rows = sizes(np.random.default_rng(1), 23)
    parts = by_length(rows, 5, lambda size: size)
    assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
    assert sum(parts, []) == sorted(rows, key=lambda size: size.tokens)
    assert [len(part) for part in in_micro_batches(rows, 10, 5)] == [5] * 4  # 3 rows are no batch of training
    assert [len(part) for part in in_micro_batches(rows[:3], 10, 5)] == [3]


def test_a_planned_batch_holds_what_it_should():
    """Collated into a larger shape than needed, a batch has the same content and counts its padding."""
    encoded = questions([5, ("image", (1, 4, 6)), 1], [3], [2, ("image", (1, 8, 4)), ("video", (2, 4, 4))])
    answers = [np.arange(1, 4), np.arange(1, 9), np.arange(1, 2)]
    pairs = list(zip(encoded, answers, strict=True))
    need = need_of([size_of(*pair) for pair in pairs], Buckets(8))
    lengths = [len(e.tokens_T) for e in encoded]
    longest = max(n + len(answer) for n, answer in zip(lengths, answers, strict=True))
    assert need == Shape(prompt=longest, answer=8, rows=3, patches=32)
    large = Shape(64, 24, 5, 48)
    buckets = dataclasses.replace(Buckets(8, patches=32), shapes=(large,))
    rows, start_B, tokens, mask = collate_pairs(pairs, buckets)
    assert rows.tokens_BT.shape == (3, 64) and tokens.shape == mask.shape == (3, 1, 24)
    assert rows.patches_WPC.shape == (5, 48, 1176) and start_B.tolist() == lengths
    small = collate_prompts(encoded, Buckets(8))
    for b, (prompt, answer, n) in enumerate(zip(encoded, answers, lengths, strict=True)):
        end = n + len(answer)
        np.testing.assert_array_equal(rows.tokens_BT[b, :n], small.tokens_BT[b, :n])
        np.testing.assert_array_equal(rows.tokens_BT[b, n:end], answer)
        np.testing.assert_array_equal(tokens[b, 0][mask[b, 0]], answer)
        assert rows.mask_BT[b].tolist() == [True] * end + [False] * (64 - end) and mask[b].sum() == len(answer)
        np.testing.assert_array_equal(rows.positions_3BT[:, b, :n], prompt.positions_3T)
        assert (rows.positions_3BT[:, b, n:end] == prompt.next_position + np.arange(len(answer))).all()
        # The patches behind each image token are the question's own, in both.
        for batch in (rows, small):
            slots = batch.image_slot_BT[b][batch.image_slot_BT[b] >= 0]
            flat = batch.patches_WPC.reshape(-1, 4, 1176)
            np.testing.assert_array_equal(flat[slots].reshape(-1, 1176), prompt.patches_PC)
    shares = padding([rows])
    assert shares["padding/tokens"] == pytest.approx(1 - (sum(lengths) + 12) / (3 * 64))
    assert shares["padding/patches"] == pytest.approx(1 - (24 + 32 + 32) / (5 * 48))
    shares = padding([small], [mask])
    assert shares["padding/tokens"] == pytest.approx(1 - (sum(lengths) + 12) / (small.mask_BT.size + 3 * 24))
    assert padding([collate_prompts(questions([3]), Buckets(8))])["padding/patches"] == 0  # no patches, no padding


def test_frames_of_a_video_may_lie_in_several_rows():
    (video,) = questions([1, ("video", (3, 4, 4))])
    got = collate_prompts([video], Buckets(8, patches=32))
    assert got.patches_WPC.shape[:2] == (2, 32)
    np.testing.assert_array_equal(got.segment_WP, [[0] * 16 + [1] * 16, [0] * 16 + [-1] * 16])
    slots = got.image_slot_BT[got.image_slot_BT >= 0]
    np.testing.assert_array_equal(slots, np.arange(12))


@pytest.mark.parametrize("seed", range(30))
def test_packing_never_needs_more_rows_than_it_said(seed):
    """First fit may need more rows when these get longer; a shape's longer rows must not change what was counted."""
    rng = np.random.default_rng(seed)
    rows = sizes(rng, 12, images=(0, 5), side=(1, 9))
    encoded = questions(*[[4] + [("image", grid) for grid in size.grids] for size in rows], seed=seed)
    for buckets in (Buckets(8), Buckets(8, patches=170), Buckets(64, shards=3)):
        need = need_of([size_of(e) for e in encoded], buckets)
        for times in (1, 2, 3):
            shape = Shape(need.prompt, 0, need.rows, need.patches * times)
            got = collate_prompts(encoded, dataclasses.replace(buckets, shapes=(shape,)))
            assert (got.segment_WP >= 0).sum() == sum(len(e.patches_PC) for e in encoded)
