"""The StepGRPO objective (R1-VL, arXiv 2503.12937, equation 5; k3 estimator of the KL).

    KL_t = exp(ref_t - lp_t) - (ref_t - lp_t) - 1
    L    = mean_i [ 1/|c^i| sum_t -( exp(lp_t - stop_gradient(lp_t)) * A^i - beta * KL_t ) ]

The mean over answers and tokens is in the batch's token weights: `answer_weights` gives 1 / (answers * |c^i|).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.qwen2_vl import answer_logprobs
from r1vl_jax.types import TrainBatch


def answer_weights(mask_BGT: np.ndarray, answers: int) -> np.ndarray:
    """Weight of each token: 1 / (answers * |c^i|), so that a weighted sum is the mean over answers of token means.

    Args:
      mask_BGT: True on answer tokens, the stop token included.
      answers: number of answers in the whole update, over all its micro-batches.
    """
    lengths = np.maximum(mask_BGT.sum(axis=-1, keepdims=True), 1)
    return (mask_BGT / (answers * lengths)).astype(np.float32)


def k3(ref: jax.Array, logprobs: jax.Array) -> jax.Array:
    """Schulman's k3 estimator of KL(policy || reference), never negative."""
    return jnp.exp(ref - logprobs) - (ref - logprobs) - 1


def policy_loss(logprobs, ref, advantage, weight, beta: float) -> tuple[jax.Array, jax.Array]:
    """The loss and the mean KL, from per-token values of equal shape; tokens of weight 0 do not count.

    Values behind an answer's end may be anything finite or not: they are replaced before exp, whose gradient they
    would otherwise poison.
    """
    real = weight > 0
    logprobs = jnp.where(real, logprobs, 0.0)
    kl = k3(jnp.where(real, ref, 0.0), logprobs)
    ratio = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
    loss = -(ratio * advantage - beta * kl)
    return jnp.sum(weight * loss), jnp.sum(weight * kl)


def step_grpo_loss(
    params,
    batch: TrainBatch,
    *,
    cfg: ModelConfig,
    temperature: float,
    beta: float,
    remat: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of one micro-batch; over the micro-batches of an update they add up."""
    logprobs, entropy = answer_logprobs(
        params,
        cfg,
        batch.prompts,
        batch.tokens_BGT,
        temperature=temperature,
        forbidden=cfg.vision_ids,
        remat=remat,
    )
    loss, kl = policy_loss(logprobs, batch.ref_logprobs_BGT, batch.advantage_BGT, batch.weight_BGT, beta)
    return loss, {"loss": loss, "kl": kl, "entropy": jnp.sum(batch.weight_BGT * entropy)}
