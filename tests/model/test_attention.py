"""Attention by its definition, on every implementation that this machine can run, and the choice among them."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1vl_jax.model import attention, backend, cudnn, layers

B, G, T, S, N, K, H = 2, 3, 10, 12, 4, 2, 16
LENGTHS = np.array([7, 12], np.int32)
SEGMENT_RP = np.array([[0] * 4 + [1] * 8 + [-1] * 8, [0] * 20], np.int32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_definition(q_TNH, k_SKH, v_SKH, mask_TS):
    """softmax(q k / sqrt(H)) v of one row in float64, head by head."""
    q, k, v = (np.asarray(a, np.float64) for a in (q_TNH, k_SKH, v_SKH))
    out = np.zeros(q.shape)
    for n in range(q.shape[1]):
        kv = n // (q.shape[1] // k.shape[1])
        scores = np.where(mask_TS, q[:, n] @ k[:, kv].T / np.sqrt(q.shape[2]), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, n] = weights / weights.sum(axis=1, keepdims=True) @ v[:, kv]
    return out


def prompt():
    return [normal(0, B, T, N, H), normal(1, B, T, K, H), normal(2, B, T, K, H)]


def frames():
    return [normal(i, *SEGMENT_RP.shape, N, H) for i in range(3)]


def answers():
    """Queries, the prompt's keys and values (garbage behind its length), the answers' own."""
    garbage = (np.arange(S) >= LENGTHS[:, None])[:, None, :, None] * 1e4
    shared = [normal(i, B, K, S, H) + garbage for i in (1, 2)]
    return [normal(0, B, G, T, N, H), *shared, normal(3, B, G, T, K, H), normal(4, B, G, T, K, H)]


def shared(q, k_prefix, v_prefix, k, v, *, by):
    return attention.attend_shared(q, (k_prefix, v_prefix), k, v, jnp.asarray(LENGTHS), by)


def scores_of(q, part):
    """Scores (B, N, T, S) of a part's keys, with its masks, in fp32."""
    E = q.shape[2] // part.k_BSKH.shape[2]
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(part.k_BSKH, E, axis=2)) * q.shape[3] ** -0.5
    keys = jnp.arange(scores.shape[3])
    if part.causal:
        scores = jnp.where(keys <= jnp.arange(scores.shape[2])[:, None], scores, -jnp.inf)
    if part.length_B is not None:
        scores = jnp.where(keys < part.length_B[:, None, None, None], scores, -jnp.inf)
    return scores if part.bias is None else scores + part.bias


def stand_in_forward(q, part):
    """What cuDNN computes, by its definition."""
    scores, E = scores_of(q, part), q.shape[2] // part.v_BSKH.shape[2]
    lse = jax.nn.logsumexp(scores, axis=3)
    return jnp.einsum("BNTS,BSNH->BTNH", jnp.exp(scores - lse[..., None]), jnp.repeat(part.v_BSKH, E, axis=2)), lse


def stand_in_backward(q, part, lse, out, d_out):
    """FlashAttention-2's backward pass, from a logsumexp and an output that may be those of more keys."""
    E, scale = q.shape[2] // part.k_BSKH.shape[2], q.shape[3] ** -0.5
    k, v = (jnp.repeat(a, E, axis=2) for a in part[:2])
    p = jnp.exp(scores_of(q, part) - lse[..., None])
    row = jnp.einsum("BTNH,BTNH->BNT", d_out, out)
    d_scores = p * (jnp.einsum("BTNH,BSNH->BNTS", d_out, v) - row[..., None]) * scale
    d_k, d_v = jnp.einsum("BNTS,BTNH->BSNH", d_scores, q), jnp.einsum("BNTS,BTNH->BSNH", p, d_out)
    d_k, d_v = (a.reshape(*a.shape[:2], -1, E, a.shape[3]).sum(3) for a in (d_k, d_v))
    return jnp.einsum("BNTS,BSNH->BTNH", d_scores, k), d_k, d_v


@pytest.fixture(params=["xla", "splash", "cudnn"])
def by(request, monkeypatch):
    """An implementation; splash in interpret mode, cuDNN's calls by their definition."""
    monkeypatch.setattr(attention, "_splash", partial(attention._splash, interpret=True))
    monkeypatch.setattr(cudnn, "forward", stand_in_forward)
    monkeypatch.setattr(cudnn, "backward", stand_in_backward)
    return request.param


def test_prompts(by):
    q, k, v = prompt()
    got = attention.attend_prompt(q, k, v, by)
    for b in range(B):
        want = by_definition(q[b], k[b], v[b], np.tril(np.ones((T, T), bool)))
        np.testing.assert_allclose(got[b], want, atol=1e-5)


def test_frames(by):
    """A patch looks at those of its own frame; what padding gets does not matter."""
    q, k, v = frames()
    got = np.asarray(attention.attend_frames(q, k, v, jnp.asarray(SEGMENT_RP), by))
    for r, segment in enumerate(SEGMENT_RP):
        want = by_definition(q[r], k[r], v[r], segment[:, None] == segment)
        np.testing.assert_allclose(got[r][segment >= 0], want[segment >= 0], atol=1e-5)
    assert np.isfinite(got).all()


