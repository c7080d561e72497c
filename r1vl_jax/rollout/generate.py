"""Samples answers to a batch of questions: one prefill per question, then jitted loops that each decode many tokens.

data -> [rollout] -> rewards -> step_grpo. The keys and values of a prompt are stored once per group, and all answers of
the group read them. Each answer has its own cache; all answers write at the same index.

    prefill -> decode up to 256 tokens -> drop finished questions, enlarge the cache -> decode on -> ...

The host reads the state only between these loops. The loops have few different shapes (cache lengths 256, 512, 1,024,
...; batches halved again and again), so later batches reuse the compiled programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1vl_jax.model import qwen2_vl, text
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.head import logits
from r1vl_jax.parallel.sharding import ambient_shards, constrain
from r1vl_jax.rollout.sampling import answer_uniforms, check_sampling, sample
from r1vl_jax.types import Array, Prompts, Rollout, Sampling

SEGMENT = 256  # tokens that one loop decodes before the host reads the state; also the length of the first cache


class Questions(NamedTuple):
    """The fixed inputs of decoding the answers to B questions.

    Attributes:
      prefix: the prompts' KV, one per layer.
      length_B: the number of real (not padding) keys of each prompt.
      start_B: the position of the first answer token.
      uniforms_BGT: a uniform random number for each token.
      limit_BG: the maximum number of tokens of each answer.
    """

    prefix: tuple[text.KV, ...]
    length_B: Array
    start_B: Array
    uniforms_BGT: Array
    limit_BG: Array


class Answers(NamedTuple):
    """The state of unfinished answers.

    Attributes:
      hidden_BGD: the hidden states that predict the next tokens.
      done_BG: True for finished answers.
      cache: the answers' KV, one per layer.
      sampled: the tokens so far.
    """

    hidden_BGD: jax.Array
    done_BG: jax.Array
    cache: tuple[text.KV, ...]
    sampled: Rollout


@partial(jax.jit, static_argnames="cfg")
def prefill(weights: Any, cfg: ModelConfig, prompts: Prompts) -> tuple[jax.Array, tuple[text.KV, ...], jax.Array]:
    """Runs vision tower and prompts. Returns (the last token's hidden_BD, one KV per layer, lengths_B)."""
    _, last_BD, kv = qwen2_vl.prefill(weights, cfg, prompts)
    return last_BD, kv, qwen2_vl.lengths(prompts)


@partial(jax.jit, static_argnames=("cfg", "sampling", "stop_ids"), donate_argnames="answers")
def decode(
    weights: Any,
    cfg: ModelConfig,
    questions: Questions,
    answers: Answers,
    first: Any,
    last: Any,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Answers:
    """Samples tokens first..last - 1; stops early when all answers are finished."""

    head_VD = text.head(weights["text"])

    def body(loop: tuple[Any, Answers]) -> tuple[Any, Answers]:
        step, (hidden_BGD, done_BG, cache, sampled) = loop
        uniform_BG = jax.lax.dynamic_index_in_dim(questions.uniforms_BGT, step, axis=2, keepdims=False)
        token_BG, logprob_BG = sample(logits(hidden_BGD, head_VD), uniform_BG, sampling, cfg.vision_ids)
        token_BG = jnp.where(done_BG, stop_ids[0], token_BG)
        new = Rollout(token_BG, jnp.where(done_BG, 0.0, logprob_BG), ~done_BG)
        sampled = jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b[:, :, None], step, 2), sampled, new
        )
        done_BG |= jnp.isin(token_BG, jnp.array(stop_ids)) | (step + 1 >= questions.limit_BG)
        hidden_BGD, cache = text.decode(
            weights["text"], cfg, qwen2_vl.embed_tokens(weights, token_BG), questions.start_B, step,
            questions.prefix, questions.length_B, cache, ~done_BG,
        )  # fmt: skip
        return step + 1, Answers(hidden_BGD, done_BG, cache, sampled)

    def unfinished(loop: tuple[Any, Answers]) -> jax.Array:
        return (loop[0] < last) & ~loop[1].done_BG.all()

    return jax.lax.while_loop(unfinished, body, (first, answers))[1]


@partial(jax.jit, static_argnames="length")
def enlarge(answers: Answers, length: int) -> Answers:
    """Returns the same answers with room for `length` tokens in their caches."""
    missing = length - answers.cache[0].k.shape[3]
    cache = jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, missing), (0, 0)]), answers.cache)
    return answers._replace(cache=cache)


