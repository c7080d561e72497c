"""The sections of the configuration that describe the two stages: warm-up (SFT) and StepGRPO."""

from __future__ import annotations

import dataclasses

from r1vl_jax.common.config_tree import at_least, at_most, divides, field, one_of, require
from r1vl_jax.common.limits import MAX_BATCH, MAX_PIXELS, MAX_TOKENS
from r1vl_jax.errors import ConfigError
from r1vl_jax.rewards.formats import FORMATS
from r1vl_jax.rewards.rules import PRESETS, Rules, get_rules


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    learning_rate: float = field(1e-5, "peak learning rate")
    schedule: str = field("cosine", "after the warm-up: cosine or linear to 0, or constant")
    warmup_ratio: float = field(0.03, "share of the steps in which the rate rises from 0 to its peak")
    weight_decay: float = field(0.0, "AdamW's, on matrices only")
    b2: float = field(0.999, "AdamW's second moment decay")
    max_grad_norm: float = field(1.0, "gradients are clipped to this global norm")
    first_moment: str = field("float32", "dtype of AdamW's first moment: float32, or bfloat16 to save 2 bytes a weight")
    freeze_vision: bool = field(False, "do not train the vision tower and merger")

    def __post_init__(self) -> None:
        one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        one_of("optimizer.first_moment", self.first_moment, ("float32", "bfloat16"))
        at_least("optimizer", self, learning_rate=0, weight_decay=0)
        # With these limits an update from a finite gradient cannot make a weight or a moment overflow in fp32.
        require(self.learning_rate <= 1000, "optimizer.learning_rate", self.learning_rate, "at most 1000")
        require(0 <= self.b2 <= 0.99999, "optimizer.b2", self.b2, "0 to 0.99999")
        shrinks = self.learning_rate * self.weight_decay <= 1
        require(shrinks, "optimizer.weight_decay", self.weight_decay, "at most 1 / learning_rate")
        require(0 <= self.warmup_ratio <= 1, "optimizer.warmup_ratio", self.warmup_ratio, "0 to 1")
        bounded = 0 < self.max_grad_norm <= 1e12
        require(bounded, "optimizer.max_grad_norm", self.max_grad_norm, "more than 0 and at most 1e12")


@dataclasses.dataclass(frozen=True)
class SFTSection:
    epochs: float = field(2.0, "passes over the data; not used where steps is set")
    steps: int | None = field(None, "number of updates")
    batch_size: int = field(128, "rows per update")
    micro_batch_size: int = field(8, "rows per micro-batch, over all devices")
    min_pixels: int = field(3136, "smaller images are enlarged to this")
    max_pixels: int = field(589_824, "larger images are shrunk to this")
    max_answer_tokens: int = field(2048, "rows with longer answers are dropped and named")
    optimizer: OptimizerSection = field(OptimizerSection, "")

    def __post_init__(self) -> None:
        at_least("sft", self, steps=1, batch_size=1, micro_batch_size=1, max_answer_tokens=1, min_pixels=1)
        at_least("sft", self, max_pixels=max(784, self.min_pixels))
        at_most("sft", self, batch_size=MAX_BATCH, max_answer_tokens=MAX_TOKENS, max_pixels=MAX_PIXELS)
        require(self.epochs > 0, "sft.epochs", self.epochs, "more than 0")
        divides("sft.batch_size", self.batch_size, "sft.micro_batch_size", self.micro_batch_size)


