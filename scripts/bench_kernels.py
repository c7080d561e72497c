"""How fast the Pallas kernels are beside XLA: `python scripts/bench_kernels.py` (a minute or two on a GPU; --help).

    attention   decode attention of one token, prompt 768, room for 1,024 new tokens, full or half full; also TB/s of
                the bytes that must be moved: queries, keys and values that are seen, result
    advantage   the step-wise advantage of each token, 4 answers a question, 8 steps
    loss        the policy loss of answers of 1,024 tokens: forward; forward and gradient, clipped too

"pallas" is the kernel, "reference" the same equation compiled by XLA. A program runs --inner calls, each on what the
last one gave, so that starting the program does not count; the link is an elementwise operation in either. Attention
goes through the caches of four layers in turn, more than a GPU's L2 holds. Figures are microseconds a call: medians of
--repeats, the two in turn, with least and most, compilation apart, and by how much the results differ. On a CPU there
is no kernel to run: the reference alone, on small shapes.
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
from r1vl_kernels.kl_policy_loss import kl_policy_loss
from r1vl_kernels.prefix_decode_attention import prefix_decode_attention
from r1vl_kernels.step_group_advantage import step_group_advantage

from r1vl_jax.common.arguments import positive_int

LAYERS, GROUP, STEPS, BETA = 4, 4, 8, 0.04
LINK = 1e-6  # how much of a result goes into the next call's input


class Workload(NamedTuple):
    """`run(backend, state, *arrays)` gives a result and the next state.

    calls: of the kernel in one run; moved: bytes that one must move, 0 where they are not what bounds it.
    """

    run: Callable
    state: jax.Array
    arrays: tuple[Any, ...]
    calls: int = 1
    moved: int = 0


def attention(B: int, K: int, R: int, filled: float, H=128, prefix=768, own=1024, dtype="bfloat16") -> Workload:
    """`filled`: the share of the answers' room in use, on average; below 1 each answer has a length of its own."""
    rng = np.random.default_rng(0)
    keys = iter(jax.random.split(jax.random.key(0), 4 * LAYERS + 1))

    def draw(*shape):
        return jax.jit(partial(jax.random.normal, shape=shape, dtype=dtype))(next(keys))

    def pair(*shape):
        return draw(*shape), draw(*shape)

    caches = [(pair(B, K, prefix, H), pair(B, K, GROUP, own, H)) for _ in range(LAYERS)]
    lengths = (own * rng.uniform(2 * filled - 1, 1, (B, GROUP))).astype(np.int32)

    def run(backend, q, caches, prefix_length, own_length):
        for prefix, own in caches:
            out = prefix_decode_attention(q, *prefix, prefix_length, *own, own_length, backend=backend)
            q = q + (LINK * out).astype(q.dtype)
        return out, q

    moved = jnp.dtype(dtype).itemsize * K * H * 2 * (B * prefix + int(lengths.sum()) + B * GROUP * R)
    arrays = caches, jnp.full(B, prefix, jnp.int32), jnp.asarray(lengths)
    return Workload(run, draw(B, K, GROUP, R, H), arrays, LAYERS, moved)


def advantage(B: int, T: int = 1024) -> Workload:
    rng = np.random.default_rng(0)
    mask = np.arange(STEPS) < rng.integers(1, STEPS + 1, (B, GROUP))[..., None]
    step = np.sort(rng.integers(0, STEPS, (B, GROUP, T)), axis=2)

    def run(backend, rewards, mask, step):
        out = step_group_advantage(rewards, mask, step, backend=backend)
        return out, rewards + LINK * out[:, :, :STEPS]

    rewards = jnp.asarray(rng.integers(0, 4, mask.shape) * 0.1, jnp.float32)
    return Workload(run, rewards, (jnp.asarray(mask), jnp.asarray(step, jnp.int32)))


