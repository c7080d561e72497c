"""Scores every reference solution against itself, to find questions that no answer can get right."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from r1vl_jax.config import Config
from r1vl_jax.data.sources import Source
from r1vl_jax.data_check.records import Record, Unreachable
from r1vl_jax.errors import RowError
from r1vl_jax.rewards import Score, ScorerPool
from r1vl_jax.rewards.formats import FORMATS


def unreachable(source: Source, records: Sequence[Record], config: Config) -> list[Unreachable]:
    """Returns the questions whose own solution earns no accuracy by the rules of `rl`.

    The solution is scored as it is, and if it earns nothing, what the reward takes for its answer is scored in the
    format of answers: a solution may be less than a whole answer, or have another format.

    Args:
      records: the records of the source's first examples, in order. Those that training drops are left out.
    """
    rows: list[tuple[int, str]] = []
    for index, record in enumerate(tqdm(records, desc="solutions", unit="row", delay=2, leave=False, file=sys.stderr)):
        if not record.reason:
            try:
                rows.append((record.row, source[index].answer))
            except RowError:  # the file was damaged in the meantime
                continue
    with ScorerPool(config.scoring.workers, config.scoring.timeout) as pool:
        first = _failing(pool, {text: text for _, text in rows}, config)
        ending = FORMATS[config.rl.format].ending
        left = _failing(pool, {solution: ending(first[solution].expected) for solution in first}, config)
    return [Unreachable(row, first[text].expected, _why(first[text])) for row, text in rows if text in left]


def _failing(pool: ScorerPool, answers: dict[str, str], config: Config) -> dict[str, Score]:
    """Scores an answer to each solution. Returns the scores that have no accuracy."""
    solutions, rules = [*answers], config.rl.reward_rules
    with tqdm(total=len(answers), desc="scoring", unit="row", delay=2, leave=False, file=sys.stderr) as bar:

        def advance(score: Score) -> None:
            bar.update()

        nothing = [None] * len(solutions)
        scores = pool.score([*answers.values()], solutions, nothing, rules, on_result=advance)
    return {text: score for text, score in zip(solutions, scores, strict=True) if not score.accuracy > 0}


def _why(score: Score) -> str:
    """Returns why an answer could not be scored; "" if it could."""
    return "" if score.status == "ok" else f"{score.status}: {score.note}"
