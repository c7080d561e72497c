"""Provides the code that the benchmarks and the GPU check share.

This includes model sizes, random weights and questions, FLOP counts, timing and tables. Workloads have the shapes of
training, with random weights and without an end-of-text token, so every run samples the same number of tokens.
bench_programs.py builds the programs of a step that the benchmarks time.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from r1vl_jax.data.batching import collate_prompts
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.model.backend import choose
from r1vl_jax.model.config import ModelConfig, parse_config
from r1vl_jax.model.published import PUBLISHED, flat_config
from r1vl_jax.model.spec import ParamSpec, is_spec, param_spec
from r1vl_jax.parallel.sharding import make_mesh, put_batch
from r1vl_jax.processing.positions import mrope_positions
from r1vl_jax.types import EncodedPrompt, Prompts

PAD_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the sizes of the questions and answers that it processes.

    Attributes:
      raw: the contents of config.json.
      prompt: the number of tokens of a question, including the image's tokens.
      grid: (t, h, w) of the image in patches.
      new: the number of tokens of an answer.
      group: the number of answers per question.
      dtype: the dtype of the computation.
    """

    raw: dict[str, Any]
    prompt: int
    grid: tuple[int, int, int]
    new: int
    group: int = 4
    dtype: str = "bfloat16"

    @property
    def cfg(self) -> ModelConfig:
        return parse_config(self.raw)

    def on_this_machine(self, attention: str = "auto", kernels: str = "auto") -> ModelConfig:
        """Returns the model with the backend that training would choose here, or with the named backend."""
        return self.cfg.with_backend(*choose(attention, kernels, dtype=self.dtype))


def raw_config(width, mlp, layers, heads, kv_heads, vocab, tied, vision) -> dict[str, Any]:
    """Returns a config.json without an end of text. `vision`: layers, width and heads of the vision tower."""
    sizes = {"width": width, "mlp": mlp, "layers": layers, "heads": heads, "kv_heads": kv_heads, "vocab": vocab}
    tower: dict[str, int] = dict(zip(("layers", "width", "heads"), vision, strict=True))
    ids = (vocab - 1, vocab - 2, vocab - 3, vocab - 4)
    return flat_config(**sizes, tied=tied, tower=tower, special_ids=ids) | _END


