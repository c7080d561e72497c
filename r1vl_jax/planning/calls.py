"""Lists the programs of a stage's step with abstract arguments, so that they can be compiled without any device.

The shapes are those of full batches: every answer has the maximum length, every question one image of the largest size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1vl_jax.config import Config
from r1vl_jax.data.batching import blank_prompts
from r1vl_jax.data.buckets import Buckets, Shape
from r1vl_jax.errors import ConfigError
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.parallel.sharding import RULES, batch_axes, batch_shards, partition_spec
from r1vl_jax.rollout import generate
from r1vl_jax.training.programs import Programs, build_programs, needs_buffer
from r1vl_jax.training.step_grpo import sampling
from r1vl_jax.types import Prompts, TrainBatch

STEPS = 8  # of an answer, for the advantages
TEXT_TOKENS = 256  # of a question beside its images
STOP_IDS = (0,)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The size of a question.

    Attributes:
      prompt: tokens, those of the images included.
      images: number of images.
      patches: of an image.
      answer: tokens of an answer of SFT.
    """

    prompt: int
    images: int
    patches: int
    answer: int


@dataclasses.dataclass(frozen=True)
class Call:
    """A program of a step with abstract arguments.

    Attributes:
      times: how often it runs in a step.
      rounds: how often its loop runs, if XLA does not know it.
      beside: other trees that are on the devices at the same time.
    """

    name: str
    program: Any
    args: tuple[Any, ...]
    beside: tuple[Any, ...] = ()
    times: int = 1
    rounds: int = 1


