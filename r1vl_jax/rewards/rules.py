"""Defines the options of the reward rules, and the named presets.

R1-VL (arXiv 2503.12937, section 3.3) describes the StepGRPO rewards in words. The functions that its authors released
differ from that text in places. This project has one implementation. Each difference is a field of `Rules`, and a
preset sets every field.

    released   the rules that the published models were trained with, faults included
    paper      the rules that the paper describes (the default)
    robust     paper, but a key step must be stated and not just contained in the text, and sections must not be empty
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from r1vl_jax.common.text import did_you_mean
from r1vl_jax.rewards.formats import FORMATS


def _check_known(name: str, known: Collection[str], kind: str) -> None:
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"rules: no {kind} is called {name!r}; known {kind}s: {', '.join(known)}{hint}")


@dataclasses.dataclass(frozen=True)
class Rules:
    """One set of reward rules. Each field is a difference between two presets.

    Attributes:
      format: the format of the answers, a key of `formats.FORMATS`: r1vl, think or boxed. No preset sets it; another
        format than r1vl needs answer_from_section, sections_by_header and full_order, which `released` does not have.
      answer_from_section: compare the final-answer sections of completion and solution. False: the whole of both texts
        for math-verify, and their final-answer lines for the comparison as text.
      check_answer: compare with the answer check of r1vl_jax/rewards/compare.py. False: as the released functions do,
        with math-verify's `parse` and `verify(answer, gold)`, and as exact texts.
      require_answer: a completion without a final answer earns no accuracy reward. False: its key steps still pay.
      empty_alternative_matches: an empty alternative of a key step occurs in every text. False: in none.
      sections_by_header: a section exists if a line starts with its header. False: a section exists if the text of its
        header occurs anywhere; of the steps, only the header of step 1 is required.
      full_order: all headers must be in the order of the format. False: only the final answer must come after the last
        step, and not even that if the text ends with the bare header. Steps must be numbered 1..n either way.
      nonempty_sections: a section must contain a word, a number or a symbol of mathematics.
      match_tokens: search key steps in the normal form of r1vl_jax/rewards/normal.py: on token borders, numbers by
        value, spellings in LaTeX, spacing and units equal, never in a larger expression. False: search key steps as
        substrings, in lower case.
      refuse_stuffing: a step that repeats text, or lists key steps without other words, earns nothing for key steps.
    """

    answer_from_section: bool
    check_answer: bool
    require_answer: bool
    empty_alternative_matches: bool
    sections_by_header: bool
    full_order: bool
    nonempty_sections: bool
    match_tokens: bool
    refuse_stuffing: bool
    format: str = "r1vl"

    def __post_init__(self) -> None:
        _check_known(self.format, FORMATS, "format")
        needed = ("answer_from_section", "sections_by_header", "full_order")
        if self.format != "r1vl" and not all(getattr(self, name) for name in needed):
            raise ValueError(f"rules: format {self.format} needs {', '.join(needed)}, as in paper and robust")


_RELEASED = Rules(
    answer_from_section=False,
    check_answer=False,
    require_answer=False,
    empty_alternative_matches=True,
    sections_by_header=False,
    full_order=False,
    nonempty_sections=False,
    match_tokens=False,
    refuse_stuffing=False,
)
_PAPER = dataclasses.replace(
    _RELEASED,
    answer_from_section=True,
    check_answer=True,
    require_answer=True,
    empty_alternative_matches=False,
    sections_by_header=True,
    full_order=True,
)
_ROBUST = dataclasses.replace(_PAPER, nonempty_sections=True, match_tokens=True, refuse_stuffing=True)
PRESETS = {"released": _RELEASED, "paper": _PAPER, "robust": _ROBUST}


def get_rules(
    rules: str | Rules, options: Mapping[str, bool] | None = None, *, answer_format: str | None = None
) -> Rules:
    """Returns the rules of a preset, or the given `Rules`, with some options replaced.

    Args:
      rules: a preset's name, or a `Rules`.
      options: maps the name of a field of `Rules` to its new value.
      answer_format: the format of the answers: r1vl, think or boxed; None: r1vl, or that of the given `Rules`.

    Raises:
      ValueError: no preset, option or format has this name, an option is not true or false, or the format needs other
        options. The message lists the known names and the nearest one.
      TypeError: `rules` is neither a name nor a `Rules`.
    """
    if not isinstance(rules, Rules):
        if not isinstance(rules, str):
            raise TypeError(f"rules: expected a preset's name or a Rules, got {type(rules).__name__}")
        _check_known(rules, PRESETS, "preset")
        rules = PRESETS[rules]
    known = [field.name for field in dataclasses.fields(Rules) if field.name != "format"]
    for name, value in (options or {}).items():
        _check_known(name, known, "option")
        if not isinstance(value, bool):
            raise ValueError(f"rules: option {name} is {value!r}, expected true or false")
    return dataclasses.replace(rules, **(options or {}), format=answer_format or rules.format)
