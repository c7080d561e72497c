"""Calls cuDNN's fused attention on NVIDIA GPUs, in bfloat16, with the logsumexp of each query and a backward pass.

jax.nn.dot_product_attention rounds the logsumexp to bfloat16 and ignores its gradient. This module binds the primitives
below it, which are private to jax; their signature is the same in jax 0.10.2 and 0.11.2. No other module imports from
jax._src.

If the keys of a softmax are divided into parts, the parts' results merge by their logsumexps:

    lse = log sum_i e^lse_i      out = sum_i e^(lse_i - lse) out_i

and the backward pass of each part is exact if it is given the merged lse and out, because a part's probabilities are
e^(score - lse), and the gradient of a score is p (d_out . v - d_out . out) (FlashAttention-2: Dao 2023, section 3.1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

HAS_BIAS, NO_BIAS = (True, False), (False, False)  # (a bias is given, its gradient is wanted)


class Part(NamedTuple):
    """Keys, values and mask of a softmax, or of a part of it.

    Attributes:
      k_BSKH, v_BSKH: keys and values; query head n reads kv head n // (N / K).
      length_B: the number of keys that are seen; None: all.
      bias: (B, 1, T, S), added to the scores; T and S are even. None: no bias.
      causal: query t sees the keys up to t.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    length_B: jax.Array | None = None
    bias: jax.Array | None = None
    causal: bool = False


def forward(q_BTNH: jax.Array, part: Part) -> tuple[jax.Array, jax.Array]:
    """Returns (out (B, T, N, H), fp32 logsumexp (B, N, T))."""
    fused = _primitives()
    arrays, options = _arguments(q_BTNH, part)
    out, lse_BNT = fused._dot_product_attention_fwd_p_wrapper.bind(*arrays, is_training=True, **options)
    return out, lse_BNT


def backward(
    q_BTNH: jax.Array, part: Part, lse_BNT: jax.Array, out_BTNH: jax.Array, d_out_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of (q, k, v), from the lse and the output of the whole softmax."""
    fused = _primitives()
    arrays, options = _arguments(q_BTNH, part)
    grads = fused._dot_product_attention_bwd_p_wrapper.bind(*arrays, lse_BNT, out_BTNH, d_out_BTNH, **options)
    return tuple(grads)[:3]


def _primitives() -> Any:
    """Imports them where they are used, so that other machines do not depend on a private module."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _arguments(q_BTNH: jax.Array, part: Part) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Returns the arguments that both primitives share."""
    fused = _primitives()
    unused = jnp.zeros(0, q_BTNH.dtype)
    padded, lengths = part.length_B is not None, (unused, unused)
    mask_type = {
        (False, False): fused.MaskType.NO_MASK,
        (False, True): fused.MaskType.CAUSAL,
        (True, False): fused.MaskType.PADDING,
        (True, True): fused.MaskType.PADDING_CAUSAL,
    }[padded, part.causal]
    if part.length_B is not None:
        lengths = jnp.full(q_BTNH.shape[:1], q_BTNH.shape[1], jnp.int32), part.length_B.astype(jnp.int32)
    bias = unused if part.bias is None else part.bias
    options = {
        "scale": q_BTNH.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": NO_BIAS if part.bias is None else HAS_BIAS,
        "mask_type": mask_type,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    return (q_BTNH, part.k_BSKH, part.v_BSKH, bias, *lengths, unused, unused, unused, unused), options