@jax.jit
def compact(questions: Questions, answers: Answers, places_B: jax.Array) -> tuple[Questions, Answers]:
    """Returns only the questions at these places of the batch, and their answers."""

    def take(a: Any) -> Any:
        if isinstance(a, text.KV):
            k, v = (constrain(b[places_B], "batch", "kv_heads", *[None] * (b.ndim - 2)) for b in a)
            return text.KV(k, v)
        return constrain(a[places_B], "batch", *[None] * (a.ndim - 1))

    return jax.tree.map(take, (questions, answers), is_leaf=lambda node: isinstance(node, text.KV))


@partial(jax.jit, static_argnames=("cfg", "samples", "tokens", "length", "stop"))
def start(cfg: ModelConfig, last_BD: jax.Array, *, samples: int, tokens: int, length: int, stop: int) -> Answers:
    """Returns the state before the first token; caches have room for `length` tokens."""
    shape = (last_BD.shape[0], samples, tokens)
    hidden_BGD = jnp.broadcast_to(last_BD[:, None], (*shape[:2], last_BD.shape[-1]))
    cache = text.empty_cache(cfg, shape[0], shape[1], length, last_BD.dtype)
    sampled = Rollout(jnp.full(shape, stop, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool))
    hidden_BGD, sampled = jax.tree.map(lambda a: constrain(a, "batch", None, None), (hidden_BGD, sampled))
    return Answers(hidden_BGD, jnp.zeros(shape[:2], bool), cache, sampled)


def segments(tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first, last, cache length) of each decode loop for this many tokens.

    A loop decodes at most SEGMENT tokens. The cache length doubles when the next loop needs more room.
    """
    length, first = min(SEGMENT, tokens), 0
    while first < tokens:
        last = min(first + SEGMENT, tokens)
        while length < last:
            length = min(2 * length, tokens)
        yield first, last, length
        first = last


def shrunk_batch(live: int, batch: int) -> int:
    """Returns the batch size of the next loop.

    The batch is halved as long as the unfinished questions fit and the devices can still split it evenly.
    """
    while batch % (2 * ambient_shards()) == 0 and live <= batch // 2:
        batch //= 2
    return batch


def rollout(
    weights: Any,
    cfg: ModelConfig,
    prompts: Prompts,
    row_ids_B: Any,
    *,
    group: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    seed: int,
    step: int,
    limit_BG: Any = None,
) -> Rollout:
    """Samples `group` answers to each question.

    Args:
      weights: fused (model.fused.fuse), in the dtype of the computation.
      prompts: B questions.
      row_ids_B: a number for each question. An answer's random numbers depend on this number, on seed and step, and on
        the answer's index in its group.
      stop_ids: an answer ends with the first of these ids; this token is part of the answer.
      limit_BG: the maximum number of tokens of each answer; None: max_new_tokens for all.
    Returns:
      Rollout of (B, group, max_new_tokens) arrays, on the host.
    """
    check_sampling(sampling)
    T, stop_ids = sampling.max_new_tokens, tuple(stop_ids)
    uniforms_BGT = _uniforms(seed, step, row_ids_B, group, T)
    last_BD, prefix, length_B = prefill(weights, cfg, prompts)
    limit_BG = np.full(uniforms_BGT.shape[:2], T) if limit_BG is None else limit_BG
    questions = Questions(prefix, length_B, prompts.next_position_B, uniforms_BGT, jnp.asarray(limit_BG, jnp.int32))
    answers = start(cfg, last_BD, samples=group, tokens=T, length=min(SEGMENT, T), stop=stop_ids[0])
    whole, places_B = None, np.arange(len(length_B))
    for first, last, length in segments(T):
        if length > answers.cache[0].k.shape[3]:
            answers = enlarge(answers, length)
        answers = decode(weights, cfg, questions, answers, first, last, sampling, stop_ids)
        if last == T:
            break
        live_B = ~jax.device_get(answers.done_BG).all(axis=1)
        if not live_B.any():
            break
        batch = shrunk_batch(live_B.sum(), len(live_B))
        if batch < len(live_B):
            whole = _written(whole, answers.sampled, places_B)
            kept = np.argsort(~live_B, kind="stable")[:batch]
            questions, answers = compact(questions, answers, kept)
            places_B = places_B[kept]
    return _written(whole, answers.sampled, places_B)


def _written(whole: Rollout | None, part: Rollout, places_B: np.ndarray) -> Rollout:
    """Returns the whole batch's answers on the host, after `part` has overwritten those at places_B."""
    part = jax.device_get(part)
    if whole is None:
        return jax.tree.map(np.array, part)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        a[places_B] = b
    return whole


_uniforms = jax.jit(answer_uniforms, static_argnames=("seed", "group", "length"))
