"""Punishes long answers softly (DAPO, arXiv 2503.14476, equation 13)."""

from __future__ import annotations


def overlong_penalty(tokens: int, limit: int, window: int) -> float:
    """Returns DAPO's soft overlong punishment of an answer, from 0 to -1.

        0                                    if tokens <= limit - window
        (limit - window - tokens) / window   if limit - window < tokens <= limit
        -1                                   if tokens > limit

    Args:
      limit: L_max of the paper, the maximum length of an answer.
      window: L_cache of the paper, the last tokens before the limit, in which the punishment grows.
    """
    return max(-1.0, min(0.0, (limit - window - tokens) / window))
