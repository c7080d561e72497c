"""Guards of a run: skipped updates, alarms, and the certificate that sampler and trainer compute the same.

skipped      an update whose loss, gradient or rewards are not finite changes nothing (training/optimizer.py). Its
             questions are written to nonfinite.jsonl; after guards.max_skipped such steps in a row the run stops.
certificate  mismatch = |log p of the sampler - log p of the trainer| of each trained token, before a step's first
             update. The rollout and the loss compute both anyway, as log softmax(z / temperature) without the vision
             ids: top-k and top-p only choose among tokens, and do not enter. The two share weights but no program: a
             mask, position, temperature or kernel that is wrong in one of them shows.
alarms       values outside the limits of the section `guards`; a line for people when one begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from r1vl_kernels.reference_jax import K3_CUT

from r1vl_jax.config import Config
from r1vl_jax.errors import GuardError
from r1vl_jax.training.run_folder import RunLog
from r1vl_jax.types import TrainBatch

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # of the mean mismatch, by the dtype of the computation
PER_IMAGES = "mismatch/mean/images_"


def not_finite(metrics: dict[str, float]) -> list[str]:
    """Returns which of loss and gradient norm are not finite. The update program decides by the same two numbers."""
    return [name for name in ("loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0))]


def token_metrics(
    sampled_BGT: np.ndarray,
    images_B: np.ndarray,
    batches: Sequence[tuple[np.ndarray, TrainBatch]],
    logprobs: Sequence[np.ndarray],
) -> dict[str, float]:
    """Returns the mean and the largest mismatch, also by number of images in the prompt, and the tokens cut in k3.

    Args:
      sampled_BGT: the sampler's log-probabilities of all answers.
      images_B: the number of images and videos of each question.
      batches: (indices of questions, micro-batch on the host), as from rl_batches.
      logprobs: the trainer's log-probabilities of each micro-batch (B, G, t).
    """
    gaps, images, cut = [], [], 0
    for (part, batch), logprobs_BGT in zip(batches, logprobs, strict=True):
        trained_BGT = batch.weight_BGT > 0
        gap_BGT = np.abs(sampled_BGT[part, :, : trained_BGT.shape[2]] - logprobs_BGT)
        gaps.append(gap_BGT[trained_BGT])
        images.append(np.broadcast_to(images_B[part, None, None], trained_BGT.shape)[trained_BGT])
        cut += int((batch.ref_logprobs_BGT - logprobs_BGT > K3_CUT)[trained_BGT].sum())
    gap, image = np.concatenate(gaps), np.concatenate(images)
    found = {"mismatch/mean": float(gap.mean()), "mismatch/max": float(gap.max())}
    for count in np.unique(image).tolist():
        of_count = gap[image == count]
        found[f"{PER_IMAGES}{count}"] = float(of_count.mean())
        found[f"mismatch/max/images_{count}"] = float(of_count.max())
    return {**found, "kl_cut": cut}


class Guards:
    """What the guards of one stage remember between steps. They begin anew in every process, also in a resumed run.

    Attributes:
      in_row: the number of steps up to now, one after another, whose update was skipped.
    """

    def __init__(self, config: Config, log: RunLog, stage: str) -> None:
        self._config, self._log, self._stage = config, log, stage
        self.in_row = 0
        self._alarms: set[str] = set()
        self._certified = False

    @property
    def tolerance(self) -> float:
        """The largest mean mismatch that counts as rounding."""
        own = self._config.guards.mismatch
        return TOLERANCE[self._config.model.dtype] if own is None else own or math.inf

    def skipped(self, step: int, faults: list[str], questions: list[dict[str, Any]], metrics: dict[str, Any]) -> None:
        """Notes that a step's update was skipped: a row of nonfinite.jsonl, and a line for people.

        Args:
          faults: what was not finite.
          questions: source and row of each question of the step.
        """
        self.in_row += 1
        values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        where = {"stage": self._stage, "step": step, "not_finite": faults, "skipped_in_row": self.in_row}
        self._log.nonfinite({**where, "questions": questions, "metrics": {k: _plain(v) for k, v in values.items()}})
        self._log.say(
            f"{self._stage} step {step}: not finite: {', '.join(faults)}; the update was skipped ({self.in_row} in a "
            f"row, the run stops at {self._config.guards.max_skipped}); the questions are in nonfinite.jsonl"
        )

    def stop_if_stuck(self, step: int, checkpoint: str) -> None:
        """Raises GuardError after guards.max_skipped skipped steps in a row. `checkpoint`: where --resume goes on."""
        if self.in_row >= self._config.guards.max_skipped:
            raise GuardError(
                f"{self._stage} step {step}: the updates of {self.in_row} steps in a row were skipped, because loss, "
                f"gradient or rewards were not finite; see {self._log.folder / 'nonfinite.jsonl'}; {checkpoint}"
            )

    def certify(self, step: int, metrics: dict[str, float]) -> None:
        """Raises GuardError if the process's first step with a mismatch has one above the tolerance."""
        if self._certified or "mismatch/mean" not in metrics:
            return
        self._certified = True
        above = [name for name in metrics if name.startswith(PER_IMAGES) and not metrics[name] <= self.tolerance]
        if above:
            raise GuardError(self._mismatch(step, above[0], metrics))

    def _mismatch(self, step: int, name: str, metrics: dict[str, float]) -> str:
        """Returns the message for a mismatch above the tolerance. `name`: the metric, which has a number of images."""
        images = int(name.removeprefix(PER_IMAGES))
        return (
            f"{self._stage} step {step}: sampler and trainer differ in the log-probabilities of sampled tokens by "
            f"{metrics[name]:.2g} on average in questions with {images} images (largest "
            f"{metrics[f'mismatch/max/images_{images}']:.2g}), expected at most {self.tolerance:g} (guards.mismatch). "
            "Likely causes: another temperature, or vision ids that only one of them masks; another attention or "
            "kernel (try model.attention xla, model.kernels reference); rounding of bfloat16; weights of the rollout "
            "that are older than the trainer's; images or positions that the checkpoint's processor makes otherwise"
        )

    def alarms(self, step: int, metrics: dict[str, float]) -> int:
        """Returns the number of alarms of a step. Says a line for each that the step before did not have."""
        guards, longest = self._config.guards, self._config.rl.max_new_tokens
        limits = {
            "kl": (guards.kl or math.inf, "guards.kl", "the policy is far from the reference"),
            "length": (guards.length * longest, "guards.length", "answers are as long as they may be"),
            "mismatch/mean": (self.tolerance, "guards.mismatch", "sampler and trainer compute different probabilities"),
        }
        now = {name for name, (limit, *_) in limits.items() if name in metrics and not metrics[name] <= limit}
        for name in sorted(now - self._alarms):
            limit, key, meaning = limits[name]
            self._log.say(
                f"alarm: {self._stage} step {step}: {name} is {metrics[name]:.3g}, above {limit:.3g} ({key}): {meaning}"
            )
        self._alarms = now
        return len(now)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int) else float(value)
