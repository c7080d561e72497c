"""Computes hidden states, log-probabilities and losses of answers to prompts, for training and scoring."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from r1vl_jax.model import text
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.head import TokenLoss, head_loss, token_logprobs
from r1vl_jax.model.layers import take
from r1vl_jax.model.qwen2_vl import embed_prompts, embed_tokens, lengths, prefill, right_padded, take_places
from r1vl_jax.types import Prompts


def answer_hidden(
    params: Any, cfg: ModelConfig, prompts: Prompts, tokens_BGT: jax.Array, *, shared: bool = True, remat: str = "none"
) -> jax.Array:
    """Returns the hidden states (B, G, T, D) that predict the answer tokens.

    The first is the state of the prompt's last token; the others are those of all answer tokens but the last.

    Args:
      shared: True: runs the prompt once, and its answers attend to it; False: runs the prompt once per answer. The
        results are the same up to rounding.
    """
    if not shared:
        return _unshared_hidden(params, cfg, prompts, tokens_BGT, remat=remat)
    _, last_BD, kv = prefill(params, cfg, prompts, remat=remat)
    # The hidden state of an answer's last token is unused. It is computed anyway, because T tokens divide better.
    x = embed_tokens(params, tokens_BGT)
    hidden_BGTD = text.extend(params["text"], cfg, x, prompts.next_position_B, kv, lengths(prompts), remat=remat)
    B, G, _ = tokens_BGT.shape
    first_BG1D = take(last_BD, jnp.broadcast_to(jnp.arange(B)[:, None, None], (B, G, 1)))
    return jnp.concatenate([first_BG1D, hidden_BGTD[:, :, :-1]], axis=2)


def _unshared_hidden(
    params: Any, cfg: ModelConfig, prompts: Prompts, tokens_BGT: jax.Array, *, remat: str
) -> jax.Array:
    """Computes `answer_hidden` with one causal row per answer: the prompt's embeddings, then directly the answer's."""
    prompts, _ = right_padded(prompts)
    (B, G, T), length_B1 = tokens_BGT.shape, lengths(prompts)[:, None]
    x_prompt, x_answer = embed_prompts(params, cfg, prompts, remat=remat), embed_tokens(params, tokens_BGT)
    places_S = jnp.arange(prompts.mask_BT.shape[1] + T)
    in_prompt_BS = places_S < length_B1
    from_prompt_BS = jnp.minimum(places_S, length_B1 - 1)
    from_answer_BS = jnp.clip(places_S - length_B1, 0, T - 1)
    x_BGSD = jnp.where(
        in_prompt_BS[:, None, :, None],
        take_places(x_prompt, from_prompt_BS).astype(jnp.float32)[:, None],  # fp32: see layers.take
        take(x_answer, from_answer_BS[:, None, :, None], axis=2).astype(jnp.float32),
    ).astype(x_prompt.dtype)
    positions_3BS = jnp.where(
        in_prompt_BS,
        jax.vmap(lambda row: jnp.take_along_axis(row, from_prompt_BS, axis=1))(prompts.positions_3BT),
        prompts.next_position_B[:, None] + from_answer_BS,
    )
    x_RSD, positions_3RS = x_BGSD.reshape(B * G, *x_BGSD.shape[2:]), jnp.repeat(positions_3BS, G, axis=1)
    hidden_RSD, _ = text.prefill(params["text"], cfg, x_RSD, positions_3RS, remat=remat)
    places_RT = jnp.repeat(length_B1, G, axis=0) - 1 + jnp.arange(T)
    return take_places(hidden_RSD, places_RT).reshape(B, G, T, -1)


def joined_hidden(
    params: Any, cfg: ModelConfig, rows: Prompts, start_B: jax.Array, T: int, *, remat: str = "none"
) -> jax.Array:
    """Computes `answer_hidden` (B, 1, T, D) for rows that hold start_B tokens of prompt and then one answer each."""
    hidden_BTD, _, _ = prefill(params, cfg, rows, remat=remat)
    places_BT = jnp.minimum(start_B[:, None] - 1 + jnp.arange(T), hidden_BTD.shape[1] - 1)
    return take_places(hidden_BTD, places_BT)[:, None]


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
    """Computes log softmax(z / temperature) of the given answer tokens, and the entropy of each token's distribution.

    Args:
      tokens_BGT: answers, padded at their ends with any id.
      start_B: the number of tokens before each answer, if the rows of `prompts` also hold the answers (G = 1).
      temperature: the sampling temperature; 0 is treated as 1, so greedy answers are scored at 1.
      forbidden: ids removed from the distribution, as in sampling.
      shared: see `answer_hidden`.
      remat: which activations layers store for the backward pass, see layers.recomputed.
    Returns:
      fp32 (logprobs_BGT, entropy_BGT); values after an answer's end have no meaning.
    """
    hidden_BGTD = _hidden(params, cfg, prompts, tokens_BGT, start_B, shared, remat)
    return token_logprobs(
        hidden_BGTD,
        text.head(params["text"]),
        tokens_BGT,
        temperature=temperature,
        forbidden=forbidden,
        chunk=cfg.logit_rows,
    )


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
    """Returns (loss, metrics): `token_loss` summed over all answer tokens. The logits are computed once.

    The metrics also have the log-probabilities of the answers, logprobs_BGT.

    Args: as for `answer_logprobs`; token_loss, values: as for model.head.head_loss.
    """
    hidden_BGTD = _hidden(params, cfg, prompts, tokens_BGT, start_B, shared, remat)
    return head_loss(
        token_loss, hidden_BGTD, text.head(params["text"]), tokens_BGT, values, temperature, forbidden, cfg.logit_rows
    )


def _hidden(
    params: Any,
    cfg: ModelConfig,
    prompts: Prompts,
    tokens_BGT: jax.Array,
    start_B: jax.Array | None,
    shared: bool,
    remat: str,
) -> jax.Array:
    if start_B is None:
        return answer_hidden(params, cfg, prompts, tokens_BGT, shared=shared, remat=remat)
    return joined_hidden(params, cfg, prompts, start_B, tokens_BGT.shape[2], remat=remat)
