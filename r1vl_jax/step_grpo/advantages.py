"""Group-relative advantages (R1-VL, section 3.3; GRPO): each answer against the other answers to its question.

Rewards come by step: rewards_BGK holds what answer g to question b earns in its step k, and mask_BGK is True where it
has such a step. The advantage of step k is that of the reward to go, over the group's answers that have a step k:

    R_k = sum_{j >= k} r_j          A_k = (R_k - mean R_k) / (std R_k + 1e-4),   std with ddof = 1

With one step for each answer this is the paper's advantage (`advantage: trajectory`).
"""

from __future__ import annotations

import numpy as np

STD_EPS = 1e-4
EQUAL = 1e-9  # rewards are sums of a few numbers: those that lie closer are equal


def gate_rewards(outcome_BGK: np.ndarray, shaping_BGK: np.ndarray, correct_BG: np.ndarray, gate: str) -> np.ndarray:
    """Rewards (B, G, K): the outcome's, and the step rewards (key steps, validity) where the gate lets them count.

    Args:
      correct_BG: True where the final answer is right.
      gate: none: always; mixed: in groups that have right and wrong answers; correct: for right answers.
    """
    if gate == "mixed":
        opened = (correct_BG.any(axis=1) & ~correct_BG.all(axis=1))[:, None, None]
    elif gate == "correct":
        opened = correct_BG[:, :, None]
    else:
        opened = True
    return outcome_BGK + np.where(opened, shaping_BGK, 0.0)


def step_advantages(
    rewards_BGK: np.ndarray, mask_BGK: np.ndarray, *, scale: str = "std", std_floor: float = 0.1, eps: float = STD_EPS
) -> np.ndarray:
    """float32 advantages (B, G, K), 0 where mask_BGK is False.

    Args:
      scale: std: divided by the group's standard deviation; none: not divided (Dr. GRPO); floor: by the standard
        deviation or std_floor, whichever is larger.
    A step that one answer alone has, and one whose returns are equal, give 0.
    """
    rewards_BGK = np.where(mask_BGK, rewards_BGK, 0.0)
    returns = np.flip(np.cumsum(np.flip(rewards_BGK, axis=-1), axis=-1), axis=-1)
    count = mask_BGK.sum(axis=1, keepdims=True)
    mean = np.where(mask_BGK, returns, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(mask_BGK, returns - mean, 0.0)
    centred = np.where(np.abs(centred).max(axis=1, keepdims=True) < EQUAL, 0.0, centred)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    if scale == "none":
        return centred.astype(np.float32)
    return (centred / ((np.maximum(std, std_floor) if scale == "floor" else std) + eps)).astype(np.float32)


def group_advantages(rewards_BG: np.ndarray, **options) -> np.ndarray:
    """A^i = (r^i - mean_j r^j) / (std_j r^j + 1e-4), std with ddof = 1; float32 (B, G). Options as above."""
    rewards_BGK = np.asarray(rewards_BG, np.float64)[:, :, None]
    return step_advantages(rewards_BGK, np.ones(rewards_BGK.shape, bool), **options)[:, :, 0]


def token_advantages(advantages_BGK: np.ndarray, step_BGT: np.ndarray) -> np.ndarray:
    """Each token's advantage (B, G, T): that of the step it stands in, step_BGT counting from 0."""
    return np.take_along_axis(advantages_BGK, step_BGT, axis=2)


def teaches(advantages_BGK: np.ndarray) -> np.ndarray:
    """True for groups of which some answer is better than another. Shape (B,)."""
    return advantages_BGK.any(axis=(1, 2))


def shaped_only(outcome_BGK: np.ndarray, advantages_BGK: np.ndarray) -> np.ndarray:
    """True for groups that teach although their outcomes are equal: step rewards alone drive them. Shape (B,)."""
    return teaches(advantages_BGK) & (np.ptp(outcome_BGK.sum(axis=2), axis=1) < EQUAL)
