"""Defines layers of the vision tower and the text model: linear, norms, rotary embedding. Statistics are fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SAVED = "cudnn_attention"  # the name of what remat policies keep of cuDNN's attention
FP32 = {"preferred_element_type": jnp.float32}  # einsum's option for fp32 sums of bf16 products


def recomputed(block: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Returns the layer with a limit on the activations it stores for the backward pass, which recomputes the others.

    Args:
      remat: the activations that are stored: none: all of them (nothing is recomputed); matmuls: the outputs of linear
        layers; full: the layer's input. matmuls and full also store what cuDNN's attention returns (its output is as
        large as the layer's input), so that attention does not run again.
    """
    if remat == "none":
        return block
    keep = jax.checkpoint_policies.save_only_these_names(SAVED)
    if remat == "matmuls":
        matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        keep = jax.checkpoint_policies.save_from_both_policies(keep, matmuls)
    return jax.checkpoint(block, policy=keep)


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, inputs: int = 1) -> jax.Array:
    """Multiplies x by kernel, contracting the last `inputs` axes of x with the first `inputs` of kernel; adds bias.

    Leading axes are flattened to one first, because on CPU the gradient is otherwise three times slower.
    """
    rows, ins = x.shape[: x.ndim - inputs], kernel.shape[:inputs]
    width = math.prod(ins)
    flat = x.reshape(-1, width) @ kernel.reshape(width, -1)
    y = flat.reshape(*rows, *kernel.shape[inputs:])
    return y if bias is None else _in_fp32(jnp.add, y, bias)


def _in_fp32(operation: Callable[..., jax.Array], x: jax.Array, vector: jax.Array) -> jax.Array:
    """Returns operation(x, vector) in x's dtype.

    The value is the same as in bf16. The gradient of `vector`, a sum over all tokens, is computed in fp32: see `take`.
    """
    return operation(x.astype(jnp.float32), vector.astype(jnp.float32)).astype(x.dtype)


def take(table: jax.Array, index: jax.Array, axis: int | None = None) -> jax.Array:
    """Returns the rows of `table` (N, D) at `index` (...), or, along an axis, jnp.take_along_axis(table, index, axis).

    The gradient of a row that is taken many times is a sum of many terms. It is computed in fp32 and rounded once: a
    sum in bf16 stops growing when its terms are below a 256th of it.
    """
    wide = table.astype(jnp.float32)
    return (wide[index] if axis is None else jnp.take_along_axis(wide, index, axis)).astype(table.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Divides x by its root mean square over the last axis in fp32, casts back, then multiplies by `scale`.

    Qwen2-VL casts before it scales, too.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return _in_fp32(jnp.multiply, normed.astype(x.dtype), scale)


def layer_norm(x: jax.Array, p: dict[str, jax.Array], eps: float) -> jax.Array:
    """Applies LayerNorm over the last axis, scale and bias included, all in fp32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    scale, bias = (p[name].astype(jnp.float32) for name in ("scale", "bias"))
    return (normed * scale + bias).astype(x.dtype)


def rope_frequencies(dim: int, theta: float) -> jax.Array:
    """Returns theta^(-2i/dim) for i < dim/2, fp32."""
    return 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Applies rotary embedding: rotates the pairs (i, i + H/2) of x (..., heads, H) by angle (..., H/2), in fp32."""
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
