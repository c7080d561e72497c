"""The reward rules: golden rows of the released functions, each difference between the presets, hostile input."""

import dataclasses
import itertools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers.paths import GEOMETRY, GOLDEN
from helpers.waiting import assert_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from r1vl_jax.rewards import PRESETS, Rules, get_rules, score_answer, step_accuracy, step_validity
from r1vl_jax.rewards.answer_text import MAX_ANSWER_CHARS
from r1vl_jax.rewards.formats import R1VL
from r1vl_jax.rewards.normal import normal_text
from r1vl_jax.rewards.steps import answer_line, section_faults

HEAD = "### Image Description:\nA triangle.\n\n### Rationales:\nUse areas.\n\n### Let's think step by step.\n\n"
KEY_STEPS = {"Steps": [["one", "first"], "two"]}


def answer(final, steps=("one", "two")):
    """A complete answer in order."""
    body = "".join(f"### Step {number}:\n{step}\n\n" for number, step in enumerate(steps, 1))
    return f"{HEAD}{body}### The final answer is: {final}"


def accuracy(completion, solution, key_steps=None, rules="paper"):
    return step_accuracy([completion], [solution], [key_steps], rules=rules)[0]


def correct(final, gold, rules="paper"):
    return score_answer(answer(final), gold, None, rules=rules).correct


# --- golden -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden rows of the released functions are not here")
def test_released_reproduces_every_golden_row():
    rows = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 200
    columns = [[row[field] for row in rows] for field in ("completion", "solution", "key_steps")]
    got = step_accuracy(*columns, rules="released"), step_validity(columns[0], rules="released")
    for row, found_accuracy, found_validity in zip(rows, *got, strict=True):
        assert found_accuracy == pytest.approx(row["released_accuracy"], abs=1e-9), row["id"]
        assert found_validity == row["released_validity"], row["id"]


@pytest.mark.parametrize("rules", PRESETS)
def test_worked_example_of_the_overview_figure_matches_three_of_six(rules):
    groups = [
        ["AD is a median", "median is AD"],
        ["equal area"],
        ["AE is half of AD", "AE=1/2AD"],
        ["frac{12}{2} = 6", "12/2 = 6"],
        ["E is the midpoint"],
        ["frac{6}{2} = 3", "6/2 = 3"],
    ]
    text = answer("3", ["AD is a MEDIAN of ABC.", "The area of ABD is 12/2 = 6.", "So ABE has \\frac{6}{2} = 3."])
    score = score_answer(text, "### The final answer is: 3", {"Steps": groups}, rules=rules)
    assert (score.matched, score.total, score.k) == ((0, 3, 5), 6, 0.5)
    assert score.accuracy == pytest.approx(1.05)
    assert (score.validity, score.faults, score.answer, score.expected) == (1.0, (), "3", "3")
    assert score.reward == score.accuracy + score.validity


# --- rules and shapes -------------------------------------------------------------------------------------------------


def test_unknown_preset_is_an_error_that_names_the_known_and_the_nearest():
    with pytest.raises(ValueError, match=r"'relased'.*released, paper, robust.*did you mean 'released'"):
        get_rules("relased")
    with pytest.raises(TypeError, match="NoneType"):
        get_rules(None)


def test_the_presets_options():
    """Each option is where SPEC's table has it: six are paper's, and three robust's own."""
    released, paper, robust = (dataclasses.asdict(PRESETS[name]) for name in ("released", "paper", "robust"))
    assert list(PRESETS) == ["released", "paper", "robust"]
    own = ["nonempty_sections", "match_tokens", "refuse_stuffing"]
    assert [field for field in paper if paper[field] != robust[field]] == own
    assert [field for field in released if released[field] == paper[field]] == [*own, "format"]


# Answers that an option alone, turned round in `paper` or in `robust`, scores in another way.
PROBES = {
    "answer_from_section": (answer("3").replace("\n### The final", " so ### The final"), "3", None),
    "check_answer": (answer("**B: 12**"), "B", None),
    "require_answer": (answer("", ["There is one."]), "3", KEY_STEPS),
    "empty_alternative_matches": (answer("3"), "3", ["", "x"]),
    "sections_by_header": ("x " + answer("3"), "3", None),
    "full_order": (answer("3").replace("### Rationales:", "### R:") + "\n### Rationales: late", "3", None),
    "nonempty_sections": (answer("3").replace("A triangle.", "..."), "3", None),
    "match_tokens": (answer("3", ["So 112/2 = 61 follows."]), "3", ["12/2 = 6"]),
    "refuse_stuffing": (answer("3", ["one, two"]), "3", KEY_STEPS),
}


