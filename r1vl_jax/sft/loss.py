"""Computes the warm-up loss: cross-entropy on the answer tokens (R1-VL, section 3.1).

L = -1/|tokens| sum_t log pi(c_t | Q, c_<t)     over the answer tokens of the whole update

The closing tokens ("<|im_end|>" and a newline) count as answer tokens. Prompt tokens do not count.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from r1vl_jax.model.answers import answer_loss
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.types import TrainBatch


def token_weights(mask_BGT: np.ndarray, tokens: int) -> np.ndarray:
    """Returns the weight of each token: 1 / tokens on answer tokens, 0 elsewhere.

    Args:
      mask_BGT: True on answer tokens, closing tokens included.
      tokens: the number of answer tokens in the whole update, closing tokens included.
    """
    return (mask_BGT / tokens).astype(np.float32)


def cross_entropy(logprobs: jax.Array, entropy: jax.Array, weight: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss and metrics of some tokens; tokens of weight 0 do not count."""
    loss = -jnp.sum(weight * jnp.where(weight > 0, logprobs, 0.0))
    return loss, {"loss": loss, "entropy": jnp.sum(weight * entropy)}


def sft_loss(
    params: dict, batch: TrainBatch, *, cfg: ModelConfig, remat: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns loss and metrics of one micro-batch; those of all micro-batches of an update are added."""
    inputs = (batch.prompts, batch.tokens_BGT, batch.weight_BGT)
    return answer_loss(cross_entropy, params, cfg, *inputs, start_B=batch.start_B, remat=remat)
