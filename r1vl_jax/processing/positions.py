"""M-RoPE positions: three rows (t, h, w) of indices for a prompt of text and image or video blocks.

Flow: data -> processing (here) -> rollout, which continues with `next_position`. Rule: Qwen2-VL, section 2.1 of arXiv
2409.12191. Text counts up alike in all rows. A block of grid (t, h, w) takes its indices over
(t, h/merge_size, w/merge_size), plus the running position. The text after it starts at the block's maximum over all
three rows + 1. transformers 5.23 leaves the t row out of that maximum and so gives positions twice after a video with
t > max(h, w)/merge_size; the published weights were trained with the maximum over all rows, as here.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def mrope_positions(segments: Iterable[int | tuple[int, int, int]], merge_size: int) -> tuple[np.ndarray, int]:
    """Positions of a prompt, given what stands in it, in order.

    Args:
      segments: a number of text tokens, or the (t, h, w) grid, in patches, of an image or a video.
      merge_size: patches on a side of one image token.
    Returns:
      positions_3T (3, T) int32 and the position of the first token that follows.
    Raises: ValueError on a grid that merge_size does not divide.
    """
    blocks = [np.zeros((3, 0), np.int32)]
    position = 0
    for segment in segments:
        if isinstance(segment, tuple):
            t, h, w = segment
            if min(segment) < 1 or h % merge_size or w % merge_size:
                raise ValueError(f"grid (t, h, w) = {segment}; expected h and w as multiples of {merge_size}")
            shape = (t, h // merge_size, w // merge_size)
            blocks.append(np.indices(shape, dtype=np.int32).reshape(3, -1) + position)
            position += max(shape)
        else:
            blocks.append(np.broadcast_to(np.arange(position, position + segment, dtype=np.int32), (3, segment)))
            position += segment
    return np.concatenate(blocks, axis=1), position
