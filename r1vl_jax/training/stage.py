"""Holds one stage of a run: its programs, train state and checkpoints; logs the end of each step."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from r1vl_jax.checkpoint.state import StageCheckpoints
from r1vl_jax.common.text import first_few, one_line
from r1vl_jax.data.loader import Position
from r1vl_jax.errors import CheckpointError, GuardError
from r1vl_jax.reporting.curves import plot_metrics
from r1vl_jax.training.context import Run
from r1vl_jax.training.guards import Guards, not_finite
from r1vl_jax.training.programs import build_programs, gradient_step, needs_buffer
from r1vl_jax.training.run_folder import Phases
from r1vl_jax.types import TrainBatch, TrainState

SHOWN = {"reward", "correct", "loss", "kl", "length", "tokens_per_second"}  # metrics shown beside the progress bar


class Stage:
    """One stage of a run, started from given weights or resumed from its newest checkpoint.

    The attribute `finished` is the number of finished steps, and `position` is where the loader of the stage's rows
    continues after them.

    Raises: CheckpointError if a weight is not finite.

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
        self.use_buffer = needs_buffer(micro_batches, run.model.mesh)
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
        if bad := self.not_finite():
            folder = run.log.folder / "checkpoints" / name / str(self.start) if self.start else run.config.model.path
            raise CheckpointError(f"{folder}: weights that are not finite: {bad}")
        self.guards, self.is_due = Guards(run.config, run.log, name), False
        run.log.truncate_after(name, self.start)

    @property
    def is_untrained(self) -> bool:
        """Nothing has been trained yet in this run."""
        return self.start == 0 and self.run.config.stages[0] == self.name

    def rollout_weights(self) -> Any:
        """Returns the current policy's weights, laid out for decoding."""
        return self.programs.rollout_weights(self.state.params)

    def update(self, batches: Iterable[TrainBatch]) -> tuple[dict[str, float], list[np.ndarray]]:
        """One update from its micro-batches. Returns (metrics, the micro-batches' log-probabilities before it).

        The metric skipped_updates is 1 if the update was skipped, because loss or gradient are not finite.
        """
        self.state, values = gradient_step(self.programs, self.state, batches, use_buffer=self.use_buffer)
        metrics = jax.device_get(values)
        logprobs = metrics.pop("logprobs_BGT")
        return {**metrics, "skipped_updates": int(bool(not_finite(metrics)))}, logprobs

    def skip_updates(self, count: int) -> None:
        """Counts updates that are not made; parameters, moments and schedule do not change."""
        self.state = dataclasses.replace(self.state, step=self.state.step + count)

    def not_finite(self) -> str:
        """Returns the names of the arrays of the train state that hold a number that is not finite, or ""."""
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(self.programs.not_finite(self.state)))
        return first_few([jax.tree_util.keystr(path, simple=True, separator=".") for path, bad in leaves if bad])

    def finish_step(
        self, step: int, metrics: dict[str, float], phases: Phases, tokens: int, position: Position
    ) -> None:
        """Logs a step, and writes a checkpoint and the curves when they are due.

        While updates are skipped no checkpoint is written, so that the last good ones are kept. One that became due is
        written after the next update that is made; the stage's last step always has one.

        Args:
          tokens: the number of tokens of the step, for tokens_per_second.
          position: the position at which the loader continues after this step.

        Raises: GuardError if a weight is not finite, or too many updates in a row were skipped.
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
        skipped, last = values.get("skipped_updates"), step == self.steps
        minutes = (time.monotonic() - self._saved_at) / 60
        self.guards.in_row = 0 if skipped == 0 else self.guards.in_row
        self.is_due |= step % checkpoint.every == 0 or 0 < checkpoint.minutes <= minutes
        if skipped or self.is_due or last:
            self._check(step)
        if last or (self.is_due and not self.guards.in_row):
            self.save()
            self.is_due = False
            plot_metrics(log.folder)

    def _check(self, step: int) -> None:
        """Raises GuardError if a weight or moment is not finite, or too many updates in a row were skipped."""
        bad = self.not_finite()
        if bad or self.guards.in_row:
            latest = self.checkpoints.latest
            checkpoint = "no checkpoint was written" if latest is None else f"--resume goes on after step {latest}"
            if bad:
                raise GuardError(f"{self.name} step {step}: not finite: {bad}; {checkpoint}")
            self.guards.stop_if_stuck(step, checkpoint)

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
            if saved := self._save_after(error):
                error.add_note(f"{self.name}: saved after step {saved}; --resume goes on from there")
            raise

    def _save_after(self, error: BaseException) -> int | None:
        """Saves the last finished step if its state is good. Returns the step of the newest checkpoint, if any."""
        try:
            if not isinstance(error, GuardError):  # a guard stops a run whose state is not good
                if int(self.state.step) != self.finished * self.updates:
                    raise CheckpointError(f"step {self.finished + 1} had changed the state when it was interrupted")
                if bad := self.not_finite():
                    raise CheckpointError(f"not finite: {bad}")
                self.save()
            self.checkpoints.close()
        except Exception as also:  # the first error is the one to report
            error.add_note(f"{self.name}: step {self.finished} could not be saved: {one_line(also)}")
        return self.checkpoints.latest

    def finish(self) -> TrainState:
        """Waits for checkpoints that are being written. Returns the state."""
        self.checkpoints.close()
        return self.state
