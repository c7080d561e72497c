"""Builds the programs of a StepGRPO step on random weights, on one device, by r1vl_jax.training.programs.

To run a step, build the programs by `step_programs` and a state by `programs.init(masters)`, sample by `answer`, then

    batches = with_reference(programs, reference, micro_batches(questions, tokens_BGT, micro))
    state, metrics = update(programs, state, with_advantages(batches, advantages_BG))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from bench_common import PAD_MULTIPLE, Size, collate, single_device
from jax.sharding import Mesh
from r1vl_kernels.prefix_decode_attention import prefix_decode_attention

from r1vl_jax.config import Config, DataSection, ModelSection, SourceSection
from r1vl_jax.config_stages import OptimizerSection, RLSection, SFTSection
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.head import head_loss
from r1vl_jax.parallel.sharding import put_batch
from r1vl_jax.planning.calls import Call, Rows, stage_calls
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.step_grpo.loss import Objective, answer_weights, policy_loss
from r1vl_jax.training.programs import Programs, build_programs, gradient_step
from r1vl_jax.types import EncodedPrompt, Prompts, Rollout, Sampling, TrainBatch, TrainState

TEMPERATURE, BETA = 1.2, 0.04
OPTIMIZER = OptimizerSection(learning_rate=1e-6, schedule="constant", warmup_ratio=0.0)
UPDATES = 1000


def step_config(size: Size, remat: str, stage: str = "step_grpo") -> Config:
    """Returns a configuration of a stage; the files that it names are never read."""
    source = SourceSection(path="random")
    return Config(
        stages=(stage,),
        model=ModelSection(path="random", dtype=size.dtype, remat=remat),
        data=DataSection(sft=source, rl=source),
        sft=SFTSection(optimizer=dataclasses.replace(OPTIMIZER, freeze_vision=True)),
        rl=RLSection(temperature=TEMPERATURE, beta=BETA, max_new_tokens=max(2, size.new), optimizer=OPTIMIZER),
    )


def step_programs(
    size: Size, cfg: ModelConfig, *, remat: str, mesh: Mesh | None = None, stage: str = "step_grpo"
) -> Programs:
    """The programs of a step; nothing is compiled yet. `mesh`: default: one device."""
    mesh = single_device() if mesh is None else mesh
    return build_programs(cfg, mesh, step_config(size, remat, stage), stage, UPDATES)


def step_calls(cfg: ModelConfig, size: Size, mesh: Mesh, *, questions: int, micro: int, remat: str) -> Iterator[Call]:
    """The programs of a StepGRPO step, in the order in which they run."""
    config = step_config(size, remat)
    sizes = {"questions_per_step": questions, "micro_batch_size": micro, "group_size": size.group}
    config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, **sizes))
    return stage_calls(cfg, config, mesh, "step_grpo", question_rows(size))


def sft_calls(cfg: ModelConfig, size: Size, mesh: Mesh, *, micro: int, remat: str) -> Iterator[Call]:
    """The programs of a warm-up step, on micro-batches of `micro` rows: a question and one answer each."""
    config = step_config(size, remat, "sft")
    sizes = {"batch_size": 2 * micro, "micro_batch_size": micro}
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, **sizes))
    return stage_calls(cfg, config, mesh, "sft", question_rows(size))


def question_rows(size: Size) -> Rows:
    return Rows(size.prompt, 1, math.prod(size.grid), size.new)


def answer(
    weights: Any, cfg: ModelConfig, prompts: Prompts, group: int, new: int, *, step: int = 0, **options: Any
) -> Rollout:
    """Samples `group` answers of exactly `new` tokens per question; the only stop token is one that is never drawn."""
    row_ids = np.arange(prompts.tokens_BT.shape[0], dtype=np.uint32)
    sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=new)
    stop_ids = (cfg.image_token_id,)
    return rollout(
        weights, cfg, prompts, row_ids, group=group, sampling=sampling, stop_ids=stop_ids, seed=0, step=step, **options
    )


def micro_batches(
    questions: Sequence[EncodedPrompt], tokens_BGT: np.ndarray, micro: int, multiple: int = PAD_MULTIPLE
) -> list[TrainBatch]:
    """Divides the step's questions and answers into micro-batches of `micro` questions, on the device."""
    B, G, _ = tokens_BGT.shape
    weights_BGT = answer_weights(np.ones(tokens_BGT.shape, bool), answers=B * G)
    return [
        TrainBatch(
            collate(questions[i : i + micro], multiple),
            *(put_batch(a[i : i + micro], single_device()) for a in (tokens_BGT, weights_BGT)),
        )
        for i in range(0, len(questions), micro)
    ]


def with_advantages(batches: Sequence[TrainBatch], advantages_BG: np.ndarray) -> list[TrainBatch]:
    """Returns the micro-batches with each answer's advantage on all its tokens."""
    parts = np.split(advantages_BG[..., None], len(batches))
    spread = [np.broadcast_to(a, b.tokens_BGT.shape) for a, b in zip(parts, batches, strict=True)]
    return [
        dataclasses.replace(b, advantage_BGT=put_batch(a, single_device()))
        for a, b in zip(spread, batches, strict=True)
    ]


def with_reference(programs: Programs, reference: Any, batches: Sequence[TrainBatch]) -> list[TrainBatch]:
    """Returns the micro-batches with the reference's log-probabilities."""
    score = partial(programs.token_logprobs, reference)
    return [dataclasses.replace(batch, ref_logprobs_BGT=score(batch.prompts, batch.tokens_BGT)) for batch in batches]


def update(programs: Programs, state: TrainState, batches: Sequence[TrainBatch]) -> tuple[TrainState, dict[str, float]]:
    """One update of the policy, waited for: (state, metrics). The old state is donated."""
    state, metrics = jax.block_until_ready(gradient_step(programs, state, batches, use_buffer=len(batches) > 1))
    return state, jax.device_get(metrics)


@partial(jax.jit, static_argnames="cfg")
def head_gradient(
    cfg: ModelConfig, hidden_BGTD: jax.Array, head_VD: jax.Array, tokens_BGT: jax.Array, values: dict[str, jax.Array]
) -> Any:
    """Returns the StepGRPO loss of hidden states, and its gradients with respect to the hidden states and the head."""
    token_loss = partial(policy_loss, objective=Objective(TEMPERATURE, BETA), backend=cfg.kernels)

    def loss(hidden_BGTD, head_VD):
        return head_loss(
            token_loss, hidden_BGTD, head_VD, tokens_BGT, values, TEMPERATURE, cfg.vision_ids, cfg.logit_rows
        )

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden_BGTD, head_VD)


@partial(jax.jit, static_argnames=("steps", "backend"))
def decode_layers(q_RKEH: jax.Array, caches: Any, scalars: Any, steps: int, backend: str) -> jax.Array:
    """Runs decode attention for `steps` tokens, layer after layer.

    Args:
      caches: for each layer its own (prompts, answers).
      scalars: (prefix_length_R, own_length_R, question_R).
    """
    prefix_length_R, own_length_R, question_R = scalars

    def one(_, q_RKEH):
        for prompts, answers in caches:
            q_RKEH = prefix_decode_attention(
                q_RKEH, prompts, prefix_length_R, answers, own_length_R, question_R, backend=backend
            )
        return q_RKEH

    return jax.lax.fori_loop(0, steps, one, q_RKEH)
