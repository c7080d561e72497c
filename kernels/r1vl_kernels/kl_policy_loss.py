"""Computes the StepGRPO loss of each answer, its KL and its entropy. Training differentiates this loss.

    loss_R = w_R sum_t -(s_t - beta KL_t)      kl_R = w_R sum_t KL_t      entropy_R = w_R sum_t H_t

`reference_jax` defines s_t and KL_t and cites their sources; `reference` defines the weights w_R. Each Pallas program
instance handles one row (eight rows on a TPU) and loops over blocks of its tokens. The forward pass is one kernel and
the backward pass another. The backward kernel calls jax.vjp on the function whose values the forward kernel sums.
Expected, not measured: kernel-launch overhead dominates, here and in the XLA-compiled reference.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from r1vl_kernels.backends import check_array, check_backend, on_device, padded, round_up, token_block
from r1vl_kernels.reference import sequence_weights
from r1vl_kernels.reference_jax import policy_sums, policy_terms

Options = tuple[tuple[str, Any], ...]  # (name, value) pairs: hashable, for nondiff_argnums


class PolicyLoss(NamedTuple):
    """Three fp32 numbers per answer. Their sums over R are the batch's loss, mean KL and mean entropy."""

    loss_R: jax.Array
    kl_R: jax.Array
    entropy_R: jax.Array


def kl_policy_loss(
    logprobs_RT: jax.Array,
    ref_RT: jax.Array,
    advantage_RT: jax.Array,
    mask_RT: jax.Array,
    *,
    weight_R: jax.Array | None = None,
    old_RT: jax.Array | None = None,
    entropy_RT: jax.Array | None = None,
    beta: float,
    clip_low: float | None = None,
    clip_high: float | None = None,
    average: str = "sequence",
    max_length: int | None = None,
    backend: str,
) -> PolicyLoss:
    """Returns the loss, KL and entropy of R answers of T tokens. Only logprobs_RT and entropy_RT get a gradient.

    Args:
      logprobs_RT, ref_RT: float, log-probabilities of the tokens under the policy and under the reference.
      advantage_RT: float, the advantage of each token.
      mask_RT: bool, True on the tokens that count. The other arrays may contain anything elsewhere, even NaN. A row
        without a True yields 0.
      weight_R: float, the factor on each answer's sum over tokens. It replaces `average` if the batch is only a part of
        an update.
      old_RT: float, log-probabilities under the policy that sampled the tokens; needed for several updates per rollout.
      entropy_RT: float, the policy's entropy at each token; None: entropy_R is 0.
      beta: the weight of the KL.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; give both or neither; they need
        old_RT.
      average: sequence (GRPO), token (DAPO) or constant (Dr. GRPO, by max_length): see `reference.sequence_weights`.
      backend: reference, pallas or interpret.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value, or a required argument is missing.
    """
    check_backend(backend)
    clip = _checked_clip(clip_low, clip_high, old_RT)
    check_array("logprobs_RT", logprobs_RT, jnp.floating)
    shape = logprobs_RT.shape
    arrays = {"logprobs": logprobs_RT, "ref": ref_RT, "advantage": advantage_RT}
    arrays |= {name: array for name, array in (("old", old_RT), ("entropy", entropy_RT)) if array is not None}
    for name, array in arrays.items():
        check_array(f"{name}_RT", array, jnp.floating, shape, "logprobs_RT")
    check_array("mask_RT", mask_RT, jnp.bool_, shape, "logprobs_RT")
    weights_R: jax.Array = sequence_weights(mask_RT, average, max_length) if weight_R is None else weight_R
    check_array("weight_R", weights_R, jnp.floating, shape[:1], "the rows of logprobs_RT")

    if backend == "reference" or 0 in shape:
        sums: Any = policy_sums(arrays, mask_RT, beta=float(beta), clip=clip)
    else:
        sums = _sums((("beta", float(beta)), ("clip", clip)), backend, arrays, mask_RT)
    weights_R = jax.lax.stop_gradient(weights_R.astype(jnp.float32))
    return PolicyLoss(*(weights_R * each for each in sums))


def _checked_clip(low: float | None, high: float | None, old_RT: jax.Array | None) -> tuple[float, float] | None:
    if low is None and high is None:
        return None
    if low is None or high is None:
        raise ValueError(f"clip_low is {low} and clip_high is {high}; expected both or neither")
    if old_RT is None:
        raise ValueError("clip_low and clip_high need old_RT: without it the ratio is 1 and nothing is cut")
    if not 0 <= low <= 1 or not high >= 0:
        raise ValueError(f"clip_low is {low} and clip_high is {high}; expected 0 <= clip_low <= 1 and clip_high >= 0")
    return float(low), float(high)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(options: Options, backend: str, arrays: dict[str, jax.Array], mask_RT: jax.Array) -> Any:
    """Runs the kernel. Returns (loss_R, kl_R, entropy_R) as `policy_sums` does."""
    return on_device(partial(_call_forward, options), backend, arrays, mask_RT)


def _forward(options: Options, backend: str, arrays: dict[str, jax.Array], mask_RT: jax.Array) -> tuple[Any, Any]:
    return _sums(options, backend, arrays, mask_RT), (arrays, mask_RT)


def _backward(options: Options, backend: str, saved: Any, grads_R: Any) -> tuple[dict[str, jax.Array | None], None]:
    arrays, mask_RT = saved
    grads = on_device(partial(_call_backward, options), backend, arrays, mask_RT, jnp.stack(grads_R, axis=1))
    return {name: grads.get(name) for name in arrays}, None


