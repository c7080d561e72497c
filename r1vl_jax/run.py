"""What both stages stand on: the run's model, processor, log and scorers, a stage's state, the held-out judgement."""

from __future__ import annotations

import dataclasses
import time
from functools import cached_property, partial
from pathlib import Path

import jax
import numpy as np

from r1vl_jax import config as configs
from r1vl_jax.checkpoint.state import StageCheckpoints
from r1vl_jax.checkpoint.store import find_model, load_model
from r1vl_jax.config import Config, OptimizerSection, SourceSection
from r1vl_jax.data.batching import ExampleStream, collate_prompts
from r1vl_jax.data.sources import read_examples
from r1vl_jax.judge import Paid, reward_metrics, rollout_rows, start_judging
from r1vl_jax.model.config import load_config
from r1vl_jax.model.qwen2_vl import cast
from r1vl_jax.model.spec import num_params, param_spec
from r1vl_jax.optim import (
    abstract_state,
    gradient_step,
    init_state,
    make_optimizer,
    make_schedule,
    make_update,
    trained_parts,
)
from r1vl_jax.parallel.sharding import ROLLOUT_RULES, batch_shards, param_shardings, put_batch
from r1vl_jax.processing.processor import Processor
from r1vl_jax.report import plot_metrics
from r1vl_jax.rewards import ScorerPool
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.runlog import Phases, RunLog
from r1vl_jax.types import Prompts, RowError, Sampling, TrainState


class Run:
    """What both stages need: configuration, mesh, model, processor, log, scorers. Holds no training state."""

    def __init__(self, config: Config, log: RunLog, pool: ScorerPool, mesh):
        self.config, self.log, self.pool, self.mesh = config, log, pool, mesh
        self.started_from = Path(config.model.path)
        self.files = find_model(self.started_from).files
        self.model = load_config(self.files)
        self.spec = param_spec(self.model)
        self.shardings = param_shardings(self.spec, mesh)
        self.processor = Processor.from_folder(self.files)
        self.paid = Paid.from_config(config.rl)
        log.say(
            f"{self.started_from}: {num_params(self.model) / 1e6:.1f}M parameters; {mesh.devices.size} "
            f"{jax.devices()[0].platform} device(s), mesh {dict(mesh.shape)}; compute in {config.model.dtype}"
        )

    def load_weights(self, folder: Path, dtype: str):
        return load_model(folder, dtype=dtype, shardings=lambda _: self.shardings)[0]

    @cached_property
    def rollout_weights(self):
        """fp32 masters -> the rollout's copy in the dtype of the computation, gathered once an update."""
        shardings = param_shardings(self.spec, self.mesh, ROLLOUT_RULES[self.config.mesh.rollout_weights])
        return jax.jit(partial(cast, dtype=self.config.model.dtype), out_shardings=shardings)

    def stream(self, source: SourceSection) -> ExampleStream:
        examples, errors = read_examples(source.path, image_root=source.image_root)
        for error in errors:
            self.drop(error)
        if not examples:
            raise RowError(f"{source.path}: no usable row among {len(errors)}")
        dropped = {f"{source.path}, unread {number}" for number in range(len(errors))}
        return ExampleStream(examples, self.config.seed, dropped=dropped, on_drop=self.drop)

    def drop(self, error: RowError) -> None:
        self.log.say(f"dropped: {error}")

    def processor_for(self, stage: configs.SFTSection | configs.RLSection) -> Processor:
        spec = dataclasses.replace(self.processor.image_spec, min_pixels=stage.min_pixels, max_pixels=stage.max_pixels)
        return dataclasses.replace(self.processor, image_spec=spec)

    def collate(self, encoded) -> Prompts:
        return collate_prompts(
            encoded,
            pad_multiple=self.config.data.pad_multiple,
            shards=batch_shards(self.mesh),
            merge=self.model.vision.merge_size,
        )

    def sample(self, weights, rows, sampling: Sampling, *, group: int, step: int, first: int = 0):
        """`group` answers to each row: (tokens, logprobs, mask) as NumPy arrays (B, group, T).

        The random numbers of a row are fixed by its place in the step, from `first` on, and not by its place in the
        file: a question may come twice in a step.
        """
        prompts = put_batch(self.collate([encoded for _, encoded in rows]), self.mesh)
        row_ids = np.arange(first, first + len(rows), dtype=np.uint32)
        answers = rollout(
            weights, self.model, prompts, row_ids,
            group=group, sampling=sampling, stop_ids=self.processor.stop_ids, seed=self.config.seed, step=step,
        )  # fmt: skip
        return jax.device_get(answers)

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


