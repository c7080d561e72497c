"""Key steps of a solution without any model: the equations and named relations of its steps.

Each is taken word for word and then looked for in the solution under every preset of the rewards: one that the
reference itself would not be paid for is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from r1vl_jax.keysteps.formulas import equations
from r1vl_jax.keysteps.phrases import phrases
from r1vl_jax.keysteps.rows import Groups, RowFault, normal_key, text_field, with_groups
from r1vl_jax.rewards import PRESETS
from r1vl_jax.rewards.key_steps import key_step_hits
from r1vl_jax.rewards.normal import normal_text
from r1vl_jax.rewards.steps import step_bodies


def rules_row(row: dict[str, Any], per_step: int) -> dict[str, Any]:
    """The row with key steps made from its solution. Raises RowFault where none can be made."""
    problem, solution = text_field(row, "problem"), text_field(row, "solution")
    groups = rule_groups(problem, solution, per_step)
    if not groups:
        has_steps = bool(step_bodies(solution))
        why = "no equation or named relation in its steps" if has_steps else "no section '### Step 1:'"
        raise RowFault(f"field 'solution': {why}; nothing to take key steps from")
    return with_groups(row, groups)


def rule_groups(problem: str, solution: str, per_step: int = 3) -> Groups:
    """Key steps of a solution, at most `per_step` of each step, in the order in which they stand; one text a group.

    None is found in the question, none is there twice, and all are found in the solution under every preset.
    """
    question = normal_text(problem)
    steps = [
        [text for text in _candidates(solution, start, end) if not any(question.find(text))]
        for start, end in step_bodies(solution)
    ]
    groups = _first(steps, per_step, lambda groups: True)
    # One check of all is mostly enough. Where it fails, each text has to prove itself beside those before it.
    if _all_found(solution, groups):
        return groups
    return _first(steps, per_step, lambda groups: _all_found(solution, groups))


def _first(steps: list[list[str]], per_step: int, fit: Callable[[Groups], bool]) -> Groups:
    """The first `per_step` texts of each step that say something new and fit in with those before them."""
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
    """The equations and phrases of a step, as they stand; a phrase that is a piece of an equation is left out."""
    formulas = equations(text, start, end)
    named = [
        (first, last)
        for first, last in phrases(text, start, end)
        if not any(first < end and start < last for start, end in formulas)
    ]
    return list(dict.fromkeys(text[first:last] for first, last in sorted(formulas + named)))


def _all_found(solution: str, groups: Sequence[Sequence[str]]) -> bool:
    return all(len(key_step_hits(solution, groups, rules)) == len(groups) for rules in PRESETS.values())
