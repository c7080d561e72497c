"""What the vision tower and the text model share: norms, rotation, attention. Statistics and softmax in fp32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def linear(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """x (..., ins) times kernel (ins, outs), contracting the last `inputs` axes of x.

    Rows are flattened first: the gradient of a matmul over several row axes is three times slower on a CPU.
    """
    rows, ins = x.shape[: x.ndim - inputs], kernel.shape[:inputs]
    width = math.prod(ins)
    flat = x.reshape(-1, width) @ kernel.reshape(width, -1)
    return flat.reshape(*rows, *kernel.shape[inputs:])


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis in fp32, cast back, times `scale` (Qwen2-VL casts before it scales)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return scale * normed.astype(x.dtype)


def layer_norm(x: jax.Array, p: dict[str, jax.Array], eps: float) -> jax.Array:
    """LayerNorm over the last axis, all of it in fp32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (normed * p["scale"] + p["bias"]).astype(x.dtype)


def rope_frequencies(dim: int, theta: float) -> jax.Array:
    """theta^(-2i/dim) for i < dim/2, fp32."""
    return 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Rotary embedding: pairs (i, i + H/2) of x[..., heads, H] turn by angle[..., H/2], in fp32."""
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention, scaled by H^-1/2. A query whose mask is empty gets a finite value that means nothing."""
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None])


def attend_shared(q_BGTNH, prefix, own, prefix_mask_BS, own_mask_TS) -> jax.Array:
    """Attention of G answers to the one prompt they share and to themselves: one softmax over both parts.

    Written as plain batched matmuls, queries of a kv head merged into rows: twice as fast as einsums on a CPU.

    Args:
      q_BGTNH: queries of the answers.
      prefix: (k_BSKH, v_BSKH) of the prompt, held once a group.
      own: (k_BGSKH, v_BGSKH) of the answers.
      prefix_mask_BS: True where a key may be seen; own_mask_TS: likewise, the same for all answers.
    """
    B, G, T, N, H = q_BGTNH.shape
    K = own[0].shape[-2]
    r = N // K
    dtype, f32 = q_BGTNH.dtype, {"preferred_element_type": jnp.float32}
    q = jnp.moveaxis((q_BGTNH * H**-0.5).reshape(B, G, T, K, r, H), 3, 1).reshape(B, K, G, T * r, H)
    k_prefix, v_prefix = (a.swapaxes(1, 2) for a in prefix)
    k_own, v_own = (jnp.moveaxis(a, 3, 1) for a in own)

    to_prefix = jnp.einsum("BKQH,BKSH->BKQS", q.reshape(B, K, -1, H), k_prefix, **f32).reshape(B, K, G, T * r, -1)
    to_own = jnp.einsum("BKGQH,BKGSH->BKGQS", q, k_own, **f32)
    low = jnp.finfo(jnp.float32).min
    to_prefix = jnp.where(prefix_mask_BS[:, None, None, None, :], to_prefix, low)
    to_own = jnp.where(jnp.repeat(own_mask_TS, r, axis=0), to_own, low)
    top = jax.lax.stop_gradient(jnp.maximum(to_prefix.max(-1, keepdims=True), to_own.max(-1, keepdims=True)))
    to_prefix, to_own = jnp.exp(to_prefix - top), jnp.exp(to_own - top)
    total = to_prefix.sum(-1, keepdims=True) + to_own.sum(-1, keepdims=True)

    out = jnp.einsum("BKQS,BKSH->BKQH", to_prefix.astype(dtype).reshape(B, K, G * T * r, -1), v_prefix, **f32)
    out = out.reshape(B, K, G, T * r, H) + jnp.einsum("BKGQS,BKGSH->BKGQH", to_own.astype(dtype), v_own, **f32)
    out = (out / total).astype(dtype).reshape(B, K, G, T, r, H)
    return jnp.moveaxis(out, 1, 3).reshape(B, G, T, N, H)
