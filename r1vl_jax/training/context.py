"""What every stage of a run needs: configuration, model, run folder, scorers, and the loading of its rows."""

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
from r1vl_jax.types import Example, Prompts, Rollout, Sampling


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's parts; holds no training state.

    Attributes:
      model: the checkpoint that the run starts from, opened.
      reward: which rewards are summed.
      pool: the processes that score answers.
    """

    config: Config
    model: OpenModel
    reward: RewardSpec
    log: RunLog
    pool: ScorerPool
    compilations: Compilations

    def source(self, section: SourceSection) -> Source:
        """Opens a stage's rows and names those that cannot be used. Raises RowError where none can."""
        source = open_source(section)
        for error in source.errors:
            self.drop(error)
        if source.filtered:
            self.log.say(f"{source.name}: {source.filtered} rows left out by drop_matching, {len(source)} kept")
        if not len(source):
            raise RowError(f"{source.name}: no usable row among {len(source.errors) + source.filtered}")
        return source

    def drop(self, error: RowError) -> None:
        """Names a row that is not used."""
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
        """Batches of `count` encoded rows, each passed through `make` (see data.loader)."""
        return Loader(
            source, encode, count=count, seed=self.config.seed, make=make, position=position,
            workers=self.config.data.workers, on_drop=self.drop,
        )  # fmt: skip

    def first_sizes(self, source: Source, encode: Callable[[Example], Any], size: Callable[[Any], Size]) -> list[Size]:
        """The sizes of the first rows that training will see: batch shapes are planned from them."""
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
        """`group` answers to each question, as NumPy arrays (B, group, T).

        The random numbers of a question follow from its place in the step, counted from `first`, not from its place in
        the file: a question may occur twice in a step.
        """
        row_ids = np.arange(first, first + len(prompts.next_position_B), dtype=np.uint32)
        return rollout(
            weights, self.model.config, prompts, row_ids, group=group, sampling=sampling,
            stop_ids=self.model.processor.stop_ids, seed=self.config.seed, step=step,
        )  # fmt: skip
