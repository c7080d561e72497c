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
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from r1vl_kernels.step_group_advantage import step_group_advantage

from r1vl_jax import config as configs
from r1vl_jax.checkpoint.hf import save_hf
from r1vl_jax.checkpoint.store import find_model
from r1vl_jax.config import Config
from r1vl_jax.data.batching import by_length, collate_pairs, collate_prompts, in_micro_batches, padding, size_of
from r1vl_jax.data.buckets import bucket
from r1vl_jax.data.loader import Loader
from r1vl_jax.data.sources import Source, check_source
from r1vl_jax.errors import CheckpointError, ConfigError, RewardError, RowError
from r1vl_jax.model import backend
from r1vl_jax.model.answers import answer_logprobs
from r1vl_jax.model.config import load_config
from r1vl_jax.model.qwen2_vl import cast
from r1vl_jax.model.spec import param_spec
from r1vl_jax.parallel.sharding import batch_shards, make_mesh, param_shardings, per_shard
from r1vl_jax.processing.processor import Processor
from r1vl_jax.reporting.curves import heldout_table, plot_metrics
from r1vl_jax.rewards import ScorerPool
from r1vl_jax.sft.loss import sft_loss, token_weights
from r1vl_jax.shapes.folder import make_shapes
from r1vl_jax.step_grpo.advantages import gate_rewards, has_signal, shaped_only
from r1vl_jax.step_grpo.loss import Objective, answer_weights, step_grpo_loss
from r1vl_jax.training.heldout import heldout
from r1vl_jax.training.judging import RewardSpec, correct, reward_metrics, rewards_by_step, token_steps
from r1vl_jax.training.run import Compilations, Run, enable_compilation_cache
from r1vl_jax.training.run_folder import Phases, RunLog
from r1vl_jax.training.stage import Stage
from r1vl_jax.types import Prompts, Sampling, TrainBatch

ANSWER_UNIT = 128  # answers of a training batch are padded to multiples of it


@dataclasses.dataclass(frozen=True)
class Update:
    """What one SFT update sees: its micro-batches, on the device, their tokens, and how much of them is padding."""

    batches: list[TrainBatch]
    tokens: int
    padding: dict[str, float]


def sft(run: Run, params, resume: bool):
    """Stage 1: cross-entropy on chain-of-thought answers. Returns the trained fp32 parameters."""
    config, data = run.config.sft, run.config.data
    source = run.source(data.sft)
    steps = config.steps or max(1, math.ceil(config.epochs * len(source) / config.batch_size))
    parts = config.batch_size // config.micro_batch_size
    stage = Stage(run, "sft", config.optimizer, steps, params, resume, micro_batches=parts)
    if stage.start == 0 and run.config.stages[0] == "sft":
        heldout(run, stage.state, "sft", 0)
    encode = partial(
        run.processor.for_stage(config, data.video).encode_pair,
        max_tokens=data.max_prompt_tokens,
        max_answer_tokens=config.max_answer_tokens,
    )
    sizes = run.look_ahead(source, encode, lambda pair: size_of(*pair))
    batches = in_micro_batches(sizes, config.batch_size, config.micro_batch_size)
    buckets = run.plan(batches, count=data.buckets)
    run.log.say(f"sft: rows are padded to {buckets}")
    loss_fn = partial(sft_loss, cfg=run.model, remat=run.config.model.remat)

    def make(rows) -> Update:
        pairs = [pair for _, pair in rows]
        total = sum(len(answer) for _, answer in pairs)
        parts = by_length(pairs, config.micro_batch_size, lambda pair: size_of(*pair))
        batches = []
        for part in parts:
            rows_B, start_B, tokens, mask = collate_pairs(part, buckets)
            batches.append(TrainBatch(rows_B, tokens, token_weights(mask, total), start_B=start_B))
        tokens = sum(size_of(*pair).tokens for pair in pairs)
        return Update([run.put(batch) for batch in batches], tokens, padding([batch.prompts for batch in batches]))

    with run.loader(source, encode, count=config.batch_size, make=make, position=stage.position) as loader:
        for step in run.log.steps("sft", stage.start, steps):
            phases = Phases()
            with phases("data"):
                update = loader.take()
            with phases("train"):
                metrics = stage.step(update.batches, loss_fn) | update.padding
            metrics |= {"rows_filtered": source.filtered, "rows_dropped": loader.dropped}
            stage.finish_step(step, metrics, phases, update.tokens, loader.position)
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
    has_signal_B: np.ndarray
    shaped_B: np.ndarray

    @staticmethod
    def concatenate(parts: list[Groups]) -> Groups:
        fields = [[getattr(part, field.name) for part in parts] for field in dataclasses.fields(Groups)]
        return Groups(*(sum(f, []) if isinstance(f[0], list) else np.concatenate(f) for f in fields))


