"""The text model's layer and the three ways to run it: prompts, whole answers, one more token of each answer.

All three are the same `_block`; they differ in what the attention sees:

    prefill   a prompt attends to itself, causally; its keys and values are kept
    extend    G answers attend to the prompt they share and to themselves (training, reference)
    decode    one token of each answer attends to the prompt and to the answer's cache (rollout)

Training scans over the stacked layers. The rollout has them one by one, laid out by `fused.fuse`: a loop step is bound
by memory and by the number of its operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from r1vl_kernels.prefix_decode_attention import prefix_decode_attention

from r1vl_jax.model.attention import attend_prompt, attend_shared
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.layers import linear, recomputed, rms_norm, rope_frequencies, rotate
from r1vl_jax.parallel.sharding import constrain, per_shard


class KV(NamedTuple):
    """Keys and values of a layer: (B, K, S, H) of prompts, (B, K, G, S, H) of answers."""

    k: Any
    v: Any


def mrope_angles(positions_3T: jax.Array, cfg: ModelConfig) -> jax.Array:
    """M-RoPE (Qwen2-VL, section 2.1): the half head width is split by mrope_section, section i turns with row i.

    positions_3T: (3, ...) integer positions (t, h, w). Returns fp32 angles (..., H/2).
    """
    frequencies = rope_frequencies(cfg.head_dim, cfg.rope_theta)
    row = jnp.repeat(jnp.arange(3), jnp.array(cfg.mrope_section), total_repeat_length=cfg.head_dim // 2)
    return jnp.moveaxis(positions_3T, 0, -1).astype(jnp.float32)[..., row] * frequencies


def _projected(h, p, angle, cfg: ModelConfig):
    """Queries (..., N, H), keys and values (..., K, H), the first two turned to their positions."""
    if "qkv" not in p:
        q, k, v = (linear(h, p[name]["kernel"]) + p[name]["bias"] for name in ("q", "k", "v"))
        return rotate(q, angle), rotate(k, angle), v
    both = linear(h, p["qkv"]["kernel"]) + p["qkv"]["bias"]  # (..., K, N/K + 2, H)
    *rows, K, heads, H = both.shape
    turned = rotate(both[..., :-1, :].reshape(*rows, -1, H), angle).reshape(*rows, K, heads - 1, H)
    return turned[..., :-1, :].reshape(*rows, -1, H), turned[..., -1, :], both[..., -1, :]


def _gate_up(h, p):
    if "gate_up" not in p:
        return linear(h, p["gate"]), linear(h, p["up"])
    both = jnp.einsum("...D,DcF->...cF", h, p["gate_up"])  # as it lies: F may be split over devices
    return both[..., 0, :], both[..., 1, :]


def _block(x, p, angle, cfg: ModelConfig, attention):
    """One layer on x (..., T, D). `attention(q, k, v)` returns the attended heads and what the caller wants kept."""
    h = rms_norm(x, p["norm1"], cfg.norm_eps)
    attended, kept = attention(*_projected(h, p, angle, cfg))
    x = x + linear(attended, p["o"], inputs=2)
    gate, up = _gate_up(rms_norm(x, p["norm2"], cfg.norm_eps), p)
    x = x + linear(jax.nn.silu(gate) * up, p["down"])
    return constrain(x, "batch", *[None] * (x.ndim - 1)), kept


def prefill(params, cfg: ModelConfig, x_BTD, positions_3BT, *, remat: str = "none"):
    """Runs embedded prompts, padded at their ends.

    Returns (hidden states after the final norm (B, T, D), KV: stacked (L, B, K, T, H), or a tuple over fused layers).
    """
    angle = mrope_angles(positions_3BT, cfg)

    def block(x, p):
        def attention(q, k, v):
            return attend_prompt(q, k, v, cfg.attention), KV(k.swapaxes(1, 2), v.swapaxes(1, 2))

        return _block(x, p, angle, cfg, attention)

    x, kv = _over_layers(recomputed(block, remat), x_BTD, params["layers"])
    return rms_norm(x, params["norm"], cfg.norm_eps), kv


def _over_layers(block, x, layers):
    if not isinstance(layers, tuple):
        return jax.lax.scan(block, x, layers)
    kept = []
    for p in layers:
        x, kv = block(x, p)
        kept.append(kv)
    return x, tuple(kept)


def extend(params, cfg: ModelConfig, x_BGTD, start_B, prefix: KV, prefix_length_B, *, remat: str = "none"):
    """Runs G whole answers behind each prompt. Padding stands at their ends, so causality alone hides it.

    Args:
      x_BGTD: embedded answers.
      start_B: the position of each group's first answer token.
      prefix, prefix_length_B: what `prefill` kept, stacked, and how many of its keys are real.
    Returns:
      hidden states after the final norm (B, G, T, D).
    """
    _, G, T, _ = x_BGTD.shape
    angle = mrope_angles(_answer_positions(start_B, G, T), cfg)

    def block(x, layer):
        p, prefix = layer
        return _block(
            x, p, angle, cfg, lambda q, k, v: (attend_shared(q, prefix, k, v, prefix_length_B, cfg.attention), None)
        )

    x, _ = jax.lax.scan(recomputed(block, remat), x_BGTD, (params["layers"], prefix))
    return rms_norm(x, params["norm"], cfg.norm_eps)


def decode(params, cfg: ModelConfig, x_BGD, start_B, step, prefix, prefix_length_B, cache, live_BG):
    """Runs token number `step` of every answer.

    Args:
      params: fused weights.
      x_BGD: embedded tokens.
      prefix: per layer the prompts' KV; cache: per layer the answers' KV, all written at `step`.
      live_BG: answers that are finished need no attention to their own tokens: what comes out is not used.
    Returns:
      (hidden states after the final norm (B, G, D), the cache with this step's keys and values).
    """
    B, G, _ = x_BGD.shape
    K, r = cfg.kv_heads, cfg.heads // cfg.kv_heads
    angle = mrope_angles(_answer_positions(start_B + step, G, 1), cfg)
    own_length_BG = jnp.where(live_BG, step + 1, 0).astype(jnp.int32)
    x, new = x_BGD[:, :, None], []
    for p, shared, own in zip(params["layers"], prefix, cache, strict=True):

        def attention(q, k, v, shared=shared, own=own):
            own = KV(*(_written(a, b, step) for a, b in zip(own, (k, v), strict=True)))
            q_BKGEH = jnp.moveaxis(q.reshape(B, G, K, r, -1), 2, 1)
            out = _attend_caches(q_BKGEH, shared, prefix_length_B, own, own_length_BG, cfg.kernels)
            return jnp.moveaxis(out, 1, 2).reshape(q.shape), own

        x, own = _block(x, p, angle, cfg, attention)
        new.append(own)
    return rms_norm(x[:, :, 0], params["norm"], cfg.norm_eps), tuple(new)


def _written(cache_BKGSH, new_BG1KH, step):
    new_BKG1H = jnp.moveaxis(new_BG1KH, 3, 1)
    return jax.lax.dynamic_update_slice_in_dim(cache_BKGSH, new_BKG1H, step, axis=3)


def _attend_caches(q_BKGEH, prefix: KV, prefix_length_B, own: KV, own_length_BG, backend: str):
    def attend(q, prefix, prefix_length, own, own_length):
        return prefix_decode_attention(q, *prefix, prefix_length, *own, own_length, backend=backend)

    heads = ("batch", "kv_heads")
    rows, prompts, answers = heads + (None,) * 3, heads + (None,) * 2, heads + (None,) * 3
    axes = (rows, KV(prompts, prompts), ("batch",), KV(answers, answers), ("batch", None))
    return per_shard(attend, axes, rows)(q_BKGEH, prefix, prefix_length_B, own, own_length_BG)


def empty_cache(cfg: ModelConfig, batch: int, group: int, length: int, dtype) -> tuple[KV, ...]:
    """A zeroed cache for `group` answers of at most `length` tokens behind each of `batch` prompts."""

    def zeros():
        shape = (batch, cfg.kv_heads, group, length, cfg.head_dim)
        return constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None, None)

    return tuple(KV(zeros(), zeros()) for _ in range(cfg.layers))


def head(params) -> jax.Array:
    """The rows (V, D) that hidden states are multiplied with: the embedding where the checkpoint ties them."""
    return params.get("head", params["embed"])


def _answer_positions(start_B, G: int, T: int) -> jax.Array:
    positions_BGT = jnp.broadcast_to(start_B[:, None, None] + jnp.arange(T), (start_B.shape[0], G, T))
    return jnp.broadcast_to(positions_BGT, (3, *positions_BGT.shape))
