"""Pads encoded questions and answers to one batch, and packs their images into vision rows.

A vision row is a sequence of patches with room for several frames. Attention in the vision tower stays inside a frame,
so frames of different images can share a row, and the frames of one video can be in different rows. A batch without
images has no vision rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from r1vl_jax.data.buckets import Buckets, Shape, plan
from r1vl_jax.types import EncodedPrompt, Prompts

Grid = tuple[int, int, int]  # (t, h, w) in patches
Row = TypeVar("Row")
PLANNED_ROWS = 512  # the shapes of a stage's batches are planned from its first rows
LENGTHS = (1, 1.25, 1.5, 2, 3, 4)  # lengths of a vision row that `plan_shapes` tries, in units of the largest frame
HEAD_COST = 0.2  # work per token: loss head / all other layers; Qwen2-VL-2B: 0.233 / 1.31
ATTENTION_PATCHES = 7680  # row length at which attention costs as much as the other layers: 6 * tower width 1280


class Size(NamedTuple):
    """The size of one example.

    Attributes:
      tokens: number of tokens of the prompt. In SFT the prompt and the answer share a row, and the answer's tokens are
        included.
      answer: number of tokens of the answer; 0 if there is no answer.
      grids: (t, h, w) in patches of each image and video.
    """

    tokens: int
    answer: int
    grids: tuple[Grid, ...]


def size_of(prompt: EncodedPrompt, answer: Sequence[int] | np.ndarray = ()) -> Size:
    """Returns the size of a question alone, or of a question followed by its answer in the same row."""
    return Size(len(prompt.tokens_T) + len(answer), len(answer), prompt.grids)


def by_length(rows: Iterable[Row], count: int, size: Callable[[Row], Size]) -> list[list[Row]]:
    """Sorts rows by length, which keeps padding small, and cuts them into batches of `count` (or fewer in the last)."""
    ordered = sorted(rows, key=lambda row: size(row).tokens)
    return [ordered[i : i + count] for i in range(0, len(ordered), count)]


def in_micro_batches(sizes: Sequence[Size], update: int, count: int) -> list[list[Size]]:
    """Groups the sizes of rows into micro-batches as training does.

    Every `update` consecutive rows are sorted by length and cut into micro-batches of `count` rows. Smaller
    micro-batches are left out, unless all are smaller.
    """
    parts = [by_length(sizes[i : i + update], count, lambda size: size) for i in range(0, len(sizes), update)]
    full = [part for update in parts for part in update if len(part) == count]
    return full or [part for update in parts for part in update]


def need_of(sizes: Sequence[Size], buckets: Buckets) -> Shape:
    """Returns the smallest shape that holds a batch: its longest prompt, its longest answer and all of its images."""
    frames = [frame for size in sizes for frame in _frames(size.grids)]
    length = buckets.row_length(max(frames, default=0))
    return Shape(
        prompt=max(size.tokens for size in sizes),
        answer=max(size.answer for size in sizes),
        rows=1 + max((row for row, _ in _pack(frames, length)), default=-1),
        patches=length if frames else 0,
    )


def plan_shapes(batches: Sequence[Sequence[Size]], *, count: int, multiple: int, merge: int, shards: int) -> Buckets:
    """Chooses at most `count` shapes for a sample of batches. `multiple`, `merge`, `shards`: see `Buckets`."""
    largest = max((max(_frames(size.grids), default=0) for batch in batches for size in batch), default=0)
    costs = (_vision_cost(batches, Buckets(multiple, merge, shards, patches=int(largest * times))) for times in LENGTHS)
    _, buckets, needs = min(costs, key=lambda item: item[0])
    batch = max(map(len, batches), default=1)
    return plan(buckets, needs, count=count, batch=batch, answer_cost=HEAD_COST)


def _vision_cost(batches: Sequence[Sequence[Size]], buckets: Buckets) -> tuple[float, Buckets, list[Shape]]:
    """Estimates the vision tower's work for the batches. Returns (work, `buckets`, the needed shape of each batch).

    Longer vision rows have less padding, but the cost of attention grows with their length.
    """
    needs = [need_of(batch, buckets) for batch in batches]
    shapes = [buckets.rounded(need) for need in needs]
    return sum(s.rows * s.patches * (1 + s.patches / ATTENTION_PATCHES) for s in shapes), buckets, needs


def collate_prompts(prompts: Sequence[EncodedPrompt], buckets: Buckets) -> Prompts:
    """Pads B questions to one batch. `buckets` determines the shape of the batch."""
    return pad_prompts(prompts, buckets.fit(need_of([*map(size_of, prompts)], buckets)), buckets)


def collate_pairs(
    pairs: Sequence[tuple[EncodedPrompt, np.ndarray]], buckets: Buckets
) -> tuple[Prompts, np.ndarray, np.ndarray, np.ndarray]:
    """Pads B (question, answer) pairs to one batch. Each row is a question followed by its answer.

    `buckets` determines the shape of the batch.

    Returns: (prompts, start_B, tokens_BGT, mask_BGT). `prompts` has the rows, start_B the index in each row of the
      answer's first token. tokens_BGT and mask_BGT are the answers alone, with G = 1.
    """
    shape = buckets.fit(need_of([size_of(*pair) for pair in pairs], buckets))
    rows = pad_prompts([_joined(*pair) for pair in pairs], shape, buckets)
    start_B = np.array([len(prompt.tokens_T) for prompt, _ in pairs], np.int32)
    return rows, start_B, *pad_answers([[answer] for _, answer in pairs], shape.answer)


def _joined(prompt: EncodedPrompt, answer_T: np.ndarray) -> EncodedPrompt:
    """Appends an answer to a question: tokens, positions and image slots."""
    T = len(answer_T)
    positions_3T = np.broadcast_to(prompt.next_position + np.arange(T, dtype=np.int32), (3, T))
    return dataclasses.replace(
        prompt,
        tokens_T=np.concatenate([prompt.tokens_T, answer_T]),
        positions_3T=np.concatenate([prompt.positions_3T, positions_3T], axis=1),
        image_slot_T=np.concatenate([prompt.image_slot_T, np.full(T, -1, np.int32)]),
        next_position=prompt.next_position + T,
    )


def pad_prompts(prompts: Sequence[EncodedPrompt], shape: Shape, buckets: Buckets) -> Prompts:
    """Pads B questions on the right and packs their images into vision rows.

    Args:
      shape: sizes of the batch; each is at least that of `need_of` for these questions.
    Raises: ValueError if some prompts have pixels (uint8) and others normalised patches (floats).
    """
    B, T, W, P, merge = len(prompts), shape.prompt, shape.rows, shape.patches, buckets.merge
    tokens_BT, image_slot_BT = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    mask_BT, positions_3BT = np.zeros((B, T), bool), np.zeros((3, B, T), np.int32)
    first, *others = [prompt.patches_PC for prompt in prompts]
    if any(patches_PC.dtype != first.dtype for patches_PC in others):
        raise ValueError(f"patches of one batch are {sorted({str(p.patches_PC.dtype) for p in prompts})}; expected one")
    patches_WPC, patch_hw_WP2 = np.zeros((W, P, first.shape[1]), first.dtype), np.zeros((W, P, 2), np.int32)
    segment_WP, frames_W = np.full((W, P), -1, np.int32), np.zeros(W, np.int32)  # frames_W: frames in each vision row
    frames = [frame for prompt in prompts for frame in _frames(prompt.grids)]
    places = iter(_pack(frames, buckets.row_length(max(frames, default=0))))
    for b, prompt in enumerate(prompts):
        n = len(prompt.tokens_T)
        tokens_BT[b, :n], mask_BT[b, :n], positions_3BT[:, b, :n] = prompt.tokens_T, True, prompt.positions_3T
        start, slots = 0, [np.zeros(0, np.int32)]  # slots: indices of this prompt's features among the batch's
        for grid in prompt.grids:
            coordinates_P2 = patch_coordinates((1, *grid[1:]), merge)
            for size in _frames([grid]):
                row, offset = next(places)
                here = slice(offset, offset + size)
                patches_WPC[row, here] = prompt.patches_PC[start : start + size]
                patch_hw_WP2[row, here] = coordinates_P2
                segment_WP[row, here] = frames_W[row]
                frames_W[row] += 1
                slots.append((row * P + offset) // merge**2 + np.arange(size // merge**2, dtype=np.int32))
                start += size
        is_image_T = prompt.image_slot_T >= 0
        image_slot_BT[b, :n][is_image_T] = np.concatenate(slots)[prompt.image_slot_T[is_image_T]]
    next_position_B = np.array([prompt.next_position for prompt in prompts], np.int32)
    # The fields are annotated as jax arrays: the NumPy arrays become jax arrays when the batch is put on the device.
    return Prompts(
        tokens_BT, mask_BT, positions_3BT, image_slot_BT, next_position_B, patches_WPC, patch_hw_WP2, segment_WP
    )


def blank_prompts(count: int, shape: Shape, patch_dim: int) -> Prompts:
    """Returns a batch of `count` prompts in which all places of `shape` are used, by zeros.

    Args:
      patch_dim: the number of values of a patch.
    """
    B, T, W, P = count, shape.prompt, shape.rows, shape.patches
    return Prompts(
        tokens_BT=np.zeros((B, T), np.int32),
        mask_BT=np.ones((B, T), bool),
        positions_3BT=np.zeros((3, B, T), np.int32),
        image_slot_BT=np.full((B, T), -1, np.int32),
        next_position_B=np.full(B, T, np.int32),
        patches_WPC=np.zeros((W, P, patch_dim), np.uint8),
        patch_hw_WP2=np.zeros((W, P, 2), np.int32),
        segment_WP=np.zeros((W, P), np.int32),
    )


def pad_answers(answers: Sequence[Sequence[np.ndarray]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads B groups of G answers on the right to `length` tokens. Returns (tokens_BGT, mask_BGT)."""
    tokens_BGT = np.zeros((len(answers), len(answers[0]), length), np.int32)
    mask_BGT = np.zeros(tokens_BGT.shape, bool)
    for b, group in enumerate(answers):
        for g, answer_T in enumerate(group):
            tokens_BGT[b, g, : len(answer_T)], mask_BGT[b, g, : len(answer_T)] = answer_T, True
    return tokens_BGT, mask_BGT


