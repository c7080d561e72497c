"""Runs stage 2: StepGRPO (R1-VL, arXiv 2503.12937, section 3.3). In each step:

sample       M answers per question from the policy                           rollout/
score        StepRAR + StepRVR, step by step                                  rewards/, training/judging.py
gate         choice of the step rewards that count                            step_grpo/advantages.py
advantage    reward to go against the mean of the group, for each token       kernels/step_group_advantage.py
update       policy gradient with a KL to the reference, in micro-batches     step_grpo/loss.py, training/programs.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from r1vl_jax.config import RLSection
from r1vl_jax.data.batching import collate_prompts, in_micro_batches, padding, size_of
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.data.loader import Loader
from r1vl_jax.data.sources import Source
from r1vl_jax.rewards.length import overlong_penalty
from r1vl_jax.step_grpo.advantages import gate_rewards, has_signal, shaped_only
from r1vl_jax.training.context import Run
from r1vl_jax.training.guards import not_finite, token_metrics
from r1vl_jax.training.heldout import heldout
from r1vl_jax.training.judging import (
    correct,
    reward_faults,
    reward_metrics,
    rewards_by_step,
    rollout_rows,
    start_scoring,
    token_steps,
    truncated,
)
from r1vl_jax.training.micro_batches import (
    Batching,
    Groups,
    Question,
    answer_unit,
    batched_logprobs,
    rl_batches,
)
from r1vl_jax.training.run_folder import Phases
from r1vl_jax.training.stage import Stage
from r1vl_jax.types import EncodedPrompt, Example, Prompts, Rollout, Sampling, TrainBatch


@dataclasses.dataclass(frozen=True)
class StepGRPO:
    """The objects that all steps share.

    Attributes:
      reference: the frozen parameters, in the dtype of the computation; None: there is no KL.
    """

    run: Run
    stage: Stage
    reference: Any
    batching: Batching

    @property
    def config(self) -> RLSection:
        return self.run.config.rl

    @np.errstate(invalid="ignore", over="ignore")  # rewards that are not finite are named
    def step(self, loader: Loader, step: int) -> None:
        """Runs one step of the algorithm.

        Raises: GuardError if this is the first step, and sampler and trainer compute different probabilities.
        """
        phases = Phases()
        groups = self.sample(loader, step, phases)
        faults = reward_faults(groups.scored)
        with self.run.signals.hold():
            with phases("train"):
                updates = self.config.updates_per_rollout
                batches, metrics = self.skip(updates=updates) if faults else self.update(groups)
            metrics |= self.metrics(groups, batches) | {"rows_dropped": loader.dropped}
            guards = self.stage.guards
            if faults := faults or not_finite(metrics):
                guards.skipped(step, faults, question_rows(groups), metrics)
            else:
                guards.certify(step, metrics)
            metrics["alarms"] = guards.alarms(step, metrics)
            self.stage.finish_step(step, metrics, phases, int(groups.mask_BGT.sum()), loader.position)

    def metrics(self, groups: Groups, batches: list[TrainBatch]) -> dict[str, float]:
        """Returns what a step's metrics say about its answers and groups."""
        metrics = reward_metrics(groups.scored)
        metrics |= padding([b.prompts for b in batches], [b.weight_BGT > 0 for b in batches])
        metrics["group_std"] = groups.reward_BG.std(axis=1, ddof=1).mean()
        metrics["zero_variance"] = 1 - groups.has_signal_B.mean()
        metrics["shaping_alone"] = groups.shaping_alone_B.mean()
        return metrics | {"questions": len(groups.questions)}

    def sample(self, loader: Loader, step: int, phases: Phases) -> Groups:
        """Samples and scores answers to the next questions.

        With `zero_variance: resample`, samples further questions until enough groups have a signal, in at most
        1 + max_resamples rounds.
        """
        config, weights, parts = self.config, self.stage.rollout_weights(), []
        rounds = 1 + (config.max_resamples if config.zero_variance == "resample" else 0)
        for number in range(rounds):
            first = number * config.questions_per_step
            parts.append(self.sample_once(loader, weights, step, first, phases))
            if sum(part.has_signal_B.sum() for part in parts) >= config.questions_per_step:
                break
        return Groups.concatenate(parts)

    def sample_once(self, loader: Loader, weights: Any, step: int, first: int, phases: Phases) -> Groups:
        """Samples, scores, gates and computes advantages. `first`: index of the first question in this step."""
        run, config, by_step = self.run, self.config, self.config.advantage == "step"
        with phases("data"):
            questions, prompts = loader.take()
        with phases("rollout"):
            answers = run.sample(weights, prompts, sampling(config), group=config.group_size, step=step, first=first)
        examples = [example for example, _ in questions]
        penalty = partial(overlong_penalty, limit=config.max_new_tokens, window=config.overlong)
        wait_for_scores = start_scoring(
            examples, answers, run.model.processor, run.pool, run.reward, by_step=by_step,
            overlong=penalty if config.truncated == "penalty" else None,
        )  # fmt: skip
        with phases("reference"):  # while the worker processes score
            ref_logprobs_BGT = self.reference_logprobs(questions, answers)
        with phases("score"):
            scored = wait_for_scores()
            run.log.rollouts(rollout_rows(examples, scored, stage="step_grpo", step=step))
        outcome_BGJ, shaping_BGJ, mask_BGJ = rewards_by_step(scored, run.reward, by_step=by_step)
        rewards_BGJ = gate_rewards(outcome_BGJ, shaping_BGJ, correct(scored), config.gate)
        advantage_BGT = self.advantages(rewards_BGJ, mask_BGJ, token_steps(scored, config.max_new_tokens))
        masked_BG = truncated(scored) & (config.truncated == "mask")
        trained_BGT = answers.mask_BGT & ~masked_BG[..., None]
        return Groups(
            questions, scored, answers.tokens_BGT, answers.mask_BGT, trained_BGT, answers.logprobs_BGT,
            ref_logprobs_BGT, advantage_BGT, reward_BG=rewards_BGJ.sum(axis=2),
            has_signal_B=has_signal(np.where(trained_BGT, advantage_BGT, 0.0)),
            shaping_alone_B=shaped_only(outcome_BGJ, advantage_BGT),
        )  # fmt: skip

    def skip(self, updates: int) -> tuple[list[TrainBatch], dict[str, float]]:
        """Makes no update because rewards are not finite. Returns (no micro-batches, metrics)."""
        self.stage.skip_updates(updates)
        return [], {"skipped_updates": updates}

    def update(self, groups: Groups) -> tuple[list[TrainBatch], dict[str, float]]:
        """Runs the step's updates of the policy. Returns (micro-batches, metrics of the last update)."""
        config, updates = self.config, self.config.updates_per_rollout
        some = groups.has_signal_B.any() or (config.zero_variance == "keep" and groups.trained_BGT.any())
        if not some:
            self.stage.skip_updates(updates)
            return [], {}
        old_logprobs_BGT = None
        if updates > 1:  # all updates take ratios to the policy that sampled
            params = self.stage.state.params
            old_logprobs_BGT = self.logprobs(params, groups.questions, groups.tokens_BGT, groups.mask_BGT)
        batches = list(
            rl_batches(
                groups, self.batching, max_questions=config.questions_per_step, keep_all=config.zero_variance == "keep",
                average=config.average, old_logprobs_BGT=old_logprobs_BGT,
            )
        )  # fmt: skip
        images_B = np.array([len(prompt.grids) for _, prompt in groups.questions])
        metrics, certificate = {}, {}
        for number in range(updates):
            metrics, logprobs = self.stage.update(self.run.put(batch) for _, batch in batches)
            tokens = token_metrics(groups.logprobs_BGT, images_B, batches, logprobs)
            certificate = certificate or tokens  # of the policy that sampled, before the first update
            metrics |= certificate | {"kl_cut": tokens["kl_cut"]}
            if self.reference is None:
                del metrics["kl"], metrics["kl_cut"]
            if metrics["skipped_updates"]:  # the same answers would be skipped again
                self.stage.skip_updates(updates - number - 1)
                metrics["skipped_updates"] = updates - number
                break
        return [batch for _, batch in batches], metrics

    def advantages(self, rewards_BGJ: np.ndarray, mask_BGJ: np.ndarray, step_BGT: np.ndarray) -> np.ndarray:
        """Returns each token's advantage (B, G, T). J is padded to a power of two, so few programs are compiled."""
        J = mask_BGJ.shape[2]
        more = [(0, 0), (0, 0), (0, (1 << (J - 1).bit_length()) - J)]
        rewards_BGJ, mask_BGJ = np.pad(rewards_BGJ.astype(np.float32), more), np.pad(mask_BGJ, more)
        return jax.device_get(self.stage.programs.advantages(rewards_BGJ, mask_BGJ, step_BGT.astype(np.int32)))

    def reference_logprobs(self, questions: list[Question], answers: Rollout) -> np.ndarray:
        """Returns log-probabilities of answers under the reference, (B, G, T); without one, those of the sampler."""
        if self.reference is None:
            return answers.logprobs_BGT  # the loss's KL to them has the weight 0
        reference = jax.device_put(self.reference, self.run.model.shardings)  # from the host, if it is there
        return self.logprobs(reference, questions, answers.tokens_BGT, answers.mask_BGT)

    def logprobs(
        self, params: Any, questions: list[Question], tokens_BGT: np.ndarray, mask_BGT: np.ndarray
    ) -> np.ndarray:
        """Returns log-probabilities of answers under `params`, (B, G, T)."""
        program = self.stage.programs.token_logprobs
        return batched_logprobs(program, params, self.batching, questions, tokens_BGT, mask_BGT)