_END = {"torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None}  # an answer has no end
_IMAGE = (1, 34, 60)  # 399,840 pixels, 510 tokens
SIZES = {
    "cpu": Size(raw_config(256, 1024, 4, 4, 2, 8192, True, (2, 128, 4)), 64, (1, 8, 8), 64, dtype="float32"),
    "tiny": Size(raw_config(64, 96, 2, 4, 2, 512, True, (1, 32, 2)), 16, (1, 4, 4), 8, dtype="float32"),
    "2b": Size(PUBLISHED["2b"] | _END, 768, _IMAGE, 1024),
    "7b": Size(PUBLISHED["7b"] | _END, 768, _IMAGE, 1024),
}


# Inputs.


def random_params(cfg: ModelConfig, dtype: str, seed: int = 0) -> Any:
    """Returns random parameters on the device: matrices of unit gain, biases near 0, norm scales near 1."""
    return _random_params(jax.random.key(seed, impl="unsafe_rbg"), cfg, dtype)


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def _random_params(key: jax.Array, cfg: ModelConfig, dtype: str) -> Any:
    """Draws uniform values with the simplest random generator, because other generators take seconds to compile."""
    specs, treedef = jax.tree.flatten(param_spec(cfg), is_leaf=is_spec)

    def draw(key: jax.Array, spec: ParamSpec) -> jax.Array:
        deviation = math.prod(spec.hf_shape[1:]) ** -0.5 if spec.init == "normal" else 0.1
        value = jax.random.uniform(key, spec.shape, dtype, -1, 1) * (deviation * math.sqrt(3))
        return (value + int(spec.init == "ones")).astype(dtype)

    return treedef.unflatten(map(draw, jax.random.split(key, len(specs)), specs))


def random_questions(size: Size, count: int, seed: int = 0, *, pixels: bool = True) -> list[EncodedPrompt]:
    """Returns questions of `size.prompt` tokens with one image each; `pixels` False: patches are already normalised."""
    cfg, rng = size.cfg, np.random.default_rng(seed)
    image = math.prod(size.grid) // cfg.vision.merge_size**2
    text = size.prompt - image - 2
    before = text // 4
    positions, after = mrope_positions([before + 1, size.grid, 1 + text - before], cfg.vision.merge_size)
    is_image_T = np.zeros(size.prompt, bool)
    is_image_T[before + 1 : before + 1 + image] = True
    patches = (math.prod(size.grid), cfg.vision.patch_dim)
    questions = []
    for _ in range(count):
        tokens = rng.integers(0, min(cfg.vision_ids), size.prompt).astype(np.int32)
        tokens[before], tokens[before + 1 + image] = cfg.vision_start_token_id, cfg.vision_end_token_id
        tokens[is_image_T] = cfg.image_token_id
        questions.append(
            EncodedPrompt(
                tokens_T=tokens,
                positions_3T=positions,
                image_slot_T=np.where(is_image_T, np.cumsum(is_image_T) - 1, -1).astype(np.int32),
                patches_PC=rng.integers(0, 256, patches, np.uint8)
                if pixels
                else rng.normal(size=patches).astype(np.float32),
                grids=(size.grid,),
                next_position=after,
            )
        )
    return questions


def random_tokens(size: Size, count: int, seed: int = 1) -> np.ndarray:
    """Returns random answers (count, group, new) without vision ids."""
    shape = (count, size.group, size.new)
    return np.random.default_rng(seed).integers(0, min(size.cfg.vision_ids), shape).astype(np.int32)


def random_advantages(count: int, group: int, seed: int = 2) -> np.ndarray:
    """Returns advantages (count, group) with mean 0 and standard deviation 1 in each group."""
    values = np.random.default_rng(seed).normal(size=(count, group)).astype(np.float32)
    return (values - values.mean(1, keepdims=True)) / values.std(1, ddof=1, keepdims=True)


@cache
def single_device() -> Mesh:
    """Returns a mesh of one device, which is all that the benchmarks use."""
    return make_mesh(1, devices=jax.devices()[:1])


def collate(questions: Sequence[EncodedPrompt], multiple: int = PAD_MULTIPLE) -> Prompts:
    """Returns a padded batch of questions on the device."""
    return put_batch(collate_prompts(questions, Buckets(multiple)), single_device())


# FLOPs.


def _weights(cfg: ModelConfig) -> tuple[int, int, int]:
    """Returns the number of multiplications per text token, per token in the head, and per patch.

    Attention between tokens is not included.
    """
    D, F, H = cfg.width, cfg.mlp, cfg.head_dim
    layer = D * H * (2 * cfg.heads + 2 * cfg.kv_heads) + 3 * D * F
    W, merged = cfg.vision.width, cfg.vision.width * cfg.vision.merge_size**2
    merger = (merged * merged + merged * D) // cfg.vision.merge_size**2
    patch = cfg.vision.patch_dim * W + cfg.vision.layers * (4 * W * W + 2 * W * cfg.vision.mlp) + merger
    return cfg.layers * layer, D * cfg.vocab, patch


def group_flops(size: Size, *, shared: bool = True) -> float:
    """Returns the FLOPs of one forward pass over a question and its `size.group` answers.

    A multiplication counts as 2 FLOPs. A query counts only the keys that it may see: earlier tokens, or the patches of
    its own frame. The head runs on answer tokens only.

    Args:
      shared: True: the prompt counts once per group; False: once per answer.
    """
    cfg, P, T, G = size.cfg, size.prompt, size.new, size.group
    layer, head, patch = _weights(cfg)
    times, patches = 1 if shared else G, math.prod(size.grid)
    pairs = times * P * (P + 1) / 2 + G * (T * P + T * (T + 1) / 2)
    frame = size.grid[1] * size.grid[2]
    vision = times * patches * (patch + 2 * cfg.vision.layers * cfg.vision.width * frame)
    text = (times * P + G * T) * layer + 2 * cfg.layers * cfg.width * pairs
    return 2.0 * (vision + text + G * T * head)


def training_flops(size: Size, groups: int) -> float:
    """Returns the FLOPs of a training step: forward and backward of the policy (3 passes), forward of the reference.

    Recomputation by remat is not counted.
    """
    return 4 * groups * group_flops(size)


def rollout_flops(size: Size, groups: int) -> float:
    """Returns the FLOPs of one forward pass over the prompts and sampled answers."""
    return groups * group_flops(size)


# Timing.


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the first call, which compiles, and of the other calls."""

    first: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def compile(self) -> float:
        """Returns the seconds by which the first call was slower than the median."""
        return max(0.0, self.first - self.median)

    def as_json(self) -> dict[str, Any]:
        names = {"seconds": self.median, "min": min(self.seconds), "max": max(self.seconds)}
        return names | {"repeats": len(self.seconds), "compile_s": self.compile}


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int, pause: float = 0.0) -> dict[str, Timing]:
    """Runs each call once to warm up, then all calls in turn, `repeats` times, with `pause` seconds between calls."""
    first = {name: timed(call) for name, call in calls.items()}
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(pause)
            seconds[name].append(timed(call))
    return {name: Timing(first[name], tuple(seconds[name])) for name in calls}


def measure(
    call: Callable[[], Any], repeats: int, until: float = math.inf, warm_up: Callable[[], Any] | None = None
) -> Timing:
    """Times a first call (or `warm_up`), then up to `repeats` calls while the next should end before `until`.

    `until` is a time of time.monotonic.
    """
    first, seconds = timed(warm_up or call), []
    while not seconds or (len(seconds) < repeats and time.monotonic() + seconds[-1] < until):
        seconds.append(timed(call))
    return Timing(first, tuple(seconds))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as aligned text; the first row and column are headings."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
