"""What bench_cpu.py and bench_gpu.py measure: model sizes, random weights and questions, our stages as they are timed.

The workloads are those of training, with random weights and no end of text, so that every run makes as many tokens.
Each use of r1vl_jax stands in one function here. FLOPs are counted by `training_flops` and `rollout_flops`.
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
from r1vl_kernels.prefix_decode_attention import prefix_decode_attention

from r1vl_jax.config import OptimizerSection
from r1vl_jax.data.batching import collate_prompts
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.model.answers import answer_logprobs
from r1vl_jax.model.backend import choose
from r1vl_jax.model.config import ModelConfig, parse_config
from r1vl_jax.model.fused import fuse
from r1vl_jax.model.head import head_loss
from r1vl_jax.model.qwen2_vl import cast
from r1vl_jax.model.spec import param_spec
from r1vl_jax.parallel.sharding import make_mesh, param_shardings, put_batch
from r1vl_jax.processing.positions import mrope_positions
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.step_grpo.loss import Objective, answer_weights, policy_loss, step_grpo_loss
from r1vl_jax.training.optimizer import (
    abstract_state,
    gradient_step,
    init_state,
    make_optimizer,
    make_update,
    trained_parts,
)
from r1vl_jax.types import EncodedPrompt, ParamSpec, Prompts, Rollout, Sampling, TrainBatch, is_spec

TEMPERATURE, BETA = 1.2, 0.04
OBJECTIVE = Objective(temperature=TEMPERATURE, beta=BETA)
OPTIMIZER = OptimizerSection(learning_rate=1e-6, schedule="constant", warmup_ratio=0.0)
PAD_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the questions it is given.

    Attributes:
      raw: the config.json.
      prompt: tokens of a question, its image among them; grid: (t, h, w) of the image in patches.
      new: tokens of an answer; group: answers to a question.
      dtype: of the computation.
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
        """The model by the means that training would choose here, or those named."""
        return self.cfg.with_backend(*choose(attention, kernels, dtype=self.dtype))


def _raw_config(width, mlp, layers, heads, kv_heads, vocab, tied, vision) -> dict[str, Any]:
    """A flat config.json, as the published ones. `vision`: layers, width and heads of the tower."""
    half = width // heads // 2
    depth, embed_dim, vision_heads = vision
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]},
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,  # an answer has no end
        **{
            f"{name}_token_id": vocab - 1 - i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))
        },
        "vision_config": {
            "depth": depth,
            "embed_dim": embed_dim,
            "num_heads": vision_heads,
            "hidden_size": width,
            "mlp_ratio": 4,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


_TOWER, _IMAGE = (32, 1280, 16), (1, 34, 60)  # 399,840 pixels, 510 tokens
SIZES = {
    "cpu": Size(_raw_config(256, 1024, 4, 4, 2, 8192, True, (2, 128, 4)), 64, (1, 8, 8), 64, dtype="float32"),
    "tiny": Size(_raw_config(64, 96, 2, 4, 2, 512, True, (1, 32, 2)), 16, (1, 4, 4), 8, dtype="float32"),
    "2b": Size(_raw_config(1536, 8960, 28, 12, 2, 151936, True, _TOWER), 768, _IMAGE, 1024),
    "7b": Size(_raw_config(3584, 18944, 28, 28, 4, 152064, False, _TOWER), 768, _IMAGE, 1024),
}


# Inputs.


def random_params(cfg: ModelConfig, dtype: str, seed: int = 0) -> Any:
    """Parameters on the device, every one random: matrices of unit gain, biases about 0, norms about 1."""
    return _random_params(jax.random.key(seed, impl="unsafe_rbg"), cfg, dtype)


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def _random_params(key: jax.Array, cfg: ModelConfig, dtype: str) -> Any:
    """Uniform values, from the plainest generator: others take seconds to compile."""
    specs, treedef = jax.tree.flatten(param_spec(cfg), is_leaf=is_spec)

    def draw(key: jax.Array, spec: ParamSpec) -> jax.Array:
        deviation = math.prod(spec.hf_shape[1:]) ** -0.5 if spec.init == "normal" else 0.1
        value = jax.random.uniform(key, spec.shape, dtype, -1, 1) * (deviation * math.sqrt(3))
        return (value + (spec.init == "ones")).astype(dtype)

    return treedef.unflatten(map(draw, jax.random.split(key, len(specs)), specs))


def random_questions(size: Size, count: int, seed: int = 0, *, pixels: bool = True) -> list[EncodedPrompt]:
    """Questions of `size.prompt` tokens with an image each, its patches as pixels or normalised."""
    cfg, rng = size.cfg, np.random.default_rng(seed)
    image = math.prod(size.grid) // cfg.vision.merge_size**2
    text = size.prompt - image - 2
    before = text // 4
    positions, after = mrope_positions([before + 1, size.grid, 1 + text - before], cfg.vision.merge_size)
    is_image_T = np.zeros(size.prompt, bool)
    is_image_T[before + 1 : before + 1 + image] = True
    patches = (math.prod(size.grid), cfg.vision.patch_dim)
    found = []
    for _ in range(count):
        tokens = rng.integers(0, min(cfg.vision_ids), size.prompt).astype(np.int32)
        tokens[before], tokens[before + 1 + image] = cfg.vision_start_token_id, cfg.vision_end_token_id
        tokens[is_image_T] = cfg.image_token_id
        found.append(
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
    return found


def random_tokens(size: Size, count: int, seed: int = 1) -> np.ndarray:
    """Answers (count, group, new) without vision ids."""
    shape = (count, size.group, size.new)
    return np.random.default_rng(seed).integers(0, min(size.cfg.vision_ids), shape).astype(np.int32)


def random_advantages(count: int, group: int, seed: int = 2) -> np.ndarray:
    """Of mean 0 and deviation 1 in each group, as the group-relative advantage is; (count, group)."""
    values = np.random.default_rng(seed).normal(size=(count, group)).astype(np.float32)
    return (values - values.mean(1, keepdims=True)) / values.std(1, ddof=1, keepdims=True)


@cache
def single_device():
    """The mesh of one device: the benchmarks use no more."""
    return make_mesh(1, devices=jax.devices()[:1])


def collate(questions: Sequence[EncodedPrompt], multiple: int = PAD_MULTIPLE) -> Prompts:
    """A padded batch on the device."""
    return put_batch(collate_prompts(questions, Buckets(multiple)), single_device())


# Our stages.


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def rollout_weights(params: Any, cfg: ModelConfig, dtype: str) -> Any:
    """Parameters as `rollout` takes them, in the dtype of the computation."""
    return fuse(cast(params, dtype), cfg)


def answer(weights, cfg: ModelConfig, prompts: Prompts, group: int, new: int, *, step: int = 0, **more) -> Rollout:
    """`group` answers of exactly `new` tokens to each question: the only stop token is one that is never sampled."""
    count = prompts.tokens_BT.shape[0]
    return rollout(
        weights, cfg, prompts, np.arange(count, dtype=np.uint32),
        group=group, sampling=Sampling(temperature=TEMPERATURE, max_new_tokens=new),
        stop_ids=(cfg.image_token_id,), seed=0, step=step, **more,
    )  # fmt: skip


class Training:
    """Policy, its optimizer and the reference on one device, as train.py's second stage has them."""

    def __init__(self, cfg: ModelConfig, params: Any, reference: Any, *, dtype: str, remat: str):
        self.cfg, self.dtype, self.reference = cfg, dtype, reference
        spec, mesh, self.parts = param_spec(cfg), single_device(), trained_parts(OPTIMIZER)
        optimizer = make_optimizer(OPTIMIZER, 1000, spec)
        layout = abstract_state(optimizer, self.parts, spec, param_shardings(spec, mesh), mesh)
        self.state = init_state(params, optimizer, self.parts, layout)
        self._update = make_update(optimizer, layout)
        self._loss = partial(step_grpo_loss, cfg=cfg, objective=OBJECTIVE, remat=remat)
        scored = {"temperature": TEMPERATURE, "forbidden": cfg.vision_ids}
        self.logprobs = jax.jit(
            lambda params, prompts, tokens: answer_logprobs(params, cfg, prompts, tokens, **scored)[0]
        )

    def micro_batches(self, questions, tokens_BGT, micro: int, multiple: int = PAD_MULTIPLE) -> list[TrainBatch]:
        """The step's questions and answers, `micro` questions at a time, on the device."""
        weights = answer_weights(np.ones(tokens_BGT.shape, bool), answers=tokens_BGT.shape[0] * tokens_BGT.shape[1])
        return [
            TrainBatch(
                collate(questions[i : i + micro], multiple),
                *(put_batch(a[i : i + micro], single_device()) for a in (tokens_BGT, weights)),
            )
            for i in range(0, len(questions), micro)
        ]

    def with_advantages(self, batches: list[TrainBatch], advantages_BG: np.ndarray) -> list[TrainBatch]:
        parts = np.split(advantages_BG[..., None], len(batches))
        spread = [np.broadcast_to(a, b.tokens_BGT.shape) for a, b in zip(parts, batches, strict=True)]
        return [b.replace(advantage_BGT=put_batch(a, single_device())) for a, b in zip(spread, batches, strict=True)]

    def with_reference(self, batches: list[TrainBatch]) -> list[TrainBatch]:
        return [b.replace(ref_logprobs_BGT=self.logprobs(self.reference, b.prompts, b.tokens_BGT)) for b in batches]

    def update(self, batches: list[TrainBatch]) -> dict[str, float]:
        """Gradient of policy and update, from batches that have advantages and reference."""
        self.state, metrics = gradient_step(
            self.state, batches, update=self._update, loss_fn=self._loss, parts=self.parts, dtype=self.dtype,
            summed=len(batches) > 1,
        )  # fmt: skip
        return jax.device_get(jax.block_until_ready((self.state, metrics))[1])

    def step(self, batches: list[TrainBatch]) -> dict[str, float]:
        """Reference, gradient and update."""
        return self.update(self.with_reference(batches))

    def rollout_weights(self) -> Any:
        """The policy as it stands, for `answer`."""
        return rollout_weights(self.state.params, self.cfg, self.dtype)