@dataclasses.dataclass(frozen=True)
class RLSection:
    steps: int = field(13_125, "number of steps")
    questions_per_step: int = field(16, "questions per step")
    group_size: int = field(4, "answers sampled per question (M)")
    micro_batch_size: int = field(4, "questions per micro-batch, over all devices")
    temperature: float = field(1.2, "temperature of sampling and of the trained log-probabilities")
    top_p: float = field(1.0, "nucleus sampling; 1 keeps every token. Never taken from the checkpoint")
    top_k: int = field(0, "top-k sampling; 0 keeps every token. Never taken from the checkpoint")
    max_new_tokens: int = field(1024, "longest answer, stop token included")
    rewards: tuple[str, ...] = field(
        ("step_accuracy", "step_validity"),
        "rewards that are summed: step_accuracy, step_validity, or your functions as my_module:my_reward",
    )
    reward_weights: tuple[float, ...] | None = field(None, "one weight for each of rewards; default: 1 each")
    rules: str = field("paper", f"reward rules: {', '.join(PRESETS)}")
    rule_options: dict = field(dict, "single options that differ from the preset, such as {require_answer: false}")
    format: str = field("r1vl", f"format of the answers that is rewarded: {', '.join(FORMATS)}")
    alpha: float = field(0.1, "weight of the key-step share in the accuracy reward")
    gate: str = field(
        "none",
        "step rewards count: none (always), mixed (groups with right and wrong), correct (right answers)",
    )
    advantage: str = field("trajectory", "trajectory (the paper: one an answer) or step (one a step)")
    scale: str = field("std", "advantages are divided by std (the group's), none, floor (std, or std_floor if larger)")
    std_floor: float = field(0.1, "with scale floor: the least standard deviation to divide by")
    zero_variance: str = field("keep", "groups with equal rewards: keep, skip, or resample (sample more questions)")
    max_resamples: int = field(3, "with zero_variance resample: most extra rounds of questions an update")
    beta: float = field(0.04, "weight of the KL to the frozen reference")
    reference: str = field(
        "device",
        "where the frozen reference is kept: device, host (moved to the devices once a step, which saves its memory in "
        "the update), or none: no KL is computed, and beta must be 0",
    )
    updates_per_rollout: int = field(1, "updates from the same answers; with several, ratios are clipped")
    clip_low: float = field(0.2, "with updates_per_rollout: ratios are clipped below 1 - clip_low")
    clip_high: float = field(0.2, "with updates_per_rollout: ratios are clipped above 1 + clip_high (DAPO: 0.28)")
    average: str = field("sequence", "of the loss: sequence (paper), token (DAPO), constant (Dr. GRPO: max_new_tokens)")
    truncated: str = field(
        "keep", "answers cut at max_new_tokens: keep, mask (no loss; DAPO's filter), penalty (DAPO's soft punishment)"
    )
    overlong_window: int | None = field(
        None, "with truncated penalty: the last tokens before max_new_tokens, where it grows; default: a fifth"
    )
    min_pixels: int = field(3136, "smaller images are enlarged to this")
    max_pixels: int = field(400_000, "larger images are shrunk to this")
    optimizer: OptimizerSection = field(OptimizerSection, "")

    def __post_init__(self) -> None:
        one_of("rl.rules", self.rules, tuple(PRESETS))
        one_of("rl.format", self.format, tuple(FORMATS))
        try:
            _ = self.reward_rules
        except ValueError as error:
            raise ConfigError(
                f"rl.rule_options is {self.rule_options!r}, with rules {self.rules} and format {self.format}: {error}"
            ) from None
        one_of("rl.gate", self.gate, ("none", "mixed", "correct"))
        one_of("rl.advantage", self.advantage, ("trajectory", "step"))
        one_of("rl.scale", self.scale, ("std", "none", "floor"))
        one_of("rl.zero_variance", self.zero_variance, ("keep", "skip", "resample"))
        unique = len(self.rewards) == len(set(self.rewards)) > 0
        require(unique, "rl.rewards", self.rewards, "one name or more, all different")
        if self.reward_weights is not None:
            expected = f"{len(self.rewards)} numbers, one for each of rl.rewards"
            require(len(self.reward_weights) == len(self.rewards), "rl.reward_weights", self.reward_weights, expected)
            require(any(self.reward_weights), "rl.reward_weights", self.reward_weights, "numbers that are not all 0")
        one_of("rl.reference", self.reference, ("device", "host", "none"))
        require(
            self.reference != "none" or self.beta == 0, "rl.reference", "none", "device or host, unless rl.beta is 0"
        )
        one_of("rl.average", self.average, ("sequence", "token", "constant"))
        one_of("rl.truncated", self.truncated, ("keep", "mask", "penalty"))
        require(self.std_floor > 0, "rl.std_floor", self.std_floor, "more than 0")
        at_least("rl", self, steps=1, questions_per_step=1, group_size=2, micro_batch_size=1, max_new_tokens=2)
        at_least("rl", self, alpha=0, beta=0, top_k=0, min_pixels=1, updates_per_rollout=1, clip_low=0, clip_high=0)
        at_least("rl", self, max_resamples=0, max_pixels=max(784, self.min_pixels))
        at_most("rl", self, questions_per_step=MAX_BATCH, group_size=MAX_BATCH, max_pixels=MAX_PIXELS)
        at_most("rl", self, max_new_tokens=MAX_TOKENS)
        at_least("rl", self, overlong_window=1)
        window, limit = self.overlong_window, self.max_new_tokens
        require(window is None or window <= limit, "rl.overlong_window", window, f"at most rl.max_new_tokens = {limit}")
        require(self.clip_low <= 1, "rl.clip_low", self.clip_low, "at most 1")
        require(self.temperature > 0, "rl.temperature", self.temperature, "more than 0: a group needs variety")
        require(0 < self.top_p <= 1, "rl.top_p", self.top_p, "more than 0 and at most 1")
        divides("rl.questions_per_step", self.questions_per_step, "rl.micro_batch_size", self.micro_batch_size)

    @property
    def overlong(self) -> int:
        """The number of tokens before max_new_tokens in which the penalty for long answers grows. DAPO: a fifth."""
        return self.overlong_window or max(1, self.max_new_tokens // 5)

    @property
    def reward_rules(self) -> Rules:
        """The rules of StepRAR and StepRVR, for answers in `format`."""
        return get_rules(self.rules, self.rule_options, answer_format=self.format)
