"""Chooses a few shapes to which batches are padded. With few shapes, a run compiles few programs.

`plan` starts with the shapes that a sample of batches needs. Again and again it merges the two shapes whose merging
adds the least padding, until at most the requested number is left. Each batch is then padded to the cheapest shape that
holds it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a padded batch, or the minimum sizes that a batch needs.

    Attributes:
      prompt: tokens per row. In SFT a row is a prompt followed by its answer.
      answer: tokens per answer.
      rows: number of vision rows (W).
      patches: patches per vision row (P).
    """

    prompt: int
    answer: int
    rows: int
    patches: int

    def holds(self, need: Shape) -> bool:
        """Returns whether each size is at least the same size of `need`."""
        return all(a >= b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(need), strict=True))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes to which batches are padded, and the rules by which sizes are rounded.

    Attributes:
      multiple: numbers of tokens and of patches are rounded up to multiples of this number.
      merge: patches along each side of one image token.
      shards: the number of vision rows is rounded up to a multiple of this number.
      patches: minimum number of patches of a vision row. A batch with a larger frame gets longer vision rows.
      shapes: the planned shapes, cheapest first; empty if none are planned.
    """

    multiple: int
    merge: int = 2
    shards: int = 1
    patches: int = 1
    shapes: tuple[Shape, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{s.prompt} tokens with {s.rows} x {s.patches} patches" for s in self.shapes)

    def rounded(self, need: Shape) -> Shape:
        """Returns `need` with each size rounded up by `bucket`. This is the batch's shape if no shapes are planned."""
        sizes = zip(dataclasses.astuple(need), self._multiples, strict=True)
        return Shape(*(bucket(size, multiple) for size, multiple in sizes))

    def fit(self, need: Shape) -> Shape:
        """Returns the cheapest planned shape that is at least `need` in every size.

        If there is none, starts from the largest planned value of each size and enlarges each value that is too small,
        again and again by a quarter, until it is enough. So unplanned batches have few different shapes, too.
        """
        if not self.shapes:
            return self.rounded(need)
        holding = next((shape for shape in self.shapes if shape.holds(need)), None)
        if holding is not None:
            return holding
        largest = np.max([dataclasses.astuple(shape) for shape in self.shapes], axis=0)
        sizes = zip(dataclasses.astuple(need), largest.tolist(), self._multiples, strict=True)
        return Shape(*(_grown(size, least, multiple) for least, size, multiple in sizes))

    def row_length(self, largest_frame: int) -> int:
        """Returns the patches per vision row, for a batch whose largest frame has `largest_frame` patches."""
        return bucket(max(self.patches, largest_frame), self._multiples[3])

    @property
    def _multiples(self) -> tuple[int, int, int, int]:
        """For each size of a Shape, the number of which the size must be a multiple."""
        return self.multiple, self.multiple, self.shards, math.lcm(self.multiple, self.merge**2)


def _grown(size: int, least: int, multiple: int) -> int:
    """Grows `size` by quarters, rounded up to multiples, until it is at least `least`."""
    while size < least:
        size = max(multiple, -(-size * 5 // 4 // multiple) * multiple)
    return size


def bucket(count: int, multiple: int) -> int:
    """Rounds `count` up to a multiple, then to one of at most eight sizes per doubling, which adds less than 1/8."""
    units = -(-count // multiple)
    coarse = 1 << max(0, units.bit_length() - 4)
    return -(-units // coarse) * coarse * multiple


def plan(
    buckets: Buckets, needs: Sequence[Shape], *, count: int, batch: int, answer_cost: float, patch_cost: float = 0.5
) -> Buckets:
    """Returns `buckets` with at most `count` shapes, such that each of `needs` fits into one of them.

    Args:
      needs: the minimum shapes of a sample of batches, all with vision rows of the same length.
      batch: number of prompts in a batch.
      answer_cost, patch_cost: work per answer token and per patch, relative to the work per prompt token (Qwen2-VL-2B:
        0.665 / 1.31 for a patch).
    """
    if not needs:
        return buckets

    def cost(sizes: np.ndarray) -> np.ndarray:
        prompt, answer, rows, patches = np.moveaxis(sizes, -1, 0)
        return batch * (prompt + answer_cost * answer) + patch_cost * rows * patches

    rounded = [dataclasses.astuple(buckets.rounded(need)) for need in needs]
    sizes, uses = np.unique(rounded, axis=0, return_counts=True)
    while len(sizes) > count:
        both = np.maximum(sizes[:, None], sizes[None])  # for each pair, the smallest shape that holds both
        added = uses[:, None] * (cost(both) - cost(sizes)[:, None])
        added = added + added.T
        added[np.tril_indices(len(sizes))] = np.inf  # each pair once, and no shape with itself
        a, b = np.unravel_index(np.argmin(added), added.shape)
        sizes[a], uses[a] = both[a, b], uses[a] + uses[b]
        sizes, uses = np.delete(sizes, b, axis=0), np.delete(uses, b)
    order = np.argsort(cost(sizes), kind="stable")
    return dataclasses.replace(buckets, shapes=tuple(Shape(*map(int, sizes[i])) for i in order))