@pytest.mark.parametrize("preset", ["paper", "robust"])
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Rules) if field.name != "format"])
def test_every_option_alone_changes_some_score(field, preset):
    value = getattr(PRESETS[preset], field)
    scores = [score_answer(*PROBES[field], rules=get_rules(preset, {field: on})).reward for on in (value, not value)]
    assert scores[0] != scores[1]


def test_options_are_checked():
    assert get_rules("paper", {"match_tokens": True}) == dataclasses.replace(PRESETS["paper"], match_tokens=True)
    with pytest.raises(ValueError, match=r"no option is called 'match_token'.*did you mean 'match_tokens'"):
        get_rules("paper", {"match_token": True})
    with pytest.raises(ValueError, match="option match_tokens is 1, expected true or false"):
        get_rules("paper", {"match_tokens": 1})


def test_arrays_are_float64_of_one_entry_for_each_answer():
    texts = [answer("3"), answer("4"), "nothing"]
    found = step_accuracy(texts, ["3"] * 3, [KEY_STEPS] * 3, rules=PRESETS["paper"], alpha=0.2)
    valid = step_validity(texts)
    assert (found.dtype, found.shape, valid.dtype, valid.shape) == (np.float64, (3,), np.float64, (3,))
    np.testing.assert_allclose(found, [1.2, 0.2, 0.0])
    np.testing.assert_array_equal(valid, [1, 1, 0])
    assert step_accuracy([], [], []).shape == step_validity([]).shape == (0,)


def test_wrong_arguments_are_clear_errors():
    with pytest.raises(ValueError, match="2 completions, 1 solutions, 2 key_steps"):
        step_accuracy(["a", "b"], ["a"], [None, None])
    with pytest.raises(ValueError, match="completions: expected one entry for each answer, got a single str"):
        step_accuracy("a", ["a"], [None])
    with pytest.raises(ValueError, match="key_steps: .* got a single dict"):
        step_accuracy(["a"], ["a"], {"Steps": []})
    with pytest.raises(TypeError, match="solution: expected a text, got int"):
        score_answer("a", 3, None)


def test_outside_the_main_thread_it_refuses_rather_than_scores_wrongly():
    raised = []

    def check():
        try:
            score_answer(answer("2\\sqrt{3}"), "\\sqrt{12}", None)
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert len(raised) == 1 and "ScorerPool" in raised[0]


def test_importing_rewards_loads_nothing_heavy():
    code = "import sys, r1vl_jax.rewards; print([m for m in sys.modules if m.split('.')[0] in %r])"
    heavy = ("jax", "jaxlib", "flax", "transformers", "torch", "sympy", "math_verify")
    out = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- sections ---------------------------------------------------------------------------------------------------------


def test_a_complete_answer_has_no_faults():
    for rules in PRESETS.values():
        assert section_faults(answer("3"), rules) == ()


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize(
    "text, fault",
    [
        (answer("3").replace("Image Description", "Picture"), "no image description"),
        (answer("3").replace("Rationales", "Reasons"), "no rationale"),
        (answer("3").replace("The final answer is", "Answer"), "no final answer"),
        (answer("3").replace("Step 2", "Step 3"), "steps not numbered 1..n"),
        (answer("3").replace("Step 2", "Step 1"), "steps not numbered 1..n"),
        (answer("3").replace("Step 1", "Step 0"), "steps not numbered 1..n"),
        (answer("3").replace("Step 2", "Step " + "1" * 5000), "steps not numbered 1..n"),
    ],
)
def test_faults_of_every_preset(text, fault, rules):
    assert fault in [found.partition(" (found")[0] for found in section_faults(text, PRESETS[rules])]
    assert step_validity([text], rules=rules)[0] == 0


def test_no_steps_is_not_valid():
    text = answer("3", [])
    assert section_faults(text, PRESETS["paper"]) == ("no step",)
    assert section_faults(text, PRESETS["released"]) == ("no step 1",)


