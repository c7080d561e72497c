"""Makes the questions to attack: five built-in questions, or the user's rows. Does not score anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from r1vl_jax.reward_lab.rows import question_of
from r1vl_jax.rewards.answer import expected_answer
from r1vl_jax.rewards.choices import choice_letter
from r1vl_jax.rewards.formats import FORMATS, R1VL, Format
from r1vl_jax.rewards.key_steps import key_step_groups
from r1vl_jax.rewards.rules import PRESETS

_DESCRIPTION, _RATIONALE = "What the question is about can be seen.", "Start from what is given."
_VAGUE = ("Look closely at all that is drawn.", "The first idea that comes to mind is good enough.")
_SENTENCES = (
    "Reading on carefully gives {} at this point.",
    "Whoever continues will find that {} holds.",
    "Nothing prevents {} from being used now.",
    "Later on {} turns out helpful too.",
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question to attack.

    Attributes:
      question, solution, key_steps: as in a row of R1-VL-10K; the solution is also the honest right answer.
      wrong: a final answer that differs from the solution's.
      wrong_steps: texts of steps that contain no key step.
      half_steps: texts of steps that contain half of the key steps among other words.
      form: the format in which answers to it are written.
    """

    question: str
    solution: str
    key_steps: Any
    wrong: str
    wrong_steps: tuple[str, ...]
    half_steps: tuple[str, ...]
    form: Format = R1VL

    def answer(
        self, steps: Sequence[str], final: str, *, description: str = _DESCRIPTION, rationale: str = _RATIONALE
    ) -> str:
        """Returns an answer to this problem with the given texts in its sections."""
        return self.form.write(description, rationale, steps, final)


