"""Eight forced CPU devices against one: the same tokens, losses, gradients and updates on every mesh."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.tiny_jax import batch_of, questions, random_params, tiny_config
from jax.sharding import PartitionSpec

from r1vl_jax.config import Config, DataSection, ModelSection, SourceSection
from r1vl_jax.config_stages import OptimizerSection, RLSection
from r1vl_jax.model.fused import fuse, fused_shardings
from r1vl_jax.model.spec import param_spec
from r1vl_jax.parallel.sharding import ROLLOUT_RULES, batch_shards, make_mesh, param_shardings, put_batch
from r1vl_jax.rollout import generate
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.step_grpo.loss import answer_weights
from r1vl_jax.training.optimizer import zero_grads
from r1vl_jax.training.programs import build_programs, gradient_step
from r1vl_jax.types import Sampling, TrainBatch

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2)]
B, G, T = 8, 2, 6
PARTS = ("vision", "text")
# Adam's first update is the learning rate times g / |g|: where g is close to 0 that magnifies its rounding. A rate of
# 1e-4 keeps this below 1e-5, and an update that is left out or wrong ten times above. What magnifies is Adam's epsilon,
# 1e-8: the loss is LOUDER, and clipped less (but clipped), so that no gradient is as small as that.
LOUDER = 4
OPTIMIZER = OptimizerSection(
    learning_rate=1e-4, schedule="constant", warmup_ratio=0.0, weight_decay=0.1, max_grad_norm=3.0 * LOUDER
)


@cache
def setting():
    """(cfg, params, prompts of 8 questions for any number of shards up to 8)."""
    cfg = tiny_config()
    image, small = ("image", (1, 4, 6)), ("image", (1, 2, 2))
    rows = [[3, image, 2], [4], [2, small, 3], [5, small, 1, image], [6], [image, 1], [7, image], [2, image, small]]
    return cfg, random_params(cfg), batch_of(questions(*rows), shards=8)


CONFIG = Config(
    stages=("step_grpo",),
    model=ModelSection(path="not read", dtype="float32", remat="none"),
    data=DataSection(rl=SourceSection(path="not read")),
    rl=RLSection(temperature=3.0, beta=0.1, optimizer=OPTIMIZER),
)


def train_batch(prompts):
    rng = np.random.default_rng(0)
    mask = np.arange(T) < rng.integers(1, T + 1, (B, G, 1))
    advantage = np.broadcast_to(rng.normal(size=(B, G, 1)), mask.shape).astype(np.float32)
    tokens = rng.integers(0, tiny.TEXT_IDS, mask.shape).astype(np.int32)
    ref = -rng.uniform(4, 5.5, mask.shape).astype(np.float32)
    return TrainBatch(prompts, tokens, LOUDER * answer_weights(mask, B * G), advantage, ref)


def sampled(mesh, rules, kernels="reference", **limits):
    cfg, params, prompts = setting()
    cfg = dataclasses.replace(cfg, kernels=kernels)
    weights = jax.jit(partial(fuse, cfg=cfg), out_shardings=fused_shardings(cfg, mesh, ROLLOUT_RULES[rules]))
    with jax.set_mesh(mesh):
        got = rollout(
            weights(params), cfg, put_batch(prompts, mesh), np.arange(B, dtype=np.uint32),
            group=G, sampling=Sampling(max_new_tokens=8), stop_ids=(1, 2), seed=0, step=1, **limits,
        )  # fmt: skip
        return jax.device_get(got)


def trained(mesh):
    """(loss and metrics, gradients, parameters after one update, the state) on a mesh."""
    cfg, params, prompts = setting()
    shardings = param_shardings(param_spec(cfg), mesh)
    with jax.set_mesh(mesh):
        programs = build_programs(cfg, mesh, CONFIG, "step_grpo", 10)
        # A copy: the update donates its state.
        placed = jax.device_put(jax.tree.map(jnp.copy, params), shardings)
        state = programs.init(placed)
        batch = train_batch(prompts)
        grads, metrics = programs.accumulate(zero_grads(state.params, PARTS), state.params, put_batch(batch, mesh))
        after, step_metrics = gradient_step(programs, state, [put_batch(batch, mesh)], use_buffer=True)
        values = {**metrics, "grad_norm": step_metrics["grad_norm"]}
        return jax.device_get(values), jax.device_get(grads), jax.device_get(after.params), after


@cache
def one_device(what, *args):
    return {"sampled": sampled, "trained": trained}[what](make_mesh(devices=jax.devices()[:1]), *args)


def differences(a, b):
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return {jax.tree_util.keystr(path): float(np.abs(x - y).max()) for (path, x), y in pairs}


def test_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    "sizes, rules",
    [((8, 1, 1), "replicated"), ((1, 8, 1), "replicated"), ((1, 1, 2), "tensor"), ((2, 2, 2), "tensor"),
     ((2, 2, 2), "replicated")],
)  # fmt: skip
def test_rollout(sizes, rules):
    expected = one_device("sampled", "replicated")
    got = sampled(make_mesh(*sizes), rules)
    np.testing.assert_array_equal(got.tokens_BGT, expected.tokens_BGT)
    np.testing.assert_array_equal(got.mask_BGT, expected.mask_BGT)
    np.testing.assert_allclose(got.logprobs_BGT, expected.logprobs_BGT, atol=1e-5)
    assert len(np.unique(expected.tokens_BGT)) > 20


@pytest.mark.parametrize(
    "sizes, rules, kernels",
    [((2, 1, 2), "tensor", "reference"), ((2, 1, 2), "tensor", "interpret"), ((4, 2, 1), "replicated", "reference")],
)
def test_finished_rows_are_dropped(sizes, rules, kernels, monkeypatch):
    """On a mesh too the rest is what it would have been, and caches stay split by rows and by heads."""
    limits = np.array([[8, 3]] + [[1 + i % 2, 2] for i in range(B - 1)])
    expected, kept, drop = one_device("sampled", "replicated"), [], generate.compact

    def watched(*args):
        rows, answers = drop(*args)
        kept.append((len(answers.done_R), answers.cache[0].sharding.spec, rows.question_R.sharding.spec))
        return rows, answers

    monkeypatch.setattr(generate, "SEGMENT", 2)
    monkeypatch.setattr(generate, "ROW_MULTIPLE", 1)
    monkeypatch.setattr(generate, "compact", watched)
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    got = sampled(mesh, rules, kernels, limit_BG=limits)
    mask = (np.arange(8) < limits[..., None]) & expected.mask_BGT
    np.testing.assert_array_equal(got.mask_BGT, mask)
    np.testing.assert_array_equal(got.tokens_BGT[mask], expected.tokens_BGT[mask])
    np.testing.assert_allclose(got.logprobs_BGT[mask], expected.logprobs_BGT[mask], atol=1e-5)
    assert kept and all(count < 2 * B and count % batch_shards(mesh) == 0 for count, *_ in kept)
    assert all(cache[0] == rows[0] and (sizes[2] == 1 or cache[1] == "tensor") for _, cache, rows in kept)


@pytest.mark.parametrize("sizes", MESHES)
def test_loss_gradients_and_update(sizes):
    metrics, grads, params, _ = one_device("trained")
    got_metrics, got_grads, got_params, _ = trained(make_mesh(*sizes))
    for name, value in metrics.items():
        np.testing.assert_allclose(got_metrics[name], value, atol=1e-5, err_msg=name)
    assert not {path: error for path, error in differences(got_grads, grads).items() if not error < 1e-5}
    assert not {path: error for path, error in differences(got_params, params).items() if not error < 1e-5}
    before = jax.device_get(setting()[1])
    assert min(differences(params, before).values()) > 9e-5


def test_state_is_split():
    """Masters and both moments lie in parts as the table says; the smallest axes stay whole."""
    mesh = make_mesh(2, 2, 2)
    _, _, _, state = trained(mesh)

    def shard(array):
        shapes = {s.data.shape for s in array.addressable_shards}
        assert len(array.addressable_shards) == 8 and len(shapes) == 1
        return shapes.pop()

    moments = state.opt_state[1][0]
    for tree in (state.params, moments.mu, moments.nu):
        layers = tree["text"]["layers"]
        assert shard(tree["text"]["embed"]) == (96 // 2, 64 // 2)
        assert shard(layers["q"]["kernel"]) == (1, 64 // 2, 4 // 2, 16)
        assert shard(layers["k"]["bias"]) == (1, 2 // 2, 16)
        assert shard(layers["down"]) == (1, 40 // 2, 64 // 2)
        assert shard(layers["norm1"]) == (1, 64)
        assert shard(tree["vision"]["blocks"]["qkv"]["kernel"]) == (1, 32 // 2, 3, 2 // 2, 16)
        assert shard(tree["vision"]["merger"]["fc1"]["kernel"]) == (128 // 2, 128 // 2)
    # Groups are split over data * fsdp = 4, the same on both devices of `tensor`.
    batch = put_batch(train_batch(setting()[2]), mesh)
    assert shard(batch.tokens_BGT) == (B // 4, G, T)
    assert shard(batch.prompts.positions_3BT) == (3, B // 4, batch.prompts.tokens_BT.shape[1])
    assert shard(batch.prompts.patches_WPC)[0] == batch.prompts.patches_WPC.shape[0] // 4


def test_any_tree_of_batches_is_placed():
    """Fields declare their batch axis; everything else has it first: tuples, dicts, plain arrays."""
    mesh, prompts = make_mesh(4, 2, 1), setting()[2]
    placed = put_batch({"pair": (prompts, np.zeros((B, 3))), "batch": train_batch(prompts)}, mesh)
    (first, array), batch = placed["pair"], placed["batch"]
    rows = ("data", "fsdp")
    for part in (first, batch.prompts):
        assert part.positions_3BT.sharding.spec == PartitionSpec(None, rows)
        assert part.image_slot_BT.sharding.spec == part.segment_WP.sharding.spec == PartitionSpec(rows)
    assert array.sharding.spec == batch.weight_BGT.sharding.spec == PartitionSpec(rows)
    assert batch.start_B is None


def test_rollout_weights():
    """`replicated` has all of every weight on every device; `tensor` splits heads, MLP, vocabulary, never over fsdp."""
    cfg, params, _ = setting()
    mesh, shapes = make_mesh(2, 2, 2), {}
    for rules in ("replicated", "tensor"):
        placed = jax.device_put(params, param_shardings(param_spec(cfg), mesh, ROLLOUT_RULES[rules]))
        shapes[rules] = jax.tree.map(lambda a: a.addressable_shards[0].data.shape, placed["text"])
    assert shapes["replicated"] == jax.tree.map(lambda a: a.shape, params["text"])
    assert shapes["tensor"]["embed"] == (96 // 2, 64)
    assert shapes["tensor"]["layers"]["down"] == (1, 40 // 2, 64)


# What does not divide.


def test_mesh_sizes():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert batch_shards(make_mesh(2, 2, 2)) == 4
    for sizes, message in [
        ((-1, 3, 1), "8 devices do not divide by 3"),
        ((4, 4, 1), "needs 16 devices, there are 8"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 1, 1), "sizes are positive"),
        ((-2, 1, 1), "sizes are positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_mesh(*sizes)


def test_every_dimension_that_does_not_divide_is_named():
    """tensor = 4 divides 4 heads, 40 and 128 MLP columns and 96 ids, but neither 2 kv heads nor 2 vision heads."""
    with pytest.raises(ValueError) as error:
        param_shardings(param_spec(setting()[0]), make_mesh(2, 1, 4))
    text = str(error.value)
    for name in ("['k']['kernel']", "['k']['bias']", "['v']['kernel']", "['v']['bias']"):
        assert f"['text']['layers']{name}: kv_heads 2 over tensor=4" in text
    for name in ("['qkv']['kernel']", "['qkv']['bias']", "['proj']['kernel']"):
        assert f"['vision']['blocks']{name}: heads 2 over tensor=4" in text
    assert text.count(" over ") == 7
    # The same mesh is fine for weights that are not split.
    param_shardings(param_spec(setting()[0]), make_mesh(2, 1, 4), ROLLOUT_RULES["replicated"])


def test_rows_that_do_not_divide():
    mesh = make_mesh(2, 4, 1)
    with pytest.raises(ValueError, match="tokens_BT: 2 rows do not divide over data\\*fsdp = 8"):
        put_batch(batch_of(questions([3], [4])), mesh)
    one_row = batch_of(questions(*[[3]] * 7, [("image", (1, 2, 2))]))
    with pytest.raises(ValueError, match="patches_WPC: 1 rows do not divide over data\\*fsdp = 8"):
        put_batch(one_row, mesh)
    placed = put_batch(batch_of(questions(*[[3]] * 8)), mesh)
    assert placed.tokens_BT.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert placed.patches_WPC.shape[0] == 0
