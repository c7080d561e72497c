"""What every stage stands on: the run's model, processor, log and scorers, and its rows on their way to the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1vl_jax.checkpoint.store import find_model, load_model
from r1vl_jax.config import Config, SourceSection
from r1vl_jax.data.batching import PLANNED_ROWS, Size, plan_shapes
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.data.loader import Loader, Position, read_rows
from r1vl_jax.data.sources import Source, open_source
from r1vl_jax.errors import RowError
from r1vl_jax.model.backend import choose
from r1vl_jax.model.config import load_config
from r1vl_jax.model.fused import fuse, fused_shardings
from r1vl_jax.model.qwen2_vl import cast
from r1vl_jax.model.spec import num_params, param_spec
from r1vl_jax.parallel.sharding import ROLLOUT_RULES, batch_shards, param_shardings, put_batch
from r1vl_jax.processing.processor import Processor
from r1vl_jax.rewards import ScorerPool
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.training.judging import RewardSpec, rollout_rows, start_judging
from r1vl_jax.training.run_folder import RunLog
from r1vl_jax.types import Prompts, Sampling


def enable_compilation_cache(folder: str) -> None:
    """Compiled programs are kept in a folder from run to run: `auto`, `off` or its path. JAX's own settings win."""
    if folder == "off" or jax.config.jax_compilation_cache_dir:
        return
    if folder == "auto":
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "r1vl_jax"
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


class Compilations:
    """Counts the programs that are built, or read from the folder of kept ones, while it is open: one for each shape
    of prefill, decoding, log-probabilities, gradient, update."""

    PROGRAMS = tuple(f"jit({name})" for name in ("prefill", "decode", "token_logprobs", "accumulate", "update"))

    def __init__(self):
        self.count = 0

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *exc_info) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, seconds: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and about.get("fun_name") in self.PROGRAMS:
            self.count += 1


class Run:
    """What both stages need: configuration, mesh, model, processor, log, scorers. Holds no training state."""

    def __init__(self, config: Config, log: RunLog, pool: ScorerPool, mesh, compilations: Compilations):
        self.config, self.log, self.pool, self.mesh, self.compilations = config, log, pool, mesh, compilations
        self.started_from = Path(config.model.path)
        self.files = find_model(self.started_from).files
        self.processor = Processor.from_folder(self.files)
        pixels = self.processor.image_spec
        means = choose(config.model.attention, config.model.kernels, dtype=config.model.dtype)
        self.model = load_config(self.files).with_pixels(pixels.mean, pixels.std).with_backend(*means)
        self.spec = param_spec(self.model)
        self.shardings = param_shardings(self.spec, mesh)
        self.paid = RewardSpec.from_config(config.rl)
        log.say(
            f"{self.started_from}: {num_params(self.model) / 1e6:.1f}M parameters; {mesh.devices.size} "
            f"{jax.devices()[0].platform} device(s), mesh {dict(mesh.shape)}; compute in {config.model.dtype}, "
            f"attention {self.model.attention}, kernels {self.model.kernels}"
        )

    def load_weights(self, folder: Path, dtype: str):
        return load_model(folder, dtype=dtype, shardings=lambda _: self.shardings)[0]

    @cached_property
    def rollout_weights(self):
        """fp32 masters -> the rollout's fused copy in the dtype of the computation, gathered once an update."""
        shardings = fused_shardings(self.model, self.mesh, ROLLOUT_RULES[self.config.mesh.rollout_weights])
        return jax.jit(lambda p: fuse(cast(p, self.config.model.dtype), self.model), out_shardings=shardings)

    def source(self, section: SourceSection) -> Source:
        """Opens a stage's rows; names those that cannot be used. Raises RowError where none can."""
        source = open_source(section)
        for error in source.errors:
            self.drop(error)
        if source.filtered:
            self.log.say(f"{source.name}: {source.filtered} rows left out by drop_matching, {len(source)} kept")
        if not len(source):
            raise RowError(f"{source.name}: no usable row among {len(source.errors) + source.filtered}")
        return source

    def drop(self, error: RowError) -> None:
        self.log.say(f"dropped: {error}")

    def loader(self, source: Source, encode, *, count: int, make, position: Position) -> Loader:
        """`count` encoded rows at a time, as `make` gives them (see data.loader)."""
        return Loader(
            source, encode, count=count, seed=self.config.seed, make=make, position=position,
            workers=self.config.data.workers, on_drop=self.drop,
        )  # fmt: skip

    def look_ahead(self, source: Source, encode, measure) -> list[Size]:
        """`measure(encoded)` of the first rows that training will see: what shapes are planned from."""
        with closing(read_rows(source, lambda example: measure(encode(example)), seed=self.config.seed)) as rows:
            found = [row for _, row in islice(rows, min(PLANNED_ROWS, len(source)))]
        sizes = [row[1] for row in found if not isinstance(row, RowError)]
        if not sizes:
            raise RowError(f"{source.name}: no usable row among the {len(found)} that were read; the first: {found[0]}")
        return sizes

    def plan(self, batches: Sequence[Sequence[Size]], *, count: int) -> Buckets:
        """At most `count` shapes for batches of one size, from a sample of them."""
        return plan_shapes(
            batches, count=count,
            multiple=self.config.data.pad_multiple, merge=self.model.vision.merge_size, shards=batch_shards(self.mesh),
        )  # fmt: skip

    def put(self, batch: Any) -> Any:
        return put_batch(batch, self.mesh)

    def sample(self, weights, prompts: Prompts, sampling: Sampling, *, group: int, step: int, first: int = 0):
        """`group` answers to each question: (tokens, logprobs, mask) as NumPy arrays (B, group, T).

        The random numbers of a row are fixed by its place in the step, from `first` on, and not by its place in the
        file: a question may come twice in a step.
        """
        row_ids = np.arange(first, first + len(prompts.next_position_B), dtype=np.uint32)
        return rollout(
            weights, self.model, prompts, row_ids,
            group=group, sampling=sampling, stop_ids=self.processor.stop_ids, seed=self.config.seed, step=step,
        )  # fmt: skip

    def start_judging(self, rows, answers, *, by_step: bool = False, **where):
        """Starts scoring; returns a function that waits for it and gives B lists of G judged answers.

        rollouts.jsonl then has a row a question, with `where` at its head.
        """
        examples = [example for example, _ in rows]
        finish = start_judging(examples, answers, self.processor, self.pool, self.paid, by_step=by_step)

        def judged():
            groups = finish()
            self.log.rollouts(rollout_rows(examples, groups, **where))
            return groups

        return judged
