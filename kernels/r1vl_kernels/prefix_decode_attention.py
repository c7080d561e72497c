"""Computes decode attention: one token of each answer attends to the prompt of its group and to its own answer's cache.

    out = softmax(q k^T / sqrt(H)) v          one softmax over prompt and answer, each up to its length

Decoding is expected to be limited by memory traffic. The kernel therefore reads a group's prompt once for all its G
answers, not once per answer. The keys are split among Pallas program instances (flash-decoding: Dao, Haziza, Massa,
Sizov 2023). Each instance keeps a running softmax in fp32 over its blocks of keys:

    m' = max(m, max s)    l' = l e^(m-m') + sum e^(s-m')    o' = o e^(m-m') + e^(s-m') v    lse = m + log l

The same kernel handles the prompts and the answers. Its input is a list of caches, and for each cache the Q query rows
that read it. A cache holds the keys and values of one kv head, of one prompt (Q = G*E) or of one answer (Q = E). The
instances return o / l and lse, and XLA merges them with the weights e^(lse - max lse). Blocks of keys after a cache's
length are not read.
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

PROGRAMS = (
    528  # four per SM of an H100 (132 SMs), at least two at a time, so that caches of unequal length share SMs evenly
)
GPU_BLOCK_BYTES = 128  # bytes of one component of all keys in a block: 64 keys in bf16, 32 in fp32
TPU_BLOCK = 512  # keys in a block
QUERY_ROWS = 64  # maximum number of query rows of a GPU program instance
TINY = 1e-30

State = tuple[jax.Array, jax.Array, jax.Array]  # the running softmax (o, m, l): (Q, H), (Q, 1), (Q, 1)


def prefix_decode_attention(
    q_BKGEH: jax.Array,
    prefix_k_BKSH: jax.Array,
    prefix_v_BKSH: jax.Array,
    prefix_length_B: jax.Array,
    own_k_BKGSH: jax.Array,
    own_v_BKGSH: jax.Array,
    own_length_BG: jax.Array,
    *,
    backend: str,
) -> jax.Array:
    """Returns the attention (B, K, G, E, H) of one token's queries, in their dtype; E query heads share a kv head.

    An answer that sees no key in either part gets a finite value without meaning. The gradient is that of the
    reference; training does not differentiate through decoding.

    Args:
      q_BKGEH: queries; query head n of N = K*E is (n // E, n % E).
      prefix_k_BKSH, prefix_v_BKSH: the prompts' caches, one per group.
      prefix_length_B: int32, keys from this index on are masked; "reference" needs finite numbers there.
      own_k_BKGSH, own_v_BKGSH: the answers' caches; their S may differ from the prompts' S.
      own_length_BG: int32, keys from this index on are masked; 0 is allowed.
      backend: reference, pallas or interpret.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    check_backend(backend)
    check_array("q_BKGEH", q_BKGEH, jnp.floating)
    B, K, G, _, H = q_BKGEH.shape
    parts = (
        ("prefix", prefix_k_BKSH, prefix_v_BKSH, "BKSH", (B, K), prefix_length_B, "B", (B,)),
        ("own", own_k_BKGSH, own_v_BKGSH, "BKGSH", (B, K, G), own_length_BG, "BG", (B, G)),
    )
    for part, k, v, letters, caches, length, length_letters, length_shape in parts:
        check_array(f"{part}_k_{letters}", k, q_BKGEH.dtype)
        check_array(f"{part}_k_{letters}", k, q_BKGEH.dtype, (*caches, k.shape[-2], H), "q_BKGEH, and S")
        check_array(f"{part}_v_{letters}", v, q_BKGEH.dtype, k.shape, f"{part}_k_{letters}")
        check_array(f"{part}_length_{length_letters}", length, jnp.integer, length_shape, "q_BKGEH")
    arrays = (q_BKGEH, prefix_k_BKSH, prefix_v_BKSH, prefix_length_B, own_k_BKGSH, own_v_BKGSH, own_length_BG)
    if backend == "reference" or 0 in q_BKGEH.shape + prefix_k_BKSH.shape + own_k_BKGSH.shape:
        return attention(*arrays)
    return _attention(backend, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(backend: str, *arrays: jax.Array) -> Any:
    return on_device(_both_parts, backend, *arrays)


def _forward(backend: str, *arrays: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
    return _attention(backend, *arrays), arrays


def _backward(backend: str, arrays: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array | None, ...]:
    q, prefix_k, prefix_v, prefix_length, own_k, own_v, own_length = arrays
    _, pull = jax.vjp(
        lambda q, pk, pv, ok, ov: attention(q, pk, pv, prefix_length, ok, ov, own_length),
        *(q, prefix_k, prefix_v, own_k, own_v),
    )
    q, prefix_k, prefix_v, own_k, own_v = pull(grad)
    return q, prefix_k, prefix_v, None, own_k, own_v, None


_attention.defvjp(_forward, _backward)


def _both_parts(
    q_BKGEH: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_length_B: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    own_length_BG: jax.Array,
    *,
    form: str,
    **call: Any,
) -> jax.Array:
    """Runs the kernel on the prompts' caches, then on the answers' caches, and merges the two results."""
    B, K, G, E, H = q_BKGEH.shape
    partial_attention = {"gpu": _partial_gpu, "tpu": _partial_tpu}[form]

    def part(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        caches = k.shape[: k.ndim - 2]
        q, k, v = (array.reshape(-1, *array.shape[len(caches) :]) for array in (q, k, v))
        return partial_attention(q, k, v, jnp.broadcast_to(length, caches).reshape(-1).astype(jnp.int32), **call)

    prefix_out, prefix_lse = part(q_BKGEH.reshape(B, K, G * E, H), prefix_k, prefix_v, prefix_length_B[:, None])
    own_out, own_lse = part(q_BKGEH, own_k, own_v, own_length_BG[:, None, :])
    # The splits become axis 2 of the prompt's part and axis 3 of the answers' part.
    prefix_out, prefix_lse = (x.reshape(B, K, -1, G, E, x.shape[-1]) for x in (prefix_out, prefix_lse[..., None]))
    own_out, own_lse = (x.reshape(B, K, G, -1, E, x.shape[-1]) for x in (own_out, own_lse[..., None]))

    top = jnp.maximum(prefix_lse.max(2), own_lse.max(3))
    prefix_weight, own_weight = jnp.exp(prefix_lse - top[:, :, None]), jnp.exp(own_lse - top[:, :, :, None])
    total = prefix_weight.sum(2) + own_weight.sum(3)
    out = (prefix_weight * prefix_out).sum(2) + (own_weight * own_out).sum(3)
    return (out / total).astype(q_BKGEH.dtype)


def _start(rows: int, width: int) -> State:
    """Returns the running softmax before the first key."""
    column = jnp.zeros((rows, 1), jnp.float32)
    return jnp.zeros((rows, width), jnp.float32), column + LOW, column


def _step(state: State, q_QH: jax.Array, k_SH: jax.Array, v_SH: jax.Array, seen_1S: jax.Array, scale: float) -> State:
    """Returns the running softmax after one more block of keys; seen_1S is False for masked keys."""
    out, top, total = state
    precision = jax.lax.Precision.HIGHEST if q_QH.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_1S, dot(q_QH, k_SH, (((1,), (1,)), ((), ()))) * scale, LOW)
    higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    keep, weights = jnp.exp(top - higher), jnp.exp(scores - higher)
    out = out * keep + dot(weights.astype(v_SH.dtype), v_SH, (((1,), (0,)), ((), ())))
    return out, higher, total * keep + jnp.sum(weights, axis=1, keepdims=True)


def _finish(state: State) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse); (0, LOW) if no key was seen."""
    out, top, total = state
    total = jnp.maximum(total, TINY)
    return out / total, top + jnp.log(total)


def _partial_gpu(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, **call: Any
) -> tuple[jax.Array, jax.Array]:
    """Runs the GPU kernel on a list of caches. Returns out (caches, splits, Q, H) and lse (caches, splits, Q), fp32.

    Each program instance handles one cache, one split of its keys and one part of its query rows. Split i of n reads
    the key blocks i, i + n, i + 2n, ... before the cache's length, so that short caches are divided evenly too. Query
    rows are padded to at least 16, for the tensor cores. More than 64 rows are divided into parts, to fit the
    registers.

    Args:
      q: (caches, Q, H).
      k, v: (caches, S, H).
      lengths: (caches,) int32.
    """
    caches, Q, H = q.shape
    S = k.shape[1]
    rows, width = min(QUERY_ROWS, max(16, pl.next_power_of_2(Q))), max(16, pl.next_power_of_2(H))
    block = min(GPU_BLOCK_BYTES // k.dtype.itemsize, max(16, pl.next_power_of_2(S)))
    splits = min(pl.cdiv(S, block), pl.cdiv(PROGRAMS, caches))
    queries = pl.BlockSpec((None, rows, width), lambda cache, split, part: (cache, part, 0))
    keys = pl.BlockSpec((None, pl.cdiv(S, block) * block, width), lambda cache, split, part: (cache, 0, 0))
    return pl.pallas_call(
        partial(_gpu_kernel, shape=(Q, S, H), block=block, splits=splits),
        grid=(caches, splits, pl.cdiv(Q, rows)),
        in_specs=[pl.BlockSpec((1,), lambda cache, split, part: (cache,)), queries, keys, keys],
        out_specs=[
            pl.BlockSpec((None, None, rows, width), lambda cache, split, part: (cache, split, part, 0)),
            pl.BlockSpec((None, None, rows), lambda cache, split, part: (cache, split, part)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((caches, splits, Q, H), jnp.float32),
            jax.ShapeDtypeStruct((caches, splits, Q), jnp.float32),
        ],
        name="prefix_decode_attention",
        **call,
    )(lengths, q, k, v)


def _gpu_kernel(
    length_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    shape: tuple[int, int, int],
    block: int,
    splits: int,
) -> None:
    Q, S, H = shape
    rows, width = q_ref.shape
    split, length = pl.program_id(1), jnp.clip(length_ref[0], 0, S)
    row, column = pl.program_id(2) * rows + jnp.arange(rows) < Q, (jnp.arange(width) < H)[None, :]
    queries = row[:, None] & column
    q = triton.load(q_ref, mask=queries, other=0)

    def body(i: jax.Array, state: State) -> State:
        start = (split + i * splits) * block
        at, seen = pl.ds(start, block), start + jnp.arange(block) < length
        k, v = (triton.load(ref.at[at, :], mask=seen[:, None] & column, other=0) for ref in (k_ref, v_ref))
        return _step(state, q, k, v, seen[None, :], H**-0.5)

    blocks = (pl.cdiv(length, block) - split + splits - 1) // splits  # of this split; negative if it starts too late
    out, lse = _finish(jax.lax.fori_loop(0, jnp.maximum(blocks, 0), body, _start(rows, width)))
    triton.store(out_ref, out, mask=queries)
    triton.store(lse_ref, jnp.sum(lse, axis=1), mask=row)


def _partial_tpu(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, **call: Any
) -> tuple[jax.Array, jax.Array]:
    """Runs the TPU kernel in one split, on arguments as for `_partial_gpu`.

    Returns out (caches, 1, Q, H) and lse (caches, 1, Q), fp32.

    The program instances of a cache run one after another, each on one block of keys, and keep the running softmax in
    scratch memory. For blocks after the length, `key_block` names the last real block again, which is not fetched
    twice.
    """
    caches, Q, H = q.shape
    S = k.shape[1]
    block = min(S, TPU_BLOCK)

    def key_block(cache: Any, part: Any, lengths: Any) -> tuple[Any, Any, int]:
        return cache, jnp.minimum(part, jnp.maximum(pl.cdiv(lengths[cache], block) - 1, 0)), 0

    def queries(cache: Any, part: Any, lengths: Any) -> tuple[Any, int, int]:
        return cache, 0, 0

    out, lse = pl.pallas_call(
        partial(_tpu_kernel, keys=S, block=block),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(caches, pl.cdiv(S, block)),
            in_specs=[pl.BlockSpec((None, Q, H), queries), *[pl.BlockSpec((None, block, H), key_block)] * 2],
            out_specs=[pl.BlockSpec((None, Q, H), queries), pl.BlockSpec((None, Q, 1), queries)],
            scratch_shapes=[tpu.VMEM(shape, jnp.float32) for shape in ((Q, H), (Q, 1), (Q, 1))],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((caches, Q, H), jnp.float32),
            jax.ShapeDtypeStruct((caches, Q, 1), jnp.float32),
        ],
        name="prefix_decode_attention",
        **call,
    )(jnp.clip(lengths, 0, S), q, k, v)
    return out[:, None], lse[:, None, :, 0]


def _tpu_kernel(
    lengths_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *state_refs: Any,
    keys: int,
    block: int,
) -> None:
    part, length = pl.program_id(1), lengths_ref[pl.program_id(0)]

    def keep(state: State) -> None:
        for ref, value in zip(state_refs, state, strict=True):
            ref[...] = value

    @pl.when(part == 0)
    def _() -> None:
        keep(_start(*q_ref.shape))

    @pl.when(part * block < length)
    def _() -> None:
        seen_1S = part * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < length
        seen_S1 = part * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < length
        v = jnp.where(seen_S1, v_ref[...], 0)  # masked keys have weight 0, but 0 times NaN is NaN
        state = tuple(ref[...] for ref in state_refs)
        keep(_step(state, q_ref[...], k_ref[...], v, seen_1S, q_ref.shape[1] ** -0.5))

    @pl.when(part == pl.cdiv(keys, block) - 1)
    def _() -> None:
        out_ref[...], lse_ref[...] = _finish(tuple(ref[...] for ref in state_refs))
