"""Kernels: interpret mode against the references, the references against loops and hand-computed numbers, lowering.

What a GPU runs and what a TPU runs differ in how arrays are cut; interpret mode can run either (`form`).
"""

from __future__ import annotations

import importlib
import math
import statistics
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from r1vl_kernels.kl_policy_loss import kl_policy_loss
from r1vl_kernels.prefix_decode_attention import prefix_decode_attention
from r1vl_kernels.reference import sequence_weights, step_advantages, token_advantages
from r1vl_kernels.reference_jax import k3, policy_terms
from r1vl_kernels.step_group_advantage import step_group_advantage

MODULES = [
    importlib.import_module(f"r1vl_kernels.{name}")
    for name in ("step_group_advantage", "kl_policy_loss", "prefix_decode_attention")
]


@pytest.fixture(params=["gpu", "tpu"])
def form(request, monkeypatch):
    """Backend "interpret" runs this platform's form; the test fails if no kernel has run at all."""
    ran = []

    def on_device(call, backend, *arrays):
        assert backend == "interpret"
        ran.append(request.param)
        return call(*arrays, form=request.param, interpret=True)

    for module in MODULES:
        monkeypatch.setattr(module, "on_device", on_device)
    yield request.param
    assert ran


def close(got, want, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


# The advantage.


def advantages_by_loop(rewards_BGJ, mask_BGJ, scale="std", std_floor=0.1, eps=1e-4):
    """The definition, an answer and a step at a time, with statistics.stdev (ddof 1)."""
    out = np.zeros(rewards_BGJ.shape)
    B, M, K = rewards_BGJ.shape
    for b in range(B):
        for k in range(K):
            own = [m for m in range(M) if mask_BGJ[b, m, k]]
            returns = {m: sum(rewards_BGJ[b, m, j] for j in range(k, K) if mask_BGJ[b, m, j]) for m in own}
            if len(own) < 2 or np.ptp(list(returns.values())) < 1e-9:
                continue
            std = statistics.stdev(returns.values())
            divide = {"std": std + eps, "none": 1.0, "floor": max(std, std_floor) + eps}[scale]
            for m in own:
                out[b, m, k] = (returns[m] - statistics.fmean(returns.values())) / divide
    return out


def ragged(rng, B, M, K):
    """Rewards as they come: the first steps 0 or a share of 0.1, some answers equal; and which steps exist, 0 to K."""
    mask = np.arange(K) < rng.integers(0, K + 1, (B, M))[..., None]
    return rng.integers(0, 4, (B, M, K)) * 0.1, mask


@pytest.mark.parametrize("scale", ["std", "none", "floor"])
@pytest.mark.parametrize("shape", [(2, 4, 5), (5, 3, 1), (1, 1, 3), (3, 6, 2)])
def test_reference_advantages_follow_the_definition(shape, scale):
    rewards, mask = ragged(np.random.default_rng(sum(shape)), *shape)
    want = advantages_by_loop(rewards, mask, scale)
    assert np.any(want) == (shape[1] > 1)
    got = step_advantages(rewards, mask, scale=scale)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    garbage = np.where(mask, rewards, np.nan)
    on_device = step_advantages(jnp.asarray(garbage, jnp.float32), jnp.asarray(mask), scale=scale)
    assert isinstance(on_device, jax.Array) and on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("xp", [np, jnp])
def test_reference_advantages_by_hand(xp):
    """Returns [2.1, 2.05, 2.05], [1.05, 1.05], [0]: column 1 has mean 1.05, std 1.05; column 2 mean 1.55, std 0.5^0.5.

    The third step is one answer's alone.
    """
    rewards = xp.asarray([[[0.05, 0.0, 2.05], [0.0, 1.05, 9.0], [0.0, 9.0, 9.0]]], xp.float32)
    mask = xp.asarray([[[True, True, True], [True, True, False], [True, False, False]]])
    got = step_advantages(rewards, mask)
    one, two = 1.05 / 1.0501, 0.5 / (math.sqrt(0.5) + 1e-4)
    np.testing.assert_allclose(got, [[[one, two, 0], [0, -two, 0], [-one, 0, 0]]], atol=1e-6)
    tokens = token_advantages(got, xp.asarray([[[0, 1, 2, 1], [1, 1, 0, 0], [-1, 0, 1, 3]]]))
    np.testing.assert_allclose(tokens, [[[one, two, 0, two], [-two, -two, 0, 0], [0, -one, 0, 0]]], atol=1e-6)


def test_equal_returns_are_equal_in_fp32_too(form):
    """The fp32 mean of seven times 0.3 is not 0.3, and the sum of 0.1, 0.3 and 1.1 depends on their order."""
    sevens = np.full((1, 7, 1), 0.3, np.float32)
    assert sevens.sum(axis=1)[0, 0] / np.float32(7) != sevens[0, 0, 0]
    thirds = np.asarray([[[0.1, 0.3, 1.1], [1.1, 0.3, 0.1], [0.3, 1.1, 0.1]]], np.float32)
    assert len({float((r[2] + r[1]) + r[0]) for r in thirds[0]}) > 1
    large = np.full((1, 7, 1), 300.3, np.float32)  # whose mean is off by more than 1e-6
    assert abs(large.sum(axis=1)[0, 0] / np.float32(7) - large[0, 0, 0]) > 1e-5
    for rewards in (sevens, thirds, large):
        mask = np.ones(rewards.shape, bool)
        first = np.zeros((*rewards.shape[:2], 4), np.int32)
        np.testing.assert_array_equal(step_advantages(rewards, mask)[..., 0], 0)
        arrays = [jnp.asarray(array) for array in (rewards, mask, first)]
        np.testing.assert_array_equal(step_group_advantage(*arrays, backend="interpret"), 0)
    apart = sevens + np.float32(1e-5) * np.eye(7, dtype=np.float32)[0][None, :, None]
    assert np.all(step_advantages(apart, np.ones(apart.shape, bool)) != 0)


def test_float64_rewards_are_compared_in_float64():
    """1e-7 apart they differ, which float32 cannot say of numbers about 1; std = 1e-7 / sqrt(2) is small beside eps."""
    apart, mask = np.asarray([[[1.0], [1.0 + 1e-7]]]), np.ones((1, 2, 1), bool)
    advantage = 0.5e-7 / (1e-7 / math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(step_advantages(apart, mask)[0, :, 0], [-advantage, advantage], rtol=1e-5)
    np.testing.assert_array_equal(step_advantages(apart.astype(np.float32), mask), 0)


def test_reference_advantages_load_no_jax():
    code = (
        "import sys, numpy as np; from r1vl_kernels.reference import step_advantages, token_advantages; "
        "a = step_advantages(np.array([[[1.0], [0.0]]]), np.ones((1, 2, 1), bool)); "
        "print(token_advantages(a, np.zeros((1, 2, 3), int)).shape, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "(1, 2, 3) False"


@pytest.mark.parametrize(
    "shape, scale",
    [((2, 4, 3, 130), "std"), ((1, 3, 5, 77), "floor"), ((2, 1, 2, 100), "std"), ((2, 6, 1, 1500), "none")],
)
def test_advantage_kernel_equals_the_reference(shape, scale, form):
    B, M, K, T = shape
    rng = np.random.default_rng(T)
    rewards, mask = ragged(rng, B, M, K)
    rewards = jnp.asarray(np.where(mask, rewards + rng.normal(size=rewards.shape), np.nan), jnp.float32)
    mask, step = jnp.asarray(mask), jnp.asarray(rng.integers(-1, K + 1, (B, M, T)), jnp.int32)
    cotangent = jnp.asarray(rng.normal(size=(B, M, T)), jnp.float32)

    def run(backend, rewards, mask, step):
        out, pull = jax.vjp(
            lambda rewards: step_group_advantage(rewards, mask, step, scale=scale, backend=backend), rewards
        )
        return out, *pull(cotangent)

    (got, grad), (want, want_grad) = (
        jax.jit(run, static_argnums=0)(backend, rewards, mask, step) for backend in ("interpret", "reference")
    )
    assert got.dtype == jnp.float32 and np.isfinite(want).all()
    close(got, want)
    close(grad, want_grad)
    by_loop = advantages_by_loop(np.nan_to_num(np.asarray(rewards, np.float64)), np.asarray(mask), scale)
    place = np.asarray(step)
    tokens = np.zeros(place.shape)
    for b, m, t in np.ndindex(*tokens.shape):
        tokens[b, m, t] = by_loop[b, m, place[b, m, t]] if 0 <= place[b, m, t] < K else 0
    close(got, tokens, rtol=1e-4, atol=1e-4)


# The policy loss.


def policy_arrays(rng, R, T, lengths, dtype=jnp.float32):
    """Token arrays with what is not finite behind the lengths, and the mask."""
    mask = np.arange(T) < np.asarray(lengths)[:, None]
    names = ("logprobs", "ref", "advantage", "old", "entropy")
    drawn = {name: rng.normal(size=(R, T)) for name in names}
    drawn |= {name: -np.abs(drawn[name]) for name in ("logprobs", "ref", "old")}
    bad = dict(zip(names, (np.nan, -np.inf, np.nan, np.inf, np.nan), strict=True))
    return {name: jnp.asarray(np.where(mask, drawn[name], bad[name]), dtype) for name in names}, jnp.asarray(mask)


def loss_of(arrays, mask, *, backend, old=False, entropy=True, **options):
    return kl_policy_loss(
        arrays["logprobs"], arrays["ref"], arrays["advantage"], mask,
        old_RT=arrays["old"] if old else None, entropy_RT=arrays["entropy"] if entropy else None,
        beta=options.pop("beta", 0.04), backend=backend, **options,
    )  # fmt: skip


def loss_by_loop(arrays, mask, weight, *, old=False, beta=0.04, clip_low=None, clip_high=None):
    """Loss, KL and entropy of each row, and the gradient of the losses' sum, one token after the other."""
    arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    rows = np.zeros((3, mask.shape[0]))
    grad = np.zeros(mask.shape)
    for r, t in zip(*np.nonzero(mask), strict=True):
        lp, ref, a, was, h = (arrays[name][r, t] for name in ("logprobs", "ref", "advantage", "old", "entropy"))
        ratio = math.exp(lp - was) if old else 1.0
        surrogate, slope = ratio * a, ratio * a
        if clip_low is not None:
            cut = min(max(ratio, 1 - clip_low), 1 + clip_high) * a
            if cut < surrogate:
                surrogate, slope = cut, 0.0
        kl = math.exp(ref - lp) - (ref - lp) - 1
        rows[:, r] += weight[r] * np.asarray([beta * kl - surrogate, kl, h])
        grad[r, t] = weight[r] * (beta * (1 - math.exp(ref - lp)) - slope)
    return rows, grad


VARIANTS = {
    "on-policy": {},
    "old": {"old": True},
    "clipped": {"old": True, "clip_low": 0.2, "clip_high": 0.28},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("average, max_length", [("sequence", None), ("token", None), ("constant", 9)])
def test_reference_loss_follows_the_definition(variant, average, max_length):
    options, lengths = VARIANTS[variant], [7, 0, 1, 4]
    arrays, mask = policy_arrays(np.random.default_rng(3), 4, 7, lengths)
    weight = {
        "sequence": [1 / 28, 1 / 4, 1 / 4, 1 / 16], "token": [1 / 12] * 4, "constant": [1 / 36] * 4
    }[average]  # fmt: skip
    want, want_grad = loss_by_loop(arrays, np.asarray(mask), weight, **options)
    both = {"average": average, "max_length": max_length, "backend": "reference", **options}
    got = jax.jit(lambda arrays: loss_of(arrays, mask, **both))(arrays)
    close(tuple(got), tuple(want))
    assert got.loss_R[1] == got.kl_R[1] == got.entropy_R[1] == 0
    grad = jax.grad(lambda logprobs: loss_of(arrays | {"logprobs": logprobs}, mask, **both).loss_R.sum())
    close(jax.jit(grad)(arrays["logprobs"]), want_grad)


def test_policy_terms_by_hand():
    """lp = log 0.5, ref = log 0.25: KL = 0.5 + log 2 - 1. With old = log 0.25 the ratio is 2, cut to 1.2 for A > 0."""
    lp, ref, a = (jnp.asarray(v, jnp.float32) for v in ([math.log(0.5)] * 2, [math.log(0.25)] * 2, [3.0, -3.0]))
    kl = math.log(2) - 0.5
    close(k3(ref, lp), np.full(2, kl))
    close(policy_terms(lp, ref, a, beta=0.1)[0], np.asarray([0.1 * kl - 3, 0.1 * kl + 3]))
    close(policy_terms(lp, ref, a, ref, beta=0.1, clip=(0.2, 0.2))[0], np.asarray([0.1 * kl - 3.6, 0.1 * kl + 6]))
    close(sequence_weights(jnp.asarray([[True, True], [False, False]]), "sequence"), np.asarray([0.25, 0.5]))


def test_k3_is_cut_by_hand():
    """exp(20) - 20 - 1 = 485165174.41 from ref - lp = 20 on, with no gradient; below, the plain formula's."""
    d = jnp.asarray([19.0, 20.0, 21.0, 100.0, 1e30])
    value, pull = jax.vjp(lambda lp: k3(d, lp), jnp.zeros(5))
    np.testing.assert_allclose(value, [178482280.96] + [485165174.41] * 4, rtol=1e-6)
    slope = np.asarray(pull(jnp.ones(5))[0])
    np.testing.assert_allclose(slope[0], 1 - math.exp(19), rtol=1e-6)
    np.testing.assert_array_equal(slope[2:], 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_kernel_cuts_k3_as_the_reference(variant, form):
    """One token in three is far below the reference: uncut, exp(ref - lp) is infinite there."""
    arrays, mask = policy_arrays(np.random.default_rng(4), 3, 50, [50, 20, 7])
    far = jnp.arange(50) % 3 == 0
    arrays["logprobs"] = jnp.where(far, -100.0, arrays["logprobs"])
    arrays["old"] = jnp.where(far, -100.0, arrays["old"])

    def run(backend):
        def loss(logprobs):
            return tuple(loss_of(arrays | {"logprobs": logprobs}, mask, backend=backend, **VARIANTS[variant]))

        out, pull = jax.vjp(loss, arrays["logprobs"])
        return out, *pull((jnp.ones(3),) * 3)

    (got, grad), (want, want_grad) = (jax.jit(run, static_argnums=0)(each) for each in ("interpret", "reference"))
    assert np.isfinite(want).all() and np.isfinite(want_grad).all() and np.min(want[1]) > 1e7
    close(got, want)
    close(grad, want_grad, atol=1e-6)
    # Where the KL is cut only the surrogate moves the policy: its slope at ratio 1, times the weight 1 / (R * tokens).
    weight = np.asarray(sequence_weights(mask, "sequence"))[:, None]
    cut = np.asarray(mask & far)
    np.testing.assert_allclose(np.asarray(grad)[cut], np.asarray(-weight * arrays["advantage"])[cut], rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(3, 100), (9, 1400)])
def test_loss_kernel_equals_the_reference(shape, variant, form):
    """All three outputs at once, each row with a cotangent of its own, and both gradients."""
    R, T = shape
    rng = np.random.default_rng(T)
    arrays, mask = policy_arrays(rng, R, T, [0, T, 1, *rng.integers(0, T, R - 3)])
    cotangents = [jnp.asarray(each, jnp.float32) for each in rng.normal(size=(3, R))]

    def run(backend):
        def loss(logprobs, entropy):
            moved = arrays | {"logprobs": logprobs, "entropy": entropy}
            return tuple(loss_of(moved, mask, backend=backend, **VARIANTS[variant]))

        out, pull = jax.vjp(loss, arrays["logprobs"], arrays["entropy"])
        return out, pull(tuple(cotangents))

    (got, grads), (want, want_grads) = (jax.jit(run, static_argnums=0)(each) for each in ("interpret", "reference"))
    assert all(np.isfinite(each).all() and np.any(each) for each in (*want, *want_grads))
    close(got, want)
    close(grads, want_grads, atol=1e-6)


def test_loss_kernel_in_bf16_with_weights_and_without_entropy(form):
    arrays, mask = policy_arrays(np.random.default_rng(1), 2, 40, [40, 13], jnp.bfloat16)
    weight = jnp.asarray([0.5, 2.0], jnp.float32)

    def run(backend):
        def loss(logprobs):
            moved = arrays | {"logprobs": logprobs}
            return loss_of(moved, mask, backend=backend, entropy=False, weight_R=weight).loss_R

        out, pull = jax.vjp(loss, arrays["logprobs"])
        return out, *pull(jnp.ones(2))

    (got, grad), (want, want_grad) = (jax.jit(run, static_argnums=0)(each) for each in ("interpret", "reference"))
    assert got.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    close(got, want)
    np.testing.assert_array_equal(grad, want_grad)
    sums = loss_by_loop(arrays, np.asarray(mask), [0.5, 2.0])[0]
    close(got, sums[0], rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_loss_moves_only_logprobs_and_entropy(backend):
    arrays, mask = policy_arrays(np.random.default_rng(2), 2, 8, [8, 5])

    def loss(arrays, weight):
        out = loss_of(arrays, mask, old=True, clip_low=0.1, clip_high=0.1, weight_R=weight, backend=backend)
        return out.loss_R.sum() + out.kl_R.sum() + out.entropy_R.sum()

    grads, weight_grad = jax.grad(loss, (0, 1))(arrays, jnp.asarray([1.0, 0.5]))
    assert {name for name, grad in grads.items() if np.any(grad)} == {"logprobs", "entropy"}
    assert not np.any(weight_grad)
    np.testing.assert_array_equal(grads["entropy"], np.where(mask, [[1.0], [0.5]], 0))


# Decode attention.


def attention_arrays(rng, B, K, G, E, H, prefix, own, dtype=jnp.float32):
    """q, caches, lengths and questions of B*G rows: full, empty and other lengths; more rows for some questions."""
    R = B * G
    question = np.sort(np.concatenate([np.arange(B), rng.integers(0, B, R - B)]))
    prefix_length = np.asarray([prefix, *rng.integers(1, prefix + 1, max(B - 2, 0)), 1][:B])[question]
    own_length = rng.integers(0, own + 1, R)
    own_length[0], own_length[-1] = own, 0
    shapes = (R, K, E, H), (B, K, 2, prefix, H), (R, K, 2, own, H)
    q, prompts, answers = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    prefix_length, own_length, question = (jnp.asarray(a, jnp.int32) for a in (prefix_length, own_length, question))
    return q, prompts, prefix_length, answers, own_length, question


def attention_by_loop(q, prompts, prefix_length, answers, own_length, question):
    q, prompts, answers = (np.asarray(array, np.float64) for array in (q, prompts, answers))
    out = np.zeros(q.shape)
    for r, k, e in np.ndindex(*q.shape[:3]):
        P, S = int(prefix_length[r]), int(own_length[r])
        keys, values = np.concatenate([prompts[question[r], k, :, :P], answers[r, k, :, :S]], axis=1)
        scores = keys @ q[r, k, e] / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[r, k, e] = weights @ values / weights.sum()
    return out


def behind(arrays, value):
    """The caches with `value` in every place that no row sees."""
    q, prompts, prefix_length, answers, own_length, question = arrays
    longest = np.zeros(len(prompts), int)
    np.maximum.at(longest, np.asarray(question), np.asarray(prefix_length))

    def filled(cache, length):
        unseen = np.arange(cache.shape[3]) >= np.asarray(length)[:, None]
        return jnp.asarray(np.where(unseen[:, None, None, :, None], np.float32(value), cache))

    return q, filled(prompts, longest), prefix_length, filled(answers, own_length), own_length, question


@partial(jax.jit, static_argnums=0)
def compiled(function, *arrays):
    return function(*arrays)


def attention(arrays, backend):
    """One program, where jax would else compile each operation; a new one each time, since forms are swapped."""
    return compiled(lambda *arrays: prefix_decode_attention(*arrays, backend=backend), *arrays)


SHAPES = {
    "2B": (2, 2, 4, 6, 128, 70, 40),
    "7B": (1, 4, 2, 7, 128, 33, 129),
    "odd": (3, 1, 3, 5, 24, 100, 77),
    "one": (1, 1, 1, 1, 16, 1, 1),
    "long": (1, 1, 2, 2, 32, 1100, 600),
    "many answers": (2, 1, 30, 6, 16, 40, 20),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_attention_follows_the_definition(shape):
    arrays = behind(attention_arrays(np.random.default_rng(5), *SHAPES[shape]), 1e4)
    got = attention(arrays, "reference")
    close(got, attention_by_loop(*arrays))


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_kernel_equals_the_reference(shape, form):
    """Also where the caches hold what is not finite behind the lengths."""
    arrays = attention_arrays(np.random.default_rng(6), *SHAPES[shape])
    want = attention(arrays, "reference")
    got = attention(behind(arrays, np.nan), "interpret")
    assert got.shape == arrays[0].shape and got.dtype == jnp.float32
    close(got, want)


@pytest.mark.parametrize("programs", [1, 4])
def test_attention_programs_that_take_several_blocks(programs, monkeypatch):
    """As on a GPU where rows are many: 35 blocks of the prompt and 19 of an answer among few programs."""
    monkeypatch.setattr(MODULES[2], "PROGRAMS", programs)
    arrays = attention_arrays(np.random.default_rng(11), *SHAPES["long"])
    close(attention(behind(arrays, np.nan), "interpret"), attention(arrays, "reference"))


def test_attention_in_bf16(form):
    """Within bf16's three digits of the fp32 result on the same (rounded) numbers, from kernel and reference."""
    arrays = attention_arrays(np.random.default_rng(9), *SHAPES["2B"], jnp.bfloat16)
    want = attention_by_loop(*arrays)
    for backend in ("reference", "interpret"):
        got = attention(arrays, backend)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_attention_lengths_at_the_ends(backend):
    """A length beyond the cache sees all of it; an answer that sees nothing gives something finite."""
    arrays = list(attention_arrays(np.random.default_rng(10), 2, 1, 2, 3, 16, 20, 18))
    arrays[5] = jnp.asarray([0, 0, 1, 1], jnp.int32)
    arrays[2], arrays[4] = jnp.asarray([99, 99, 0, 0], jnp.int32), jnp.asarray([99, 0, 3, 0], jnp.int32)
    got = attention(arrays, backend)
    assert np.isfinite(got).all()
    arrays[2], arrays[4] = np.asarray([20, 20, 0, 0]), np.asarray([18, 0, 3, 1])
    close(got[:3], attention_by_loop(*arrays)[:3])


@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_without_questions_a_row_reads_the_prompt_of_its_number(backend):
    arrays = attention_arrays(np.random.default_rng(12), 3, 2, 1, 2, 16, 20, 18)
    np.testing.assert_array_equal(arrays[5], [0, 1, 2])
    got = compiled(lambda *arrays: prefix_decode_attention(*arrays, None, backend=backend), *arrays[:5])
    close(got, attention(arrays, "reference"))


# Lowering for machines that this one is not.

F32, BF16, INT, BOOL = jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_


def shaped(*shapes):
    return [jax.ShapeDtypeStruct(shape[:-1], shape[-1]) for shape in shapes]


def advantage_program(B, M, K, T):
    return (
        lambda *arrays: step_group_advantage(*arrays, backend="pallas"),
        shaped((B, M, K, F32), (B, M, K, BOOL), (B, M, T, INT)),
    )


def loss_program(R, T, clip=None, grad=True):
    def loss(logprobs, entropy, ref, advantage, old, mask):
        names = ("logprobs", "ref", "advantage", "old", "entropy")
        arrays = dict(zip(names, (logprobs, ref, advantage, old, entropy), strict=True))
        options = {"old": True, "clip_low": clip, "clip_high": clip} if clip else {}
        out = loss_of(arrays, mask, backend="pallas", **options)
        return out.loss_R.sum() + out.entropy_R.sum()

    return jax.value_and_grad(loss, (0, 1)) if grad else loss, shaped(*[(R, T, F32)] * 5, (R, T, BOOL))


def attention_program(R, K, E, H, prefix, own, dtype):
    return (
        lambda *arrays: prefix_decode_attention(*arrays, backend="pallas"),
        shaped(
            (R, K, E, H, dtype), (2, K, 2, prefix, H, dtype), (R, INT), (R, K, 2, own, H, dtype), (R, INT), (R, INT)
        ),
    )


PROGRAMS = {
    "advantage": (advantage_program(4, 4, 8, 1024), 1),
    "advantage, odd": (advantage_program(3, 3, 5, 77), 1),
    "loss": (loss_program(16, 1024, grad=False), 1),
    "loss, backward": (loss_program(16, 1024), 2),
    "loss, clipped, odd": (loss_program(5, 100, clip=0.2), 2),
    "attention 2B": (attention_program(64, 2, 6, 128, 768, 1024, BF16), 1),
    "attention 7B": (attention_program(8, 4, 7, 128, 768, 1000, BF16), 1),
    "attention, odd": (attention_program(3, 1, 5, 80, 100, 17, F32), 1),
}


@pytest.mark.parametrize("platform, target", [("cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu_custom_call")])
@pytest.mark.parametrize("program", PROGRAMS)
def test_kernels_lower_for_gpu_and_tpu(program, platform, target):
    """jax 0.11 wants to know which GPU, where there is none."""
    (run, shapes), kernels = PROGRAMS[program]
    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh) if platform == "cuda" else nullcontext():
        text = jax.jit(run).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(f"custom_call @{target}(") == kernels


@pytest.mark.parametrize("program", ["advantage", "loss", "attention 2B"])
def test_pallas_on_a_cpu_is_an_error(program):
    (run, shapes), _ = PROGRAMS[program]
    with pytest.raises(NotImplementedError, match="backend 'pallas' .* is for cpu. Use backend 'reference'"):
        jax.jit(run).lower(*shapes)
    with pytest.raises(NotImplementedError, match="is for cpu"):
        run(*(jnp.zeros(shape.shape, shape.dtype) for shape in shapes))


# What is refused.


def wrong(arrays, i, change):
    arrays = list(arrays)
    arrays[i] = change(arrays[i])
    return arrays


def cast(dtype):
    return lambda array: array.astype(dtype)


ADVANTAGE = [jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4), bool), jnp.zeros((2, 3, 9), jnp.int32)]


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        (ADVANTAGE, {"backend": "triton"}, "backend is 'triton'; expected one of reference, pallas, interpret"),
        (ADVANTAGE, {"scale": "var"}, "scale is 'var'; expected one of std, none, floor"),
        (wrong(ADVANTAGE, 0, lambda a: a[0]), {}, r"rewards_BGJ has shape \(3, 4\); expected the 3 axes \(B, G, J\)"),
        (wrong(ADVANTAGE, 0, cast(jnp.int32)), {}, "rewards_BGJ has dtype int32; expected floating"),
        (wrong(ADVANTAGE, 1, cast(jnp.int32)), {}, "mask_BGJ has dtype int32; expected bool"),
        (
            wrong(ADVANTAGE, 1, lambda a: a[:, :2]),
            {},
            r"mask_BGJ has shape \(2, 2, 4\); expected \(2, 3, 4\) as rewards",
        ),
        (wrong(ADVANTAGE, 2, lambda a: a[:, :2]), {}, r"step_BGT has shape \(2, 2, 9\); expected \(2, 3, 9\)"),
        (wrong(ADVANTAGE, 2, cast(jnp.float32)), {}, "step_BGT has dtype float32; expected integer"),
    ],
)
def test_advantage_refuses(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        step_group_advantage(*arrays, **{"backend": "reference"} | options)


LOSS = [jnp.zeros((2, 5))] * 3 + [jnp.ones((2, 5), bool)]


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        (LOSS, {"backend": "gpu"}, "backend is 'gpu'"),
        (LOSS, {"average": "mean"}, "average is 'mean'; expected one of sequence, token, constant"),
        (LOSS, {"average": "constant"}, "max_length is None; average 'constant' divides by it"),
        (LOSS, {"clip_low": 0.2, "old_RT": LOSS[0]}, "clip_low is 0.2 and clip_high is None; expected both or neither"),
        (LOSS, {"clip_low": 0.2, "clip_high": 0.2}, "need old_RT"),
        (LOSS, {"clip_low": 1.2, "clip_high": 0.2, "old_RT": LOSS[0]}, "expected 0 <= clip_low <= 1"),
        (LOSS, {"weight_R": jnp.ones(3)}, r"weight_R has shape \(3,\); expected \(2,\)"),
        (LOSS, {"old_RT": jnp.zeros((2, 4))}, r"old_RT has shape \(2, 4\); expected \(2, 5\) as logprobs_RT"),
        (LOSS, {"entropy_RT": LOSS[3]}, "entropy_RT has dtype bool; expected floating"),
        (wrong(LOSS, 1, lambda a: a[0]), {}, r"ref_RT has shape \(5,\)"),
        (wrong(LOSS, 3, cast(jnp.float32)), {}, "mask_RT has dtype float32; expected bool"),
    ],
)
def test_loss_refuses(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        kl_policy_loss(*arrays, **{"backend": "reference", "beta": 0.04} | options)


ATTENTION = attention_arrays(np.random.default_rng(0), 2, 2, 3, 2, 8, 5, 4)


@pytest.mark.parametrize(
    "arrays, backend, message",
    [
        (ATTENTION, "cudnn", "backend is 'cudnn'"),
        (wrong(ATTENTION, 0, lambda a: a[0]), "reference", "q_RKEH has shape .* expected the 4 axes"),
        (
            wrong(ATTENTION, 1, lambda a: a[:, :1]),
            "reference",
            r"prefix_BK2SH has shape .*; expected \(2, 2, 2, 5, 8\)",
        ),
        (wrong(ATTENTION, 1, lambda a: a[:, :, :1]), "reference", r"prefix_BK2SH has shape .* as q_RKEH"),
        (wrong(ATTENTION, 2, lambda a: a[:1]), "reference", r"prefix_length_R has shape \(1,\); expected \(6,\)"),
        (wrong(ATTENTION, 3, lambda a: a[:2]), "reference", r"own_RK2SH has shape \(2, .*; expected \(6, "),
        (wrong(ATTENTION, 3, cast(jnp.bfloat16)), "reference", "own_RK2SH has dtype bfloat16; expected float32"),
        (wrong(ATTENTION, 4, cast(jnp.float32)), "reference", "own_length_R has dtype float32; expected integer"),
        (wrong(ATTENTION, 5, lambda a: a[:1]), "reference", r"question_R has shape \(1,\)"),
    ],
)
def test_attention_refuses(arrays, backend, message):
    with pytest.raises(ValueError, match=message):
        prefix_decode_attention(*arrays, backend=backend)
