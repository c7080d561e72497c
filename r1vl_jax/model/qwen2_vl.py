"""Qwen2-VL: vision tower and text model put together (arXiv 2409.12191), as pure functions on a parameter tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from r1vl_jax.model import text
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.head import TokenLoss, head_loss, logits, token_logprobs
from r1vl_jax.model.vision import encode_images
from r1vl_jax.parallel.sharding import constrain
from r1vl_jax.types import Prompts


def cast(params: Any, dtype) -> Any:
    """The tree in the dtype of the computation (fp32 masters, bf16 compute)."""
    return jax.tree.map(lambda a: a.astype(dtype), params)


def embed_tokens(params: Any, tokens: jax.Array) -> jax.Array:
    x = params["text"]["embed"][tokens]
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def right_padded(prompts: Prompts) -> tuple[Prompts, jax.Array]:
    """The same questions with all padding at the ends of their rows, and how far each row has moved to the left (B,).

    From here on a row is known by its length, and causality alone hides its padding.
    """
    first_B = jnp.argmax(prompts.mask_BT, axis=1)

    def moved(a):
        return _rolled(a, first_B)

    return prompts.replace(
        tokens_BT=moved(prompts.tokens_BT),
        mask_BT=moved(prompts.mask_BT),
        positions_3BT=jax.vmap(moved)(prompts.positions_3BT),
        image_slot_BT=moved(prompts.image_slot_BT),
    ), first_B


def _rolled(a_BT, left_B) -> jax.Array:
    """Rows of a (B, T, ...) moved to the left, around the end."""
    T = a_BT.shape[1]
    places_BT = (jnp.arange(T) + left_B[:, None]) % T
    return jnp.take_along_axis(a_BT, places_BT.reshape(*places_BT.shape, *[1] * (a_BT.ndim - 2)), axis=1)


def lengths(prompts: Prompts) -> jax.Array:
    """Tokens of each question (B,)."""
    return jnp.sum(prompts.mask_BT, axis=1, dtype=jnp.int32)


def embed_prompts(params: Any, cfg: ModelConfig, prompts: Prompts, *, remat: str = "none") -> jax.Array:
    """Token embeddings (B, T, D) with image features where `image_slot` says, never where a token id says."""
    x = embed_tokens(params, prompts.tokens_BT)
    if prompts.patches_WPC.shape[0] == 0:
        return x
    images = (prompts.patches_WPC, prompts.patch_hw_WP2, prompts.segment_WP)
    features = encode_images(params["vision"], cfg.vision, *images, attention=cfg.attention, remat=remat)
    features = features.reshape(-1, features.shape[-1])
    slot_BT1 = prompts.image_slot_BT[..., None]
    return jnp.where(slot_BT1 >= 0, features[jnp.maximum(prompts.image_slot_BT, 0)], x)


def prefill(params: Any, cfg: ModelConfig, prompts: Prompts, *, remat: str = "none"):
    """Vision and prompt, once a question, padding last.

    Returns (hidden_BTD, the last real token's hidden_BD, KV as text.prefill gives it).
    """
    prompts, _ = right_padded(prompts)
    x = embed_prompts(params, cfg, prompts, remat=remat)
    hidden, kv = text.prefill(params["text"], cfg, x, prompts.positions_3BT, remat=remat)
    return hidden, _at(hidden, lengths(prompts)[:, None] - 1)[:, 0], kv


def _at(hidden_BTD, places_BT) -> jax.Array:
    return jnp.take_along_axis(hidden_BTD, places_BT[..., None], axis=1)


def prompt_logits(params: Any, cfg: ModelConfig, prompts: Prompts) -> jax.Array:
    """fp32 logits (B, T, V) at every prompt position."""
    hidden, _, _ = prefill(params, cfg, prompts)
    return logits(_rolled(hidden, -right_padded(prompts)[1]), text.head(params["text"]))


def answer_hidden(
    params: Any, cfg: ModelConfig, prompts: Prompts, tokens_BGT, *, shared: bool = True, remat: str = "none"
) -> jax.Array:
    """Hidden states (B, G, T, D) that predict each answer token: the prompt's last for the first, then the answer's.

    Args:
      shared: the prompt is run once, and its answers attend to it; else once an answer. The numbers are the same.
    """
    if not shared:
        return _unshared_hidden(params, cfg, prompts, tokens_BGT, remat=remat)
    _, last_BD, kv = prefill(params, cfg, prompts, remat=remat)
    # The last token predicts nothing that is asked for. It is run with the others: even lengths are what kernels want.
    x = embed_tokens(params, tokens_BGT)
    hidden = text.extend(params["text"], cfg, x, prompts.next_position_B, kv, lengths(prompts), remat=remat)
    B, G, _ = tokens_BGT.shape
    first = jnp.broadcast_to(last_BD[:, None, None], (B, G, 1, last_BD.shape[-1]))
    return jnp.concatenate([first, hidden[:, :, :-1]], axis=2)


def _unshared_hidden(params, cfg: ModelConfig, prompts: Prompts, tokens_BGT, *, remat: str) -> jax.Array:
    """`answer_hidden` with each answer directly behind a copy of its prompt's embeddings, one causal row each."""
    prompts, _ = right_padded(prompts)
    (B, G, T), length_B1 = tokens_BGT.shape, lengths(prompts)[:, None]
    x_prompt, x_answer = embed_prompts(params, cfg, prompts, remat=remat), embed_tokens(params, tokens_BGT)
    places_S = jnp.arange(prompts.mask_BT.shape[1] + T)
    in_prompt_BS = places_S < length_B1
    from_prompt_BS = jnp.minimum(places_S, length_B1 - 1)
    from_answer_BS = jnp.clip(places_S - length_B1, 0, T - 1)
    x = jnp.where(
        in_prompt_BS[:, None, :, None],
        _at(x_prompt, from_prompt_BS)[:, None],
        jnp.take_along_axis(x_answer, from_answer_BS[:, None, :, None], axis=2),
    )
    positions_3BS = jnp.where(
        in_prompt_BS,
        jax.vmap(lambda row: jnp.take_along_axis(row, from_prompt_BS, axis=1))(prompts.positions_3BT),
        prompts.next_position_B[:, None] + from_answer_BS,
    )
    x, positions_3BS = x.reshape(B * G, *x.shape[2:]), jnp.repeat(positions_3BS, G, axis=1)
    hidden, _ = text.prefill(params["text"], cfg, x, positions_3BS, remat=remat)
    return _at(hidden, jnp.repeat(length_B1, G, axis=0) - 1 + jnp.arange(T)).reshape(B, G, T, -1)


def joined_hidden(params: Any, cfg: ModelConfig, rows: Prompts, start_B, T: int, *, remat: str = "none") -> jax.Array:
    """As `answer_hidden`, (B, 1, T, D), for one answer each that stands behind its prompt, in the same row."""
    hidden, _, _ = prefill(params, cfg, rows, remat=remat)
    return _at(hidden, jnp.minimum(start_B[:, None] - 1 + jnp.arange(T), hidden.shape[1] - 1))[:, None]


def answer_logprobs(
    params: Any,
    cfg: ModelConfig,
    prompts: Prompts,
    tokens_BGT: jax.Array,
    *,
    start_B: jax.Array | None = None,
    temperature: float = 1.0,
    forbidden: tuple[int, ...] = (),
    shared: bool = True,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """log softmax(z / temperature) of the given answer tokens, and the entropy of the distribution they came from.

    Args:
      tokens_BGT: answers, padded at their ends with any id.
      start_B: how many tokens stand before the one answer to each prompt, if `prompts` hold the answers too.
      temperature: the sampling temperature; 0 stands for 1 (greedy answers are scored at T = 1).
      forbidden: ids taken out of the distribution, as the sampler does.
      shared: see `answer_hidden`.
      remat: what the gradient keeps of the layers, see layers.recomputed.
    Returns:
      fp32 (logprobs_BGT, entropy_BGT); values behind an answer's end mean nothing.
    """
    hidden = _hidden(params, cfg, prompts, tokens_BGT, start_B, shared, remat)
    rows = text.head(params["text"])
    return token_logprobs(hidden, rows, tokens_BGT, temperature=temperature, forbidden=forbidden, chunk=cfg.logit_rows)


def answer_loss(
    token_loss: TokenLoss,
    params: Any,
    cfg: ModelConfig,
    prompts: Prompts,
    tokens_BGT: jax.Array,
    values: Any,
    *,
    start_B: jax.Array | None = None,
    temperature: float = 1.0,
    forbidden: tuple[int, ...] = (),
    shared: bool = True,
    remat: str = "none",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics): sums of `token_loss` over all answer tokens, in one pass through the loss head.

    Args: as for `answer_logprobs`; token_loss, values: as for model.head.head_loss.
    """
    hidden = _hidden(params, cfg, prompts, tokens_BGT, start_B, shared, remat)
    return head_loss(
        token_loss, hidden, text.head(params["text"]), tokens_BGT, values, temperature, forbidden, cfg.logit_rows
    )


def _hidden(params, cfg, prompts, tokens_BGT, start_B, shared: bool, remat: str):
    if start_B is None:
        return answer_hidden(params, cfg, prompts, tokens_BGT, shared=shared, remat=remat)
    return joined_hidden(params, cfg, prompts, start_B, tokens_BGT.shape[2], remat=remat)
