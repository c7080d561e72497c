"""The equations of the policy loss and of decode attention in plain jax.numpy. The kernels compute the same.

    KL_t   = exp(ref_t - lp_t) - (ref_t - lp_t) - 1                                  (k3, Schulman)
    s_t    = rho_t * A_t, rho_t = exp(lp_t - stop_gradient(lp_t)); with log-probabilities kept from sampling
             min(rho_t * A_t, clip(rho_t) * A_t), rho_t = exp(lp_t - old_t)          (PPO)
    loss_t = -(s_t - beta * KL_t)                                                    (R1-VL, 2503.12937, equation 5)

`kl_policy_loss` and `prefix_decode_attention` say what the arguments are, and use them with backend "reference".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LOW = -1e30  # the score of a key that is not seen: finite, so that differences of two are


def k3(ref: jax.Array, logprobs: jax.Array) -> jax.Array:
    """Schulman's k3 estimator of KL(policy || reference), never negative."""
    return jnp.exp(ref - logprobs) - (ref - logprobs) - 1


def policy_terms(logprobs, ref, advantage, old=None, *, beta: float, clip: tuple[float, float] | None = None):
    """(loss_t, KL_t) of each token; arrays of one shape, fp32.

    Args:
      old: log-probabilities when the tokens were sampled; None: those of this very policy, so that rho = 1.
      clip: (low, high): rho is cut to [1 - low, 1 + high] where that makes the surrogate smaller.
    """
    ratio = jnp.exp(logprobs - (jax.lax.stop_gradient(logprobs) if old is None else old))
    surrogate = ratio * advantage
    if clip is not None:
        low, high = clip
        surrogate = jnp.minimum(surrogate, jnp.clip(ratio, 1 - low, 1 + high) * advantage)
    kl = k3(ref, logprobs)
    return beta * kl - surrogate, kl


def policy_sums(arrays: dict[str, jax.Array], mask_RT: jax.Array, *, beta: float, clip: tuple[float, float] | None):
    """(loss_R, kl_R, entropy_R): sums over each sequence's tokens. What stands outside mask_RT takes no part.

    It is replaced by 0 before exp, whose gradient it would poison where it is not finite; all terms of 0 are 0.

    Args:
      arrays: logprobs, ref, advantage, and old and entropy where there are any; (R, T) each.
    """
    real = {name: jnp.where(mask_RT, array, 0).astype(jnp.float32) for name, array in arrays.items()}
    entropy = real.pop("entropy", jnp.zeros(mask_RT.shape, jnp.float32))
    fixed = {name: jax.lax.stop_gradient(array) for name, array in real.items() if name != "logprobs"}
    loss, kl = policy_terms(real["logprobs"], **fixed, beta=beta, clip=clip)
    return tuple(jnp.sum(term, axis=1) for term in (loss, kl, entropy))


def attention(q_BKGEH, prefix_k_BKSH, prefix_v_BKSH, prefix_length_B, own_k_BKGSH, own_v_BKGSH, own_length_BG):
    """softmax(q k^T / sqrt(H)) v over the keys of both caches that lie before their lengths. Shape of q_BKGEH.

    Caches are used as they lie, in batched matmuls: the queries of a group are the rows of one.
    """
    B, K, G, R, H = q_BKGEH.shape
    f32 = {"preferred_element_type": jnp.float32}
    rows = q_BKGEH.reshape(B, K, G * R, H)
    prefix = jnp.einsum("BKQH,BKSH->BKQS", rows, prefix_k_BKSH, **f32).reshape(B, K, G, R, -1) * H**-0.5
    own = jnp.einsum("BKGRH,BKGSH->BKGRS", q_BKGEH, own_k_BKGSH, **f32) * H**-0.5
    prefix = jnp.where(jnp.arange(prefix.shape[-1]) < prefix_length_B[:, None, None, None, None], prefix, LOW)
    own = jnp.where(jnp.arange(own.shape[-1]) < own_length_BG[:, None, :, None, None], own, LOW)
    top = jax.lax.stop_gradient(jnp.maximum(prefix.max(-1, keepdims=True), own.max(-1, keepdims=True)))
    prefix, own = jnp.exp(prefix - top), jnp.exp(own - top)
    total = prefix.sum(-1, keepdims=True) + own.sum(-1, keepdims=True)
    dtype = prefix_v_BKSH.dtype
    weights = prefix.astype(dtype).reshape(B, K, G * R, -1)
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, prefix_v_BKSH, **f32).reshape(q_BKGEH.shape)
    out = out + jnp.einsum("BKGRS,BKGSH->BKGRH", own.astype(dtype), own_v_BKGSH, **f32)
    return (out / total).astype(q_BKGEH.dtype)