class StepGRPO:
    """Stage 2 (R1-VL, section 3.3): answers sampled, judged, and turned into batches with their advantages."""

    def __init__(self, run: Run, source: Source, reference):
        config, data, model = run.config.rl, run.config.data, run.model
        self.run, self.config, self.reference = run, config, reference
        processor = run.processor.for_stage(config, data.video)
        self.encode = partial(processor.encode_prompt, max_tokens=data.max_prompt_tokens)
        self.sampling = Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
        sizes = run.look_ahead(source, self.encode, size_of)
        questions, micro = config.questions_per_step, config.micro_batch_size
        self.rollout_buckets, self.buckets = (
            run.plan(in_micro_batches(sizes, questions, count), count=data.buckets) for count in (questions, micro)
        )
        run.log.say(f"step_grpo: prompts are padded to {self.buckets}")

        def token_logprobs(params, prompts, tokens_BGT):
            scored = {"temperature": config.temperature, "forbidden": model.vision_ids}
            scored["shared"] = run.config.model.shared_prefix
            return answer_logprobs(cast(params, run.config.model.dtype), model, prompts, tokens_BGT, **scored)[0]

        self.token_logprobs = jax.jit(token_logprobs)
        scaled = {"scale": config.scale, "std_floor": config.std_floor, "backend": model.kernels}
        rows = ("batch", None, None)
        self.token_advantages = jax.jit(per_shard(partial(step_group_advantage, **scaled), (rows,) * 3, rows))

    def questions(self, rows) -> tuple[list, Prompts]:
        """The questions of a rollout, the short ones first, so that micro-batches are alike; and on the device."""
        (rows,) = by_length(rows, len(rows), lambda row: size_of(row[1]))
        return rows, self.run.put(collate_prompts([prompt for _, prompt in rows], self.rollout_buckets))

    def sample(self, loader: Loader, weights, step: int, phases: Phases) -> Groups:
        """The next questions with their answers; under `zero_variance: resample`, more for those that do not teach."""
        parts = []
        more = self.config.max_resamples if self.config.zero_variance == "resample" else 0
        while not parts or (
            len(parts) <= more and sum(p.has_signal_B.sum() for p in parts) < self.config.questions_per_step
        ):
            parts.append(self._sample_once(loader, weights, step, len(parts) * self.config.questions_per_step, phases))
        return Groups.concatenate(parts)

    def _sample_once(self, loader: Loader, weights, step: int, first: int, phases: Phases) -> Groups:
        run, config = self.run, self.config
        with phases("data"):
            rows, prompts = loader.take()
        with phases("rollout"):
            answers = run.sample(weights, prompts, self.sampling, group=config.group_size, step=step, first=first)
        by_step = config.advantage == "step"
        scores = run.start_judging(rows, answers, by_step=by_step, stage="step_grpo", step=step)
        with phases("reference"):  # while the scorers work
            ref_logprobs = self.logprobs(self.reference, rows, answers.tokens_BGT, answers.mask_BGT)
        with phases("score"):
            judged = scores()
        outcome_BGJ, shaping_BGJ, mask_BGJ = rewards_by_step(judged, run.paid, by_step=by_step)
        rewards_BGJ = gate_rewards(outcome_BGJ, shaping_BGJ, correct(judged), config.gate)
        advantage_BGT = self._advantages(rewards_BGJ, mask_BGJ, token_steps(judged, config.max_new_tokens))
        return Groups(
            rows,
            judged,
            answers.tokens_BGT,
            answers.mask_BGT,
            ref_logprobs,
            advantage_BGT,
            reward_BG=rewards_BGJ.sum(axis=2),
            has_signal_B=has_signal(advantage_BGT),
            shaped_B=shaped_only(outcome_BGJ, advantage_BGT),
        )

    def _advantages(self, rewards_BGJ, mask_BGJ, step_BGT) -> np.ndarray:
        """Each token's advantage in its group (B, G, T); steps are padded to powers of two, for few programs."""
        more = [(0, 0), (0, 0), (0, (1 << (mask_BGJ.shape[2] - 1).bit_length()) - mask_BGJ.shape[2])]
        rewards_BGJ, mask_BGJ = np.pad(rewards_BGJ.astype(np.float32), more), np.pad(mask_BGJ, more)
        return jax.device_get(self.token_advantages(rewards_BGJ, mask_BGJ, step_BGT.astype(np.int32)))

    def logprobs(self, params, rows, tokens_BGT, mask_BGT) -> np.ndarray:
        """Log-probabilities of answers under some parameters (B, G, T), 0 behind what a micro-batch holds."""
        found = np.zeros(tokens_BGT.shape, np.float32)
        parts = self._alike(rows, mask_BGT)
        scored = [
            self.token_logprobs(params, *self.run.put((self._collate(rows, part), tokens_BGT[part, :, :length])))
            for part, length in parts
        ]
        for (part, length), logprobs in zip(parts, scored, strict=True):
            found[part, :, :length] = jax.device_get(logprobs)
        return found

    def _alike(self, rows, mask_BGT, counts_B=None) -> list[tuple[np.ndarray, int]]:
        """(questions, answer length) of each micro-batch: alike in their longest answer, then in their prompt.

        Padding behind answers would be most of the work: where the mean is 400 of 1,024 tokens, 60% of theirs.
        Questions that do not count stand last, and fill the last micro-batch.
        """
        most = mask_BGT.shape[2]
        unit = min(ANSWER_UNIT, bucket(-(-most // 4), self.run.config.data.pad_multiple))
        longest = mask_BGT.any(axis=1).sum(axis=1)
        length_B = np.array([min(most, bucket(max(1, n), unit)) for n in longest.tolist()])
        counts_B = np.ones(len(rows), bool) if counts_B is None else counts_B
        order = np.lexsort(([size_of(row[1]).tokens for row in rows], length_B, ~counts_B))
        micro = self.config.micro_batch_size
        parts = [order[i : i + micro] for i in range(0, max(1, counts_B.sum()), micro)]
        return [(part, int(length_B[part[counts_B[part]]].max(initial=unit))) for part in parts]

    def _collate(self, rows, part: np.ndarray) -> Prompts:
        return collate_prompts([rows[b][1] for b in part], self.buckets)

    def batches(self, groups: Groups, old_logprobs_BGT: np.ndarray | None = None) -> Iterator[TrainBatch]:
        """Micro-batches of the groups that count; a last one that they do not fill is filled with weight 0."""
        config = self.config
        counts_B = groups.has_signal_B | (config.zero_variance == "keep")
        counts_B &= np.cumsum(counts_B) <= config.questions_per_step
        counted_BGT = groups.mask_BGT & counts_B[:, None, None]
        weights_BGT = answer_weights(counted_BGT, max(1, counts_B.sum()) * config.group_size, config.average)
        arrays = (groups.tokens_BGT, weights_BGT, groups.advantage_BGT, groups.ref_logprobs_BGT, old_logprobs_BGT)
        for part, length in self._alike(groups.rows, groups.mask_BGT, counts_B):
            here = jax.tree.map(lambda array: array[part, :, :length], arrays)  # noqa: B023 (called at once)
            yield TrainBatch(self._collate(groups.rows, part), *here)


def step_grpo(run: Run, params, resume: bool):
    """Stage 2: StepGRPO. Returns the trained fp32 parameters."""
    config = run.config.rl
    source = run.source(run.config.data.rl)
    updates, parts = config.updates_per_rollout, config.questions_per_step // config.micro_batch_size
    stage = Stage(
        run, "step_grpo", config.optimizer, config.steps, params, resume, micro_batches=parts, updates=updates
    )
    warm = _warm_up_folder(run) if "sft" in run.config.stages else run.started_from
    grpo = StepGRPO(run, source, reference=run.load_weights(warm, run.config.model.dtype))
    if stage.start == 0 and run.config.stages[0] == "step_grpo":
        heldout(run, stage.state, "step_grpo", 0)
    objective = Objective(config.temperature, config.beta, clip=(config.clip_low, config.clip_high))
    model = run.config.model
    loss_fn = partial(step_grpo_loss, cfg=run.model, objective=objective, remat=model.remat, shared=model.shared_prefix)
    with run.loader(
        source, grpo.encode, count=config.questions_per_step, make=grpo.questions, position=stage.position
    ) as loader:
        for step in run.log.steps("step_grpo", stage.start, config.steps):
            phases = Phases()
            weights = run.rollout_weights(stage.state.params)
            try:
                groups = grpo.sample(loader, weights, step, phases)
            except RewardError:  # of a user's function: what has been trained is kept
                stage.save(step - 1)
                stage.finish()
                run.log.say(f"step_grpo: saved after step {step - 1}; --resume goes on from there")
                raise
            del weights
            with phases("train"):
                has_signal = groups.has_signal_B.any() or config.zero_variance == "keep"
                old = None
                if has_signal and updates > 1:  # what the ratios of all updates are to
                    old = grpo.logprobs(stage.state.params, groups.rows, groups.tokens_BGT, groups.mask_BGT)
                batches = list(grpo.batches(groups, old)) if has_signal else []
                metrics = {} if has_signal else stage.pass_step()
                for _ in range(updates if has_signal else 0):
                    metrics = stage.step(map(run.put, batches), loss_fn)
            metrics |= reward_metrics(groups.judged)
            metrics |= padding([b.prompts for b in batches], [b.weight_BGT > 0 for b in batches])
            metrics["group_std"] = groups.reward_BG.std(axis=1, ddof=1).mean()
            metrics["zero_variance"] = 1 - groups.has_signal_B.mean()
            metrics["shaping_alone"] = groups.shaped_B.mean()
            metrics |= {"questions": len(groups.rows), "rows_dropped": loader.dropped}
            stage.finish_step(step, metrics, phases, int(groups.mask_BGT.sum()), loader.position)
    heldout(run, stage.state, "step_grpo", config.steps)
    return stage.finish().params


def _warm_up_folder(run: Run) -> Path:
    return run.log.folder / "warmup"


def check_inputs(config: Config):
    """Looks at everything that can be wrong before a run folder is made, or an old one removed. Returns the mesh.

    Raises ConfigError, CheckpointError, RowError or OSError naming what is wrong.
    """
    folders, files, sets, sizes = {"model.path": config.model.path}, {}, {}, {}
    if "sft" in config.stages:
        sets["data.sft"], sizes["sft.micro_batch_size"] = config.data.sft, config.sft.micro_batch_size
    if "step_grpo" in config.stages:
        sets["data.rl"], sizes["rl.micro_batch_size"] = config.data.rl, config.rl.micro_batch_size
    if config.eval.rows:
        sets["data.heldout"], sizes["eval.batch_size"] = config.data.heldout, config.eval.batch_size
    for key, section in sets.items():
        files |= {f"{key}.path": section.path} if section.path else {}
        folders |= {f"{key}.image_root": section.image_root} if section.image_root else {}
        folders |= {f"{key}.tfds_dir": section.tfds_dir} if section.tfds and section.tfds_dir else {}
    for key, path in (folders | files).items():
        if not Path(path).exists():
            raise ConfigError(f"{key}: {path}: no such {'file' if key in files else 'folder'}")
        if Path(path).resolve().is_relative_to(Path(config.output_dir).resolve()):
            raise ConfigError(f"{key}: {path} lies in output_dir {config.output_dir}, which holds what a run writes")
    for section in sets.values():
        check_source(section)
    files = find_model(config.model.path).files
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        param_shardings(param_spec(load_config(files)), mesh)
        Processor.from_folder(files)
        backend.choose(config.model.attention, config.model.kernels, dtype=config.model.dtype)
        if "step_grpo" in config.stages or config.eval.rows:
            RewardSpec.from_config(config.rl)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key, size in sizes.items():
        if size % batch_shards(mesh):
            raise ConfigError(f"{key} is {size}, expected a multiple of mesh data*fsdp = {batch_shards(mesh)}")
    return mesh


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Runs the configured stages; returns the exported Hugging Face folder."""
    enable_compilation_cache(config.compilation_cache)
    if config.shapes.dir:
        make_shapes(config.shapes)
    mesh = check_inputs(config)
    log = RunLog(config, resume=resume, overwrite=overwrite)
    export = log.folder / "export"
    pool = ScorerPool(config.scoring.workers, config.scoring.timeout)
    with pool, Compilations() as compilations, jax.set_mesh(mesh):
        run = Run(config, log, pool, mesh, compilations)
        params = None
        for name in config.stages:
            params = {"sft": sft, "step_grpo": step_grpo}[name](run, params, resume)
            last = name == config.stages[-1]
            folder = export if last else _warm_up_folder(run)
            save_hf(params, load_config(run.files), folder, source=run.files, dtype=config.model.dtype, overwrite=True)
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
