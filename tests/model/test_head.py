"""The loss head: chunks, its gradient taken in the forward pass, and what it holds in memory."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1vl_jax.model import head
from r1vl_jax.model.head import head_loss, logits, scaled, softmax_sums, token_logprobs
from r1vl_jax.step_grpo.loss import Objective, policy_loss

B, G, T, D, V = 2, 3, 11, 16, 40
FORBIDDEN, TEMPERATURE = (3, 38), 1.7
TOKEN_LOSS = partial(policy_loss, objective=Objective(TEMPERATURE, 0.3), backend="reference")


def inputs(T=T, V=V, dtype=jnp.float32):
    """(hidden, head, tokens, what the loss needs): ragged answers, garbage in the reference behind them."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < rng.integers(1, T + 1, (B, G, 1))
    tokens = rng.choice([v for v in range(V) if v not in FORBIDDEN], (B, G, T))
    values = {
        "ref": np.where(mask, -rng.uniform(1, 6, mask.shape), np.inf),
        "advantage": np.broadcast_to(rng.normal(size=(B, G, 1)), mask.shape),
        "weight": mask / mask.sum(-1, keepdims=True) / (B * G),
    }
    hidden, head = rng.normal(size=(B, G, T, D)), rng.normal(size=(V, D))
    values = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), values)
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(tokens, jnp.int32), values


def test_logprobs_by_definition():
    """float64 log softmax of z / T without the forbidden ids, and its entropy; the same in chunks of any size."""
    hidden, head, tokens, _ = inputs()
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / TEMPERATURE
    z[..., list(FORBIDDEN)] = -np.inf
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    entropy = -np.sum(np.where(np.isfinite(log_p), np.exp(log_p) * np.where(np.isfinite(log_p), log_p, 0), 0), -1)
    for chunk in (1, 7, 12, 36, 1000):
        got, got_entropy = token_logprobs(
            hidden, head, tokens, temperature=TEMPERATURE, forbidden=FORBIDDEN, chunk=chunk
        )
        np.testing.assert_allclose(got, np.take_along_axis(log_p, np.asarray(tokens)[..., None], -1)[..., 0], rtol=1e-5)
        np.testing.assert_allclose(got_entropy, entropy, rtol=1e-5)
    z = scaled(logits(hidden, head), TEMPERATURE, FORBIDDEN)
    assert np.isneginf(z[..., list(FORBIDDEN)]).all() and np.isfinite(z).sum() == hidden[..., 0].size * 38


def test_one_pass_equals_the_plain_sums():
    """What a GPU runs: rows with forbidden tokens, one with a single token left, one with none, one far from 0."""
    z = np.random.default_rng(1).normal(size=(2, 3, 300)).astype(np.float32) * 9
    z[0, 0, ::3], z[0, 1, 1:], z[0, 2], z[1, 0] = -np.inf, -np.inf, -np.inf, z[1, 0] + 1e4
    for with_entropy in (True, False):
        one, plain = (jax.jit(partial(f, with_entropy=with_entropy))(z) for f in (head._one_pass, head._plain_sums))
        assert len(one) == len(plain) == 2 + with_entropy
        seen = np.ones((2, 3), bool)
        seen[0, 2] = False  # without a token there is nothing to compare, but nothing that is not a number either
        for a, b in zip(one, plain, strict=True):
            np.testing.assert_allclose(a[seen], b[seen], rtol=1e-5)
            assert np.isfinite(a).all()


