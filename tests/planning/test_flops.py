"""FLOPs of traced programs: matmuls, loops, branches, devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from r1vl_jax.data.batching import blank_prompts
from r1vl_jax.data.buckets import Shape
from r1vl_jax.model.answers import answer_logprobs
from r1vl_jax.model.config import parse_config
from r1vl_jax.model.published import PUBLISHED
from r1vl_jax.model.spec import param_spec, tree_map_spec
from r1vl_jax.parallel.sharding import make_mesh
from r1vl_jax.planning.flops import flops

A, B = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
ONE = 2 * 3 * 5 * 7


def count(f, *args, **options):
    return flops(jax.jit(f).trace(*args), **options)


def test_a_matmul_counts_two_for_each_multiplication_and_its_gradient_twice_as_much():
    assert count(lambda a, b: a @ b, A, B) == ONE
    batched = [jax.ShapeDtypeStruct((4, *a.shape), a.dtype) for a in (A, B)]
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *batched) == 4 * ONE
    assert count(jax.value_and_grad(lambda a, b: (a @ b).sum(), (0, 1)), A, B) == 3 * ONE


def test_loops_branches_and_recomputation():
    def scan(a, b):
        return jax.lax.scan(lambda c, _: (c, a @ b), 0.0, None, length=6)[1]

    def loop(a, b):
        inner = lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y + a @ b, x)  # noqa: E731
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: inner(x) + a @ b, jnp.zeros((3, 7)))

    def branch(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((3, 7)))

    assert count(scan, A, B) == 6 * ONE
    assert count(loop, A, B) == 2 * ONE
    assert count(loop, A, B, rounds=10) == 20 * ONE  # the inner loop's number is not known: once
    assert count(branch, A, B) == ONE
    again = lambda a, b: jnp.sin(jax.checkpoint(lambda a: jnp.sin(a @ b))(a)).sum()  # noqa: E731
    assert count(jax.grad(again), A, B) == 3 * ONE


def test_the_body_of_a_shard_map_is_one_devices_work():
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        f = jax.shard_map(lambda a, b: a @ b, in_specs=(P(("data", "fsdp")), P()), out_specs=P(("data", "fsdp")))
        assert count(f, jax.ShapeDtypeStruct((12, 5), jnp.float32), B) == 4 * ONE


def test_the_2b_costs_what_its_sizes_say():
    """2 FLOPs a weight and token in the text layers, the head on answers alone, and attention on top."""
    cfg = parse_config(PUBLISHED["2b"]).with_backend("xla", "reference")
    params = tree_map_spec(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16), param_spec(cfg))
    prompts = blank_prompts(1, Shape(768, 0, 0, 0), cfg.vision.patch_dim)
    tokens = jax.ShapeDtypeStruct((1, 4, 1024), jnp.int32)
    total = flops(jax.jit(lambda p, b, t: answer_logprobs(p, cfg, b, t)[0]).trace(params, prompts, tokens))
    layers, embedding, rows = 1.310e9, 0.2334e9, 4 * 1024
    pairs = 768**2 + rows * (768 + 1024)
    attention = 4 * pairs * cfg.heads * cfg.head_dim * cfg.layers
    assert total == pytest.approx(2 * layers * (768 + rows) + 2 * embedding * rows + attention, rel=0.02)