_sums.defvjp(_forward, _backward)


class _Blocks:
    """The division of an (R, T) array into Pallas program instances and blocks of tokens.

    A program instance handles one row on a GPU, and eight rows on a TPU: the height of a TPU's vector registers.
    """

    def __init__(self, shape: tuple[int, ...], form: str) -> None:
        self.shape = shape
        self.rows = 8 if form == "tpu" else 1
        self.block = token_block(shape[1], 1024)
        self.padded = round_up(shape[0], self.rows), round_up(shape[1], self.block)
        self.grid = (self.padded[0] // self.rows,)
        self.tokens = self.spec(self.padded[1])
        self.loops = self.padded[1] // self.block

    def spec(self, columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.rows, columns), lambda row: (row, 0))

    def pad(self, array: jax.Array) -> jax.Array:
        return padded(array, *self.padded)

    def at(self, i: jax.Array) -> tuple[slice, Any]:
        """Returns the index of token block i."""
        return slice(None), pl.ds(pl.multiple_of(i * self.block, self.block), self.block)


def _call_forward(
    options: Options, arrays: dict[str, jax.Array], mask_RT: jax.Array, *, form: str, **call: Any
) -> tuple[jax.Array, ...]:
    cut = _Blocks(mask_RT.shape, form)
    names = tuple(arrays)
    out = pl.pallas_call(
        partial(_forward_kernel, names=names, cut=cut, options=dict(options)),
        grid=cut.grid,
        in_specs=[cut.tokens] * (len(names) + 1),
        out_specs=[cut.spec(1)] * 3,
        out_shape=[jax.ShapeDtypeStruct((cut.padded[0], 1), jnp.float32)] * 3,
        name="kl_policy_loss",
        **call,
    )(cut.pad(mask_RT.astype(jnp.int32)), *(cut.pad(array) for array in arrays.values()))
    return tuple(each[: mask_RT.shape[0], 0] for each in out)


def _call_backward(
    options: Options,
    arrays: dict[str, jax.Array],
    mask_RT: jax.Array,
    grads_R3: jax.Array,
    *,
    form: str,
    **call: Any,
) -> dict[str, jax.Array]:
    """Returns the gradients of logprobs and entropy. grads_R3 holds the gradients of loss_R, kl_R and entropy_R."""
    cut = _Blocks(mask_RT.shape, form)
    names = tuple(arrays)
    wanted = tuple(name for name in ("logprobs", "entropy") if name in names)
    grads = [padded(grads_R3[:, i, None], cut.padded[0], 1) for i in range(3)]
    out = pl.pallas_call(
        partial(_backward_kernel, names=names, cut=cut, options=dict(options)),
        grid=cut.grid,
        in_specs=[cut.spec(1)] * 3 + [cut.tokens] * (len(names) + 1),
        out_specs=[cut.tokens] * len(wanted),
        out_shape=[jax.ShapeDtypeStruct(cut.padded, arrays[name].dtype) for name in wanted],
        name="kl_policy_loss_backward",
        **call,
    )(*grads, cut.pad(mask_RT.astype(jnp.int32)), *(cut.pad(array) for array in arrays.values()))
    R, T = mask_RT.shape
    return {name: each[:R, :T] for name, each in zip(wanted, out, strict=True)}


def _load(refs: dict[str, Any], mask_ref: Any, at: Any) -> tuple[dict[str, jax.Array], jax.Array]:
    """Loads one block of the mask and of each array. Returns (the arrays, 0 where the mask is False; the mask)."""
    mask = mask_ref[at] != 0
    return {name: jnp.where(mask, ref[at].astype(jnp.float32), 0) for name, ref in refs.items()}, mask


def _forward_kernel(mask_ref: Any, *refs: Any, names: tuple[str, ...], cut: _Blocks, options: dict[str, Any]) -> None:
    inputs, outs = dict(zip(names, refs, strict=False)), refs[len(names) :]

    def body(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        real, _ = _load(inputs, mask_ref, cut.at(i))
        entropy = real.pop("entropy", 0.0)
        loss, kl = policy_terms(**real, **options)
        return sums[0] + loss, sums[1] + kl, sums[2] + entropy

    zeros = jnp.zeros((cut.rows, cut.block), jnp.float32)
    for out, sums in zip(outs, jax.lax.fori_loop(0, cut.loops, body, (zeros,) * 3), strict=True):
        out[...] = jnp.sum(sums, axis=1, keepdims=True)


def _backward_kernel(
    loss_ref: Any,
    kl_ref: Any,
    entropy_ref: Any,
    mask_ref: Any,
    *refs: Any,
    names: tuple[str, ...],
    cut: _Blocks,
    options: dict[str, Any],
) -> None:
    """Writes one block's gradients; loss_ref, kl_ref and entropy_ref hold the gradients of these three outputs."""
    inputs, outs = dict(zip(names, refs, strict=False)), refs[len(names) :]

    def body(i: jax.Array, carry: None) -> None:
        at = cut.at(i)
        real, mask = _load(inputs, mask_ref, at)
        real.pop("entropy", None)
        logprobs = real.pop("logprobs")
        _, pull = jax.vjp(lambda logprobs: policy_terms(logprobs, **real, **options), logprobs)
        (grad,) = pull(tuple(jnp.broadcast_to(ref[...], mask.shape) for ref in (loss_ref, kl_ref)))
        for out, each in zip(outs, (grad, entropy_ref[...]), strict=False):
            out[at] = jnp.where(mask, each, 0).astype(out.dtype)

    jax.lax.fori_loop(0, cut.loops, body, None)