def test_answers_behind_the_prompt_they_share(by):
    q, k_prefix, v_prefix, k, v = answers()
    got = shared(q, k_prefix, v_prefix, k, v, by=by)
    causal = np.tril(np.ones((T, T), bool))
    for b, g in np.ndindex(B, G):
        keys, values = (
            np.concatenate([np.moveaxis(prefix[b, :, : LENGTHS[b]], 0, 1), own[b, g]])
            for prefix, own in ((np.asarray(k_prefix), k), (np.asarray(v_prefix), v))
        )
        mask = np.concatenate([np.ones((T, LENGTHS[b]), bool), causal], axis=1)
        np.testing.assert_allclose(got[b, g], by_definition(q[b, g], keys, values, mask), atol=1e-5)


@pytest.mark.parametrize("what", ["prompt", "frames", "answers"])
def test_gradients_agree(what, by):
    """Of xla and of the others, to 1e-5; garbage behind a prompt's length has none."""
    call, inputs, real = {
        "prompt": (lambda *a, by: attention.attend_prompt(*a, by), prompt(), 1.0),
        "frames": (
            lambda *a, by: attention.attend_frames(*a, jnp.asarray(SEGMENT_RP), by), frames(),
            jnp.asarray(SEGMENT_RP >= 0, jnp.float32)[..., None, None],
        ),
        "answers": (shared, answers(), 1.0),
    }[what]  # fmt: skip
    away = normal(9, *inputs[0].shape) * real  # a direction, so that no gradient is 0 by symmetry

    def gradients(by):
        return jax.grad(lambda inputs: jnp.sum(call(*inputs, by=by) * away))(inputs)

    xla = gradients("xla")
    for a, b in zip(xla, gradients(by), strict=True):
        assert float(jnp.abs(a).max()) > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()))
    if what == "answers":
        np.testing.assert_array_equal(xla[1][0, :, LENGTHS[0] :], 0.0)


def test_splash_lowers_for_tpus():
    q, k_prefix, v_prefix, k, v = (a.astype(jnp.bfloat16) for a in answers())

    def loss(q, k, v):
        return jnp.sum(shared(q, k_prefix, v_prefix, k, v, by="splash").astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") >= 3  # forward, dq, dkv


@pytest.mark.parametrize("remat", ["none", "matmuls", "full"])
def test_cudnn_calls(remat):
    """What a GPU is asked for: two forward calls, which the backward pass does not repeat, and two backward calls."""
    q, k_prefix, v_prefix, k, v = (a.astype(jnp.bfloat16) for a in answers())

    def layer(q, k, v):
        return shared(jnp.sin(q), k_prefix, v_prefix, k, v, by="cudnn")

    def loss(q, k, v):
        return jnp.sum(jnp.sin(layers.recomputed(layer, remat)(q, k, v)).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in lowered.splitlines() if "@__cudnn$fmha" in line]
    assert ["Backward" in line for line in calls] == [False, False, True, True]
    masks = [re.search(r"mask_type\\22: \\22([A-Z_]+)", line).group(1) for line in calls]
    assert masks[:2] == ["PADDING", "CAUSAL"] and sorted(masks[2:]) == ["CAUSAL", "PADDING"]
    assert all(f"fmha_scale\\22: {H**-0.5}," in line for line in calls)


def test_what_is_named_runs_or_raises():
    """On this CPU neither fused kernel falls back to another implementation."""
    q, k, v = (a.astype(jnp.bfloat16) for a in prompt())
    for name, message in (("cudnn", "not found for platform cpu"), ("splash", "interpret mode")):
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(attention.attend_prompt(q, k, v, name))


@pytest.mark.parametrize(
    "platform, dtype, chosen",
    [
        ("cpu", "bfloat16", ("xla", "reference", 256)),
        ("cpu", "float32", ("xla", "reference", 256)),
        ("gpu", "bfloat16", ("cudnn", "pallas", 4096)),
        ("gpu", "float32", ("xla", "pallas", 4096)),
        ("tpu", "bfloat16", ("splash", "pallas", 4096)),
    ],
)
def test_auto(platform, dtype, chosen):
    assert backend.choose("auto", "auto", dtype=dtype, platform=platform) == chosen
    assert backend.choose("xla", "reference", dtype=dtype, platform=platform)[:2] == ("xla", "reference")


@pytest.mark.parametrize(
    "attention, kernels, dtype, platform, message",
    [
        ("cudnn", "auto", "bfloat16", "cpu", "model.attention cudnn needs a gpu, not a cpu"),
        ("splash", "auto", "bfloat16", "gpu", "model.attention splash needs a tpu, not a gpu"),
        ("cudnn", "auto", "float32", "gpu", "cudnn needs model.dtype bfloat16, it is float32"),
        ("auto", "pallas", "bfloat16", "cpu", "model.kernels pallas needs a gpu or a tpu, not a cpu"),
    ],
)
def test_what_cannot_run_here(attention, kernels, dtype, platform, message):
    with pytest.raises(ValueError, match=message):
        backend.choose(attention, kernels, dtype=dtype, platform=platform)
