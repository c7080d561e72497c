"""From hidden states to log-probabilities of given tokens, and to a loss of them, without ever holding all logits.

    z = W h / temperature, without the forbidden ids        log p(token) = z_token - logsumexp(z)

A vocabulary of 151,936 makes logits the largest array of a training step (14.9 GB for 16 rows of 1,536 tokens), so both
functions go through the rows in chunks, whole vocabulary at once. `token_logprobs` is the plain form: what is sampled
from and what the reference model gives. `head_loss` takes the gradient while a chunk's logits are there: they are made
once, and three matmuls do what takes four where they are made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from r1vl_jax.model.config import LOGIT_ROWS
from r1vl_jax.parallel.sharding import ambient_shards

FP32 = {"preferred_element_type": jnp.float32}


def logits(hidden, head_VD) -> jax.Array:
    """fp32 logits (..., V) of hidden states (..., D)."""
    rows = hidden.reshape(-1, hidden.shape[-1])  # one row axis: several make the gradient slow on a CPU
    return jnp.einsum("ND,VD->NV", rows, head_VD, **FP32).reshape(*hidden.shape[:-1], -1)


def scaled(logits, temperature: float, forbidden: tuple[int, ...]) -> jax.Array:
    """fp32 logits over the temperature (0 stands for 1), forbidden ids at -inf: what is sampled from and trained."""
    z = logits.astype(jnp.float32) / (temperature or 1.0)
    if not forbidden:
        return z
    return jnp.where(jnp.isin(jnp.arange(z.shape[-1]), jnp.array(forbidden)), -jnp.inf, z)


def _score(logits, tokens):
    """(log p of the tokens, entropy, p), fp32."""
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    below = logits - top
    weights = jnp.exp(below)
    total = weights.sum(axis=-1, keepdims=True)
    mean = jnp.sum(jnp.where(weights > 0, weights * below, 0.0), axis=-1) / total[..., 0]
    log_total = jnp.log(total[..., 0])
    taken = jnp.take_along_axis(below, tokens[..., None], axis=-1)[..., 0]
    return taken - log_total, log_total - mean, weights / total


def token_logprobs(
    hidden_BGTD,
    head_VD,
    tokens_BGT,
    *,
    temperature: float = 1.0,
    forbidden: tuple[int, ...] = (),
    chunk: int = LOGIT_ROWS,
) -> tuple[jax.Array, jax.Array]:
    """log p of each token under the distribution that its hidden state gives, and that distribution's entropy.

    The one definition of a token's log-probability: SFT, policy, reference and rollout all mean this. The gradient
    makes each chunk's logits anew. Returns: fp32 (logprobs_BGT, entropy_BGT).
    """

    @jax.checkpoint
    def score(hidden, tokens):
        return _score(scaled(logits(hidden, head_VD), temperature, forbidden), tokens)[:2]

    (B, G, T), (chunks, width) = tokens_BGT.shape, _chunks(hidden_BGTD, chunk)
    rows = _padded((hidden_BGTD, tokens_BGT), chunks * width)

    def one(i):
        return score(*_part(rows, i, width))

    scored = jax.lax.map(one, jnp.arange(chunks)) if chunks > 1 else jax.tree.map(lambda a: a[None], one(0))
    return tuple(jnp.moveaxis(a, 0, 2).reshape(B, G, -1)[:, :, :T] for a in scored)


# token_loss(logprobs, entropy, values) -> (loss, metrics): sums over the tokens of a chunk, so that chunks add up.
TokenLoss = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6, 7))
def head_loss(
    token_loss: TokenLoss,
    hidden_BGTD,
    head_VD,
    tokens_BGT,
    values: Any,
    temperature: float = 1.0,
    forbidden: tuple[int, ...] = (),
    chunk: int = LOGIT_ROWS,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of tokens and its metrics, summed over all of them.

    Args:
      token_loss: (logprobs, entropy, values) of some (B, G, t) tokens -> (loss, metrics), sums over these tokens.
      values: a tree of (B, G, T) arrays that it needs; they get no gradient, and neither do entropies.
      temperature, forbidden: as in `token_logprobs`; chunk: rows on each device whose logits are held at once.
    Returns:
      (loss, metrics), fp32 scalars. Only the loss has a gradient.
    """
    return _head_loss(token_loss, hidden_BGTD, head_VD, tokens_BGT, values, temperature, forbidden, chunk, False)[0]


