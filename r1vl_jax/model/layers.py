"""Layers that the vision tower and the text model share: linear, norms, rotary embedding. Statistics are fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

FP32 = {"preferred_element_type": jnp.float32}  # einsum's option for fp32 sums of bf16 products


def recomputed(block: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The layer, with a limit on what it keeps for the backward pass, which recomputes the rest.

    Args:
      remat: none: it keeps everything; matmuls: the outputs of its linear layers; full: its input alone.
    """
    if remat == "none":
        return block
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "matmuls" else None
    return jax.checkpoint(block, policy=keep)


def linear(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """x (..., ins) times kernel (ins, outs); contracts the last `inputs` axes of x.

    Rows are flattened first: on a CPU the gradient of a matmul over several row axes is three times slower.
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
    """LayerNorm over the last axis, scale and bias included, all in fp32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (normed * p["scale"] + p["bias"]).astype(x.dtype)


def rope_frequencies(dim: int, theta: float) -> jax.Array:
    """theta^(-2i/dim) for i < dim/2, fp32."""
    return 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Rotary embedding: rotates the pairs (i, i + H/2) of x (..., heads, H) by angle (..., H/2), in fp32."""
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
