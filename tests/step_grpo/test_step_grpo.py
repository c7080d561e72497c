"""Advantages, the StepGRPO loss and the warm-up loss against hand-computed numbers and loops over the formulas."""

from __future__ import annotations

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.tiny_jax import batch_of, questions, random_params, tiny_config, with_answer
from r1vl_kernels.reference import step_advantages, token_advantages
from r1vl_kernels.reference_jax import k3

from r1vl_jax.model import qwen2_vl
from r1vl_jax.model.answers import answer_hidden, answer_logprobs
from r1vl_jax.sft.loss import sft_loss, token_weights
from r1vl_jax.step_grpo.advantages import (
    gate_rewards,
    group_advantages,
    has_signal,
    shaped_only,
)
from r1vl_jax.step_grpo.loss import Objective, answer_weights, policy_loss, step_grpo_loss
from r1vl_jax.training import optimizer
from r1vl_jax.training.optimizer import zero_grads
from r1vl_jax.types import TrainBatch

# Advantages.


def test_advantages_by_hand():
    """[1, 0, 0, 0]: mean 1/4, squared deviations 9/16 + 3/16 = 3/4, over G - 1 = 3: std 1/2 (ddof 0 gives 0.433)."""
    got = group_advantages(np.array([[1.0, 0.0, 0.0, 0.0], [2.1, 1.0, 1.0, 0.1]]))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0], [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001], rtol=1e-6)
    # [2.1, 1, 1, 0.1]: mean 1.05; squares 1.1025 + 0.0025 + 0.0025 + 0.9025 = 2.01; / 3 = 0.67.
    std = math.sqrt(0.67) + 1e-4
    np.testing.assert_allclose(got[1], [1.05 / std, -0.05 / std, -0.05 / std, -0.95 / std], rtol=1e-5)


def test_eps_stands_beside_the_deviation():
    """Two rewards 2e-4 apart: std = 1.414e-4, so that eps = 1e-4 takes 41% of the advantage."""
    np.testing.assert_allclose(
        group_advantages(np.array([[2e-4, 0.0]])), [[1e-4 / (math.sqrt(2) * 1e-4 + 1e-4), -0.41421356]], rtol=1e-5
    )
    np.testing.assert_allclose(
        group_advantages(np.array([[1.0, 0.0]]), eps=0.5), [[0.5 / (0.5**0.5 + 0.5), -0.41421356]]
    )


def test_groups_do_not_see_each_other():
    rewards = np.array([[0.0, 1.0, 0.3], [5.0, 9.0, 0.0]])
    both = group_advantages(rewards)
    for row, rewards_G in zip(both, rewards, strict=True):
        np.testing.assert_array_equal(row, group_advantages(rewards_G[None])[0])


