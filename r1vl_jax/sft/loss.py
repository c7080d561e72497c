"""The warm-up loss: cross-entropy on the answer and its closing tokens, not on the prompt (R1-VL, section 3.1).

L = -1/|tokens| sum_t log pi(c_t | Q, c_<t)     over the answer tokens of the whole update
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.qwen2_vl import answer_loss
from r1vl_jax.types import TrainBatch


def token_weights(mask_BGT: np.ndarray, tokens: int) -> np.ndarray:
    """Weight of each token: 1 / tokens, the number of answer tokens in the whole update."""
    return (mask_BGT / tokens).astype(np.float32)


def cross_entropy(logprobs, entropy, weight) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and metrics of some tokens; tokens of weight 0 do not count."""
    loss = -jnp.sum(weight * jnp.where(weight > 0, logprobs, 0.0))
    return loss, {"loss": loss, "entropy": jnp.sum(weight * entropy)}


def sft_loss(params, batch: TrainBatch, *, cfg: ModelConfig, remat: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of one micro-batch; over the micro-batches of an update they add up."""
    inputs = (batch.prompts, batch.tokens_BGT, batch.weight_BGT)
    return answer_loss(cross_entropy, params, cfg, *inputs, start_B=batch.start_B, remat=remat)
