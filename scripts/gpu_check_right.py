"""Runs stage `right` of gpu_check.py: compares kernels, attention, loss head and sampler with exact fp32 results.

Both sides run on the same device with the same inputs, rounded to the dtype under test; the exact side computes in fp32
at highest precision. A row contains the distance ||a - b|| / ||b|| of the worst array, for the values and for the
gradients that training needs, and whether a second call returns bitwise equal gradients. With --cpu the kernels run in
interpret mode and all attention is `xla`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_check_common import run_check, stage_arguments
from r1vl_kernels.kl_policy_loss import kl_policy_loss
from r1vl_kernels.prefix_decode_attention import prefix_decode_attention
from r1vl_kernels.step_group_advantage import step_group_advantage

from r1vl_jax.model.attention import attend_frames, attend_prompt, attend_shared
from r1vl_jax.model.head import head_loss, token_logprobs
from r1vl_jax.rollout.sampling import sample
from r1vl_jax.types import Sampling

LIMITS = {"bfloat16": 1e-2, "float32": 1e-5}  # limits on the relative distance, per dtype of the inputs
SAME_TOKENS = 0.95  # share of sampled tokens that must agree
LOGPROB_LIMIT = 1e-4  # limit on the difference between log-probabilities of one token
NOT_FINITE = 9.0  # the distance of a result that holds NaN or infinity

Checks = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """kernels, attention: the backends under test; small: use sizes for a CPU; rng: the generator of all inputs."""

    kernels: str
    attention: str
    small: bool
    rng: np.random.Generator = dataclasses.field(default_factory=lambda: np.random.default_rng(0))

    def draw(self, *shape: int, dtype: str = "bfloat16") -> jax.Array:
        return jnp.asarray(self.rng.normal(size=shape), dtype)

    def integers(self, low: int, high: int, shape: int | tuple[int, ...]) -> jax.Array:
        """Returns random integers from `low` to `high`, both included."""
        return jnp.asarray(self.rng.integers(low, high + 1, shape), jnp.int32)


def distance(result: Any, expected: Any) -> float:
    """Returns ||result - expected|| / ||expected||: the largest value over the arrays of the trees."""

    def one(a: jax.Array, b: jax.Array) -> float:
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if not np.isfinite(x).all():
            return NOT_FINITE
        return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(one, result, expected)))


def in_fp32(arrays: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, arrays)


def compare(
    setup: Setup, call: Callable[..., Any], exact: Callable[..., Any], arrays: Sequence[jax.Array],
    gradients: tuple[int, ...] = (), dtype: str = "bfloat16",
) -> dict[str, Any]:  # fmt: skip
    """Compares call(*arrays) with exact(*arrays) in fp32.

    Args:
      gradients: the arguments whose gradients are compared too, for a random weighted sum of the results.
    """
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(exact)(*in_fp32(arrays))
    row: dict[str, Any] = {"value_distance": distance(jax.jit(call)(*arrays), expected)}
    if gradients:
        weights = jax.tree.map(lambda a: setup.draw(*a.shape, dtype="float32"), expected)

        def total(function: Callable[..., Any], *arrays: jax.Array) -> jax.Array:
            parts = jax.tree.map(lambda a, w: jnp.vdot(a.astype(jnp.float32), w), function(*arrays), weights)
            return jnp.sum(jnp.stack(jax.tree.leaves(parts)))

        with jax.default_matmul_precision("highest"):
            expected = jax.jit(jax.grad(partial(total, exact), argnums=gradients))(*in_fp32(arrays))
        gradient = jax.jit(jax.grad(partial(total, call), argnums=gradients))
        first, second = gradient(*arrays), gradient(*arrays)
        row["gradient_distance"] = distance(first, expected)
        row["gradient_repeats"] = all(bool((a == b).all()) for a, b in zip(first, second, strict=True))
    worst = max(row["value_distance"], row.get("gradient_distance", 0.0))
    return row | {"limit": LIMITS[dtype], "ok": worst < LIMITS[dtype]}


# Kernels.


def decode_checks(setup: Setup) -> Checks:
    """Yields checks of (B, K, query heads per kv head, prompt tokens, answer tokens, dtype): of the 2B, then the 7B."""
    shapes = [
        (64, 2, 6, 768, 1024, "bfloat16"),
        (1, 2, 6, 700, 1000, "bfloat16"),
        (4, 4, 7, 768, 256, "bfloat16"),
        (2, 2, 6, 130, 96, "float32"),
        (2, 8, 8, 64, 16, "bfloat16"),
    ]
    for shape in [(2, 2, 6, 40, 24, "bfloat16"), (1, 2, 2, 40, 24, "float32")] if setup.small else shapes:
        B, K, E, prompt, own, dtype = shape
        name = f"decode attention {B} x 4, {K} x {E} heads, {prompt} + {own} keys, {dtype}"
        yield name, partial(decode_attention, setup, *shape)


def decode_attention(setup: Setup, B: int, K: int, E: int, prompt: int, own: int, dtype: str) -> dict[str, Any]:
    R, H = 4 * B, 128
    caches = [setup.draw(*shape, H, dtype=dtype) for shape in ((B, K, 2, prompt), (R, K, 2, own))]
    question = jnp.repeat(jnp.arange(B), 4)
    lengths = setup.integers(1, prompt, B)[question], setup.integers(0, own, R)
    call, exact = (partial(prefix_decode_attention, backend=backend) for backend in (setup.kernels, "reference"))
    arrays = (setup.draw(R, K, E, H, dtype=dtype), caches[0], lengths[0], caches[1], lengths[1], question)
    return compare(setup, call, exact, arrays, dtype=dtype)


def loss_checks(setup: Setup) -> Checks:
    for length, clip in ((1024, None), (200, 0.2)):
        yield f"policy loss, {length} tokens, clip {clip}", partial(policy_loss, setup, length, clip)


def policy_loss(setup: Setup, length: int, clip: float | None) -> dict[str, Any]:
    mask_RT = jnp.arange(length) < setup.integers(0, length, (16, 1))

    def loss(backend: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        logprobs, ref, advantage, entropy, old = arrays
        more = {"old_RT": old, "clip_low": clip, "clip_high": clip} if clip else {}
        more |= {"entropy_RT": entropy, "beta": 0.04, "backend": backend}
        return tuple(kl_policy_loss(logprobs, ref, advantage, mask_RT, **more))

    arrays = [setup.draw(16, length, dtype="float32") for _ in range(5)]
    call, exact = partial(loss, setup.kernels), partial(loss, "reference")
    return compare(setup, call, exact, arrays, gradients=(0, 3), dtype="float32")


def advantage_checks(setup: Setup) -> Checks:
    yield "step advantage", partial(step_advantage, setup)


def step_advantage(setup: Setup) -> dict[str, Any]:
    B, G, J, T = 16, 4, 8, 1000
    mask_BGJ = jnp.arange(J) < setup.integers(1, J, (B, G))[..., None]
    step_BGT = jnp.sort(setup.integers(-1, J, (B, G, T)))

    def advantage(backend: str, rewards_BGJ: jax.Array) -> jax.Array:
        return step_group_advantage(rewards_BGJ, mask_BGJ, step_BGT, backend=backend)

    call, exact = partial(advantage, setup.kernels), partial(advantage, "reference")
    return compare(setup, call, exact, [setup.draw(B, G, J, dtype="float32")], gradients=(0,), dtype="float32")


# Attention.


def attention_checks(setup: Setup) -> Checks:
    for T, N, K in [(20, 12, 2)] if setup.small else [(768, 12, 2), (131, 28, 4)]:
        yield f"prompt attention, {T} tokens, {N} heads", partial(prompt_attention, setup, T, N, K)
    frames = [(2048, ((2040,), (700, 1900))), (268, ((268,), (100, 264)))]
    for P, ends in [(64, ((40, 64), (30,))), (12, ((8, 12), (4,)))] if setup.small else frames:
        yield f"frame attention, {P} patches", partial(frame_attention, setup, P, ends)
    for S, T in [(20, 11)] if setup.small else [(768, 1024), (129, 95)]:
        yield f"shared attention, {S} + {T} tokens", partial(shared_attention, setup, S, T)


def prompt_attention(setup: Setup, T: int, N: int, K: int) -> dict[str, Any]:
    arrays = setup.draw(2, T, N, 128), setup.draw(2, T, K, 128), setup.draw(2, T, K, 128)
    call, exact = (partial(attend_prompt, attention=attention) for attention in (setup.attention, "xla"))
    return compare(setup, call, exact, arrays, gradients=(0, 1, 2))


def frame_attention(setup: Setup, P: int, ends: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Checks attention of frames.

    Args:
      ends: for each row the end of each frame, in patches; the padding after the last frame is not compared.
    """
    segment = np.full((len(ends), P), -1, np.int32)
    for row, row_ends in enumerate(ends):
        for frame, (start, end) in enumerate(zip((0, *row_ends), row_ends, strict=False)):
            segment[row, start:end] = frame
    real = jnp.asarray(segment >= 0)[..., None, None]

    def attend(attention: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.where(real, attend_frames(q, k, v, jnp.asarray(segment), attention), 0)

    arrays = [setup.draw(len(ends), P, 16, 80) for _ in range(3)]
    call, exact = partial(attend, setup.attention), partial(attend, "xla")
    return compare(setup, call, exact, arrays, gradients=(0, 1, 2))


def shared_attention(setup: Setup, S: int, T: int) -> dict[str, Any]:
    B, G, N, K, H = 2, 4, 12, 2, 128
    length_B = jnp.asarray([S, S - 7], jnp.int32)

    def attend(attention: str, *arrays: jax.Array) -> jax.Array:
        q, prefix_k, prefix_v, k, v = arrays
        return attend_shared(q, (prefix_k, prefix_v), k, v, length_B, attention)

    prefix = setup.draw(B, K, S, H), setup.draw(B, K, S, H)
    own = setup.draw(B, G, T, K, H), setup.draw(B, G, T, K, H)
    call, exact = partial(attend, setup.attention), partial(attend, "xla")
    return compare(setup, call, exact, (setup.draw(B, G, T, N, H), *prefix, *own), gradients=(0, 1, 2, 3, 4))


# Head and sampler.


def head_checks(setup: Setup) -> Checks:
    yield "loss head", partial(loss_head, setup)
    yield "sampler", partial(sampler, setup)


def loss_head(setup: Setup) -> dict[str, Any]:
    """Checks the gradients of head_loss (computed per chunk) against those that jax derives from token_logprobs."""
    V, D, T = (512, 32, 8) if setup.small else (151936, 1536, 256)
    hidden_BGTD, head_VD = setup.draw(2, 4, T, D), setup.draw(V, D) * D**-0.5
    tokens_BGT, values_BGT = setup.integers(0, V - 1, (2, 4, T)), setup.draw(2, 4, T, dtype="float32")
    temperature, forbidden, chunk = 1.2, (V - 1,), T * 4  # two chunks

    def token_loss(logprobs: jax.Array, entropy: jax.Array, values: jax.Array) -> tuple[jax.Array, dict]:
        return jnp.sum(logprobs * values), {}

    def call(hidden_BGTD: jax.Array, head_VD: jax.Array) -> jax.Array:
        # pyright takes the custom_vjp for a function without a result.
        result: Any = head_loss(token_loss, hidden_BGTD, head_VD, tokens_BGT, values_BGT, temperature, forbidden, chunk)
        return result[0]

    def exact(hidden_BGTD: jax.Array, head_VD: jax.Array) -> jax.Array:
        scored = token_logprobs(hidden_BGTD, head_VD, tokens_BGT, temperature=temperature, forbidden=forbidden)
        return jnp.sum(scored[0] * values_BGT)

    return compare(setup, call, exact, (hidden_BGTD, head_VD), gradients=(0, 1))


def sampler(setup: Setup) -> dict[str, Any]:
    """Compares tokens with those of the CPU and of NumPy in float64; a neighbour in the vocabulary counts as equal."""
    rows, V = 64, 777 if setup.small else 151936
    logits = np.asarray(setup.draw(rows, V, dtype="float32") * 3)
    uniform = setup.rng.random(rows).astype(np.float32)
    forbidden = V - 2, V - 1
    draw = jax.jit(lambda logits, uniform: sample(logits, uniform, Sampling(temperature=1.2), forbidden))
    (tokens, logprobs), (cpu_tokens, cpu_logprobs) = (
        jax.device_get(draw(*jax.device_put((logits, uniform), device)))
        for device in (jax.devices()[0], jax.devices("cpu")[0])
    )
    z = logits.astype(np.float64) / 1.2
    z[:, forbidden] = -np.inf
    cdf = np.cumsum(np.exp(z - z.max(axis=1, keepdims=True)), axis=1)
    exact = (cdf <= uniform[:, None].astype(np.float64) * cdf[:, -1:]).sum(axis=1)

    same = tokens == cpu_tokens
    as_cpu, as_exact = float(same.mean()), float((np.abs(tokens - exact) <= 1).mean())
    logprob = float(np.abs(logprobs - cpu_logprobs)[same].max(initial=0))
    right = min(as_cpu, as_exact) >= SAME_TOKENS and logprob < LOGPROB_LIMIT
    return {"same_as_cpu": as_cpu, "same_as_float64": as_exact, "logprob_difference": logprob, "ok": right}


def main() -> None:
    args = stage_arguments()
    kernels, attention = ("interpret", "xla") if args.cpu else ("pallas", "cudnn")
    setup = Setup(kernels, attention, small=args.size == "tiny")
    for checks in (decode_checks, loss_checks, advantage_checks, attention_checks, head_checks):
        for name, check in checks(setup):
            run_check(name, check)


if __name__ == "__main__":
    main()