def test_groups_that_teach_nothing():
    constant = np.array([[1.1, 1.1, 1.1, 1.1], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(group_advantages(constant), np.zeros((2, 4)))
    np.testing.assert_array_equal(group_advantages(np.array([[3.0]])), [[0.0]])
    # 0.1 * 3 and 0.3 differ in the last bit only: no lesson either.
    mixed = group_advantages(np.array([[1.1, 1.1], [1.1, 1.0], [0.1 * 3, 0.3]]))
    np.testing.assert_array_equal(has_signal(mixed[:, :, None]), [False, True, False])


def test_scales():
    """[1, 0, 0, 0]: mean 1/4, std 1/2. [0.01, 0]: std 0.00707, below the floor."""
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [0.01, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(group_advantages(rewards, scale="none")[0], [0.75, -0.25, -0.25, -0.25])
    floored = group_advantages(rewards, scale="floor", std_floor=0.2)
    np.testing.assert_allclose(floored[0], group_advantages(rewards)[0])
    np.testing.assert_allclose(floored[1], np.array([0.0075, -0.0025, -0.0025, -0.0025]) / 0.2001, rtol=1e-5)


def test_step_advantages_by_hand():
    """Three answers of 3, 2 and 1 steps. Returns: [2.1, 2.05, 2.05], [1.05, 1.05], [0].

    Step 1: mean 1.05, deviations +-1.05 and 0, std 1.05. Step 2, the first two answers: mean 1.55, deviations +-0.5,
    std sqrt(0.5). Step 3: one answer alone.
    """
    rewards = np.array([[[0.05, 0.0, 2.05], [0.0, 1.05, 0.0], [0.0, 0.0, 0.0]]])
    mask = np.array([[[1, 1, 1], [1, 1, 0], [1, 0, 0]]], bool)
    got = step_advantages(rewards, mask)
    first, second = 1.05 / 1.0501, 0.5 / (math.sqrt(0.5) + 1e-4)
    np.testing.assert_allclose(got, [[[first, second, 0], [0, -second, 0], [-first, 0, 0]]], rtol=1e-6, atol=1e-12)
    assert got.dtype == np.float32
    # What stands where an answer has no step does not count.
    noise = np.where(mask, rewards, 7.0)
    np.testing.assert_array_equal(step_advantages(noise, mask), got)
    tokens = token_advantages(got, np.array([[[0, 0, 1, 2], [0, 1, 1, 1], [0, 0, 0, 0]]]))
    np.testing.assert_array_equal(tokens[0, 0], got[0, 0, [0, 0, 1, 2]])
    np.testing.assert_array_equal(tokens[0, 1], got[0, 1, [0, 1, 1, 1]])


def test_one_step_is_the_trajectory():
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    for scale in ("std", "none", "floor"):
        steps = step_advantages(rewards[:, :, None], np.ones((5, 4, 1), bool), scale=scale)
        np.testing.assert_array_equal(steps[:, :, 0], group_advantages(rewards, scale=scale))
    # The first step's return is the whole reward, so its advantage is the trajectory's, however many steps follow.
    split = rewards[:, :, None] * np.array([0.2, 0.3, 0.5])
    first = step_advantages(split, np.ones((5, 4, 3), bool))[:, :, 0]
    np.testing.assert_allclose(first, group_advantages(rewards), rtol=1e-5)


OUTCOME = np.array([[[0.0], [0.0]], [[1.0], [0.0]], [[1.0], [1.0]]])
SHAPING = np.array([[[1.1], [0.0]], [[0.0], [1.1]], [[1.1], [0.1]]])


@pytest.mark.parametrize(
    "gate, rewards, taught, shaped",
    [
        ("none", [[1.1, 0], [1, 1.1], [2.1, 1.1]], [True, True, True], [True, False, True]),
        ("mixed", [[0, 0], [1, 1.1], [1, 1]], [False, True, False], [False, False, False]),
        ("correct", [[0, 0], [1, 0], [2.1, 1.1]], [False, True, True], [False, False, True]),
    ],
)
def test_gates(gate, rewards, taught, shaped):
    """Groups of two wrong answers, one right and one wrong, and two right ones; step rewards differ in each."""
    gated = gate_rewards(OUTCOME, SHAPING, OUTCOME[:, :, 0] > 0, gate)
    np.testing.assert_allclose(gated[:, :, 0], rewards)
    advantages = step_advantages(gated, np.ones(gated.shape, bool))
    np.testing.assert_array_equal(has_signal(advantages), taught)
    np.testing.assert_array_equal(shaped_only(OUTCOME, advantages), shaped)


def test_k3_by_hand():
    """ref - lp = -0.5, 0 and 1: exp(d) - d - 1."""
    got = k3(jnp.array([-1.5, -2.0, -1.0]), jnp.array([-1.0, -2.0, -2.0]))
    np.testing.assert_allclose(got, [0.10653066, 0.0, 0.71828183], rtol=1e-6)


# The loss on given log-probabilities.

MASK = np.array([[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]], bool)


def token_values(seed=0):
    rng = np.random.default_rng(seed)
    lp, ref = -rng.uniform(0.1, 3.0, (2, *MASK.shape))
    advantage_BG = rng.normal(size=MASK.shape[:2])
    return lp, ref, np.broadcast_to(advantage_BG[..., None], MASK.shape)


def loop_loss(lp, ref, advantage, mask, beta):
    """SPEC section 3 as loops: (loss, mean KL, gradient of the loss with respect to lp)."""
    loss = kl_mean = 0.0
    gradient = np.zeros(mask.shape)
    answers = mask.shape[0] * mask.shape[1]
    for b, g in np.ndindex(*mask.shape[:2]):
        length = int(mask[b, g].sum())
        for t in range(length):
            d = float(ref[b, g, t]) - float(lp[b, g, t])
            kl = math.exp(d) - d - 1
            loss += -(1.0 * advantage[b, g, t] - beta * kl) / length / answers
            kl_mean += kl / length / answers
            # d ratio / d lp = ratio = 1; d kl / d lp = 1 - exp(ref - lp).
            gradient[b, g, t] = (-advantage[b, g, t] + beta * (1 - math.exp(d))) / length / answers
    return loss, kl_mean, gradient


def loss_and_kl(lp, ref, advantage, weight, beta):
    values = {"ref": ref, "advantage": advantage, "weight": weight}
    loss, metrics = policy_loss(lp, jnp.zeros_like(lp), values, objective=Objective(1.0, beta), backend="reference")
    return loss, metrics["kl"]


def test_answer_weights():
    got = answer_weights(MASK, answers=8)
    assert got.dtype == np.float32
    expected = np.array([[[1 / 24] * 3 + [0], [1 / 8, 0, 0, 0]], [[1 / 32] * 4, [1 / 16, 1 / 16, 0, 0]]])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_array_equal(answer_weights(np.zeros((1, 1, 3), bool), answers=1), np.zeros((1, 1, 3)))


def test_averages():
    """Answers of 3, 1, 4 and 2 tokens: token: 1 / 10 each; constant: 1 / (4 answers * T = 4) each."""
    np.testing.assert_allclose(answer_weights(MASK, 4, "token"), MASK / 10, rtol=1e-6)
    np.testing.assert_allclose(answer_weights(MASK, 4, "constant"), MASK / 16, rtol=1e-6)
    np.testing.assert_allclose(answer_weights(MASK, 4, "sequence").sum(axis=2), 1 / 4, rtol=1e-6)


def test_the_ratio_is_cut_only_where_the_batch_has_the_sampling_policys():
    """lp - old = log 2 with A = 1: the ratio 2 is cut to 1.2 and has no gradient; without `old` it is 1 and has."""
    lp, old = jnp.full((1, 1, 1), -1.0), jnp.full((1, 1, 1), -1.0 - math.log(2))
    values = {"ref": lp, "advantage": jnp.ones((1, 1, 1)), "weight": jnp.ones((1, 1, 1))}
    objective = Objective(1.0, 0.0, clip=(0.2, 0.2))

    def loss(lp, values):
        return policy_loss(lp, jnp.zeros_like(lp), values, objective=objective, backend="reference")[0]

    value, gradient = jax.value_and_grad(loss)(lp, values | {"old": old})
    np.testing.assert_allclose([value, gradient[0, 0, 0]], [-1.2, 0.0], atol=1e-6)
    value, gradient = jax.value_and_grad(loss)(lp, values)
    np.testing.assert_allclose([value, gradient[0, 0, 0]], [-1.0, -1.0], atol=1e-6)


def test_policy_loss_by_hand():
    """One answer of two tokens: A = 2, beta = 0.04, KLs 0.10653066 and 0.71828183 (see k3 above).

    loss = 1/2 * [-(2 - 0.04 * 0.10653066) - (2 - 0.04 * 0.71828183)] = -2 + 0.02 * 0.82481249 = -1.98350375.
    gradient = 1/2 * (-2 + 0.04 * (1 - exp(-0.5))), 1/2 * (-2 + 0.04 * (1 - e)).
    """
    lp, ref = jnp.array([[[-1.0, -2.0]]]), jnp.array([[[-1.5, -1.0]]])
    weight = jnp.asarray(answer_weights(np.ones((1, 1, 2), bool), 1))

    def loss(lp):
        return loss_and_kl(lp, ref, jnp.full((1, 1, 2), 2.0), weight, 0.04)

    (value, kl), gradient = jax.value_and_grad(loss, has_aux=True)(lp)
    np.testing.assert_allclose(value, -1.98350375, rtol=1e-6)
    np.testing.assert_allclose(kl, 0.41240625, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[[-0.99213061, -1.03436564]]], rtol=1e-6)


@pytest.mark.parametrize("behind", [0.0, 7.0, 1e30, np.inf, -np.inf, np.nan])
def test_policy_loss_and_gradient(behind):
    """The loops' value and gradient, whatever stands behind an answer's end."""
    lp, ref, advantage = token_values()
    loss, kl, gradient = loop_loss(lp, ref, advantage, MASK, 0.04)
    lp, ref, advantage = (np.where(MASK, a, value) for a, value in ((lp, behind), (ref, behind), (advantage, 3.0)))

    def of(lp):
        weight = jnp.asarray(answer_weights(MASK, MASK.shape[0] * MASK.shape[1]))
        return loss_and_kl(lp, jnp.asarray(ref, jnp.float32), jnp.asarray(advantage, jnp.float32), weight, 0.04)

    (got, got_kl), got_gradient = jax.value_and_grad(of, has_aux=True)(jnp.asarray(lp, jnp.float32))
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(got_kl, kl, rtol=1e-5)
    np.testing.assert_allclose(got_gradient, gradient, rtol=1e-5, atol=1e-7)


def test_long_answers_do_not_weigh_more():
    """Two answers of 1 and 4 tokens with advantages 1 and -1 cancel: a mean over answers, not over tokens."""
    mask = np.array([[[1, 0, 0, 0], [1, 1, 1, 1]]], bool)
    zeros, advantage = jnp.zeros(mask.shape), jnp.broadcast_to(jnp.array([1.0, -1.0])[None, :, None], mask.shape)
    loss, _ = loss_and_kl(zeros, zeros, advantage, jnp.asarray(answer_weights(mask, 2)), 0.04)
    np.testing.assert_allclose(loss, 0.0, atol=1e-7)


# The losses of a model.

padded = partial(batch_of, pad_multiple=32)  # a whole batch and its halves differ in their rows only

IMAGE_A, IMAGE_B = ("image", (1, 4, 6)), ("image", (1, 2, 2))
T, BETA, TEMPERATURE = 5, 0.3, 1.2
LENGTHS = np.array([[3, 5], [1, 4], [5, 2], [2, 2]])
ANSWER_MASK = np.arange(T) < LENGTHS[..., None]


def full_logprobs(params, cfg, prompts, tokens, mask, temperature, forbidden):
    """float64 log softmax(z / T) of the answers, from a forward pass over each question with each answer, uncached."""
    rows = [(b, g) for b, g in np.ndindex(*mask.shape[:2])]
    together = batch_of([with_answer(prompts[b], tokens[b, g][mask[b, g]]) for b, g in rows])
    logits = np.asarray(jax.jit(partial(qwen2_vl.prompt_logits, cfg=cfg))(params, prompts=together), np.float64)
    logprobs = np.zeros(mask.shape)
    for (b, g), z_TV in zip(rows, logits / temperature, strict=True):
        z_TV[:, list(forbidden)] = -np.inf
        for t in range(mask[b, g].sum()):
            z = z_TV[len(prompts[b].tokens_T) - 1 + t]
            logprobs[b, g, t] = z[tokens[b, g, t]] - np.log(np.exp(z - z.max()).sum()) - z.max()
    return logprobs


@pytest.fixture(scope="module")
def setting():
    """(cfg, params, questions, tokens of answers, their log-probabilities at T = 1.2, the batch of RL).

    Four questions of different length, two answers each; the reference stands 0.5 about the policy.
    """
    cfg, rng = tiny_config(), np.random.default_rng(3)
    params = random_params(cfg)
    prompts = questions([3, IMAGE_A, 2], [4], [2, IMAGE_B, 3], [5, IMAGE_B, 1, IMAGE_A])
    tokens = rng.integers(0, tiny.TEXT_IDS, ANSWER_MASK.shape).astype(np.int32)
    lp = full_logprobs(params, cfg, prompts, tokens, ANSWER_MASK, TEMPERATURE, cfg.vision_ids)
    advantage = np.broadcast_to(rng.normal(size=(*tokens.shape[:2], 1)), tokens.shape).astype(np.float32)
    ref = np.where(ANSWER_MASK, lp + 0.5 * rng.normal(size=lp.shape), np.nan).astype(np.float32)
    weights = answer_weights(ANSWER_MASK, answers=tokens.shape[0] * tokens.shape[1])
    return cfg, params, prompts, tokens, lp, TrainBatch(padded(prompts), tokens, weights, advantage, ref)


def part(batch, prompts, rows):
    """A micro-batch, collated on its own."""
    arrays = {
        name: getattr(batch, name)[rows]
        for name in ("tokens_BGT", "weight_BGT", "advantage_BGT", "ref_logprobs_BGT")
        if getattr(batch, name) is not None
    }
    return TrainBatch(padded(prompts[rows]), **arrays)


def gradients(params, batch, loss_fn, grads=None):
    parts = ("vision", "text")
    grads = zero_grads(params, parts) if grads is None else grads
    return accumulate(grads, params, batch, loss_fn=loss_fn, parts=parts, dtype="float32")


accumulate = jax.jit(optimizer.accumulate, static_argnames=("loss_fn", "parts", "dtype"))


@cache
def warm_up_loss(cfg):
    return partial(sft_loss, cfg=cfg, remat="none")


@cache
def grpo_loss(cfg):
    """The same function each time: it is a static argument of jit."""
    return partial(step_grpo_loss, cfg=cfg, objective=Objective(TEMPERATURE, BETA), remat="none")


def largest_difference(a, b):
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def test_step_grpo_loss_of_a_model(setting):
    cfg, params, _, _, lp, batch = setting
    expected, kl, _ = loop_loss(lp, batch.ref_logprobs_BGT, batch.advantage_BGT, ANSWER_MASK, BETA)
    loss, metrics = jax.jit(grpo_loss(cfg))(params, batch)
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected, atol=1e-5)
    np.testing.assert_allclose(metrics["kl"], kl, atol=1e-5)


def test_gradient_of_a_model(setting):
    """On-policy the gradient is the one of sum weight * (-A * lp + beta * KL), with no ratio in it."""
    cfg, params, _, _, _, batch = setting
    real = batch.weight_BGT > 0
    ref = np.where(real, batch.ref_logprobs_BGT, 0.0)

    @jax.jit
    @jax.grad
    def expected(params):
        lp, _ = answer_logprobs(
            params, cfg, batch.prompts, batch.tokens_BGT, temperature=TEMPERATURE, forbidden=cfg.vision_ids
        )
        lp = jnp.where(real, lp, 0.0)
        return jnp.sum(batch.weight_BGT * (-batch.advantage_BGT * lp + BETA * (jnp.exp(ref - lp) - ref + lp - 1)))

    grads, _ = gradients(params, batch, grpo_loss(cfg))
    assert largest_difference(grads, expected(params)) < 1e-5
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads["text"]["layers"]["q"]))


