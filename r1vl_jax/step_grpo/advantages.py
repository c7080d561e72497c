"""From the rewards of a group to its advantages: gates, and which groups have a gradient at all.

Rewards are by step: rewards_BGJ holds the reward of each step of each answer. Their advantages within the group (R1-VL,
section 3.3; GRPO) are in r1vl_kernels: `reference.step_advantages` has the equation, training runs
`step_group_advantage`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from r1vl_kernels.reference import step_advantages

EQUAL = 1e-9  # rewards are sums of a few numbers: two that differ by less are equal


def gate_rewards(outcome_BGJ: np.ndarray, shaping_BGJ: np.ndarray, correct_BG: np.ndarray, gate: str) -> np.ndarray:
    """Rewards (B, G, J): the outcome's, plus the step rewards (key steps, validity) where the gate lets them count.

    Args:
      correct_BG: True where the final answer is right.
      gate: none: always; mixed: in groups that have right and wrong answers; correct: for right answers.
    """
    if gate == "mixed":
        mixed_B = np.asarray(correct_BG.any(axis=1) & ~correct_BG.all(axis=1))
        opened = mixed_B[:, None, None]
    elif gate == "correct":
        opened = correct_BG[:, :, None]
    else:
        opened = True
    return outcome_BGJ + np.where(opened, shaping_BGJ, 0.0)


def group_advantages(rewards_BG: np.ndarray, **options: Any) -> np.ndarray:
    """A^i = (r^i - mean_j r^j) / (std_j r^j + 1e-4), std with ddof = 1; float32 (B, G). Options as step_advantages."""
    rewards_BGJ = np.asarray(rewards_BG, np.float64)[:, :, None]
    return step_advantages(rewards_BGJ, np.ones(rewards_BGJ.shape, bool), **options)[:, :, 0].astype(np.float32)


def has_signal(advantages_BGJ: np.ndarray) -> np.ndarray:
    """True for groups in which some advantage is not 0. Advantages are by step or by token. Shape (B,)."""
    return np.asarray(advantages_BGJ.any(axis=(1, 2)))


def shaped_only(outcome_BGJ: np.ndarray, advantages_BGJ: np.ndarray) -> np.ndarray:
    """True for groups with a gradient from step rewards alone: their outcomes are equal. Shape (B,)."""
    return has_signal(advantages_BGJ) & (np.ptp(outcome_BGJ.sum(axis=2), axis=1) < EQUAL)
