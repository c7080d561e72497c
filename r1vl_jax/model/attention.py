"""Computes the attention of prompts, of answers to a shared prompt, and of images, in three implementations.

    xla      plain matmuls: any platform, any dtype; holds all scores in memory
    cudnn    cuDNN's fused attention: NVIDIA GPUs, bfloat16
    splash   Pallas' splash attention: TPUs

`ModelConfig.attention` names the implementation; if it cannot run, it raises an error. All three scale scores by
H^-1/2 and take the softmax in fp32. Rows are padded at their ends (see qwen2_vl.right_padded), so the causal mask alone
hides the padding. r1vl_kernels.prefix_decode_attention computes the attention of one new token to the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from r1vl_jax.model import cudnn
from r1vl_jax.model.layers import FP32, SAVED
from r1vl_jax.parallel.sharding import per_shard

LANES = 128  # splash takes lengths and head widths that are multiples of this


def attend_prompt(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, attention: str) -> jax.Array:
    """Computes causal self-attention within each row: (B, T, N, H). Query head n reads kv head n // (N / K)."""
    if attention == "xla":
        T = q_BTNH.shape[1]
        return _attend(q_BTNH, k_BTKH, v_BTKH, jnp.tril(jnp.ones((T, T), bool)))
    if attention == "cudnn":
        return _cudnn(q_BTNH, cudnn.Part(k_BTKH, v_BTKH, causal=True))
    segment_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
    return _splash(q_BTNH, k_BTKH, v_BTKH, lambda T, S: splash.CausalMask((T, S)), segment_BT, segment_BT)


def attend_frames(
    q_WPNH: jax.Array, k_WPNH: jax.Array, v_WPNH: jax.Array, segment_WP: jax.Array, attention: str
) -> jax.Array:
    """Computes attention of patches within their own frame: (W, P, N, H). A vision row may hold several frames."""
    if attention == "splash":
        whole = lambda T, S: splash.FullMask((T, S))  # noqa: E731
        return _splash(q_WPNH, k_WPNH, v_WPNH, whole, segment_WP, segment_WP, pad_segment=-1)
    same_WPP = segment_WP[:, :, None] == segment_WP[:, None, :]  # padding attends to padding; its output is unused
    if attention == "cudnn":
        low = jnp.asarray(0.7 * float(jnp.finfo(q_WPNH.dtype).min), q_WPNH.dtype)
        bias_W1PP = jnp.where(same_WPP, jnp.zeros((), q_WPNH.dtype), low)[:, None]
        return _cudnn(q_WPNH, cudnn.Part(k_WPNH, v_WPNH, bias=bias_W1PP))
    return _attend(q_WPNH, k_WPNH, v_WPNH, same_WPP[:, None])


def attend_shared(
    q_BGTNH: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    k_BGTKH: jax.Array,
    v_BGTKH: jax.Array,
    prefix_length_B: jax.Array,
    attention: str,
) -> jax.Array:
    """Computes attention of G answers to the prompt they share and, causally, to themselves, in one softmax.

    Args:
      q_BGTNH, k_BGTKH, v_BGTKH: queries, keys and values of the answers.
      prefix: (k_BKSH, v_BKSH) of the prompt, stored once per group.
      prefix_length_B: the number of real (not padding) keys of each prompt.
    Returns:
      (B, G, T, N, H).
    """
    if attention == "xla":
        return _attend_shared(q_BGTNH, prefix, k_BGTKH, v_BGTKH, prefix_length_B)
    if attention == "cudnn":
        return _cudnn_shared(q_BGTNH, tuple(prefix), k_BGTKH, v_BGTKH, prefix_length_B)
    # Splash needs the prompt's keys before each answer's keys, so one layer's prompt keys are copied per answer.
    B, G, T, _, _ = q_BGTNH.shape
    S = prefix[0].shape[2]
    q = q_BGTNH.reshape(B * G, *q_BGTNH.shape[2:])
    k, v = (
        jnp.concatenate([jnp.repeat(shared.swapaxes(1, 2), G, axis=0), own.reshape(B * G, *own.shape[2:])], axis=1)
        for shared, own in zip(prefix, (k_BGTKH, v_BGTKH), strict=True)
    )
    real_RS = jnp.repeat(jnp.arange(S) < prefix_length_B[:, None], G, axis=0)
    after_prompt = lambda T, keys: splash.NumpyMask(np.arange(keys) <= np.arange(T)[:, None] + S)  # noqa: E731
    segment = jnp.concatenate([jnp.where(real_RS, 0, 1), jnp.zeros((B * G, T), jnp.int32)], axis=1)
    return _splash(q, k, v, after_prompt, jnp.zeros((B * G, T), jnp.int32), segment).reshape(q_BGTNH.shape)