def test_micro_batches_add_up(setting):
    """One batch of four questions, or 2 + 2 of them: the same loss, KL and gradients."""
    cfg, params, prompts, _, _, batch = setting
    loss_fn = grpo_loss(cfg)
    whole, metrics = gradients(params, batch, loss_fn)
    grads, sums = None, []
    for rows in (slice(0, 2), slice(2, 4)):
        grads, metrics_part = gradients(params, part(batch, prompts, rows), loss_fn, grads)
        sums.append(metrics_part)
    for name in ("loss", "kl", "entropy"):
        np.testing.assert_allclose(sums[0][name] + sums[1][name], metrics[name], atol=1e-5)
        assert abs(float(sums[0][name])) > 1e-3
    assert largest_difference(grads, whole) < 1e-5


def test_on_policy_value(setting):
    """The ratio is 1 where the policy scores its own tokens: loss = -mean A + beta * KL."""
    cfg, params, _, _, lp, batch = setting
    loss, metrics = jax.jit(grpo_loss(cfg))(params, batch)
    mean_advantage = batch.advantage_BGT[..., 0].mean()
    np.testing.assert_allclose(loss, -mean_advantage + BETA * metrics["kl"], atol=1e-5)
    loss, metrics = jax.jit(grpo_loss(cfg))(params, batch.replace(ref_logprobs_BGT=np.float32(lp)))
    np.testing.assert_allclose(loss, -mean_advantage, atol=1e-5)
    np.testing.assert_allclose(metrics["kl"], 0.0, atol=1e-6)


