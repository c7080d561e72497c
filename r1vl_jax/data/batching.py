"""From rows to padded batches: an endless shuffled stream, and the collation of encoded questions.

Lengths are padded to buckets, so that a run compiles a handful of programs. Images are packed: several small ones
share a vision row, and where a batch has none there are no rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from r1vl_jax.types import EncodedPrompt, Example, Prompts, RowError


@dataclasses.dataclass
class ExampleStream:
    """Rows in an order fixed by (seed, epoch), over and over; rows that cannot be used are dropped and named once.

    `position` fixes what comes next: a stream set to the same position goes on with the same rows. `dropped` holds the
    names of the rows dropped so far.
    """

    examples: list[Example]
    seed: int
    position: int = 0
    dropped: set[str] = dataclasses.field(default_factory=set)
    on_drop: Callable[[RowError], None] = lambda error: None

    def take(self, count: int, encode: Callable[[Example], Any]) -> list[tuple[Example, Any]]:
        """The next `count` rows that `encode` accepts, with what it made of them.

        Raises RowError where a whole epoch has none.
        """
        taken, failures = [], 0
        while len(taken) < count:
            if failures >= 2 * len(self.examples) - 1:  # in a row, wherever an epoch starts: a whole one is among them
                raise RowError(f"no usable row among the {len(self.examples)} that were read; see the messages above")
            epoch, place = divmod(self.position, len(self.examples))
            example = self.examples[_order(self.seed, epoch, len(self.examples))[place]]
            self.position += 1
            try:
                taken.append((example, encode(example)))
                failures = 0
            except RowError as error:
                failures += 1
                if example.name not in self.dropped:
                    self.dropped.add(example.name)
                    self.on_drop(error)
        return taken


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def bucket(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple, and then so that an octave has at most eight sizes (waste below 1/8)."""
    units = -(-count // multiple)
    coarse = 1 << max(0, units.bit_length() - 4)
    return -(-units // coarse) * coarse * multiple


def collate_prompts(encoded: list[EncodedPrompt], *, pad_multiple: int, shards: int = 1, merge: int = 2) -> Prompts:
    """Pads questions on the right and packs their images.

    Args:
      encoded: B questions; B must be a multiple of `shards`.
      pad_multiple: lengths are multiples of it (patches of 4 times as many).
      shards: the number of vision rows is a multiple of it.
      merge: side of the square of patches that makes one image token.
    """
    B, T = len(encoded), bucket(max(len(e.tokens_T) for e in encoded), pad_multiple)
    tokens, slots = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    mask, positions = np.zeros((B, T), bool), np.zeros((3, B, T), np.int32)
    patches, hw, segments, places = _pack_images(encoded, pad_multiple, shards, merge)
    for b, e in enumerate(encoded):
        n = len(e.tokens_T)
        tokens[b, :n], mask[b, :n], positions[:, b, :n] = e.tokens_T, True, e.positions_3T
        if places[b].size:
            slots[b, :n] = np.where(e.image_slot_T >= 0, places[b][np.maximum(e.image_slot_T, 0)], -1)
    next_position = np.array([e.next_position for e in encoded], np.int32)
    return Prompts(tokens, mask, positions, slots, next_position, patches, hw, segments)


def _pack_images(encoded: list[EncodedPrompt], pad_multiple: int, shards: int, merge: int):
    """First-fit packing into rows as long as the largest image.

    Returns patches_RPC, hw_RP2, segment_RP and, for each question, the flat feature index of each of its image tokens.
    """
    grids = [grid for e in encoded for grid in e.grids]
    width = encoded[0].patches_PC.shape[1]
    if not grids:
        empty = np.zeros((0, merge**2), np.int32)
        return (
            np.zeros((0, merge**2, width), np.float32),
            np.zeros((0, merge**2, 2), np.int32),
            empty,
            [empty] * len(encoded),
        )
    P = bucket(max(map(_patches, grids)), pad_multiple * merge**2)
    used: list[int] = []
    spots = []
    for grid in grids:
        size = _patches(grid)
        row = next((r for r, u in enumerate(used) if u + size <= P), len(used))
        if row == len(used):
            used.append(0)
        spots.append((row, used[row]))
        used[row] += size
    R = bucket(len(used), shards)
    patches, hw = np.zeros((R, P, width), np.float32), np.zeros((R, P, 2), np.int32)
    segments, frames = np.full((R, P), -1, np.int32), np.zeros(R, np.int32)
    places, image = [], iter(spots)
    for e in encoded:
        start, own = 0, [np.zeros(0, np.int32)]
        for grid in e.grids:
            row, offset = next(image)
            size = _patches(grid)
            here = slice(offset, offset + size)
            patches[row, here] = e.patches_PC[start : start + size]
            hw[row, here] = patch_coordinates(grid, merge)
            segments[row, here] = frames[row] + np.arange(size) // (grid[1] * grid[2])
            frames[row] += grid[0]
            own.append((row * P + offset) // merge**2 + np.arange(size // merge**2, dtype=np.int32))
            start += size
        places.append(np.concatenate(own))
    return patches, hw, segments, places


def _patches(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2]


def patch_coordinates(grid: tuple[int, int, int], merge: int) -> np.ndarray:
    """(h, w) of each patch of a (t, h, w) grid, in merge order (h/2, w/2, 2, 2); (t*h*w, 2)."""
    t, h, w = grid
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")

    def merged(a):
        return a.reshape(h // merge, merge, w // merge, merge).swapaxes(1, 2).reshape(-1)

    return np.tile(np.stack([merged(rows), merged(columns)], axis=-1), (t, 1))


def collate_answers(answers: list[list[np.ndarray]], *, pad_multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads B groups of G token arrays on the right: (tokens_BGT, mask_BGT)."""
    T = bucket(max(len(answer) for group in answers for answer in group), pad_multiple)
    tokens = np.zeros((len(answers), len(answers[0]), T), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for b, group in enumerate(answers):
        for g, answer in enumerate(group):
            tokens[b, g, : len(answer)], mask[b, g, : len(answer)] = answer, True
    return tokens, mask
