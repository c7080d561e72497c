"""Group-relative advantages (R1-VL, section 3.3; GRPO): each answer against the other answers to its question."""

from __future__ import annotations

import numpy as np

STD_EPS = 1e-4


def group_advantages(rewards_BG: np.ndarray, eps: float = STD_EPS) -> np.ndarray:
    """A^i = (r^i - mean_j r^j) / (std_j r^j + eps), std with ddof = 1; one answer alone gets 0.

    Args:
      rewards_BG: rewards of G answers to each of B questions.
    Returns:
      float32 advantages (B, G).
    """
    rewards_BG = np.asarray(rewards_BG, np.float64)
    centred = rewards_BG - rewards_BG.mean(axis=1, keepdims=True)
    if rewards_BG.shape[1] == 1:
        return np.zeros_like(rewards_BG, np.float32)
    return (centred / (rewards_BG.std(axis=1, ddof=1, keepdims=True) + eps)).astype(np.float32)


def zero_variance(rewards_BG: np.ndarray) -> np.ndarray:
    """True for groups whose rewards are all equal: they teach nothing. Shape (B,)."""
    rewards_BG = np.asarray(rewards_BG)
    return np.ptp(rewards_BG, axis=1) < 1e-9