def _to_multiple(a: jax.Array, multiple: int, *axes: int, value: int = 0) -> jax.Array:
    """Returns the array with `value` appended along these axes until their sizes are multiples of `multiple`."""
    widths = [(0, -size % multiple if axis in axes else 0) for axis, size in enumerate(a.shape)]
    return jnp.pad(a, widths, constant_values=value) if any(after for _, after in widths) else a


# cuDNN: the softmax over prompt and answer is two calls, whose results are merged (see model.cudnn). Their output and
# logsumexp have the name SAVED, by which layers.recomputed keeps them.


def _cudnn(q_BTNH: jax.Array, part: cudnn.Part) -> jax.Array:
    """Computes attention of the queries to one part that is their whole softmax."""

    @jax.custom_vjp
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, length: Any, bias: Any) -> jax.Array:
        return cudnn.forward(q, cudnn.Part(k, v, length, bias, part.causal))[0]

    def attend_forward(*arrays: Any) -> tuple[jax.Array, Any]:
        q, k, v, length, bias = arrays
        out, lse = cudnn.forward(q, cudnn.Part(k, v, length, bias, part.causal))
        out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
        return out, (arrays, out, lse)

    def attend_backward(saved: Any, d_out: jax.Array) -> tuple[Any, ...]:
        (q, k, v, length, bias), out, lse = saved
        return *cudnn.backward(q, cudnn.Part(k, v, length, bias, part.causal), lse, out, d_out), None, None

    attend.defvjp(attend_forward, attend_backward)
    return attend(q_BTNH, *part[:4])


@jax.custom_vjp
def _cudnn_shared(
    q_BGTNH: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    k_BGTKH: jax.Array,
    v_BGTKH: jax.Array,
    prefix_length_B: jax.Array,
) -> jax.Array:
    """Computes `attend_shared`: the queries of a group read its prompt in one call, and each answer in another."""
    return _cudnn_shared_forward(q_BGTNH, prefix, k_BGTKH, v_BGTKH, prefix_length_B)[0]


def _parts(
    prefix: tuple[jax.Array, jax.Array], k_BGTKH: jax.Array, v_BGTKH: jax.Array, prefix_length_B: jax.Array
) -> tuple[cudnn.Part, cudnn.Part]:
    k_prefix, v_prefix = (a.swapaxes(1, 2) for a in prefix)
    k_own, v_own = (a.reshape(-1, *a.shape[2:]) for a in (k_BGTKH, v_BGTKH))
    return cudnn.Part(k_prefix, v_prefix, prefix_length_B), cudnn.Part(k_own, v_own, causal=True)


def _cudnn_shared_forward(q_BGTNH: jax.Array, *keys: Any) -> tuple[jax.Array, Any]:
    B, G, T, N, H = q_BGTNH.shape
    prompt, own = _parts(*keys)
    prompt_out, prompt_lse = cudnn.forward(q_BGTNH.reshape(B, G * T, N, H), prompt)
    own_out, own_lse = cudnn.forward(q_BGTNH.reshape(B * G, T, N, H), own)
    lses = prompt_lse.reshape(B, N, G, T).transpose(0, 2, 3, 1), own_lse.reshape(B, G, N, T).swapaxes(2, 3)
    lse_BGTN = jnp.logaddexp(*lses)
    weights = [jnp.exp(lse - lse_BGTN)[..., None] for lse in lses]
    outs = [part.reshape(q_BGTNH.shape).astype(jnp.float32) for part in (prompt_out, own_out)]
    out = (weights[0] * outs[0] + weights[1] * outs[1]).astype(q_BGTNH.dtype)
    out, lse_BGTN = checkpoint_name(out, SAVED), checkpoint_name(lse_BGTN, SAVED)
    return out, (q_BGTNH, keys, out, lse_BGTN)


