"""The options of the reward rules, and their named presets.

R1-VL (arXiv 2503.12937, section 3.3) describes the StepGRPO rewards in words; the functions that its authors released
differ from them in places. There is one implementation here: every difference is one field of `Rules`, and a preset
is a choice of fields.

    released   what the published models were trained with, faults included
    paper      what the paper describes (the default)
"""

from __future__ import annotations

import dataclasses
import difflib


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
    """

    answer_from_section: bool
    verify_gold_first: bool
    fold_text: bool
    choice_letters: bool
    require_answer: bool
    empty_alternative_matches: bool
    sections_by_header: bool
    full_order: bool


PRESETS = {
    "released": Rules(
        answer_from_section=False,
        verify_gold_first=False,
        fold_text=False,
        choice_letters=False,
        require_answer=False,
        empty_alternative_matches=True,
        sections_by_header=False,
        full_order=False,
    ),
    "paper": Rules(
        answer_from_section=True,
        verify_gold_first=True,
        fold_text=True,
        choice_letters=True,
        require_answer=True,
        empty_alternative_matches=False,
        sections_by_header=True,
        full_order=True,
    ),
}


def get_rules(rules: str | Rules) -> Rules:
    """The rules of a preset's name; a `Rules` is returned as it is.

    Raises:
      ValueError: no preset has this name. The message gives the known names and the nearest one.
      TypeError: neither a name nor a `Rules`.
    """
    if isinstance(rules, Rules):
        return rules
    if not isinstance(rules, str):
        raise TypeError(f"rules: expected a preset's name or a Rules, got {type(rules).__name__}")
    if rules not in PRESETS:
        near = difflib.get_close_matches(rules, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"rules: no preset is called {rules!r}; known presets: {', '.join(PRESETS)}{hint}")
    return PRESETS[rules]
