"""Defines the policy loss and decode attention in plain jax.numpy. The Pallas kernels compute the same values.

    KL_t   = exp(d_t) - d_t - 1, d_t = min(ref_t - lp_t, 20)                         (k3, Schulman)
    s_t    = rho_t * A_t, rho_t = exp(lp_t - stop_gradient(lp_t)); with log-probabilities kept from sampling
             min(rho_t * A_t, clip(rho_t) * A_t), rho_t = exp(lp_t - old_t)          (PPO)
    loss_t = -(s_t - beta * KL_t)                                                    (R1-VL, 2503.12937, equation 5)

The modules `kl_policy_loss` and `prefix_decode_attention` document the arguments; their backend "reference" calls the
functions of this module.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

K3_CUT = 20.0  # a policy that gives a token e^-20 of the reference's probability has nothing more to learn from it
LOW = -1e30  # the score of a masked key: finite, because the difference of two infinities is not a number


def k3(ref: jax.Array, logprobs: jax.Array) -> jax.Array:
    """Returns Schulman's k3 estimate of KL(policy || reference), which is never negative.

    The exponent is cut at K3_CUT, where exp is 4.9e8 and one token would decide the whole gradient: beyond it the
    estimate is constant and has no gradient.
    """
    log_ratio = jnp.minimum(ref - logprobs, K3_CUT)
    return jnp.exp(log_ratio) - log_ratio - 1


def policy_terms(
    logprobs: jax.Array,
    ref: jax.Array,
    advantage: jax.Array,
    old: jax.Array | None = None,
    *,
    beta: float,
    clip: tuple[float, float] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (loss_t, KL_t) of each token, from fp32 arrays of one shape.

    Args:
      old: log-probabilities under the policy that sampled the tokens; None: the current policy did, so rho = 1.
      clip: (low, high): rho is clipped to [1 - low, 1 + high] if that makes the surrogate smaller.
    """
    ratio = jnp.exp(logprobs - (jax.lax.stop_gradient(logprobs) if old is None else old))
    surrogate = ratio * advantage
    if clip is not None:
        low, high = clip
        surrogate = jnp.minimum(surrogate, jnp.clip(ratio, 1 - low, 1 + high) * advantage)
    kl = k3(ref, logprobs)
    return beta * kl - surrogate, kl


def policy_sums(
    arrays: dict[str, jax.Array], mask_RT: jax.Array, *, beta: float, clip: tuple[float, float] | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (loss_R, kl_R, entropy_R): sums over the tokens of each answer that mask_RT selects.

    Values outside mask_RT are replaced by 0 before exp: if they were not finite, the gradient of exp would be NaN even
    where the mask is False. A token whose values are all 0 adds 0 to each sum.

    Args:
      arrays: (R, T) each: logprobs, ref, advantage, and optionally old and entropy.
    """
    real = {name: jnp.where(mask_RT, array, 0).astype(jnp.float32) for name, array in arrays.items()}
    entropy_RT = real.pop("entropy", jnp.zeros(mask_RT.shape, jnp.float32))
    fixed = {name: jax.lax.stop_gradient(array) for name, array in real.items() if name != "logprobs"}
    loss_RT, kl_RT = policy_terms(real["logprobs"], **fixed, beta=beta, clip=clip)
    return jnp.sum(loss_RT, axis=1), jnp.sum(kl_RT, axis=1), jnp.sum(entropy_RT, axis=1)


def attention(
    q_RKEH: jax.Array,
    prefix_BK2SH: jax.Array,
    prefix_length_R: jax.Array,
    own_RK2SH: jax.Array,
    own_length_R: jax.Array,
    question_R: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(H)) v over the keys of both caches, each up to its length: (R, K, E, H).

    Args:
      question_R: the index in B of each row's prompt; None: row r reads prompt r, so that no prompt is copied.
    """
    prefix_RK2SH = prefix_BK2SH if question_R is None else prefix_BK2SH[question_R]
    f32 = {"preferred_element_type": jnp.float32}

    def scores(cache_RK2SH: jax.Array, length_R: jax.Array) -> jax.Array:
        seen_RS = jnp.arange(cache_RK2SH.shape[3]) < length_R[:, None]
        scores_RKES = jnp.einsum("RKEH,RKSH->RKES", q_RKEH, cache_RK2SH[:, :, 0], **f32) * q_RKEH.shape[-1] ** -0.5
        return jnp.where(seen_RS[:, None, None], scores_RKES, LOW)

    prefix, own = scores(prefix_RK2SH, prefix_length_R), scores(own_RK2SH, own_length_R)
    top = jax.lax.stop_gradient(jnp.maximum(prefix.max(-1, keepdims=True), own.max(-1, keepdims=True)))
    prefix, own = jnp.exp(prefix - top), jnp.exp(own - top)
    total = prefix.sum(-1, keepdims=True) + own.sum(-1, keepdims=True)
    out = sum(
        jnp.einsum("RKES,RKSH->RKEH", weights.astype(cache.dtype), cache[:, :, 1], **f32)
        for weights, cache in ((prefix, prefix_RK2SH), (own, own_RK2SH))
    )
    return (out / total).astype(q_RKEH.dtype)
