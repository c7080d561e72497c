"""Holds the objects that every stage of a run uses (configuration, model, run folder, scorers) and loads its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np

from r1vl_jax.config import Config, SourceSection
from r1vl_jax.data.batching import PLANNED_ROWS, Size, plan_shapes
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.data.loader import Loader, Position, read_rows
from r1vl_jax.data.sources import Source, open_source
from r1vl_jax.errors import RowError
from r1vl_jax.inference.open_model import OpenModel
from r1vl_jax.parallel.sharding import batch_shards, put_batch
from r1vl_jax.rewards import ScorerPool
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.training.judging import RewardSpec
from r1vl_jax.training.programs import Compilations
from r1vl_jax.training.run_folder import RunLog
from r1vl_jax.training.run_record import record_data
from r1vl_jax.training.signals import Signals
from r1vl_jax.types import Example, Prompts, Rollout, Sampling


@dataclasses.dataclass(frozen=True)
class Run:
    """The objects that all stages of a run share; the training state is in Stage.

    Attributes:
      model: the opened checkpoint that the run starts from.
      reward: the rewards that are summed, with their weights.
      pool: the worker processes that score answers.
      signals: holds back SIGTERM and others while the state changes.
    """

    config: Config
    model: OpenModel
    reward: RewardSpec
    log: RunLog
    pool: ScorerPool
    compilations: Compilations
    signals: Signals

    def source(self, section: SourceSection) -> Source:
        """Opens a stage's rows; logs its notes and the unusable rows. Raises RowError if no row is usable."""
        source = open_source(section)
        record_data(self.log.folder, source)
        for note in source.notes:
            self.log.say(note)
        for error in source.errors:
            self.drop(error)
        if source.filtered:
            self.log.say(f"{source.name}: {source.filtered} rows left out by drop_matching, {len(source)} kept")
        if not len(source):
            raise RowError(f"{source.name}: no usable row among {len(source.errors) + source.filtered}")
        return source

    def drop(self, error: RowError) -> None:
        """Logs a row that is not used."""
        self.log.say(f"dropped: {error}")

    def loader(
        self,
        source: Source,
        encode: Callable[[Example], Any],
        *,
        count: int,
        make: Callable[[list[Any]], Any],
        position: Position,
    ) -> Loader:
        """Returns a loader of batches of `count` encoded rows, each passed through `make` (see data.loader)."""
        return Loader(
            source, encode, count=count, seed=self.config.seed, make=make, position=position,
            workers=self.config.data.workers, on_drop=self.drop,
        )  # fmt: skip

    def first_sizes(self, source: Source, encode: Callable[[Example], Any], size: Callable[[Any], Size]) -> list[Size]:
        """Returns the sizes of the first rows (at most PLANNED_ROWS) that training will see, to plan batch shapes from.

        Reads the source in training's shuffled order and leaves out rows that cannot be used. Raises RowError if none
        can.

        Args:
          encode: encodes a row, as for `loader`.
          size: returns the Size of an encoded row.
        """
        with closing(read_rows(source, lambda example: size(encode(example)), seed=self.config.seed)) as rows:
            first = [row for _, row in islice(rows, min(PLANNED_ROWS, len(source)))]
        sizes = [row[1] for row in first if not isinstance(row, RowError)]
        if not sizes:
            raise RowError(f"{source.name}: no usable row among the {len(first)} that were read; the first: {first[0]}")
        return sizes

    def plan(self, batches: Sequence[Sequence[Size]], *, count: int) -> Buckets:
        """Plans at most `count` batch shapes from sample batches that all have the same number of rows."""
        return plan_shapes(
            batches, count=count, multiple=self.config.data.pad_multiple,
            merge=self.model.config.vision.merge_size, shards=batch_shards(self.model.mesh),
        )  # fmt: skip

    def put(self, batch: Any) -> Any:
        """Places a host batch on the devices, its questions split over them."""
        return put_batch(batch, self.model.mesh)

    def sample(
        self, weights: Any, prompts: Prompts, sampling: Sampling, *, group: int, step: int, first: int = 0
    ) -> Rollout:
        """Samples `group` answers to each question. Returns NumPy arrays (B, group, T).

        A question's random numbers depend on its index in the step, not on its row in the file, because a question may
        occur twice in a step.

        Args:
          first: the index in the step of the first question of `prompts`.
        """
        row_ids = np.arange(first, first + len(prompts.next_position_B), dtype=np.uint32)
        return rollout(
            weights, self.model.config, prompts, row_ids, group=group, sampling=sampling,
            stop_ids=self.model.processor.stop_ids, seed=self.config.seed, step=step,
        )  # fmt: skip
