"""The StepGRPO objective (R1-VL, arXiv 2503.12937, equation 5) on a batch; its equation is r1vl_kernels.kl_policy_loss.

    L = mean_i [ 1/|c^i| sum_t -( exp(lp_t - stop_gradient(lp_t)) * A^i - beta * KL_t ) ]

The mean over answers and tokens is in the batch's token weights, see `answer_weights`.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from r1vl_kernels.kl_policy_loss import PolicyLoss, kl_policy_loss
from r1vl_kernels.reference import sequence_weights

from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.qwen2_vl import answer_loss
from r1vl_jax.parallel.sharding import per_shard
from r1vl_jax.types import TrainBatch


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised. Hashable: a static argument.

    Attributes:
      temperature: the sampling temperature, also that of the trained log-probability.
      beta: weight of the KL to the reference.
      clip: (low, high) of the probability ratio to the sampling policy (PPO); used where the batch has its logprobs.
    """

    temperature: float
    beta: float
    clip: tuple[float, float] | None = None


def answer_weights(mask_BGT: np.ndarray, answers: int, average: str = "sequence") -> np.ndarray:
    """Weight of each token, so that weighted sums over all micro-batches of an update are the average that is meant.

    Args:
      mask_BGT: True on answer tokens, the stop token included; T is the longest that an answer may be.
      answers: number of answers in the whole update.
      average: sequence: the mean over answers of their token means (the paper, GRPO); token: the mean over all tokens
        (DAPO); constant: sums over T, by answer, and their mean (Dr. GRPO).
    """
    T = mask_BGT.shape[2]
    weight_R = sequence_weights(mask_BGT.reshape(-1, T), average, T, sequences=answers)
    return (mask_BGT * weight_R.reshape(*mask_BGT.shape[:2], 1)).astype(np.float32)


def policy_loss(logprobs, entropy, values, *, objective: Objective, backend: str):
    """The loss of some tokens (B, G, t) and its metrics; tokens of weight 0 do not count.

    Args:
      values: {"ref", "advantage", "weight"} and, where the policy is no longer the one that sampled, "old": (B, G, t).
      backend: see r1vl_kernels.
    """
    arrays = {**values, "logprobs": logprobs, "entropy": entropy}
    low, high = objective.clip if objective.clip and "old" in values else (None, None)

    def sums(a):
        return kl_policy_loss(
            a["logprobs"], a["ref"], a["advantage"], a["weight"] > 0, weight_R=a["weight"].max(axis=1),
            old_RT=a.get("old"), entropy_RT=a["entropy"], beta=objective.beta, clip_low=low, clip_high=high,
            backend=backend,
        )  # fmt: skip

    axes = dict.fromkeys(arrays, ("batch", None))
    rows = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), arrays)
    loss, kl, entropy = (jnp.sum(a) for a in per_shard(sums, (axes,), PolicyLoss(*[("batch",)] * 3))(rows))
    return loss, {"loss": loss, "kl": kl, "entropy": entropy}


def step_grpo_loss(
    params, batch: TrainBatch, *, cfg: ModelConfig, objective: Objective, remat: str, shared: bool = True
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of one micro-batch; over the micro-batches of an update they add up."""
    values = {"ref": batch.ref_logprobs_BGT, "advantage": batch.advantage_BGT, "weight": batch.weight_BGT}
    if batch.old_logprobs_BGT is not None:
        values["old"] = batch.old_logprobs_BGT
    return answer_loss(
        partial(policy_loss, objective=objective, backend=cfg.kernels),
        params, cfg, batch.prompts, batch.tokens_BGT, values,
        temperature=objective.temperature, forbidden=cfg.vision_ids, shared=shared, remat=remat,
    )  # fmt: skip
