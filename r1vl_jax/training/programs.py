"""Builds every jitted program of a training step, once per stage.

Training runs the programs, benchmarks time them, and `r1vl_jax.plan` compiles them for machines that are not present.

    rollout_weights   fp32 parameters -> the rollout's fused weights              once per update
    prefill, decode   the main programs of `rollout.generate.rollout`             once per rollout, once per loop
    token_logprobs    parameters, prompts, answers -> log-probabilities           once per micro-batch
    advantages        rewards per step -> the advantage of each token             once per rollout
    accumulate        gradients += gradient of the loss of one micro-batch        once per micro-batch
    update            state, gradients, loss -> state                             once per update
    not_finite        state -> which of its arrays hold NaN or infinity           once per checkpoint
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from r1vl_kernels.step_group_advantage import step_group_advantage

from r1vl_jax.common.files import cache_folder
from r1vl_jax.config import Config
from r1vl_jax.model.answers import answer_logprobs
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.fused import fuse, fused_shardings
from r1vl_jax.model.qwen2_vl import cast
from r1vl_jax.model.spec import param_spec
from r1vl_jax.parallel.sharding import ROLLOUT_RULES, param_shardings, per_shard
from r1vl_jax.rollout.generate import decode, prefill
from r1vl_jax.sft.loss import sft_loss
from r1vl_jax.step_grpo.loss import Objective, step_grpo_loss
from r1vl_jax.training import optimizer as optimizers
from r1vl_jax.types import TrainBatch, TrainState

Program = Callable[..., Any]
COUNTED = tuple(f"jit({name})" for name in ("prefill", "decode", "compact", "token_logprobs", "accumulate", "update"))


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of a stage; each is compiled once for each shape of its arguments.

    Attributes:
      rollout_weights: (params) -> weights in the dtype of the computation, laid out for decoding.
      prefill, decode: the functions of rollout.generate; their static arguments are not bound.
      token_logprobs: (params, prompts, tokens_BGT) -> log-probabilities (B, G, T), fp32.
      advantages: (rewards_BGJ, mask_BGJ, step_BGT) -> advantages (B, G, T), fp32.
      accumulate: (grads, params, batch) -> (grads, metrics); grads None starts a sum.
      update: (state, grads, loss) -> (state, gradient norm); skipped if the loss or the norm is not finite.
      not_finite: (state) -> for each array, whether it holds a number that is not finite.
      layout: shapes, dtypes and shardings of the train state; nothing is allocated.
      parts: the names of the parameter subtrees that are trained.
      schedule: the learning rate of each update.
      init: (params) -> a fresh train state with these fp32 parameters.
    """

    rollout_weights: Program
    prefill: Program
    decode: Program
    token_logprobs: Program
    advantages: Program
    accumulate: Program
    update: Program
    not_finite: Program
    layout: TrainState
    parts: tuple[str, ...]
    schedule: optax.Schedule
    init: Callable[[Any], TrainState]


def build_programs(model: ModelConfig, mesh: Mesh, config: Config, stage: str, updates: int) -> Programs:
    """Builds the programs of a stage; nothing is compiled yet.

    Args:
      model: the model's config, with its backend set.
      stage: sft or step_grpo.
      updates: the number of updates of the whole stage, for the learning rate's schedule.
    """
    section = {"sft": config.sft, "step_grpo": config.rl}[stage].optimizer
    spec = param_spec(model)
    parts = optimizers.trained_parts(section)
    optimizer = optimizers.make_optimizer(section, updates, spec)
    layout = optimizers.abstract_state(optimizer, parts, spec, param_shardings(spec, mesh), mesh)
    loss = stage_loss(model, config, stage)
    accumulate = partial(optimizers.accumulate, loss_fn=loss, parts=parts, dtype=config.model.dtype)
    shardings = jax.tree.map(lambda shape: shape.sharding, layout)
    return Programs(
        rollout_weights=_rollout_weights(model, mesh, config.model.dtype, config.mesh.rollout_weights),
        prefill=prefill,
        decode=decode,
        token_logprobs=_token_logprobs(model, config.model.dtype, config.model.shared_prefix, config.rl.temperature),
        advantages=_advantages(config.rl.scale, config.rl.std_floor, model.kernels),
        accumulate=jax.jit(accumulate, donate_argnums=0),
        update=jax.jit(
            partial(optimizers.update, optimizer=optimizer),
            donate_argnums=0,
            out_shardings=(shardings, shardings.step),
        ),
        not_finite=jax.jit(optimizers.not_finite),
        layout=layout,
        parts=parts,
        schedule=optimizers.make_schedule(section, updates),
        init=partial(optimizers.init_state, optimizer=optimizer, parts=parts, layout=layout),
    )


