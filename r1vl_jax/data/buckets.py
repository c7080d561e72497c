"""The shapes that batches are padded to: few, so that a run compiles a handful of programs, and chosen from the data.

`plan` looks at what a sample of batches needs and merges these needs, two by two, where that adds the least padding,
until as few are left as were asked for. A batch then gets the cheapest shape that holds it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a padded batch. Also what a batch needs at least.

    Attributes:
      prompt, answer: tokens of a prompt (SFT: with its answer, in one row) and of an answer.
      rows, patches: vision rows, and patches in each.
    """

    prompt: int
    answer: int
    rows: int
    patches: int

    def holds(self, need: Shape) -> bool:
        return all(a >= b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(need), strict=True))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Shapes to choose from, the cheapest first.

    Attributes:
      multiple: counts of tokens and patches are multiples of it.
      merge: side of the square of patches that makes one image token.
      shards: vision rows are a multiple of it.
      patches: the least length of a vision row; longer ones are used where a frame is larger.
    """

    multiple: int
    merge: int = 2
    shards: int = 1
    patches: int = 1
    shapes: tuple[Shape, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{s.prompt} tokens with {s.rows} x {s.patches} patches" for s in self.shapes)

    def rounded(self, need: Shape) -> Shape:
        """The shape that `need` has where there is no plan."""
        sizes = zip(dataclasses.astuple(need), self._multiples, strict=True)
        return Shape(*(bucket(size, multiple) for size, multiple in sizes))

    def fit(self, need: Shape) -> Shape:
        """The shape for a batch that needs `need`.

        What no shape holds gets the largest one with every size that is too small grown by quarters, until it holds it:
        over a whole run, batches that the plan did not foresee make few shapes too.
        """
        if not self.shapes:
            return self.rounded(need)
        held = next((shape for shape in self.shapes if shape.holds(need)), None)
        if held is not None:
            return held
        largest = np.max([dataclasses.astuple(shape) for shape in self.shapes], axis=0)
        sizes = zip(dataclasses.astuple(need), largest.tolist(), self._multiples, strict=True)
        return Shape(*(_grown(size, need, multiple) for need, size, multiple in sizes))

    def row_length(self, largest_frame: int) -> int:
        """Patches that a vision row is filled with."""
        return bucket(max(self.patches, largest_frame), self._multiples[3])

    @property
    def _multiples(self) -> tuple[int, int, int, int]:
        return self.multiple, self.multiple, self.shards, math.lcm(self.multiple, self.merge**2)


def _grown(size: int, need: int, multiple: int) -> int:
    while size < need:
        size = max(multiple, -(-size * 5 // 4 // multiple) * multiple)
    return size


def bucket(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple, and then so that an octave has at most eight sizes (waste below 1/8)."""
    units = -(-count // multiple)
    coarse = 1 << max(0, units.bit_length() - 4)
    return -(-units // coarse) * coarse * multiple


def plan(
    buckets: Buckets, needs: Sequence[Shape], *, count: int, batch: int, answer_cost: float, patch_cost: float = 0.5
) -> Buckets:
    """`buckets` with at most `count` shapes, which together hold each of `needs`.

    Args:
      needs: what batches of a sample need, all with vision rows of one length.
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
        both = np.maximum(sizes[:, None], sizes[None])  # each pair as one shape
        added = uses[:, None] * (cost(both) - cost(sizes)[:, None])
        added = added + added.T
        added[np.tril_indices(len(sizes))] = np.inf
        a, b = np.unravel_index(np.argmin(added), added.shape)
        sizes[a], uses[a] = both[a, b], uses[a] + uses[b]
        sizes, uses = np.delete(sizes, b, axis=0), np.delete(uses, b)
    order = np.argsort(cost(sizes), kind="stable")
    return dataclasses.replace(buckets, shapes=tuple(Shape(*map(int, sizes[i])) for i in order))
