"""Attacks on the reward rules: completions that want a reward without having reasoned. Texts only, nothing is scored.

`python -m r1vl_jax.score --probe` has them scored. An honest wrong answer (complete, in order, in its own words, no key
step, wrong at the end) earns validity and nothing else; whatever an attack earns beyond that is a hole in the rules.

Attacks called "key steps ..." know the question's key steps, the worst case; the others know nothing. None knows the
right answer: what each gives as its final answer is wrong, or no answer at all, though a list of guesses may name the
right one among others. Left out is what no rule on texts can tell from honest work: key steps among other words, be
they sentences (true, guessed or denied), a template, or words without meaning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from r1vl_jax.rewards.answer import choice_letter, expected_answer
from r1vl_jax.rewards.key_steps import key_step_groups
from r1vl_jax.rewards.rules import PRESETS
from r1vl_jax.rewards.steps import ANSWER_HEADER

_DESCRIPTION, _RATIONALE = "What the question is about can be seen.", "Start from what is given."
_VAGUE = ("Look closely at all that is drawn.", "The first idea that comes to mind is good enough.")
_SENTENCES = (
    "Reading on carefully gives {} at this point.",
    "Whoever continues will find that {} holds.",
    "Nothing prevents {} from being used now.",
    "Later on {} turns out helpful too.",
)
# Cyrillic letters that look like Latin ones.
_LOOK_ALIKE = str.maketrans(
    "aceopxyABCEHKMOPTX",
    "\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u0410\u0412\u0421\u0415\u041d\u041a\u041c\u041e\u0420\u0422\u0425",
)
_FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question to attack.

    Attributes:
      question, solution, key_steps: as in an R1-VL-10K row; the solution is also the honest right answer.
      wrong: a final answer that is not the solution's.
      wrong_steps: step texts in own words, without any key step.
      half_steps: step texts in own words, with half of the key steps.
    """

    question: str
    solution: str
    key_steps: Any
    wrong: str
    wrong_steps: tuple[str, ...]
    half_steps: tuple[str, ...]


