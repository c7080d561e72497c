"""Defines the models that gpu_check.py runs, and wraps the benchmarks' code: a small StepGRPO step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from bench_common import (
    SIZES,
    Size,
    collate,
    random_advantages,
    random_questions,
    random_tokens,
    single_device,
)
from bench_programs import answer, micro_batches, step_programs, update, with_advantages, with_reference

from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.qwen2_vl import cast
from r1vl_jax.model.spec import ParamSpec, is_spec, param_spec
from r1vl_jax.parallel.sharding import param_shardings
from r1vl_jax.rollout import generate

QUESTIONS, MICRO, UPDATES = 4, 2, 2
LOGIT_ROWS = 256
SAMPLES = 20_000  # entries of each parameter that are compared


class Way(NamedTuple):
    """A way to run a step: dtype of the computation, backends of attention and kernels, precision of fp32 matmuls."""

    dtype: str
    attention: str
    kernels: str
    precision: str | None


def step_size(name: str, dtype: str) -> Size:
    """Returns the tiny model, or a model of two layers with the 2B's head widths (128; vision tower 80); few tokens."""
    if name == "tiny":
        return dataclasses.replace(SIZES["tiny"], dtype=dtype)
    size, vocab = SIZES["2b"], 8192
    vision = size.raw["vision_config"] | {"depth": 2, "embed_dim": 160, "num_heads": 2, "hidden_size": 512}
    raw = size.raw | {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "image_token_id": vocab - 1,
        "video_token_id": vocab - 2,
        "vision_start_token_id": vocab - 3,
        "vision_end_token_id": vocab - 4,
        "vision_config": vision,
    }
    return dataclasses.replace(size, raw=raw, prompt=96, grid=(1, 8, 12), new=64, dtype=dtype)


def numpy_params(cfg: ModelConfig) -> Any:
    """Returns random fp32 parameters from NumPy, which are the same on every device."""
    rng = np.random.default_rng(7)

    def draw(spec: ParamSpec) -> np.ndarray:
        deviation = math.prod(spec.hf_shape[1:]) ** -0.5 if spec.init == "normal" else 0.1
        return (deviation * rng.normal(size=spec.shape) + (spec.init == "ones")).astype(np.float32)

    return jax.tree.map(draw, param_spec(cfg), is_leaf=is_spec)


@contextlib.contextmanager
def shorter_loops() -> Iterator[None]:
    """Makes the rollout drop finished rows earlier and in smaller steps, so that a small step does it at all."""
    before = generate.SEGMENT, generate.ROW_MULTIPLE
    generate.SEGMENT, generate.ROW_MULTIPLE = 2, 1
    try:
        yield
    finally:
        generate.SEGMENT, generate.ROW_MULTIPLE = before


def step(name: str, way: Way) -> dict[str, np.ndarray]:
    """Runs a rollout of the model `step_size(name)`, and two updates on random answers that ignore the rollout.

    Returns a dictionary with these arrays:
      tokens, rollout_logprobs: the rollout's, of answers of different lengths; rows are dropped on the way.
      recomputed: log-probabilities of the rollout's tokens by the training program; 0 after an answer's end.
      reference: log-probabilities of the random answers.
      loss0, kl0, ... loss1, ...: metrics of each update.
      change: a sample of each parameter's change by the updates.
    """
    size = step_size(name, way.dtype)
    cfg = size.cfg.with_backend(way.attention, way.kernels, LOGIT_ROWS)
    with jax.set_mesh(single_device()), jax.default_matmul_precision(way.precision):
        start, shardings = numpy_params(cfg), param_shardings(param_spec(cfg), single_device())
        before = sampled_entries(start)
        policy = jax.device_put(cast(start, way.dtype), shardings)
        reference = jax.device_put(cast(jax.tree.map(lambda a: np.float32(0.9) * a, start), way.dtype), shardings)
        programs = step_programs(size, cfg, remat="matmuls")
        state = programs.init(jax.device_put(start, shardings))
        questions = random_questions(size, QUESTIONS)

        weights = programs.rollout_weights(state.params)
        limit_BG = np.random.default_rng(5).integers(1, size.new + 1, (QUESTIONS, size.group))
        with shorter_loops():
            sampled = answer(weights, cfg, collate(questions), size.group, size.new, limit_BG=limit_BG)
        result = {"tokens": sampled.tokens_BGT, "rollout_logprobs": sampled.logprobs_BGT}
        batches = micro_batches(questions, np.asarray(sampled.tokens_BGT), MICRO)
        recomputed = joined(programs.token_logprobs(policy, b.prompts, b.tokens_BGT) for b in batches)
        result["recomputed"] = np.where(sampled.mask_BGT, recomputed, 0.0)

        batches = micro_batches(questions, random_tokens(size, QUESTIONS), MICRO)
        batches = with_reference(programs, reference, batches)
        result["reference"] = joined(b.ref_logprobs_BGT for b in batches)
        batches = with_advantages(batches, random_advantages(QUESTIONS, size.group))
        for number in range(UPDATES):
            state, metrics = update(programs, state, batches)
            result |= {f"{key}{number}": value for key, value in metrics.items()}
        result["change"] = sampled_entries(state.params) - before
    return {key: np.asarray(value) for key, value in result.items()}


def joined(arrays: Any) -> np.ndarray:
    return np.concatenate([np.asarray(array) for array in arrays])


def sampled_entries(params: Any) -> np.ndarray:
    """Returns about SAMPLES entries of each parameter, evenly spaced."""
    flat = [np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(params)]
    return np.concatenate([a[:: max(1, a.size // SAMPLES)] for a in flat])
