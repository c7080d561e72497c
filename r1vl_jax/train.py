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
from functools import partial
from pathlib import Path

import jax
import numpy as np

from r1vl_jax import config as configs
from r1vl_jax.checkpoint.hf import save_hf
from r1vl_jax.checkpoint.store import find_model
from r1vl_jax.config import Config, ConfigError
from r1vl_jax.data.batching import ExampleStream, collate_answers
from r1vl_jax.data.sources import without_reflection
from r1vl_jax.judge import Paid, correct, reward_metrics, rewards_by_step, token_steps
from r1vl_jax.model.config import CheckpointError, load_config
from r1vl_jax.model.qwen2_vl import answer_logprobs
from r1vl_jax.model.spec import param_spec
from r1vl_jax.parallel.sharding import batch_shards, make_mesh, param_shardings, put_batch
from r1vl_jax.processing.processor import Processor
from r1vl_jax.quickstart import make_shapes
from r1vl_jax.report import heldout_table, plot_metrics
from r1vl_jax.rewards import ScorerPool
from r1vl_jax.rewards.user import RewardError
from r1vl_jax.run import Run, Stage, heldout
from r1vl_jax.runlog import Phases, RunLog
from r1vl_jax.sft.loss import sft_loss, token_weights
from r1vl_jax.step_grpo.advantages import gate_rewards, shaped_only, step_advantages, teaches, token_advantages
from r1vl_jax.step_grpo.loss import answer_weights, step_grpo_loss
from r1vl_jax.types import RowError, Sampling, TrainBatch


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


@dataclasses.dataclass(frozen=True)
class Groups:
    """Questions with their judged answers; arrays are NumPy and as long as the longest answer may be."""

    rows: list
    judged: list
    tokens_BGT: np.ndarray
    mask_BGT: np.ndarray
    ref_logprobs_BGT: np.ndarray
    advantage_BGT: np.ndarray
    reward_BG: np.ndarray
    teaches_B: np.ndarray
    shaped_B: np.ndarray

    @staticmethod
    def concatenate(parts: list[Groups]) -> Groups:
        fields = [[getattr(part, field.name) for part in parts] for field in dataclasses.fields(Groups)]
        return Groups(*(sum(f, []) if isinstance(f[0], list) else np.concatenate(f) for f in fields))


