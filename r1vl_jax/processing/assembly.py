"""Builds an `EncodedPrompt` from the expanded tokens of a question: adds image slots and M-RoPE positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from r1vl_jax.processing.images import ImageSpec
from r1vl_jax.processing.positions import mrope_positions
from r1vl_jax.types import EncodedPrompt

Grid = tuple[int, int, int]


def assemble(
    tokens_T: np.ndarray,
    is_image_T: np.ndarray,
    grids: tuple[Grid, ...],
    patches: Sequence[np.ndarray],
    spec: ImageSpec,
) -> EncodedPrompt:
    """Returns the prompt.

    Args:
      tokens_T: int32 tokens, with as many placeholders for an image as it has features.
      is_image_T: True for the placeholders of images and videos.
      grids: (t, h, w) of each image or video, in patches.
      patches: one array (P, C) per image or video.
    """
    slot_T = np.where(is_image_T, np.cumsum(is_image_T) - 1, -1).astype(np.int32)
    segments: list[int | Grid] = []
    end, slot = 0, 0  # end of the last segment; slot of the next image's first token
    for grid in grids:
        start = int(np.flatnonzero(slot_T == slot)[0])
        size = math.prod(grid) // spec.merge_size**2
        segments += [start - end, grid]
        end, slot = start + size, slot + size
    segments.append(len(tokens_T) - end)
    positions_3T, next_position = mrope_positions(segments, spec.merge_size)
    width = 3 * spec.temporal_patch_size * spec.patch_size**2
    return EncodedPrompt(
        tokens_T=tokens_T.astype(np.int32),
        positions_3T=positions_3T,
        image_slot_T=slot_T,
        patches_PC=np.concatenate([np.zeros((0, width), np.uint8), *patches]),
        grids=grids,
        next_position=next_position,
    )