def test_gradient_of_the_sums():
    """Of log sum e^z and of the entropy, against those that jax derives from their definitions."""
    z = jnp.asarray(np.random.default_rng(2).normal(size=(4, 30)) * 3, jnp.float32).at[:, 7].set(-jnp.inf)
    away = jnp.asarray(np.random.default_rng(3).normal(size=4), jnp.float32)

    def ours(z, entropy):
        top, log_total, entropies = softmax_sums(z)
        return jnp.sum(away * (entropies if entropy else top + log_total))

    def plain(z, entropy):
        log_p = jax.nn.log_softmax(z)
        return jnp.sum(away * (-jnp.sum(jnp.exp(log_p) * log_p, -1) if entropy else jax.nn.logsumexp(z, axis=-1)))

    z_real = jnp.delete(z, 7, axis=1)
    for entropy in (False, True):
        got, want = jax.grad(ours)(z, entropy), jax.grad(plain)(z_real, entropy)
        np.testing.assert_allclose(jnp.delete(got, 7, axis=1), want, atol=1e-5)
        np.testing.assert_array_equal(got[:, 7], 0.0)


@pytest.mark.parametrize("chunk", [1, 7, 12, 36, 1000])
def test_loss_and_gradient_are_those_of_the_plain_form(chunk):
    hidden, head, tokens, values = inputs()

    def plain(hidden, head):
        return TOKEN_LOSS(*token_logprobs(hidden, head, tokens, temperature=TEMPERATURE, forbidden=FORBIDDEN), values)

    def once(hidden, head):
        return head_loss(TOKEN_LOSS, hidden, head, tokens, values, TEMPERATURE, FORBIDDEN, chunk)

    (want, metrics), gradients = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(hidden, head)
    (got, got_metrics), got_gradients = jax.value_and_grad(once, argnums=(0, 1), has_aux=True)(hidden, head)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(once(hidden, head)[0], want, rtol=1e-5)
    for name in ("loss", "kl", "entropy"):
        np.testing.assert_allclose(got_metrics[name], metrics[name], rtol=1e-5)
    for a, b in zip(got_gradients, gradients, strict=True):
        assert a.dtype == b.dtype and float(jnp.abs(b).max()) > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    # Scaled by what stands behind the loss, as any gradient is.
    twice = jax.grad(lambda hidden: 2 * once(hidden, head)[0])(hidden)
    np.testing.assert_allclose(twice, 2 * got_gradients[0], rtol=1e-6)


def test_bfloat16():
    """Statistics and the sum over chunks are fp32: bfloat16 inputs cost no more than their own rounding."""
    exact = inputs()
    hidden, head = (a.astype(jnp.bfloat16) for a in exact[:2])

    def loss(hidden, head):
        return head_loss(TOKEN_LOSS, hidden, head, *exact[2:], TEMPERATURE, FORBIDDEN, 12)[0]

    grads = jax.grad(loss, argnums=(0, 1))(hidden, head)
    wants = jax.grad(loss, argnums=(0, 1))(*(a.astype(jnp.float32) for a in (hidden, head)))
    for got, want in zip(grads, wants, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02 * float(jnp.abs(want).max()))


def compiled_bytes(T, chunk, gradient):
    hidden, head, tokens, values = inputs(T=T, V=4096)

    def once(hidden, head):
        return head_loss(TOKEN_LOSS, hidden, head, tokens, values, TEMPERATURE, FORBIDDEN, chunk)

    if gradient:
        once = jax.value_and_grad(once, argnums=(0, 1), has_aux=True)
    return jax.jit(once).lower(hidden, head).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_does_not_grow_with_rows(gradient):
    """Beyond the chunk: what eight times the rows take more is far from another chunk's logits, let alone their own.

    64 tokens an answer are a chunk of 384 rows: logits of 6.3 MB. Two chunks against sixteen, of 100 MB.
    """
    small, large = (compiled_bytes(T, chunk=64 * B * G, gradient=gradient) for T in (128, 1024))
    logits = 64 * B * G * 4096 * 4
    assert small > logits  # a chunk's logits are there, so the analysis sees them
    rows = 1024 * B * G * D * 4  # of the hidden states, which the gradient has in full
    assert large - small < (2 * rows if gradient else rows) < 0.2 * logits
    whole = compiled_bytes(1024, chunk=10**9, gradient=gradient)
    assert whole > 10 * large  # without chunks the analysis sees them all
