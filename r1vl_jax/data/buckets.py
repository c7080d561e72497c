"""The shapes that batches are padded to: a few, chosen from the data, so that a run compiles few programs.

`plan` starts from the needs of a sample of batches. It merges two of them, those that add the least padding, until as
few are left as were asked for. A batch then gets the cheapest shape that holds it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a padded batch; also the least sizes that a batch needs.

    Attributes:
      prompt, answer: tokens of a prompt (SFT: of prompt and answer, in one row) and of an answer.
      rows, patches: vision rows (W), and patches in each (P).
    """

    prompt: int
    answer: int
    rows: int
    patches: int

    def holds(self, need: Shape) -> bool:
        """Whether no size is smaller than that of `need`."""
        return all(a >= b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(need), strict=True))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes to choose from, cheapest first.

    Attributes:
      multiple: the numbers of tokens and of patches are multiples of it.
      merge: patches on a side of one image token.
      shards: the number of vision rows is a multiple of it.
      patches: the least length of a vision row; a batch with a larger frame has longer ones.
    """

    multiple: int
    merge: int = 2
    shards: int = 1
    patches: int = 1
    shapes: tuple[Shape, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{s.prompt} tokens with {s.rows} x {s.patches} patches" for s in self.shapes)

    def rounded(self, need: Shape) -> Shape:
        """`need` with each size rounded up by `bucket`: the shape where none are planned."""
        sizes = zip(dataclasses.astuple(need), self._multiples, strict=True)
        return Shape(*(bucket(size, multiple) for size, multiple in sizes))

    def fit(self, need: Shape) -> Shape:
        """The shape for a batch that needs `need`: the cheapest planned one that holds it.

        Where none does, sizes of the largest shape that are too small grow by quarters until they hold it. Batches
        that were not planned for then have few different shapes too.
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
        """The length of a vision row, in patches, for a batch whose largest frame has so many patches."""
        return bucket(max(self.patches, largest_frame), self._multiples[3])

    @property
    def _multiples(self) -> tuple[int, int, int, int]:
        """For each size of a Shape, what it is a multiple of."""
        return self.multiple, self.multiple, self.shards, math.lcm(self.multiple, self.merge**2)


def _grown(size: int, least: int, multiple: int) -> int:
    """`size` grown by quarters, to multiples, until it is at least `least`."""
    while size < least:
        size = max(multiple, -(-size * 5 // 4 // multiple) * multiple)
    return size


def bucket(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple, and further to one of at most eight sizes an octave: less than 1/8 is added."""
    units = -(-count // multiple)
    coarse = 1 << max(0, units.bit_length() - 4)
    return -(-units // coarse) * coarse * multiple


def plan(
    buckets: Buckets, needs: Sequence[Shape], *, count: int, batch: int, answer_cost: float, patch_cost: float = 0.5
) -> Buckets:
    """`buckets` with at most `count` shapes, chosen so that each of `needs` is held by one of them.

    Args:
      needs: the needs of a sample of batches, all with vision rows of one length.
      batch: prompts in a batch.
      answer_cost, patch_cost: work of an answer's token and of a patch (Qwen2-VL-2B: 0.665 / 1.31) over that of a
        prompt's token.
    """
    if not needs:
        return buckets

    def cost(sizes: np.ndarray) -> np.ndarray:
        prompt, answer, rows, patches = np.moveaxis(sizes, -1, 0)
        return batch * (prompt + answer_cost * answer) + patch_cost * rows * patches

    rounded = [dataclasses.astuple(buckets.rounded(need)) for need in needs]
    sizes, uses = np.unique(rounded, axis=0, return_counts=True)
    while len(sizes) > count:
        both = np.maximum(sizes[:, None], sizes[None])  # the shape that holds both of each pair
        added = uses[:, None] * (cost(both) - cost(sizes)[:, None])
        added = added + added.T
        added[np.tril_indices(len(sizes))] = np.inf  # each pair once, and no shape with itself
        a, b = np.unravel_index(np.argmin(added), added.shape)
        sizes[a], uses[a] = both[a, b], uses[a] + uses[b]
        sizes, uses = np.delete(sizes, b, axis=0), np.delete(uses, b)
    order = np.argsort(cost(sizes), kind="stable")
    return dataclasses.replace(buckets, shapes=tuple(Shape(*map(int, sizes[i])) for i in order))
