"""python -m r1vl_jax.train --config F: the two stages of R1-VL, from questions with images to a trained checkpoint.

    sft          rows -> prompts, answers -> cross-entropy -> AdamW
    step_grpo    questions -> M answers each (rollout) -> step rewards -> group advantages -> policy gradient -> AdamW

This is the only file that imports every stage; values pass between them here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from functools import cached_property, partial
from pathlib import Path

import jax
import numpy as np

from r1vl_jax import config as configs
from r1vl_jax.checkpoint.hf import save_hf
from r1vl_jax.checkpoint.state import StageCheckpoints
from r1vl_jax.checkpoint.store import find_model, load_model
from r1vl_jax.config import Config, ConfigError, OptimizerSection, SourceSection
from r1vl_jax.data.batching import ExampleStream, collate_answers, collate_prompts
from r1vl_jax.data.sources import read_examples, without_reflection
from r1vl_jax.judge import judge, reward_metrics, rewards, rollout_rows
from r1vl_jax.model.config import CheckpointError, load_config
from r1vl_jax.model.qwen2_vl import answer_logprobs, cast
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
from r1vl_jax.parallel.sharding import ROLLOUT_RULES, batch_shards, make_mesh, param_shardings, put_batch
from r1vl_jax.processing.processor import Processor
from r1vl_jax.quickstart import make_shapes
from r1vl_jax.report import heldout_table, plot_metrics
from r1vl_jax.rewards import ScorerPool
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.runlog import Phases, RunLog
from r1vl_jax.sft.loss import sft_loss, token_weights
from r1vl_jax.step_grpo.advantages import group_advantages, zero_variance
from r1vl_jax.step_grpo.loss import answer_weights, step_grpo_loss
from r1vl_jax.types import Prompts, RowError, Sampling, TrainBatch, TrainState


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

    def sample(self, weights, rows, sampling: Sampling, *, group: int, step: int):
        """`group` answers to each row: (tokens, logprobs, mask) as NumPy arrays (B, group, T)."""
        prompts = put_batch(self.collate([encoded for _, encoded in rows]), self.mesh)
        row_ids = np.arange(len(rows), dtype=np.uint32)  # not the file's row: a question may come twice in a step
        answers = rollout(
            weights, self.model, prompts, row_ids,
            group=group, sampling=sampling, stop_ids=self.processor.stop_ids, seed=self.config.seed, step=step,
        )  # fmt: skip
        return jax.device_get(answers)

    def judge(self, rows, answers, **where):
        """B lists of G judged answers; rollouts.jsonl gets a row a question, with `where` at its head."""
        config, examples = self.config.rl, [example for example, _ in rows]
        judged = judge(examples, answers, self.processor, self.pool, rules=config.rules, alpha=config.alpha)
        self.log.rollouts(rollout_rows(examples, judged, **where))
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
        run.log.forget_after(name, self.start)

    def step(self, batches, loss_fn) -> dict[str, float]:
        config = self.run.config.model
        self.state, metrics = gradient_step(
            self.state, batches,
            update=self.update, loss_fn=loss_fn, parts=self.parts, dtype=config.dtype, mesh=self.run.mesh,
        )  # fmt: skip
        return jax.device_get(metrics)

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
        if step % every == 0 or step == self.steps:
            host = {"position": self.stream.position, "dropped": sorted(self.stream.dropped)}
            self.checkpoints.save(step, self.state, host)
            plot_metrics(log.folder)

    def finish(self) -> TrainState:
        self.checkpoints.close()
        return self.state


def sft(run: Run, params, resume: bool):
    """Stage 1: cross-entropy on chain-of-thought answers. Returns the trained fp32 parameters."""
    config, data = run.config.sft, run.config.data
    stream = run.stream(data.sft)
    rows_read = len(stream.examples)
    stream.examples = without_reflection(stream.examples)
    if rows_filtered := rows_read - len(stream.examples):
        run.log.say(f"{data.sft.path}: {rows_filtered} reflective rows left out, {len(stream.examples)} kept")
    steps = config.steps or max(1, math.ceil(config.epochs * len(stream.examples) / config.batch_size))
    stage = Stage(run, "sft", config.optimizer, steps, stream, params, resume)
    if stage.start == 0 and run.config.stages[0] == "sft":
        heldout(run, stage.state, "sft", 0)
    processor = run.processor_for(config)
    loss_fn = partial(sft_loss, cfg=run.model, remat=run.config.model.remat)

    def encode(example):
        answer = processor.encode_answer(example.answer, name=f"{example.name}, answer")
        if len(answer) > config.max_answer_tokens:
            raise RowError(f"{example.name}, answer: {len(answer)} tokens, expected at most {config.max_answer_tokens}")
        return processor.encode_prompt(example, max_tokens=data.max_prompt_tokens), answer

    def batches(rows):
        total = sum(len(answer) for _, (_, answer) in rows)
        rows = sorted(rows, key=lambda row: len(row[1][1]))  # alike in length, a micro-batch holds little padding
        for i in range(0, len(rows), config.micro_batch_size):
            part = [encoded for _, encoded in rows[i : i + config.micro_batch_size]]
            tokens, mask = collate_answers([[answer] for _, answer in part], pad_multiple=data.pad_multiple)
            yield TrainBatch(run.collate([prompt for prompt, _ in part]), tokens, token_weights(mask, total))

    for step in run.log.steps("sft", stage.start, steps):
        phases = Phases()
        with phases("data"):
            rows = stream.take(config.batch_size, encode)
        with phases("train"):
            metrics = stage.step(batches(rows), loss_fn)
        metrics["rows_filtered"] = rows_filtered
        tokens = sum(len(prompt.tokens_T) + len(answer) for _, (prompt, answer) in rows)
        stage.finish_step(step, metrics, phases, tokens)
    heldout(run, stage.state, "sft", steps)
    return stage.finish().params


def step_grpo(run: Run, params, resume: bool):
    """Stage 2: StepGRPO (R1-VL, section 3.3). Returns the trained fp32 parameters."""
    config, model = run.config.rl, run.model
    dtype, remat = run.config.model.dtype, run.config.model.remat
    stream = run.stream(run.config.data.rl)
    stage = Stage(run, "step_grpo", config.optimizer, config.steps, stream, params, resume)
    reference = run.load_weights(_warm_up_folder(run) if "sft" in run.config.stages else run.started_from, dtype)
    if stage.start == 0 and run.config.stages[0] == "step_grpo":
        heldout(run, stage.state, "step_grpo", 0)
    processor = run.processor_for(config)
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
    scored = {"temperature": config.temperature, "forbidden": model.vision_ids}
    ref_logprobs = jax.jit(lambda params, *batch: answer_logprobs(params, model, *batch, **scored)[0])
    loss_fn = partial(step_grpo_loss, cfg=model, temperature=config.temperature, beta=config.beta, remat=remat)

    def batches(rows, answers, advantages_BG):
        tokens, mask = _trimmed(answers, run.config.data.pad_multiple)
        weights = answer_weights(mask, answers=mask.shape[0] * mask.shape[1])
        advantages = np.broadcast_to(advantages_BG[:, :, None], mask.shape)
        for i in range(0, len(rows), config.micro_batch_size):
            part = slice(i, i + config.micro_batch_size)
            prompts = run.collate([encoded for _, encoded in rows[part]])
            batch = put_batch(TrainBatch(prompts, tokens[part], weights[part], advantages[part]), run.mesh)
            yield batch.replace(ref_logprobs_BGT=ref_logprobs(reference, batch.prompts, batch.tokens_BGT))

    for step in run.log.steps("step_grpo", stage.start, config.steps):
        phases = Phases()
        with phases("data"):
            rows = stream.take(
                config.questions_per_step,
                lambda example: processor.encode_prompt(example, max_tokens=run.config.data.max_prompt_tokens),
            )
        with phases("rollout"):
            weights = run.rollout_weights(stage.state.params)
            answers = run.sample(weights, rows, sampling, group=config.group_size, step=step)
            del weights
        with phases("score"):
            judged = run.judge(rows, answers, stage="step_grpo", step=step)
            rewards_BG = rewards(judged)
        with phases("train"):
            metrics = stage.step(batches(rows, answers, group_advantages(rewards_BG)), loss_fn)
        metrics |= reward_metrics(judged)
        metrics["group_std"] = rewards_BG.std(axis=1, ddof=1).mean()
        metrics["zero_variance"] = zero_variance(rewards_BG).mean()
        stage.finish_step(step, metrics, phases, int(answers.mask_BGT.sum()))
    heldout(run, stage.state, "step_grpo", config.steps)
    return stage.finish().params


def _trimmed(answers, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask without the columns that no answer uses, up to the padding multiple."""
    used = int(answers.mask_BGT.any(axis=(0, 1)).sum())
    length = min(answers.mask_BGT.shape[-1], -(-used // multiple) * multiple)
    return answers.tokens_BGT[..., :length], answers.mask_BGT[..., :length]


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
        judged += run.judge(part, answers, stage=stage, step=step, event="heldout")
    means = reward_metrics(judged)
    dropped = min(config.rows, len(stream.examples)) - len(rows) + len(stream.dropped)
    run.log.metrics(stage, step, {"event": "heldout", "rows": len(rows), "rows_dropped": dropped, **means})
    run.log.say(
        f"held out, {len(rows)} rows, {stage} step {step}: reward {means['reward']:.3f}, answers right "
        f"{means['correct']:.1%}, valid {means['validity']:.1%}, key steps {means['key_steps']:.1%} "
        f"({time.perf_counter() - started:.0f} s)"
    )


def _warm_up_folder(run: Run) -> Path:
    return run.log.folder / "warmup"


def check_inputs(config: Config):
    """Looks at everything that can be wrong before a run folder is made, or an old one removed. Returns the mesh.

    Raises ConfigError, CheckpointError or OSError naming what is wrong.
    """
    needed = {"model.path": config.model.path}
    sizes = {}
    if "sft" in config.stages:
        needed["data.sft.path"], sizes["sft.micro_batch_size"] = config.data.sft.path, config.sft.micro_batch_size
    if "step_grpo" in config.stages:
        needed["data.rl.path"], sizes["rl.micro_batch_size"] = config.data.rl.path, config.rl.micro_batch_size
    if config.eval.rows:
        needed["data.heldout.path"], sizes["eval.batch_size"] = config.data.heldout.path, config.eval.batch_size
    for key, path in needed.items():
        if not Path(path).exists():
            raise ConfigError(f"{key}: {path}: no such {'folder' if key == 'model.path' else 'file'}")
        if Path(path).resolve().is_relative_to(Path(config.output_dir).resolve()):
            raise ConfigError(f"{key}: {path} lies in output_dir {config.output_dir}, which holds what a run writes")
    files = find_model(config.model.path).files
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        param_shardings(param_spec(load_config(files)), mesh)
        Processor.from_folder(files)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key, size in sizes.items():
        if size % batch_shards(mesh):
            raise ConfigError(f"{key} is {size}, expected a multiple of mesh data*fsdp = {batch_shards(mesh)}")
    return mesh


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Runs the configured stages; returns the exported Hugging Face folder."""
    if config.shapes.dir:
        make_shapes(config.shapes)
    mesh = check_inputs(config)
    log = RunLog(config, resume=resume, overwrite=overwrite)
    export = log.folder / "export"
    with ScorerPool(config.scoring.workers, config.scoring.timeout) as pool, jax.set_mesh(mesh):
        run = Run(config, log, pool, mesh)
        params = None
        for name in config.stages:
            params = {"sft": sft, "step_grpo": step_grpo}[name](run, params, resume)
            last = name == config.stages[-1]
            folder = export if last else _warm_up_folder(run)
            save_hf(params, run.model, folder, source=run.files, dtype=config.model.dtype, overwrite=True)
    if table := heldout_table(log.folder):
        log.say(table)
    log.say(f"done: checkpoint for Hugging Face in {export}, curves in {plot_metrics(log.folder)}")
    return export


def _parser() -> argparse.ArgumentParser:
    keys = "\n".join(f"  --{key} {default!r}\n        {text}" for key, default, text in configs.describe())
    parser = argparse.ArgumentParser(
        prog="python -m r1vl_jax.train",
        description=__doc__.splitlines()[0].split(": ", 1)[1],
        epilog=f"keys of the configuration, each also an override on the command line (with its default):\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="remove the run folder and start anew")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit code: 2 where the input is wrong, 130 where it was interrupted."""
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        train(configs.load(arguments.config, overrides), resume=arguments.resume, overwrite=arguments.overwrite)
    except (ConfigError, CheckpointError, RowError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