def padding(prompts: Sequence[Prompts], masks_BGT: Sequence[np.ndarray] = ()) -> dict[str, float]:
    """Returns the share of padding among the tokens ("padding/tokens") and among the patches ("padding/patches").

    Args:
      prompts: the batches.
      masks_BGT: masks of answers that are not in the rows of `prompts`; True at the tokens of an answer.
    """

    def share(masks: list[np.ndarray]) -> float:
        places = sum(mask.size for mask in masks)
        return 1 - sum(int(mask.sum()) for mask in masks) / places if places else 0.0

    tokens = [np.asarray(batch.mask_BT) for batch in prompts] + list(masks_BGT)
    patches = [np.asarray(batch.segment_WP) >= 0 for batch in prompts]
    return {"padding/tokens": share(tokens), "padding/patches": share(patches)}


def _frames(grids: Iterable[Grid]) -> list[int]:
    """Returns the number of patches of each frame of all grids."""
    return [h * w for t, h, w in grids for _ in range(t)]


def _pack(sizes: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Assigns frames to vision rows of `length` patches: each frame to the first row that has room for it.

    Returns: (vision row, offset in the row) of each frame.
    """
    used: list[int] = []
    places = []
    for size in sizes:
        row = next((r for r, u in enumerate(used) if u + size <= length), len(used))
        if row == len(used):
            used.append(0)
        places.append((row, used[row]))
        used[row] += size
    return places


def patch_coordinates(grid: Grid, merge: int) -> np.ndarray:
    """Returns (h, w) of each patch of a (t, h, w) grid, shape (t*h*w, 2).

    Patches are in the order (t, h/merge, w/merge, merge, merge).
    """
    t, h, w = grid
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")

    def merged(index_hw: np.ndarray) -> np.ndarray:
        return index_hw.reshape(h // merge, merge, w // merge, merge).swapaxes(1, 2).reshape(-1)

    return np.tile(np.stack([merged(rows), merged(columns)], axis=-1), (t, 1))
