"""The StepGRPO loss of each sequence, with its KL and entropy: what the update differentiates.

    loss_R = w_R sum_t -(s_t - beta KL_t)      kl_R = w_R sum_t KL_t      entropy_R = w_R sum_t H_t

`reference_jax` has s_t and KL_t with their source, `reference` the weights w_R. A program takes a row (a TPU's eight)
and walks its tokens in blocks; forward and backward are a kernel each, and the backward's is the vjp of the very terms
that the forward adds up. Work is a few bytes a token: bound by launches, like what XLA makes of the reference.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from r1vl_kernels.backends import check_array, check_backend, on_device, padded, token_block, up_to
from r1vl_kernels.reference import AVERAGES, sequence_weights
from r1vl_kernels.reference_jax import policy_sums, policy_terms


class PolicyLoss(NamedTuple):
    """One number a sequence, fp32; summed over R they are the batch's loss, mean KL and mean entropy."""

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
    """The loss, KL and entropy of R sequences of T tokens. Gradients flow to logprobs_RT and entropy_RT alone.

    Args:
      logprobs_RT, ref_RT: float, log-probabilities of the tokens under policy and reference.
      advantage_RT: float, each token's advantage.
      mask_RT: bool, True on the tokens that count; elsewhere the others may hold anything, also what is not finite. A
        row without any gives 0.
      weight_R: float, the weight of each sequence's token sum, in place of `average`: where the batch is part of an
        update.
      old_RT: float, log-probabilities when the tokens were sampled, for several updates a rollout.
      entropy_RT: float, the policy's entropy at each token; entropy_R is 0 without.
      beta: the weight of the KL.
      clip_low, clip_high: the ratio is cut to [1 - clip_low, 1 + clip_high]; both or neither, and only with old_RT.
      average: sequence (GRPO), token (DAPO) or constant (Dr. GRPO, by max_length): `reference.sequence_weights`.
      backend: reference, pallas or interpret.

    Raises:
      ValueError: an argument has another shape, dtype or value, or lacks the one that it needs.
    """
    check_backend(backend)
    clip = _checked_clip(clip_low, clip_high, old_RT)
    check_array("logprobs_RT", logprobs_RT, jnp.floating)
    shape = logprobs_RT.shape
    arrays = {"logprobs": logprobs_RT, "ref": ref_RT, "advantage": advantage_RT, "old": old_RT, "entropy": entropy_RT}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    for name, array in arrays.items():
        check_array(f"{name}_RT", array, jnp.floating, shape, "logprobs_RT")
    check_array("mask_RT", mask_RT, jnp.bool_, shape, "logprobs_RT")
    if weight_R is None:
        _check_average(average, max_length)
        weight_R = sequence_weights(mask_RT, average, max_length)
    check_array("weight_R", weight_R, jnp.floating, shape[:1], "the rows of logprobs_RT")

    options = (("beta", float(beta)), ("clip", clip))
    if backend == "reference" or 0 in shape:
        sums = policy_sums(arrays, mask_RT, **dict(options))
    else:
        sums = _sums(options, backend, arrays, mask_RT)
    weight_R = jax.lax.stop_gradient(weight_R.astype(jnp.float32))
    return PolicyLoss(*(weight_R * each for each in sums))


def _checked_clip(low, high, old_RT) -> tuple[float, float] | None:
    if (low is None) != (high is None):
        raise ValueError(f"clip_low is {low} and clip_high is {high}; expected both or neither")
    if low is None:
        return None
    if old_RT is None:
        raise ValueError("clip_low and clip_high need old_RT: without it the ratio is 1 and nothing is cut")
    if not 0 <= low <= 1 or not high >= 0:
        raise ValueError(f"clip_low is {low} and clip_high is {high}; expected 0 <= clip_low <= 1 and clip_high >= 0")
    return float(low), float(high)


def _check_average(average: str, max_length: int | None) -> None:
    if average not in AVERAGES:
        raise ValueError(f"average is {average!r}; expected one of {', '.join(AVERAGES)}")
    if average == "constant" and (max_length is None or max_length < 1):
        raise ValueError(f"max_length is {max_length}; average 'constant' divides by it and expects 1 or more")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(options, backend, arrays, mask_RT):
    return on_device(partial(_call_forward, options), backend, arrays, mask_RT)


def _forward(options, backend, arrays, mask_RT):
    return _sums(options, backend, arrays, mask_RT), (arrays, mask_RT)


def _backward(options, backend, saved, grads_R):
    arrays, mask_RT = saved
    found = on_device(partial(_call_backward, options), backend, arrays, mask_RT, jnp.stack(grads_R, axis=1))
    return {name: found.get(name) for name in arrays}, None


_sums.defvjp(_forward, _backward)


class _Blocks:
    """How rows and tokens are cut. A GPU's program takes one row, a TPU's eight, the height of its registers."""

    def __init__(self, shape: tuple[int, int], form: str):
        self.shape = shape
        self.rows = 8 if form == "tpu" else 1
        self.block = token_block(shape[1], 1024)
        self.padded = up_to(shape[0], self.rows), up_to(shape[1], self.block)
        self.grid = (self.padded[0] // self.rows,)
        self.tokens = self.spec(self.padded[1])
        self.loops = self.padded[1] // self.block

    def spec(self, columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.rows, columns), lambda r: (r, 0))

    def pad(self, array: jax.Array) -> jax.Array:
        return padded(array, *self.padded)

    def at(self, i) -> tuple:
        return slice(None), pl.ds(pl.multiple_of(i * self.block, self.block), self.block)


def _call_forward(options, arrays, mask_RT, *, form: str, **call):
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


def _call_backward(options, arrays, mask_RT, grads_R3, *, form: str, **call):
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


def _load(refs: dict, mask_ref, at) -> tuple[dict[str, jax.Array], jax.Array]:
    """A block of each array, 0 where the mask is False."""
    mask = mask_ref[at] != 0
    return {name: jnp.where(mask, ref[at].astype(jnp.float32), 0) for name, ref in refs.items()}, mask


def _forward_kernel(mask_ref, *refs, names, cut: _Blocks, options: dict):
    refs, outs = dict(zip(names, refs, strict=False)), refs[len(names) :]

    def body(i, sums):
        real, _ = _load(refs, mask_ref, cut.at(i))
        entropy = real.pop("entropy", 0.0)
        loss, kl = policy_terms(**real, **options)
        return sums[0] + loss, sums[1] + kl, sums[2] + entropy

    zeros = jnp.zeros((cut.rows, cut.block), jnp.float32)
    for out, sums in zip(outs, jax.lax.fori_loop(0, cut.loops, body, (zeros,) * 3), strict=True):
        out[...] = jnp.sum(sums, axis=1, keepdims=True)


def _backward_kernel(loss_ref, kl_ref, entropy_ref, mask_ref, *refs, names, cut: _Blocks, options: dict):
    refs, outs = dict(zip(names, refs, strict=False)), refs[len(names) :]

    def body(i, _):
        at = cut.at(i)
        real, mask = _load(refs, mask_ref, at)
        real.pop("entropy", None)
        logprobs = real.pop("logprobs")
        _, pull = jax.vjp(lambda logprobs: policy_terms(logprobs, **real, **options), logprobs)
        (grad,) = pull(tuple(jnp.broadcast_to(ref[...], mask.shape) for ref in (loss_ref, kl_ref)))
        for out, each in zip(outs, (grad, entropy_ref[...]), strict=False):
            out[at] = jnp.where(mask, each, 0).astype(out.dtype)

    jax.lax.fori_loop(0, cut.loops, body, None)
