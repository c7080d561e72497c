"""Holds one stage of a run: its programs, train state and checkpoints; logs the end of each step."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from r1vl_jax.checkpoint.state import StageCheckpoints
from r1vl_jax.common.text import one_line
from r1vl_jax.data.loader import Position
from r1vl_jax.errors import CheckpointError
from r1vl_jax.reporting.curves import plot_metrics
from r1vl_jax.training.context import Run
from r1vl_jax.training.programs import build_programs, gradient_step
from r1vl_jax.training.run_folder import Phases
from r1vl_jax.types import TrainBatch, TrainState

SHOWN = {"reward", "correct", "loss", "kl", "length", "tokens_per_second"}  # metrics shown beside the progress bar


class Stage:
    """One stage of a run, started from given weights or resumed from its newest checkpoint.

    The attribute `finished` is the number of finished steps, and `position` is where the loader of the stage's rows
    continues after them.

    Args:
      name: sft or step_grpo.
      steps: the number of steps of the stage.
      params: fp32 parameters; None: those of the checkpoint that the run starts from.
      micro_batches: the maximum number of micro-batches per update.
      updates: the number of updates per step; state.step counts updates.
    """

    def __init__(
        self, run: Run, name: str, steps: int, params: Any, resume: bool, *, micro_batches: int, updates: int = 1
    ) -> None:
        self.run, self.name, self.steps, self.updates, self.position = run, name, steps, updates, Position()
        # On several devices always accumulate: the buffer has the parameters' sharding.
        self.use_buffer = micro_batches > 1 or run.model.mesh.size > 1
        self.programs = build_programs(run.model.config, run.model.mesh, run.config, name, steps * updates)
        self.checkpoints = StageCheckpoints(
            run.log.folder / "checkpoints" / name, run.config.checkpoint.keep, run.log.say
        )
        restored = self.checkpoints.restore(self.programs.layout) if resume else None
        if restored is not None:
            self.start, self.state = restored.step, restored.state
            self.position = Position.from_json(restored.position)
            run.log.say(f"{name}: resumed after step {self.start} of {steps}")
        else:
            self.state = self.programs.init(run.model.load_weights("float32") if params is None else params)
            self.start = 0
        self.finished = self.start
        self._saved_at = time.monotonic()
        run.log.truncate_after(name, self.start)

    @property
    def is_untrained(self) -> bool:
        """Nothing has been trained yet in this run."""
        return self.start == 0 and self.run.config.stages[0] == self.name

    def rollout_weights(self) -> Any:
        """Returns the current policy's weights, laid out for decoding."""
        return self.programs.rollout_weights(self.state.params)

    def update(self, batches: Iterable[TrainBatch]) -> dict[str, float]:
        """One update from its micro-batches. Returns the metrics."""
        self.state, metrics = gradient_step(self.programs, self.state, batches, use_buffer=self.use_buffer)
        return jax.device_get(metrics)

    def skip_step(self) -> dict[str, float]:
        """Counts a step whose groups have no signal; parameters and moments do not change. Returns no metrics."""
        self.state = dataclasses.replace(self.state, step=self.state.step + self.updates)
        return {}

    def finish_step(
        self, step: int, metrics: dict[str, float], phases: Phases, tokens: int, position: Position
    ) -> None:
        """Logs a step, and writes a checkpoint and the curves when they are due.

        Args:
          tokens: the number of tokens of the step, for tokens_per_second.
          position: the position at which the loader continues after this step.
        """
        self.finished, self.position = step, position  # first: what follows may fail, on a full disk
        log, checkpoint = self.run.log, self.run.config.checkpoint
        values = {
            **metrics,
            "learning_rate": self.programs.schedule(step * self.updates - 1),
            "tokens_per_second": tokens / max(phases.total, 1e-9),
            "compilations": self.run.compilations.count,
            **phases.metrics(),
        }
        log.metrics(self.name, step, values)
        log.show(**{key: value for key, value in values.items() if key in SHOWN})
        minutes = (time.monotonic() - self._saved_at) / 60
        if step % checkpoint.every == 0 or step == self.steps or 0 < checkpoint.minutes <= minutes:
            self.save()
            plot_metrics(log.folder)

    def save(self) -> None:
        """Writes the checkpoint of the last finished step, unless it exists."""
        if self.finished > 0 and self.finished != self.checkpoints.latest:
            self.run.log.sync()
            self.checkpoints.save(self.finished, self.state, self.position.to_json())
        self._saved_at = time.monotonic()

    @contextlib.contextmanager
    def saved_at_the_end(self) -> Iterator[None]:
        """If the block ends with an error or a signal, saves the last finished step and adds a note to the error."""
        try:
            yield
        except BaseException as error:
            try:
                if int(self.state.step) != self.finished * self.updates:
                    raise CheckpointError(f"step {self.finished + 1} had changed the state when it was interrupted")
                self.save()
                self.checkpoints.close()
            except Exception as also:  # the first error is the one to report
                saved = self.checkpoints.latest
                error.add_note(f"{self.name}: step {self.finished} could not be saved: {one_line(also)}")
            else:
                saved = self.finished
            if saved:
                error.add_note(f"{self.name}: saved after step {saved}; --resume goes on from there")
            raise

    def finish(self) -> TrainState:
        """Waits for checkpoints that are being written. Returns the state."""
        self.checkpoints.close()
        return self.state
