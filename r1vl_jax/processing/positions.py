"""Computes M-RoPE positions: three rows (t, h, w) of indices for a prompt of text, images and videos.

Flow: data -> processing (here) -> rollout, whose answers start at `next_position`. The rule is in section 2.1 of
Qwen2-VL (arXiv 2409.12191):

- A text token has the running position in all three rows.
- A token of an image or a video has the running position plus its index (t, h, w) in the block of tokens.
- The text after a block starts at the block's maximum over all three rows + 1.

transformers 5.23 leaves the t row out of that maximum, so positions repeat after a video with t > max(h, w)/merge_size.
The published weights were trained with the maximum over all rows, and so is the maximum here.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def mrope_positions(segments: Iterable[int | tuple[int, int, int]], merge_size: int) -> tuple[np.ndarray, int]:
    """Returns the positions of a prompt.

    Args:
      segments: parts of the prompt in order. A part is a number of text tokens, or the (t, h, w) grid in patches of an
        image or a video.
      merge_size: patches along each side of one image token.
    Returns: positions_3T (3, T) int32, and the position of the first token after the prompt.
    Raises: ValueError if h or w is not a multiple of merge_size.
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