class StepGRPOPlan(NamedTuple):
    """The questions of the stage, how they are encoded, the shapes of prompts in rollouts and in micro-batches, and the
    number of updates."""

    source: Source
    encode: Callable[[Example], EncodedPrompt]
    rollout_buckets: Buckets
    buckets: Buckets
    updates: int


def plan_step_grpo(run: Run) -> StepGRPOPlan:
    """Opens the questions of the stage, and plans its shapes from the first of them. Raises RowError."""
    config, data = run.config.rl, run.config.data
    source = run.source(data.rl)
    encode = partial(run.model.processor.for_stage(config, data).encode_prompt, max_tokens=data.max_prompt_tokens)
    sizes = run.first_sizes(source, encode, size_of)
    rollout_buckets, buckets = (
        run.plan(in_micro_batches(sizes, config.questions_per_step, count), count=data.buckets)
        for count in (config.questions_per_step, config.micro_batch_size)
    )
    run.log.say(f"step_grpo: prompts are padded to {buckets}")
    return StepGRPOPlan(source, encode, rollout_buckets, buckets, config.steps * config.updates_per_rollout)


def step_grpo(run: Run, plan: StepGRPOPlan, params: Any, resume: bool) -> Any:
    """Trains the policy with StepGRPO. Returns the fp32 parameters.

    Args:
      plan: from `plan_step_grpo`.
      params: the parameters to start from; None: those of the run's checkpoint.
      resume: continue from the stage's newest checkpoint, if there is one.
    """
    config = run.config.rl
    source, encode, rollout_buckets, buckets, _ = plan
    stage = Stage(
        run, "step_grpo", config.steps, params, resume,
        micro_batches=config.questions_per_step // config.micro_batch_size, updates=config.updates_per_rollout,
    )  # fmt: skip
    reference = load_reference(run)
    unit = answer_unit(config.max_new_tokens, run.config.data.pad_multiple)
    grpo = StepGRPO(run, stage, reference, Batching(config.micro_batch_size, buckets, unit, run.put))
    if stage.is_untrained:
        heldout(run, stage, step=0)

    def make(questions: list[Question]) -> tuple[list[Question], Prompts]:
        """A rollout's questions, the short ones first, and on the device."""
        questions = sorted(questions, key=lambda question: size_of(question[1]).tokens)
        return questions, run.put(collate_prompts([prompt for _, prompt in questions], rollout_buckets))

    loader = run.loader(source, encode, count=config.questions_per_step, make=make, position=stage.position)
    with stage.saved_at_the_end(), loader:
        for step in run.log.steps("step_grpo", stage.start, config.steps):
            grpo.step(loader, step)
    heldout(run, stage, step=config.steps)
    return stage.finish().params


def load_reference(run: Run) -> Any:
    """Loads the parameters after the warm-up, to the devices or to the host; None if the stage has no reference."""
    if run.config.rl.reference == "none":
        return None
    start = warm_up_folder(run) if "sft" in run.config.stages else run.model.folder
    reference = run.model.load_weights(run.config.model.dtype, start)
    if run.config.rl.reference == "host":
        host = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), run.model.shardings)
        reference = jax.device_put(reference, host)
    return reference


def sampling(config: RLSection) -> Sampling:
    """Returns how the stage samples answers."""
    return Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)


def question_rows(groups: Groups) -> list[dict[str, Any]]:
    """Returns the source and row of each question, and the rewards of its answers."""
    return [
        {"source": example.source, "row": example.row, "rewards": [r if np.isfinite(r) else str(r) for r in rewards]}
        for (example, _), rewards in zip(groups.questions, groups.reward_BG.tolist(), strict=True)
    ]


def warm_up_folder(run: Run) -> Path:
    """Returns the folder to which the parameters after the warm-up are exported: the reference of StepGRPO."""
    return run.log.folder / "warmup"
