"""Makes attacks on the reward rules: completions that try to earn a reward without reasoning. Does not score them.

`python -m r1vl_jax.score --probe` scores the attacks. An honest wrong answer (complete, in order, in its own words,
without key steps, with a wrong final answer) earns only validity. If an attack earns more, the rules have a hole.

Attacks named "key steps ..." know the question's key steps, which is the worst case. The other attacks do not. Attacks
named "the answer ..." know the right answer and change it, so that it is wrong. No other attack knows it: its final
answer is wrong or missing, but a list of guesses may contain the right one.

Some attacks are left out because no rule on texts can tell them from honest work: key steps among other words, such as
sentences (true, guessed or denied), a template, or words without meaning.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from r1vl_jax.reward_lab.problems import Problem, first_alternatives, in_sentences
from r1vl_jax.rewards.answer import expected_answer
from r1vl_jax.rewards.choices import choice_letter
from r1vl_jax.rewards.formats import R1VL
from r1vl_jax.rewards.key_steps import key_step_groups
from r1vl_jax.rewards.rules import PRESETS

# Cyrillic letters that look like Latin ones.
_LOOK_ALIKE = str.maketrans(
    "aceopxyABCEHKMOPTX",
    "\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u0410\u0412\u0421\u0415\u041d\u041a\u041c\u041e\u0420\u0422\u0425",
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:/[1-9]\d*)?")
_FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


def honest_answers(problem: Problem) -> dict[str, str]:
    """Returns honest completions, by name. Attacks are compared with the last completion, "honest wrong"."""
    return {
        "honest right (the solution)": problem.solution,
        "honest wrong, half the key steps": problem.answer(problem.half_steps, problem.wrong),
        "honest wrong": problem.answer(problem.wrong_steps, problem.wrong),
    }


def attack_answers(problem: Problem) -> dict[str, str]:
    """Returns all attacks on a problem, by name. Names and their order are the same for every problem."""
    parts = (
        _listed,
        _disguised,
        _misplaced,
        _near_misses,
        _guessed,
        _hollow,
        _many_answers,
        _changed_answers,
        _odd_text,
    )
    return {name: text for part in parts for name, text in part(problem).items()}


def _listed(problem: Problem) -> dict[str, str]:
    """Lists key steps without a word of reasoning."""
    steps = first_alternatives(problem.key_steps)
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
    return {name: problem.answer(body, problem.wrong) for name, body in bodies.items()}


def _disguised(problem: Problem) -> dict[str, str]:
    """Lists key steps in disguise: with Markdown, LaTeX, other letters, or invisible characters."""
    steps = first_alternatives(problem.key_steps)
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
    return {name: problem.answer([body], problem.wrong) for name, body in bodies.items()}


def _misplaced(problem: Problem) -> dict[str, str]:
    """Puts key steps into the wrong sections, or into an answer that is not complete and in order.

    Only R1-VL's headers need lines of their own. In other formats, a text in one line is one step.
    """
    steps, wrong = first_alternatives(problem.key_steps), problem.wrong
    listed = ", ".join(steps)
    whole, ending = problem.answer([listed], wrong), problem.form.ending
    body = whole.removesuffix(ending(wrong))
    return {
        "key steps in the description only": problem.answer(problem.wrong_steps, wrong, description=listed),
        "key steps in the rationale only": problem.answer(problem.wrong_steps, wrong, rationale=listed),
        "key steps behind the final answer": problem.answer(problem.wrong_steps, wrong) + "\n" + listed,
        **({"key steps, headers in one line": " ".join(whole.split())} if problem.form is R1VL else {}),
        "key steps, answer first": f"{ending(wrong)}\n\n{body}",
        "key steps, no final answer": body,
        "key steps, empty final answer": (body + ending("")).rstrip(),
    }


def _near_misses(problem: Problem) -> dict[str, str]:
    """Makes sentences with wrong statements that contain the text of key steps."""

    def sentences(change: Callable[[str], str]) -> str:
        groups = key_step_groups(problem.key_steps)[0]
        changed = ([change(text) for text in group if change(text) != text] for group in groups)
        return problem.answer(
            in_sentences(texts[0] for texts in changed if texts) or problem.wrong_steps, problem.wrong
        )

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
    """Guesses many key steps that a question might have, without knowing any."""
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
    return {name: problem.answer(body, problem.wrong) for name, body in bodies.items()}


def _hollow(problem: Problem) -> dict[str, str]:
    """Makes answers that have the required sections, or part of them, but no content."""
    wrong, sentence = problem.wrong, problem.wrong_steps[0]
    ending = problem.form.ending(wrong)
    body = problem.answer(problem.wrong_steps, wrong).removesuffix(ending)
    return {
        "headers only": problem.answer([""], "", description="", rationale=""),
        "headers and a final answer": problem.answer([""], wrong, description="", rationale=""),
        "headers in one line": " ".join(problem.answer([""], wrong, description="", rationale="").split()),
        "answer first": f"{ending}\n\n{body}",
        "no final answer": body,
        "one sentence 50 times": problem.answer([" ".join([sentence] * 50)], wrong),
        "one step 50 times": problem.answer([sentence] * 50, wrong),
        "10,000 empty steps": problem.answer([""] * 10_000, wrong),
        "the question as every step": problem.answer([problem.question] * 2, wrong, description=problem.question),
        "the question as the final answer": problem.answer(problem.wrong_steps, problem.question),
    }


def _many_answers(problem: Problem) -> dict[str, str]:
    """Makes final answers that name several answers."""
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
        "numbers 0 to 100": ", ".join(numbers),
        "numbers 0 to 100, as a set": f"$\\{{{', '.join(numbers)}\\}}$",
        "an interval: [0, 100]": "$[0, 100]$",
        "an inequality: x < 1000": "$x < 1000$",
        "an answer that is always true: x = x": "$x = x$",
    }
    answers = {name: problem.answer(problem.wrong_steps, final) for name, final in finals.items()}
    headers = "\n".join(map(problem.form.ending, guesses[1:]))
    return answers | {"many answers, a header each": f"{problem.answer(problem.wrong_steps, guesses[0])}\n{headers}"}


def _changed_answers(problem: Problem) -> dict[str, str]:
    """Makes final answers from the right one, such as a part of it. Where a change is none, a wrong answer is used."""
    gold = expected_answer(problem.solution, PRESETS["paper"])
    number = None if choice_letter(gold) else _NUMBER.search(gold)
    part = unit = around = flipped = problem.wrong
    if number is not None and Fraction(number[0]):
        value = Fraction(number[0])
        first = re.split(r"[./]", number[0])[0]
        part = first if first != number[0] else first[0] if len(first) > 1 else problem.wrong
        unit = number[0] + (" million" if gold.rstrip("$")[-1:].isdecimal() else " kg" if "kg" not in gold else " m")
        around = f"$({float(value - 1)}, {float(value + 1)})$"
        if "pm" not in gold and "±" not in gold:
            swapped = gold.translate({ord("+"): "-", ord("-"): "+"})
            flipped = swapped if swapped != gold else _NUMBER.sub(r"-\g<0>", gold, count=1)
    finals = {
        "the answer: a part of it": part,
        "the answer in a list with another": f"{gold} or {problem.wrong}",
        "the answer in another unit": unit,
        "the answer denied": f"not {gold}",
        "the answer: a range around it": around,
        "the answer with every sign flipped": flipped,
    }
    return {name: problem.answer(problem.wrong_steps, final) for name, final in finals.items()}


def _odd_text(problem: Problem) -> dict[str, str]:
    """Uses look-alike and invisible characters, and long runs of combining marks."""
    plain = problem.answer(problem.wrong_steps, problem.wrong)
    return {
        "look-alike headers": plain.replace("e", "\u0435"),
        "full-width headers": plain.translate({ord(sign): ord(sign) + 0xFEE0 for sign in "#<\\"}),
        "null bytes in all words": plain.replace(" ", " \x00"),
        "null bytes for an answer": problem.answer(problem.wrong_steps, "\x00" * 100),
        "combining marks for an answer": problem.answer(problem.wrong_steps, problem.wrong + "\u0301\u0327" * 50_000),
    }


def _bordered(text: str, kind: Callable[[str], bool], before: str, after: str) -> str:
    """Returns `text` with `before` in front if its first character is of this kind, and `after` likewise at its end."""
    text = text.strip()
    head, tail = (before if kind(text[:1]) else ""), (after if kind(text[-1:]) else "")
    return head + text + tail
