"""Lists the data sets that the configured stages read, and the batches that the stages make of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from r1vl_jax.config import Config, RLSection, SFTSection
from r1vl_jax.data.batching import PLANNED_ROWS, Size, in_micro_batches, plan_shapes
from r1vl_jax.data_check.records import Part, Plan
from r1vl_jax.processing.images import ImageSpec


def parts(config: Config, spec: ImageSpec) -> list[Part]:
    """Returns the data sets of a configuration. `spec`: image settings of the checkpoint."""
    sft, rl, heldout, data = config.sft, config.rl, config.eval, config.data

    def plan(name: str, batches: Callable[[list[Size]], list[list[Size]]], *, count: int = data.buckets) -> Plan:
        shapes = partial(plan_shapes, count=count, multiple=data.pad_multiple, merge=spec.merge_size, shards=1)
        return Plan(name, batches, shapes)

    result = []
    if "sft" in config.stages:
        batches = partial(in_micro_batches, update=sft.batch_size, count=sft.micro_batch_size)
        budgets = _budgets(config, spec, "sft", sft, "sft.max_answer_tokens", sft.max_answer_tokens)
        plans = (plan("sft", batches),)
        result += [Part("data.sft", data.sft, sft, plans, PLANNED_ROWS, budgets, sft.max_answer_tokens)]
    if "step_grpo" in config.stages:
        plans = tuple(
            plan(name, partial(in_micro_batches, update=rl.questions_per_step, count=count))
            for name, count in (("rollout", rl.questions_per_step), ("step_grpo", rl.micro_batch_size))
        )
        budgets = _budgets(config, spec, "rl", rl, "rl.max_new_tokens", rl.max_new_tokens)
        result += [Part("data.rl", data.rl, rl, plans, PLANNED_ROWS, budgets)]
    if heldout.rows:
        plans = (plan("held out", partial(_filled, count=heldout.batch_size), count=1),)
        budgets = _budgets(config, spec, "rl", rl, "eval.max_new_tokens", heldout.max_new_tokens)
        result += [Part("data.heldout", data.heldout, rl, plans, heldout.rows, budgets, limit=heldout.rows)]
    return result


def _budgets(
    config: Config, spec: ImageSpec, name: str, stage: SFTSection | RLSection, answer_key: str, answer_tokens: int
) -> dict[str, dict[str, int]]:
    """Returns the limits for each series of numbers. Each limit has the name of its key in the configuration.

    Args:
      name, stage: name and value of the section with the pixel budget.
      answer_key, answer_tokens: name and value of the token limit of an answer.
    """
    return {
        "prompt_tokens": {"data.max_prompt_tokens": config.data.max_prompt_tokens},
        "image_tokens": {f"image tokens at {name}.max_pixels": stage.max_pixels // spec.factor**2},
        "answer_tokens": {answer_key: answer_tokens},
        "pixels": {f"{name}.min_pixels": stage.min_pixels, f"{name}.max_pixels": stage.max_pixels},
    }


def _filled(sizes: list[Size], count: int) -> list[list[Size]]:
    """Makes batches as the held-out evaluation does: in order, with the last batch filled up with its last row."""
    batches = [sizes[i : i + count] for i in range(0, len(sizes), count)]
    return [batch + batch[-1:] * (count - len(batch)) for batch in batches]
