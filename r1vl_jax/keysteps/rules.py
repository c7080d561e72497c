"""Takes key steps from a solution without a model: the equations and named relations in its steps.

Each key step is copied word for word. A key step that does not occur in the solution under every preset of the rewards
is left out, because even the reference solution would not be paid for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from r1vl_jax.errors import RowError
from r1vl_jax.keysteps.formulas import equations
from r1vl_jax.keysteps.phrases import phrases
from r1vl_jax.keysteps.rows import Groups, normal_key, text_field, with_groups
from r1vl_jax.rewards import PRESETS, get_rules
from r1vl_jax.rewards.formats import FORMATS
from r1vl_jax.rewards.key_steps import key_step_hits
from r1vl_jax.rewards.normal import normal_text


def rules_row(row: dict[str, Any], per_step: int, answer_format: str = "r1vl") -> dict[str, Any]:
    """Returns the row with key steps from its solution, at most `per_step` per step.

    Raises:
      RowError: the solution has no equation or named relation to take, or a field is missing.
    """
    problem, solution = text_field(row, "problem"), text_field(row, "solution")
    groups = rule_groups(problem, solution, per_step, answer_format)
    if not groups:
        has_steps = bool(FORMATS[answer_format].step_bodies(solution))
        why = "no equation or named relation in its steps" if has_steps else f"no step in the format {answer_format}"
        raise RowError(f"field 'solution': {why}; nothing to take key steps from")
    return with_groups(row, groups)


def rule_groups(problem: str, solution: str, per_step: int = 3, answer_format: str = "r1vl") -> Groups:
    """Returns key steps from a solution, in their order, at most `per_step` per step. Each group has one text.

    No key step occurs in the question, no key step is repeated, and all occur in the solution under every preset.
    """
    question = normal_text(problem)
    steps = [
        [text for text in _candidates(solution, start, end) if not any(question.find(text))]
        for start, end in FORMATS[answer_format].step_bodies(solution)
    ]
    groups = _first(steps, per_step, lambda groups: True)
    # Usually one check of all texts is enough. If it fails, each text is checked together with those before it.
    if _all_found(solution, groups, answer_format):
        return groups
    return _first(steps, per_step, lambda groups: _all_found(solution, groups, answer_format))


def _first(steps: list[list[str]], per_step: int, fit: Callable[[Groups], bool]) -> Groups:
    """Returns the first `per_step` new texts of each step, as groups of one text.

    A text is taken only if `fit` accepts the groups taken so far together with this text.
    """
    groups: Groups = []
    seen: set[tuple[str, ...]] = set()
    for texts in steps:
        taken = 0
        for text in texts:
            key = normal_key(text)
            if taken < per_step and len(key) > 1 and key not in seen and fit([*groups, [text]]):
                groups.append([text])
                seen.add(key)
                taken += 1
    return groups


def _candidates(text: str, start: int, end: int) -> list[str]:
    """Returns the equations and phrases of a step, word for word. A phrase that overlaps an equation is left out."""
    formulas = equations(text, start, end)
    named = [
        (first, last)
        for first, last in phrases(text, start, end)
        if not any(first < end and start < last for start, end in formulas)
    ]
    return list(dict.fromkeys(text[first:last] for first, last in sorted(formulas + named)))


def _all_found(solution: str, groups: Sequence[Sequence[str]], answer_format: str) -> bool:
    presets = PRESETS if answer_format == "r1vl" else ("paper", "robust")
    rules = (get_rules(preset, answer_format=answer_format) for preset in presets)
    return all(len(key_step_hits(solution, groups, rule)) == len(groups) for rule in rules)
