"""Computes the StepGRPO objective of a batch (R1-VL, arXiv 2503.12937, equation 5), by r1vl_kernels.kl_policy_loss.

    L = mean_i [ 1/|c^i| sum_t -( exp(lp_t - stop_gradient(lp_t)) * A^i - beta * KL_t ) ]

The mean over answers and tokens is part of the batch's token weights, see `answer_weights`.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from r1vl_kernels.kl_policy_loss import PolicyLoss, kl_policy_loss
from r1vl_kernels.reference import sequence_weights

from r1vl_jax.model.answers import answer_loss
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.parallel.sharding import per_shard
from r1vl_jax.types import TrainBatch


@dataclasses.dataclass(frozen=True)
class Objective:
    """The parameters of the loss that training minimises. Hashable, because it is a static jit argument.

    Attributes:
      temperature: the sampling temperature; trained log-probabilities are computed at the same temperature.
      beta: the weight of the KL to the reference.
      clip: (low, high) of the probability ratio to the sampling policy (PPO); used if the batch has old_logprobs_BGT.
    """

    temperature: float
    beta: float
    clip: tuple[float, float] | None = None


def answer_weights(mask_BGT: np.ndarray, answers: int, average: str = "sequence") -> np.ndarray:
    """Returns the weight of each token. Weighted sums over all micro-batches of an update add up to the chosen average.

    Args:
      mask_BGT: True on answer tokens, the stop token included; T is the maximum length of an answer.
      answers: the number of answers in the whole update.
      average: sequence: the mean over answers of their token means (the paper, GRPO); token: the mean over all tokens
        (DAPO); constant: the mean over answers of their token sums / T (Dr. GRPO).
    """
    T = mask_BGT.shape[2]
    weight_R = sequence_weights(mask_BGT.reshape(-1, T), average, T, sequences=answers)
    return (mask_BGT * weight_R.reshape(*mask_BGT.shape[:2], 1)).astype(np.float32)


def policy_loss(
    logprobs: jax.Array, entropy: jax.Array, values: dict[str, jax.Array], *, objective: Objective, backend: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss of some tokens (B, G, t) and its metrics; tokens of weight 0 do not count.

    Args:
      values: (B, G, t) each: "ref", "advantage", "weight", and "old" if another policy sampled the tokens.
      backend: see r1vl_kernels.
    """
    arrays = {**values, "logprobs": logprobs, "entropy": entropy}
    low, high = objective.clip if objective.clip and "old" in values else (None, None)

    def sums(a: dict[str, jax.Array]) -> PolicyLoss:
        return kl_policy_loss(
            a["logprobs"], a["ref"], a["advantage"], a["weight"] > 0, weight_R=a["weight"].max(axis=1),
            old_RT=a.get("old"), entropy_RT=a["entropy"], beta=objective.beta, clip_low=low, clip_high=high,
            backend=backend,
        )  # fmt: skip

    rows = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), arrays)
    loss, kl, entropy = (jnp.sum(a) for a in per_shard(sums, (("batch", None),), ("batch",))(rows))
    return loss, {"loss": loss, "kl": kl, "entropy": entropy}


def step_grpo_loss(
    params: dict, batch: TrainBatch, *, cfg: ModelConfig, objective: Objective, remat: str, shared: bool = True
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss and the metrics of one micro-batch.

    The weights of the batch make them parts of a sum: the caller adds up those of all micro-batches of an update.

    Args:
      remat: what the backward pass recomputes, see model.layers.
      shared: run each prompt once for all its answers; False: once per answer.
    """
    values = {"ref": batch.ref_logprobs_BGT, "advantage": batch.advantage_BGT, "weight": batch.weight_BGT}
    if batch.old_logprobs_BGT is not None:
        values["old"] = batch.old_logprobs_BGT
    return answer_loss(
        partial(policy_loss, objective=objective, backend=cfg.kernels),
        params, cfg, batch.prompts, batch.tokens_BGT, values,
        temperature=objective.temperature, forbidden=cfg.vision_ids, shared=shared, remat=remat,
    )  # fmt: skip
