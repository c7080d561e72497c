"""The group-relative advantage of each step, for NumPy arrays on the host and jax arrays on a device. Loads no jax.

    R_k = sum_{j >= k} r_j          A_k = (R_k - mean R_k) / (std R_k + eps),   std with ddof = 1

r_j is the reward of an answer's step j, so R_k is the answer's return from step k on. Mean and deviation are over the
answers of the group that have a step k. This is R1-VL's advantage (arXiv 2503.12937, section 3.3) by step: with one
step an answer it is the paper's.
"""

from __future__ import annotations

from typing import Any

Array = Any  # a NumPy array or a jax array
SCALES = ("std", "none", "floor")
AVERAGES = ("sequence", "token", "constant")


def step_advantages(
    rewards_BGJ: Array, mask_BGJ: Array, *, scale: str = "std", std_floor: float = 0.1, eps: float = 1e-4
) -> Array:
    """float32 advantages (B, G, J), 0 where mask_BGJ is False. Computed in float64 where rewards_BGJ is float64.

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
    """Returns minus their mean over `axis`, divided as `scale` says. Only places where `mask` is True count; others: 0.

    Equal returns give 0, and so does a single one. Returns are equal if none is farther from their mean than 1e-9 (1e-6
    in float32) times the largest of them, or times 1 if that is larger. Without this tolerance, rounding (of the mean,
    and of the few numbers that a reward adds up) would be divided by about eps and look like an advantage.

    Args:
      xp: numpy or jax.numpy.
      scale: std: divided by the group's standard deviation plus eps; none: not divided (Dr. GRPO); floor: divided by
        the larger of the standard deviation and std_floor, plus eps.
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
    """The advantage (B, G, T) of each token: that of its step; 0 where step_BGT is none of 0..J-1."""
    xp = advantages_BGJ.__array_namespace__()
    J = advantages_BGJ.shape[2]
    values_BGT = xp.take_along_axis(advantages_BGJ, xp.clip(step_BGT, 0, J - 1), axis=2)
    return xp.where((step_BGT >= 0) & (step_BGT < J), values_BGT, 0)


def sequence_weights(
    mask_RT: Array, average: str, max_length: int | None = None, *, sequences: int | None = None
) -> Array:
    """The weight (R,) of each answer's sum over its tokens; float32 for jax arrays, float64 for NumPy's.

    Args:
      mask_RT: bool, True on the tokens of each answer; answer i has |c_i| of them.
      average: sequence: 1 / (R |c_i|), the mean over answers of their token means (GRPO); token: 1 / sum_i |c_i|, the
        mean over all tokens (DAPO); constant: 1 / (R max_length) (Dr. GRPO).
      max_length: for average "constant".
      sequences: the number of answers, if other than R: rows of padding do not count.
    Raises:
      ValueError: `average` is unknown, or "constant" without a max_length of 1 or more.
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
