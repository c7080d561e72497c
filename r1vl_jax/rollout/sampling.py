"""Draws one token per row of logits (greedy, temperature, top-k, top-p) by the inverse CDF of one uniform number."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from r1vl_jax.model.head import scaled
from r1vl_jax.types import Sampling

BLOCK = 128  # tokens in a block of the inverse CDF


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError if a value is out of range."""
    if sampling.temperature < 0:
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
        token = jnp.argmax(z, axis=-1)
    else:
        p = jnp.exp(z - z.max(axis=-1, keepdims=True))
        token = _inverse_cdf(_truncated(p, sampling), uniform)
    taken = jnp.take_along_axis(z, token[..., None], axis=-1)[..., 0]
    return token.astype(jnp.int32), taken - jax.nn.logsumexp(z, axis=-1)


def _truncated(p: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets the probabilities of tokens outside top-k, then outside top-p, to zero. The result is not normalised."""
    vocab = p.shape[-1]
    if not 0 < sampling.top_k < vocab and sampling.top_p == 1:
        return p
    order = jnp.argsort(-p, axis=-1)
    ranked = jnp.take_along_axis(p, order, axis=-1)
    if sampling.top_k:
        ranked = jnp.where(jnp.arange(vocab) < sampling.top_k, ranked, 0.0)
    ranked /= ranked.sum(axis=-1, keepdims=True)
    # The nucleus is the smallest set whose sum reaches top_p: a token is in it if the sum before it is below top_p.
    before = jnp.cumsum(ranked, axis=-1) - ranked
    ranked = jnp.where(before < sampling.top_p, ranked, 0.0)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def _inverse_cdf(p: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the first token whose cumulative probability exceeds uniform * total; never a token of probability 0.

    Searches the blocks of tokens first, then one block: a cumulative sum over a whole vocabulary takes many passes.
    """
    p = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -p.shape[-1] % BLOCK)]).reshape(*p.shape[:-1], -1, BLOCK)
    sums = p.sum(axis=-1)
    below = jnp.cumsum(sums, axis=-1)
    target = uniform * below[..., -1]
    block = _first_above(sums, below, target)[..., None]
    inside = jnp.take_along_axis(p, block[..., None], axis=-2)[..., 0, :]
    before = jnp.take_along_axis(below - sums, block, axis=-1)
    rest = target - before[..., 0]
    return block[..., 0] * BLOCK + _first_above(inside, jnp.cumsum(inside, axis=-1), rest)


def _first_above(p: jax.Array, cdf: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the first index with cdf > target and p > 0."""
    hit = (cdf > target[..., None]) & (p > 0)
    # Rounding may leave no such index if the target is close to the total; the most probable token is returned then.
    return jnp.where(hit.any(axis=-1), jnp.argmax(hit, axis=-1), jnp.argmax(p, axis=-1))
