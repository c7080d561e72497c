"""Answers for a batch of questions: prefill once a question, then G answers of each decoded in one jitted loop.

data -> [rollout] -> rewards -> step_grpo. The prompt's keys and values are held once a group and read by all its
answers; each answer has its own cache, and all write at one common index.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1vl_jax.model import qwen2_vl, text
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.rollout.sampling import answer_uniforms, check_sampling, sample
from r1vl_jax.types import Prompts, Rollout, Sampling


class _Loop(NamedTuple):
    step: jax.Array
    hidden_BGD: jax.Array
    done_BG: jax.Array
    cache: text.KV
    out: Rollout


@partial(jax.jit, static_argnames="cfg")
def prefill(params, cfg: ModelConfig, prompts: Prompts):
    """Vision and prompts: (the last token's hidden_BD, KV (L, B, S, K, H))."""
    _, last_BD, kv = qwen2_vl.prefill(params, cfg, prompts)
    return last_BD, kv


@partial(jax.jit, static_argnames=("cfg", "sampling", "stop_ids"))
def decode_loop(
    params, cfg: ModelConfig, last_BD, prefix: text.KV, prompts: Prompts, uniforms_BGT, sampling: Sampling, stop_ids
) -> Rollout:
    """Samples until each answer has a stop token or the length is used up."""
    B, G, T = uniforms_BGT.shape
    prefix_mask_BS, start_B = prompts.mask_BT, prompts.next_position_B
    layers = text.unstack(params["text"]["layers"], cfg.layers)
    prefix_layers = text.unstack(prefix, cfg.layers)
    stops = jnp.array(stop_ids)

    def body(loop: _Loop) -> _Loop:
        logits = text.logits(params["text"], loop.hidden_BGD)
        uniform_BG = jax.lax.dynamic_index_in_dim(uniforms_BGT, loop.step, axis=2, keepdims=False)
        token_BG, logprob_BG = sample(logits, uniform_BG, sampling, cfg.vision_ids)
        live_BG = ~loop.done_BG
        token_BG = jnp.where(live_BG, token_BG, stop_ids[0])
        out = Rollout(
            tokens_BGT=loop.out.tokens_BGT.at[:, :, loop.step].set(token_BG),
            logprobs_BGT=loop.out.logprobs_BGT.at[:, :, loop.step].set(jnp.where(live_BG, logprob_BG, 0.0)),
            mask_BGT=loop.out.mask_BGT.at[:, :, loop.step].set(live_BG),
        )
        done_BG = loop.done_BG | jnp.isin(token_BG, stops)
        x_BGD = qwen2_vl.embed_tokens(params, token_BG)
        hidden, cache = text.decode(
            params["text"], layers, cfg, x_BGD, start_B, loop.step, prefix_layers, prefix_mask_BS, loop.cache
        )
        return _Loop(loop.step + 1, hidden, done_BG, cache, out)

    start = _Loop(
        step=jnp.int32(0),
        hidden_BGD=jnp.broadcast_to(last_BD[:, None], (B, G, last_BD.shape[-1])),
        done_BG=jnp.zeros((B, G), bool),
        cache=text.empty_cache(cfg, B, G, T, last_BD.dtype),
        out=Rollout(jnp.full((B, G, T), stop_ids[0]), jnp.zeros((B, G, T)), jnp.zeros((B, G, T), bool)),
    )
    return jax.lax.while_loop(lambda loop: (loop.step < T) & ~loop.done_BG.all(), body, start).out


def rollout(
    params,
    cfg: ModelConfig,
    prompts: Prompts,
    row_ids_B,
    *,
    group: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    seed: int,
    step: int,
) -> Rollout:
    """Samples `group` answers to each question.

    Args:
      params: weights in the dtype of the computation.
      prompts: B questions; row_ids_B: a number for each that, with (seed, step, sample), fixes its random numbers.
      stop_ids: an answer ends with the first of these; it counts.
    Returns:
      Rollout of (B, group, max_new_tokens) arrays.
    """
    check_sampling(sampling)
    uniforms = _uniforms(seed, step, row_ids_B, group, sampling.max_new_tokens)
    last_BD, kv = prefill(params, cfg, prompts)
    return decode_loop(params, cfg, last_BD, kv, prompts, uniforms, sampling, tuple(stop_ids))


_uniforms = jax.jit(answer_uniforms, static_argnames=("seed", "group", "length"))
