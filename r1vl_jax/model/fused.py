"""Builds the rollout's weights: one tree per layer, with matrices that read the same input joined into one.

    q, k, v   -> qkv (D, K, E + 2, H): for each kv head its query heads, its key, its value
    gate, up  -> gate_up (D, 2, F)

A decode step reads every weight once, so its time is about the time to read their bytes plus a cost per operation
(expected, not measured). Fused layers have four matmuls instead of seven. The kv heads of fused weights can still be
sharded over the `tensor` axis.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.spec import param_spec
from r1vl_jax.parallel.sharding import Rules, is_axes, partition_spec
from r1vl_jax.types import is_spec


def fuse(params: Any, cfg: ModelConfig) -> Any:
    """Returns the tree with params["text"]["layers"] as a tuple of layers of joined matrices. Call it under jit."""
    stacked = params["text"]["layers"]
    layers = tuple(_layer(jax.tree.map(lambda a, i=i: a[i], stacked), cfg) for i in range(cfg.layers))
    return {**params, "text": {**params["text"], "layers": layers}}


def _layer(p: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    def joined(part: str) -> jax.Array:
        q, k, v = (p[name][part] for name in ("q", "k", "v"))
        q = q.reshape(*q.shape[:-2], cfg.kv_heads, -1, cfg.head_dim)
        return jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)

    kept = {name: p[name] for name in ("norm1", "o", "norm2", "down")}
    qkv = {"kernel": joined("kernel"), "bias": joined("bias")}
    return {**kept, "qkv": qkv, "gate_up": jnp.stack([p["gate"], p["up"]], axis=1)}


def fused_shardings(cfg: ModelConfig, mesh: Mesh, rules: Rules) -> Any:
    """Returns a NamedSharding for each array of the tree that `fuse` returns."""
    axes = jax.tree.map(lambda spec: spec.axes, param_spec(cfg), is_leaf=is_spec)
    stacked = axes["text"]["layers"]
    layer = {name: stacked[name][1:] for name in ("norm1", "o", "norm2", "down")} | {
        "qkv": {"kernel": ("embed", "kv_heads", None, None), "bias": ("kv_heads", None, None)},
        "gate_up": ("embed", None, "mlp"),
    }
    axes = {**axes, "text": {**axes["text"], "layers": (layer,) * cfg.layers}}
    return jax.tree.map(lambda names: NamedSharding(mesh, partition_spec(names, rules)), axes, is_leaf=is_axes)
