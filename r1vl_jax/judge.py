"""Sampled answers judged: their texts, scores and lengths, as metrics and as rows of rollouts.jsonl."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from r1vl_jax.processing.processor import Processor
from r1vl_jax.rewards import Score, ScorerPool
from r1vl_jax.types import Example, Rollout


@dataclasses.dataclass(frozen=True)
class Judged:
    """One answer: what it says, what it earns, how long it is, whether it was cut off before a stop token."""

    text: str
    score: Score
    tokens: int
    truncated: bool


def judge(
    examples: list[Example], answers: Rollout, processor: Processor, pool: ScorerPool, *, rules: str, alpha: float
) -> list[list[Judged]]:
    """Decodes and scores G answers to each of B questions (NumPy arrays (B, G, T)): B lists of G."""
    G = answers.tokens_BGT.shape[1]
    owners = [example for example in examples for _ in range(G)]
    rows = [tokens[mask] for tokens, mask in zip(*map(_rows, (answers.tokens_BGT, answers.mask_BGT)), strict=True)]
    texts = [processor.decode(tokens) for tokens in rows]
    solutions, key_steps = [owner.answer for owner in owners], [owner.key_steps for owner in owners]
    scores = pool.score(texts, solutions, key_steps, rules=rules, alpha=alpha)
    judged = [
        Judged(text, score, len(tokens), not np.isin(tokens, processor.stop_ids).any())
        for text, score, tokens in zip(texts, scores, rows, strict=True)
    ]
    return [judged[i : i + G] for i in range(0, len(judged), G)]


def _rows(array_BGT: np.ndarray) -> np.ndarray:
    return array_BGT.reshape(-1, array_BGT.shape[-1])


def rewards(judged: list[list[Judged]]) -> np.ndarray:
    """Rewards (B, G)."""
    return np.array([[answer.score.reward for answer in group] for group in judged])


def reward_metrics(judged: list[list[Judged]]) -> dict[str, float]:
    """Means over all answers; scoring_failures and key_step_faults (no key steps to find, say) are counts."""
    flat = [answer for group in judged for answer in group]
    scores, lengths = [answer.score for answer in flat], [answer.tokens for answer in flat]

    def mean(name: str) -> float:
        return float(np.mean([float(getattr(score, name)) for score in scores]))

    return {
        "reward": mean("reward"),
        "accuracy": mean("accuracy"),
        "validity": mean("validity"),
        "correct": mean("correct"),
        "key_steps": mean("k"),
        "no_answer": float(np.mean([score.answer is None for score in scores])),
        "length": float(np.mean(lengths)),
        "length_max": float(max(lengths)),
        "truncated": float(np.mean([answer.truncated for answer in flat])),
        "scoring_failures": sum(score.status != "ok" for score in scores),
        "key_step_faults": sum(score.status == "ok" and bool(score.note) for score in scores),
    }


def rollout_rows(examples: list[Example], judged: list[list[Judged]], **where: Any) -> list[dict[str, Any]]:
    """Rows of rollouts.jsonl, one a question; `where` (stage, step) stands at the head of each."""
    return [
        {
            **where,
            "source": example.source,
            "row": example.row,
            "images": list(example.images),
            "question": example.question,
            "solution": example.answer,
            "key_steps": None if example.key_steps is None else {"Steps": [list(group) for group in example.key_steps]},
            "answers": [_answer_row(answer) for answer in group],
        }
        for example, group in zip(examples, judged, strict=True)
    ]


def _answer_row(answer: Judged) -> dict[str, Any]:
    score = dataclasses.asdict(answer.score)
    return {"text": answer.text, **score, "tokens": answer.tokens, "truncated": answer.truncated}
