"""The group-relative advantage by step, once, for NumPy arrays on the host and jax arrays on a device. Loads no jax.

    R_k = sum_{j >= k} r_j          A_k = (R_k - mean R_k) / (std R_k + eps),   std with ddof = 1

r_j is what an answer earns in its step j; mean and deviation go over the answers of the group that have a step k
(R1-VL, arXiv 2503.12937, section 3.3, by step; with one step for each answer it is the paper's advantage). B groups, M
answers a group, K steps, T tokens.
"""

from __future__ import annotations

SCALES = ("std", "none", "floor")
AVERAGES = ("sequence", "token", "constant")


def step_advantages(rewards_BGJ, mask_BGJ, *, scale: str = "std", std_floor: float = 0.1, eps: float = 1e-4):
    """float32 advantages (B, M, K), 0 where mask_BGJ is False; computed in float64 where rewards_BGJ is.

    Args:
      rewards_BGJ: what answer m to question b earns in its step k.
      mask_BGJ: bool, True where it has such a step.
      scale, std_floor, eps: as for `normalised`.
    """
    xp = rewards_BGJ.__array_namespace__()
    dtype = xp.float64 if rewards_BGJ.dtype == xp.float64 else xp.float32
    rewards_BGJ = xp.where(mask_BGJ, rewards_BGJ.astype(dtype), 0)
    returns_BGJ = xp.flip(xp.cumsum(xp.flip(rewards_BGJ, axis=2), axis=2), axis=2)
    advantages_BGJ = normalised(xp, returns_BGJ, mask_BGJ, axis=1, scale=scale, std_floor=std_floor, eps=eps)
    return advantages_BGJ.astype(xp.float32)


def normalised(xp, returns, mask, *, axis: int, scale: str, std_floor: float, eps: float):
    """Returns against their mean over `axis`, where `mask` is True, divided as `scale` says; 0 where it is False.

    A lone return gives 0, and so do returns that are equal: no farther from their mean than 1e-9 (in float32 1e-6)
    times the largest of them, or times 1 where that is larger. The mean of equal numbers is rounded, and rewards are
    sums of a few numbers, so that equal ones may differ in their last bits; beside eps nothing smaller would count.

    Args:
      xp: numpy or jax.numpy.
      scale: std: divided by the group's standard deviation, plus eps; none: not divided (Dr. GRPO); floor: by the
        standard deviation or std_floor, whichever is larger, plus eps.
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


def token_advantages(advantages_BGJ, step_BGT):
    """Each token's advantage (B, M, T): that of the step it stands in; 0 where step_BGT is none of 0..K-1."""
    xp = advantages_BGJ.__array_namespace__()
    steps = advantages_BGJ.shape[2]
    values_BGT = xp.take_along_axis(advantages_BGJ, xp.clip(step_BGT, 0, steps - 1), axis=2)
    return xp.where((step_BGT >= 0) & (step_BGT < steps), values_BGT, 0)


def sequence_weights(mask_RT, average: str, max_length: int | None = None, *, sequences: int | None = None):
    """The weight (R,) of each sequence's token sum; float32 of jax arrays, float64 of NumPy's.

    sequence: 1 / (R |c_i|), the mean of the sequences' means (GRPO); token: 1 / sum |c_i|, the mean over all tokens
    (DAPO); constant: 1 / (R max_length) (Dr. GRPO). `sequences` stands for R where not all of them count.
    """
    xp = mask_RT.__array_namespace__()
    length, count = xp.sum(mask_RT, axis=1), sequences or mask_RT.shape[0]
    if average == "sequence":
        return 1 / (count * xp.maximum(length, 1))
    total = xp.maximum(xp.sum(length), 1) if average == "token" else count * max_length
    return xp.ones_like(length) / total