def test_released_order_is_the_answer_after_the_last_step_only():
    rules = PRESETS["released"]
    early = answer("3") + "\n### Step 3: more"
    assert section_faults(early, rules) == ("final answer before the last step",)
    assert section_faults(early + "\n### The final answer is:", rules) == ()  # a bare header ends the text
    backwards = answer("3").replace(HEAD, "") + "\n### Rationales: r\n### Image Description: d"
    assert section_faults(backwards, rules) == ()


def test_paper_order_is_the_whole_format():
    rules = PRESETS["paper"]
    early = answer("3") + "\n### Step 3: more"
    assert section_faults(early, rules) == ("step after final answer",)
    assert section_faults(early + "\n### The final answer is:", rules) == ("step after final answer",)
    backwards = answer("3").replace(HEAD, "### Rationales: r\n") + "\n### Image Description: d"
    assert section_faults(backwards, rules) == ("image description after final answer",)
    swapped = answer("3").replace(HEAD, "### Rationales: r\n### Image Description: d\n")
    assert section_faults(swapped, rules) == ("image description after rationale",)
    assert section_faults(answer("3").replace("### Let's think step by step.\n", ""), rules) == ()


def test_a_header_inside_a_line_is_a_section_only_for_released():
    text = answer("3").replace("\n### Rationales", " see ### Rationales")
    assert section_faults(text, PRESETS["released"]) == ()
    assert section_faults(text, PRESETS["paper"]) == ("no rationale",)


@pytest.mark.parametrize("rules", PRESETS)
def test_empty_sections_exist(rules):
    text = (
        "### Image Description:\n### Rationales:\n### Let's think step by step.\n### Step 1:\n### The final answer is:"
    )
    empty = tuple(f"empty {name}" for name in ("image description", "rationale", "step", "final answer"))
    assert section_faults(text, PRESETS[rules]) == (empty if rules == "robust" else ())


@pytest.mark.parametrize("filler", [" ", "...", "**", "- ", "\n\n", "#", "$$", "\x00"])
def test_sections_of_marks_alone_are_empty_for_robust(filler):
    for said in ("A triangle.", "Use areas.", "two"):
        text = answer("3").replace(said, filler)
        assert len(section_faults(text, PRESETS["robust"])) == 1
        assert section_faults(text, PRESETS["paper"]) == ()
    for final in ("√", "∞", "é", "3", "面"):
        assert section_faults(answer(final), PRESETS["robust"]) == ()


def test_step_bodies_end_at_the_next_line_that_starts_with_three_hashes():
    text = "### Step 1: A\n## b ### c\n### Note\nhidden\n### Step 2:\n\n D \n### Step 3:\n### Step 4: e"
    said = [text[start:end] for start, end in R1VL.step_bodies(text)]
    assert said == ["A\n## b ### c", "D ", "### Step 4: e"]  # an empty step swallows the next, as released
    assert R1VL.step_bodies("### Step x: a") == []


def test_answer_on_the_headers_line_or_below_it():
    for text in ("### The final answer is: 3", "### The final answer is:\n\n3\n\nThanks!", answer("3")):
        assert answer_line(text) == "3"
        assert R1VL.final_answer(text).startswith("3")
    assert R1VL.final_answer("### The final answer is:\n### Step 2: x") == ""
    assert answer_line("no header") is None and R1VL.final_answer("the ### The final answer is: 3") is None
    assert R1VL.final_answer("### The final answer is: 3\r\n### Step 2: x") == "3"


# --- the final answer -------------------------------------------------------------------------------------------------


def test_released_takes_the_answer_from_the_whole_text_and_paper_from_its_section():
    assert accuracy("I get 3.", "3", rules="released") == 1
    assert accuracy("I get 3.", "3", rules="paper") == 0
    two = answer("99") + "\n### The final answer is: 3"
    assert score_answer(two, "3", None, rules="released").correct
    assert not score_answer(two, "3", None).correct  # the first one counts: no second guess


@pytest.mark.parametrize("rules", ["paper", "robust"])
@pytest.mark.parametrize(
    "final, gold, right",
    [
        ("\n$$\n\\frac{3}{4}\n$$", "0.75", True),
        ("\n$$\n\\frac{3}{4}\n$$\nDone, 7.", "0.75", False),  # the section is read whole, the talk included
        ("12\n\nTell me if you need 5 more.", "12", True),
        ("13\n12", "12", False),
        ("12\n13", "13", False),
        ("**Answer:**\n12", "12", True),
        ("```\n12\n```", "12", True),
        ("<answer>\n12\n</answer>", "12", True),
        ("\\boxed{3}", "### The final answer is: 3", True),
    ],
)
def test_the_first_line_of_a_section_is_the_answer(final, gold, right, rules):
    assert correct(final, gold, rules) is right


