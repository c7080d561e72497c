"""Key steps under `robust`: one statement in different signs is found, and what only looks alike is not."""

import pytest
from helpers.waiting import assert_linear

from r1vl_jax.keysteps.rows import normal_key
from r1vl_jax.rewards import PRESETS, score_answer
from r1vl_jax.rewards.context import resolve_signs
from r1vl_jax.rewards.normal import normal_text

HEAD = "### Image Description:\nA figure.\n\n### Rationales:\nLook.\n\n### Let's think step by step.\n\n"


def answer(said):
    return f"{HEAD}### Step 1:\n{said}\n\n### The final answer is:\n1"


def finds(key_step, said, rules="robust"):
    """Whether a step that says it, among words of its own, has the key step."""
    return score_answer(answer(f"We now see that {said}"), "1", [key_step], rules=rules).k == 1


SAME = [
    # a degree sign on one side
    ("180° - 57° = 123°", "180 - 57 = 123"),
    ("180 - 57 = 123", "180° - 57° = 123°"),
    ("180 - 57 = 123", "$180^\\circ-57^\\circ=123^{\\circ}$"),
    ("180° - 57 = 123", "180 - 57° = 123 degrees"),
    ("x = 45", "x° = 45° holds"),
    ("x° = 45°", "x = 45 holds"),
    ("∠A = 60°", "\\angle A = 60"),
    ("angle A = 60", "∠A = 60˚, of course"),
    ("60°", "the third is 60"),
    ("60", "the third is 60° here"),
    ("(2x + 10)° = 90°", "(2x + 10) = 90"),
    ("2x + 10 = 90", "2x + 10 = 90\\textdegree"),
    ("the 60° angle", "the 60-degree angle"),
    ("x = 45", "x = 45° (vertical angles)"),
    ("x = 45", "x = 45° and y = 30°"),
    # similar
    ("△ABC ~ △DEF", "$\\triangle ABC \\sim \\triangle DEF$"),
    ("triangle ABC ~ triangle DEF", "△ABC ∼ △DEF"),
    ("△ABC ∽ △DEF", "$\\triangle ABC \\sim \\triangle DEF$"),
    ("△ABC∽△DEF", "△ABC~△DEF"),
    ("△ABC ∼ △DEF", "$\\triangle ABC$ ~ $\\triangle DEF$"),
    ("△ABC ∼ △DEF", "△ABC ~△DEF"),
    ("ABC ∼ DEF", "ABC~DEF"),
    ("ABC \\sim DEF", "ABC ～ DEF"),
    # parallel
    ("AB // CD", "AB ∥ CD"),
    ("AB ∥ CD", "AB//CD"),
    ("AB || CD", "$AB \\parallel CD$"),
    ("AB // CD", "$AB \\| CD$"),
    ("AB ‖ CD", "AB // CD"),
    # emphasis
    ("AD is a median", "**AD** is a *median*"),
    ("AD is a median", "*AD* is a _median_."),
    ("AD is a median", "***AD*** is *a median*"),
    ("AD is a median", "**AD is a *median***"),
    ("AD is a median", "__AD__ is a median"),
    ("*AD* is a median", "AD is a median"),
    ("x_1 = 3", "*x_1 = 3*"),
    # products
    ("3 × 4 = 12", "3 x 4 = 12"),
    ("3 x 4 = 12", "$3 \\times 4 = 12$"),
    ("3 * 4 = 12", "3x4 = 12"),
    ("3 × 4 × 5 = 60", "3 X 4 X 5 = 60"),
    ("3 × 4 = 12", "$3$ x $4$ = 12"),
    ("3 × 4 = 12", "3 \\* 4 = 12"),
    ("5 cm × 2 cm = 10 cm²", "5 cm x 2 cm = 10 cm^2"),
    ("1/2 × 6 = 3", "\\frac{1}{2} x 6 = 3"),
    ("2 × (3 + 4) = 14", "2 x (3 + 4) = 14"),
    ("2 × -3 = -6", "2 x -3 = -6"),
    ("2 × √3", "2 x \\sqrt{3}"),
    # indices
    ("H2O", "H₂O is there"),
    ("H2O", "H_2O is there"),
    ("H₂O", "$\\mathrm{H}_2\\mathrm{O}$ is there"),
    ("C6H12O6", "C₆H₁₂O₆ is there"),
    ("x_1 = 3", "x₁ = 3"),
    ("x_{1} = 3", "x1 = 3"),
]


@pytest.mark.parametrize(("key_step", "said"), SAME)
def test_the_same_in_other_signs_is_found(key_step, said):
    assert finds(key_step, said)
    assert not finds(key_step, "nothing of it is here")


