"""bfloat16: sums of many terms are in fp32, and what cannot be seen in a program is seen in its gradient."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_jax import batch_of, questions, random_params, tiny_config

from r1vl_jax.model.answers import answer_loss
from r1vl_jax.model.layers import linear, rms_norm, take
from r1vl_jax.model.qwen2_vl import cast

IMAGE = ("image", (1, 4, 6))


@pytest.mark.parametrize("form", ["shared", "unshared", "joined"])
def test_no_sum_over_tokens_is_in_bfloat16(form):
    """Of a model with images, in the gradient of both stages' losses: no scatter-add and no reduction."""
    cfg = tiny_config()
    params = jax.eval_shape(lambda: cast(random_params(cfg), "bfloat16"))
    prompts = batch_of(questions([3, IMAGE, 2], [4]))
    tokens = np.zeros((2, 1 if form == "joined" else 3, 6), np.int32)
    options = {"start_B": np.array([5, 3], np.int32)} if form == "joined" else {"shared": form == "shared"}

    def loss(params):
        token_loss = lambda logprobs, entropy, values: (-logprobs.sum(), {})  # noqa: E731
        return answer_loss(token_loss, params, cfg, prompts, tokens, {}, remat="full", **options)[0]

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    scatters = [block.split("}) : ")[1].splitlines()[0] for block in text.split('"stablehlo.scatter"')[1:]]
    sums = re.findall(r"reduce\(.*applies stablehlo\.add across dimensions = \[(.*)\] : \(tensor<(.*?)>", text)
    terms = [(shape, np.prod([int(shape.split("x")[int(axis)]) for axis in axes.split(", ")])) for axes, shape in sums]
    assert len(scatters) >= 2 and len(terms) >= 10
    assert not [line for line in scatters if "bf16" in line]
    assert not [shape for shape, count in terms if "bf16" in shape and count > 1]


def test_a_gradient_of_many_equal_terms():
    """1,024 tokens with the gradient 1: in bfloat16 the sum would stay at 256."""
    one, count = jnp.bfloat16(1), 1024

    def by_embedding(table):
        return take(table, jnp.zeros(count, jnp.int32)).astype(jnp.float32).sum()

    assert jax.grad(by_embedding)(jnp.full((2, 3), one)).tolist() == [[count] * 3, [0] * 3]


def test_values_are_those_of_bfloat16():
    """A bias and a scale in fp32 round as they do in bfloat16: two terms need no wider sum."""
    rng = np.random.default_rng(0)
    x, vector = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((50, 40), 40))
    identity = jnp.eye(40, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(linear(x, identity, vector), x + vector)
    normed = rms_norm(x, jnp.ones(40, jnp.bfloat16), 1e-6)
    np.testing.assert_array_equal(rms_norm(x, vector, 1e-6), normed * vector)