@partial(jax.jit, static_argnames="cfg")
def head_gradient(cfg: ModelConfig, hidden_BGTD, head_VD, tokens_BGT, values: dict[str, jax.Array]):
    """The StepGRPO loss of hidden states, and its gradients to them and to the head."""
    token_loss = partial(policy_loss, objective=OBJECTIVE, backend=cfg.kernels)

    def loss(hidden_BGTD, head_VD):
        return head_loss(
            token_loss, hidden_BGTD, head_VD, tokens_BGT, values, TEMPERATURE, cfg.vision_ids, cfg.logit_rows
        )

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden_BGTD, head_VD)


@partial(jax.jit, static_argnames=("steps", "backend"))
def decode_layers(q_BKGEH, caches, prefix_length_B, own_length_BG, steps: int, backend: str) -> jax.Array:
    """Attention of `steps` tokens: layer after layer, each with caches (prompt k, v, answers' k, v) of its own."""

    def one(_, q_BKGEH):
        for prefix_k, prefix_v, own_k, own_v in caches:
            q_BKGEH = prefix_decode_attention(
                q_BKGEH, prefix_k, prefix_v, prefix_length_B, own_k, own_v, own_length_BG, backend=backend
            )
        return q_BKGEH

    return jax.lax.fori_loop(0, steps, one, q_BKGEH)


