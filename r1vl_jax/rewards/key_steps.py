"""Key steps: which of a question's expected reasoning steps occur in an answer (the k of StepRAR).

    k = |key steps found in the answer's steps| / |key steps of the question|          (arXiv 2503.12937, eq. 4)

A key step is a group of alternatives ("12/2 = 6", "frac{12}{2} = 6"): one found alternative is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r1vl_jax.rewards.rules import Rules

Groups = tuple[tuple[str, ...], ...]


def key_step_groups(key_steps: Any) -> tuple[Groups, tuple[str, ...]]:
    """The groups of a question's key steps, and what was wrong with them as short phrases.

    Args:
      key_steps: R1-VL-10K's `{"Steps": [["a", "b"], "c"]}`, or the list of groups itself; None where there are none.
        A group is a text or a list of texts.

    Returns:
      One tuple of alternatives for each group, in order. Whatever is not a text is left out and named, never an error:
      its group stays, and so still counts in the denominator.
    """
    if isinstance(key_steps, dict):
        key_steps = key_steps.get("Steps")
    if key_steps is None:
        return (), ("key steps missing",)
    if not isinstance(key_steps, list | tuple):
        return (), (f"key steps are not a list but {type(key_steps).__name__}",)
    if not key_steps:
        return (), ("key steps empty",)
    lists = [group if isinstance(group, list | tuple) else [group] for group in key_steps]
    groups = tuple(tuple(text for text in group if isinstance(text, str)) for group in lists)
    dropped = sum(map(len, lists)) - sum(map(len, groups))
    return groups, ((f"{dropped} key-step alternatives are not text",) if dropped else ())


def matched_groups(text: str, groups: Sequence[Sequence[str]], rules: Rules) -> tuple[int, ...]:
    """The indices of the groups found in `text`, which is the lower-cased text of the steps."""
    return tuple(index for index, group in enumerate(groups) if any(_occurs(part, text, rules) for part in group))


def _occurs(alternative: str, text: str, rules: Rules) -> bool:
    if not alternative.strip() and not rules.empty_alternative_matches:
        return False
    return alternative.lower() in text
