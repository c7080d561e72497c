"""Computes decode attention: one token of each answer attends to the answer's prompt and to the answer's own cache.

    out = softmax(q k^T / sqrt(H)) v          one softmax over prompt and answer, each up to its length

Decoding is expected to be limited by memory traffic and by the number of kernels, so both parts are one kernel. A
program instance handles one answer (row) and one kv head. It reads the blocks of the prompt's keys, then those of the
answer's keys, and keeps a running softmax in fp32:

    m' = max(m, max s)    l' = l e^(m-m') + sum e^(s-m')    o' = o e^(m-m') + e^(s-m') v    lse = m + log l

Blocks after a length are not read. Answers to the same question read the same prompt. On a GPU their instances start
one after another, so that the later ones should find the prompt in the L2 cache; a TPU reads it once per answer. With
few rows, a GPU splits the keys of a row among several instances (flash-decoding: Dao, Haziza, Massa, Sizov 2023). XLA
merges their results with the weights e^(lse - max lse).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

from r1vl_kernels.backends import check_array, check_backend, on_device
from r1vl_kernels.reference_jax import LOW, attention

PROGRAMS = 132  # with fewer GPU program instances, the keys are split to get about so many: one per SM of an H100
GPU_BLOCK_BYTES = 128  # bytes of one component of all keys in a block: 64 keys in bf16, 32 in fp32
TPU_BLOCK = 512  # keys in a block
TINY = 1e-30

State = tuple[jax.Array, jax.Array, jax.Array]  # the running softmax (o, m, l): (E, H), (E, 1), (E, 1)


def prefix_decode_attention(
    q_RKEH: jax.Array,
    prefix_BK2SH: jax.Array,
    prefix_length_R: jax.Array,
    own_RK2SH: jax.Array,
    own_length_R: jax.Array,
    question_R: jax.Array | None,
    *,
    backend: str,
) -> jax.Array:
    """Returns the attention (R, K, E, H) of one token's queries, in their dtype; E query heads share a kv head.

    A row that sees no key in either part gets a finite value without meaning. The kernels have no gradient, because
    training does not differentiate through decoding.

    Args:
      q_RKEH: the queries of R answers; query head n of N = K*E is (n // E, n % E).
      prefix_BK2SH: the keys (index 0 of axis "2") and values (index 1) of B prompts.
      prefix_length_R: int32, the number of keys of its prompt that a row sees.
      own_RK2SH: the keys and values of the answers; their S may differ from the prompts' S.
      own_length_R: int32, the number of keys of its own that a row sees; 0 is allowed, here and for prompts.
      question_R: int32, the index in B of each row's prompt; None: row r reads prompt r.
      backend: reference, pallas or interpret. "reference" needs finite numbers behind the lengths.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    check_backend(backend)
    check_array("q_RKEH", q_RKEH, jnp.floating)
    R, K, _, H = q_RKEH.shape
    for name, cache, rows in (("prefix_BK2SH", prefix_BK2SH, None), ("own_RK2SH", own_RK2SH, R)):
        check_array(name, cache, q_RKEH.dtype)
        expected = (cache.shape[0] if rows is None else rows, K, 2, cache.shape[3], H)
        check_array(name, cache, q_RKEH.dtype, expected, "q_RKEH, and S")
    scalars = {"prefix_length_R": prefix_length_R, "own_length_R": own_length_R, "question_R": question_R}
    for name, scalar in scalars.items():
        if scalar is not None:
            check_array(name, scalar, jnp.integer, (R,), "the rows of q_RKEH")
    arrays = (q_RKEH, prefix_BK2SH, prefix_length_R, own_RK2SH, own_length_R)
    if backend == "reference" or 0 in q_RKEH.shape + prefix_BK2SH.shape + own_RK2SH.shape:
        return attention(*arrays, question_R)
    return on_device(_call, backend, *arrays, jnp.arange(R) if question_R is None else question_R)


def _call(
    q: jax.Array,
    prefix: jax.Array,
    prefix_length: jax.Array,
    own: jax.Array,
    own_length: jax.Array,
    question: jax.Array,
    *,
    form: str,
    **call: Any,
) -> jax.Array:
    """Runs the kernel's form for a GPU or a TPU."""
    lengths = (jnp.clip(prefix_length, 0, prefix.shape[3]), jnp.clip(own_length, 0, own.shape[3]))
    scalars = [scalar.astype(jnp.int32) for scalar in (*lengths, question)]
    return {"gpu": _gpu, "tpu": _tpu}[form](scalars, q, prefix, own, **call)


def _start(rows: int, width: int) -> State:
    """Returns the running softmax before the first key."""
    column = jnp.zeros((rows, 1), jnp.float32)
    return jnp.zeros((rows, width), jnp.float32), column + LOW, column


def _step(state: State, q_EH: jax.Array, k_SH: jax.Array, v_SH: jax.Array, seen_1S: jax.Array, scale: float) -> State:
    """Returns the running softmax after one more block of keys; seen_1S is False for masked keys."""
    out, top, total = state
    precision = jax.lax.Precision.HIGHEST if q_EH.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_1S, dot(q_EH, k_SH, (((1,), (1,)), ((), ()))) * scale, LOW)
    higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    keep, weights = jnp.exp(top - higher), jnp.exp(scores - higher)
    out = out * keep + dot(weights.astype(v_SH.dtype), v_SH, (((1,), (0,)), ((), ())))
    return out, higher, total * keep + jnp.sum(weights, axis=1, keepdims=True)


