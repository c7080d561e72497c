"""Measures some workloads of bench_gpu.py in its own process, and prints one row of JSON per workload."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_common import (
    SIZES,
    Timing,
    collate,
    measure,
    random_advantages,
    random_params,
    random_questions,
    random_tokens,
    rollout_flops,
    single_device,
    training_flops,
)
from bench_programs import (
    answer,
    decode_layers,
    head_gradient,
    micro_batches,
    step_programs,
    update,
    with_advantages,
    with_reference,
)
from bench_rewards import make_rows

from r1vl_jax.rewards import ScorerPool
from r1vl_jax.types import TrainBatch, TrainState

PEAK_FLOPS = 989e12


class Workload(NamedTuple):
    """One row of the results (for torch: two rows).

    Attributes:
      process: workloads with the same number share a process.
      seconds: the approximate duration with compilation; the workload is skipped if less than half of it is left.
      floor, target: values for the 2B model on an H200.
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
DECODE_STEPS = 10  # steps in one program, so that starting the program hardly counts


class Worker:
    """The measurements of one process. Each workload's method returns the fields of its row."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.size = args, SIZES[args.size]
        self.cfg = self.size.on_this_machine(args.attention, args.kernels)
        self.programs = step_programs(self.size, self.cfg, remat=args.remat)
        self.groups, self.micro = (TINY_GROUPS, TINY_MICRO) if args.size == "tiny" else (GROUPS, args.micro)
        self.device = jax.devices()[0]

    @cached_property
    def weights(self) -> Any:
        return self.programs.rollout_weights(random_params(self.cfg, self.size.dtype))

    @cached_property
    def reference(self) -> Any:
        return random_params(self.cfg, self.size.dtype, seed=1)

    @cached_property
    def state(self) -> TrainState:
        return self.programs.init(random_params(self.cfg, "float32"))

    def forget(self) -> None:
        """Frees the objects that workloads share, because a failure may have left them incomplete."""
        for name in ("weights", "reference", "state"):
            self.__dict__.pop(name, None)
        gc.collect()

    def rollout(self, name: str, until: float) -> dict:
        groups, steps = self.groups[name], itertools.count()
        prompts = collate(random_questions(self.size, groups))
        shape = (groups, self.size.group)
        limit_BG = self._lengths(shape) if name == "R3" else np.full(shape, self.size.new, np.int32)

        def call() -> Any:
            more = {"step": next(steps), "limit_BG": limit_BG}
            return answer(self.weights, self.cfg, prompts, self.size.group, self.size.new, **more).mask_BGT

        timing = self._measure(name, call, until)
        made, expected = int(call().sum()) if name == "R3" else int(limit_BG.sum()), int(limit_BG.sum())
        if made != expected:
            raise RuntimeError(f"{made} tokens were sampled, expected {expected}")
        flops = rollout_flops(self.size, groups) if name != "R3" else None
        return self._row(timing, made / timing.median, flops)

    def _lengths(self, shape: tuple[int, int]) -> np.ndarray:
        """Returns lognormal answer lengths with mean MEAN_LENGTH before they are capped."""
        new = self.size.new
        centre = np.log(MEAN_LENGTH * new) - LENGTH_SIGMA**2 / 2
        drawn = np.random.default_rng(3).lognormal(centre, LENGTH_SIGMA, shape)
        return np.clip(drawn, 1, new).astype(np.int32)

    def step(self, name: str, until: float) -> dict:
        """Measures T1: a training step without the rollout."""
        groups = self.groups[name]
        questions, tokens = random_questions(self.size, groups), random_tokens(self.size, groups)
        batches = micro_batches(questions, tokens, self.micro)
        batches = with_advantages(batches, random_advantages(groups, self.size.group))

        def call() -> None:
            self._update(with_reference(self.programs, self.reference, batches))

        timing = self._measure(name, call, until)
        return self._row(timing, timing.median, training_flops(self.size, groups))

    def _advantages(self, rewards_BG: np.ndarray) -> np.ndarray:
        """Each answer's advantage (B, G), by the program of training, which computes it for every token."""
        rewards_BGJ = rewards_BG[..., None].astype(np.float32)
        step_BGT = np.zeros((*rewards_BG.shape, self.size.new), np.int32)
        advantages_BGT = self.programs.advantages(rewards_BGJ, np.ones(rewards_BGJ.shape, bool), step_BGT)
        return jax.device_get(advantages_BGT)[..., 0]

    def _update(self, batches: list[TrainBatch]) -> None:
        self.state, _ = update(self.programs, self.state, batches)

    def whole_step(self, name: str, until: float) -> dict:
        """Measures S: a step as in training, except that it scores fixed texts, since random tokens have no meaning."""
        groups, steps = self.groups[name], itertools.count()
        questions = random_questions(self.size, groups)
        prompts, shape, phases = collate(questions), (groups, self.size.group), []
        with scorer(groups * self.size.group, min(8, os.cpu_count() or 1)) as score, ThreadPoolExecutor(1) as thread:

            def call() -> None:
                clock = [time.perf_counter()]
                weights = self.programs.rollout_weights(self.state.params)
                answers = answer(weights, self.cfg, prompts, self.size.group, self.size.new, step=next(steps))
                del weights
                clock.append(time.perf_counter())
                rewards = thread.submit(score)
                batches = micro_batches(questions, answers.tokens_BGT, self.micro)
                batches = jax.block_until_ready(with_reference(self.programs, self.reference, batches))
                clock.append(time.perf_counter())
                advantages = self._advantages(np.reshape(rewards.result(), shape))
                clock.append(time.perf_counter())
                self._update(with_advantages(batches, advantages))
                clock.append(time.perf_counter())
                phases.append(np.diff(clock).tolist())

            timing = self._measure(name, call, until)
        names, medians = ("rollout", "reference", "score", "update"), np.median(phases[1:], axis=0).tolist()
        flops = rollout_flops(self.size, groups) + training_flops(self.size, groups)
        return self._row(timing, timing.median, flops) | {"phases": dict(zip(names, medians, strict=True))}

    def head(self, name: str, until: float) -> dict:
        """Measures T2: three matmuls, for logits and their two gradients.

        The row's `extra_gb` is the memory of temporaries and outputs, gradients included.
        """
        shape, cfg = (self.groups[name], self.size.group, self.size.new), self.cfg
        keys = jax.random.split(jax.random.key(0), 2)
        hidden = jax.random.normal(keys[0], (*shape, cfg.width), self.size.dtype)
        rows = cfg.width**-0.5 * jax.random.normal(keys[1], (cfg.vocab, cfg.width), self.size.dtype)
        values = {key: jnp.full(shape, value) for key, value in (("ref", -9.0), ("advantage", 0.5), ("weight", 1e-5))}
        args = hidden, rows, jnp.asarray(random_tokens(self.size, shape[0])), values
        timing = self._measure(name, lambda: head_gradient(cfg, *args), until)
        memory: Any = head_gradient.lower(cfg, *args).compile().memory_analysis()
        flops = 6.0 * np.prod(shape) * cfg.width * cfg.vocab
        extra = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
        return self._row(timing, flops / timing.median / 1e12, flops) | {"extra_gb": extra}

    def decode_attention(self, name: str, until: float) -> dict:
        """Measures K: the attention of some steps in all layers, by the kernel and by the reference."""
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
    """Yields a function that scores `count` answers in worker processes; it draws rewards if math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        yield lambda: np.random.default_rng(0).random(count).tolist()
        return
    rows = zip(*make_rows(random.Random(0), count, [lambda rng: (rng.choice("ABCD"), rng.choice("ABCD"))]), strict=True)
    completions, solutions, key_steps = rows
    with ScorerPool(workers) as pool:
        yield lambda: [score.reward for score in pool.score(completions, solutions, key_steps)]


def work(args: argparse.Namespace) -> None:
    """Measures the workloads in this process, and prints each row as JSON as soon as it is measured."""
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
