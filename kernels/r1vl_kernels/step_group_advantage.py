"""Computes the group-relative advantage of every token.

    R_k = sum_{j >= k} r_j          A_k = (R_k - mean R_k) / (std R_k + eps)          each token gets its step's A_k

r_j is the reward of step j. Mean and std are over the G answers to one question. `reference` defines the equation and
cites its source. Each Pallas program instance handles one group and one block of tokens. It goes from the last step to
the first and keeps the running return of the G answers. At each step it normalises that return and writes it to the
tokens of the step, so the (B, G, J) array of advantages is never written to memory. Expected, not measured:
kernel-launch overhead dominates, here and in the XLA-compiled reference.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from r1vl_kernels.backends import check_array, check_backend, on_device, padded, round_up, token_block
from r1vl_kernels.reference import SCALES, normalised, step_advantages, token_advantages

Options = tuple[tuple[str, Any], ...]  # (name, value) pairs: hashable, for nondiff_argnums


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
    """Returns the advantage (B, G, T) of each token, fp32. With J = 1 it is the paper's: one number per answer.

    A single return yields 0, and equal returns yield 0 (within 1e-6 of their size: see `reference.normalised`). The
    gradient with respect to rewards_BGJ is that of the reference; training treats advantages as constants.

    Args:
      rewards_BGJ: float, the reward of each step of each answer.
      mask_BGJ: bool, True where the answer has this step; other rewards do not count.
      step_BGT: int32, the step of each token; a token outside all steps (-1, or J and more) gets 0.
      scale: std: divides by the group's standard deviation (ddof 1) plus eps; none: does not divide; floor: divides by
        the larger of the standard deviation and std_floor, plus eps.
      backend: reference, pallas or interpret.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
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


def _reference(options: Options, rewards_BGJ: jax.Array, mask_BGJ: jax.Array, step_BGT: jax.Array) -> jax.Array:
    return token_advantages(step_advantages(rewards_BGJ, mask_BGJ, **dict(options)), step_BGT).astype(jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _advantage(options: Options, backend: str, rewards_BGJ: jax.Array, mask_BGJ: jax.Array, step_BGT: jax.Array) -> Any:
    return on_device(partial(_call, options), backend, rewards_BGJ, mask_BGJ, step_BGT)


def _forward(
    options: Options, backend: str, rewards_BGJ: jax.Array, mask_BGJ: jax.Array, step_BGT: jax.Array
) -> tuple[Any, Any]:
    return _advantage(options, backend, rewards_BGJ, mask_BGJ, step_BGT), (rewards_BGJ, mask_BGJ, step_BGT)


def _backward(options: Options, backend: str, saved: Any, grad_BGT: jax.Array) -> tuple[jax.Array, None, None]:
    rewards_BGJ, *rest = saved
    _, pull = jax.vjp(lambda rewards: _reference(options, rewards, *rest), rewards_BGJ)
    return *pull(grad_BGT), None, None


_advantage.defvjp(_forward, _backward)


def _call(
    options: Options, rewards_BGJ: jax.Array, mask_BGJ: jax.Array, step_BGT: jax.Array, *, form: str, **call: Any
) -> jax.Array:
    """Runs the kernel, with steps moved to the first axis and answers padded to a power of two.

    Steps come first because both compilers accept an index known only at run time on the first axis alone.
    """
    B, G, J = rewards_BGJ.shape
    T = step_BGT.shape[2]
    rows = pl.next_power_of_2(G)
    block = token_block(T, max(128, 4096 // rows))
    tokens = round_up(T, block)

    def columns(array_BGJ: jax.Array) -> jax.Array:
        return padded(array_BGJ.swapaxes(1, 2), J, rows)[..., None]

    column = pl.BlockSpec((None, J, rows, 1), lambda group, part: (group, 0, 0, 0))
    token = pl.BlockSpec((None, rows, block), lambda group, part: (group, 0, part))
    out = pl.pallas_call(
        partial(_kernel, steps=J, options=dict(options)),
        grid=(B, tokens // block),
        in_specs=[column, column, token],
        out_specs=token,
        out_shape=jax.ShapeDtypeStruct((B, rows, tokens), jnp.float32),
        name="step_group_advantage",
        **call,
    )(columns(rewards_BGJ), columns(mask_BGJ.astype(jnp.int32)), padded(step_BGT.astype(jnp.int32), rows, tokens))
    return out[:, :G, :T]


def _kernel(
    rewards_ref: Any, mask_ref: Any, step_ref: Any, out_ref: Any, *, steps: int, options: dict[str, Any]
) -> None:
    step = step_ref[...]

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        running, out = carry
        k = steps - 1 - i
        mask = mask_ref[k] != 0
        running = running + jnp.where(mask, rewards_ref[k].astype(jnp.float32), 0)
        return running, jnp.where(step == k, normalised(jnp, running, mask, axis=0, **options), out)

    start = jnp.zeros((step.shape[0], 1), jnp.float32), jnp.zeros(step.shape, jnp.float32)
    _, out_ref[...] = jax.lax.fori_loop(0, steps, body, start)
