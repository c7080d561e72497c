"""The held-out judgement: greedy answers to rows that no stage trains on, one each."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from itertools import islice

import jax

from r1vl_jax.data.batching import collate_prompts, size_of
from r1vl_jax.data.loader import read_rows
from r1vl_jax.errors import RowError
from r1vl_jax.training.judging import reward_metrics
from r1vl_jax.training.run import Run
from r1vl_jax.types import Sampling, TrainState


def heldout(run: Run, state: TrainState, stage: str, step: int) -> None:
    """Judges the held-out rows; writes means to metrics.jsonl and says them."""
    config, data = run.config.eval, run.config.data
    if not config.rows or run.log.judged(stage, step):  # judged already: the run was resumed behind it
        return
    started = time.perf_counter()
    source = run.source(data.heldout)
    wanted = min(config.rows, len(source))
    processor = run.processor.for_stage(run.config.rl, data.video)
    encode = partial(processor.encode_prompt, max_tokens=data.max_prompt_tokens)
    with closing(read_rows(source, encode, seed=None)) as reader:
        found = [row for _, row in islice(reader, wanted)]
    rows = [row for row in found if not isinstance(row, RowError)]
    for error in found:
        if isinstance(error, RowError):
            run.drop(error)
    if not rows:
        raise RowError(f"{source.name}: no usable row among the first {config.rows}")
    parts = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
    filled = [part + [part[-1]] * (config.batch_size - len(part)) for part in parts]
    buckets = run.plan([[size_of(prompt) for _, prompt in part] for part in filled], count=1)
    sampling = Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)
    weights, judged = run.rollout_weights(state.params), []
    for part, batch in zip(parts, filled, strict=True):
        prompts = run.put(collate_prompts([prompt for _, prompt in batch], buckets))
        answers = run.sample(weights, prompts, sampling, group=1, step=0)
        answers = jax.tree.map(lambda a: a[: len(part)], answers)  # noqa: B023 (called at once)
        judged += run.start_judging(part, answers, stage=stage, step=step, event="heldout")()
    means = reward_metrics(judged)
    dropped = wanted - len(rows) + len(source.errors)
    run.log.metrics(stage, step, {"event": "heldout", "rows": len(rows), "rows_dropped": dropped, **means})
    run.log.say(
        f"held out, {len(rows)} rows, {stage} step {step}: reward {means['reward']:.3f}, answers right "
        f"{means['correct']:.1%}, valid {means['validity']:.1%}, key steps {means['key_steps']:.1%} "
        f"({time.perf_counter() - started:.0f} s)"
    )
