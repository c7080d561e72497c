"""Gates the step rewards of each group, and finds the groups whose advantages are not all 0.

rewards_BGJ holds the reward of each step of each answer. r1vl_kernels computes the advantages within a group (R1-VL,
section 3.3; GRPO): `reference.step_advantages` defines the equation, and training runs `step_group_advantage`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from r1vl_kernels.reference import step_advantages

EQUAL = 1e-9  # rewards that differ by less are equal; sums of a few numbers have rounding errors


def gate_rewards(outcome_BGJ: np.ndarray, shaping_BGJ: np.ndarray, correct_BG: np.ndarray, gate: str) -> np.ndarray:
    """Returns rewards (B, G, J): outcome_BGJ, plus the step rewards (key steps, validity) if the gate lets them count.

    Args:
      correct_BG: True if the answer's final result is right.
      gate: the step rewards that count. none: all; mixed: those of groups with both right and wrong answers; correct:
        those of right answers.
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
    """Returns A^i = (r^i - mean_j r^j) / (std_j r^j + 1e-4), std with ddof = 1; float32 (B, G).

    Args:
      options: as for step_advantages.
    """
    rewards_BGJ = np.asarray(rewards_BG, np.float64)[:, :, None]
    return step_advantages(rewards_BGJ, np.ones(rewards_BGJ.shape, bool), **options)[:, :, 0].astype(np.float32)


def has_signal(advantages_BGJ: np.ndarray) -> np.ndarray:
    """Returns True for groups in which some advantage is not 0. Advantages are per step or per token. Shape (B,)."""
    return np.asarray(advantages_BGJ.any(axis=(1, 2)))


def shaped_only(outcome_BGJ: np.ndarray, advantages_BGJ: np.ndarray) -> np.ndarray:
    """Returns True for groups whose gradient comes from step rewards alone: their outcomes are equal. Shape (B,)."""
    return has_signal(advantages_BGJ) & (np.ptp(outcome_BGJ.sum(axis=2), axis=1) < EQUAL)
