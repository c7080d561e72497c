"""Runs stage 1 (R1-VL, section 3.1): cross-entropy on chain-of-thought answers, from rows to a trained policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from r1vl_jax.data.batching import in_micro_batches, size_of
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.data.sources import Source
from r1vl_jax.training.context import Run
from r1vl_jax.training.guards import not_finite
from r1vl_jax.training.heldout import heldout
from r1vl_jax.training.micro_batches import SFTUpdate, sft_update
from r1vl_jax.training.run_folder import Phases
from r1vl_jax.training.stage import Stage
from r1vl_jax.types import Example


class SFTPlan(NamedTuple):
    """The rows of the stage, how they are encoded, the shapes to which batches are padded, the number of updates."""

    source: Source
    encode: Callable[[Example], Any]
    buckets: Buckets
    updates: int


def plan_sft(run: Run) -> SFTPlan:
    """Opens the rows of the stage, and plans its shapes from the first of them. Raises RowError."""
    config, data = run.config.sft, run.config.data
    source = run.source(data.sft)
    encode = partial(
        run.model.processor.for_stage(config, data).encode_pair,
        max_tokens=data.max_prompt_tokens,
        max_answer_tokens=config.max_answer_tokens,
    )
    sizes = run.first_sizes(source, encode, lambda pair: size_of(*pair))
    buckets = run.plan(in_micro_batches(sizes, config.batch_size, config.micro_batch_size), count=data.buckets)
    run.log.say(f"sft: rows are padded to {buckets}")
    return SFTPlan(
        source, encode, buckets, config.steps or max(1, math.ceil(config.epochs * len(source) / config.batch_size))
    )


def sft(run: Run, plan: SFTPlan, params: Any, resume: bool) -> Any:
    """Trains on question and answer rows. Returns the fp32 parameters.

    Args:
      plan: from `plan_sft`.
      params: the parameters to start from; None: those of the run's checkpoint.
      resume: continue from the stage's newest checkpoint, if there is one.
    """
    config = run.config.sft
    source, encode, buckets, steps = plan
    micro_batches = config.batch_size // config.micro_batch_size
    stage = Stage(run, "sft", steps, params, resume, micro_batches=micro_batches)
    if stage.is_untrained:
        heldout(run, stage, step=0)

    def make(rows: list[Any]) -> SFTUpdate:
        return sft_update(rows, config.micro_batch_size, buckets, run.put)

    loader = run.loader(source, encode, count=config.batch_size, make=make, position=stage.position)
    with stage.saved_at_the_end(), loader:
        for step in run.log.steps("sft", stage.start, steps):
            phases = Phases()
            with phases("data"):
                update = loader.take()
            with run.signals.hold():
                with phases("train"):
                    metrics = stage.update(update.batches)[0] | update.padding
                if faults := not_finite(metrics):
                    questions = [{"source": row.source, "row": row.row} for row in update.rows]
                    stage.guards.skipped(step, faults, questions, metrics)
                metrics |= {"rows_filtered": source.filtered, "rows_dropped": loader.dropped}
                stage.finish_step(step, metrics, phases, update.tokens, loader.position)
    heldout(run, stage, step=steps)
    return stage.finish().params
