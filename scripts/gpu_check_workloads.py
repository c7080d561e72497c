"""Defines the workloads that gpu_check.py measures; each is a stage of its own.

    R1, R2, R4   rollout of 16, 64 and 1 questions, 4 answers of 1,024 tokens each         tokens/s
    R3           like R2, with lognormal answer lengths of mean 400; only real tokens count tokens/s
    T1           training step on 16 questions: reference, policy and its gradient, AdamW  s
    T2           loss head alone on 16,384 rows, forward and gradient                      TFLOP/s
    S            a whole StepGRPO step on 16 questions: rollout, scores, reference, update s
    K            decode attention on R2's caches at full length                            TB/s
    plan         S again: the peak of its memory as r1vl_jax.plan says; within 15%?        GB

Weights are random; a question has 768 tokens, 510 of them from its image; end of text is ignored. MFU uses the FLOPs
that bench_common.py counts and a peak of 989 TFLOP/s. Peak memory is that of the stage's process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_common import (
    SIZES,
    Size,
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
    step_calls,
    step_programs,
    update,
    with_advantages,
    with_reference,
)
from bench_rewards import make_rows

from r1vl_jax.planning.report import plan_program
from r1vl_jax.planning.targets import parse_target
from r1vl_jax.rewards import ScorerPool
from r1vl_jax.training.programs import Programs
from r1vl_jax.types import Rollout, TrainBatch, TrainState

PEAK_FLOPS = 989e12
STEP_GB = {(4, "matmuls"): 88, (2, "matmuls"): 71, (4, "full"): 59}  # fastest first
MEAN_LENGTH, LENGTH_SIGMA = 400 / 1024, 0.6
DECODE_STEPS = 10  # steps in one program, so that starting the program hardly counts


def micro_and_remat(size: str, memory_gb: float) -> tuple[int, str]:
    """Returns the number of questions in a micro-batch of T1 and S, and `remat`: the fastest pair that fits.

    STEP_GB is what a step of the 2B needs, read from compiled programs (scripts/README.md). jax may use 92% of a card
    (gpu_check.py): about 77 GB of an H100, 137 GB of an H200.
    """
    if size == "tiny":
        return 1, "matmuls"
    fitting = [choice for choice, needed in STEP_GB.items() if needed <= memory_gb]
    return fitting[0] if size == "2b" and fitting else (4, "full")


def rollout_call(size: Size, questions: int) -> Callable[..., Rollout]:
    """Returns a function that samples `size.group` answers to each question; it takes keyword arguments of rollout."""
    cfg = size.on_this_machine()
    weights = step_programs(size, cfg, remat="full").rollout_weights(random_params(cfg, size.dtype))
    return partial(answer, weights, cfg, collate(random_questions(size, questions)), size.group, size.new)


class Bench:
    """What the workloads share: the model, its sizes, and the time that is left. A process measures one workload.

    Each workload's method returns the fields of its row.
    """

    def __init__(self, args: argparse.Namespace, until: float) -> None:
        self.name, self.repeats, self.until = args.stage, args.repeats, until
        self.size, self.device = SIZES[args.size], jax.devices()[0]
        self.cfg = self.size.on_this_machine()
        tiny = args.size == "tiny"
        self.groups = WORKLOADS[self.name].tiny_groups if tiny else WORKLOADS[self.name].groups
        micro, remat = micro_and_remat(args.size, self._memory_gb("bytes_limit") or 0)
        self.micro, self.remat = args.micro or micro, args.remat or remat

    @cached_property
    def programs(self) -> Programs:
        return step_programs(self.size, self.cfg, remat=self.remat)

    @cached_property
    def reference(self) -> Any:
        return random_params(self.cfg, self.size.dtype, seed=1)

    @cached_property
    def state(self) -> TrainState:
        return self.programs.init(random_params(self.cfg, "float32"))

    def rollout(self) -> dict[str, Any]:
        limit_BG, steps = np.full((self.groups, self.size.group), self.size.new, np.int32), itertools.count()
        if self.name == "R3":
            limit_BG = self._lengths(limit_BG.shape)
        sample = rollout_call(self.size, self.groups)
        made: set[int] = set()

        def call() -> None:
            made.add(int(sample(step=next(steps), limit_BG=limit_BG).mask_BGT.sum()))

        timing, expected = self._measure(call), int(limit_BG.sum())
        if made != {expected}:
            raise RuntimeError(f"{sorted(made)} tokens were sampled, expected {expected}")
        flops = rollout_flops(self.size, self.groups) if self.name != "R3" else None
        return self._row(timing, expected / timing.median, flops)

    def _lengths(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns lognormal answer lengths with mean MEAN_LENGTH before they are capped."""
        new = self.size.new
        centre = np.log(MEAN_LENGTH * new) - LENGTH_SIGMA**2 / 2
        drawn = np.random.default_rng(3).lognormal(centre, LENGTH_SIGMA, shape)
        return np.clip(drawn, 1, new).astype(np.int32)

    def training_step(self) -> dict[str, Any]:
        """Measures T1: a training step without the rollout."""
        questions, tokens = random_questions(self.size, self.groups), random_tokens(self.size, self.groups)
        batches = micro_batches(questions, tokens, self.micro)
        batches = with_advantages(batches, random_advantages(self.groups, self.size.group))
        timing = self._measure(lambda: self._update(with_reference(self.programs, self.reference, batches)))
        row = self._row(timing, timing.median, training_flops(self.size, self.groups))
        return row | {"answers": self.groups * self.size.group, "micro": self.micro, "remat": self.remat}

    def _advantages(self, rewards_BG: np.ndarray) -> np.ndarray:
        """Each answer's advantage (B, G), by the program of training, which computes it for every token."""
        rewards_BGJ = rewards_BG[..., None].astype(np.float32)
        step_BGT = np.zeros((*rewards_BG.shape, self.size.new), np.int32)
        advantages_BGT = self.programs.advantages(rewards_BGJ, np.ones(rewards_BGJ.shape, bool), step_BGT)
        return jax.device_get(advantages_BGT)[..., 0]

    def _update(self, batches: list[TrainBatch]) -> None:
        self.state, _ = update(self.programs, self.state, batches)

    def whole_step(self) -> dict[str, Any]:
        """Measures S: a step as in training, except that it scores fixed texts, since random tokens have no meaning."""
        steps, phases = itertools.count(), []
        questions = random_questions(self.size, self.groups)
        prompts, shape = collate(questions), (self.groups, self.size.group)
        with scorer(self.groups * self.size.group) as score, ThreadPoolExecutor(1) as thread:

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

            timing = self._measure(call)
        names, medians = ("rollout", "reference", "score", "update"), np.median(phases[1:], axis=0).tolist()
        flops = rollout_flops(self.size, self.groups) + training_flops(self.size, self.groups)
        more = {"phases": dict(zip(names, medians, strict=True)), "micro": self.micro, "remat": self.remat}
        return self._row(timing, timing.median, flops) | more

    def planned(self) -> dict[str, Any]:
        """Measures S again, and compares the peak of the memory with what r1vl_jax.plan says, by the same compiler."""
        row, target = self.whole_step(), parse_target("cpu:1" if self.device.platform == "cpu" else "h100:1")
        calls = step_calls(
            self.cfg, self.size, single_device(), questions=self.groups, micro=self.micro, remat=self.remat
        )
        planned = max(plan_program(call, single_device(), target).peak for call in calls) / 1e9
        ok = None if row["peak_gb"] is None else abs(planned / row["peak_gb"] - 1) < 0.15
        return row | {"value": planned, "ok": ok}

    def head(self) -> dict[str, Any]:
        """Measures T2: three matmuls, for logits and their two gradients.

        The row's `extra_gb` is the memory of temporaries and outputs, gradients included.
        """
        shape, cfg = (self.groups, self.size.group, self.size.new), self.cfg
        keys = jax.random.split(jax.random.key(0), 2)
        hidden = jax.random.normal(keys[0], (*shape, cfg.width), self.size.dtype)
        rows = cfg.width**-0.5 * jax.random.normal(keys[1], (cfg.vocab, cfg.width), self.size.dtype)
        values = {key: jnp.full(shape, value) for key, value in (("ref", -9.0), ("advantage", 0.5), ("weight", 1e-5))}
        args = hidden, rows, jnp.asarray(random_tokens(self.size, shape[0])), values
        timing = self._measure(lambda: head_gradient(cfg, *args))
        memory: Any = head_gradient.lower(cfg, *args).compile().memory_analysis()
        flops = 6.0 * np.prod(shape) * cfg.width * cfg.vocab
        extra = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
        return self._row(timing, flops / timing.median / 1e12, flops) | {"extra_gb": extra}

    def decode_attention(self) -> dict[str, Any]:
        """Measures K: the attention of some steps in all layers, by the kernel and by the reference."""
        cfg, size, B = self.cfg, self.size, self.groups
        K, R, H = cfg.kv_heads, B * size.group, cfg.head_dim
        shapes = (B, K, 2, size.prompt, H), (R, K, 2, size.new, H)
        keys = jax.random.split(jax.random.key(0), (cfg.layers, 2))
        draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        caches = [tuple(map(partial(draw, dtype=size.dtype), layer, shapes)) for layer in keys]
        read = DECODE_STEPS * sum(a.nbytes for a in jax.tree.leaves(caches))
        query = jnp.ones((R, K, cfg.heads // K, H), size.dtype)
        lengths = (jnp.full(R, length, jnp.int32) for length in (size.prompt, size.new))
        args = query, caches, (*lengths, jnp.repeat(jnp.arange(B), size.group))
        timing = self._measure(lambda: decode_layers(*args, DECODE_STEPS, cfg.kernels))
        row = self._row(timing, read / timing.median / 1e12, None)
        other = self._measure(lambda: decode_layers(*args, DECODE_STEPS, "reference"))
        return row | {"reference": read / other.median / 1e12}

    def _measure(self, call: Callable[[], Any]) -> Timing:
        return measure(call, self.repeats, self.until)

    def _memory_gb(self, name: str) -> float | None:
        """Returns a figure of the device's memory, which a CPU does not report."""
        number = (self.device.memory_stats() or {}).get(name)
        return None if number is None else number / 1e9

    def _row(self, timing: Timing, value: float, flops: float | None) -> dict[str, Any]:
        mfu = flops / timing.median / PEAK_FLOPS if flops and self.device.platform == "gpu" else None
        fixed = {"unit": WORKLOADS[self.name].unit, "card": self.device.device_kind}
        figures = {"mfu": mfu, "flops": flops, "peak_gb": self._memory_gb("peak_bytes_in_use")}
        return {"value": value, **fixed, **timing.as_json(), **figures}


class Workload(NamedTuple):
    """How a workload is measured, and the number of questions: of the published models, and of the tiny one."""

    run: Callable[[Bench], dict[str, Any]]
    unit: str
    groups: int
    tiny_groups: int


WORKLOADS = {
    "R1": Workload(Bench.rollout, "tokens/s", 16, 2),
    "R2": Workload(Bench.rollout, "tokens/s", 64, 4),
    "R3": Workload(Bench.rollout, "tokens/s", 64, 4),
    "R4": Workload(Bench.rollout, "tokens/s", 1, 1),
    "T1": Workload(Bench.training_step, "s", 16, 2),
    "T2": Workload(Bench.head, "TFLOP/s", 4, 1),
    "S": Workload(Bench.whole_step, "s", 16, 2),
    "plan": Workload(Bench.planned, "GB", 16, 2),
    "K": Workload(Bench.decode_attention, "TB/s", 64, 2),
}


@contextlib.contextmanager
def scorer(count: int) -> Iterator[Callable[[], list[float]]]:
    """Yields a function that scores `count` answers in worker processes."""
    rows = zip(*make_rows(random.Random(0), count, [lambda rng: (rng.choice("ABCD"), rng.choice("ABCD"))]), strict=True)
    completions, solutions, key_steps = rows
    with ScorerPool(min(8, os.cpu_count() or 1)) as pool:
        yield lambda: [score.reward for score in pool.score(completions, solutions, key_steps)]


def measure_workload(args: argparse.Namespace, until: float) -> dict[str, Any]:
    """Measures the workload `args.stage` until about `until` (time.monotonic). Returns the fields of its row."""
    with jax.set_mesh(single_device()):
        return WORKLOADS[args.stage].run(Bench(args, until))
