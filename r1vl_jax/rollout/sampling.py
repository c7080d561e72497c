"""Draws one token per row of logits (greedy, temperature, top-k, top-p) by the inverse CDF of one uniform number."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from r1vl_jax.model.head import scaled, softmax_sums
from r1vl_jax.types import Sampling

BLOCK = 128  # tokens in a block of the inverse CDF


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError if a value is out of range."""
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(f"temperature is {sampling.temperature}, expected 0 (greedy) or more")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, expected more than 0 and at most 1")
    if sampling.top_k < 0:
        raise ValueError(f"top_k is {sampling.top_k}, expected 0 (off) or more")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {sampling.max_new_tokens}, expected at least 1")


def answer_uniforms(seed: int, step: int, row_ids_B: jax.Array, group: int, length: int) -> jax.Array:
    """Returns the random numbers of a rollout (B, G, T), from keys folded from (seed, step, row, sample).

    They depend on nothing else: not on the batch, a question's place in the batch, the mesh, or a restart.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)

    def answer(row: jax.Array, sample: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), sample), (length,))

    samples_G = jnp.arange(group)
    return jax.vmap(lambda row: jax.vmap(lambda sample: answer(row, sample))(samples_G))(row_ids_B)


def sample(
    logits: jax.Array, uniform: jax.Array, sampling: Sampling, forbidden: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Draws a token from each row.

    Args:
      logits: (..., V).
      uniform: (...) in [0, 1).
      forbidden: ids that are never drawn.
    Returns:
      (tokens (...) int32, their log softmax(z / temperature) before top-k and top-p).
    """
    z = scaled(logits, sampling.temperature, forbidden)
    if sampling.temperature == 0:
        token, (top, log_total) = jnp.argmax(z, axis=-1), softmax_sums(z, False)
    else:
        kept = _truncated(z, sampling)
        token, top, log_total = _inverse_cdf(kept, uniform)
        if kept is not z:
            top, log_total = softmax_sums(z, False)
    taken = jnp.take_along_axis(z, token[..., None], axis=-1)[..., 0]
    return token.astype(jnp.int32), taken - top - log_total


def _truncated(z: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets the logits of tokens outside top-k, then outside top-p, to -inf. Returns z itself if both are off."""
    vocab = z.shape[-1]
    if not 0 < sampling.top_k < vocab and sampling.top_p == 1:
        return z
    order = jnp.argsort(-z, axis=-1)
    ranked = jnp.take_along_axis(jnp.exp(z - z.max(axis=-1, keepdims=True)), order, axis=-1)
    if sampling.top_k:
        ranked = jnp.where(jnp.arange(vocab) < sampling.top_k, ranked, 0.0)
    ranked /= ranked.sum(axis=-1, keepdims=True)
    # The nucleus is the smallest set whose sum reaches top_p: a token is in it if the sum before it is below top_p.
    before = jnp.cumsum(ranked, axis=-1) - ranked
    kept = (before < sampling.top_p) & (ranked > 0)
    return jnp.where(jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1), z, -jnp.inf)


def _inverse_cdf(z: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws from softmax(z): the first token whose cumulative sum of e^z exceeds uniform * total; never one at -inf.

    Searches the blocks of tokens first, then one block: a cumulative sum over a whole vocabulary takes many passes.

    Returns:
      (tokens, max z, log sum e^(z - max)).
    """
    z = jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, -z.shape[-1] % BLOCK)], constant_values=-jnp.inf)
    z = z.reshape(*z.shape[:-1], -1, BLOCK)
    block_top, block_log_total = softmax_sums(z, False)
    top = block_top.max(axis=-1)
    sums = jnp.exp(block_top + block_log_total - top[..., None])
    below = jnp.cumsum(sums, axis=-1)
    total = below[..., -1]
    # Uniform numbers are multiples of 2^-23. Half of that is added, or else 0 would draw the first token, however rare.
    target = (uniform + 2.0**-24) * total
    block = _first_above(sums, below, target)[..., None]
    before, highest = (jnp.take_along_axis(a, block, axis=-1)[..., 0] for a in (below - sums, block_top))
    # In the units of the block, because all of its e^(z - top) may be 0 although their sum is not.
    inside = jnp.exp(jnp.take_along_axis(z, block[..., None], axis=-2)[..., 0, :] - highest[..., None])
    rest = (target - before) * jnp.exp(jnp.minimum(top - highest, 80.0))
    token = block[..., 0] * BLOCK + _first_above(inside, jnp.cumsum(inside, axis=-1), rest)
    return token, top, jnp.log(total)


def _first_above(p: jax.Array, cdf: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the first index with cdf > target and p > 0.

    Rounding may leave no such index if the target is close to the total; the most probable one is returned then. One
    argmax does both: the indices that qualify have keys above every p, the first the highest.
    """
    hit = (cdf > target[..., None]) & (p > 0)
    first = 2.0 * BLOCK + p.shape[-1] - jnp.arange(p.shape[-1], dtype=jnp.float32)
    return jnp.argmax(jnp.where(hit, first, p), axis=-1)
