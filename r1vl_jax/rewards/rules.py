"""The options of the reward rules, and their named presets.

R1-VL (arXiv 2503.12937, section 3.3) describes the StepGRPO rewards in words; the functions that its authors released
differ from them in places. There is one implementation here: every difference is one field of `Rules`, and a preset
is a choice of fields.

    released   what the published models were trained with, faults included
    paper      what the paper describes (the default)
    robust     paper, with key steps that must be meant and not only be spelled, and sections that must say something
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Rules:
    """One reading of the reward rules. Each field is one difference between the presets.

    Attributes:
      answer_from_section: the answers compared are the final-answer sections of completion and solution. False:
        math-verify searches both texts whole, and only the comparison as text looks at the final-answer line.
      verify_gold_first: `verify(gold, answer)`, as math-verify documents its asymmetric comparison. False: the other
        way round.
      fold_text: where math-verify finds no equality, the answers are compared as text after NFKC, case and white
        space are folded. False: exactly.
      choice_letters: where the solution names a multiple-choice option, its letter is compared with the answer's.
      require_answer: an answer without a final answer earns no accuracy reward. False: its key steps still pay.
      empty_alternative_matches: an empty alternative of a key step is found in every text. False: in none.
      sections_by_header: a section exists where a line starts with its header. False: where the header's text
        occurs anywhere, and for the steps only the first step's header counts.
      full_order: all headers stand in the order of the format. False: only the final answer's place after the last
        step is checked, and not even that where the text ends with the bare header. Both: steps are numbered 1..n.
      one_answer: an answer that names more numbers than the solution's is wrong, unless it is the same text:
        math-verify takes "3 or 4" for 4, and "1, 2, 3" for 3.
      nonempty_sections: a section without a word, a number or a symbol of mathematics does not count as there.
      match_tokens: a key step is found on token borders in the normal form of r1vl_jax.rewards.normal: numbers by
        value, LaTeX, spacing and units folded, never a piece of a larger expression. False: as a substring, in lower
        case.
      refuse_stuffing: a step that repeats text, or that lists key steps without other words, earns nothing for them.
    """

    answer_from_section: bool
    verify_gold_first: bool
    fold_text: bool
    choice_letters: bool
    require_answer: bool
    empty_alternative_matches: bool
    sections_by_header: bool
    full_order: bool
    one_answer: bool
    nonempty_sections: bool
    match_tokens: bool
    refuse_stuffing: bool


_RELEASED = Rules(
    answer_from_section=False,
    verify_gold_first=False,
    fold_text=False,
    choice_letters=False,
    require_answer=False,
    empty_alternative_matches=True,
    sections_by_header=False,
    full_order=False,
    one_answer=False,
    nonempty_sections=False,
    match_tokens=False,
    refuse_stuffing=False,
)
_PAPER = dataclasses.replace(
    _RELEASED,
    answer_from_section=True,
    verify_gold_first=True,
    fold_text=True,
    choice_letters=True,
    require_answer=True,
    empty_alternative_matches=False,
    sections_by_header=True,
    full_order=True,
)
_ROBUST = dataclasses.replace(_PAPER, one_answer=True, nonempty_sections=True, match_tokens=True, refuse_stuffing=True)
PRESETS = {"released": _RELEASED, "paper": _PAPER, "robust": _ROBUST}


def get_rules(rules: str | Rules, options: Mapping[str, bool] | None = None) -> Rules:
    """The rules of a preset's name, a `Rules` as it is; with some options set alone.

    Raises:
      ValueError: no preset or option has this name, or an option is not true or false. The message gives the known
        names and the nearest one.
      TypeError: neither a name nor a `Rules`.
    """
    if not isinstance(rules, Rules):
        if not isinstance(rules, str):
            raise TypeError(f"rules: expected a preset's name or a Rules, got {type(rules).__name__}")
        rules = PRESETS[_known(rules, PRESETS, "preset")]
    for name, value in (options or {}).items():
        _known(name, [field.name for field in dataclasses.fields(Rules)], "option")
        if not isinstance(value, bool):
            raise ValueError(f"rules: option {name} is {value!r}, expected true or false")
    return dataclasses.replace(rules, **(options or {}))


def _known(name: str, known, kind: str) -> str:
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"rules: no {kind} is called {name!r}; known {kind}s: {', '.join(known)}{hint}")
