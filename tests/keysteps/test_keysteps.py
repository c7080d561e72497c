"""Key steps by rule: reading replies, extraction, refinement, alternatives, findings, conversion."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.paths import GEOMETRY
from helpers.waiting import assert_linear

from r1vl_jax.errors import RowError
from r1vl_jax.keysteps.augment import augmented
from r1vl_jax.keysteps.convert import convert_row
from r1vl_jax.keysteps.formulas import equations
from r1vl_jax.keysteps.lint import lint_rows
from r1vl_jax.keysteps.phrases import phrases
from r1vl_jax.keysteps.refine import cleaned, refined
from r1vl_jax.keysteps.reply import read_groups
from r1vl_jax.keysteps.rules import rule_groups, rules_row
from r1vl_jax.rewards import PRESETS
from r1vl_jax.rewards.key_steps import key_step_hits
from r1vl_jax.rewards.normal import normal_text

GROUPS = [["AD is a median", "median is AD"], ["equal area"]]


def solution(*bodies):
    steps = "\n\n".join(f"### Step {k}:\n{body}" for k, body in enumerate(bodies, 1))
    return f"### Image Description:\nA picture.\n\n### Rationales:\nA rule.\n\n{steps}\n\n### The final answer is:\n3"


def row(key_steps, *bodies, problem="Find x.", **more):
    return {"problem": problem, "solution": solution(*bodies), "key_steps": key_steps, **more}


# --- reply -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        '{"Steps": [["AD is a median", "median is AD"], ["equal area"]]}',
        '{"Steps": [["AD is a median", "median is AD"], "equal area"]}',
        'Sure!\n```json\n{"Steps": [["AD is a median", "median is AD",], "equal area",],}\n```\nAnything else?',
        "{'Steps': [['AD is a median', 'median is AD'], 'equal area']}",
        "{'Steps': [('AD is a median', \"median is AD\"), ['equal area', None]]}",
        'In [ABC] with {x}: {"steps": {"Steps": [["AD is a median", "median is AD"], "equal area"]}} (see [1])',
        '<think>Maybe {"Steps": ["wrong"]}?</think>{"Steps": [["AD is a median", "median is AD"], "equal area"]}',
        '<think>{"Steps": ["wrong"]}</think>Steps: 1. AD is a median\n  * median is AD\n2. equal area',
        'A draft: {"Steps": ["draft"]} Better: {"Steps": [["AD is a median", "median is AD"], "equal area"]}',
        'Steps: [["AD is a median", "median is AD"], ["equal area"]]',
        '[["AD is a median", "median is AD"], "equal area"]',
        '{"Key Steps": [{"step": "AD is a median", "alternatives": ["median is AD"]}, {"step": "equal area"}]}',
        '{"Steps": {"1": ["AD is a median", "median is AD"], "2": "equal area"}}',
        '{"Step 1": ["AD is a median", "median is AD"], "Step 2": "equal area"}',
        "The key steps are:\n\n1. **AD is a median**\n   - median is AD\n2. equal area\n\nI hope this helps.",
    ],
)
def test_replies_that_can_be_read(reply):
    assert read_groups(reply) == GROUPS


def test_lists_without_alternatives():
    assert read_groups("Steps: 1. AD is a median 2. 12 / 2 = 6 3) x = 3") == [
        ["AD is a median"],
        ["12 / 2 = 6"],
        ["x = 3"],
    ]
    assert read_groups("- AD is a median\n- equal area\n") == [["AD is a median"], ["equal area"]]
    assert read_groups("Step 1: AB = CD\nStep 2: x = 3") == [["AB = CD"], ["x = 3"]]
    assert read_groups('{"Steps": "1. AB = CD\\n2. x = 3"}') == [["AB = CD"], ["x = 3"]]
    assert read_groups('{"Steps": [13, "it\'s [0, 1)"]}') == [["13"], ["it's [0, 1)"]]


def test_latex_whose_backslashes_were_not_doubled():
    reply = r'{"Steps": ["\frac{1}{2} = 0.5", "x \neq 3", "\sin x", "2 \times 3", "\\theta = 1", "\beta", "\angle A"]}'
    wanted = [r"\frac{1}{2} = 0.5", r"x \neq 3", r"\sin x", r"2 \times 3", r"\theta = 1", r"\beta", r"\angle A"]
    assert read_groups(reply) == [[text] for text in wanted]
    assert read_groups(reply.replace('"', "'")) == [[text] for text in wanted]
    assert read_groups('{"Steps": ["two\\nlines"]}') == [["two\nlines"]]


@pytest.mark.parametrize(
    "reply",
    [
        "I cannot help with that.",
        '{"Steps": []}',
        '{"Steps": [null, ""]}',
        '{"Steps": [["AD is a median", "median is AD"], ["equal ar',  # cut off: a part is not the whole
        'Steps: [["AD is a median", "median is AD"], ["equal ar',
        "See [1] and [2].",
        "",
        "[" * 50_000,
        "{'Steps': [" * 20_000,
        "[" * 3000 + "]" * 3000,
    ],
)
def test_replies_without_key_steps_fail_and_show_their_head(reply):
    with pytest.raises(RowError) as caught:
        read_groups(reply)
    assert " ".join(reply.split())[:20] in str(caught.value).replace('\\"', '"')
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("opening", ["[", "{'Steps': ["])
def test_replies_full_of_brackets_are_read_in_linear_time(opening):
    """Opening brackets are tried one after the other, but not all of them."""

    def work(reply):
        with pytest.raises(RowError):
            read_groups(reply)

    assert_linear(work, lambda size: opening * (size // len(opening)), 96_000)


# --- formulas and phrases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Divide by 4: y = 9.", ["y = 9"]),
        ("ED = AD - AE = 27 - 12 = 15.", ["ED = AD - AE", "27 - 12 = 15"]),
        ("so XZ bisects arc CD and arc CD = 2 * 40 = 80.", ["arc CD = 2 * 40", "2 * 40 = 80"]),
        ("Thus, $x = 13$ and \\(\\angle A = 60^\\circ\\).", ["x = 13", "\\angle A = 60^\\circ"]),
        ("\\[ \\frac{12}{2} = 6 \\]", ["\\frac{12}{2} = 6"]),
        ("\\text{Area} = \\pi r^2", ["\\text{Area} = \\pi r^2"]),
        ("5 cm + 3 cm = 8 cm in total", ["5 cm + 3 cm = 8"]),
        ("so the total is 3 + 4 = 7 apples", ["3 + 4 = 7"]),
        ("y < -3, z >= 1,000 and (a + b)^2 = c", ["y < -3", "z >= 1,000", "(a + b)^2 = c"]),
        ("isosceles because AB = AC (given).", ["AB = AC"]),
        ("(see AB = CD) so (so x = (3 + 4))", ["AB = CD", "x = (3 + 4)"]),
        ("12 a day is x = 12 a day", ["x = 12"]),
        ("base * height = 12", ["base * height = 12"]),
        ("The slope m = (y2 - y1)/(x2 - x1)", ["m = (y2 - y1)/(x2 - x1)"]),
        ("5! = 120, AB:BC = 1:2", ["5! = 120", "AB:BC = 1:2"]),
        ("= 5, x = , 3 => 4, x -> y, a right-angled one", []),
    ],
)
def test_equations_in_text(text, wanted):
    assert [text[start:end] for start, end in equations(text, 0, len(text))] == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("AD is a median, so the areas are equal", ["AD is a median"]),
        ("AE is half of AD and E is the midpoint of AD", ["AE is half of AD", "E is the midpoint of AD"]),
        ("Hence XZ is perpendicular to CD.", ["XZ is perpendicular to CD"]),
        ("Triangle ABC is isosceles because", ["Triangle ABC is isosceles"]),
        ("$AD$ is perpendicular to $BC$", ["$AD$ is perpendicular to $BC$"]),
        ("M and N are consecutive angles: 1", ["M and N are consecutive angles"]),
        ("Line l is parallel to line m.", ["Line l is parallel to line m"]),
        ("The radius is 5 cm and BC is 10", ["radius is 5", "BC is 10"]),
        ("the number of red balls is 8; there are 3 red circles in it", ["number of red balls is 8", "3 red circles"]),
        # what they say is not true of the name that stands last before them
        ("The angle at O is right", []),
        ("The sum of angle A and angle B is 90", []),
        ("It is 4 and the answer is 7. The length is 2 + x", []),
    ],
)
def test_phrases_in_text(text, wanted):
    assert [text[start:end] for start, end in phrases(text, 0, len(text))] == wanted


# --- rules -----------------------------------------------------------------------------------------------------------


def test_rules_take_each_steps_first_in_order():
    text = solution(
        "As drawn, AD is a median, which gives us BD = CD, while AB = 12 and AC = 5.",
        "The area of ABD is half of it: $\\frac{12}{2} = 6$.",
        "Again BD=CD, thus x = 3.",
    )
    assert rule_groups("Given AB=12, find x.", text, per_step=2) == [
        ["AD is a median"],
        ["BD = CD"],
        ["\\frac{12}{2} = 6"],
        ["x = 3"],
    ]
    assert [group[0] for group in rule_groups("Find x.", text, per_step=3)][:3] == [
        "AD is a median",
        "BD = CD",
        "AB = 12",
    ]
    assert rule_groups("Find x.", text, per_step=1)[0] == ["AD is a median"]


def test_rules_refuse_what_they_cannot_use():
    with pytest.raises(RowError, match="no step in the format r1vl"):
        rules_row({"problem": "Find x.", "solution": "x = 3"}, per_step=3)
    with pytest.raises(RowError, match="no equation"):
        rules_row(row(None, "Look at it."), per_step=3)
    with pytest.raises(RowError, match="field 'solution': missing"):
        rules_row({"problem": "Find x."}, per_step=3)


def test_rules_on_real_problems():
    path = GEOMETRY / "rl.json"
    if not path.is_file():
        pytest.skip("no real problems here")
    for one in json.loads(path.read_text()):
        groups = rule_groups(one["problem"], one["solution"])
        assert len(groups) >= 2, one["problem"]
        for rules in PRESETS.values():
            hits = key_step_hits(one["solution"], groups, rules)
            assert [hit.group for hit in hits] == list(range(len(groups)))
        question = normal_text(one["problem"])
        assert not [text for [text] in groups if any(question.find(text))]
        found = lint_rows([(0, one | {"key_steps": {"Steps": augmented(refined(groups), one["problem"])}})])
        assert not found, found


# --- refine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2. So, AD is a median.", "AD is a median"),
        ("Step 3: 12/2 = 6", "12/2 = 6"),
        ("### Step 2: Therefore, we have x = 3;", "x = 3"),
        ('"AD is a median"', "AD is a median"),
        ("- **Thus** x = 5", "x = 5"),
        ("This gives us  x\n= 4", "x = 4"),
        ("First, AB = CD", "AB = CD"),
        ("(1) So that AB = CD", "AB = CD"),
        ("...", ""),
        # what is a part of the statement stays
        ("3.5 = x", "3.5 = x"),
        ("2 - 1 = 1", "2 - 1 = 1"),
        ("- 5 = x", "- 5 = x"),
        ("x = 3!", "x = 3!"),
        ("First 3 terms", "First 3 terms"),
        ("Sonya has 3", "Sonya has 3"),
        ("'a' and 'b'", "'a' and 'b'"),
        ("(a + b)", "(a + b)"),
    ],
)
def test_cleaned(text, wanted):
    assert cleaned(text) == wanted


def test_refined_drops_what_is_there_twice():
    assert refined([["So x = 3", "x=3", "\\frac{1}{2}", "1/2"], ["", "..."], ["x = 3."], ["y = 1", "x = 3"]]) == [
        ["x = 3", "\\frac{1}{2}"],
        ["y = 1"],
    ]


# --- augment ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\\frac{12}{2} = 6", {"12/2 = 6", "6 = \\frac{12}{2}", "6 = 12/2", "12/2=6"}),
        ("\\sqrt{3} \\times 2", {"sqrt(3) * 2"}),
        ("$\\angle A = 60^\\circ$", {"\\angle A = 60^\\circ", "angle A = 60 degrees", "angle A = 60°"}),
        ("x = \\frac{-b + \\sqrt{b^2}}{2a}", {"x = (-b + sqrt(b^2))/(2a)"}),
        ("\\frac{1}{4}x = 2", {"(1/4)x = 2"}),
        ("a + b = c", {"c = a + b", "b + a = c", "a+b=c", "a + b equals c", "a + b is equal to c"}),
        ("2 * 40 = 80", {"40 * 2 = 80", "80 = 2 * 40"}),
        ("x <= 3", {"3 >= x"}),
        ("AB is perpendicular to CD", {"AB ⊥ CD", "AB \\perp CD", "CD ⊥ AB", "CD is perpendicular to AB"}),
        ("AB \\parallel CD", {"AB ∥ CD", "AB is parallel to CD"}),
        ("triangle ABC is congruent to triangle DEF", {"△ABC is congruent to △DEF", "triangle ABC ≅ triangle DEF"}),
        ("∠ABC = 60°", {"angle ABC = 60°", "∠ABC = 60 degrees"}),
        ("x equals 13", {"x = 13", "13 = x"}),
    ],
)
def test_alternatives(text, wanted):
    (group,) = augmented([[text]], "", most=30)
    assert group[0] == text
    assert wanted <= set(group)
    assert len({" ".join(one.lower().split()) for one in group}) == len(group)


@pytest.mark.parametrize("text", ["AD is a median", "13", "a = b = c", "\\unknown{x}", "the total is 3 + 4 = 7 apples"])
def test_what_has_no_other_form_stays_alone(text):
    assert augmented([[text]], "", most=30) == [[text]]


def test_terms_are_exchanged_only_where_that_changes_nothing():
    for text, wrong in [
        ("a - b = c", "b - a = c"),
        ("a - b + c = d", "c - b + a = d"),
        ("a / b = c", "b / a = c"),
        ("a + b * c = d", "b + a * c = d"),
        ("-a + b = c", "b + -a = c"),
        ("2^3 * 4 = 32", "4 * 2^3 = 32"),
    ]:
        assert wrong not in augmented([[text]], "", most=30)[0]
    assert "b > a" in augmented([["a < b"]], "", most=30)[0]


def test_the_number_of_alternatives_is_capped_and_given_ones_stay():
    given = [f"x = {n}" for n in range(5)]
    assert augmented([given], "", most=3) == [given]
    (group,) = augmented([given], "", most=7)
    assert group[:5] == given and len(group) == 7


def test_no_alternative_is_in_the_question_or_in_another_group():
    assert "CD = AB" not in augmented([["AB = CD"]], "Given that CD = AB, find x.", most=30)[0]
    first, second = augmented([["a = b"], ["b = a"]], "", most=30)
    assert not {text.lower() for text in first} & {text.lower() for text in second}
    given = [["AD is a median"], ["c = d"]]
    wordings = [["c=d", "median AD", "AD halves it"], []]
    assert augmented(given, "Draw the median AD.", 9, wordings)[0] == ["AD is a median", "AD halves it"]


# --- lint ------------------------------------------------------------------------------------------------------------


def kinds(*rows, **options):
    return [(one.row, one.group, one.kind) for one in lint_rows(enumerate(rows), **options)]


GOOD = row(
    {"Steps": [["AD is a median"], ["12/2 = 6", "6 = 12/2"]]}, "As drawn, AD is a median.", "We halve it: 12/2 = 6."
)


def test_good_rows_have_no_findings():
    assert kinds(GOOD) == []


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        (None, [(0, None, "missing")]),
        ([], [(0, None, "missing")]),
        ("text", [(0, None, "missing")]),
        ([["12/2 = 6", 6]], [(0, 0, "not_text")]),
        (["12/2 = 6", None], [(0, 1, "not_text"), (0, 1, "empty"), (0, 1, "absent")]),
        ([["12/2 = 6", " "]], [(0, 0, "empty")]),
        ([["12/2 = 6", "12/2  = 6"]], [(0, 0, "duplicate")]),
        (["12/2 = 6", "\\frac{12}{2} = 6"], [(0, 1, "duplicate")]),
        (["6"], [(0, 0, "short")]),
        (["median"], []),
        ([["AD is a median", "total"]], [(0, 0, "general")]),
        (["x = 99"], [(0, 0, "absent")]),
        (["2 = 6"], [(0, 0, "absent")]),  # a piece of an equation is not found
        (["AC = 5"], [(0, 0, "absent"), (0, 0, "question")]),
    ],
)
def test_findings(groups, wanted):
    one = GOOD | {"key_steps": groups if groups is None else {"Steps": groups}, "problem": "If AC=5, find x."}
    assert kinds(one) == wanted
    if isinstance(groups, list):
        assert kinds(one | {"key_steps": groups}) == wanted  # the list without the object around it


def test_too_many_groups_and_rows_that_miss_fields():
    assert (0, None, "many") in kinds(GOOD, max_groups=1)
    assert kinds(GOOD, max_groups=2) == []
    assert kinds({"key_steps": {"Steps": ["x = 3"]}}) == [(0, None, "unusable")] * 2
    assert kinds(GOOD | {"problem": 3}) == [(0, None, "unusable")]


def test_key_steps_that_every_solution_has_are_too_general():
    rows = [
        row({"Steps": [["the sides are equal"], [f"x = {n}"]]}, f"We see the sides are equal, and x = {n}.")
        for n in range(10)
    ]
    assert kinds(*rows) == [(n, 0, "general") for n in range(10)]
    assert kinds(*rows, common_share=1.0) == []
    assert kinds(*rows[:3]) == []  # two others are no evidence


def test_lint_takes_linear_time():
    def make(size):
        return [
            row(
                {"Steps": [[f"x = {n}"], ["AD is a median", f"{n} + 1"]]},
                f"So AD is a median, {'and more ' * 60} x = {n}.",
                "It goes on: y = 4.",
            )
            for n in range(size)
        ]

    assert_linear(lambda rows: lint_rows(enumerate(rows)), make, 1000)


# --- convert ---------------------------------------------------------------------------------------------------------


def test_convert_renames_fields_and_reads_key_steps():
    raw = {
        "image": ["a.png"],
        "question": "Q",
        "solution": "S",
        "response": '```json\n{"Steps": [["a b"], "c d"]}\n```',
        "id": 7,
    }
    assert convert_row(raw) == {
        "image_path": "a.png",
        "problem": "Q",
        "solution": "S",
        "response": raw["response"],
        "id": 7,
        "key_steps": {"Steps": [["a b"], ["c d"]]},
    }


@pytest.mark.parametrize(
    "value", ["{'Steps': ['a b']}", {"Steps": ["a b"]}, [["a b"]], {"Steps": [["a b"]]}, "Steps: 1. a b"]
)
def test_convert_normalises_key_steps(value):
    out = convert_row({"image_path": None, "problem": "Q", "solution": "S", "key_steps": value, "output": "1. no"})
    assert out["key_steps"] == {"Steps": [["a b"]]}


def test_convert_reads_the_field_that_it_is_told():
    raw = {"images": ["a", "b"], "problem": "Q", "solution": "S", "key_steps": ["old one"], "gpt": "1. new one"}
    out = convert_row(raw, ["gpt"])
    assert out["key_steps"] == {"Steps": [["new one"]]} and out["image_path"] == ["a", "b"]
    with pytest.raises(RowError, match="no field 'other'"):
        convert_row(raw, ["other"])


@pytest.mark.parametrize("field", ["problem", "solution"])
def test_convert_names_what_is_missing(field):
    raw = {"problem": "Q", "solution": "S", "key_steps": ["a b"]}
    del raw[field]
    with pytest.raises(RowError, match=f"field '{field}': missing"):
        convert_row(raw)
    with pytest.raises(RowError, match="key_steps"):
        convert_row({"problem": "Q", "solution": "S", "key_steps": {"Steps": []}})


# --- the package -----------------------------------------------------------------------------------------------------


def test_no_jax_is_loaded():
    code = "import sys, r1vl_jax.keysteps.__main__; sys.exit(bool({'jax', 'flax', 'openai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
