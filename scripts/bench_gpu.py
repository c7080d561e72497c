"""How fast rollout and training are on one GPU: `python scripts/bench_gpu.py` (under ten minutes on an H200; --help).

    R1, R2, R4   rollout of 16, 64 and 1 questions, 4 answers of 1,024 tokens to each      tokens/s
    R3           as R2, with answers of lognormal length, mean 400; their own tokens count tokens/s
    T1           training step on 16 questions: reference, policy and its gradient, AdamW  s
    T2           loss head alone on 16,384 rows, forward and gradient                      TFLOP/s
    S            a whole StepGRPO step on 16 questions: rollout, scores, reference, update s
    K            decode attention of R2's caches at full length                            TB/s
    torch        what the released trainer does, by transformers: see torch_baseline.py

Random weights, a question of 768 tokens with an image of 510, end of text ignored. What comes first in `WORKLOADS` runs
first; what the time no longer allows is left out and named. Each group of workloads is a process of its own, and one
that fails or hangs takes no other down; they share a compilation cache, so that a program counts as compiled in the
first row that needs it. MFU is of the FLOPs that workloads.py counts, over 989 TFLOP/s. Peak memory is that of the
process so far. --size tiny runs everything on a CPU in about a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_rewards import make_rows
from workloads import (
    SIZES,
    Timing,
    Training,
    answer,
    collate,
    decode_layers,
    head_gradient,
    measure,
    random_advantages,
    random_params,
    random_questions,
    random_tokens,
    rollout_flops,
    rollout_weights,
    single_device,
    table,
    training_flops,
)

from r1vl_jax.common.arguments import positive_int
from r1vl_jax.config import ATTENTION, KERNELS, REMAT
from r1vl_jax.rewards import ScorerPool
from r1vl_jax.step_grpo.advantages import group_advantages

PEAK_FLOPS = 989e12
START_S = 15  # of a process, before it measures


class Workload(NamedTuple):
    """One row, or torch's two.

    Attributes:
      process: workloads of one number share a process.
      seconds: that it takes with compilation, about; where not even half of them are left it is left out.
      floor, target: of the 2B on an H200.
    """

    unit: str
    process: int
    seconds: float
    floor: float | None = None
    target: float | None = None


WORKLOADS = {
    "R2": Workload("tokens/s", 0, 80, 114_000, 65_000),
    "S": Workload("s", 1, 80, 3.7, 5.0),
    "T1": Workload("s", 1, 30, 2.45, 2.7),
    "R1": Workload("tokens/s", 2, 30, 62_000, 34_000),
    "R4": Workload("tokens/s", 2, 30, 5_400, 2_500),
    "torch": Workload("", 3, 90),
    "T2": Workload("TFLOP/s", 4, 20, 989, 600),
    "K": Workload("TB/s", 4, 20, 4.3, 0.75 * 4.3),
    "R3": Workload("tokens/s", 5, 90),
}
GROUPS = {"R1": 16, "R2": 64, "R3": 64, "R4": 1, "T1": 16, "S": 16, "T2": 4, "K": 64}
TINY_GROUPS, TINY_MICRO = {"R1": 2, "R2": 4, "R3": 4, "R4": 1, "T1": 2, "S": 2, "T2": 1, "K": 2}, 1
MEAN_LENGTH, LENGTH_SIGMA = 400 / 1024, 0.6
DECODE_STEPS = 10  # in one program: starting it does not count


class Worker:
    """Measures some workloads in this process; each returns the fields of its row."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.size = args, SIZES[args.size]
        self.cfg = self.size.on_this_machine(args.attention, args.kernels)
        self.groups, self.micro = (TINY_GROUPS, TINY_MICRO) if args.size == "tiny" else (GROUPS, args.micro)
        self.device = jax.devices()[0]

    @cached_property
    def weights(self) -> Any:
        return rollout_weights(random_params(self.cfg, self.size.dtype), self.cfg, self.size.dtype)

    @cached_property
    def training(self) -> Training:
        dtype, remat = self.size.dtype, self.args.remat
        masters, reference = random_params(self.cfg, "float32"), random_params(self.cfg, dtype, seed=1)
        return Training(self.cfg, masters, reference, dtype=dtype, remat=remat)

    def forget(self) -> None:
        """Frees what workloads share: after a failure it may be half gone."""
        for name in ("weights", "training"):
            self.__dict__.pop(name, None)
        gc.collect()

    def rollout(self, name: str, until: float) -> dict:
        groups, steps = self.groups[name], itertools.count()
        prompts = collate(random_questions(self.size, groups))
        shape = (groups, self.size.group)
        limit_BG = self._lengths(shape) if name == "R3" else np.full(shape, self.size.new, np.int32)

        def call():
            more = {"step": next(steps), "limit_BG": limit_BG}
            return answer(self.weights, self.cfg, prompts, self.size.group, self.size.new, **more).mask_BGT

        timing = self._measure(name, call, until)
        made, expected = int(call().sum()) if name == "R3" else int(limit_BG.sum()), int(limit_BG.sum())
        if made != expected:
            raise RuntimeError(f"{made} tokens were sampled, expected {expected}")
        flops = rollout_flops(self.size, groups) if name != "R3" else None
        return self._row(timing, made / timing.median, flops)

    def _lengths(self, shape: tuple[int, int]) -> np.ndarray:
        """Lognormal, of MEAN_LENGTH before the cap."""
        new = self.size.new
        centre = np.log(MEAN_LENGTH * new) - LENGTH_SIGMA**2 / 2
        drawn = np.random.default_rng(3).lognormal(centre, LENGTH_SIGMA, shape)
        return np.clip(drawn, 1, new).astype(np.int32)

    def step(self, name: str, until: float) -> dict:
        """T1: all but the rollout."""
        groups, training = self.groups[name], self.training
        questions, tokens = random_questions(self.size, groups), random_tokens(self.size, groups)
        batches = training.micro_batches(questions, tokens, self.micro)
        batches = training.with_advantages(batches, random_advantages(groups, self.size.group))
        timing = self._measure(name, lambda: training.step(batches), until)
        return self._row(timing, timing.median, training_flops(self.size, groups))

    def whole_step(self, name: str, until: float) -> dict:
        """S: as train.py does it, but that other texts are scored than were sampled: random tokens say nothing."""
        groups, training, steps = self.groups[name], self.training, itertools.count()
        questions = random_questions(self.size, groups)
        prompts, shape, phases = collate(questions), (groups, self.size.group), []
        with scorer(groups * self.size.group, min(8, os.cpu_count() or 1)) as score, ThreadPoolExecutor(1) as thread:

            def call():
                clock = [time.perf_counter()]
                weights = training.rollout_weights()
                answers = answer(weights, self.cfg, prompts, self.size.group, self.size.new, step=next(steps))
                del weights
                clock.append(time.perf_counter())
                rewards = thread.submit(score)
                batches = training.micro_batches(questions, answers.tokens_BGT, self.micro)
                batches = jax.block_until_ready(training.with_reference(batches))
                clock.append(time.perf_counter())
                advantages = group_advantages(np.reshape(rewards.result(), shape))
                clock.append(time.perf_counter())
                training.update(training.with_advantages(batches, advantages))
                clock.append(time.perf_counter())
                phases.append(np.diff(clock).tolist())

            timing = self._measure(name, call, until)
        names, medians = ("rollout", "reference", "score", "update"), np.median(phases[1:], axis=0).tolist()
        flops = rollout_flops(self.size, groups) + training_flops(self.size, groups)
        return self._row(timing, timing.median, flops) | {"phases": dict(zip(names, medians, strict=True))}

    def head(self, name: str, until: float) -> dict:
        """T2: three matmuls, of logits and of their two gradients. Extra: all that it allocates, gradients included."""
        shape, cfg = (self.groups[name], self.size.group, self.size.new), self.cfg
        keys = jax.random.split(jax.random.key(0), 2)
        hidden = jax.random.normal(keys[0], (*shape, cfg.width), self.size.dtype)
        rows = cfg.width**-0.5 * jax.random.normal(keys[1], (cfg.vocab, cfg.width), self.size.dtype)
        values = {key: jnp.full(shape, value) for key, value in (("ref", -9.0), ("advantage", 0.5), ("weight", 1e-5))}
        args = hidden, rows, jnp.asarray(random_tokens(self.size, shape[0])), values
        timing = self._measure(name, lambda: head_gradient(cfg, *args), until)
        memory = head_gradient.lower(cfg, *args).compile().memory_analysis()
        flops = 6.0 * np.prod(shape) * cfg.width * cfg.vocab
        extra = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
        return self._row(timing, flops / timing.median / 1e12, flops) | {"extra_gb": extra}

    def decode_attention(self, name: str, until: float) -> dict:
        """K: the attention of some steps in all layers, and beside it that of the reference."""
        cfg, size, B = self.cfg, self.size, self.groups[name]
        K, G, H = cfg.kv_heads, size.group, cfg.head_dim
        shapes = [(B, K, size.prompt, H)] * 2 + [(B, K, G, size.new, H)] * 2
        keys = jax.random.split(jax.random.key(0), (cfg.layers, 4))
        draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        caches = [tuple(map(partial(draw, dtype=size.dtype), layer, shapes)) for layer in keys]
        read = DECODE_STEPS * sum(a.nbytes for a in jax.tree.leaves(caches))
        query = jnp.ones((B, K, G, cfg.heads // K, H), size.dtype)
        args = query, caches, jnp.full(B, size.prompt, jnp.int32), jnp.full((B, G), size.new, jnp.int32)
        timing = self._measure(name, lambda: decode_layers(*args, DECODE_STEPS, cfg.kernels), until)
        row = self._row(timing, read / timing.median / 1e12, None)
        other = measure(lambda: decode_layers(*args, DECODE_STEPS, "reference"), self.args.repeats, until)
        return row | {"reference": read / other.median / 1e12}

    def _measure(self, name: str, call: Callable[[], Any], until: float) -> Timing:
        timing = measure(call, self.args.repeats, until)
        if self.args.profile:
            with jax.profiler.trace(str(self.args.profile / name)):
                jax.block_until_ready(call())
        return timing

    def _row(self, timing: Timing, value: float, flops: float | None) -> dict:
        on_gpu, stats = self.device.platform == "gpu", self.device.memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        mfu = flops / timing.median / PEAK_FLOPS if flops and on_gpu else None
        return {"value": value, "mfu": mfu, "peak_gb": peak and peak / 1e9, "flops": flops, **timing.as_json()}


METHODS = {
    **dict.fromkeys(("R1", "R2", "R3", "R4"), Worker.rollout),
    "T1": Worker.step,
    "T2": Worker.head,
    "S": Worker.whole_step,
    "K": Worker.decode_attention,
}


@contextlib.contextmanager
def scorer(count: int, workers: int) -> Iterator[Callable[[], list[float]]]:
    """A function that scores as many answers in worker processes; without math-verify it draws rewards."""
    if importlib.util.find_spec("math_verify") is None:
        yield lambda: np.random.default_rng(0).random(count).tolist()
        return
    rows = zip(*make_rows(random.Random(0), count, [lambda rng: (rng.choice("ABCD"), rng.choice("ABCD"))]), strict=True)
    completions, solutions, key_steps = rows
    with ScorerPool(workers) as pool:
        yield lambda: [score.reward for score in pool.score(completions, solutions, key_steps)]


def work(args: argparse.Namespace) -> None:
    """In a process of its own: measures, and prints each row as JSON as soon as it is there."""
    worker, end = Worker(args), time.monotonic() + args.seconds
    with jax.set_mesh(single_device()):
        for number, name in enumerate(args.worker):
            share = WORKLOADS[name].seconds / sum(WORKLOADS[other].seconds for other in args.worker[number:])
            now = time.monotonic()
            try:
                row = METHODS[name](worker, name, now + share * (end - now))
            except Exception as error:  # whatever it is, the other workloads still run
                first = (str(error).strip() or "no message").splitlines()[0]
                row = {"error": f"{type(error).__name__}: {first[:300]}"}
                traceback.print_exc()
            print(json.dumps({"name": name, **row}), flush=True)
            if "error" in row:
                worker.forget()


# The parent: never touches the device, starts processes one after another and collects what they print.


def commands(args: argparse.Namespace) -> Iterator[tuple[list[str], list[str]]]:
    """(names of workloads, command line) of each process, in order."""
    common = ["--size", args.size, "--repeats", str(args.repeats)]
    ours = ["--attention", args.attention, "--kernels", args.kernels, "--micro", str(args.micro), "--remat", args.remat]
    ours += ["--profile", str(args.profile)] if args.profile else []
    here = Path(__file__).resolve()
    processes: dict[Any, list[str]] = {}
    for name in WORKLOADS:
        if name in args.only:
            number = "ours" if args.size == "tiny" and name != "torch" else WORKLOADS[name].process
            processes.setdefault(number, []).append(name)
    for names in processes.values():
        if names == ["torch"]:
            yield names, [sys.executable, str(here.with_name("torch_baseline.py")), *common]
        else:
            yield names, [sys.executable, str(here), *common, *ours, "--worker", *names]


def run(names: list[str], command: list[str], seconds: float, limit: float, env: dict[str, str]) -> Iterator[dict]:
    """The rows that a process prints; it is told to take `seconds` and killed after `limit`."""
    expected = ["torch rollout", "torch step"] if names == ["torch"] else list(names)
    env = env | {"JAX_PLATFORMS": "cpu"} if names == ["torch"] else env
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, "--seconds", f"{seconds:.0f}"], stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        )
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith('{"name"'):
                    row = json.loads(line)
                    expected.remove(row["name"])
                    yield row
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
        errors.seek(0)
        last = ([line.strip() for line in errors if line.strip()] or ["nothing on stderr"])[-1]
    reason = "the time was up" if code == -signal.SIGKILL else f"the process ended with code {code}: {last}"
    yield from ({"name": name, "error": reason} for name in expected)


