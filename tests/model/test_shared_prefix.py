"""A prompt run once for all its answers, and once for each: the same numbers, the same gradients."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.tiny_jax import batch_of, left_padded, questions, random_params, tiny_config

from r1vl_jax.model.answers import answer_hidden
from r1vl_jax.step_grpo.loss import Objective, answer_weights, step_grpo_loss
from r1vl_jax.types import TrainBatch

IMAGE_A, IMAGE_B = ("image", (1, 4, 6)), ("image", (1, 2, 2))
G, T = 3, 7
LENGTHS = np.array([[3, 7, 1], [1, 1, 6], [7, 2, 5], [4, 4, 4]])


@cache
def setting():
    """(cfg, params, a batch of ragged groups): no image, one, several; prompts and answers of any length."""
    cfg, rng = tiny_config(layers=3), np.random.default_rng(5)
    prompts = batch_of(questions([3, IMAGE_A, 2], [4], [2, IMAGE_B, 3, IMAGE_A, 1], [9, IMAGE_B]))
    mask = np.arange(T) < LENGTHS[..., None]
    tokens = np.where(mask, rng.integers(0, tiny.TEXT_IDS, mask.shape), 0).astype(np.int32)
    advantage = np.broadcast_to(rng.normal(size=(4, G, 1)), mask.shape).astype(np.float32)
    ref = np.where(mask, -rng.uniform(4, 5.5, mask.shape), 0).astype(np.float32)
    return cfg, random_params(cfg), TrainBatch(prompts, tokens, answer_weights(mask, mask[..., 0].size), advantage, ref)


@cache
def gradient(shared: bool, remat: str = "none", left: bool = False):
    cfg, params, batch = setting()
    batch = batch.replace(prompts=left_padded(batch.prompts)) if left else batch
    loss_fn = partial(step_grpo_loss, cfg=cfg, objective=Objective(1.2, 0.3), remat=remat, shared=shared)
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)


def relative(a, b):
    """|a - b| / |b| of the whole gradient, and the largest of any array."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    norm = lambda arrays: float(np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in arrays)))  # noqa: E731
    each = [norm([x - y]) / norm([y]) for x, y in pairs if norm([y])]
    return norm([x - y for x, y in pairs]) / norm([y for _, y in pairs]), max(each)


@pytest.mark.parametrize("remat, left", [("none", False), ("full", False), ("matmuls", False), ("none", True)])
def test_gradient(remat, left):
    """To 1e-5, relative, in each parameter array; vision's too."""
    ((loss, metrics), shared), ((want, want_metrics), naive) = gradient(True, remat, left), gradient(False)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for name in ("kl", "entropy"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5)
    whole, worst = relative(shared, naive)
    assert whole < 1e-5 and worst < 1e-5
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(naive["vision"]))


def test_the_comparison_can_fail():
    """A tenth of a percent of one prompt's embedding is seen."""
    cfg, params, batch = setting()
    other = {
        **params,
        "text": {**params["text"], "embed": params["text"]["embed"].at[batch.prompts.tokens_BT[1, 0]].multiply(1.001)},
    }
    loss_fn = partial(step_grpo_loss, cfg=cfg, objective=Objective(1.2, 0.3), remat="none")
    moved = jax.jit(jax.grad(lambda p: loss_fn(p, batch)[0]))(other)
    assert relative(moved, gradient(False)[1])[0] > 1e-5


def test_hidden_states():
    """Every answer's hidden states, real tokens only; garbage behind an answer's end changes none of them."""
    cfg, params, batch = setting()
    mask = np.arange(T) < LENGTHS[..., None]
    garbage = np.where(mask, batch.tokens_BGT, 77).astype(np.int32)
    run = jax.jit(answer_hidden, static_argnames=("cfg", "shared"))
    shared, naive, other = (
        np.asarray(run(params, cfg, batch.prompts, tokens, shared=how))
        for tokens, how in ((batch.tokens_BGT, True), (batch.tokens_BGT, False), (garbage, True))
    )
    np.testing.assert_allclose(shared[mask], naive[mask], atol=1e-5)
    np.testing.assert_allclose(other[mask], naive[mask], atol=1e-5)
    assert np.abs(other[~mask] - naive[~mask]).max() > 0.1
