"""Samples answers to a batch of questions: one prefill per question, then jitted loops that each decode many tokens.

data -> [rollout] -> rewards -> step_grpo. An answer is a row. The keys and values of a prompt are stored once, and all
rows of its question read them. Each row has its own cache; all rows write at the same index.

    prefill -> decode -> drop the finished rows -> decode on -> ...

A loop ends, on the device, as soon as so many rows are finished that the others fit the next size of `row_counts`,
but not before SEGMENT tokens. The host reads the state only between the loops. There are at most eight sizes, so there
are at most eight programs for prompts of up to PROMPT_MULTIPLE tokens, eight more for up to twice as many, and so on.
Later batches reuse them. (With kernels `reference`, whose time grows with the length of the caches, prompts keep their
length, and the answers' caches start short and double, which makes more programs.)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1vl_jax.model import qwen2_vl, text
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.head import logits
from r1vl_jax.parallel.sharding import ambient_shards, constrain, per_shard
from r1vl_jax.rollout.sampling import answer_uniforms, check_sampling, sample
from r1vl_jax.types import Array, Prompts, Rollout, Sampling

SEGMENT = 64  # tokens that a loop decodes, at least, before rows are dropped
FIRST_CACHE = 256  # length of the first cache, if caches grow
PROMPT_MULTIPLE = 512  # the prompts' keys are padded to multiples of this, if the time does not depend on it
ROW_SHARES = (1, 0.8, 0.65, 0.5, 0.375, 0.25, 0.15, 0.075)  # the sizes of a loop, as shares of all rows
ROW_MULTIPLE = 8  # sizes are multiples of this, so that matmuls need no padding

# Keys and values, one array per layer: (B, K, 2, S, H) of prompts, (R, K, 2, S, H) of rows.
Cache = tuple[jax.Array, ...]


class Rows(NamedTuple):
    """The fixed inputs of decoding R answers.

    Attributes:
      question_R: the index of each row's prompt, among the prompts of the row's device.
      prefix_length_R: the number of real (not padding) keys of its prompt.
      start_R: the position of the first answer token.
      limit_R: the maximum number of tokens of each answer.
      uniforms_RT: a uniform random number for each token.
    """

    question_R: Array
    prefix_length_R: Array
    start_R: Array
    limit_R: Array
    uniforms_RT: Array


class Answers(NamedTuple):
    """The state of R answers.

    Attributes:
      step: the number of tokens sampled so far, the same for all unfinished answers.
      hidden_RD: the hidden states that predict the next tokens.
      done_R: True for finished answers.
      cache: the answers' keys and values.
      tokens_RT, logprobs_RT: the tokens so far; stop tokens and 0 after an answer's end.
      length_R: the number of tokens of each answer so far.
    """

    step: jax.Array
    hidden_RD: jax.Array
    done_R: jax.Array
    cache: Cache
    tokens_RT: jax.Array
    logprobs_RT: jax.Array
    length_R: jax.Array


class Until(NamedTuple):
    """When a decode loop ends, as numbers: they may change without a new program.

    Attributes:
      last: when so many tokens are sampled.
      rows: when at most so many rows of each device are unfinished, if the number of tokens is from `earliest` to
        `latest`.
    """

    last: int
    rows: int
    earliest: int
    latest: int


def ends(until: Until, step: Any, live: Any) -> Any:
    """Returns whether a decode loop ends after `step` tokens, with at most `live` unfinished rows on each device."""
    fit = (live <= until.rows) & (step >= until.earliest) & (step <= until.latest)
    return fit | (step >= until.last) | (live == 0)


@partial(jax.jit, static_argnames="cfg")
def prefill(weights: Any, cfg: ModelConfig, prompts: Prompts) -> tuple[jax.Array, Cache, jax.Array]:
    """Runs vision tower and prompts. Returns (the last token's hidden_BD, the prompts' keys and values, lengths_B)."""
    _, last_BD, kv = qwen2_vl.prefill(weights, cfg, prompts)
    missing = 0 if cfg.kernels == "reference" else -kv[0].k.shape[2] % PROMPT_MULTIPLE

    def joined(layer: text.KV) -> jax.Array:
        both = jnp.pad(jnp.stack(layer, axis=2), [(0, 0)] * 3 + [(0, missing), (0, 0)])
        return constrain(both, "batch", "kv_heads", None, None, None)

    return last_BD, tuple(map(joined, kv)), qwen2_vl.lengths(prompts)


@partial(jax.jit, static_argnames=("cfg", "sampling", "stop_ids"), donate_argnames="answers")
def decode(
    weights: Any,
    cfg: ModelConfig,
    prefix: Cache,
    rows: Rows,
    answers: Answers,
    until: Until,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Answers:
    """Samples tokens until all answers are finished or `until` says so."""
    head_VD = text.head(weights["text"])
    question_R: jax.Array | None = jnp.asarray(rows.question_R)
    if cfg.kernels == "reference":  # copies each row's prompt once, not once per token
        prefix, question_R = tuple(_taken(a, question_R, "kv_heads") for a in prefix), None

    def body(answers: Answers) -> Answers:
        step, done_R = answers.step, answers.done_R
        uniform_R = jax.lax.dynamic_index_in_dim(rows.uniforms_RT, step, axis=1, keepdims=False)
        token_R, logprob_R = sample(logits(answers.hidden_RD, head_VD), uniform_R, sampling, cfg.vision_ids)
        token_R, logprob_R = jnp.where(done_R, stop_ids[0], token_R), jnp.where(done_R, 0.0, logprob_R)
        length_R = answers.length_R + (~done_R).astype(jnp.int32)
        done_R |= jnp.isin(token_R, jnp.array(stop_ids)) | (step + 1 >= rows.limit_R)
        hidden_RD, cache = text.decode(
            weights["text"], cfg, qwen2_vl.embed_tokens(weights, token_R), rows.start_R + step, step,
            prefix, rows.prefix_length_R, question_R, answers.cache, ~done_R,
        )  # fmt: skip
        tokens_RT, logprobs_RT = (
            jax.lax.dynamic_update_slice_in_dim(a, new[:, None], step, axis=1)
            for a, new in ((answers.tokens_RT, token_R), (answers.logprobs_RT, logprob_R))
        )
        return Answers(step + 1, hidden_RD, done_R, cache, tokens_RT, logprobs_RT, length_R)

    def unfinished(answers: Answers) -> jax.Array:
        live = (~answers.done_R).reshape(ambient_shards(), -1).sum(axis=1).max()
        return ~ends(until, answers.step, live)

    return jax.lax.while_loop(unfinished, body, answers)


@partial(jax.jit, static_argnames="length")
def enlarge(answers: Answers, length: int) -> Answers:
    """Returns the same answers with room for `length` tokens in their caches."""
    missing = length - answers.cache[0].shape[3]
    cache = tuple(jnp.pad(a, [(0, 0)] * 3 + [(0, missing), (0, 0)]) for a in answers.cache)
    return answers._replace(cache=cache)


@jax.jit
def compact(rows: Rows, answers: Answers, places_R: jax.Array) -> tuple[Rows, Answers]:
    """Returns only the rows at these places, which count within the rows of a device; nothing moves between devices."""
    cache = tuple(_taken(a, places_R, "kv_heads") for a in answers.cache)
    state = answers._replace(cache=())
    rows, state = jax.tree.map(lambda a: _taken(a, places_R) if a.ndim else a, (rows, state))
    return rows, state._replace(cache=cache)


def _taken(a: jax.Array, places: jax.Array, *axes: str) -> jax.Array:
    """Returns a[places], on each device for its own part of the first axis. `axes`: the names of the next axes."""
    names = ("batch", *axes, *[None] * (a.ndim - 1 - len(axes)))
    return per_shard(lambda a, places: a[places], (names, ("batch",)), names)(a, places)


@partial(jax.jit, static_argnames=("cfg", "length", "stop"))
def start(
    cfg: ModelConfig,
    last_BD: jax.Array,
    length_B: jax.Array,
    next_position_B: jax.Array,
    uniforms_BGT: jax.Array,
    limit_BG: jax.Array,
    *,
    length: int,
    stop: int,
) -> tuple[Rows, Answers]:
    """Returns the rows, those of a question one after another, and their state before the first token.

    Args:
      last_BD: the prompts' last hidden states.
      length_B, next_position_B: the prompts' lengths, and the positions after them.
      length: caches have room for so many tokens.
    """
    B, G, T = uniforms_BGT.shape
    question_R = jnp.repeat(jnp.arange(B, dtype=jnp.int32) % (B // ambient_shards()), G)
    length_R, start_R = (jnp.repeat(a, G, axis=0) for a in (length_B, next_position_B))
    rows = Rows(question_R, length_R, start_R, limit_BG.reshape(-1), uniforms_BGT.reshape(-1, T))
    R, zeros = B * G, jnp.zeros(B * G, jnp.int32)
    answers = Answers(
        jnp.int32(0), jnp.repeat(last_BD, G, axis=0), jnp.zeros(R, bool), (), jnp.full((R, T), stop, jnp.int32),
        jnp.zeros((R, T)), zeros,
    )  # fmt: skip
    split = jax.tree.map(lambda a: constrain(a, "batch", *[None] * (a.ndim - 1)) if a.ndim else a, (rows, answers))
    return split[0], split[1]._replace(cache=text.empty_cache(cfg, R, length, last_BD.dtype))


def row_counts(rows: int) -> list[int]:
    """Returns the numbers of rows that the loops of a batch may have on each device, from all rows down."""
    shares = (math.ceil(rows * share / ROW_MULTIPLE) * ROW_MULTIPLE for share in ROW_SHARES)
    return sorted({min(rows, share) for share in shares}, reverse=True)


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
      limit_BG: the maximum number of tokens of each answer, at least 1; None: max_new_tokens for all.
    Returns:
      Rollout of (B, group, max_new_tokens) arrays, on the host.
    """
    check_sampling(sampling)
    T, stop_ids, shards = sampling.max_new_tokens, tuple(stop_ids), ambient_shards()
    uniforms_BGT = _uniforms(seed, step, row_ids_B, group, T)
    last_BD, prefix, length_B = prefill(weights, cfg, prompts)
    limit_BG = jnp.asarray(np.full(uniforms_BGT.shape[:2], T) if limit_BG is None else limit_BG, jnp.int32)
    room = min(FIRST_CACHE, T) if cfg.kernels == "reference" else T
    rows, answers = start(
        cfg, last_BD, length_B, prompts.next_position_B, uniforms_BGT, limit_BG, length=room, stop=stop_ids[0]
    )
    shape = limit_BG.size, T
    whole = Rollout(np.empty(shape, np.int32), np.empty(shape, np.float32), np.empty(shape, bool))
    places = np.arange(limit_BG.size).reshape(shards, -1)  # of each device's rows, in the whole batch
    counts, now = row_counts(places.shape[1]), 0
    while True:
        fewer = max((n for n in counts if n < places.shape[1]), default=0)
        until = Until(room, fewer, now + SEGMENT, T - SEGMENT)
        answers = decode(weights, cfg, prefix, rows, answers, until, sampling, stop_ids)
        now, done = int(answers.step), np.asarray(answers.done_R).reshape(places.shape)
        if now == T or done.all():
            break
        live = (~done).sum(axis=1).max()
        smaller = [n for n in counts if live <= n < places.shape[1]] if until.earliest <= now <= until.latest else []
        if smaller:
            _write(whole, answers, places)
        for size in smaller:  # one size at a time: so there are seven programs, and not one for each pair of sizes
            kept = np.argsort(done, axis=1, kind="stable")[:, :size]
            rows, answers = compact(rows, answers, kept.reshape(-1))
            places, done = (np.take_along_axis(a, kept, axis=1) for a in (places, done))
        if now == room:
            room = min(2 * room, T)
            answers = enlarge(answers, room)
    _write(whole, answers, places)
    return jax.tree.map(lambda a: a.reshape(-1, group, T), whole)


def _write(whole: Rollout, answers: Answers, places: np.ndarray) -> None:
    """Writes the rows' answers so far to their places in the whole batch, (R, T) arrays on the host."""
    tokens_RT, logprobs_RT, length_R = jax.device_get((answers.tokens_RT, answers.logprobs_RT, answers.length_R))
    mask_RT = np.arange(tokens_RT.shape[1]) < length_R[:, None]
    for a, part in zip(jax.tree.leaves(whole), (tokens_RT, logprobs_RT, mask_RT), strict=True):
        a[places.reshape(-1)] = part


_uniforms = jax.jit(answer_uniforms, static_argnames=("seed", "group", "length"))