@pytest.mark.parametrize(
    "text", [answer(""), answer(" \n"), answer("x").replace("### The final", "The final"), HEAD, "", " "]
)
def test_without_a_final_answer_only_released_pays_for_key_steps(text):
    paper, released = (score_answer(text, "3", KEY_STEPS, rules=rules) for rules in ("paper", "released"))
    assert (paper.accuracy, paper.answer) == (0.0, None)
    assert released.accuracy == pytest.approx(0.1 * released.k)
    assert paper.k == released.k == ("Step" in text)


def test_an_empty_answer_never_equals_an_empty_solution_for_paper():
    assert accuracy(answer(""), "### The final answer is:") == 0
    assert accuracy(answer(""), "### The final answer is:", rules="released") == 1


def test_a_wrong_answer_earns_its_key_steps():
    assert accuracy(answer("4", ["First,"]), "3", KEY_STEPS) == pytest.approx(0.05)


# --- key steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize(
    "key_steps, note",
    [
        (None, "key steps missing"),
        ({}, "key steps missing"),
        ({"Steps": None}, "key steps missing"),
        ({"Steps": []}, "key steps empty"),
        ((), "key steps empty"),
        (7, "key steps are not a list but int"),
        ({"Steps": "one"}, "key steps are not a list but str"),
    ],
)
def test_without_key_steps_k_is_zero_and_the_note_says_so(key_steps, note, rules):
    score = score_answer(answer("3"), "3", key_steps, rules=rules)
    assert (score.accuracy, score.k, score.total, score.matched, score.note) == (1.0, 0.0, 0, (), note)


@pytest.mark.parametrize("rules", PRESETS)
def test_what_is_not_text_is_never_matched_and_counted(rules):
    text = answer("3", ["This is one.", "And this is two."])
    score = score_answer(text, "3", [None, 7, [["one"], "two"], {"Steps": ["one"]}, [], "one"], rules=rules)
    assert (score.matched, score.total) == ((2, 5), 6)
    assert score.note == "4 key-step alternatives are not text"


def test_both_schemas_and_tuples_are_the_same():
    for key_steps in (KEY_STEPS, KEY_STEPS["Steps"], (("one", "first"), ("two",))):
        assert score_answer(answer("3"), "3", key_steps).matched == (0, 1)


def test_an_empty_alternative_matches_for_released_only():
    for key_steps in ([""], [["zzz", ""]]):
        assert score_answer("", "3", key_steps, rules="released").k == 1
        assert score_answer(answer("3"), "3", key_steps, rules="paper").k == 0


@pytest.mark.parametrize("rules", PRESETS)
def test_key_steps_are_searched_in_steps_only(rules):
    text = answer("one", ["nothing"]).replace("Use areas.", "one two")
    assert score_answer(text, "3", KEY_STEPS, rules=rules).k == 0


# --- robust -----------------------------------------------------------------------------------------------------------


def finds(key_step, said, rules="robust"):
    """Whether a step that says it, among words of its own, has the key step."""
    return score_answer(answer("3", [f"We now see that {said}"]), "3", [key_step], rules=rules).k == 1


