"""The step-wise group-relative advantage of each token, on the device: between rewards and the policy loss.

    R_k = sum_{j >= k} r_j          A_k = (R_k - mean R_k) / (std R_k + eps)          each token gets its step's A_k

`reference` has the equation and its source. The kernel walks from the last step to the first with the running return of
a group's M answers, normalises it, and lays it on the tokens that stand in that step, a block of tokens a program: the
(B, M, K) array of advantages is never written. It is bound by launches, like what XLA makes of the reference.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from r1vl_kernels.backends import check_array, check_backend, on_device, padded, token_block, up_to
from r1vl_kernels.reference import SCALES, normalised, step_advantages, token_advantages


def step_group_advantage(
    rewards_BGJ: jax.Array,
    mask_BGJ: jax.Array,
    step_BGT: jax.Array,
    *,
    scale: str = "std",
    std_floor: float = 0.1,
    eps: float = 1e-4,
    backend: str,
) -> jax.Array:
    """Each token's advantage (B, M, T), fp32. With K = 1 it is the paper's, of the whole answer.

    A lone return gives 0 and so do returns that are equal (within 1e-6 of their size: `reference.normalised`). The
    gradient with respect to rewards_BGJ is that of the reference; in training advantages are data and have none.

    Args:
      rewards_BGJ: float, what answer m of a group earns in its step k.
      mask_BGJ: bool, True where it has such a step; what stands elsewhere takes no part.
      step_BGT: int32, the step that each token stands in; a token of no step (-1, or K and more) gets 0.
      scale: std: divided by the group's standard deviation (ddof 1), plus eps; none: not divided; floor: by the
        standard deviation or std_floor, whichever is larger, plus eps.
      backend: reference, pallas or interpret.

    Raises:
      ValueError: an argument has another shape, dtype or value.
    """
    check_backend(backend)
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; expected one of {', '.join(SCALES)}")
    check_array("rewards_BGJ", rewards_BGJ, jnp.floating)
    check_array("mask_BGJ", mask_BGJ, jnp.bool_, rewards_BGJ.shape, "rewards_BGJ")
    check_array("step_BGT", step_BGT, jnp.integer)
    check_array("step_BGT", step_BGT, jnp.integer, (*rewards_BGJ.shape[:2], step_BGT.shape[2]), "rewards_BGJ, and T")
    options = (("scale", scale), ("std_floor", std_floor), ("eps", eps))
    if backend == "reference" or 0 in rewards_BGJ.shape + step_BGT.shape:
        return _reference(options, rewards_BGJ, mask_BGJ, step_BGT)
    return _advantage(options, backend, rewards_BGJ, mask_BGJ, step_BGT)


def _reference(options, rewards_BGJ, mask_BGJ, step_BGT):
    return token_advantages(step_advantages(rewards_BGJ, mask_BGJ, **dict(options)), step_BGT).astype(jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _advantage(options, backend, rewards_BGJ, mask_BGJ, step_BGT):
    return on_device(partial(_call, options), backend, rewards_BGJ, mask_BGJ, step_BGT)


def _forward(options, backend, rewards_BGJ, mask_BGJ, step_BGT):
    return _advantage(options, backend, rewards_BGJ, mask_BGJ, step_BGT), (rewards_BGJ, mask_BGJ, step_BGT)


def _backward(options, backend, saved, grad_BGT):
    rewards_BGJ, *rest = saved
    _, pull = jax.vjp(lambda rewards: _reference(options, rewards, *rest), rewards_BGJ)
    return *pull(grad_BGT), None, None


_advantage.defvjp(_forward, _backward)


def _call(options, rewards_BGJ, mask_BGJ, step_BGT, *, form: str, **call):
    """Steps go to the front, where both compilers take an index known only at run time; answers to a power of two."""
    B, M, K = rewards_BGJ.shape
    T = step_BGT.shape[2]
    rows = pl.next_power_of_2(M)
    block = token_block(T, max(128, 4096 // rows))
    tokens = up_to(T, block)

    def columns(array):
        return padded(array.swapaxes(1, 2), K, rows)[..., None]

    column = pl.BlockSpec((None, K, rows, 1), lambda b, t: (b, 0, 0, 0))
    token = pl.BlockSpec((None, rows, block), lambda b, t: (b, 0, t))
    out = pl.pallas_call(
        partial(_kernel, steps=K, options=dict(options)),
        grid=(B, tokens // block),
        in_specs=[column, column, token],
        out_specs=token,
        out_shape=jax.ShapeDtypeStruct((B, rows, tokens), jnp.float32),
        name="step_group_advantage",
        **call,
    )(columns(rewards_BGJ), columns(mask_BGJ.astype(jnp.int32)), padded(step_BGT.astype(jnp.int32), rows, tokens))
    return out[:, :M, :T]


def _kernel(rewards_ref, mask_ref, step_ref, out_ref, *, steps: int, options: dict):
    step = step_ref[...]

    def body(i, carry):
        running, out = carry
        k = steps - 1 - i
        mask = mask_ref[k] != 0
        running = running + jnp.where(mask, rewards_ref[k].astype(jnp.float32), 0)
        return running, jnp.where(step == k, normalised(jnp, running, mask, axis=0, **options), out)

    start = jnp.zeros((step.shape[0], 1), jnp.float32), jnp.zeros(step.shape, jnp.float32)
    _, out_ref[...] = jax.lax.fori_loop(0, steps, body, start)