def _finish(state: State) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse); (0, LOW) if no key was seen."""
    out, top, total = state
    total = jnp.maximum(total, TINY)
    return out / total, top + jnp.log(total)


def _gpu(scalars: list[jax.Array], q: jax.Array, prefix: jax.Array, own: jax.Array, **call: Any) -> jax.Array:
    """Runs the GPU kernel, and merges the results of its splits if there are several.

    Split i of n reads the key blocks i, i + n, i + 2n, ... of prompt and answer together, so that short rows are
    divided evenly too. Query rows are padded to 16, for the tensor cores.
    """
    R, K, E, H = q.shape
    B, keys = prefix.shape[0], (prefix.shape[3], own.shape[3])
    rows, width = max(16, pl.next_power_of_2(E)), max(16, pl.next_power_of_2(H))
    block = min(GPU_BLOCK_BYTES // q.dtype.itemsize, max(16, pl.next_power_of_2(max(keys))))
    S_prefix, S_own = (pl.cdiv(size, block) * block for size in keys)
    splits = min((S_prefix + S_own) // block, max(1, PROGRAMS // (R * K)))

    def block_of(*shape: int | None) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda row, head, split: (row, head, split, 0, 0)[: len(shape)])

    out_specs, dtype = block_of(None, None, None, rows, width), jnp.float32
    out_shapes = [jax.ShapeDtypeStruct((R, K, splits, E, H), q.dtype if splits == 1 else dtype)]
    if splits > 1:
        out_shapes.append(jax.ShapeDtypeStruct((R, K, splits, E), dtype))
    out = pl.pallas_call(
        partial(_gpu_kernel, shape=(E, H), block=block, splits=splits),
        grid=(R, K, splits),  # the first axis varies fastest
        in_specs=[
            *[pl.BlockSpec((1,), lambda row, head, split: (row,))] * 3,
            pl.BlockSpec((None, None, rows, width), lambda row, head, split: (row, head, 0, 0)),
            pl.BlockSpec((B, None, 2, S_prefix, width), lambda row, head, split: (0, head, 0, 0, 0)),
            pl.BlockSpec((None, None, 2, S_own, width), lambda row, head, split: (row, head, 0, 0, 0)),
        ],
        out_specs=[out_specs, block_of(None, None, None, rows)][: len(out_shapes)],
        out_shape=out_shapes,
        name="prefix_decode_attention",
        **call,
    )(*scalars, q, prefix, own)
    if splits == 1:
        return out[0][:, :, 0]
    parts, lse = out[0], out[1][..., None]
    weights = jnp.exp(lse - lse.max(2, keepdims=True))
    return ((weights * parts).sum(2) / weights.sum(2)).astype(q.dtype)


def _gpu_kernel(
    prefix_length_ref: Any,
    own_length_ref: Any,
    question_ref: Any,
    q_ref: Any,
    prefix_ref: Any,
    own_ref: Any,
    out_ref: Any,
    *lse_refs: Any,
    shape: tuple[int, int],
    block: int,
    splits: int,
) -> None:
    E, H = shape
    rows, width = q_ref.shape
    split, question = pl.program_id(2), question_ref[0]
    row, column = jnp.arange(rows) < E, (jnp.arange(width) < H)[None, :]
    queries = row[:, None] & column
    q = triton.load(q_ref, mask=queries, other=0)

    def attend(state: State, ref: Any, at: tuple[Any, ...], length: jax.Array, first: jax.Array) -> State:
        """Adds the blocks first, first + splits, ... before the length."""

        def body(i: jax.Array, state: State) -> State:
            start = (first + i * splits) * block
            seen = start + jnp.arange(block) < length
            k, v = (
                triton.load(ref.at[(*at, jnp.int32(part), pl.ds(start, block))], mask=seen[:, None] & column, other=0)
                for part in range(2)
            )
            return _step(state, q, k, v, seen[None, :], H**-0.5)

        blocks = (pl.cdiv(length, block) - first + splits - 1) // splits  # negative if it starts too late
        return jax.lax.fori_loop(0, jnp.maximum(blocks, 0), body, state)

    prefix_length = prefix_length_ref[0]
    state = attend(_start(rows, width), prefix_ref, (question,), prefix_length, split)
    before = jax.lax.rem(pl.cdiv(prefix_length, block), splits)  # blocks of the prompt in the last, incomplete round
    state = attend(state, own_ref, (), own_length_ref[0], jax.lax.rem(split + splits - before, splits))
    out, lse = _finish(state)
    triton.store(out_ref, out.astype(out_ref.dtype), mask=queries)
    for lse_ref in lse_refs:
        triton.store(lse_ref, jnp.sum(lse, axis=1), mask=row)


def _tpu(scalars: list[jax.Array], q: jax.Array, prefix: jax.Array, own: jax.Array, **call: Any) -> jax.Array:
    """Runs the TPU kernel.

    The program instances of a row and kv head run one after another, each on one block of keys, the prompt's first.
    They keep the running softmax in scratch memory. For blocks after a length, the index maps name the last real block
    again, which is not fetched twice.
    """
    R, K, E, H = q.shape
    sizes = prefix.shape[3], own.shape[3]
    blocks = min(sizes[0], TPU_BLOCK), min(sizes[1], TPU_BLOCK)
    counts = pl.cdiv(sizes[0], blocks[0]), pl.cdiv(sizes[1], blocks[1])

    def last(length: Any, block: int) -> Any:
        return jnp.maximum(pl.cdiv(length, block) - 1, 0)

    def queries(row: Any, head: Any, part: Any, *scalars: Any) -> tuple[Any, Any, int, int]:
        return row, head, 0, 0

    def of_prefix(
        row: Any, head: Any, part: Any, prefix_length: Any, own_length: Any, question: Any
    ) -> tuple[Any, ...]:
        return question[row], head, 0, jnp.minimum(part, last(prefix_length[row], blocks[0])), 0

    def of_own(row: Any, head: Any, part: Any, prefix_length: Any, own_length: Any, question: Any) -> tuple[Any, ...]:
        return row, head, 0, jnp.clip(part - counts[0], 0, last(own_length[row], blocks[1])), 0

    return pl.pallas_call(
        partial(_tpu_kernel, counts=counts, blocks=blocks),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(R, K, sum(counts)),
            in_specs=[
                pl.BlockSpec((None, None, E, H), queries),
                pl.BlockSpec((None, None, 2, blocks[0], H), of_prefix),
                pl.BlockSpec((None, None, 2, blocks[1], H), of_own),
            ],
            out_specs=pl.BlockSpec((None, None, E, H), queries),
            scratch_shapes=[tpu.VMEM(shape, jnp.float32) for shape in ((E, H), (E, 1), (E, 1))],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="prefix_decode_attention",
        **call,
    )(*scalars, q, prefix, own)


def _tpu_kernel(
    prefix_length_ref: Any,
    own_length_ref: Any,
    question_ref: Any,
    q_ref: Any,
    prefix_ref: Any,
    own_ref: Any,
    out_ref: Any,
    *state_refs: Any,
    counts: tuple[int, int],
    blocks: tuple[int, int],
) -> None:
    row, part = pl.program_id(0), pl.program_id(2)

    def keep(state: State) -> None:
        for ref, value in zip(state_refs, state, strict=True):
            ref[...] = value

    @pl.when(part == 0)
    def _() -> None:
        keep(_start(*q_ref.shape))

    def attend(ref: Any, part: jax.Array, length: jax.Array, block: int) -> None:
        """Adds block `part` of a cache, if the block begins before the length."""

        @pl.when((part >= 0) & (part * block < length))
        def _() -> None:
            seen_1S = part * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < length
            seen_S1 = part * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < length
            v = jnp.where(seen_S1, ref[1], 0)  # masked keys have weight 0, but 0 times NaN is NaN
            state = tuple(ref[...] for ref in state_refs)
            keep(_step(state, q_ref[...], ref[0], v, seen_1S, q_ref.shape[1] ** -0.5))

    attend(prefix_ref, jnp.where(part < counts[0], part, -1), prefix_length_ref[row], blocks[0])
    attend(own_ref, part - counts[0], own_length_ref[row], blocks[1])

    @pl.when(part == sum(counts) - 1)
    def _() -> None:
        out_ref[...] = _finish(tuple(ref[...] for ref in state_refs))[0].astype(out_ref.dtype)
