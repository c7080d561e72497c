"""The text model's layer and the three ways to run it: prompts, whole answers, one more token of each answer.

All three are the same `_block`; they differ in what the attention sees:

    prefill   a prompt attends to itself, causally; its keys and values are kept
    extend    G answers attend to the prompt they share and to themselves (training, reference)
    decode    one token of each answer attends to the prompt and to the answer's cache (rollout)

Prefill and extend scan over the stacked layers; decode unrolls them, since a loop step is bound by memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.layers import attend, attend_shared, linear, rms_norm, rope_frequencies, rotate
from r1vl_jax.parallel.sharding import constrain


class KV(NamedTuple):
    """Keys and values: (L, B, S, K, H) of prompts, or a tuple over layers of (B, G, S, K, H) of answers."""

    k: Any
    v: Any


def mrope_angles(positions_3T: jax.Array, cfg: ModelConfig) -> jax.Array:
    """M-RoPE (Qwen2-VL, section 2.1): the half head width is split by mrope_section, section i turns with row i.

    positions_3T: (3, ...) integer positions (t, h, w). Returns fp32 angles (..., H/2).
    """
    frequencies = rope_frequencies(cfg.head_dim, cfg.rope_theta)
    row = jnp.repeat(jnp.arange(3), jnp.array(cfg.mrope_section), total_repeat_length=cfg.head_dim // 2)
    return jnp.moveaxis(positions_3T, 0, -1).astype(jnp.float32)[..., row] * frequencies


def _block(x, p, angle, cfg: ModelConfig, attention):
    """One layer on x (..., T, D). `attention(q, k, v)` returns the attended heads and what the caller wants kept."""
    h = rms_norm(x, p["norm1"], cfg.norm_eps)
    q, k, v = (linear(h, p[name]["kernel"]) + p[name]["bias"] for name in ("q", "k", "v"))
    attended, kept = attention(rotate(q, angle), rotate(k, angle), v)
    x = x + linear(attended, p["o"], inputs=2)
    h = rms_norm(x, p["norm2"], cfg.norm_eps)
    x = x + linear(jax.nn.silu(linear(h, p["gate"])) * linear(h, p["up"]), p["down"])
    return constrain(x, "batch", *[None] * (x.ndim - 1)), kept


def prefill(params, cfg: ModelConfig, x_BTD, positions_3BT, mask_BT, *, remat: bool = False):
    """Runs embedded prompts. Returns (hidden states after the final norm (B, T, D), KV (L, B, T, K, H))."""
    angle = mrope_angles(positions_3BT, cfg)
    T = x_BTD.shape[1]
    mask_BTS = jnp.tril(jnp.ones((T, T), bool)) & mask_BT[:, None, :]

    def block(x, p):
        return _block(x, p, angle, cfg, lambda q, k, v: (attend(q, k, v, mask_BTS), KV(k, v)))

    x, kv = jax.lax.scan(jax.checkpoint(block) if remat else block, x_BTD, params["layers"])
    return rms_norm(x, params["norm"], cfg.norm_eps), kv


def extend(params, cfg: ModelConfig, x_BGTD, start_B, prefix: KV, prefix_mask_BS, *, remat: bool = False):
    """Runs G whole answers behind each prompt. Padding stands at their ends, so causality alone hides it.

    Args:
      x_BGTD: embedded answers.
      start_B: the position of each group's first answer token.
      prefix, prefix_mask_BS: what `prefill` kept, and which of its keys are real.
    Returns:
      hidden states after the final norm (B, G, T, D).
    """
    _, G, T, _ = x_BGTD.shape
    angle = mrope_angles(_answer_positions(start_B, G, T), cfg)
    causal = jnp.tril(jnp.ones((T, T), bool))

    def block(x, layer):
        p, prefix = layer
        return _block(
            x, p, angle, cfg, lambda q, k, v: (attend_shared(q, prefix, KV(k, v), prefix_mask_BS, causal), None)
        )

    x, _ = jax.lax.scan(jax.checkpoint(block) if remat else block, x_BGTD, (params["layers"], prefix))
    return rms_norm(x, params["norm"], cfg.norm_eps)


def decode(params, layers, cfg: ModelConfig, x_BGD, start_B, step, prefix, prefix_mask_BS, cache: KV):
    """Runs token number `step` of every answer.

    Args:
      layers: a tuple of the layers' parameters, unstacked (see `unstack`).
      x_BGD: embedded tokens.
      prefix: per layer the prompts' KV; cache: per layer the answers' KV, written at `step`.
    Returns:
      (hidden states after the final norm (B, G, D), the cache with this step's keys and values).
    """
    angle = mrope_angles(_answer_positions(start_B + step, x_BGD.shape[1], 1), cfg)
    seen = jnp.arange(cache.k[0].shape[2])[None] <= step
    x, new = x_BGD[:, :, None], []
    for p, layer_prefix, k_cache, v_cache in zip(layers, prefix, cache.k, cache.v, strict=True):

        def attention(q, k, v, layer_prefix=layer_prefix, k_cache=k_cache, v_cache=v_cache):
            own = KV(
                jax.lax.dynamic_update_slice_in_dim(k_cache, k, step, axis=2),
                jax.lax.dynamic_update_slice_in_dim(v_cache, v, step, axis=2),
            )
            return attend_shared(q, layer_prefix, own, prefix_mask_BS, seen), own

        x, own = _block(x, p, angle, cfg, attention)
        new.append(own)
    k, v = zip(*new, strict=True)
    return rms_norm(x[:, :, 0], params["norm"], cfg.norm_eps), KV(k, v)


def unstack(tree, layers: int) -> tuple:
    """A tree of arrays stacked on axis 0 as a tuple of `layers` trees."""
    return tuple(jax.tree.map(lambda a, i=i: a[i], tree) for i in range(layers))


def empty_cache(cfg: ModelConfig, batch: int, group: int, length: int, dtype) -> KV:
    """A zeroed cache for `group` answers of at most `length` tokens behind each of `batch` prompts."""
    shape = (batch, group, length, cfg.kv_heads, cfg.head_dim)
    zeros = tuple(constrain(jnp.zeros(shape, dtype), "batch", None, None, "kv_heads", None) for _ in range(cfg.layers))
    return KV(zeros, zeros)


def logits(params, hidden: jax.Array) -> jax.Array:
    """fp32 logits (..., V) of hidden states (..., D); the head is the embedding where the checkpoint ties them."""
    head = params.get("head", params["embed"])
    return jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)


def _answer_positions(start_B, G: int, T: int) -> jax.Array:
    positions_BGT = jnp.broadcast_to(start_B[:, None, None] + jnp.arange(T), (start_B.shape[0], G, T))
    return jnp.broadcast_to(positions_BGT, (3, *positions_BGT.shape))


def log_softmax(logits: jax.Array, temperature: float, forbidden: tuple[int, ...]) -> jax.Array:
    """log softmax(z / T) without the forbidden ids, fp32: what is sampled from and what is trained (T = 0 means 1)."""
    scaled = logits.astype(jnp.float32) / (temperature or 1.0)
    if forbidden:
        scaled = scaled.at[..., jnp.array(forbidden)].set(-jnp.inf)
    return jax.nn.log_softmax(scaled, axis=-1)
