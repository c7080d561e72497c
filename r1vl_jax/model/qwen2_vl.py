"""Qwen2-VL: vision tower and text model put together (arXiv 2409.12191), as pure functions on a parameter tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from r1vl_jax.model import text
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.vision import encode_images
from r1vl_jax.parallel.sharding import constrain
from r1vl_jax.types import Prompts


def cast(params: Any, dtype) -> Any:
    """The tree in the dtype of the computation (fp32 masters, bf16 compute)."""
    return jax.tree.map(lambda a: a.astype(dtype), params)


def embed_tokens(params: Any, tokens: jax.Array) -> jax.Array:
    x = params["text"]["embed"][tokens]
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def embed_prompts(params: Any, cfg: ModelConfig, prompts: Prompts, *, remat: bool = False) -> jax.Array:
    """Token embeddings (B, T, D) with image features where `image_slot` says, never where a token id says."""
    x = embed_tokens(params, prompts.tokens_BT)
    if prompts.patches_RPC.shape[0] == 0:
        return x
    features = encode_images(
        params["vision"], cfg.vision, prompts.patches_RPC, prompts.patch_hw_RP2, prompts.segment_RP, remat=remat
    )
    features = features.reshape(-1, features.shape[-1])
    slot_BT1 = prompts.image_slot_BT[..., None]
    return jnp.where(slot_BT1 >= 0, features[jnp.maximum(prompts.image_slot_BT, 0)], x)


def prefill(params: Any, cfg: ModelConfig, prompts: Prompts, *, remat: bool = False):
    """Vision and prompt, once a question.

    Returns (hidden_BTD, the last real token's hidden_BD, KV (L, B, S, K, H)).
    """
    x = embed_prompts(params, cfg, prompts, remat=remat)
    hidden, kv = text.prefill(params["text"], cfg, x, prompts.positions_3BT, prompts.mask_BT, remat=remat)
    T = prompts.mask_BT.shape[1]
    last_B = jnp.max(jnp.where(prompts.mask_BT, jnp.arange(T), 0), axis=1)
    return hidden, jnp.take_along_axis(hidden, last_B[:, None, None], axis=1)[:, 0], kv


def prompt_logits(params: Any, cfg: ModelConfig, prompts: Prompts) -> jax.Array:
    """fp32 logits (B, T, V) at every prompt position."""
    hidden, _, _ = prefill(params, cfg, prompts)
    return text.logits(params["text"], hidden)


def answer_hidden(params: Any, cfg: ModelConfig, prompts: Prompts, tokens_BGT, *, remat: bool = False) -> jax.Array:
    """Hidden states (B, G, T, D) that predict each answer token: the prompt's last for the first, then the answer's."""
    _, last_BD, kv = prefill(params, cfg, prompts, remat=remat)
    x = embed_tokens(params, tokens_BGT[:, :, :-1])
    hidden = text.extend(params["text"], cfg, x, prompts.next_position_B, kv, prompts.mask_BT, remat=remat)
    B, G, _ = tokens_BGT.shape
    first = jnp.broadcast_to(last_BD[:, None, None], (B, G, 1, last_BD.shape[-1]))
    return jnp.concatenate([first, hidden], axis=2)


def joined_hidden(params: Any, cfg: ModelConfig, rows: Prompts, start_B, T: int, *, remat: bool = False) -> jax.Array:
    """As `answer_hidden`, (B, 1, T, D), for one answer each that stands behind its prompt, in the same row."""
    hidden, _, _ = prefill(params, cfg, rows, remat=remat)
    places_BT = jnp.minimum(start_B[:, None] - 1 + jnp.arange(T), hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, places_BT[..., None], axis=1)[:, None]


def answer_logprobs(
    params: Any,
    cfg: ModelConfig,
    prompts: Prompts,
    tokens_BGT: jax.Array,
    *,
    start_B: jax.Array | None = None,
    temperature: float = 1.0,
    forbidden: tuple[int, ...] = (),
    remat: bool = False,
    chunk: int = 4096,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(z / temperature) of the given answer tokens, and the entropy of the distribution they came from.

    The one definition of a token's log-probability: SFT, policy, reference and rollout all mean this.

    Args:
      tokens_BGT: answers, padded at their ends with any id.
      start_B: where the one answer to each prompt begins in its row, if `prompts` hold the answers too.
      temperature: the sampling temperature; 0 stands for 1 (greedy answers are scored at T = 1).
      forbidden: ids taken out of the distribution, as the sampler does.
      remat: recompute layers in the backward pass.
      chunk: rows whose logits are held at once; they are recomputed in the backward pass.
    Returns:
      fp32 (logprobs_BGT, entropy_BGT); values behind an answer's end mean nothing.
    """
    if start_B is None:
        hidden = answer_hidden(params, cfg, prompts, tokens_BGT, remat=remat)
    else:
        hidden = joined_hidden(params, cfg, prompts, start_B, tokens_BGT.shape[2], remat=remat)
    B, G, T, D = hidden.shape
    width = min(T, max(1, chunk // (B * G)))
    pad = -T % width

    # Chunks run along T: B stays sharded as it is.
    def chunked(a):
        a = jnp.pad(a, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 3))
        return jnp.moveaxis(a.reshape(B, G, -1, width, *a.shape[3:]), 2, 0)

    @jax.checkpoint
    def score(chunk):
        hidden, tokens = chunk
        log_p = text.log_softmax(text.logits(params["text"], hidden), temperature, forbidden)
        p = jnp.exp(log_p)
        entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
        return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0], entropy

    scored = jax.lax.map(score, (chunked(hidden), chunked(tokens_BGT)))
    logprobs, entropy = (jnp.moveaxis(a, 0, 2).reshape(B, G, -1)[:, :, :T] for a in scored)
    return logprobs, entropy
