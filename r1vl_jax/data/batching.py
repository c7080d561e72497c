"""Encoded questions and answers as one padded batch, its images packed.

Several small images share a vision row, and the frames of one video may lie in several; where a batch has no image
there are no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from r1vl_jax.data.buckets import Buckets, Shape, plan
from r1vl_jax.types import EncodedPrompt, Prompts

Grid = tuple[int, int, int]
Row = Any
PLANNED_ROWS = 512  # the shapes of a stage's batches are planned from its first rows
LENGTHS = (1, 1.25, 1.5, 2, 3, 4)  # of vision rows that `plan_shapes` tries, in the largest frame
HEAD_COST = 0.2  # work of the loss head on a token over that of the rest; 2B: 0.233 / 1.31
ATTENTION_PATCHES = 7680  # row length where attention costs as much as the rest: 6 * the tower's width of 1280


class Size(NamedTuple):
    """What a row takes.

    Attributes:
      tokens: of the prompt, and of the answer where that stands behind it.
      answer: of the answer alone; 0 without one.
      grids: (t, h, w) of its images and videos, in patches.
    """

    tokens: int
    answer: int
    grids: tuple[Grid, ...]


def size_of(prompt: EncodedPrompt, answer: Sequence[int] | np.ndarray = ()) -> Size:
    return Size(len(prompt.tokens_T) + len(answer), len(answer), prompt.grids)


def by_length(rows: Iterable[Row], count: int, size: Callable[[Row], Size]) -> list[list[Row]]:
    """Rows in batches of `count`, alike in length: such batches hold little padding. The last one may be shorter."""
    ordered = sorted(rows, key=lambda row: size(row).tokens)
    return [ordered[i : i + count] for i in range(0, len(ordered), count)]


def in_micro_batches(sizes: Sequence[Size], update: int, count: int) -> list[list[Size]]:
    """A sample's rows as updates of so many, and those as micro-batches of `count`."""
    parts = [by_length(sizes[i : i + update], count, lambda size: size) for i in range(0, len(sizes), update)]
    whole = [part for update in parts for part in update if len(part) == count]
    return whole or [part for update in parts for part in update]


def need_of(sizes: Sequence[Size], buckets: Buckets) -> Shape:
    """What a batch needs at least: its longest row and answer, and the vision rows that its images fill."""
    frames = [frame for size in sizes for frame in _frames(size.grids)]
    length = buckets.row_length(max(frames, default=0))
    return Shape(
        prompt=max(size.tokens for size in sizes),
        answer=max(size.answer for size in sizes),
        rows=1 + max((row for row, _ in _pack(frames, length)), default=-1),
        patches=length if frames else 0,
    )


def plan_shapes(batches: Sequence[Sequence[Size]], *, count: int, multiple: int, merge: int, shards: int) -> Buckets:
    """At most `count` shapes, chosen from a sample of batches of one size; for the rest see `Buckets`."""
    largest = max((max(_frames(size.grids), default=0) for batch in batches for size in batch), default=0)
    best = min(
        (_vision_work(batches, Buckets(multiple, merge, shards, patches=int(largest * times))) for times in LENGTHS),
        key=lambda found: found[0],
    )
    buckets, needs = best[1:]
    batch = max(map(len, batches), default=1)
    return plan(buckets, needs, count=count, batch=batch, answer_cost=HEAD_COST)


def _vision_work(batches: Sequence[Sequence[Size]], buckets: Buckets) -> tuple[float, Buckets, list[Shape]]:
    """What vision rows of this length cost: long ones hold little padding, but attention grows with their length."""
    needs = [need_of(batch, buckets) for batch in batches]
    shapes = [buckets.rounded(need) for need in needs]
    return sum(s.rows * s.patches * (1 + s.patches / ATTENTION_PATCHES) for s in shapes), buckets, needs


def collate_prompts(prompts: Sequence[EncodedPrompt], buckets: Buckets) -> Prompts:
    """B questions in the shape that holds them."""
    return pad_prompts(prompts, buckets.fit(need_of([*map(size_of, prompts)], buckets)), buckets)


def collate_pairs(pairs: Sequence[tuple[EncodedPrompt, np.ndarray]], buckets: Buckets):
    """B questions, with the answer to each behind it, in the shape that holds them.

    Returns (prompts, start_B, tokens_BGT, mask_BGT): rows of question and answer, where the answers begin in them, and
    the answers alone, G = 1.
    """
    shape = buckets.fit(need_of([size_of(*pair) for pair in pairs], buckets))
    rows = pad_prompts([_joined(*pair) for pair in pairs], shape, buckets)
    start_B = np.array([len(prompt.tokens_T) for prompt, _ in pairs], np.int32)
    return rows, start_B, *pad_answers([[answer] for _, answer in pairs], shape.answer)


