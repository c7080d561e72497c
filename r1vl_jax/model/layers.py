"""What the vision tower and the text model share: norms, rotation, attention. Statistics and softmax in fp32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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


def attend_shared(q_BGTNH, prefix, own, prefix_mask_BS, own_mask_BGTS) -> jax.Array:
    """Attention of G answers to the one prompt they share and to themselves: one softmax over both parts.

    Args:
      q_BGTNH: queries of the answers.
      prefix: (k_BSKH, v_BSKH) of the prompt, held once a group.
      own: (k_BGSKH, v_BGSKH) of the answers.
      prefix_mask_BS, own_mask_BGTS: True where a key may be seen.
    """
    B, G, T, N, H = q_BGTNH.shape
    K = prefix[0].shape[-2]
    q = q_BGTNH.reshape(B, G, T, K, N // K, H) * H**-0.5
    to_prefix = jnp.einsum("BGTKrH,BSKH->BGKrTS", q, prefix[0], preferred_element_type=jnp.float32)
    to_own = jnp.einsum("BGTKrH,BGSKH->BGKrTS", q, own[0], preferred_element_type=jnp.float32)
    low = jnp.finfo(jnp.float32).min
    to_prefix = jnp.where(prefix_mask_BS[:, None, None, None, None, :], to_prefix, low)
    to_own = jnp.where(own_mask_BGTS[:, :, None, None, :, :], to_own, low)
    top = jax.lax.stop_gradient(jnp.maximum(to_prefix.max(-1, keepdims=True), to_own.max(-1, keepdims=True)))
    to_prefix, to_own = jnp.exp(to_prefix - top), jnp.exp(to_own - top)
    total_BGKrT = to_prefix.sum(-1) + to_own.sum(-1)
    dtype = q_BGTNH.dtype
    out = jnp.einsum("BGKrTS,BSKH->BGTKrH", to_prefix.astype(dtype), prefix[1], preferred_element_type=jnp.float32)
    out += jnp.einsum("BGKrTS,BGSKH->BGTKrH", to_own.astype(dtype), own[1], preferred_element_type=jnp.float32)
    out /= jnp.moveaxis(total_BGKrT, -1, 2)[..., None]
    return out.reshape(B, G, T, N, H).astype(dtype)
