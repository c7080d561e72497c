"""Hostile answers and key steps: every preset scores them, or gives them up at the time limit, and goes on."""

import dataclasses
import math

import pytest
from helpers.waiting import assert_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from r1vl_jax.rewards import PRESETS, ScorerPool
from r1vl_jax.rewards.answer import expected_answer, final_answer
from r1vl_jax.rewards.choices import choice_letter
from r1vl_jax.rewards.formats import R1VL
from r1vl_jax.rewards.key_steps import key_step_groups, key_step_hits
from r1vl_jax.rewards.steps import section_faults

LIMIT_S = 1.0
MEGABYTE = 10**6
SECTIONS = "### Image Description: A triangle.\n### Rationales: Areas.\n### Let's think step by step.\n"
HEAD = SECTIONS + "### Step 1: We halve it, so 12/2 = 6 holds.\n### The final answer is: "
HONEST = HEAD + "$\\frac{6}{2}$"
KEY_STEPS = {"Steps": [["12/2 = 6", "frac{12}{2} = 6"], "AD is a median"]}

PIECES = [
    *("\x00", "\ud800", "\udfff\ud800", "\u2028", "\x85", "\r\n", "\u202e", "\u200f", "\u0300", "\u0323\u0301"),
    *("e\u0301", "İ", "ﷺ", "½", "\U0001f600", "١٢", "²", " ", "\t", "\n", "#", "###", "\n### ", "### Step 1:", "a"),
    *("\n### Step 1:", "\n### Step 01: x", "\n### Step 2: 12/2 = 6", "\n### The final answer is:"),
    *(
        "\n### The final answer is: 3",
        "12/2 = 6",
        "AD is a median",
        "A or B",
        "option (B) ",
        "[",
        "|",
        "**",
        ".*",
        "(?=",
    ),
    *("[a-z]+", "(a+)+$", "\\", "\\frac", "\\frac{", "\\frac{1}{", "\\frac{\\frac{", "}{", "{", "}", "$", "$$", "\\["),
    *(
        "\\begin{matrix}",
        "\\left(",
        "\\boxed{",
        "\\text{",
        "\\sqrt[",
        "^",
        "_",
        "(",
        ")",
        "(x",
        "9",
        "1,000",
        "0.",
        "/0",
    ),
    *("1e999999999", "-", "+1", "=", "1=1,", "10^10^10^10", "!!!"),
]


def text_of(pieces, final):
    """The pieces one after the other, or below the final answer's header."""
    text = "".join(piece * count for piece, count in pieces)[: 2 * MEGABYTE]
    return HEAD + text if final else text


pieces = st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=()), max_size=20)
counts = st.sampled_from([1, 1, 1, 1, 2, 3, 60, 10_000, MEGABYTE])
hostile_texts = st.builds(text_of, st.lists(st.tuples(pieces, counts), min_size=1, max_size=6), st.booleans())
leaves = st.none() | st.booleans() | st.integers() | st.floats() | pieces
nested = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(pieces, inner, max_size=3))
hostile_key_steps = nested | st.builds(lambda groups: {"Steps": groups}, nested)


@pytest.fixture(scope="module")
def pool():
    with ScorerPool(2, LIMIT_S, memory_gib=2) as pool:
        yield pool


def check(score, alpha=0.1):
    assert score.status in ("ok", "timeout", "error", "crash")
    for value in (score.accuracy, score.validity, score.reward):
        assert math.isfinite(value) and 0 <= value <= 2 + alpha + 1e-9
    assert score.reward == score.accuracy + score.validity
    assert 0 <= score.k <= 1 and len(score.step_rewards) == max(1, len(score.step_starts))
    assert score.status != "timeout" or score.note == f"took longer than {LIMIT_S:g} s"
    if score.status != "ok":
        assert dataclasses.replace(score, status="ok", note="") == type(score)() and score.note


@pytest.mark.parametrize("rules", PRESETS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(hostile_texts, hostile_key_steps, st.booleans()), min_size=1, max_size=4))
def test_hostile_rows_get_a_score_and_the_pool_goes_on(pool, rules, rows):
    completions = [text for text, _, _ in rows] + [HONEST]
    solutions = [text if same else "### The final answer is: 3" for text, _, same in rows] + ["3"]
    key_steps = [steps for _, steps, _ in rows] + [KEY_STEPS]
    scores = pool.score(completions, solutions, key_steps, rules=rules)
    for score in scores:
        check(score)
    assert scores[-1].status == "ok" and scores[-1].correct and scores[-1].reward == pytest.approx(2.05)