def make_problem(question: str, solution: str, key_steps: Any, answer_format: str = "r1vl") -> Problem:
    """Makes a problem. Its honest wrong answers are made by rule.

    Args:
      question: the question's text; "" if the row has none.
      solution: the reference, as for `score_answer`.
      key_steps: as for `score_answer`; faulty key steps are ignored.
      answer_format: the format of the answers: r1vl, think or boxed.
    """
    steps = first_alternatives(key_steps)
    half = in_sentences(steps[: len(steps) // 2])
    form = FORMATS[answer_format]
    return Problem(question, solution, key_steps, _wrong_answer(solution), _VAGUE, (*_VAGUE, *half), form)


def problems_of(rows: Iterable[dict[str, Any]], answer_format: str = "r1vl") -> list[Problem]:
    """Returns the problems in the rows. Rows with equal question, solution and key steps are one problem."""
    columns = [(question_of(row), row["solution"], row.get("key_steps")) for row in rows]
    return [
        make_problem(*column, answer_format) for column in {json.dumps(column): column for column in columns}.values()
    ]


def first_alternatives(key_steps: Any) -> list[str]:
    """Returns the first alternative of each group that is not blank, and nothing for a group of blank alternatives."""
    groups = key_step_groups(key_steps)[0]
    return [texts[0] for texts in ([text for text in group if text.strip()] for group in groups) if texts]


def in_sentences(texts: Iterable[str]) -> list[str]:
    """Puts each text into a sentence."""
    return [_SENTENCES[index % len(_SENTENCES)].format(text) for index, text in enumerate(texts)]


def _wrong_answer(solution: str) -> str:
    """Returns a wrong option if the solution names an option, else a number that is not in the solution's answer."""
    expected = expected_answer(solution, PRESETS["paper"])
    letter = choice_letter(expected)
    if letter is not None:
        return "A" if letter != "A" else "B"
    return next(number for number in map(str, range(271828, 10**7)) if number not in expected)


def built_in(answer_format: str = "r1vl") -> list[Problem]:
    """Returns the built-in problems. Their solutions are in the given format."""
    form = FORMATS[answer_format]
    return [
        Problem(
            question,
            form.write("The question's figure.", "Take the facts one by one.", steps, final),
            {"Steps": key_steps},
            form=form,
            **honest_wrong,
        )
        for question, steps, final, key_steps, honest_wrong in _BUILT_IN
    ]


# For each: the question, the steps of its solution, the final answer, the key steps, and the parts of wrong answers.
_BUILT_IN: tuple[tuple[str, list[str], str, list[Any], dict[str, Any]], ...] = (
    (
        "Point M lies halfway along side PQ of triangle PQR, whose area is 14. N lies halfway along segment RM. "
        "Find the area of triangle PMN.",
        ["RM is a median, so triangle PMR has the area 14/2 = 7.", "N is the midpoint of RM, so PMN has half: 7/2."],
        "7/2",
        [
            ["RM is a median", "median RM"],
            ["\\frac{14}{2} = 7", "14/2 = 7"],
            ["N is the midpoint of RM", "PN is a median"],
            ["7/2", "\\frac{7}{2}", "3.5"],
        ],
        dict(
            wrong="14/3",
            wrong_steps=("Three lines cut the whole shape.", "It falls into three equal pieces, I think."),
            half_steps=(
                "The segment from R reaches the middle of its opposite side, so RM is a median of the large shape.",
                "Cutting along it leaves 14/2 = 7 on either side.",
                "Of this I take two thirds.",
            ),
        ),
    ),
    (
        "A shelf holds 3 rows of 5 cups each. Then 4 cups fall and break. How many cups are whole?",
        ["3 rows of 5 cups make 3 * 5 = 15 cups.", "4 are broken, and 15 - 4 = 11 are whole."],
        "11",
        [["3 * 5 = 15", "3 \\times 5 = 15", "15 cups"], ["15 - 4 = 11", "11 cups"]],
        dict(
            wrong="12",
            wrong_steps=("Seen from afar the shelf looks rather full.", "After the fall a dozen should be standing."),
            half_steps=("Counting row by row I get 15 cups before anything falls.", "Then three are swept away."),
        ),
    ),
    (
        "A bar chart shows that a market sold 40 pears, 25 plums, 60 figs and 55 limes. Which fruit was sold the most "
        "after the one in first place? Choices: (A) pears (B) plums (C) limes (D) figs",
        ["60 is the largest number, so figs come first.", "Of the others 55 is the largest, so limes are second."],
        "C",
        [["figs come first", "60 is the largest"], ["limes are second", "55 is the largest"]],
        dict(
            wrong="A",
            wrong_steps=("Fruit with the tallest bar is put aside.", "Next to it stands the bar for pears."),
            half_steps=("Comparing all bars shows that figs come first by a little.", "Next to them I see pears."),
        ),
    ),
    (
        "Two angles of a triangle measure 48\u00b0 and 67\u00b0. How large is the third angle?",
        [
            "The angles of a triangle add up to 180\u00b0.",
            "The two known ones make 48\u00b0 + 67\u00b0 = 115\u00b0.",
            "So the third one is 180\u00b0 - 115\u00b0 = 65\u00b0.",
        ],
        "$65^\\circ$",
        [
            ["add up to 180\u00b0", "angle sum is 180\u00b0"],
            ["48\u00b0 + 67\u00b0 = 115\u00b0", "48 + 67 = 115"],
            ["180\u00b0 - 115\u00b0 = 65\u00b0", "180 - 115 = 65"],
        ],
        dict(
            wrong="$245^\\circ$",
            wrong_steps=("All corners together go once around.", "What the others leave over is the rest."),
            half_steps=(
                "Putting both given angles side by side, 48 + 67 = 115 degrees are used up.",
                "A full turn has room for 245 more.",
            ),
        ),
    ),
    (
        "Solve the equation 3x - 7 = 11.",
        ["Adding 7 on both sides gives 3x = 18.", "Dividing by 3 gives x = 18/3 = 6."],
        "x = 6",
        [["3x = 18", "11 + 7 = 18"], ["18/3 = 6", "\\frac{18}{3} = 6", "x = 6"]],
        dict(
            wrong="x = 4/3",
            wrong_steps=("Bring the constant over to the right.", "Then the coefficient is divided away."),
            half_steps=(
                "With the constant moved over we have 3x = 18 on the page.",
                "Halving twice and rounding is close.",
            ),
        ),
    ),
)