def stage_loss(model: ModelConfig, config: Config, stage: str) -> Callable[[Any, TrainBatch], Any]:
    """Returns the loss function of a stage: (parameters, micro-batch) -> (loss, metrics)."""
    if stage == "sft":
        return partial(sft_loss, cfg=model, remat=config.model.remat)
    rl = config.rl
    objective = Objective(rl.temperature, rl.beta, clip=(rl.clip_low, rl.clip_high))
    shared = config.model.shared_prefix
    return partial(step_grpo_loss, cfg=model, objective=objective, remat=config.model.remat, shared=shared)


def _rollout_weights(model: ModelConfig, mesh: Mesh, dtype: str, rules: str) -> Program:
    shardings = fused_shardings(model, mesh, ROLLOUT_RULES[rules])

    def rollout_weights(params: Any) -> Any:
        return fuse(cast(params, dtype), model)

    return jax.jit(rollout_weights, out_shardings=shardings)


def _token_logprobs(model: ModelConfig, dtype: str, shared: bool, temperature: float) -> Program:
    def token_logprobs(params: Any, prompts: Any, tokens_BGT: jax.Array) -> jax.Array:
        options = {"temperature": temperature, "forbidden": model.vision_ids, "shared": shared}
        return answer_logprobs(cast(params, dtype), model, prompts, tokens_BGT, **options)[0]

    return jax.jit(token_logprobs)


def _advantages(scale: str, std_floor: float, kernels: str) -> Program:
    def advantages(rewards_BGJ: jax.Array, mask_BGJ: jax.Array, step_BGT: jax.Array) -> jax.Array:
        call = partial(step_group_advantage, scale=scale, std_floor=std_floor, backend=kernels)
        rows = ("batch", None, None)
        return per_shard(call, (rows,) * 3, rows)(rewards_BGJ, mask_BGJ, step_BGT)

    return jax.jit(advantages)


def needs_buffer(micro_batches: int, mesh: Mesh) -> bool:
    """Returns whether an update adds its gradients up in a buffer.

    On several devices it always does, because the buffer has the parameters' sharding.

    Args:
      micro_batches: the maximum number of micro-batches per update.
    """
    return micro_batches > 1 or mesh.size > 1


def gradient_step(
    programs: Programs, state: TrainState, batches: Iterable[TrainBatch], *, use_buffer: bool
) -> tuple[TrainState, dict[str, Any]]:
    """Runs one update from a step's micro-batches, all on the device.

    Args:
      state: is donated: its buffers are reused, so the caller must not use it again.
      use_buffer: add gradients up in a buffer. With False there must be one micro-batch; its gradient is used as it is.
    Returns:
      (state, metrics). Numbers are summed over the micro-batches; grad_norm is added; logprobs_BGT is a list with
      the log-probabilities of each micro-batch.
    """
    grads, totals, logprobs = optimizers.zero_grads(state.params, programs.parts) if use_buffer else None, {}, []
    for batch in batches:
        grads, metrics = programs.accumulate(grads, state.params, batch)
        logprobs.append(metrics.pop("logprobs_BGT"))
        totals = jax.tree.map(jnp.add, totals, metrics) if totals else metrics
    if not totals:
        raise ValueError("a step without micro-batches has nothing to update from; expected at least one")
    state, norm = programs.update(state, grads, totals["loss"])
    return state, {**totals, "grad_norm": norm, "logprobs_BGT": logprobs}


def enable_compilation_cache(folder: str) -> None:
    """Stores compiled programs in a folder, so that later runs reuse them. JAX's own settings take precedence.

    Args:
      folder: a path; auto: ~/.cache/r1vl_jax (or in XDG_CACHE_HOME); off: no cache.
    """
    if folder == "off" or jax.config.values["jax_compilation_cache_dir"]:
        return
    path = Path(folder).expanduser()
    if folder == "auto":
        path = cache_folder()
    jax.config.update("jax_compilation_cache_dir", str(path))


class Compilations:
    """A context manager that counts the programs of COUNTED that are compiled or read from the compilation cache."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *exc_info: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and about.get("fun_name") in COUNTED:
            self.count += 1
