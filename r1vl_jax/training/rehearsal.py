"""Runs each stage once on its largest planned batch before the first step of all, on weights that are zeros.

So a lack of memory shows in the first minutes, not hours later when the longest questions come. The programs are those
of the steps, which read them from the compilation cache afterwards. Nothing of a rehearsal is kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1vl_jax.data.batching import blank_prompts
from r1vl_jax.data.buckets import Shape
from r1vl_jax.parallel.memory import memory_limit, out_of_memory
from r1vl_jax.training.context import Run
from r1vl_jax.training.programs import Programs, build_programs, gradient_step, needs_buffer
from r1vl_jax.training.sft import SFTPlan
from r1vl_jax.training.step_grpo import StepGRPOPlan, sampling
from r1vl_jax.types import TrainBatch


def rehearse(run: Run, plans: Mapping[str, Any]) -> None:
    """Runs the largest planned batch of each stage, if the configuration or the platform asks for it.

    Raises: DeviceMemoryError if a device has too little memory.
    """
    mode, device = run.config.rehearsal, run.model.mesh.devices.flat[0]
    if mode == "never" or (mode == "auto" and device.platform == "cpu"):
        return
    for name, plan in plans.items():
        started = time.perf_counter()
        with out_of_memory(f"rehearsal of {name}, on the largest batch of {plan.buckets.shapes[-1]}", _advice(name)):
            programs = build_programs(run.model.config, run.model.mesh, run.config, name, plan.updates)
            {"sft": _sft, "step_grpo": _step_grpo}[name](run, plan, programs)
        limit, peak = memory_limit(device), (device.memory_stats() or {}).get("peak_bytes_in_use")
        memory = f", peak {peak / 1e9:.1f} of {limit / 1e9:.1f} GB" if peak and limit else ""
        run.log.say(f"rehearsal of {name}: the largest batch ran in {time.perf_counter() - started:.0f} s{memory}")


# Stage -> what needs less memory and may change in a run that is resumed.
LATER = {
    "sft": "try model.remat full, or more devices in mesh.fsdp",
    "step_grpo": "try model.remat full, rl.reference host, or more devices in mesh.fsdp",
}


def _advice(stage: str) -> str:
    """Returns what needs less memory in a stage."""
    section = {"sft": "sft", "step_grpo": "rl"}[stage]
    return f"{LATER[stage]}; or a smaller {section}.micro_batch_size, {section}.max_pixels or data.max_prompt_tokens"


def _zeros(layout: Any, dtype: str | None = None) -> Any:
    """Returns arrays of zeros with these shapes and shardings, and another dtype if it is given."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, dtype or a.dtype, device=a.sharding), layout)


def _update(run: Run, programs: Programs, state: Any, batch: TrainBatch, micro_batches: int) -> None:
    use_buffer = needs_buffer(micro_batches, run.model.mesh)
    batches = [run.put(batch)] * min(2, micro_batches)
    jax.block_until_ready(gradient_step(programs, state, batches, use_buffer=use_buffer))


def _sft(run: Run, plan: SFTPlan, programs: Programs) -> None:
    """One update from micro-batches of the largest shape."""
    section, shape, state = run.config.sft, plan.buckets.shapes[-1], _zeros(programs.layout)
    rows, answer = section.micro_batch_size, (section.micro_batch_size, 1, shape.answer)
    batch = TrainBatch(
        _prompts(run, rows, shape), np.zeros(answer, np.int32), np.zeros(answer, np.float32),
        start_B=np.full(rows, shape.prompt - shape.answer, np.int32),
    )  # fmt: skip
    _update(run, programs, state, batch, section.batch_size // rows)


def _step_grpo(run: Run, plan: StepGRPOPlan, programs: Programs) -> None:
    """One rollout of full length, log-probabilities, and one update, on the largest shapes.

    As in a step, the reference is on the devices all the time, or for its log-probabilities alone, or never.
    """
    config, state, params = run.config.rl, _zeros(programs.layout), programs.layout.params
    reference = _zeros(params, run.config.model.dtype) if config.reference == "device" else None
    prompts = run.put(_prompts(run, config.questions_per_step, plan.rollout_buckets.shapes[-1]))
    weights = programs.rollout_weights(state.params)
    run.sample(weights, prompts, sampling(config), group=config.group_size, step=0)
    micro = _prompts(run, config.micro_batch_size, plan.buckets.shapes[-1])
    shape = config.micro_batch_size, config.group_size, config.max_new_tokens
    tokens_BGT, zeros_BGT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    if config.reference != "none":
        frozen = _zeros(params, run.config.model.dtype) if reference is None else reference
        programs.token_logprobs(frozen, *run.put((micro, tokens_BGT))).block_until_ready()
        del frozen
    del weights
    old_logprobs_BGT = None
    if config.updates_per_rollout > 1:
        programs.token_logprobs(state.params, *run.put((micro, tokens_BGT))).block_until_ready()
        old_logprobs_BGT = zeros_BGT
    batch = TrainBatch(micro, tokens_BGT, zeros_BGT, zeros_BGT, zeros_BGT, old_logprobs_BGT)
    _update(run, programs, state, batch, config.questions_per_step // config.micro_batch_size)
    del reference


def _prompts(run: Run, count: int, shape: Shape) -> Any:
    return blank_prompts(count, shape, run.model.config.vision.patch_dim)
