"""Runs the text model's layers on prompts, on whole answers, or on one more token of each answer.

`prefill`, `extend` and `decode` run the same `_block`. They differ in the keys that its attention reads:

    prefill   a prompt attends to itself, causally; its keys and values are returned
    extend    G answers attend to the prompt they share and to themselves (training, reference model)
    decode    one token of each answer attends to its prompt and to the answer's cache (rollout)

Training scans over stacked layers. The rollout loops over separate layers, prepared by `fused.fuse`: a decode step
should be limited by the bytes that it reads and the operations that it launches, and this lowers both (expected, not
measured).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from r1vl_kernels.prefix_decode_attention import prefix_decode_attention

from r1vl_jax.model.attention import attend_prompt, attend_shared
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.layers import linear, recomputed, rms_norm, rope_frequencies, rotate
from r1vl_jax.parallel.sharding import constrain, per_shard


class KV(NamedTuple):
    """Keys and values of a layer, (B, K, S, H) each; stacked layers add an axis L."""

    k: jax.Array
    v: jax.Array


def mrope_angles(positions: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Returns the M-RoPE angles (..., H/2), fp32 (Qwen2-VL, section 2.1).

    mrope_section divides H/2 into three parts, which rotate by the positions t, h and w.

    Args:
      positions: (3, ...) integer positions (t, h, w).
    """
    frequencies = rope_frequencies(cfg.head_dim, cfg.rope_theta)
    row = jnp.repeat(jnp.arange(3), jnp.array(cfg.mrope_section), total_repeat_length=cfg.head_dim // 2)
    return jnp.moveaxis(positions, 0, -1).astype(jnp.float32)[..., row] * frequencies


def _projected(
    h: jax.Array, p: dict[str, Any], angle: jax.Array, cfg: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries (..., N, H), keys and values (..., K, H); queries and keys are rotated to their positions."""
    if "qkv" not in p:
        q, k, v = (linear(h, **p[name]) for name in ("q", "k", "v"))
        return rotate(q, angle), rotate(k, angle), v
    qkv = linear(h, **p["qkv"])  # (..., K, E + 2, H)
    *rows, K, heads, H = qkv.shape
    rotated = rotate(qkv[..., :-1, :].reshape(*rows, -1, H), angle).reshape(*rows, K, heads - 1, H)
    return rotated[..., :-1, :].reshape(*rows, -1, H), rotated[..., -1, :], qkv[..., -1, :]


def _gate_up(h: jax.Array, p: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    if "gate_up" not in p:
        return linear(h, p["gate"]), linear(h, p["up"])
    both = jnp.tensordot(h, p["gate_up"], 1)  # (..., 2, F); not reshaped to 2*F, because F may be sharded
    return both[..., 0, :], both[..., 1, :]


def _block(
    x: jax.Array, p: dict[str, Any], angle: jax.Array, cfg: ModelConfig, attention: Callable[..., tuple[jax.Array, Any]]
) -> tuple[jax.Array, Any]:
    """Runs one layer on x (..., D).

    Args:
      attention: (q, k, v) -> (the attended heads, a value that the caller keeps for this layer, such as its KV).
    Returns:
      (x after the layer, the value that `attention` returned to keep).
    """
    h = rms_norm(x, p["norm1"], cfg.norm_eps)
    attended, kept = attention(*_projected(h, p, angle, cfg))
    x = x + linear(attended, p["o"], inputs=2)
    gate, up = _gate_up(rms_norm(x, p["norm2"], cfg.norm_eps), p)
    x = x + linear(jax.nn.silu(gate) * up, p["down"])
    return constrain(x, "batch", *[None] * (x.ndim - 1)), kept


def prefill(
    params: Any, cfg: ModelConfig, x_BTD: jax.Array, positions_3BT: jax.Array, *, remat: str = "none"
) -> tuple[jax.Array, Any]:
    """Runs embedded prompts, padded at their ends.

    Returns:
      (hidden states after the final norm (B, T, D), KV: stacked (L, B, K, T, H), or a tuple of KVs for fused layers).
    """
    angle = mrope_angles(positions_3BT, cfg)

    def block(x: jax.Array, p: dict[str, Any]) -> tuple[jax.Array, KV]:
        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KV]:
            return attend_prompt(q, k, v, cfg.attention), KV(k.swapaxes(1, 2), v.swapaxes(1, 2))

        return _block(x, p, angle, cfg, attention)

    x, kv = _over_layers(recomputed(block, remat), x_BTD, params["layers"])
    return rms_norm(x, params["norm"], cfg.norm_eps), kv


def _over_layers(block: Callable[..., tuple[jax.Array, KV]], x: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
    """Runs a tree of stacked layers by a scan, or a tuple of layers one by one."""
    if not isinstance(layers, tuple):
        return jax.lax.scan(block, x, layers)
    kept = []
    for p in layers:
        x, kv = block(x, p)
        kept.append(kv)
    return x, tuple(kept)


def extend(
    params: Any,
    cfg: ModelConfig,
    x_BGTD: jax.Array,
    start_B: jax.Array,
    prefix: KV,
    prefix_length_B: jax.Array,
    *,
    remat: str = "none",
) -> jax.Array:
    """Runs G whole answers to each prompt. They are padded at their ends, so the causal mask alone hides the padding.

    Args:
      x_BGTD: embedded answers.
      start_B: the position of each group's first answer token.
      prefix: the stacked KV from `prefill`.
      prefix_length_B: the number of real (not padding) keys of each prompt.
    Returns:
      hidden states after the final norm (B, G, T, D).
    """
    _, G, T, _ = x_BGTD.shape
    angle = mrope_angles(_answer_positions(start_B, G, T), cfg)

    def block(x: jax.Array, layer: tuple[dict[str, Any], KV]) -> tuple[jax.Array, None]:
        p, prefix = layer

        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return attend_shared(q, prefix, k, v, prefix_length_B, cfg.attention), None

        return _block(x, p, angle, cfg, attention)

    x, _ = jax.lax.scan(recomputed(block, remat), x_BGTD, (params["layers"], prefix))
    return rms_norm(x, params["norm"], cfg.norm_eps)


def decode(
    params: Any,
    cfg: ModelConfig,
    x_RD: jax.Array,
    position_R: jax.Array,
    step: Any,
    prefix: tuple[jax.Array, ...],
    prefix_length_R: jax.Array,
    question_R: jax.Array | None,
    cache: tuple[jax.Array, ...],
    live_R: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Runs token number `step` of every answer.

    Args:
      params: fused weights.
      x_RD: embedded tokens.
      position_R: the position of each token.
      prefix: the prompts' keys and values (B, K, 2, S, H), one array per layer.
      prefix_length_R: the number of real (not padding) keys of each answer's prompt.
      question_R: the index of each answer's prompt, see prefix_decode_attention.
      cache: the answers' keys and values (R, K, 2, S, H), one array per layer; every answer writes at index `step`.
      live_R: False for finished answers, which attend to nothing, because their output is unused.
    Returns:
      (hidden states after the final norm (R, D), the cache with this step's keys and values).
    """
    angle = mrope_angles(jnp.broadcast_to(position_R, (3, *position_R.shape)), cfg)
    prefix_length_R, own_length_R = (
        jnp.where(live_R, length, 0).astype(jnp.int32) for length in (prefix_length_R, step + 1)
    )
    attend = jax.jit(partial(_attend_caches, backend=cfg.kernels))  # so that all layers trace it once
    x, new = x_RD, []
    for p, shared, own in zip(params["layers"], prefix, cache, strict=True):

        def attention(
            q: jax.Array, k: jax.Array, v: jax.Array, shared: jax.Array = shared, own: jax.Array = own
        ) -> tuple[jax.Array, jax.Array]:
            both_RK21H = jnp.stack([k, v], axis=2)[:, :, :, None]
            own = jax.lax.dynamic_update_slice_in_dim(own, both_RK21H, step, axis=3)
            q_RKEH = q.reshape(q.shape[0], cfg.kv_heads, -1, cfg.head_dim)
            return attend(q_RKEH, shared, prefix_length_R, own, own_length_R, question_R).reshape(q.shape), own

        x, own = _block(x, p, angle, cfg, attention)
        new.append(own)
    return rms_norm(x, params["norm"], cfg.norm_eps), tuple(new)


def _attend_caches(
    q_RKEH: jax.Array,
    prefix_BK2SH: jax.Array,
    prefix_length_R: jax.Array,
    own_RK2SH: jax.Array,
    own_length_R: jax.Array,
    question_R: jax.Array | None,
    *,
    backend: str,
) -> jax.Array:
    """Calls prefix_decode_attention on each device, on that device's own answers and heads."""
    queries = ("batch", "kv_heads", None, None)
    rows, caches = ("batch",), (*queries, None)
    call = per_shard(
        partial(prefix_decode_attention, backend=backend), (queries, caches, rows, caches, rows, rows), queries
    )
    return call(q_RKEH, prefix_BK2SH, prefix_length_R, own_RK2SH, own_length_R, question_R)


def empty_cache(cfg: ModelConfig, rows: int, length: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Returns zeroed caches (R, K, 2, S, H), one per layer, for answers of up to `length` tokens."""

    def zeros() -> jax.Array:
        shape = (rows, cfg.kv_heads, 2, length, cfg.head_dim)
        return constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None, None)

    return tuple(zeros() for _ in range(cfg.layers))


def head(params: Any) -> jax.Array:
    """Returns the output matrix (V, D): the embedding if the checkpoint ties the two."""
    return params.get("head", params["embed"])


def _answer_positions(start_B: jax.Array, G: int, T: int) -> jax.Array:
    """Returns the M-RoPE positions (3, B, G, T) of answers: t, h and w all increase by one per text token."""
    positions_BGT = jnp.broadcast_to(start_B[:, None, None] + jnp.arange(T), (start_B.shape[0], G, T))
    return jnp.broadcast_to(positions_BGT, (3, *positions_BGT.shape))