def _cudnn_shared_backward(saved: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q_BGTNH, keys, out, lse_BGTN = saved
    B, G, T, N, H = q_BGTNH.shape
    prompt, own = _parts(*keys)
    for_prompt, for_own = (B, G * T, N, H), (B * G, T, N, H)
    prompt_lse, own_lse = lse_BGTN.transpose(0, 3, 1, 2).reshape(B, N, -1), lse_BGTN.swapaxes(2, 3).reshape(-1, N, T)
    d_prompt_q, d_prompt_k, d_prompt_v = cudnn.backward(
        q_BGTNH.reshape(for_prompt), prompt, prompt_lse, out.reshape(for_prompt), d_out.reshape(for_prompt)
    )
    d_own_q, d_own_k, d_own_v = cudnn.backward(
        q_BGTNH.reshape(for_own), own, own_lse, out.reshape(for_own), d_out.reshape(for_own)
    )
    d_q = d_prompt_q.reshape(q_BGTNH.shape) + d_own_q.reshape(q_BGTNH.shape)
    d_prefix = d_prompt_k.swapaxes(1, 2), d_prompt_v.swapaxes(1, 2)
    return d_q, d_prefix, d_own_k.reshape(keys[1].shape), d_own_v.reshape(keys[2].shape), None


_cudnn_shared.defvjp(_cudnn_shared_forward, _cudnn_shared_backward)


# XLA: plain batched matmuls; the queries of a kv head are merged into the rows of one matmul (Q). On a CPU this is
# twice as fast as an einsum over separate axes.


def _attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes attention to the keys for which `mask`, (T, S) or (B, 1, T, S), is True.

    A query whose mask has no True gets finite values without meaning.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKQH = jnp.moveaxis((q_BTNH * H**-0.5).reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BSKH.swapaxes(1, 2), **FP32).reshape(B, N, T, -1)
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min)).astype(v_BSKH.dtype)
    out = jnp.einsum("BKQS,BKSH->BKQH", weights.reshape(B, K, -1, k_BSKH.shape[1]), v_BSKH.swapaxes(1, 2), **FP32)
    return out.astype(q_BTNH.dtype).reshape(B, N, T, H).swapaxes(1, 2)


def _attend_shared(
    q_BGTNH: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    k_BGTKH: jax.Array,
    v_BGTKH: jax.Array,
    prefix_length_B: jax.Array,
) -> jax.Array:
    """Computes `attend_shared` with plain matmuls. All answers of a group read the prompt's keys in one matmul."""
    B, G, T, N, H = q_BGTNH.shape
    K = k_BGTKH.shape[3]
    E = N // K
    dtype, low = q_BGTNH.dtype, jnp.finfo(jnp.float32).min
    k_prefix, v_prefix = prefix
    k_own, v_own = (jnp.moveaxis(a, 3, 1) for a in (k_BGTKH, v_BGTKH))
    q_BKGQH = jnp.moveaxis((q_BGTNH * H**-0.5).reshape(B, G, T, K, E, H), (3, 4), (1, 3)).reshape(B, K, G, -1, H)

    to_prefix = jnp.einsum("BKQH,BKSH->BKQS", q_BKGQH.reshape(B, K, -1, H), k_prefix, **FP32)
    to_own = jnp.einsum("BKGQH,BKGSH->BKGQS", q_BKGQH, k_own, **FP32)
    real_BS = jnp.arange(k_prefix.shape[2]) < prefix_length_B[:, None]
    to_prefix = jnp.where(real_BS[:, None, None], to_prefix, low).reshape(*to_own.shape[:4], -1)
    to_own = jnp.where(jnp.tile(jnp.tril(jnp.ones((T, T), bool)), (E, 1)), to_own, low)
    top = jax.lax.stop_gradient(jnp.maximum(to_prefix.max(-1, keepdims=True), to_own.max(-1, keepdims=True)))
    to_prefix, to_own = jnp.exp(to_prefix - top), jnp.exp(to_own - top)
    total = to_prefix.sum(-1, keepdims=True) + to_own.sum(-1, keepdims=True)

    out = jnp.einsum("BKQS,BKSH->BKQH", to_prefix.astype(dtype).reshape(B, K, -1, k_prefix.shape[2]), v_prefix, **FP32)
    out = out.reshape(q_BKGQH.shape) + jnp.einsum("BKGQS,BKGSH->BKGQH", to_own.astype(dtype), v_own, **FP32)
    out = (out / total).astype(dtype).reshape(B, K, G, E, T, H)
    return jnp.moveaxis(out, (1, 3), (3, 4)).reshape(B, G, T, N, H)


# Splash: lengths and head widths are padded to multiples of LANES.


def _splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Callable[[int, int], Any],
    q_segment_BT: jax.Array,
    segment_BS: jax.Array,
    *,
    pad_segment: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Computes splash attention within segments; `mask(T, S)` returns the static mask for the padded sizes."""
    _, T, _, H = q_BTNH.shape
    q, k, v = (_to_multiple(a.swapaxes(1, 2), LANES, 2, 3) for a in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
    segments = splash.SegmentIds(*(_to_multiple(a, LANES, 1, value=pad_segment) for a in (q_segment_BT, segment_BS)))

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, segments: splash.SegmentIds) -> Any:
        heads = splash.MultiHeadMask([mask(q.shape[2], k.shape[2])] * q.shape[1])
        kernel = splash.make_splash_mha_single_device(heads, interpret=interpret)
        return jax.vmap(lambda *row: kernel(*row[:3], segment_ids=row[3]))(q, k, v, segments)

    by_heads, by_kv_heads = ("batch", "heads", None, None), ("batch", "kv_heads", None, None)
    out = per_shard(rows, (by_heads, by_kv_heads, by_kv_heads, ("batch", None)), by_heads)(q, k, v, segments)
    return out[:, :, :T, :H].swapaxes(1, 2)