BOMBS = [
    *("10^10^10^10", "$9^{9^{9^{9}}}$", "$100000!!!$", "1e999999999", "9" * 4000, "$" + "9" * 4000 + "!$", "1/" * 2000),
    *(
        "$" + "\\frac{" * 600 + "$",
        "$" + "\\frac{1}{" * 400 + "2" + "}" * 400 + "$",
        "$" + "{" * 2000 + "}" * 2000 + "$",
    ),
    *(
        "$" + "(" * 1500 + "$",
        "$" + "\\sqrt{" * 500 + "2" + "}" * 500 + "$",
        "\\boxed{" * 500,
        "$" + "2^" * 1000 + "2$",
    ),
]


@pytest.mark.parametrize("rules", PRESETS)
def test_bombs_for_the_verifier_are_wrong_or_given_up(pool, rules):
    completions = [HEAD + bomb for bomb in BOMBS] + [HONEST]
    scores = pool.score(completions, ["3"] * len(completions), [KEY_STEPS] * len(completions), rules=rules)
    for score in scores:
        check(score)
    assert [score.correct for score in scores] == [False] * len(BOMBS) + [True]
    if rules == "released":
        assert scores[0].status == "timeout"  # no limit of math-verify's own ends this one
    else:
        assert {score.status for score in scores} == {"ok"}  # nothing of their size is computed


ROOT_OF_TWO = "### The final answer is: $\\sqrt{2}$"
FORMULA_BOMBS = [
    f"${bomb}$"
    for bomb in (
        *("e^{e^{e^{100}}}", "\\sqrt{2}^{10^{10^{10}}}", "\\sin(10^{10^{5}})", "\\binom{10^9}{10^8}", "\\log(9^{9^9})"),
        *("\\sqrt{" + "9" * 4000 + "}", "\\sqrt{" * 25 + "2" + "}" * 25, "+\\sqrt{2}" * 100, "(1+\\sqrt{2})" * 90),
        *("\\exp(\\exp(\\exp(\\exp(9))))", "(1+\\sqrt{2})^{9999}", "0^{-\\sqrt{2}}", "((" * 20 + "\\pi" + "))" * 20),
        *("\\frac{\\sqrt{2}}{0}", "\\sqrt[0]{2}", "(-\\sqrt{2})!", "\\ln 0"),
    )
]


@pytest.mark.parametrize("rules", ["paper", "robust"])
def test_bombs_for_the_algebra_are_wrong_or_given_up(pool, rules):
    """Unlike numbers, these are compared by SymPy."""
    completions = [HEAD + bomb for bomb in FORMULA_BOMBS] + [HEAD + "2^{1/2}"]
    count = len(completions)
    scores = pool.score(completions, [ROOT_OF_TWO] * count, [KEY_STEPS] * count, rules=rules)
    for score in scores:
        check(score)
    assert [score.correct for score in scores] == [False] * (count - 1) + [True]


