"""Drawing one token from logits: greedy, temperature, top-k, top-p; one uniform a row and an inverse CDF."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from r1vl_jax.model.text import log_softmax
from r1vl_jax.types import Sampling


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for values that mean nothing."""
    if sampling.temperature < 0:
        raise ValueError(f"temperature is {sampling.temperature}, expected 0 (greedy) or more")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, expected more than 0 and at most 1")
    if sampling.top_k < 0:
        raise ValueError(f"top_k is {sampling.top_k}, expected 0 (off) or more")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {sampling.max_new_tokens}, expected at least 1")


def answer_uniforms(seed: int, step: int, row_ids_B: jax.Array, group: int, length: int) -> jax.Array:
    """The random numbers of a rollout (B, G, T), folded from (seed, step, row, sample).

    A row's numbers depend on nothing else: not on its batch, its place there, the mesh, or a restart.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)

    def answer(row, sample):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), sample), (length,))

    samples_G = jnp.arange(group)
    return jax.vmap(lambda row: jax.vmap(lambda sample: answer(row, sample))(samples_G))(row_ids_B)


def sample(logits: jax.Array, uniform: jax.Array, sampling: Sampling, forbidden: tuple[int, ...]):
    """Draws a token from each row.

    Args:
      logits: (..., V); uniform: (...) in [0, 1).
      forbidden: ids never drawn.
    Returns:
      (tokens (...) int32, their log-probability under log softmax(z / T), before top-k and top-p).
    """
    log_p = log_softmax(logits, sampling.temperature, forbidden)
    if sampling.temperature == 0:
        token = jnp.argmax(log_p, axis=-1)
    else:
        token = _inverse_cdf(_truncated(log_p, sampling), uniform)
    return token.astype(jnp.int32), jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]


def _truncated(log_p: jax.Array, sampling: Sampling) -> jax.Array:
    """Probabilities (unnormalised) with everything outside top-k, then outside top-p, set to zero."""
    p = jnp.exp(log_p)
    vocab = p.shape[-1]
    if not 0 < sampling.top_k < vocab and sampling.top_p == 1:
        return p
    order = jnp.argsort(-p, axis=-1)
    ranked = jnp.take_along_axis(p, order, axis=-1)
    if sampling.top_k:
        ranked = jnp.where(jnp.arange(vocab) < sampling.top_k, ranked, 0.0)
    ranked /= ranked.sum(axis=-1, keepdims=True)
    # The nucleus: the fewest tokens whose probabilities reach top_p, hence what precedes a token counts.
    before = jnp.cumsum(ranked, axis=-1) - ranked
    ranked = jnp.where(before < sampling.top_p, ranked, 0.0)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def _inverse_cdf(p: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first token whose cumulative probability exceeds uniform * total; a token of probability 0 never."""
    cdf = jnp.cumsum(p, axis=-1)
    hit = (cdf > uniform[..., None] * cdf[..., -1:]) & (p > 0)
    # Rounding may leave no hit at the very end of the CDF: then the most probable token.
    return jnp.where(hit.any(axis=-1), jnp.argmax(hit, axis=-1), jnp.argmax(p, axis=-1))