@pytest.mark.parametrize(
    "key_step, said",
    [
        ("12/2 = 6", "\\frac{12}{2} = 6"),
        ("12/2 = 6", "12/2=6"),
        ("12/2 = 6", "frac{12}{2} = 6"),
        ("frac{12}{2} = 6", "$\\dfrac{12}{2}=6$."),
        ("\\frac12", "1/2 of it"),
        ("\\frac{a+b}{2}", "(a + b)/2"),
        ("0.50", "1/2 is the share"),
        ("1/2", "0.5"),
        ("6", "12/2"),
        ("-3", "x = -3"),
        ("1,000 m", "1000 metres"),
        ("60°", "$60^\\circ$"),
        ("60 degrees", "60^{\\circ}."),
        ("\\angle ABC", "∠ABC is right"),
        ("5 cm^2", "5 square centimetres"),
        ("5cm²", "5\\text{ cm}^{2}"),
        ("50%", "50\\% of them"),
        ("Option B", "(B) is right"),
        ("sqrt(3)", "√3"),
        ("x^2", "x²"),
        ("2*3", "2 \\times 3"),
        ("x <= 3", "$x \\leq 3$"),
        ("AD is a median.", "**AD** is a  MEDIAN, of course"),
        ("面积相等", "三角形的面积相等。"),
        ("x = 3", "- x = 3"),
        ("x = 3", "we find\nx = 3 cm"),
        ("AB = CD", "thus - AB = CD - holds"),
        ("90", "7.5(7.5 + 4.5) = 90."),
        ("AB = 5", "known sides:\n   - AB = 5\n   - BC = 6"),
        ("x = 3", "*x = 3*."),
        ("x = 3", "x = 3 - so the first is done"),
        ("1200", "$1{,}200$"),
        ("\\sin\\theta = 1", "sinθ = 1"),
        ("2\\pi r", "2πr"),
        ("60°", "60º"),
        ("AB = 12 cm", "AB = 12 \\mathrm{~cm}"),
        ("ABCD is a square", "ABCD is a square in the plane"),
    ],
)
def test_the_same_said_differently_is_found(key_step, said):
    assert finds(key_step, said)


@pytest.mark.parametrize(
    "key_step, said",
    [
        ("2", "12"),
        ("2", "2.5"),
        ("2", "12/2 = 6"),
        ("2", "x = -2"),
        ("12/2 = 6", "112/2 = 6"),
        ("12/2 = 6", "12/2 = 61"),
        ("12/2 = 6", "12/2 = 6.5"),
        ("12/2 = 6", "12/2 = 6/5"),
        ("x = 1", "x = 1/2"),
        ("x = 1", "2x = 1"),
        ("x = 1", "y + x = 1"),
        ("x = 1", "x = 1 + y"),
        ("x = 1", "x = 1y"),
        ("x = y", "x = y^2"),
        ("BC = 6", "AB + BC = 6"),
        ("median", "medians"),
        ("AD is a median", "AD is. A median"),
        ("5", "5x"),
        ("0.50", "0.51"),
        ("AB = CD", "AB = CD/2"),
        ("5 cm", "5 cm^2"),
        ("AB = 10", "2AB = 10"),
        ("AB = 10", "-AB = 10"),
        ("area = 9", "area = 9 \\pi"),
        ("x = 2", "x = 2 \\sqrt{3}"),
        ("x = 6", "\\sqrt{x} = 6"),
        ("x = 1", "sin x = 1"),
        ("x = 180°", "x = 180° - 140°"),
        ("x = 5", "x = 5 \\pm 2"),
        ("200", "$1{,}200$"),
        ("50", "50%"),
    ],
)
def test_what_only_looks_the_same_is_not_found(key_step, said):
    assert not finds(key_step, said)


def test_a_step_that_only_lists_key_steps_earns_nothing():
    key_steps = ["AD is a median", "equal area", "12/2 = 6"]

    def matched(*steps, **options):
        return score_answer(answer("3", steps), "3", key_steps, rules=get_rules("robust", options)).matched

    for stuffed in (
        ["AD is a median, equal area, 12/2 = 6"],
        ["AD is a median and equal area and also 12/2 = 6 and then next step"],
        key_steps,
        [f"Key step: {text}." for text in key_steps],
        ["AD is a median. Now equal area. And 12/2 = 6."],  # one word of its own for three key steps
    ):
        assert matched(*stuffed) == ()
        assert matched(*stuffed, refuse_stuffing=False) == (0, 1, 2)
    honest = ["As D halves BC, AD is a median.", "The two parts have equal area.", "So 12/2 = 6."]
    assert matched(*honest) == (0, 1, 2)
    # Key steps that follow from each other, in one sentence.
    assert matched("AD is a median, so they have equal area.", "Since AD is a median, 12/2 = 6.") == (0, 1, 2)
    # A list first does not spoil what is said properly later, and is not where it is found.
    score = score_answer(answer("3", [", ".join(key_steps), *honest]), "3", key_steps, rules="robust")
    assert score.matched == (0, 1, 2) and score.step_rewards[0] == 0 and all(score.step_rewards[1:])