def bench(args: argparse.Namespace) -> dict:
    """All rows; after each of them the file of --json is written anew."""
    end = time.monotonic() + args.budget
    scale = 0.05 if args.size == "tiny" else 1.0
    found = {"date": datetime.date.today().isoformat(), "size": args.size, "arguments": sys.argv[1:], "rows": {}}
    with tempfile.TemporaryDirectory() as cache:
        env = {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ
        if args.xla_flags:
            env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {args.xla_flags}".strip()
        waiting = list(commands(args))
        while waiting:
            names, command = waiting.pop(0)
            left = end - time.monotonic()
            later = scale * sum(WORKLOADS[name].seconds for names, _ in waiting for name in names)
            need = scale * sum(WORKLOADS[name].seconds for name in names)
            if left < need / 2:
                rows = ({"name": name, "error": f"left out: {max(0, left):.0f} s were left"} for name in names)
            else:
                share = max(need, left - later)  # what comes later takes what it needs; one that hangs, twice that
                rows = run(names, command, share - scale * START_S, min(left, max(2 * need, share)), env)
            for row in rows:
                found["rows"][row.pop("name")] = row
                say(found, args)
    return found


def say(found: dict, args: argparse.Namespace) -> None:
    """The newest row on stderr, and all of them in the file."""
    name, row = list(found["rows"].items())[-1]
    print(f"{name}: {row.get('error') or format(row['value'], ',.4g')}", file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


UNITS = {"torch rollout": "tokens/s", "torch step": "s an answer"} | {name: w.unit for name, w in WORKLOADS.items()}


def goals(found: dict) -> dict[str, tuple[float | None, float | None]]:
    """(floor, target) of each row; known for the 2B alone."""
    if found["size"] != "2b":
        return {}
    known = {name: (workload.floor, workload.target) for name, workload in WORKLOADS.items()}
    best = found["rows"].get("R2", {}).get("value")
    return known | {"R3": (None, best and 0.8 * best)}


def ratios(rows: dict[str, dict], size: str) -> Iterator[str]:
    """Ours over what transformers does in the same run, where both are there."""
    value = {name: row["value"] for name, row in rows.items() if "value" in row}
    for name in ("R4", "R1", "R2"):
        if name in value and "torch rollout" in value:
            yield f"rollout, {name} against torch: {value[name] / value['torch rollout']:.1f}x (target 8x)"
    if "T1" in value and "torch step" in value:
        answers = (TINY_GROUPS if size == "tiny" else GROUPS)["T1"] * SIZES[size].group
        ratio = value["torch step"] * answers / value["T1"]
        yield f"training step, an answer, T1 against torch: {ratio:.1f}x (target 2x)"


def details(rows: dict[str, dict]) -> Iterator[str]:
    """What some rows have besides."""
    for name, row in rows.items():
        if "phases" in row:
            yield f"{name}: " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in row["phases"].items())
        if "extra_gb" in row:
            yield f"{name}: {row['extra_gb']:.2f} GB besides its inputs (target: at most 4)"
        if "reference" in row:
            yield f"{name}: the reference {row['reference']:.2f} TB/s"
        if "error" in row:
            yield f"{name}: {row['error']}"
    if peak := rows.get("S", {}).get("peak_gb"):
        yield f"S: peak {peak:.1f} GB (target: at most 90)"


def report(found: dict) -> str:
    """The figures for a terminal."""

    def cell(value: float | None, form: str = ",.4g") -> str:
        return "-" if value is None else format(value, form)

    heads = ["", "measured", "unit", "floor", "target", "s: median (min to max)", "of", "MFU", "peak GB", "compile s"]
    lines, wanted = [heads], goals(found)
    for name, row in found["rows"].items():
        if "error" in row:
            continue
        floor, target = wanted.get(name, (None, None))
        lines.append([
            name, cell(row["value"]), UNITS[name], cell(floor), cell(target),
            f"{row['seconds']:.4g} ({row['min']:.4g} to {row['max']:.4g})", str(row["repeats"]),
            cell(row.get("mfu"), ".0%"), cell(row.get("peak_gb"), ".1f"), cell(row.get("compile_s"), ".1f"),
        ])  # fmt: skip
    notes = [*details(found["rows"]), *ratios(found["rows"], found["size"])]
    return "\n".join([f"{found['size']}, {found['date']}", "", table(lines), "", *notes])


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 1 where a workload failed."""
    args = _arguments(argv)
    if args.worker:
        work(args)
        return 0
    found = bench(args)
    print(report(found))
    return int(any("error" in row for row in found["rows"].values()))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--size", choices=["2b", "7b", "tiny"], default="2b", help="default: 2b")
    option("--only", type=lambda text: text.split(","), default=list(WORKLOADS), metavar="R1,T1", help="some of them")
    option("--budget", type=float, default=570, metavar="S", help="seconds for everything (default: 570)")
    option("--repeats", type=positive_int, default=5, help="the median is taken of these, if time allows (default: 5)")
    option("--micro", type=positive_int, default=4, help="questions in a gradient computation (default: 4)")
    option("--remat", choices=REMAT, default="matmuls", help="what the gradient keeps of the layers (default: matmuls)")
    option(
        "--attention",
        choices=ATTENTION,
        default="auto",
        help="default: what training would choose",
    )
    option("--kernels", choices=KERNELS, default="auto", help="default: what training would choose")
    option("--xla-flags", default="", metavar="FLAGS", help="for ours: '--xla_gpu_...', added to XLA_FLAGS")
    option("--profile", type=Path, metavar="DIR", help="where to write a trace of one more call of each workload")
    option("--json", type=Path, metavar="FILE", help="where all figures are written, after each workload")
    option("--worker", nargs="+", help=argparse.SUPPRESS)
    option("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(WORKLOADS):
        parser.error(f"--only: no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