def _head_loss(token_loss, hidden_BGTD, head_VD, tokens_BGT, values, temperature, forbidden, chunk, with_gradient):
    """((loss, metrics), (gradient of hidden, of the head)): one pass through the chunks, all sums in its carry."""
    (B, G, T, D), dtype = hidden_BGTD.shape, hidden_BGTD.dtype
    chunks, width = _chunks(hidden_BGTD, chunk)
    real_BGT = jnp.ones((B, G, T), bool)
    rows = _padded((hidden_BGTD, tokens_BGT, values, real_BGT), chunks * width)

    def one(i):
        hidden, tokens, value, real = _part(rows, i, width)
        logprobs, entropy, p = _score(scaled(logits(hidden, head_VD), temperature, forbidden), tokens)

        def loss(logprobs):
            return token_loss(jnp.where(real, logprobs, 0.0), jnp.where(real, entropy, 0.0), value)

        if not with_gradient:
            return loss(logprobs), ()
        totals, slope = jax.value_and_grad(loss, has_aux=True)(logprobs)
        taken = tokens[..., None] == jnp.arange(p.shape[-1])
        d_logits = slope[..., None] / (temperature or 1.0) * (taken - p)
        d_logits = d_logits.astype(dtype).reshape(-1, p.shape[-1])
        d_hidden = jnp.einsum("NV,VD->ND", d_logits, head_VD, **FP32).astype(dtype).reshape(hidden.shape)
        return totals, (d_hidden, jnp.einsum("NV,ND->VD", d_logits, hidden.reshape(-1, D), **FP32))

    if chunks == 1:
        return one(0)

    def add(carry, i):
        totals, grads = one(i)
        if with_gradient:
            all_hidden = jax.lax.dynamic_update_slice_in_dim(carry[1][0], grads[0], i * width, axis=2)
            grads = (all_hidden, carry[1][1] + grads[1])
        return (jax.tree.map(jnp.add, carry[0], totals), grads), None

    totals = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(one, 0)[0])
    grads = (jnp.zeros_like(rows[0]), jnp.zeros(head_VD.shape, jnp.float32)) if with_gradient else ()
    (totals, grads), _ = jax.lax.scan(add, (totals, grads), jnp.arange(chunks))
    return totals, (grads[0][:, :, :T], grads[1]) if with_gradient else ()


def _forward(token_loss, hidden_BGTD, head_VD, tokens_BGT, values, temperature, forbidden, chunk):
    out, (d_hidden, d_head) = _head_loss(
        token_loss, hidden_BGTD, head_VD, tokens_BGT, values, temperature, forbidden, chunk, True
    )
    return out, (d_hidden, d_head.astype(head_VD.dtype))


def _backward(token_loss, temperature, forbidden, chunk, grads, cotangents):
    d_hidden, d_head = (cotangents[0].astype(grad.dtype) * grad for grad in grads)
    return d_hidden, d_head, None, None


head_loss.defvjp(_forward, _backward)


def _chunks(hidden_BGTD, chunk: int) -> tuple[int, int]:
    """How many chunks, and of how many tokens of each answer: chunks run along T, B stays sharded as it is."""
    B, G, T, _ = hidden_BGTD.shape
    count = -(-T // max(1, chunk * ambient_shards() // (B * G)))
    return count, -(-T // count)


def _padded(tree, length: int):
    def pad(a):
        return jnp.pad(a, [(0, 0), (0, 0), (0, length - a.shape[2])] + [(0, 0)] * (a.ndim - 3))

    return tree if length == jax.tree.leaves(tree)[0].shape[2] else jax.tree.map(pad, tree)


def _part(tree, i, width: int):
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * width, width, axis=2), tree)