def _joined(prompt: EncodedPrompt, answer: np.ndarray) -> EncodedPrompt:
    """Question and answer as one text."""
    count = len(answer)
    positions = np.broadcast_to(prompt.next_position + np.arange(count, dtype=np.int32), (3, count))
    return prompt.replace(
        tokens_T=np.concatenate([prompt.tokens_T, answer]),
        positions_3T=np.concatenate([prompt.positions_3T, positions], axis=1),
        image_slot_T=np.concatenate([prompt.image_slot_T, np.full(count, -1, np.int32)]),
        next_position=prompt.next_position + count,
    )


def pad_prompts(prompts: Sequence[EncodedPrompt], shape: Shape, buckets: Buckets) -> Prompts:
    """Pads B questions on the right and packs their images. `shape`: at least what `need_of` gives."""
    B, T, R, P, merge = len(prompts), shape.prompt, shape.rows, shape.patches, buckets.merge
    tokens, slots = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    mask, positions = np.zeros((B, T), bool), np.zeros((3, B, T), np.int32)
    first, *others = [prompt.patches_PC for prompt in prompts]
    if any(patches.dtype != first.dtype for patches in others):  # pixels, or normalised already: the dtype says which
        raise ValueError(f"patches of one batch are {sorted({str(p.patches_PC.dtype) for p in prompts})}; expected one")
    patches, hw = np.zeros((R, P, first.shape[1]), first.dtype), np.zeros((R, P, 2), np.int32)
    segments, frames_in_row = np.full((R, P), -1, np.int32), np.zeros(R, np.int32)
    frames = [frame for prompt in prompts for frame in _frames(prompt.grids)]
    spots = iter(_pack(frames, buckets.row_length(max(frames, default=0))))
    for b, prompt in enumerate(prompts):
        n = len(prompt.tokens_T)
        tokens[b, :n], mask[b, :n], positions[:, b, :n] = prompt.tokens_T, True, prompt.positions_3T
        start, features = 0, [np.zeros(0, np.int32)]
        for grid in prompt.grids:
            coordinates = patch_coordinates((1, *grid[1:]), merge)
            for size in _frames([grid]):
                row, offset = next(spots)
                here = slice(offset, offset + size)
                patches[row, here] = prompt.patches_PC[start : start + size]
                hw[row, here] = coordinates
                segments[row, here] = frames_in_row[row]
                frames_in_row[row] += 1
                features.append((row * P + offset) // merge**2 + np.arange(size // merge**2, dtype=np.int32))
                start += size
        is_image_T = prompt.image_slot_T >= 0
        slots[b, :n][is_image_T] = np.concatenate(features)[prompt.image_slot_T[is_image_T]]
    next_position = np.array([prompt.next_position for prompt in prompts], np.int32)
    return Prompts(tokens, mask, positions, slots, next_position, patches, hw, segments)


def pad_answers(answers: Sequence[Sequence[np.ndarray]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads B groups of G token arrays on the right to `length`: (tokens_BGT, mask_BGT)."""
    tokens = np.zeros((len(answers), len(answers[0]), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for b, group in enumerate(answers):
        for g, answer in enumerate(group):
            tokens[b, g, : len(answer)], mask[b, g, : len(answer)] = answer, True
    return tokens, mask


def padding(prompts: Sequence[Prompts], masks_BGT: Sequence[np.ndarray] = ()) -> dict[str, float]:
    """Share of the tokens and of the patches of some batches that is padding."""

    def share(masks: list[np.ndarray]) -> float:
        places = sum(mask.size for mask in masks)
        return 1 - sum(int(mask.sum()) for mask in masks) / places if places else 0.0

    tokens = [batch.mask_BT for batch in prompts] + list(masks_BGT)
    return {"padding/tokens": share(tokens), "padding/patches": share([batch.segment_WP >= 0 for batch in prompts])}


def _frames(grids: Iterable[Grid]) -> list[int]:
    """Patches of each frame: what attention stays inside of."""
    return [h * w for t, h, w in grids for _ in range(t)]


def _pack(sizes: Sequence[int], length: int) -> list[tuple[int, int]]:
    """(row, offset) of each frame: the first row of `length` that has room."""
    used: list[int] = []
    spots = []
    for size in sizes:
        row = next((r for r, u in enumerate(used) if u + size <= length), len(used))
        if row == len(used):
            used.append(0)
        spots.append((row, used[row]))
        used[row] += size
    return spots


def patch_coordinates(grid: Grid, merge: int) -> np.ndarray:
    """(h, w) of each patch of a (t, h, w) grid, in merge order (h/2, w/2, 2, 2); (t*h*w, 2)."""
    t, h, w = grid
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")

    def merged(a):
        return a.reshape(h // merge, merge, w // merge, merge).swapaxes(1, 2).reshape(-1)

    return np.tile(np.stack([merged(rows), merged(columns)], axis=-1), (t, 1))
