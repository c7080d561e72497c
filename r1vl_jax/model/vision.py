"""Runs the vision tower, from image patches to merged image tokens. Images are packed: one row may hold several.

A row holds the patches of its images one image after another. `segment` numbers the frames, and a patch attends to all
patches of its own frame and to no others, as in Qwen2-VL.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from r1vl_jax.model.attention import attend_frames
from r1vl_jax.model.config import VisionConfig
from r1vl_jax.model.layers import layer_norm, linear, recomputed, rope_frequencies, rotate
from r1vl_jax.parallel.sharding import constrain


def quick_gelu(x: jax.Array) -> jax.Array:
    """Returns x * sigmoid(1.702 x), CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def normalise(patches_WPC: jax.Array, cfg: VisionConfig) -> jax.Array:
    """Returns (x / 255 - mean) / std in fp32 for uint8 pixels. Floats, already normalised, are returned unchanged."""
    if patches_WPC.dtype != jnp.uint8:
        return patches_WPC
    mean_C, std_C = (
        jnp.repeat(jnp.array(values, jnp.float32), cfg.patch_dim // cfg.channels)
        for values in (cfg.pixel_mean, cfg.pixel_std)
    )
    return (patches_WPC.astype(jnp.float32) / 255 - mean_C) / std_C


def vision_angles(hw_WP2: jax.Array, cfg: VisionConfig) -> jax.Array:
    """Returns 2-D rotary angles (W, P, H/2): the first H/4 rotate by h, the others by w."""
    frequencies = rope_frequencies(cfg.head_dim // 2, cfg.rope_theta)
    angle = hw_WP2[..., None].astype(jnp.float32) * frequencies  # (W, P, 2, H/4)
    return angle.reshape(*hw_WP2.shape[:-1], -1)


def _block(
    x_WPD: jax.Array,
    p: dict[str, Any],
    *,
    angle: jax.Array,
    segment_WP: jax.Array,
    cfg: VisionConfig,
    attention: str,
) -> tuple[jax.Array, None]:
    h = layer_norm(x_WPD, p["norm1"], cfg.norm_eps)
    q, k, v = jnp.moveaxis(linear(h, **p["qkv"]), 2, 0)
    attended = attend_frames(rotate(q, angle), rotate(k, angle), v, segment_WP, attention)
    x_WPD = x_WPD + linear(attended, **p["proj"], inputs=2)
    h = layer_norm(x_WPD, p["norm2"], cfg.norm_eps)
    h = quick_gelu(linear(h, **p["fc1"]))
    x_WPD = x_WPD + linear(h, **p["fc2"])
    return constrain(x_WPD, "batch", None, None), None


def encode_images(
    params: dict[str, Any],
    cfg: VisionConfig,
    patches_WPC: jax.Array,
    hw_WP2: jax.Array,
    segment_WP: jax.Array,
    *,
    attention: str = "xla",
    remat: str = "none",
) -> jax.Array:
    """Runs the vision tower and the merger.

    Args:
      params: the "vision" subtree of the parameters.
      patches_WPC: 3*2*14*14 values per patch: uint8 pixels, or floats that are already normalised.
      hw_WP2: the (h, w) of each patch in its frame, in merge order.
      segment_WP: the frame number of each patch, unique in its row; -1 for padding.
      attention: see model.attention.
      remat: see layers.recomputed.
    Returns:
      image features (W, M, D) in the parameters' dtype, M = P / 4.
    """
    x = linear(normalise(patches_WPC, cfg).astype(params["patch_embed"].dtype), params["patch_embed"])
    block = partial(_block, angle=vision_angles(hw_WP2, cfg), segment_WP=segment_WP, cfg=cfg, attention=attention)
    x, _ = jax.lax.scan(recomputed(block, remat), x, params["blocks"])
    p = params["merger"]
    x = layer_norm(x, p["norm"], cfg.norm_eps)
    x = x.reshape(x.shape[0], x.shape[1] // cfg.merge_size**2, -1)
    x = jax.nn.gelu(linear(x, **p["fc1"]), approximate=False)
    return linear(x, **p["fc2"])
