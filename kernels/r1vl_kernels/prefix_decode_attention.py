"""Decode attention of one token: G answers of a group against the one prompt cache they share and their own caches.

    out = softmax(q k^T / sqrt(H)) v          one softmax over prompt and answer, each up to its length

Decoding moves bytes: a group's prompt is read once for all its answers, not once an answer. Keys are split among
programs (flash-decoding: Dao, Haziza, Massa, Sizov 2023), each with a running softmax in fp32 over its blocks:

    m' = max(m, max s)    l' = l e^(m-m') + sum e^(s-m')    o' = o e^(m-m') + e^(s-m') v    lse = m + log l

One kernel serves both parts, the prompt with G*R query rows and an answer with R; what its programs leave, o / l and
lse, is merged by XLA with the weights e^(lse - max lse). Blocks behind a length are not read.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

from r1vl_kernels.backends import check_array, check_backend, on_device
from r1vl_kernels.reference_jax import LOW, attention

PROGRAMS = 528  # four for each of an H100's 132 SMs, of which two at least run at a time: ends are ragged, work is even
GPU_BLOCK_BYTES = 128  # of a column of keys: 64 keys in bf16, 32 in fp32
TPU_BLOCK = 512  # keys
QUERY_ROWS = 64  # of a GPU program
TINY = 1e-30


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
    """Attention (B, K, G, R, H) of the queries of one token, in their dtype; R query heads share a kv head.

    An answer that sees no key at all, in neither part, gets a finite value that means nothing. The gradient is the
    reference's; decoding has none in training.

    Args:
      q_BKGEH: queries; query head n of N = K*R is (n // R, n % R).
      prefix_k_BKSH, prefix_v_BKSH: the prompts' caches, once a group.
      prefix_length_B: int32, keys at this index and behind are not seen; "reference" wants finite numbers there.
      own_k_BKGSH, own_v_BKGSH: the answers' caches, S as long as they are; own_length_BG: int32, likewise, 0 allowed.
      backend: reference, pallas or interpret.

    Raises:
      ValueError: an argument has another shape, dtype or value.
    """
    check_backend(backend)
    check_array("q_BKGEH", q_BKGEH, jnp.floating)
    B, K, G, _, H = q_BKGEH.shape
    parts = (
        ("prefix", prefix_k_BKSH, prefix_v_BKSH, "BKSH", (B, K), prefix_length_B, "B", (B,)),
        ("own", own_k_BKGSH, own_v_BKGSH, "BKGSH", (B, K, G), own_length_BG, "BG", (B, G)),
    )
    for part, k, v, letters, rows, length, length_letters, length_rows in parts:
        check_array(f"{part}_k_{letters}", k, q_BKGEH.dtype)
        check_array(f"{part}_k_{letters}", k, q_BKGEH.dtype, (*rows, k.shape[-2], H), "q_BKGEH, and S")
        check_array(f"{part}_v_{letters}", v, q_BKGEH.dtype, k.shape, f"{part}_k_{letters}")
        check_array(f"{part}_length_{length_letters}", length, jnp.integer, length_rows, "q_BKGEH")
    arrays = (q_BKGEH, prefix_k_BKSH, prefix_v_BKSH, prefix_length_B, own_k_BKGSH, own_v_BKGSH, own_length_BG)
    if backend == "reference" or 0 in q_BKGEH.shape + prefix_k_BKSH.shape + own_k_BKGSH.shape:
        return attention(*arrays)
    return _attention(backend, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(backend, *arrays):
    return on_device(_both_parts, backend, *arrays)


def _forward(backend, *arrays):
    return _attention(backend, *arrays), arrays


def _backward(backend, arrays, grad):
    q, prefix_k, prefix_v, prefix_length, own_k, own_v, own_length = arrays
    _, pull = jax.vjp(
        lambda q, pk, pv, ok, ov: attention(q, pk, pv, prefix_length, ok, ov, own_length),
        *(q, prefix_k, prefix_v, own_k, own_v),
    )
    q, prefix_k, prefix_v, own_k, own_v = pull(grad)
    return q, prefix_k, prefix_v, None, own_k, own_v, None


_attention.defvjp(_forward, _backward)


def _both_parts(q, prefix_k, prefix_v, prefix_length, own_k, own_v, own_length, *, form: str, **call):
    """The kernel on either part, every (group or answer, kv head) a row of it, and the merge. C: splits of the keys."""
    B, K, G, R, H = q.shape
    partial_attention = {"gpu": _partial_gpu, "tpu": _partial_tpu}[form]

    def part(q, k, v, length):
        rows = k.shape[: k.ndim - 2]
        flat = [array.reshape(-1, *array.shape[len(rows) :]) for array in (q, k, v)]
        out, lse = partial_attention(*flat, jnp.broadcast_to(length, rows).reshape(-1).astype(jnp.int32), **call)
        return out, lse

    prefix_out, prefix_lse = part(q.reshape(B, K, G * R, H), prefix_k, prefix_v, prefix_length[:, None])
    own_out, own_lse = part(q, own_k, own_v, own_length[:, None, :])
    prefix_out, prefix_lse = (x.reshape(B, K, -1, G, R, x.shape[-1]) for x in (prefix_out, prefix_lse[..., None]))
    own_out, own_lse = (x.reshape(B, K, G, -1, R, x.shape[-1]) for x in (own_out, own_lse[..., None]))

    top = jnp.maximum(prefix_lse.max(2), own_lse.max(3))
    prefix_weight, own_weight = jnp.exp(prefix_lse - top[:, :, None]), jnp.exp(own_lse - top[:, :, :, None])
    total = prefix_weight.sum(2) + own_weight.sum(3)
    out = (prefix_weight * prefix_out).sum(2) + (own_weight * own_out).sum(3)
    return (out / total).astype(q.dtype)


def _start(rows: int, width: int):
    column = jnp.zeros((rows, 1), jnp.float32)
    return jnp.zeros((rows, width), jnp.float32), column + LOW, column


def _step(state, q_QH, k_SH, v_SH, seen_row, scale: float):
    """The running softmax (o, m, l) after one more block of keys."""
    out, top, total = state
    precision = jax.lax.Precision.HIGHEST if q_QH.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_row, dot(q_QH, k_SH, (((1,), (1,)), ((), ()))) * scale, LOW)
    higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    keep, weights = jnp.exp(top - higher), jnp.exp(scores - higher)
    out = out * keep + dot(weights.astype(v_SH.dtype), v_SH, (((1,), (0,)), ((), ())))
    return out, higher, total * keep + jnp.sum(weights, axis=1, keepdims=True)


def _finish(state):
    """(out, lse); (0, LOW) where no key was seen."""
    out, top, total = state
    total = jnp.maximum(total, TINY)
    return out / total, top + jnp.log(total)


def _partial_gpu(q, k, v, lengths, **call):
    """out (W, C, Q, H) and lse (W, C, Q), fp32. Program (w, c, i) takes blocks c, c + C, ... up to row w's length.

    So all of them have work, however short the row is. Query rows are padded to 16 at least, for the tensor cores, and
    more than 64 are cut into i parts, for the registers.
    """
    W, Q, H = q.shape
    S = k.shape[1]
    rows, width = min(QUERY_ROWS, max(16, pl.next_power_of_2(Q))), max(16, pl.next_power_of_2(H))
    block = min(GPU_BLOCK_BYTES // k.dtype.itemsize, max(16, pl.next_power_of_2(S)))
    splits = min(pl.cdiv(S, block), pl.cdiv(PROGRAMS, W))
    queries = pl.BlockSpec((None, rows, width), lambda w, c, i: (w, i, 0))
    keys = pl.BlockSpec((None, pl.cdiv(S, block) * block, width), lambda w, c, i: (w, 0, 0))
    return pl.pallas_call(
        partial(_gpu_kernel, shape=(Q, S, H), block=block, splits=splits),
        grid=(W, splits, pl.cdiv(Q, rows)),
        in_specs=[pl.BlockSpec((1,), lambda w, c, i: (w,)), queries, keys, keys],
        out_specs=[
            pl.BlockSpec((None, None, rows, width), lambda w, c, i: (w, c, i, 0)),
            pl.BlockSpec((None, None, rows), lambda w, c, i: (w, c, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((W, splits, Q, H), jnp.float32),
            jax.ShapeDtypeStruct((W, splits, Q), jnp.float32),
        ],
        name="prefix_decode_attention",
        **call,
    )(lengths, q, k, v)


def _gpu_kernel(length_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, shape, block: int, splits: int):
    Q, S, H = shape
    rows, width = q_ref.shape
    split, length = pl.program_id(1), jnp.clip(length_ref[0], 0, S)
    row, column = pl.program_id(2) * rows + jnp.arange(rows) < Q, (jnp.arange(width) < H)[None, :]
    queries = row[:, None] & column
    q = triton.load(q_ref, mask=queries, other=0)

    def body(i, state):
        start = (split + i * splits) * block
        at, seen = pl.ds(start, block), start + jnp.arange(block) < length
        k, v = (triton.load(ref.at[at, :], mask=seen[:, None] & column, other=0) for ref in (k_ref, v_ref))
        return _step(state, q, k, v, seen[None, :], H**-0.5)

    mine = (pl.cdiv(length, block) - split + splits - 1) // splits
    out, lse = _finish(jax.lax.fori_loop(0, jnp.maximum(mine, 0), body, _start(rows, width)))
    triton.store(out_ref, out, mask=queries)
    triton.store(lse_ref, jnp.sum(lse, axis=1), mask=row)


def _partial_tpu(q, k, v, lengths, **call):
    """out (W, 1, Q, H) and lse (W, 1, Q), fp32. A row's blocks run one after the other, the state in scratch memory.

    Blocks behind the length name the last one before it again, which is then not fetched anew.
    """
    W, Q, H = q.shape
    S = k.shape[1]
    block = min(S, TPU_BLOCK)

    def key_block(w, j, lengths):
        return w, jnp.minimum(j, jnp.maximum(pl.cdiv(lengths[w], block) - 1, 0)), 0

    def row(w, j, lengths):
        return w, 0, 0

    out, lse = pl.pallas_call(
        partial(_tpu_kernel, keys=S, block=block),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(W, pl.cdiv(S, block)),
            in_specs=[pl.BlockSpec((None, Q, H), row), *[pl.BlockSpec((None, block, H), key_block)] * 2],
            out_specs=[pl.BlockSpec((None, Q, H), row), pl.BlockSpec((None, Q, 1), row)],
            scratch_shapes=[tpu.VMEM(shape, jnp.float32) for shape in ((Q, H), (Q, 1), (Q, 1))],
        ),
        out_shape=[jax.ShapeDtypeStruct((W, Q, H), jnp.float32), jax.ShapeDtypeStruct((W, Q, 1), jnp.float32)],
        name="prefix_decode_attention",
        **call,
    )(jnp.clip(lengths, 0, S), q, k, v)
    return out[:, None], lse[:, None, :, 0]


def _tpu_kernel(lengths_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *state_refs, keys: int, block: int):
    j, length = pl.program_id(1), lengths_ref[pl.program_id(0)]

    def keep(state):
        for ref, value in zip(state_refs, state, strict=True):
            ref[...] = value

    @pl.when(j == 0)
    def _():
        keep(_start(*q_ref.shape))

    @pl.when(j * block < length)
    def _():
        seen_row = j * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < length
        seen_column = j * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < length
        v = jnp.where(seen_column, v_ref[...], 0)  # weights there are 0, but 0 times what is not finite is not
        keep(_step(tuple(ref[...] for ref in state_refs), q_ref[...], k_ref[...], v, seen_row, q_ref.shape[1] ** -0.5))

    @pl.when(j == pl.cdiv(keys, block) - 1)
    def _():
        out_ref[...], lse_ref[...] = _finish(tuple(ref[...] for ref in state_refs))
