"""Scores texts under several rules in worker processes, and adds scores to rows as fields."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from r1vl_jax.rewards import Rules, Score, ScorerPool


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The settings with which the lab scores texts.

    Attributes:
      rules: maps names to rules; each text is scored under all rules.
      alpha: weight of the key steps.
      workers: maximum number of worker processes.
      timeout_s: time limit of one answer, in seconds.
    """

    rules: Mapping[str, Rules]
    alpha: float
    workers: int
    timeout_s: float

    def score(self, texts: Sequence[str], solutions: Sequence[str], key_steps: Sequence[Any]) -> dict[str, list[Score]]:
        """Scores N texts. Returns, for each name of rules, a list of N scores in the order of the texts.

        Shows a progress bar on standard error.
        """
        if not texts:
            return {name: [] for name in self.rules}
        with (
            tqdm(total=len(texts) * len(self.rules), unit="row", desc="score", file=sys.stderr) as bar,
            ScorerPool(min(self.workers, len(texts)), self.timeout_s) as pool,
        ):

            def advance(_: Score) -> None:
                bar.update()

            return {
                name: pool.score(texts, solutions, key_steps, rules=rules, alpha=self.alpha, on_result=advance)
                for name, rules in self.rules.items()
            }


def score_rows(rows: Sequence[dict[str, Any]], scorer: Scorer) -> list[Score]:
    """Scores rows with single completions under the scorer's first rules. Returns one score per row."""
    name, rules = next(iter(scorer.rules.items()))
    scores = dataclasses.replace(scorer, rules={name: rules}).score(
        [row["completion"] for row in rows], [row["solution"] for row in rows], [row.get("key_steps") for row in rows]
    )
    return scores[name]


def scored_lines(rows: Sequence[dict[str, Any]], scores: Sequence[Score]) -> Iterator[str]:
    """Yields each row with the fields of its score, as a line of JSON."""
    for row, score in zip(rows, scores, strict=True):
        # The line is ASCII, because \u escapes can represent lone surrogates and UTF-8 cannot.
        yield json.dumps(row | score_fields(score)) + "\n"


def score_fields(score: Score) -> dict[str, Any]:
    """Returns the fields that a score adds to its row."""
    return {
        "accuracy": score.accuracy,
        "validity": score.validity,
        "reward": score.reward,
        "answer": score.answer,
        "expected": score.expected,
        "reason": score.reason,
        "key_steps_matched": list(score.matched),
        "key_steps_total": score.total,
        "faults": list(score.faults),
        "status": score.status,
        "note": score.note,
    }


def summary(scores: Sequence[Score], rules: str, skipped: int) -> str:
    """Summarises all scores in one line of text.

    Args:
      scores: one score per row.
      rules: the name of the rules.
      skipped: number of bad rows that were left out.
    """
    rows = max(1, len(scores))
    means = ", ".join(
        f"{name} {sum(getattr(score, name) for score in scores) / rows:.4f}"
        for name in ("accuracy", "validity", "reward")
    )
    answered = sum(score.answer is not None for score in scores) / rows
    failed = ", ".join(
        f"{sum(score.status == status for score in scores)} {status}" for status in ("timeout", "error", "crash")
    )
    noted = sum(score.status == "ok" and bool(score.note) for score in scores)  # these notes are about key steps
    text = f"{len(scores)} rows, rules {rules}: {means}; final answer found in {answered:.1%}; {failed}"
    text += f"; {noted} with missing, empty or faulty key steps" if noted else ""
    return text + (f"; {skipped} bad rows skipped" if skipped else "")
