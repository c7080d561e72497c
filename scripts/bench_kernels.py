"""Times the Pallas kernels next to XLA: `python scripts/bench_kernels.py` (a minute or two on a GPU; --help).

    attention   decode attention of one token: prompts of 768, room for 1,024 new tokens, full or half full; also TB/s
                of the bytes that must be moved: queries, unmasked keys and values, result
    advantage   the advantage of each token, from rewards per step; 4 answers per question, 8 steps
    loss        the policy loss of answers of 1,024 tokens: forward; forward and gradient, also with clipping

"pallas" is the kernel, "reference" the same equation compiled by XLA. One program makes --inner calls, each on the
result of the call before, so the start of the program hardly counts; an elementwise operation links the calls, in both
programs. Attention reads the caches of four layers in turn, which are larger than a GPU's L2 cache. Times are
microseconds per call: the median of --repeats, with minimum and maximum. The two backends run in turn; compilation is
reported separately. The last column is the largest difference between the two results. The kernels do not run on a CPU:
there only the reference is timed, on small shapes.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_common import Timing, interleaved, table
from r1vl_kernels.kl_policy_loss import PolicyLoss, kl_policy_loss
from r1vl_kernels.prefix_decode_attention import prefix_decode_attention
from r1vl_kernels.step_group_advantage import step_group_advantage

from r1vl_jax.common.arguments import positive_int

LAYERS, GROUP, STEPS, BETA = 4, 4, 8, 0.04
LINK = 1e-6  # the share of a result that is added to the next call's input


class Workload(NamedTuple):
    """A kernel and its inputs.

    Attributes:
      run: run(backend, state, *arrays) returns a result and the next state.
      calls: the number of kernel calls in one run.
      moved: the number of bytes that one call must move; 0 if memory traffic does not limit its time.
    """

    run: Callable[..., Any]
    state: jax.Array
    arrays: tuple[Any, ...]
    calls: int = 1
    moved: int = 0


def attention(
    B: int,
    K: int,
    E: int,
    filled: float,
    H: int = 128,
    prefix: int = 768,
    own: int = 1024,
    dtype: str = "bfloat16",
) -> Workload:
    """Returns the workload of decode attention with K kv heads of E query heads each.

    Args:
      filled: the mean share of the answers' caches in use; below 1, the answers have different lengths.
      prefix, own: the lengths of the prompts' and of the answers' caches.
    """
    rng = np.random.default_rng(0)
    keys = iter(jax.random.split(jax.random.key(0), 2 * LAYERS + 1))

    def draw(*shape: int) -> jax.Array:
        return jax.jit(partial(jax.random.normal, shape=shape, dtype=dtype))(next(keys))

    R = B * GROUP
    caches = [(draw(B, K, 2, prefix, H), draw(R, K, 2, own, H)) for _ in range(LAYERS)]
    length_R = (own * rng.uniform(2 * filled - 1, 1, R)).astype(np.int32)

    def run(backend: str, q: jax.Array, caches: Any, *scalars: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, (prefix_length_R, own_length_R, question_R) = q, scalars
        for prompts, answers in caches:
            out = prefix_decode_attention(
                q, prompts, prefix_length_R, answers, own_length_R, question_R, backend=backend
            )
            q = q + (LINK * out).astype(q.dtype)
        return out, q

    moved = jnp.dtype(dtype).itemsize * K * H * 2 * (B * prefix + int(length_R.sum()) + R * E)
    arrays = caches, jnp.full(R, prefix, jnp.int32), jnp.asarray(length_R), jnp.arange(R) // GROUP
    return Workload(run, draw(R, K, E, H), arrays, LAYERS, moved)


def advantage(B: int, T: int = 1024) -> Workload:
    rng = np.random.default_rng(0)
    mask_BGJ = np.arange(STEPS) < rng.integers(1, STEPS + 1, (B, GROUP))[..., None]
    step_BGT = np.sort(rng.integers(0, STEPS, (B, GROUP, T)), axis=2)

    def run(
        backend: str, rewards_BGJ: jax.Array, mask_BGJ: jax.Array, step_BGT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        out_BGT = step_group_advantage(rewards_BGJ, mask_BGJ, step_BGT, backend=backend)
        return out_BGT, rewards_BGJ + LINK * out_BGT[:, :, :STEPS]

    rewards_BGJ = jnp.asarray(rng.integers(0, 4, mask_BGJ.shape) * 0.1, jnp.float32)
    return Workload(run, rewards_BGJ, (jnp.asarray(mask_BGJ), jnp.asarray(step_BGT, jnp.int32)))


def loss(R: int, T: int = 1024, *, gradient: bool = False, clip: float | None = None) -> Workload:
    rng = np.random.default_rng(0)
    logprobs_RT, ref_RT, old_RT = (jnp.asarray(-rng.exponential(size=(R, T)), jnp.float32) for _ in range(3))
    advantage_RT, entropy_RT = (jnp.asarray(rng.normal(size=(R, T)), jnp.float32) for _ in range(2))
    mask_RT = jnp.asarray(np.arange(T) < rng.integers(1, T + 1, (R, 1)))

    def run(
        backend: str,
        logprobs_RT: jax.Array,
        ref_RT: jax.Array,
        advantage_RT: jax.Array,
        mask_RT: jax.Array,
        old_RT: jax.Array,
        entropy_RT: jax.Array,
    ) -> tuple[Any, jax.Array]:
        options: dict[str, Any] = {"old_RT": old_RT, "clip_low": clip, "clip_high": clip} if clip else {}

        def total(logprobs_RT: jax.Array) -> tuple[jax.Array, PolicyLoss]:
            out = kl_policy_loss(
                logprobs_RT, ref_RT, advantage_RT, mask_RT, entropy_RT=entropy_RT, beta=BETA, backend=backend, **options
            )
            return out.loss_R.sum(), out

        if not gradient:
            _, out = total(logprobs_RT)
            return out, logprobs_RT + LINK * out.loss_R[:, None]
        (_, out), grad_RT = jax.value_and_grad(total, has_aux=True)(logprobs_RT)
        return (out, grad_RT), logprobs_RT + LINK * grad_RT

    return Workload(run, logprobs_RT, (ref_RT, advantage_RT, mask_RT, old_RT, entropy_RT))


WORKLOADS = {
    "attention 2B, 64 x 4, full": partial(attention, 64, 2, 6, 1.0),
    "attention 2B, 64 x 4, half": partial(attention, 64, 2, 6, 0.5),
    "attention 2B, 16 x 4, full": partial(attention, 16, 2, 6, 1.0),
    "attention 2B, 16 x 4, half": partial(attention, 16, 2, 6, 0.5),
    "attention 2B, 1 x 4, half": partial(attention, 1, 2, 6, 0.5),
    "attention 7B, 64 x 4, half": partial(attention, 64, 4, 7, 0.5),
    "attention 7B, 16 x 4, half": partial(attention, 16, 4, 7, 0.5),
    "advantage, 16 x 4": partial(advantage, 16),
    "advantage, 64 x 4": partial(advantage, 64),
    "loss, 64": partial(loss, 64),
    "loss, 256": partial(loss, 256),
    "loss and gradient, 64": partial(loss, 64, gradient=True),
    "loss and gradient, 256": partial(loss, 256, gradient=True),
    "loss and gradient, clipped, 256": partial(loss, 256, gradient=True, clip=0.2),
}
SMALL = {
    "attention 2 x 4, S 64 + 64": partial(attention, 2, 2, 2, 0.5, H=64, prefix=64, own=64, dtype="float32"),
    "attention 2 x 4, S 512 + 512": partial(attention, 2, 2, 2, 0.5, H=64, prefix=512, own=512, dtype="float32"),
    "advantage, 2 x 4": partial(advantage, 2, 128),
    "loss and gradient, 8": partial(loss, 8, 128, gradient=True),
}


def measured(workload: Workload, backends: list[str], inner: int, repeats: int) -> dict[str, Any]:
    """Returns {"timings": per backend, of a program of `inner` runs; "differ": largest difference between results}."""

    def program(backend: str) -> Callable[[], Any]:
        def loop(state: jax.Array, *arrays: Any) -> Any:
            run = partial(workload.run, backend)
            empty = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(run, state, *arrays)[0])
            # The carry includes the result, so the program must write all of it.
            return jax.lax.fori_loop(0, inner, lambda _, carried: run(carried[1], *arrays), (empty, state))

        return partial(jax.jit(loop), workload.state, *workload.arrays)

    timings = interleaved({backend: program(backend) for backend in backends}, repeats)
    results = [jax.jit(partial(workload.run, backend))(workload.state, *workload.arrays)[0] for backend in backends]
    differences = [
        jax.tree.reduce(max, jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), results[0], other))
        for other in results[1:]
    ]
    return {"timings": timings, "differ": max(differences, default=None)}


def as_row(name: str, workload: Workload, result: dict[str, Any], inner: int) -> dict[str, Any]:
    """Returns one row of the JSON file, with seconds per call; `result` is from `measured`."""
    row: dict[str, Any] = {"workload": name, "moved_bytes": workload.moved or None, "differ": result["differ"]}
    for backend, timing in result["timings"].items():
        each = Timing(timing.first, tuple(seconds / (inner * workload.calls) for seconds in timing.seconds))
        # The first call's time is the whole program's, and so is the compile time computed from it.
        row[backend] = each.as_json() | {"compile_s": timing.compile}
        if workload.moved:
            row[backend]["TB_per_s"] = workload.moved / each.median / 1e12
    return row


def cells(row: dict[str, Any], backends: list[str]) -> list[str]:
    """Returns a row of the JSON file as cells of the printed table."""
    texts = [row["workload"]]
    for backend in backends:
        times = row[backend]
        low, mid, high = (f"{1e6 * times[key]:.1f}" for key in ("min", "seconds", "max"))
        texts += [f"{mid} ({low}-{high})", f"{times['TB_per_s']:.2f}" if "TB_per_s" in times else ""]
        texts.append(f"{times['compile_s']:.1f}")
    if len(backends) > 1:
        texts += [f"{row['reference']['seconds'] / row['pallas']['seconds']:.2f}x", f"{row['differ']:.1e}"]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=positive_int, default=5, help="default %(default)s")
    parser.add_argument("--inner", type=positive_int, default=50, help="runs in a program (default %(default)s)")
    parser.add_argument("--only", default="", help="workloads whose name contains this: attention, 7B, loss ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    device = jax.devices()[0]
    backends = ["reference"] if device.platform == "cpu" else ["pallas", "reference"]
    workloads = SMALL if device.platform == "cpu" else WORKLOADS
    chosen = {name: build for name, build in workloads.items() if args.only in name}
    if not chosen:
        parser.error(f"--only {args.only!r} names none of: {'; '.join(workloads)}")

    about = {"device": device.device_kind, "jax": jax.__version__, "date": str(datetime.date.today())}
    print(f"{', '.join(about.values())}; microseconds a call, median of {args.repeats} (least-most); compilation in s")
    if device.platform == "cpu":
        print("The kernels need a GPU or a TPU: only the reference is timed.")
    rows = []
    for name, build in chosen.items():
        workload = build()
        rows.append(as_row(name, workload, measured(workload, backends, args.inner, args.repeats), args.inner))
        if args.json:  # after each workload, so that a later failure loses nothing
            args.json.write_text(json.dumps(about | {"inner": args.inner, "rows": rows}, indent=1))
    heading = [""] + [title for backend in backends for title in (backend, "TB/s", "compile")]
    print(table([heading + ["faster", "differ"] * (len(backends) > 1)] + [cells(row, backends) for row in rows]))


if __name__ == "__main__":
    main()
