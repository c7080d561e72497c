"""Runs stage 1 (R1-VL, section 3.1): cross-entropy on chain-of-thought answers, from rows to a trained policy."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from r1vl_jax.data.batching import in_micro_batches, size_of
from r1vl_jax.training.context import Run
from r1vl_jax.training.guards import not_finite
from r1vl_jax.training.heldout import heldout
from r1vl_jax.training.micro_batches import SFTUpdate, sft_update
from r1vl_jax.training.run_folder import Phases
from r1vl_jax.training.stage import Stage


def sft(run: Run, params: Any, resume: bool) -> Any:
    """Trains on question and answer rows. Returns the fp32 parameters.

    Args:
      params: the parameters to start from; None: those of the run's checkpoint.
      resume: continue from the stage's newest checkpoint, if there is one.
    """
    config, data = run.config.sft, run.config.data
    source = run.source(data.sft)
    steps = config.steps or max(1, math.ceil(config.epochs * len(source) / config.batch_size))
    micro_batches = config.batch_size // config.micro_batch_size
    stage = Stage(run, "sft", steps, params, resume, micro_batches=micro_batches)
    if stage.is_untrained:
        heldout(run, stage, step=0)
    encode = partial(
        run.model.processor.for_stage(config, data).encode_pair,
        max_tokens=data.max_prompt_tokens,
        max_answer_tokens=config.max_answer_tokens,
    )
    sizes = run.first_sizes(source, encode, lambda pair: size_of(*pair))
    buckets = run.plan(in_micro_batches(sizes, config.batch_size, config.micro_batch_size), count=data.buckets)
    run.log.say(f"sft: rows are padded to {buckets}")

    def make(rows: list[Any]) -> SFTUpdate:
        return sft_update(rows, config.micro_batch_size, buckets, run.put)

    with run.loader(source, encode, count=config.batch_size, make=make, position=stage.position) as loader:
        for step in run.log.steps("sft", stage.start, steps):
            phases = Phases()
            with phases("data"):
                update = loader.take()
            with phases("train"):
                metrics = stage.update(update.batches)[0] | update.padding
            if faults := not_finite(metrics):
                questions = [{"source": row.source, "row": row.row} for row in update.rows]
                stage.guards.skipped(step, faults, questions, metrics)
            metrics |= {"rows_filtered": source.filtered, "rows_dropped": loader.dropped}
            stage.finish_step(step, metrics, phases, update.tokens, loader.position)
    heldout(run, stage, step=steps)
    return stage.finish().params