def test_a_step_that_repeats_text_earns_nothing():
    said = "The area of this triangle is 12/2 = 6. "

    def matched(*steps, **options):
        return score_answer(answer("3", steps), "3", ["12/2 = 6"], rules=get_rules("robust", options)).matched

    assert matched(said) == (0,)
    assert matched(said * 5) == ()
    assert matched(said * 5, refuse_stuffing=False) == (0,)
    assert matched("The area is what we want. We halve the product.", said) == (0,)
    first = "The area of this triangle is what we want to know here."
    assert matched(first, first + " So 12/2 = 6.") == ()  # the second step is the first one again
    assert matched(first, first.replace("triangle", "square") + " So 12/2 = 6.") == (0,)


def test_steps_of_one_pattern_are_no_repetition():
    steps = [
        f"The height of the blue bar in {year} is {height}." for year, height in ((2003, 45), (2004, 52), (2005, 60))
    ]
    assert score_answer(answer("3", steps), "3", ["45", "52", "60"], rules="robust").k == 1


@pytest.mark.parametrize("options", [{"refuse_stuffing": True}, {"refuse_stuffing": True, "match_tokens": True}])
@pytest.mark.parametrize("text", ["", "no steps here"])
def test_an_empty_alternative_where_there_are_no_steps(text, options):
    assert score_answer(text, "5", ["", "  "], rules=get_rules("released", options)).k == 1


def test_honest_solutions_keep_their_key_steps(tmp_path):
    from r1vl_jax.shapes import make_task

    make_task(tmp_path / "shapes", sft_rows=0, rl_rows=200, heldout_rows=0, progress=False)
    rows = json.loads((tmp_path / "shapes" / "rl.json").read_text())
    real = GEOMETRY / "rl.json"
    rows += json.loads(real.read_text()) if real.exists() else []
    for row in rows:
        score = score_answer(row["solution"], row["solution"], row["key_steps"], rules="robust")
        assert (score.k, score.validity, score.correct) == (1, 1, True), row


@pytest.mark.parametrize(
    "final, gold, right",
    [
        *[(text, "3", False) for text in ("1 or 3", "1, 2, 3", "1 2 3", "1=2=3", "$1$ $2$ $3$", "0 to 3", "3±1")],
        *[(text, "3", True) for text in ("3", "x = 3", "6/2 = 3", "3 cm", "The length is 3.", "x = 2 + 1 = 3", "3.0")],
        *[(text, "7", False) for text in ("3+0, 4+0, 7", "5^1 or 6^1 or 7", "7 (or 8)", "x=1 x=7")],
        ("1x or 2x or 3x", "3x", False),
        *[
            (text, "40", True)
            for text in ("$180^\\circ - 140^\\circ = 40^\\circ$", "60 cm - 20 cm = 40 cm", "$\\angle 1 = 40$")
        ],
        ("$6 \\sqrt{2}$", "$\\sqrt{72}$", True),
        ("$3\\frac{1}{3}$", "$\\frac{10}{3}$", True),
        ("$1{,}234$", "1234", True),
        ("$f(2) = 5$", "5", True),
        ("(3, 4)", "(3, 4)", True),
        ("x = 3, y = 4", "x=3, y=4", True),
        ("1 or 3", "1 or 3", True),
    ],
)
def test_an_answer_is_one_answer(final, gold, right):
    for rules in ("paper", "robust"):
        assert correct(final, gold, rules) is right


@pytest.mark.parametrize("rules", PRESETS)
def test_hits_are_where_the_text_says_them(rules):
    """İ is two characters in lower case, so places in the lower-cased text are not those in the text."""
    text = answer("3", ["İİ then 12/2 = 6 comes.", "Further ÄD is a Median too, and 12/2 = 6."])
    score = score_answer(text, "3", ["äd is a median", ["zzz", "12/2 = 6"]], rules=rules)
    assert [(hit.group, text[hit.start : hit.end]) for hit in score.hits] == [(0, "ÄD is a Median"), (1, "12/2 = 6")]
    assert score.hits[1].start == text.index("12/2 = 6")
    assert [text[start:].startswith(f"### Step {k}:") for k, start in enumerate(score.step_starts, 1)] == [True, True]
    assert score.step_rewards == pytest.approx((0.05, 0.05))
    assert sum(score.step_rewards) == pytest.approx(0.1 * score.k)