# FLOPs.


def _weights(cfg: ModelConfig) -> tuple[int, int, int]:
    """Multiplications that a text token, the head on a token, and a patch take; attention between tokens apart."""
    D, F, H = cfg.width, cfg.mlp, cfg.head_dim
    layer = D * H * (2 * cfg.heads + 2 * cfg.kv_heads) + 3 * D * F
    W, merged = cfg.vision.width, cfg.vision.width * cfg.vision.merge_size**2
    merger = (merged * merged + merged * D) // cfg.vision.merge_size**2
    patch = cfg.vision.patch_dim * W + cfg.vision.layers * (4 * W * W + 2 * W * cfg.vision.mlp) + merger
    return cfg.layers * layer, D * cfg.vocab, patch


def group_flops(size: Size, *, shared: bool = True) -> float:
    """FLOPs of one forward pass over a question and the `size.group` answers to it.

    2 FLOPs a multiplication; a query counts the keys that causality lets it see, a patch those of its frame. The head
    runs on answer tokens only. The prompt counts once a group where it is `shared`, else once an answer.
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
    """Forward and backward of the policy (3), forward of the reference (1); without what remat computes again."""
    return 4 * groups * group_flops(size)


def rollout_flops(size: Size, groups: int) -> float:
    """As many as one forward pass over what was sampled."""
    return groups * group_flops(size)


# Timing.


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the first call, which compiles, and of the others."""

    first: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def compile(self) -> float:
        """What the first call took longer."""
        return max(0.0, self.first - self.median)

    def as_json(self) -> dict[str, Any]:
        names = {"seconds": self.median, "min": min(self.seconds), "max": max(self.seconds)}
        return names | {"repeats": len(self.seconds), "compile_s": self.compile}


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int, pause: float = 0.0) -> dict[str, Timing]:
    """Each call once to warm up, then all in turn, `repeats` times, `pause` seconds apart."""
    first = {name: timed(call) for name, call in calls.items()}
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(pause)
            seconds[name].append(timed(call))
    return {name: Timing(first[name], tuple(seconds[name])) for name in calls}


def measure(call: Callable[[], Any], repeats: int, until: float = math.inf) -> Timing:
    """The first call apart, then up to `repeats` more, as long as another one ends before `until` (time.monotonic)."""
    first, seconds = timed(call), []
    while not seconds or (len(seconds) < repeats and time.monotonic() + seconds[-1] < until):
        seconds.append(timed(call))
    return Timing(first, tuple(seconds))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text; the first row and column are headings."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
