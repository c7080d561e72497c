"""Reports the rewards that attacks on the rules earn, compared with those of an honest wrong answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from r1vl_jax.reward_lab.attacks import attack_answers, honest_answers
from r1vl_jax.reward_lab.problems import Problem
from r1vl_jax.reward_lab.scoring import Scorer
from r1vl_jax.rewards import Score
from r1vl_jax.step_grpo.advantages import EQUAL


def probe(problems: Sequence[Problem], scorer: Scorer) -> dict[str, Any]:
    """Scores honest answers and attacks on all problems. Returns the report of `probe_report`."""
    texts, cases, owners = [], [], []
    for index, problem in enumerate(problems):
        for name, text in (honest_answers(problem) | attack_answers(problem)).items():
            texts.append(text)
            cases.append((index, name))
            owners.append(problem)
    scores = scorer.score(texts, [owner.solution for owner in owners], [owner.key_steps for owner in owners])
    return probe_report(cases, scores, list(honest_answers(problems[0])))


def probe_report(
    cases: Sequence[tuple[int, str]], scores: Mapping[str, Sequence[Score]], honest: Sequence[str]
) -> dict[str, Any]:
    """Returns the rewards of each completion under each set of rules, summarised over all problems.

    The excess of a completion is its reward minus the validity of the honest wrong answer, which is what that answer
    earns without key steps.

    Args:
      cases: (problem's index, completion's name) of every scored completion.
      scores: maps the name of each set of rules to one score per case.
      honest: names of the honest completions; the last is the honest wrong answer.

    Returns:
      {"rules": names, "problems": count, "completions": [{"name", "attack", "rules": {name: ...}}]};
      `python -m r1vl_jax.score --help` lists all fields.
    """
    places: dict[str, list[int]] = {}
    for place, (_, name) in enumerate(cases):
        places.setdefault(name, []).append(place)
    rows: list[dict[str, Any]] = [{"name": name, "attack": name not in honest, "rules": {}} for name in places]
    for rules, column in scores.items():
        base = {cases[place][0]: column[place].validity for place in places[honest[-1]]}
        for row in rows:
            own = [(column[place], cases[place][0]) for place in places[row["name"]]]
            excess, worst = max((score.reward - base[problem], -problem) for score, problem in own)
            row["rules"][rules] = {
                "mean": sum(score.reward for score, _ in own) / len(own),
                "max": max(score.reward for score, _ in own),
                "excess": excess,
                "problem": -worst,
                "exceeds": row["attack"] and excess > EQUAL,
                "failures": sum(score.status != "ok" for score, _ in own),
            }
    return {"rules": list(scores), "problems": len(places[honest[-1]]), "completions": rows}
