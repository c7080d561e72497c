"""Computes log-probabilities and losses of tokens from hidden states, without holding all logits at once.

    z = W h / temperature, without the forbidden ids        log p(token) = z_token - logsumexp(z)

With a vocabulary of 151,936, logits would be the largest array of a training step: 14.9 GB for 16 rows of 1,536
tokens. Both public functions therefore process the tokens in chunks, each with the whole vocabulary. `token_logprobs`
is the plain form, for the reference model and for scoring. `head_loss` computes the gradient of a chunk while the
chunk's logits are in memory. Each chunk then needs three matmuls; recomputing the logits in the backward pass would
need four.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1vl_jax.model.config import LOGIT_ROWS
from r1vl_jax.model.layers import FP32
from r1vl_jax.parallel.sharding import ambient_shards


def logits(hidden: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Returns fp32 logits (..., V) of hidden states (..., D)."""
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])  # one row axis: with several, the gradient is slow on a CPU
    return jnp.einsum("TD,VD->TV", hidden_TD, head_VD, **FP32).reshape(*hidden.shape[:-1], -1)


def scaled(logits: jax.Array, temperature: float, forbidden: tuple[int, ...]) -> jax.Array:
    """Returns fp32 logits divided by the temperature, with forbidden ids at -inf.

    Their softmax is the distribution that is sampled from and trained. Temperature 0 (greedy) is treated as 1.
    """
    z = logits.astype(jnp.float32) / (temperature or 1.0)
    ids, barred = jnp.arange(z.shape[-1]), jnp.zeros(z.shape[-1], bool)
    for each in forbidden:
        barred |= ids == each
    return jnp.where(barred, -jnp.inf, z) if forbidden else z


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax_sums(z: jax.Array, with_entropy: bool = True) -> tuple[jax.Array, ...]:
    """Returns, over the last axis, (max z, log sum e^(z - max)) and, if asked for, the entropy of softmax(z).

    A GPU computes all in one pass over z, which may be a chunk of logits, by merging (m, l, h) of two parts as online
    softmax does; elsewhere each is a reduction of its own, which a CPU does faster. h = sum e^(z - m) (z - m), and

        entropy = log l - h / l
    """
    sums = jax.lax.platform_dependent(
        z, cuda=partial(_one_pass, with_entropy=with_entropy), default=partial(_plain_sums, with_entropy=with_entropy)
    )
    log_total = jnp.log(sums[1])
    return (sums[0], log_total, log_total - sums[2] / sums[1]) if with_entropy else (sums[0], log_total)


