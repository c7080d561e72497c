"""Runs the baseline of both benchmarks: transformers' Qwen2-VL with generate, and a training step over answers.

`python scripts/torch_baseline.py --size 2b` does the released trainer's work, on the GPU if there is one. It samples
four answers to one question by generate. Then it runs a StepGRPO step on the answers one at a time, each after its own
copy of the prompt, with full logits, gradient checkpointing and AdamW. It is expected (not measured) to be faster than
the released trainer: one process, weights and moments in bf16, a fused AdamW. It prints one JSON row per measurement:
tokens per second, and seconds per trained answer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_common import SIZES, Size, random_advantages, random_questions, random_tokens
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


def measure(call: Callable[[], Any], repeats: int, device: str, until: float) -> dict[str, Any]:
    """Times up to `repeats` calls while the next should end before `until`; figures as in bench_common.Timing."""
    seconds = []
    while not seconds or (len(seconds) < repeats and time.monotonic() + seconds[-1] < until):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    found = {"seconds": float(np.median(seconds)), "min": min(seconds), "max": max(seconds), "repeats": len(seconds)}
    return found | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None}


def bench(size: Size, args: argparse.Namespace) -> None:
    """Runs the released trainer's step. Prints two rows: answers to one question, and the update on these answers."""
    device, until = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic() + args.seconds
    question = random_questions(size, 1, pixels=False)
    model, reference = (build(size, args.attention, device, checkpointing=trained) for trained in (True, False))
    inputs = hf_inputs(question, size.cfg.image_token_id, device)
    answers = partial(generate, reference, inputs, answers=size.group)
    answers(8)  # warms up
    half = time.monotonic() + (until - time.monotonic()) / 2
    found = measure(partial(answers, size.new), args.repeats, device, half)
    value = size.group * size.new / found["seconds"]
    print(json.dumps({"name": "torch rollout", "value": value, **found}), flush=True)

    training = TorchTraining(model, reference, full=True)
    inputs = hf_inputs(question * size.group, size.cfg.image_token_id, device)
    tokens = torch.from_numpy(random_tokens(size, 1)[0].astype(np.int64)).to(device)
    advantages = torch.from_numpy(random_advantages(1, size.group).T).to(device)
    update = partial(training.step, inputs, tokens, advantages)
    update()  # warms up
    found = measure(update, args.repeats, device, until)
    print(json.dumps({"name": "torch step", "value": found["seconds"] / size.group, **found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="2b", help="default: 2b")
    parser.add_argument("--attention", default="sdpa", help="eager, sdpa or flash_attention_2 (default: sdpa)")
    parser.add_argument("--repeats", type=int, default=5, help="the median is taken of these (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=120, help="fewer repeats where they take longer (default: 120)"
    )
    args = parser.parse_args()
    bench(SIZES[args.size], args)


if __name__ == "__main__":
    main()