def test_step_rewards_fall_where_the_key_step_is_complete():
    """Of the alternatives, the one said first counts; an answer without steps is one step."""
    text = answer("4", ["one apple", "first a pear", "second a two"])
    score = score_answer(text, "3", [["second", "first"], "two", "zzz", "apple"], alpha=0.4)
    assert score.step_rewards == pytest.approx((0.1, 0.1, 0.1))
    assert score_answer("nothing", "3", ["one"]).step_rewards == (0.0,)
    assert score_answer(answer("", ["one"]), "3", ["one"]).step_rewards == (0.0,)
    assert score_answer(answer("", ["one"]), "3", ["one"], rules="released").step_rewards == pytest.approx((0.1,))


# --- hostile input ----------------------------------------------------------------------------------------------------

NASTY = ["\x00", "a\x00b", "\ud800", "\udfff\ud800", "\\frac{1}{", "$$$", "\\boxed{" * 50, "{" * 500, "(" * 500]


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_scores_without_an_error(text, rules):
    for completion, solution in ((answer(text), "3"), (answer("3"), text), (text, text), (answer("4", [text]), "3")):
        score = score_answer(completion, solution, [[text], "one"], rules=rules)
        assert score.status == "ok" and 0 <= score.reward <= 2.1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["### ", "Step 1:", "Step 2:", "\n", "### The final answer is:", "### Step", "3", "\r"]),
            st.text(max_size=5),
        ),
        max_size=25,
    ).map("".join)
)
def test_any_text_has_faults_or_all_sections(text):
    for rules in PRESETS.values():
        faults = section_faults(text, rules)
        assert bool(faults) or ("### Step 1:" in text and "### The final answer is:" in text)
    R1VL.step_bodies(text), answer_line(text), R1VL.final_answer(text)


MEGABYTE = 2**20
LONG = {
    "ten thousand steps": lambda n: answer("3", [f"step {i} and some more words" for i in range(n // 105)]),
    "a megabyte in a step": lambda n: answer("3", ["word " * (n // 5)]),
    "a megabyte of blanks": lambda n: answer("3", [" " * n]),
    "a megabyte of line ends": lambda n: "### Step 1:" + "\n" * n + "### The final answer is:" + "\n" * n,
    "a megabyte of hashes": lambda n: "#" * n,
    "a megabyte of headers": lambda n: "### Step 1:" * (n // 11),
    "a megabyte of header lines": lambda n: "### The final answer is:\n" * (n // 25),
    "a megabyte of digits": lambda n: "### Step " + "1" * n,
    "half headers": lambda n: "### Step 1\n" * (n // 11),
}


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize("name", LONG)
def test_long_answers_are_parsed_in_linear_time(name, rules):
    def work(text):
        section_faults(text, PRESETS[rules]), R1VL.step_bodies(text), answer_line(text), R1VL.final_answer(text)

    assert_linear(work, LONG[name], MEGABYTE)


def test_ten_thousand_steps_are_valid_and_all_found():
    text = answer("3", [f"step {i} and some more words" for i in range(10_000)])
    score = score_answer(text, "3", [f"step {i} and" for i in range(0, 10_000, 1000)])
    assert (score.reward, score.k) == (pytest.approx(2.1), 1.0)


def test_a_megabyte_of_final_answer_is_cut():
    """Unicode normalisation sorts these marks, in quadratic time."""
    tries = itertools.count()

    def score(n):
        return score_answer(answer(f"{next(tries):05}" + "\u0315\u0316" * (n // 2)), "3", None)  # verdicts are cached

    assert_linear(score, int, MEGABYTE // 8)
    score = score(MEGABYTE)
    assert (score.correct, len(score.answer)) == (False, MAX_ANSWER_CHARS)


@pytest.mark.parametrize(
    "wanted, text, places",
    [
        ("ab = bc = ab", "ab = bc = ab = bc = ab", [(0, 12)]),
        ("so so", "so so so so so", [(0, 5), (6, 11)]),
        ("so so", "so so, so", [(0, 5)]),
        ("2", "2 2 x2 2", [(0, 1), (2, 3), (7, 8)]),
        ("x", "2x x x^2 x", [(3, 4), (9, 10)]),
        ("1/2", "0.5 is 1/2", [(0, 3), (7, 10)]),
    ],
)
def test_places_of_a_normal_form_do_not_overlap(wanted, text, places):
    found = normal_text(text)
    assert list(found.find(wanted)) == places
    assert found.find(wanted) == places  # what was found once is the same again