@softmax_sums.defjvp
def _softmax_sums_jvp(with_entropy: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The maximum counts as a constant: log sum e^z = max + log sum e^(z - max)."""
    (z,), (dz,) = primals, tangents
    out = softmax_sums(z, with_entropy)
    log_p = z - (out[0] + out[1])[..., None]
    p = jnp.exp(log_p)
    slopes = [jnp.zeros_like(out[0]), jnp.sum(p * dz, axis=-1)]
    if with_entropy:
        slopes.append(-jnp.sum(jnp.where(p > 0, p * (log_p + out[2][..., None]), 0.0) * dz, axis=-1))
    return out, tuple(slopes)


LOW, LEAST = -1e30, -1e4  # stand for -inf and its difference to a number: finite, because 0 times infinity is not


def _one_pass(z: jax.Array, *, with_entropy: bool) -> tuple[jax.Array, ...]:
    """Returns (m, l, h) or (m, l): see softmax_sums."""

    def merge(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top = jnp.maximum(a[0], b[0])
        below = [jnp.maximum(part[0] - top, LEAST) for part in (a, b)]
        scale = [jnp.exp(each) for each in below]
        total = a[1] * scale[0] + b[1] * scale[1]
        if not with_entropy:
            return top, total
        return top, total, (a[2] + a[1] * below[0]) * scale[0] + (b[2] + b[1] * below[1]) * scale[1]

    parts = (jnp.maximum(z, LOW), jnp.ones_like(z), jnp.zeros_like(z))[: 2 + with_entropy]
    empty = tuple(np.float32(value) for value in (LOW, 0, 0)[: 2 + with_entropy])
    return tuple(jax.lax.reduce(parts, empty, merge, (z.ndim - 1,)))


def _plain_sums(z: jax.Array, *, with_entropy: bool) -> tuple[jax.Array, ...]:
    """Returns (m, l, h), or (m, l): see softmax_sums."""
    top = jnp.maximum(z.max(axis=-1), LOW)
    below = z - top[..., None]
    weights = jnp.exp(below)
    total = weights.sum(axis=-1)
    return (
        (top, total, jnp.sum(jnp.where(weights > 0, weights * below, 0.0), axis=-1)) if with_entropy else (top, total)
    )


def _score(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (log p of the tokens, entropy, log softmax(logits)), fp32."""
    top, log_total, entropy = softmax_sums(logits)
    taken = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return taken - top - log_total, entropy, logits - top[..., None] - log_total[..., None]


def token_logprobs(
    hidden_BGTD: jax.Array,
    head_VD: jax.Array,
    tokens_BGT: jax.Array,
    *,
    temperature: float = 1.0,
    forbidden: tuple[int, ...] = (),
    chunk: int = LOGIT_ROWS,
) -> tuple[jax.Array, jax.Array]:
    """Returns fp32 (logprobs_BGT, entropy_BGT): log p of each token, and the entropy of that token's distribution.

    SFT, policy, reference and rollout all use this definition of a token's log-probability. The backward pass
    recomputes each chunk's logits.
    """

    @jax.checkpoint
    def score(hidden: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _score(scaled(logits(hidden, head_VD), temperature, forbidden), tokens)[:2]

    (B, G, T), (chunks, width) = tokens_BGT.shape, _chunks(hidden_BGTD, chunk)
    inputs = _padded((hidden_BGTD, tokens_BGT), chunks * width)

    def one(i: Any) -> tuple[jax.Array, jax.Array]:
        return score(*_part(inputs, i, width))

    scored = jax.lax.map(one, jnp.arange(chunks)) if chunks > 1 else jax.tree.map(lambda a: a[None], one(0))
    logprobs_BGT, entropy_BGT = (jnp.moveaxis(a, 0, 2).reshape(B, G, -1)[:, :, :T] for a in scored)
    return logprobs_BGT, entropy_BGT


# token_loss(logprobs, entropy, values) -> (loss, metrics), summed over a chunk's tokens; head_loss adds the chunks.
TokenLoss = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6, 7))
def head_loss(
    token_loss: TokenLoss,
    hidden_BGTD: jax.Array,
    head_VD: jax.Array,
    tokens_BGT: jax.Array,
    values: Any,
    temperature: float = 1.0,
    forbidden: tuple[int, ...] = (),
    chunk: int = LOGIT_ROWS,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, metrics), fp32 scalars summed over all tokens. Only the loss has a gradient.

    The metrics also have the log-probability of each token, logprobs_BGT.

    Args:
      token_loss: called with (logprobs, entropy, values) of some tokens, (B, G, t) each; returns (loss, metrics) summed
        over these tokens.
      values: a tree of (B, G, T) arrays for token_loss. Neither `values` nor the entropies get a gradient.
      temperature, forbidden: as in `token_logprobs`.
      chunk: the number of rows of logits that each device holds at once.
    """
    return _head_loss(token_loss, hidden_BGTD, head_VD, tokens_BGT, values, temperature, forbidden, chunk, False)[0]


def _head_loss(
    token_loss: TokenLoss,
    hidden_BGTD: jax.Array,
    head_VD: jax.Array,
    tokens_BGT: jax.Array,
    values: Any,
    temperature: float,
    forbidden: tuple[int, ...],
    chunk: int,
    with_gradient: bool,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
    """Returns ((loss, metrics), (gradient of hidden, gradient of the head)); the gradients are () unless asked for.

    One scan over the chunks accumulates all sums.
    """
    (B, G, T, D), dtype = hidden_BGTD.shape, hidden_BGTD.dtype
    chunks, width = _chunks(hidden_BGTD, chunk)
    real_BGT = jnp.ones((B, G, T), bool)
    inputs = _padded((hidden_BGTD, tokens_BGT, values, real_BGT), chunks * width)

    def one(i: Any) -> tuple[Any, Any, jax.Array]:
        """Returns ((loss, metrics), gradients, log-probabilities) of chunk i."""
        hidden, tokens, value, real = _part(inputs, i, width)
        logprobs, entropy, log_p = _score(scaled(logits(hidden, head_VD), temperature, forbidden), tokens)

        def loss(logprobs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            return token_loss(jnp.where(real, logprobs, 0.0), jnp.where(real, entropy, 0.0), value)

        if not with_gradient:
            return loss(logprobs), (), logprobs
        totals, slope = jax.value_and_grad(loss, has_aux=True)(logprobs)
        taken = tokens[..., None] == jnp.arange(log_p.shape[-1])
        d_logits = slope[..., None] / (temperature or 1.0) * (taken.astype(jnp.float32) - jnp.exp(log_p))
        d_logits_TV = d_logits.astype(dtype).reshape(-1, log_p.shape[-1])
        d_hidden = jnp.einsum("TV,VD->TD", d_logits_TV, head_VD, **FP32).astype(dtype).reshape(hidden.shape)
        return totals, (d_hidden, jnp.einsum("TV,TD->VD", d_logits_TV, hidden.reshape(-1, D), **FP32)), logprobs

    if chunks == 1:
        (loss, metrics), grads, logprobs_BGT = one(0)
        return (loss, {**metrics, "logprobs_BGT": logprobs_BGT}), grads

    def add(carry: tuple[Any, Any], i: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        totals, grads, logprobs = one(i)
        if with_gradient:
            all_hidden = jax.lax.dynamic_update_slice_in_dim(carry[1][0], grads[0], i * width, axis=2)
            grads = (all_hidden, carry[1][1] + grads[1])
        return (jax.tree.map(jnp.add, carry[0], totals), grads), logprobs

    totals = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(one, 0)[0])
    grads = (jnp.zeros_like(inputs[0]), jnp.zeros(head_VD.shape, jnp.float32)) if with_gradient else ()
    ((loss, metrics), grads), logprobs = jax.lax.scan(add, (totals, grads), jnp.arange(chunks))
    logprobs_BGT = jnp.moveaxis(logprobs, 0, 2).reshape(B, G, -1)[:, :, :T]
    grads = (grads[0][:, :, :T], grads[1]) if with_gradient else ()
    return (loss, {**metrics, "logprobs_BGT": logprobs_BGT}), grads


def _forward(
    token_loss: TokenLoss,
    hidden_BGTD: jax.Array,
    head_VD: jax.Array,
    tokens_BGT: jax.Array,
    values: Any,
    temperature: float,
    forbidden: tuple[int, ...],
    chunk: int,
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    out, (d_hidden, d_head) = _head_loss(
        token_loss, hidden_BGTD, head_VD, tokens_BGT, values, temperature, forbidden, chunk, True
    )
    return out, (d_hidden, d_head.astype(head_VD.dtype))


def _backward(
    token_loss: TokenLoss,
    temperature: float,
    forbidden: tuple[int, ...],
    chunk: int,
    grads: tuple[jax.Array, jax.Array],
    cotangents: Any,
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_head = (cotangents[0].astype(grad.dtype) * grad for grad in grads)
    return d_hidden, d_head, None, None


head_loss.defvjp(_forward, _backward)


def _chunks(hidden_BGTD: jax.Array, chunk: int) -> tuple[int, int]:
    """Returns (number of chunks, tokens of each answer per chunk).

    Chunks divide the T axis, so the sharding of B does not change.
    """
    B, G, T, _ = hidden_BGTD.shape
    count = -(-T // max(1, chunk * ambient_shards() // (B * G)))
    return count, -(-T // count)


def _padded(tree: Any, length: int) -> Any:
    """Returns the (B, G, T, ...) arrays with T extended to this length by zeros."""

    def pad(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, 0), (0, 0), (0, length - a.shape[2])] + [(0, 0)] * (a.ndim - 3))

    return tree if length == jax.tree.leaves(tree)[0].shape[2] else jax.tree.map(pad, tree)


def _part(tree: Any, i: Any, width: int) -> Any:
    """Returns chunk i of the (B, G, T, ...) arrays."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * width, width, axis=2), tree)