# Warm-up.


def sft_batch(prompts, tokens):
    mask = ANSWER_MASK[:, :1]
    return TrainBatch(padded(prompts), tokens[:, :1], token_weights(mask, int(mask.sum())))


def test_token_weights():
    mask = np.array([[[1, 1, 0]], [[1, 0, 0]]], bool)
    got = token_weights(mask, 6)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, mask / 6, rtol=1e-6)


def test_sft_loss_is_cross_entropy(setting):
    """The mean over answer tokens (not over rows) of -log p, nothing forbidden, T = 1."""
    cfg, params, prompts, tokens, _, _ = setting
    mask = ANSWER_MASK[:, :1]
    lp = full_logprobs(params, cfg, prompts, tokens[:, :1], mask, 1.0, ())
    loss, metrics = jax.jit(warm_up_loss(cfg))(params, sft_batch(prompts, tokens))
    np.testing.assert_allclose(loss, -lp[mask].sum() / mask.sum(), atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss)


def test_prompt_tokens_get_no_sft_loss(setting):
    """An untied head row of a token that only stands in a prompt moves by its probability alone, never as a target.

    d loss / d z_v at a position is weight * (p_v - [v is the target]): positive for a token that is never a target,
    wherever it stands in the prompt, so that the row's gradient is the weighted sum of p_v * hidden.
    """
    _, _, prompts, tokens, _, _ = setting
    cfg = tiny_config(tied=False)
    params, batch = random_params(cfg), sft_batch(prompts, tokens)
    grads, _ = gradients(params, batch, warm_up_loss(cfg))
    hidden = jax.jit(partial(answer_hidden, cfg=cfg))(params, prompts=batch.prompts, tokens_BGT=batch.tokens_BGT)
    p = jax.nn.softmax(hidden @ params["text"]["head"].T)
    targets = set(batch.tokens_BGT[ANSWER_MASK[:, :1]].tolist())
    asked = [v for v in np.concatenate([q.tokens_T for q in prompts]).tolist() if v not in targets]
    expected = jnp.einsum("BGT,BGTV,BGTD->VD", batch.weight_BGT, p, hidden)
    assert len(set(asked)) > 10
    np.testing.assert_allclose(grads["text"]["head"][np.array(asked)], expected[np.array(asked)], atol=1e-6)


def test_sft_micro_batches_add_up(setting):
    cfg, params, prompts, tokens, _, _ = setting
    batch, loss_fn = sft_batch(prompts, tokens), warm_up_loss(cfg)
    whole, metrics = gradients(params, batch, loss_fn)
    grads, first = gradients(params, part(batch, prompts, slice(0, 2)), loss_fn)
    grads, second = gradients(params, part(batch, prompts, slice(2, 4)), loss_fn, grads)
    np.testing.assert_allclose(first["loss"] + second["loss"], metrics["loss"], atol=1e-5)
    assert largest_difference(grads, whole) < 1e-5