class Stage:
    """A stage's optimizer, state and checkpoints: starts from given weights, or where a run was cut off."""

    def __init__(
        self, run: Run, name: str, config: OptimizerSection, steps: int, stream: ExampleStream, params, resume
    ):
        self.run, self.name, self.steps, self.stream = run, name, steps, stream
        self.parts = trained_parts(config)
        self.schedule = make_schedule(config, steps)
        optimizer = make_optimizer(config, steps, run.spec)
        layout = abstract_state(optimizer, self.parts, run.spec, run.shardings, run.mesh)
        self.update = make_update(optimizer, layout)
        self.checkpoints = StageCheckpoints(run.log.folder / "checkpoints" / name, run.config.checkpoint.keep)
        latest = self.checkpoints.latest
        if resume and latest is not None:
            self.state, host = self.checkpoints.restore(latest, layout)
            stream.position, stream.dropped = host["position"], set(host["dropped"])
            run.log.say(f"{name}: resumed after step {latest} of {steps}")
        else:
            params = run.load_weights(run.started_from, "float32") if params is None else params
            self.state = init_state(params, optimizer, self.parts, layout)
        self.start = int(self.state.step)
        self.host = self._host_state()
        run.log.forget_after(name, self.start)

    def _host_state(self) -> dict:
        return {"position": self.stream.position, "dropped": sorted(self.stream.dropped)}

    def step(self, batches, loss_fn) -> dict[str, float]:
        config = self.run.config.model
        self.state, metrics = gradient_step(
            self.state, batches,
            update=self.update, loss_fn=loss_fn, parts=self.parts, dtype=config.dtype, mesh=self.run.mesh,
        )  # fmt: skip
        return jax.device_get(metrics)

    def pass_step(self) -> dict[str, float]:
        """Counts a step that has nothing to learn from: parameters and moments stay."""
        self.state = self.state.replace(step=self.state.step + 1)
        return {}

    def finish_step(self, step: int, metrics: dict[str, float], phases: Phases, tokens: int) -> None:
        """Logs a step; writes a checkpoint and the plot where one is due."""
        log, every = self.run.log, self.run.config.checkpoint.every
        values = {
            **metrics,
            "learning_rate": self.schedule(step - 1),
            "rows_dropped": len(self.stream.dropped),
            "tokens_per_second": tokens / max(phases.total, 1e-9),
            **phases.metrics(),
        }
        log.metrics(self.name, step, values)
        shown = {"reward", "correct", "loss", "kl", "length", "tokens_per_second"}
        log.show(**{key: value for key, value in values.items() if key in shown})
        self.host = self._host_state()
        if step % every == 0 or step == self.steps:
            self.save(step)
            plot_metrics(log.folder)

    def save(self, step: int) -> None:
        """Writes the checkpoint of the last finished step, unless it is there."""
        if step > 0 and step != self.checkpoints.latest:
            self.checkpoints.save(step, self.state, self.host)

    def finish(self) -> TrainState:
        self.checkpoints.close()
        return self.state


def heldout(run: Run, state: TrainState, stage: str, step: int) -> None:
    """Judges the held-out rows greedily, one answer each; writes means to metrics.jsonl and says them."""
    config = run.config.eval
    if not config.rows or run.log.judged(stage, step):  # judged already: the run was resumed behind it
        return
    started = time.perf_counter()
    stream = run.stream(run.config.data.heldout)
    processor = run.processor_for(run.config.rl)
    rows = []
    for example in stream.examples[: config.rows]:
        try:
            rows.append((example, processor.encode_prompt(example, max_tokens=run.config.data.max_prompt_tokens)))
        except RowError as error:
            run.drop(error)
    if not rows:
        raise RowError(f"{run.config.data.heldout.path}: no usable row among the first {config.rows}")
    sampling = Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)
    weights, judged = run.rollout_weights(state.params), []
    for i in range(0, len(rows), config.batch_size):
        part = rows[i : i + config.batch_size]
        filled = part + [part[-1]] * (config.batch_size - len(part))  # one shape for all batches
        answers = run.sample(weights, filled, sampling, group=1, step=0)
        answers = jax.tree.map(lambda a: a[: len(part)], answers)  # noqa: B023 (called at once)
        judged += run.start_judging(part, answers, stage=stage, step=step, event="heldout")()
    means = reward_metrics(judged)
    dropped = min(config.rows, len(stream.examples)) - len(rows) + len(stream.dropped)
    run.log.metrics(stage, step, {"event": "heldout", "rows": len(rows), "rows_dropped": dropped, **means})
    run.log.say(
        f"held out, {len(rows)} rows, {stage} step {step}: reward {means['reward']:.3f}, answers right "
        f"{means['correct']:.1%}, valid {means['validity']:.1%}, key steps {means['key_steps']:.1%} "
        f"({time.perf_counter() - started:.0f} s)"
    )