def problem(question: str, solution: str, key_steps: Any) -> Problem:
    """A problem from a row, with honest wrong answers made by rule.

    Args:
      question: its text; "" where the row has none.
      solution: the reference, as `score_answer` takes it.
      key_steps: likewise; faulty ones are as good as none.
    """
    steps = _first_alternatives(key_steps)
    half = _in_sentences(steps[: len(steps) // 2])
    return Problem(question, solution, key_steps, _wrong_answer(solution), _VAGUE, (*_VAGUE, *half))


def honest(problem: Problem) -> dict[str, str]:
    """Honest completions by name; the last one, "honest wrong", is what attacks are measured against."""
    return {
        "honest right (the solution)": problem.solution,
        "honest wrong, half the key steps": _answer(problem.half_steps, problem.wrong),
        "honest wrong": _answer(problem.wrong_steps, problem.wrong),
    }


def attacks(problem: Problem) -> dict[str, str]:
    """All attacks on one problem: completions by name, the same names in the same order for every problem."""
    parts = (_listed, _disguised, _misplaced, _near_misses, _guessed, _hollow, _many_answers, _odd_text)
    return {name: text for part in parts for name, text in part(problem).items()}


def _listed(problem: Problem) -> dict[str, str]:
    """Key steps set down without a word of reasoning."""
    steps = _first_alternatives(problem.key_steps)
    every = [text for group in key_step_groups(problem.key_steps)[0] for text in group if text.strip()]
    numbered = [f"{number}. {text}" for number, text in enumerate(steps, 1)]
    bodies = {
        "key steps in one step, a line each": ["\n".join(steps)],
        "key steps in one step, commas": [", ".join(steps)],
        "key steps in one step, blanks": [" ".join(steps)],
        'key steps in one step, "and"': [" and ".join(steps)],
        "key steps in one step, numbered": ["\n".join(numbered)],
        "key steps in one step, under a title": ["\n".join(["Facts:", *steps])],
        "key steps, a step each": steps,
        "key steps, all alternatives in one step": ["\n".join(every)],
        "key steps, all alternatives, a step each": every,
        "key steps listed behind honest steps": [*problem.wrong_steps, ", ".join(steps)],
        "key steps, each 50 times, a step each": [". ".join([text] * 50) for text in steps],
        "key steps, the same list in 50 steps": [", ".join(steps)] * 50,
    }
    return {name: _answer(body, problem.wrong) for name, body in bodies.items()}


def _disguised(problem: Problem) -> dict[str, str]:
    """Listed key steps that are dressed up, so that they do not look listed."""
    steps = _first_alternatives(problem.key_steps)
    listed = ", ".join(steps)
    bodies = {
        "key steps, bold bullets": "\n".join(f"- **{text}**" for text in steps),
        "key steps in LaTeX": "\n".join(f"$\\text{{{text}}}$" for text in steps),
        "key steps in quotes and emoji": " \U0001f449 ".join(f"\u201c{text}\u201d" for text in steps),
        "key steps in upper case": listed.upper(),
        "key steps in look-alike letters": listed.translate(_LOOK_ALIKE),
        "key steps in full-width letters": listed.translate(_FULL_WIDTH),
        'key steps, look-alike "and"': " and ".translate(_LOOK_ALIKE).join(steps),
        "key steps between zero-width blanks": " \u200b\u2060 ".join(f"\u200b{text}\u200b" for text in steps),
        "key steps between null bytes": "\x00".join(f"\x00{text}\x00" for text in steps),
    }
    return {name: _answer([body], problem.wrong) for name, body in bodies.items()}


def _misplaced(problem: Problem) -> dict[str, str]:
    """Key steps where none belong, or in an answer that does not stand."""
    steps, wrong = _first_alternatives(problem.key_steps), problem.wrong
    listed = ", ".join(steps)
    whole = _answer([listed], wrong)
    body, _, final = whole.partition(ANSWER_HEADER)
    return {
        "key steps in the description only": _answer(problem.wrong_steps, wrong, description=listed),
        "key steps in the rationale only": _answer(problem.wrong_steps, wrong, rationale=listed),
        "key steps behind the final answer": _answer(problem.wrong_steps, f"{wrong}\n{listed}"),
        "key steps, headers in one line": " ".join(whole.split()),
        "key steps, answer first": f"{ANSWER_HEADER}{final}\n\n{body}",
        "key steps, no final answer": body,
        "key steps, empty final answer": body + ANSWER_HEADER,
    }


def _near_misses(problem: Problem) -> dict[str, str]:
    """Wrong statements in sentences of other words, whose text contains the text of key steps."""

    def sentences(change: Callable[[str], str]) -> str:
        groups = key_step_groups(problem.key_steps)[0]
        changed = ([change(text) for text in group if change(text) != text] for group in groups)
        return _answer(_in_sentences(texts[0] for texts in changed if texts) or problem.wrong_steps, problem.wrong)

    return {
        "key steps in longer numbers (6: 61)": sentences(lambda text: _bordered(text, str.isdigit, "1", "1")),
        "key steps in decimals (6: 6.5)": sentences(lambda text: _bordered(text, str.isdigit, "5.", ".5")),
        "key steps in thousands (6: 6,001)": sentences(lambda text: _bordered(text, str.isdigit, "", ",001")),
        "key steps in fractions (6: 6/7)": sentences(lambda text: _bordered(text, str.isdigit, "", "/7")),
        "key steps in powers (6: 6^2)": sentences(lambda text: _bordered(text, str.isdigit, "", "^2")),
        "key steps with a minus (6: -6)": sentences(lambda text: _bordered(text, str.isdigit, "-", "")),
        "key steps in longer words (cup: cups)": sentences(lambda text: _bordered(text, str.isalpha, "s", "s")),
    }


def _guessed(problem: Problem) -> dict[str, str]:
    """Every key step that a question might have, without knowing any."""
    numbers = range(1, 21)
    pairs = [(a, b) for a in numbers for b in numbers]
    equations = [
        equation
        for a, b in pairs
        for equation in (f"{a} + {b} = {a + b}", f"{a} - {b} = {a - b}", f"{a} * {b} = {a * b}", f"{a * b}/{b} = {a}")
    ]
    bodies = {
        "guessed key steps: 1,600 equations in one step": [", ".join(equations)],
        "guessed key steps: 1,600 equations, a step each": equations,
        "guessed key steps: x = 0 to x = 100 in one step": [", ".join(f"x = {number}" for number in range(101))],
        "guessed key steps: fractions 1/1 to 20/20 in one step": [" ".join(f"{a}/{b}" for a, b in pairs)],
    }
    return {name: _answer(body, problem.wrong) for name, body in bodies.items()}


def _hollow(problem: Problem) -> dict[str, str]:
    """The form without the content."""
    wrong, sentence = problem.wrong, problem.wrong_steps[0]
    plain = _answer(problem.wrong_steps, wrong)
    body, _, final = plain.partition(ANSWER_HEADER)
    return {
        "headers only": _answer([""], "", description="", rationale=""),
        "headers and a final answer": _answer([""], wrong, description="", rationale=""),
        "headers in one line": " ".join(_answer([""], wrong, description="", rationale="").split()),
        "answer first": f"{ANSWER_HEADER}{final}\n\n{body}",
        "no final answer": body,
        "one sentence 50 times": _answer([" ".join([sentence] * 50)], wrong),
        "one step 50 times": _answer([sentence] * 50, wrong),
        "10,000 empty steps": _answer([""] * 10_000, wrong),
        "the question as every step": _answer([problem.question] * 2, wrong, description=problem.question),
        "the question as the final answer": _answer(problem.wrong_steps, problem.question),
    }


def _many_answers(problem: Problem) -> dict[str, str]:
    """Final answers that leave the choice to the reader."""
    numbers = [str(number) for number in range(101)]
    guesses = [problem.wrong, *numbers[:21], *"ABCD"]
    finals = {
        "all options: A, B, C or D": "A, B, C or D",
        "all options: A B C D": "A B C D",
        "all options: D/C/B/A": "D/C/B/A",
        "all options: (A) (B) (C) (D)": "(A) (B) (C) (D)",
        "all options, boxed": " ".join(f"\\boxed{{{letter}}}" for letter in "ABCD"),
        'many answers, "or"': " or ".join(guesses),
        "many answers, a line each": "\n".join(guesses),
        "many answers, boxed": " ".join(f"\\boxed{{{guess}}}" for guess in guesses),
        "many answers, in dollars": " ".join(f"${guess}$" for guess in guesses),
        "many answers, x = each": ", ".join(f"x = {number}" for number in numbers[:21]),
        "many answers, a header each": f"\n{ANSWER_HEADER} ".join(guesses),
        "numbers 0 to 100": ", ".join(numbers),
        "numbers 0 to 100, as a set": f"$\\{{{', '.join(numbers)}\\}}$",
        "an interval: [0, 100]": "$[0, 100]$",
        "an inequality: x < 1000": "$x < 1000$",
        "an answer that is always true: x = x": "$x = x$",
    }
    return {name: _answer(problem.wrong_steps, final) for name, final in finals.items()}


def _odd_text(problem: Problem) -> dict[str, str]:
    """Characters that are not what they seem."""
    plain = _answer(problem.wrong_steps, problem.wrong)
    return {
        "look-alike headers": plain.replace("e", "\u0435"),
        "full-width headers": plain.replace("#", "\uff03"),
        "null bytes in all words": plain.replace(" ", " \x00"),
        "null bytes for an answer": _answer(problem.wrong_steps, "\x00" * 100),
        "combining marks for an answer": _answer(problem.wrong_steps, problem.wrong + "\u0301\u0327" * 50_000),
    }


def _answer(steps: Sequence[str], final: str, *, description: str = _DESCRIPTION, rationale: str = _RATIONALE) -> str:
    """An answer in the format of R1-VL, with these texts in its sections."""
    body = "".join(f"### Step {number}:\n{text}\n\n" for number, text in enumerate(steps, 1))
    return (
        f"### Image Description:\n{description}\n\n### Rationales:\n{rationale}\n\n"
        f"### Let's think step by step.\n\n{body}{ANSWER_HEADER} {final}"
    )


def _first_alternatives(key_steps: Any) -> list[str]:
    """The first alternative with text of every group that has one."""
    groups = key_step_groups(key_steps)[0]
    return [texts[0] for texts in ([text for text in group if text.strip()] for group in groups) if texts]


def _in_sentences(texts: Iterable[str]) -> list[str]:
    return [_SENTENCES[index % len(_SENTENCES)].format(text) for index, text in enumerate(texts)]


def _bordered(text: str, kind: Callable[[str], bool], before: str, after: str) -> str:
    """`text` with something put before and behind it where its first and last character are of this kind."""
    text = text.strip()
    head, tail = (before if kind(text[:1]) else ""), (after if kind(text[-1:]) else "")
    return head + text + tail


def _wrong_answer(solution: str) -> str:
    """Another option where the solution names one, else a number that is not in the solution."""
    expected = expected_answer(solution, PRESETS["paper"])
    letter = choice_letter(expected)
    if letter is not None:
        return "A" if letter != "A" else "B"
    return next(number for number in map(str, range(271828, 10**7)) if number not in expected)


def _solved(question: str, steps: Sequence[str], final: str, key_steps: list, **honest_wrong: Any) -> Problem:
    """A built-in problem; its solution is written from its steps."""
    solution = _answer(steps, final, description="The question's figure.", rationale="Take the facts one by one.")
    return Problem(question, solution, {"Steps": key_steps}, **honest_wrong)


BUILT_IN = (
    _solved(
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
        wrong="14/3",
        wrong_steps=("Three lines cut the whole shape.", "It falls into three equal pieces, I think."),
        half_steps=(
            "The segment from R reaches the middle of its opposite side, so RM is a median of the large shape.",
            "Cutting along it leaves 14/2 = 7 on either side.",
            "Of this I take two thirds.",
        ),
    ),
    _solved(
        "A shelf holds 3 rows of 5 cups each. Then 4 cups fall and break. How many cups are whole?",
        ["3 rows of 5 cups make 3 * 5 = 15 cups.", "4 are broken, and 15 - 4 = 11 are whole."],
        "11",
        [["3 * 5 = 15", "3 \\times 5 = 15", "15 cups"], ["15 - 4 = 11", "11 cups"]],
        wrong="12",
        wrong_steps=("Seen from afar the shelf looks rather full.", "After the fall a dozen should be standing."),
        half_steps=("Counting row by row I get 15 cups before anything falls.", "Then three are swept away."),
    ),
    _solved(
        "A bar chart shows that a market sold 40 pears, 25 plums, 60 figs and 55 limes. Which fruit was sold the most "
        "after the one in first place? Choices: (A) pears (B) plums (C) limes (D) figs",
        ["60 is the largest number, so figs come first.", "Of the others 55 is the largest, so limes are second."],
        "C",
        [["figs come first", "60 is the largest"], ["limes are second", "55 is the largest"]],
        wrong="A",
        wrong_steps=("Fruit with the tallest bar is put aside.", "Next to it stands the bar for pears."),
        half_steps=("Comparing all bars shows that figs come first by a little.", "Next to them I see pears."),
    ),
    _solved(
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
        wrong="$245^\\circ$",
        wrong_steps=("All corners together go once around.", "What the others leave over is the rest."),
        half_steps=(
            "Putting both given angles side by side, 48 + 67 = 115 degrees are used up.",
            "A full turn has room for 245 more.",
        ),
    ),
    _solved(
        "Solve the equation 3x - 7 = 11.",
        ["Adding 7 on both sides gives 3x = 18.", "Dividing by 3 gives x = 18/3 = 6."],
        "x = 6",
        [["3x = 18", "11 + 7 = 18"], ["18/3 = 6", "\\frac{18}{3} = 6", "x = 6"]],
        wrong="x = 4/3",
        wrong_steps=("Bring the constant over to the right.", "Then the coefficient is divided away."),
        half_steps=(
            "With the constant moved over we have 3x = 18 on the page.",
            "Halving twice and rounding is close.",
        ),
    ),
)
