"""Runs the baseline of both benchmarks: transformers' Qwen2-VL with generate, and a training step over answers.

`Baseline` does the released trainer's work, on the GPU if there is one (stage `torch` of gpu_check.py). It samples
four answers to one question by generate. Then it runs a StepGRPO step on the answers one at a time, each after its own
copy of the prompt, with full logits, gradient checkpointing and AdamW. It is expected (not measured) to be faster than
the released trainer: one process, weights and moments in bf16, a fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_common import Size, measure, random_advantages, random_questions, random_tokens
from bench_programs import BETA, OPTIMIZER, TEMPERATURE
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from r1vl_jax.types import EncodedPrompt


def hf_inputs(questions: Sequence[EncodedPrompt], image_token_id: int, device: str = "cpu") -> dict[str, Any]:
    """Returns the keyword arguments of transformers' model for questions of one length."""
    ids = np.stack([question.tokens_T for question in questions]).astype(np.int64)
    patches = np.concatenate([question.patches_PC for question in questions])
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "mm_token_type_ids": (ids == image_token_id).astype(np.int64),
        "pixel_values": patches.astype(np.float32),
        "image_grid_thw": np.array([grid for question in questions for grid in question.grids]),
    }
    return {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}


def with_answers(inputs: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """Returns `inputs` with an answer of `tokens` (rows, length) appended to each row."""
    more = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": torch.zeros_like(tokens),
    }
    return inputs | {name: torch.cat([inputs[name], value], dim=1) for name, value in more.items()}


def generate(model, inputs: dict[str, Any], new: int, answers: int = 1) -> torch.Tensor:
    """Samples exactly `new` tokens after each row, `answers` times: (rows * answers, new)."""
    config = GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=new, num_return_sequences=answers,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    with torch.inference_mode():
        ids = model.generate(**inputs, generation_config=config)
    tokens = ids[:, inputs["input_ids"].shape[1] :]
    if tokens.shape[1] != new:
        raise RuntimeError(f"generate made {tokens.shape[1]} tokens, expected {new}")
    return tokens


def logprobs(model, inputs, tokens: torch.Tensor, forbidden: Sequence[int] = (), *, full: bool = False) -> torch.Tensor:
    """Returns log-probabilities (rows, length) of answers after prompts.

    Args:
      full: computes logits at every position, as the released trainer does.
    """
    length = tokens.shape[1]
    keep = 0 if full else length + 1
    logits = model(**with_answers(inputs, tokens), use_cache=False, logits_to_keep=keep).logits
    logits = logits[:, -length - 1 : -1].float() / TEMPERATURE
    if forbidden:
        logits[..., list(forbidden)] = -torch.inf
    return -torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


class TorchTraining:
    """A policy, its AdamW and a reference, with the StepGRPO step on rows of prompt and answer."""

    def __init__(self, policy, reference, forbidden: Sequence[int] = (), *, full: bool = False):
        self.policy, self.reference = policy.train(), reference.eval()  # no dropout: train() only for checkpointing
        self.score = partial(logprobs, forbidden=forbidden, full=full)
        rate, betas = OPTIMIZER.learning_rate, (0.9, OPTIMIZER.b2)
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), rate, betas, weight_decay=OPTIMIZER.weight_decay, fused=True
        )

    def loss(self, inputs, tokens: torch.Tensor, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (the objective, the reference's log-probabilities); `advantages` (rows, 1)."""
        with torch.inference_mode():
            ref = self.score(self.reference, inputs, tokens)
        policy = self.score(self.policy, inputs, tokens)
        ref = ref.clone()  # an inference tensor cannot be saved for the backward pass
        kl = torch.exp(ref - policy) - (ref - policy) - 1
        ratio = torch.exp(policy - policy.detach())
        return -(ratio * advantages - BETA * kl).mean(dim=1).mean(), ref

    def step(self, inputs, tokens: torch.Tensor, advantages: torch.Tensor) -> dict[str, float]:
        loss, _ = self.loss(inputs, tokens, advantages)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), OPTIMIZER.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "grad_norm": norm.item()}


def build(size: Size, attention: str, device: str, *, checkpointing: bool = False):
    """Returns a model with random weights, as transformers initialises them."""
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration._from_config(
            Qwen2VLConfig(**size.raw), dtype=getattr(torch, size.dtype), attn_implementation=attention
        )
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.eval()


class Baseline:
    """The released trainer's step: answers to one question, and the update on these answers."""

    def __init__(self, size: Size, attention: str = "sdpa"):
        self.size, self.device = size, "cuda" if torch.cuda.is_available() else "cpu"
        self.question = random_questions(size, 1, pixels=False)
        self.model, self.reference = (
            build(size, attention, self.device, checkpointing=trained) for trained in (True, False)
        )

    def rollout(self, repeats: int, until: float) -> dict[str, Any]:
        inputs = hf_inputs(self.question, self.size.cfg.image_token_id, self.device)
        answers = partial(generate, self.reference, inputs, answers=self.size.group)
        row = self._measure(partial(answers, self.size.new), repeats, until, warm_up=partial(answers, 8))
        return {"value": self.size.group * self.size.new / row["seconds"], "unit": "tokens/s", **row}

    def step(self, repeats: int, until: float) -> dict[str, Any]:
        size, group = self.size, self.size.group
        training = TorchTraining(self.model, self.reference, full=True)
        inputs = hf_inputs(self.question * group, size.cfg.image_token_id, self.device)
        tokens = torch.from_numpy(random_tokens(size, 1)[0].astype(np.int64)).to(self.device)
        advantages = torch.from_numpy(random_advantages(1, group).T).to(self.device)
        row = self._measure(partial(training.step, inputs, tokens, advantages), repeats, until)
        return {"value": row["seconds"] / group, "unit": "s an answer", **row}

    def _measure(self, call: Callable[[], Any], repeats: int, until: float, **options: Any) -> dict[str, Any]:
        on_gpu = self.device == "cuda"

        def finished() -> None:
            call()
            if on_gpu:
                torch.cuda.synchronize()

        row = measure(finished, repeats, until, **options).as_json()
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
        return row | {"card": torch.cuda.get_device_name() if on_gpu else "cpu", "peak_gb": peak}