def loss(R: int, T: int = 1024, *, gradient: bool = False, clip: float | None = None) -> Workload:
    rng = np.random.default_rng(0)
    logprobs, ref, old = (jnp.asarray(-rng.exponential(size=(R, T)), jnp.float32) for _ in range(3))
    given, entropy = (jnp.asarray(rng.normal(size=(R, T)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(np.arange(T) < rng.integers(1, T + 1, (R, 1)))

    def run(backend, logprobs, ref, given, mask, old, entropy):
        options = {"old_RT": old, "clip_low": clip, "clip_high": clip} if clip else {}

        def total(logprobs):
            out = kl_policy_loss(
                logprobs, ref, given, mask, entropy_RT=entropy, beta=BETA, backend=backend, **options
            )  # fmt: skip
            return out.loss_R.sum(), out

        if not gradient:
            _, out = total(logprobs)
            return out, logprobs + LINK * out.loss_R[:, None]
        (_, out), grad = jax.value_and_grad(total, has_aux=True)(logprobs)
        return (out, grad), logprobs + LINK * grad

    return Workload(run, logprobs, (ref, given, mask, old, entropy))


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
    """Timings by backend of a program of `inner` runs, and the largest difference between what backends give."""

    def program(backend):
        def go(state, *arrays):
            run = partial(workload.run, backend)
            empty = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(run, state, *arrays)[0])
            # The result is carried too, so that all of it must be written.
            return jax.lax.fori_loop(0, inner, lambda _, carried: run(carried[1], *arrays), (empty, state))

        return partial(jax.jit(go), workload.state, *workload.arrays)

    timings = interleaved({backend: program(backend) for backend in backends}, repeats)
    once = [jax.jit(partial(workload.run, backend))(workload.state, *workload.arrays)[0] for backend in backends]
    apart = [
        jax.tree.reduce(max, jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), once[0], other))
        for other in once[1:]
    ]
    return {"timings": timings, "differ": max(apart, default=None)}


def as_row(name: str, workload: Workload, found: dict[str, Any], inner: int) -> dict[str, Any]:
    """One row of the JSON file; seconds a call."""
    row: dict[str, Any] = {"workload": name, "moved_bytes": workload.moved or None, "differ": found["differ"]}
    for backend, timing in found["timings"].items():
        each = Timing(timing.first, tuple(seconds / (inner * workload.calls) for seconds in timing.seconds))
        # the first call's time is the whole program's, and so is what compiling took of it
        row[backend] = each.as_json() | {"compile_s": timing.compile}
        if workload.moved:
            row[backend]["TB_per_s"] = workload.moved / each.median / 1e12
    return row


def cells(row: dict[str, Any], backends: list[str]) -> list[str]:
    found = [row["workload"]]
    for backend in backends:
        times = row[backend]
        low, mid, high = (f"{1e6 * times[key]:.1f}" for key in ("min", "seconds", "max"))
        found += [f"{mid} ({low}-{high})", f"{times['TB_per_s']:.2f}" if "TB_per_s" in times else ""]
        found.append(f"{times['compile_s']:.1f}")
    if len(backends) > 1:
        found += [f"{row['reference']['seconds'] / row['pallas']['seconds']:.2f}x", f"{row['differ']:.1e}"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=positive_int, default=5, help="default %(default)s")
    parser.add_argument("--inner", type=positive_int, default=50, help="runs in a program (default %(default)s)")
    parser.add_argument("--only", default="", help="workloads whose name has this in it: attention, 7B, loss ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
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
        print("The kernels need a GPU or a TPU: this times the reference alone.")
    rows = []
    for name, build in chosen.items():
        workload = build()
        rows.append(as_row(name, workload, measured(workload, backends, args.inner, args.repeats), args.inner))
        if args.json:  # what has been measured is kept, whatever comes next
            args.json.write_text(json.dumps(about | {"inner": args.inner, "rows": rows}, indent=1))
    heading = [""] + [title for backend in backends for title in (backend, "TB/s", "compile")]
    print(table([heading + ["faster", "differ"] * (len(backends) > 1)] + [cells(row, backends) for row in rows]))


if __name__ == "__main__":
    main()
