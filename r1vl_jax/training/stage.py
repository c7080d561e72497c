"""A stage's optimizer, state and checkpoints, and what it logs at the end of a step."""

from __future__ import annotations

import jax

from r1vl_jax.checkpoint.state import StageCheckpoints
from r1vl_jax.config import OptimizerSection
from r1vl_jax.data.loader import Position
from r1vl_jax.reporting.curves import plot_metrics
from r1vl_jax.training.optimizer import (
    abstract_state,
    gradient_step,
    init_state,
    make_optimizer,
    make_schedule,
    make_update,
    trained_parts,
)
from r1vl_jax.training.run import Run
from r1vl_jax.training.run_folder import Phases
from r1vl_jax.types import TrainState


class Stage:
    """Starts from given weights, or where a run was cut off: `position` is where the loader of its rows goes on.

    A step has `updates`, which state.step counts, each of at most `micro_batches`.
    """

    def __init__(
        self, run: Run, name: str, config: OptimizerSection, steps: int, params, resume: bool, *,
        micro_batches: int, updates: int = 1,
    ):  # fmt: skip
        self.run, self.name, self.steps, self.updates, self.position = run, name, steps, updates, Position()
        # On several devices a sum of gradients is made even of one: it lies as the parameters do.
        self.summed = micro_batches > 1 or run.mesh.size > 1
        self.parts = trained_parts(config)
        self.schedule = make_schedule(config, steps * updates)
        optimizer = make_optimizer(config, steps * updates, run.spec)
        layout = abstract_state(optimizer, self.parts, run.spec, run.shardings, run.mesh)
        self.update = make_update(optimizer, layout)
        self.checkpoints = StageCheckpoints(run.log.folder / "checkpoints" / name, run.config.checkpoint.keep)
        latest = self.checkpoints.latest
        if resume and latest is not None:
            self.state, host = self.checkpoints.restore(latest, layout)
            self.position = Position.from_json(host)
            run.log.say(f"{name}: resumed after step {latest} of {steps}")
            self.start = latest
        else:
            params = run.load_weights(run.started_from, "float32") if params is None else params
            self.state = init_state(params, optimizer, self.parts, layout)
            self.start = 0
        run.log.truncate_after(name, self.start)

    def step(self, batches, loss_fn) -> dict[str, float]:
        config = self.run.config.model
        self.state, metrics = gradient_step(
            self.state, batches, update=self.update, loss_fn=loss_fn, parts=self.parts, dtype=config.dtype,
            summed=self.summed,
        )  # fmt: skip
        return jax.device_get(metrics)

    def pass_step(self) -> dict[str, float]:
        """Counts a step that has nothing to learn from: parameters and moments stay."""
        self.state = self.state.replace(step=self.state.step + self.updates)
        return {}

    def finish_step(
        self, step: int, metrics: dict[str, float], phases: Phases, tokens: int, position: Position
    ) -> None:
        """Logs a step; writes a checkpoint and the plot where one is due. `position`: where the rows go on."""
        log, every = self.run.log, self.run.config.checkpoint.every
        values = {
            **metrics,
            "learning_rate": self.schedule(step * self.updates - 1),
            "tokens_per_second": tokens / max(phases.total, 1e-9),
            "compilations": self.run.compilations.count,
            **phases.metrics(),
        }
        log.metrics(self.name, step, values)
        shown = {"reward", "correct", "loss", "kl", "length", "tokens_per_second"}
        log.show(**{key: value for key, value in values.items() if key in shown})
        self.position = position
        if step % every == 0 or step == self.steps:
            self.save(step)
            plot_metrics(log.folder)

    def save(self, step: int) -> None:
        """Writes the checkpoint of the last finished step, unless it is there."""
        if step > 0 and step != self.checkpoints.latest:
            self.checkpoints.save(step, self.state, self.position.to_json())

    def finish(self) -> TrainState:
        self.checkpoints.close()
        return self.state
