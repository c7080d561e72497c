"""The answer check of `paper` and `robust`: pairs of every kind, what surrounds an answer, solutions, and reasons."""

import json

import pytest
from helpers.paths import SHARED
from rewards.answer_pairs import RIGHT, WRONG

from r1vl_jax.rewards import PRESETS, score_answer
from r1vl_jax.rewards.answer import expected_answer
from r1vl_jax.rewards.choices import choice_letter
from r1vl_jax.rewards.compare import check_answer

GOLDEN_ANSWERS = SHARED / "golden" / "answers.jsonl"


def pairs(lines):
    """Yields (solution, answer) of a table's lines."""
    for line in lines.strip().splitlines():
        gold, *answers = line.strip().split(" | ")
        for answer in answers:
            yield gold, answer


TABLE = [(kind, right) for right, table in ((True, RIGHT), (False, WRONG)) for kind in table]
EVERY = [
    (gold, answer, right)
    for kind, right in TABLE
    if kind != "solutions"
    for gold, answer in pairs((RIGHT if right else WRONG)[kind])
]


def verdict(answer, solution):
    return check_answer(answer, expected_answer(solution, PRESETS["paper"]))


@pytest.mark.parametrize(("kind", "right"), TABLE)
def test_pairs_of_each_kind(kind, right):
    table = list(pairs((RIGHT if right else WRONG)[kind]))
    judged = [(gold, answer, verdict(answer, gold)) for gold, answer in table]
    assert table and [one for one in judged if one[2].right is not right] == []


def test_the_tables_are_large():
    assert sum(right for *_, right in EVERY) > 500 and sum(not right for *_, right in EVERY) > 400


SURROUNDINGS = ["The answer is {}.", "Answer: {}", "答案：{}。", "The final answer is: {}", "Therefore, {}", "  {}  "]
MARKS = ["**{}**", "*{}*", "`{}`", "So the answer is **{}**.", "“{}”"]
LATEX = ["${}$", "\\({}\\)", "\\boxed{{{}}}", "$\\boxed{{{}}}$", "$\\text{{{}}}$"]


@pytest.mark.parametrize("form", [*SURROUNDINGS, *MARKS, *LATEX])
def test_what_surrounds_an_answer_changes_no_verdict(form):
    """On every third pair; no marks around marks, and no LaTeX around LaTeX and sentences."""
    changed = []
    for gold, answer, right in EVERY[::3]:
        if (form in MARKS and set(answer) & set('*`"“')) or answer.startswith("<"):
            continue
        if form in LATEX and (set(answer) & set("$*`。") or len(answer) > 20 or " is " in answer):
            continue
        if verdict(form.format(answer), gold).right is not right:
            changed.append((gold, form.format(answer), verdict(form.format(answer), gold)))
    assert changed == []


@pytest.mark.skipif(not GOLDEN_ANSWERS.exists(), reason="the golden answers are not here")
@pytest.mark.parametrize("rules", ["paper", "robust"])
def test_the_golden_answers(rules):
    """At most one of the wrong answers is paid, and at most 3% of the right ones are refused."""
    rows = [json.loads(line) for line in GOLDEN_ANSWERS.read_text(encoding="utf-8").splitlines()]
    paid, refused = [], []
    for row in rows:
        score = score_answer(f"### The final answer is: {row['answer']}", row["gold"], None, rules=rules)
        if score.correct is not row["right"]:
            (refused if row["right"] else paid).append((row["gold"], row["answer"], score.reason))
    right = sum(row["right"] for row in rows)
    assert (right, len(rows) - right) == (141, 90)
    assert len(paid) <= 1, paid
    assert len(refused) <= 0.03 * right, refused


@pytest.mark.parametrize(
    ("solution", "expected"),
    [
        ("### Step 1: x\n### The final answer is: 3\n\\boxed{4}", "3"),
        ("Answer: 1\n#### 2\n\\boxed{3}\n<answer>4</answer>", "4"),
        ("Answer: 1\n#### 2\n\\boxed{3}\nDone.", "3"),
        ("Answer: 1\n#### 2\nDone.", "2"),
        ("Answer: 1\nDone 5.", "1"),
        ("First\nthen 5", "then 5"),
        ("\\boxed{1} is no solution.\nThe others are \\boxed{2} and \\boxed{\\frac{1}{2}}.", "2, \\frac{1}{2}"),
        ("So\n$$\n\\frac{1}{2}\n$$", "$$\n\\frac{1}{2}\n$$"),
        ("<answer>\nB\n</answer>", "B"),
        ("\\boxed{}\nB", "B"),
        ("", ""),
    ],
)
def test_what_a_solution_marks_as_its_answer(solution, expected):
    assert expected_answer(solution, PRESETS["paper"]) == expected
    assert expected_answer(solution, PRESETS["released"]) == ("3" if "final" in solution else solution.strip())


@pytest.mark.parametrize(
    ("answer", "gold", "reason"),
    [
        ("3", "3", "text: the same"),
        ("Red.", "red", "text: equal"),
        ("blue", "red", "text: not equal"),
        ("(C) 12", "B", "choice: C, expected B"),
        ("12", "(B) 12", "choice: the option's text, text: equal"),
        ("a cat", "B", "choice: no option, expected B"),
        ("No, never", "Yes", "yes/no: no, expected yes"),
        ("maybe", "Yes", "yes/no: neither, expected yes"),
        ("0.5", "1/2", "value: equal"),
        ("12 kg", "12 cm", "value: another unit"),
        ("x = 3", "y = 3", "value: another name"),
        ("15 - 10", "5", "value: arithmetic is not carried out"),
        ("2, 3, 4", "2, 3", "value: 3 items, expected 2"),
        ("[0, 3)", "[0, 3]", "value: another end of the interval"),
        ("3 and a bit", "3", "value: the answer is not read whole"),
        ("x < 3", "3", "value: another kind of value"),
    ],
)
def test_the_reason_names_the_step_that_decided(answer, gold, reason):
    for rules in ("paper", "robust"):
        score = score_answer(f"### The final answer is: {answer}", gold, None, rules=rules)
        assert (score.reason, score.correct) == (reason, check_answer(answer, gold).right)
    assert score_answer("no header", gold, None).reason == "no final answer"
    assert score_answer(f"### The final answer is: {answer}", gold, None, rules="released").reason.startswith(
        ("text: the same", "math-verify: ")
    )


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[(text, "B") for text in ("B", "B.", "(b)", "B: 12", "B.12", "(B) 12", "Option b", "（Ｂ）")],
        *[
            (text, "B")
            for text in ("\\boxed{\\text{B}}", "Choice (B)", "**B**", "\\(B\\)", "The answer is B.", "B - 12")
        ],
        *[(text, None) for text in ("b", "A triangle", "A:B = 1:2", "A or B", "A, B", "(x) + 1", "", "BC", "B12", "x")],
        *[(text, None) for text in ("A: 1 or B: 2", "A. 1 B. 2", "A" + " " * 3000 + "x", "É", "option")],
    ],
)
def test_choice_letter(text, letter):
    assert choice_letter(text) == letter


def test_an_answer_longer_than_any_value_is_compared_as_text_alone():
    long = ", ".join(map(str, range(1000)))
    assert check_answer(f"  {long}", f"**{long}**").right
    assert not check_answer(long.replace("5", "6", 1), long).right


@pytest.mark.parametrize("option", ["A. ", "A: ", "(A) ", "A) ", "A - "])
def test_options_in_options_are_no_recursion(option):
    assert not check_answer(option * 1000 + "x", "5").right
    assert not check_answer("x", option * 1000 + "5").right