class StepGRPO:
    """Stage 2 (R1-VL, section 3.3): answers sampled, judged, and turned into batches with their advantages."""

    def __init__(self, run: Run, stream: ExampleStream, reference):
        config, model = run.config.rl, run.model
        self.run, self.config, self.stream, self.reference = run, config, stream, reference
        self.processor = run.processor_for(config)
        self.sampling = Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
        scored = {"temperature": config.temperature, "forbidden": model.vision_ids}
        self.ref_logprobs = jax.jit(lambda params, *batch: answer_logprobs(params, model, *batch, **scored)[0])

    def sample(self, weights, step: int, phases: Phases) -> Groups:
        """The next questions with their answers; under `zero_variance: resample`, more for those that do not teach."""
        parts = []
        more = self.config.max_resamples if self.config.zero_variance == "resample" else 0
        while not parts or (
            len(parts) <= more and sum(p.teaches_B.sum() for p in parts) < self.config.questions_per_step
        ):
            parts.append(self._sample_once(weights, step, len(parts) * self.config.questions_per_step, phases))
        return Groups.concatenate(parts)

    def _sample_once(self, weights, step: int, first: int, phases: Phases) -> Groups:
        run, config = self.run, self.config
        with phases("data"):
            rows = self.stream.take(config.questions_per_step, self._encode)
        with phases("rollout"):
            answers = run.sample(weights, rows, self.sampling, group=config.group_size, step=step, first=first)
        by_step = config.advantage == "step"
        scores = run.start_judging(rows, answers, by_step=by_step, stage="step_grpo", step=step)
        with phases("reference"):  # while the scorers work
            ref_logprobs = self._under_reference(rows, answers)
        with phases("score"):
            judged = scores()
        outcome_BGK, shaping_BGK, mask_BGK = rewards_by_step(judged, run.paid, by_step=by_step)
        rewards_BGK = gate_rewards(outcome_BGK, shaping_BGK, correct(judged), config.gate)
        advantages_BGK = step_advantages(rewards_BGK, mask_BGK, scale=config.scale, std_floor=config.std_floor)
        return Groups(
            rows,
            judged,
            answers.tokens_BGT,
            answers.mask_BGT,
            ref_logprobs,
            advantage_BGT=token_advantages(advantages_BGK, token_steps(judged, config.max_new_tokens)),
            reward_BG=rewards_BGK.sum(axis=2),
            teaches_B=teaches(advantages_BGK),
            shaped_B=shaped_only(outcome_BGK, advantages_BGK),
        )

    def _encode(self, example):
        return self.processor.encode_prompt(example, max_tokens=self.run.config.data.max_prompt_tokens)

    def _under_reference(self, rows, answers) -> np.ndarray:
        """Log-probabilities of answers under the reference, 0 behind the longest one."""
        micro, length = self.config.micro_batch_size, self._used(answers.mask_BGT)
        found = []
        for i in range(0, len(rows), micro):
            prompts = self.run.collate([encoded for _, encoded in rows[i : i + micro]])
            batch = put_batch((prompts, answers.tokens_BGT[i : i + micro, :, :length]), self.run.mesh)
            found.append(self.ref_logprobs(self.reference, *batch))
        unused = answers.mask_BGT.shape[2] - length
        return np.pad(np.concatenate(jax.device_get(found)), ((0, 0), (0, 0), (0, unused)))

    def _used(self, mask_BGT: np.ndarray) -> int:
        """The longest answer's length, up to the padding multiple."""
        multiple = self.run.config.data.pad_multiple
        return min(mask_BGT.shape[2], -(-int(mask_BGT.any(axis=(0, 1)).sum()) // multiple) * multiple)

    def batches(self, groups: Groups):
        """Micro-batches of the groups that count; a last one that they do not fill is filled with weight 0."""
        config, length = self.config, self._used(groups.mask_BGT)
        counts_B = groups.teaches_B | (config.zero_variance == "keep")
        counts_B &= np.cumsum(counts_B) <= config.questions_per_step
        weights_BGT = answer_weights(groups.mask_BGT, answers=max(1, counts_B.sum()) * config.group_size)
        weights_BGT *= counts_B[:, None, None]
        order = np.argsort(~counts_B, kind="stable")
        for i in range(0, max(1, counts_B.sum()), config.micro_batch_size):
            part = order[i : i + config.micro_batch_size]
            prompts = self.run.collate([groups.rows[b][1] for b in part])
            arrays = (groups.tokens_BGT, weights_BGT, groups.advantage_BGT, groups.ref_logprobs_BGT)
            batch = TrainBatch(prompts, *(array[part, :, :length] for array in arrays))
            yield put_batch(batch, self.run.mesh)


def step_grpo(run: Run, params, resume: bool):
    """Stage 2: StepGRPO. Returns the trained fp32 parameters."""
    config = run.config.rl
    stream = run.stream(run.config.data.rl)
    stage = Stage(run, "step_grpo", config.optimizer, config.steps, stream, params, resume)
    warm = _warm_up_folder(run) if "sft" in run.config.stages else run.started_from
    grpo = StepGRPO(run, stream, reference=run.load_weights(warm, run.config.model.dtype))
    if stage.start == 0 and run.config.stages[0] == "step_grpo":
        heldout(run, stage.state, "step_grpo", 0)
    loss_fn = partial(
        step_grpo_loss, cfg=run.model, temperature=config.temperature, beta=config.beta, remat=run.config.model.remat
    )
    for step in run.log.steps("step_grpo", stage.start, config.steps):
        phases = Phases()
        weights = run.rollout_weights(stage.state.params)
        try:
            groups = grpo.sample(weights, step, phases)
        except RewardError:  # of a user's function: what has been trained is kept
            stage.save(step - 1)
            stage.finish()
            run.log.say(f"step_grpo: saved after step {step - 1}; --resume goes on from there")
            raise
        del weights
        with phases("train"):
            teaches = groups.teaches_B.any() or config.zero_variance == "keep"
            metrics = stage.step(grpo.batches(groups), loss_fn) if teaches else stage.pass_step()
        metrics |= reward_metrics(groups.judged)
        metrics["group_std"] = groups.reward_BG.std(axis=1, ddof=1).mean()
        metrics["zero_variance"] = 1 - groups.teaches_B.mean()
        metrics["shaping_alone"] = groups.shaped_B.mean()
        metrics["questions"] = len(groups.rows)
        stage.finish_step(step, metrics, phases, int(groups.mask_BGT.sum()))
    heldout(run, stage.state, "step_grpo", config.steps)
    return stage.finish().params


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
        if "step_grpo" in config.stages or config.eval.rows:
            Paid.from_config(config.rl)
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
    except (ConfigError, CheckpointError, RowError, RewardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
