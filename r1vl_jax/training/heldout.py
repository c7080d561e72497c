"""Scores the policy on held-out rows, which no stage trains on: one greedy answer per row."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from itertools import islice

import jax

from r1vl_jax.data.batching import collate_prompts, size_of
from r1vl_jax.data.loader import read_rows
from r1vl_jax.errors import RowError
from r1vl_jax.training.context import Run
from r1vl_jax.training.judging import reward_metrics, rollout_rows, start_scoring
from r1vl_jax.training.stage import Stage
from r1vl_jax.types import EncodedPrompt, Example, Sampling


def heldout(run: Run, stage: Stage, step: int) -> None:
    """Scores the policy on the held-out rows; writes the means to metrics.jsonl and prints them.

    Does nothing if metrics.jsonl already has the means of this step, which happens after a resume.
    """
    config = run.config.eval
    if not config.rows or run.log.has_heldout(stage.name, step):
        return
    started = time.perf_counter()
    rows, unusable = _rows(run)
    parts = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
    filled = [part + [part[-1]] * (config.batch_size - len(part)) for part in parts]
    buckets = run.plan([[size_of(prompt) for _, prompt in part] for part in filled], count=1)
    sampling = Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)
    weights, scored = stage.rollout_weights(), []
    for part, batch in zip(parts, filled, strict=True):
        prompts = run.put(collate_prompts([prompt for _, prompt in batch], buckets))
        answers = run.sample(weights, prompts, sampling, group=1, step=0)
        answers = jax.tree.map(lambda a: a[: len(part)], answers)  # noqa: B023 (called at once)
        examples = [example for example, _ in part]
        wait_for_scores = start_scoring(examples, answers, run.model.processor, run.pool, run.reward)
        groups = wait_for_scores()
        run.log.rollouts(rollout_rows(examples, groups, stage=stage.name, step=step, event="heldout"))
        scored += groups
    means = reward_metrics(scored)
    run.log.metrics(stage.name, step, {"event": "heldout", "rows": len(rows), "rows_dropped": unusable, **means})
    run.log.say(
        f"held out, {len(rows)} rows, {stage.name} step {step}: reward {means['reward']:.3f}, answers right "
        f"{means['correct']:.1%}, valid {means['validity']:.1%}, key steps {means['key_steps']:.1%} "
        f"({time.perf_counter() - started:.0f} s)"
    )


def _rows(run: Run) -> tuple[list[tuple[Example, EncodedPrompt]], int]:
    """Returns the first usable rows as prompts, and the number of unusable rows; each unusable row is logged."""
    config, data = run.config.eval, run.config.data
    source = run.source(data.heldout)
    wanted = min(config.rows, len(source))
    processor = run.model.processor.for_stage(run.config.rl, data)
    encode = partial(processor.encode_prompt, max_tokens=data.max_prompt_tokens)
    with closing(read_rows(source, encode, seed=None)) as reader:
        first = [row for _, row in islice(reader, wanted)]
    for row in first:
        if isinstance(row, RowError):
            run.drop(row)
    rows = [row for row in first if not isinstance(row, RowError)]
    if not rows:
        raise RowError(f"{source.name}: no usable row among the first {config.rows}")
    return rows, wanted - len(rows) + len(source.errors)