@pytest.mark.parametrize(
    ("key_step", "said"),
    [
        ("x = 180°", "x = 180° - 140°"),
        ("x = 180", "x = 180° - 140°"),
        ("x = 180", "x = 180°-140°"),
        ("120°", "120°/2 is it"),
        ("120", "120°/2 is it"),
        ("60", "-60° is it"),
        ("60°", "160° is it"),
        ("x = 60°", "2x = 60"),
        ("x = 60°", "x = 60.5°"),
        ("60°", "60% of it"),
        ("a polynomial of degree 3", "a polynomial of 3"),
        ("°", "60°"),
        ("△ABC ~ △DEF", "△ABC △DEF"),
        ("△ABC ~ △DEF", "△ABC ~ △DEG"),
        ("△ABC ~ △DEF", "△ABC ≅ △DEF"),
        ("AB // CD", "AB / CD"),
        ("AB // CD", "AB ⊥ CD"),
        ("2 = 6", "12//2 = 6"),
        ("AD is a median", "*AD* is no *median*"),
        ("3 4", "3 * 4"),
        ("3 × 4 = 12", "3 x = 12"),
        ("x = 12", "3x = 12"),
        ("x = 12", "3 x 4 = 12"),
        ("4 = 12", "3 x 4 = 12"),
        ("x", "3 x 4 = 12"),
        ("(3)*(4)*(5) = 60", "(3)(4)(5) = 60"),
        ("H2O", "H₂O₂ is there"),
        ("H2O", "H^2O is there"),
        ("x", "x₁ is there"),
        ("1", "x₁ is there"),
        ("1", "x_1 is there"),
        ("2", "$\\mathrm{H}_2\\mathrm{O}$ is there"),
        ("x = 3", "x₁ = 3"),
    ],
)
def test_what_only_looks_alike_is_not_found(key_step, said):
    assert not finds(key_step, said)


@pytest.mark.parametrize(
    "text",
    [
        "12~cm", "\\mathrm{~cm}", "triangle~ABC", "about ~5", "Figure~3",  # LaTeX's blank
        "3 * 4 * 5", "3*4*5", "(3)*(4)*(5)", "a* b *c", "2 *3", "* item", "**bold**", "x_1 + y_2", "snake_case_name",
        "2x = 6", "the value x is 5", "2 x = 6", "2 x2", "x 3", "f(x) = 3", "30-60-90", "5-x", "12//2",
    ],
)  # fmt: skip
def test_signs_that_mean_what_they_are(text):
    assert resolve_signs(text) == text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3 x 4 X 5x6", "3 × 4 × 5×6"),
        ("A ~ B", "A ∼ B"),
        ("see *a b* and _c_", "see  a b  and  c "),
        ("\uff33\uff54\uff45\uff50\u3000\uff11", "Step 1"),
        ("a 60-degree angle", "a 60 degree angle"),
    ],
)
def test_a_character_becomes_a_character(text, wanted):
    assert resolve_signs(text) == wanted and len(wanted) == len(text)


def test_hits_have_the_places_of_the_text():
    text = answer("So *x* = 45° holds, and 3 x 4 = 12 too, or **AD** is a *median*.")
    score = score_answer(text, "1", ["x = 45", "3 × 4 = 12", "AD is a median"], rules="robust")
    assert [text[hit.start : hit.end] for hit in score.hits] == ["x* = 45°", "3 x 4 = 12", "AD** is a *median"]


def test_other_presets_search_letter_by_letter():
    for rules in ("released", "paper"):
        assert not any(finds(key_step, said, rules) for key_step, said in SAME if key_step not in said)
    assert set(PRESETS) == {"released", "paper", "robust"}


def test_one_statement_has_one_key():
    """What `refine` and `lint` compare: the same as what training finds."""
    assert normal_key("180° - 57° = 123°.") == normal_key("180 - 57 = 123") == normal_key("$180-57^\\circ = 123$")
    assert normal_key("degree 3") != normal_key("3")


HOSTILE = {
    "stars": lambda n: "*a " * (n // 3),
    "words between stars": lambda n: "*a* " * (n // 4),
    "one star": lambda n: " *" + "a" * n,
    "underscores": lambda n: " _a" * (n // 3),
    "tildes": lambda n: "A~ " * (n // 3),
    "products": lambda n: "3 x " * (n // 4),
    "blanks": lambda n: "3" + " " * n + "x",
    "dollars": lambda n: "3$" * (n // 2),
    "degrees": lambda n: "°" * n,
    "values": lambda n: "45° " * (n // 4),
    "slashes": lambda n: "/" * n,
    "indices": lambda n: "x_1" * (n // 3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_signs_are_read_in_linear_time(name):
    assert_linear(lambda text: normal_text(text).find("x = 45°"), HOSTILE[name], 400_000)


def test_many_steps_in_other_letters_take_linear_time():
    """The whole text is rewritten once, not once for each step."""

    def many(size):
        return (
            "".join(f"### Step {k}:\nÄ *b* is {k} x 2\n\n" for k in range(size // 30)) + "### The final answer is:\n1"
        )

    assert_linear(lambda text: score_answer(text, "1", ["ä b is 7 × 2"], rules="robust"), many, 100_000)


@pytest.mark.parametrize("form", ["{}", "*{}*", "_{}_", "__{}__", "{}°"])
@pytest.mark.parametrize("separator", [" ~ ", " // ", " x ", " * ", "° ", " \\| ", "_1 "])
def test_lists_in_these_signs_earn_nothing(form, separator):
    key_steps = ["AD is a median", "180° - 57° = 123°", "3 × 4 = 12"]
    said = separator.join(form.format(text) for text in key_steps)
    assert score_answer(answer(said), "1", key_steps, rules="robust").matched == ()
