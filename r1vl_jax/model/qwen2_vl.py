"""Combines vision tower and text model into Qwen2-VL (arXiv 2409.12191), as pure functions on a parameter tree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from r1vl_jax.model import text
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.head import logits
from r1vl_jax.model.layers import take
from r1vl_jax.model.vision import encode_images
from r1vl_jax.parallel.sharding import constrain
from r1vl_jax.types import Prompts


def cast(params: Any, dtype: Any) -> Any:
    """Returns the tree in the dtype of the computation (parameters are stored in fp32 and computed with in bf16)."""
    return jax.tree.map(lambda a: a.astype(dtype), params)


def embed_tokens(params: Any, tokens: jax.Array) -> jax.Array:
    """Returns the embeddings (..., D) of token ids (...)."""
    x = take(params["text"]["embed"], tokens)
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def right_padded(prompts: Prompts) -> tuple[Prompts, jax.Array]:
    """Moves all padding to the ends of the rows. Returns (prompts, number of places each row moved to the left (B,)).

    Afterwards a row's length determines its real tokens, and the causal mask alone hides the padding.
    """
    first_B = jnp.argmax(prompts.mask_BT, axis=1)

    def moved(a: jax.Array) -> jax.Array:
        return _rolled(a, first_B)

    return dataclasses.replace(
        prompts,
        tokens_BT=moved(prompts.tokens_BT),
        mask_BT=moved(prompts.mask_BT),
        positions_3BT=jax.vmap(moved)(prompts.positions_3BT),
        image_slot_BT=moved(prompts.image_slot_BT),
    ), first_B


def _rolled(a: jax.Array, left_B: jax.Array) -> jax.Array:
    """Rolls each row of a (B, T, ...) array to the left; entries that leave at the start come back at the end."""
    T = a.shape[1]
    places_BT = (jnp.arange(T) + left_B[:, None]) % T
    return jnp.take_along_axis(a, places_BT.reshape(*places_BT.shape, *[1] * (a.ndim - 2)), axis=1)


def lengths(prompts: Prompts) -> jax.Array:
    """Returns the number of real tokens of each question (B,)."""
    return jnp.sum(prompts.mask_BT, axis=1, dtype=jnp.int32)


def take_places(hidden_BTD: jax.Array, places_BT: jax.Array) -> jax.Array:
    """Returns the hidden states at the given places of each row."""
    return take(hidden_BTD, places_BT[..., None], axis=1)


def embed_prompts(params: Any, cfg: ModelConfig, prompts: Prompts, *, remat: str = "none") -> jax.Array:
    """Returns token embeddings (B, T, D), replaced by image features at the places that `image_slot_BT` selects.

    Token ids never decide which places hold image features.
    """
    x = embed_tokens(params, prompts.tokens_BT)
    if prompts.patches_WPC.shape[0] == 0:
        return x
    images = (prompts.patches_WPC, prompts.patch_hw_WP2, prompts.segment_WP)
    features = encode_images(params["vision"], cfg.vision, *images, attention=cfg.attention, remat=remat)
    features = features.reshape(-1, features.shape[-1])
    slot_BT1 = prompts.image_slot_BT[..., None]
    return jnp.where(slot_BT1 >= 0, take(features, jnp.maximum(prompts.image_slot_BT, 0)), x)


def prefill(
    params: Any, cfg: ModelConfig, prompts: Prompts, *, remat: str = "none"
) -> tuple[jax.Array, jax.Array, Any]:
    """Runs the vision tower and the prompts, with padding moved to the ends of rows.

    Returns (hidden_BTD, hidden_BD of the last real token, the KV of text.prefill).
    """
    prompts, _ = right_padded(prompts)
    x = embed_prompts(params, cfg, prompts, remat=remat)
    hidden_BTD, kv = text.prefill(params["text"], cfg, x, prompts.positions_3BT, remat=remat)
    return hidden_BTD, take_places(hidden_BTD, lengths(prompts)[:, None] - 1)[:, 0], kv


def prompt_logits(params: Any, cfg: ModelConfig, prompts: Prompts) -> jax.Array:
    """Returns fp32 logits (B, T, V) at every prompt position."""
    hidden_BTD, _, _ = prefill(params, cfg, prompts)
    return logits(_rolled(hidden_BTD, -right_padded(prompts)[1]), text.head(params["text"]))