def rows_of(
    config: Config, model: ModelConfig, stage: str, *, prompt: int | None = None, images: int | None = None
) -> Rows:
    """Returns the size of a stage's questions.

    Args:
      prompt: tokens, images included; None: 256 and those of the images, at most max_prompt_tokens.
      images: None: one. Each has max_pixels.
    Raises: ConfigError if the images do not fit into the prompt.
    """
    section, most = {"sft": config.sft, "step_grpo": config.rl}[stage], config.data.max_prompt_tokens
    images = 1 if images is None else images
    patches = section.max_pixels // model.vision.patch_size**2
    image_tokens = images * (patches // model.vision.merge_size**2)
    prompt = min(TEXT_TOKENS + image_tokens, most) if prompt is None else prompt
    if not image_tokens < prompt <= most:
        raise ConfigError(
            f"{stage}: a prompt of {prompt} tokens with {images} image(s) of {image_tokens // max(1, images)} tokens; "
            f"expected more than its images have, and at most data.max_prompt_tokens = {most} (see --prompt, --images)"
        )
    return Rows(prompt, images, patches, config.sft.max_answer_tokens if stage == "sft" else 0)


def device_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree on one device."""
    return sum(a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(tree))


def stage_calls(
    model: ModelConfig, config: Config, mesh: Mesh, stage: str, rows: Rows, *, programs: Programs | None = None
) -> Iterator[Call]:
    """Yields the programs of a step.

    Args:
      model: with the backend of the machine that is planned for.
      mesh: of the devices that are planned for.
      programs: of the stage; None: built here.
    """
    programs = build_programs(model, mesh, config, stage, 1000) if programs is None else programs
    step = Step(model, config, mesh, rows, programs)
    yield from step.sft() if stage == "sft" else step.step_grpo()


@dataclasses.dataclass(frozen=True)
class Step:
    """What the programs of a step have in common."""

    model: ModelConfig
    config: Config
    mesh: Mesh
    rows: Rows
    programs: Programs

    @property
    def resting(self) -> tuple[Any, ...]:
        """What is on the devices beside the train state: the reference, if it is kept there."""
        return (self.reference,) if self.config.rl.reference == "device" else ()

    @property
    def reference(self) -> Any:
        """The frozen parameters, in the dtype of the computation."""
        dtype = jnp.dtype(self.config.model.dtype)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, dtype, sharding=a.sharding), self.programs.layout.params
        )

    def array(self, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return self.placed(jax.ShapeDtypeStruct(shape, dtype))

    def placed(self, tree: Any) -> Any:
        """Returns abstract arrays, each split over the batch axes of the mesh."""

        def one(a: Any, axis: int) -> jax.ShapeDtypeStruct:
            spec = PartitionSpec(*[None] * axis, RULES["batch"]) if a.ndim else PartitionSpec()
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree.map(one, tree, batch_axes(tree))

    def cache(self, cache: generate.Cache) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns abstract keys and values, split over questions and heads."""
        sharding = NamedSharding(self.mesh, partition_spec(("batch", "kv_heads")))
        return tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in cache)

    def prompts(self, count: int, *, answer: int = 0) -> Prompts:
        """Returns abstract prompts of `count` questions; with `answer`, each is followed by so many tokens."""
        rows, images = self.rows, count * self.rows.images
        buckets = Buckets(self.config.data.pad_multiple, self.model.vision.merge_size, batch_shards(self.mesh))
        patches = buckets.row_length(rows.patches) if rows.images else 0
        shape = buckets.rounded(Shape(rows.prompt + answer, answer, images, patches))
        return self.placed(blank_prompts(count, shape, self.model.vision.patch_dim))

    def sft(self) -> Iterator[Call]:
        section, state, parts = self.config.sft, self.programs.layout, self.programs.parts
        count, times = section.micro_batch_size, section.batch_size // section.micro_batch_size
        shape = count, 1, self.rows.answer
        batch = TrainBatch(
            self.prompts(count, answer=self.rows.answer),
            self.array(*shape, dtype=jnp.int32),
            self.array(*shape),
            start_B=self.array(count, dtype=jnp.int32),
        )
        grads = {part: state.params[part] for part in parts}
        buffer = grads if needs_buffer(times, self.mesh) else None
        beside = (state.opt_state, *[batch] * (2 * times - 1))  # the other micro-batches, and the next update's
        yield Call("gradient", self.programs.accumulate, (buffer, state.params, batch), beside, times)
        yield Call("update", self.programs.update, (state, grads, self.scalar))

    @property
    def scalar(self) -> jax.ShapeDtypeStruct:
        return self.placed(jax.ShapeDtypeStruct((), jnp.float32))

    def step_grpo(self) -> Iterator[Call]:
        yield from self.rollout()
        rl, state = self.config.rl, self.programs.layout
        B, G, T = rl.questions_per_step, rl.group_size, rl.max_new_tokens
        rewards_BGJ, mask_BGJ = self.array(B, G, STEPS), self.array(B, G, STEPS, dtype=jnp.bool_)
        arrays = rewards_BGJ, mask_BGJ, self.array(B, G, T, dtype=jnp.int32)
        yield Call("advantages", self.programs.advantages, arrays, (state, *self.resting))
        yield from self.update(self.config.rl.micro_batch_size)

    def rollout(self) -> Iterator[Call]:
        """Yields the programs of a rollout; of the decode loops the one with all rows, as if no answer ended early."""
        programs, cfg, rl = self.programs, self.model, self.config.rl
        state = programs.layout
        B, G, T = rl.questions_per_step, rl.group_size, rl.max_new_tokens
        yield Call("rollout_weights", programs.rollout_weights, (state.params,), (state.opt_state, *self.resting))
        weights = programs.rollout_weights.eval_shape(state.params)
        prompts, beside = self.prompts(B), (state, *self.resting)
        yield Call("prefill", programs.prefill, (weights, cfg, prompts), beside)
        with jax.set_mesh(self.mesh):
            last_BD, prefix, length_B = self.placed(jax.eval_shape(programs.prefill, weights, cfg, prompts))
            prefix = self.cache(prefix)
            begin = partial(generate.start, cfg, length=T, stop=STOP_IDS[0])
            limit_BG = self.array(B, G, dtype=jnp.int32)
            inputs = (last_BD, length_B, prompts.next_position_B, self.array(B, G, T), limit_BG)
            rows, answers = self.placed(jax.eval_shape(begin, *inputs))
            answers = answers._replace(cache=self.cache(answers.cache))
        until = generate.Until(T, 0, T, T)
        arguments = (weights, cfg, prefix, rows, answers, until, sampling(rl), STOP_IDS)
        yield Call("decode", programs.decode, arguments, beside, rounds=T)
        shards = batch_shards(self.mesh)
        fewer = generate.row_counts(B * G // shards)[:2][-1] * shards
        kept_R = self.array(fewer, dtype=jnp.int32)
        yield Call("compact", generate.compact, (rows, answers, kept_R), (*beside, weights, prefix))

    def update(self, count: int) -> Iterator[Call]:
        """Yields the programs from sampled answers to updated policy, on micro-batches of `count` questions."""
        programs, rl = self.programs, self.config.rl
        state = programs.layout
        times, updates = rl.questions_per_step // count, rl.updates_per_rollout
        prompts, shape = self.prompts(count), (count, rl.group_size, rl.max_new_tokens)
        tokens_BGT, floats_BGT = self.array(*shape, dtype=jnp.int32), self.array(*shape)
        weights = programs.rollout_weights.eval_shape(state.params)
        if rl.reference != "none":
            arguments = self.reference, prompts, tokens_BGT
            yield Call("reference", programs.token_logprobs, arguments, (state, weights), times)
        if updates > 1:
            arguments = state.params, prompts, tokens_BGT
            yield Call("old_logprobs", programs.token_logprobs, arguments, (state.opt_state, *self.resting), times)
        grads = {part: state.params[part] for part in programs.parts}
        buffer = grads if needs_buffer(times, self.mesh) else None
        batch = TrainBatch(prompts, tokens_BGT, *[floats_BGT] * (3 + (updates > 1)))
        arguments = buffer, state.params, batch
        yield Call("gradient", programs.accumulate, arguments, (state.opt_state, *self.resting), times * updates)
        yield Call("update", programs.update, (state, grads, self.scalar), self.resting, updates)
