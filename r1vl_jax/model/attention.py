"""Computes the attention of prompts, of answers to a shared prompt, and of images, in three implementations.

    xla      plain matmuls: any platform, any dtype; holds all scores in memory
    cudnn    cuDNN's fused attention (jax.nn.dot_product_attention): NVIDIA GPUs, bfloat16
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
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from r1vl_jax.model.layers import FP32
from r1vl_jax.parallel.sharding import per_shard

LANES = 128  # splash takes lengths and head widths that are multiples of this


def attend_prompt(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, attention: str) -> jax.Array:
    """Computes causal self-attention within each row: (B, T, N, H). Query head n reads kv head n // (N / K)."""
    if attention == "xla":
        T = q_BTNH.shape[1]
        return _attend(q_BTNH, k_BTKH, v_BTKH, jnp.tril(jnp.ones((T, T), bool)))
    if attention == "cudnn":
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")
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
        return jax.nn.dot_product_attention(q_WPNH, k_WPNH, v_WPNH, mask=same_WPP[:, None], implementation="cudnn")
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
    # Fused kernels need the prompt's keys before each answer's keys, so one layer's prompt keys are copied per answer.
    B, G, T, _, _ = q_BGTNH.shape
    S = prefix[0].shape[2]
    q = q_BGTNH.reshape(B * G, *q_BGTNH.shape[2:])
    k, v = (
        jnp.concatenate([jnp.repeat(shared.swapaxes(1, 2), G, axis=0), own.reshape(B * G, *own.shape[2:])], axis=1)
        for shared, own in zip(prefix, (k_BGTKH, v_BGTKH), strict=True)
    )
    real_RS = jnp.repeat(jnp.arange(S) < prefix_length_B[:, None], G, axis=0)
    if attention == "cudnn":
        causal_RTT = jnp.tril(jnp.ones((B * G, T, T), bool))
        mask = jnp.concatenate([jnp.broadcast_to(real_RS[:, None], (B * G, T, S)), causal_RTT], axis=2)
        # The gradient of cuDNN's masked attention needs even lengths.
        q, k, v = (_to_multiple(a, 2, 1) for a in (q, k, v))
        mask = _to_multiple(_to_multiple(mask, 2, 1), 2, 2)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")[:, :T]
    else:
        after_prompt = lambda T, keys: splash.NumpyMask(np.arange(keys) <= np.arange(T)[:, None] + S)  # noqa: E731
        segment = jnp.concatenate([jnp.where(real_RS, 0, 1), jnp.zeros((B * G, T), jnp.int32)], axis=1)
        out = _splash(q, k, v, after_prompt, jnp.zeros((B * G, T), jnp.int32), segment)
    return out.reshape(q_BGTNH.shape)


def _to_multiple(a: jax.Array, multiple: int, *axes: int, value: int = 0) -> jax.Array:
    """Returns the array with `value` appended along these axes until their sizes are multiples of `multiple`."""
    widths = [(0, -size % multiple if axis in axes else 0) for axis, size in enumerate(a.shape)]
    return jnp.pad(a, widths, constant_values=value) if any(after for _, after in widths) else a


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
