"""Defines the group-relative advantage of each step, for NumPy arrays on the host and jax arrays on a device.

    R_k = sum_{j >= k} r_j          A_k = (R_k - mean R_k) / (std R_k + eps),   std with ddof = 1

r_j is the reward of an answer's step j, so R_k is the answer's return from step k on. Mean and standard deviation are
over the answers of the group that have a step k. With one step per answer this is the advantage of R1-VL (arXiv
2503.12937, section 3.3). This module does not load jax.
"""

from __future__ import annotations

from typing import Any

Array = Any  # a NumPy array or a jax array
SCALES = ("std", "none", "floor")
AVERAGES = ("sequence", "token", "constant")


def step_advantages(
    rewards_BGJ: Array, mask_BGJ: Array, *, scale: str = "std", std_floor: float = 0.1, eps: float = 1e-4
) -> Array:
    """Returns float32 advantages (B, G, J), 0 where mask_BGJ is False. Computes in float64 if rewards_BGJ is float64.

    Args:
      rewards_BGJ: the reward of each step of each answer.
      mask_BGJ: bool, True where the answer has this step.
      scale, std_floor, eps: see `normalised`.
    """
    xp = rewards_BGJ.__array_namespace__()
    dtype = xp.float64 if rewards_BGJ.dtype == xp.float64 else xp.float32
    rewards_BGJ = xp.where(mask_BGJ, rewards_BGJ.astype(dtype), 0)
    returns_BGJ = xp.flip(xp.cumsum(xp.flip(rewards_BGJ, axis=2), axis=2), axis=2)
    advantages_BGJ = normalised(xp, returns_BGJ, mask_BGJ, axis=1, scale=scale, std_floor=std_floor, eps=eps)
    return advantages_BGJ.astype(xp.float32)


def normalised(xp: Any, returns: Array, mask: Array, *, axis: int, scale: str, std_floor: float, eps: float) -> Array:
    """Returns `returns` minus their mean over `axis`, divided as `scale` says; 0 where `mask` is False.

    Masked entries do not count in the mean. A single return yields 0, and equal returns yield 0. Returns are equal if
    every one is within 1e-9 (1e-6 in float32) times max(1, largest absolute return) of the mean. Without this
    tolerance, rounding errors would be divided by about eps and look like an advantage.

    Args:
      xp: numpy or jax.numpy.
      scale: std: divides by the group's standard deviation plus eps; none: does not divide (Dr. GRPO); floor: divides
        by the larger of the standard deviation and std_floor, plus eps.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; expected one of {', '.join(SCALES)}")
    returns = xp.where(mask, returns, 0)
    count = xp.sum(mask.astype(returns.dtype), axis=axis, keepdims=True)
    mean = xp.sum(returns, axis=axis, keepdims=True) / xp.maximum(count, 1)
    centred = xp.where(mask, returns - mean, 0)
    equal = 1e-9 if returns.dtype == xp.float64 else 1e-6
    size = xp.maximum(xp.max(xp.abs(returns), axis=axis, keepdims=True), 1)
    centred = xp.where(xp.max(xp.abs(centred), axis=axis, keepdims=True) < equal * size, 0, centred)
    if scale == "none":
        return centred
    std = xp.sqrt(xp.sum(centred**2, axis=axis, keepdims=True) / xp.maximum(count - 1, 1))
    return centred / ((xp.maximum(std, std_floor) if scale == "floor" else std) + eps)


def token_advantages(advantages_BGJ: Array, step_BGT: Array) -> Array:
    """Returns the advantage (B, G, T) of each token's step; 0 for tokens whose step_BGT is not in 0..J-1."""
    xp = advantages_BGJ.__array_namespace__()
    J = advantages_BGJ.shape[2]
    values_BGT = xp.take_along_axis(advantages_BGJ, xp.clip(step_BGT, 0, J - 1), axis=2)
    return xp.where((step_BGT >= 0) & (step_BGT < J), values_BGT, 0)


def sequence_weights(
    mask_RT: Array, average: str, max_length: int | None = None, *, sequences: int | None = None
) -> Array:
    """Returns the factor (R,) on each answer's sum over tokens; float32 for jax arrays, float64 for NumPy arrays.

    Args:
      mask_RT: bool, True on the tokens of each answer; answer i has |c_i| tokens.
      average: sequence: 1 / (R |c_i|), the mean over answers of their token means (GRPO); token: 1 / sum_i |c_i|, the
        mean over all tokens (DAPO); constant: 1 / (R max_length) (Dr. GRPO).
      max_length: the divisor of average "constant".
      sequences: the number of answers to use in place of R, if some rows are padding.
    Raises:
      ValueError: `average` is unknown, or it is "constant" and max_length is None or less than 1.
    """
    if average not in AVERAGES:
        raise ValueError(f"average is {average!r}; expected one of {', '.join(AVERAGES)}")
    xp = mask_RT.__array_namespace__()
    length_R, count = xp.sum(mask_RT, axis=1), sequences or mask_RT.shape[0]
    if average == "sequence":
        return 1 / (count * xp.maximum(length_R, 1))
    if average == "token":
        total = xp.maximum(xp.sum(length_R), 1)
    elif max_length is None or max_length < 1:
        raise ValueError(f"max_length is {max_length}; average 'constant' divides by it and expects 1 or more")
    else:
        total = count * max_length
    return xp.ones_like(length_R) / total