# Texts of n characters or so, each the worst case of some rule.
LONG = {
    "null bytes": lambda n: "\x00" * n,
    "lone surrogates": lambda n: "\ud800" * n,
    "one word": lambda n: "a" * n,
    "words": lambda n: "a b " * (n // 4),
    "the key step": lambda n: "12/2 = 6 " * (n // 9),
    "the key step in many steps": lambda n: "\n### Step 2: so 12/2 = 6 it is" * (n // 31),
    "steps in order": lambda n: "".join(f"\n### Step {number}: so 12/2 = 6" for number in range(2, n // 26)),
    "steps without a body": lambda n: "### Step 1:" * (n // 11),
    "step headers and blanks": lambda n: "### Step 1:" + " " * n,
    "one step's number": lambda n: "### Step " + "1" * n + ":",
    "final-answer headers": lambda n: "\n### The final answer is:" * (n // 25),
    "line ends": lambda n: "\n" * n,
    "Windows line ends": lambda n: "\r\n" * (n // 2),
    "line separators": lambda n: "\u2028" * n,
    "header marks": lambda n: "\n###" * (n // 4),
    "blanks": lambda n: " " * n,
    "open braces": lambda n: "{" * n,
    "open fractions": lambda n: "\\frac{" * (n // 6),
    "closed fractions": lambda n: "\\frac{" * (n // 9) + "}{}" * (n // 9),
    "fraction and blanks": lambda n: "\\frac1" + " " * n + "\\frac",
    "fractions and blanks": lambda n: ("\\frac" + " " * 1000) * (n // 1000),
    "open brackets": lambda n: "(" * n,
    "empty brackets": lambda n: "(" * (n // 2) + ")" * (n // 2),
    "closed brackets": lambda n: ")" * n,
    "dollars": lambda n: "$" * n,
    "backslashes": lambda n: "\\" * n,
    "stars": lambda n: "*" * n,
    "digits": lambda n: "9" * n,
    "digits with commas": lambda n: "1" + ",111" * (n // 4) + "1",
    "digits with points": lambda n: "1." * (n // 2),
    "numbers": lambda n: "1 " * (n // 2),
    "rising numbers": lambda n: " ".join(map(str, range(n // 7))),
    "fractions of numbers": lambda n: "1/" * (n // 2),
    "other digits": lambda n: "١٢" * (n // 2),
    "raised digits": lambda n: "²" * n,
    "signs": lambda n: "-" * n,
    "exponents": lambda n: "^ " * (n // 2),
    "towers": lambda n: "10^" * (n // 3),
    "options": lambda n: "option " * (n // 7),
    "option and blanks": lambda n: "option" + " " * n,
    "combining marks": lambda n: "a" + "\u0301\u0323" * (n // 2),
    "right to left": lambda n: "\u202e\u200f" * (n // 2),
    "letters that grow in lower case": lambda n: "İ" * n,
    "signs that grow in normal form": lambda n: "ﷺ" * (n // 10),
    "expression marks": lambda n: "(a+)+$[.*" * (n // 9),
}


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("size", [MEGABYTE // 8, pytest.param(MEGABYTE, marks=pytest.mark.slow)])
def test_string_rules_take_linear_time(rules, kind, size):
    """Of processor time; the text alone, as a step and as the final answer."""
    rules = PRESETS[rules]

    def work(text):
        more = [["6", "1"], ["a a", "a b"], ["1 1"], ["{"], ["\x00"], ["^"], ["(" * 10], [text[:30], text[-30:]]]
        groups, _ = key_step_groups([*KEY_STEPS["Steps"], *more])
        for completion in (text, f"{SECTIONS}### Step 1: {text}\n### The final answer is: 3", HEAD + text):
            hits = key_step_hits(completion, groups, rules)
            section_faults(completion, rules)
            R1VL.step_starts(completion)
            expected_answer(completion, rules)
            choice_letter(final_answer(completion, rules) or "")
            assert all(0 <= hit.start <= hit.end <= len(completion) for hit in hits)

    assert_linear(work, LONG[kind], size)


@pytest.mark.parametrize("rules", ["paper", "robust"])
def test_megabytes_and_thousands_of_steps_are_scored_not_given_up(rules):
    """Where letters decide the answer no parser sees it, and the time for one answer suffices for every text."""
    many = SECTIONS + "".join(f"### Step {number}: Now 12/2 = 6 holds.\n" for number in range(1, 10_001))
    long = SECTIONS + "### Step 1: We halve it, so 12/2 = 6 holds. " + "Nothing new. " * (MEGABYTE // 13)
    rows = [text + "\n### The final answer is: (B)" for text in (many, long, SECTIONS + "\x00\ud800" * (MEGABYTE // 2))]
    with ScorerPool(2) as pool:
        scores = pool.score(rows, ["B"] * 3, [KEY_STEPS] * 3, rules=rules)
    for score in scores:
        check(score)
    assert [score.status for score in scores] == ["ok"] * 3
    assert all(score.correct for score in scores)
    assert [score.validity for score in scores] == [1.0, 1.0, 0.0]
    assert len(scores[0].step_starts) == 10_000 and scores[0].matched == (0,)


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize(
    ("key_steps", "total", "note"),
    [
        (None, 0, "key steps missing"),
        (3, 0, "key steps are not a list but int"),
        ("12/2 = 6", 0, "key steps are not a list but str"),
        ({"Steps": None}, 0, "key steps missing"),
        ({"Steps": {"a": 1}}, 0, "key steps are not a list but dict"),
        ({"steps": ["12/2 = 6"]}, 0, "key steps missing"),
        ([3, None, 2.5], 3, "3 key-step alternatives are not text"),
        ([[None], [["12/2 = 6"]], {"Steps": []}], 3, "3 key-step alternatives are not text"),
        ([["(1"], ["[0-9]+/[0-9]+ = 6"], [".*"], ["\\d+"], ["(a+)+$"]], 5, ""),
    ],
    ids=repr,
)
def test_key_steps_that_are_not_texts_are_noted_and_never_found(pool, rules, key_steps, total, note):
    """Regular expressions are texts like any other."""
    score = pool.score([HONEST], ["3"], [key_steps], rules=rules)[0]
    check(score)
    assert (score.status, score.correct, score.total, score.matched, score.note) == ("ok", True, total, (), note)
