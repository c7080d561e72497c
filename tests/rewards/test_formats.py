"""The formats of answers: where steps and the final answer are, what is complete and in order, and near misses."""

import re

import pytest
from helpers.paths import ROOT
from helpers.waiting import assert_linear

from r1vl_jax.config import load
from r1vl_jax.rewards import PRESETS, ScorerPool, get_rules, score_answer, step_accuracy, step_validity
from r1vl_jax.rewards.formats import FORMATS
from r1vl_jax.rewards.key_steps import key_step_hits
from r1vl_jax.rewards.steps import section_faults

KEY_STEPS = {"Steps": [["12/2 = 6"], ["6/2 = 3"]]}
FIRST = "AD is a median, so 12/2 = 6 is half of it."
SECOND = "E is the midpoint, and therefore 6/2 = 3 is left."
PARAGRAPHS = f"{FIRST}\n\n{SECOND}"
LINES = f"Step 1: {FIRST}\n\nWhich holds.\n**Step 2:** {SECOND}"


def scored(text, answer_format, rules="paper"):
    return score_answer(text, "### The final answer is: 3", KEY_STEPS, rules=rules, answer_format=answer_format)


VALID = {  # text -> the beginnings of its steps
    "think, paragraphs": (f"<think>\n{PARAGRAPHS}\n</think>\n<answer>3</answer>", ["AD", "E is"]),
    "think, lines": (f"<think>\n{LINES}\n</think>\n<answer>3</answer>", ["Step 1", "**Step 2"]),
    "think, in one line": (f"<think>{FIRST} {SECOND}</think><answer>3</answer>", ["AD"]),
    "think, a step's line behind the tag": (
        f"<think>{LINES}</think>\n\n<answer> 3 </answer>\n",
        ["Step 1", "**Step 2"],
    ),
    "think, opened by the prompt": (f"{PARAGRAPHS}\n</think>\n<answer>3</answer>", ["AD", "E is"]),
    "think, a box inside": (f"<think>\n{PARAGRAPHS}\n</think>\n<answer>$\\boxed{{3}}$</answer>", ["AD", "E is"]),
    "think, blank lines of blanks": (f"<think>\n{FIRST}\n \t\n\n{SECOND}\n</think><answer>3</answer>", ["AD", "E is"]),
    "think, a rule between": (f"<think>\n{FIRST}\n\n---\n\n{SECOND}</think><answer>3</answer>", ["AD", "E is"]),
    "boxed, paragraphs": (f"{PARAGRAPHS} So it is \\boxed{{3}}.", ["AD", "E is"]),
    "boxed, lines": (f"{LINES}\nThe answer is $\\boxed{{3}}$.", ["Step 1", "**Step 2"]),
    "boxed, a paragraph of its own": (f"{PARAGRAPHS}\n\n$$\n\\boxed{{3}}\n$$", ["AD", "E is"]),
    "boxed, the last box counts": (
        f"{FIRST}\n\nThat is \\boxed{{6}}.\n\n{SECOND} \\boxed{{3}}",
        ["AD", "That", "E is"],
    ),
    "boxed, braces inside": (f"{PARAGRAPHS} \\boxed{{\\frac{{6}}{{2}}}}", ["AD", "E is"]),
    "boxed, headers before steps": (
        f"### Step 1: {FIRST}\n### Step 2: {SECOND}\n\\boxed{{3}}",
        ["### Step 1", "### Step 2"],
    ),
}


@pytest.mark.parametrize("rules", ["paper", "robust"])
@pytest.mark.parametrize("name", VALID)
def test_complete_answers_in_order(name, rules):
    text, starts = VALID[name]
    score = scored(text, name.partition(",")[0], rules)
    assert (score.correct, score.k, score.validity, score.faults) == (True, 1.0, 1.0, ())
    assert all(text[place:].startswith(start) for place, start in zip(score.step_starts, starts, strict=True))
    assert sum(score.step_rewards) == pytest.approx(0.1) and len(score.step_rewards) == len(starts)


BODY = f"<think>\n{PARAGRAPHS}\n</think>\n"
NEAR = f"## Image Description: A.\n### Rationale: B.\n###Step 1: {FIRST}\n**The final answer is:** 3"
FAULTY = {  # text, final answer, faults
    "think, cut in the thinking": (f"<think>\n{FIRST}", None, "no </think>; no <answer>; no </answer>"),
    "think, cut in the answer": (BODY + "<answer>3", None, "no </answer>"),
    "think, no end of thinking": (f"{FIRST} <answer>3</answer>", "3", "no </think>"),
    "think, nothing thought": ("<think>\n\n</think>\n<answer>3</answer>", "3", "no step"),
    "think, text before": (f"Sure!\n{BODY}<answer>3</answer>", "3", "<think> after step"),
    "think, text between": (f"{BODY}So: <answer>3</answer>", "3", "text outside the tags after </think>"),
    "think, text after": (f"{BODY}<answer>3</answer> Bye.", "3", "text outside the tags after </answer>"),
    "think, two answers": (f"{BODY}<answer>3</answer><answer>4</answer>", "3", "text outside the tags after </answer>"),
    "think, an answer in one": (f"{BODY}<answer>4<answer>3</answer>", None, "text outside the tags after <answer>"),
    "think, two thinkings": (
        f"{BODY}{BODY}<answer>3</answer>", "3", "text outside the tags after </think>; step after </think>",
    ),
    "think, answer first": (
        f"<answer>3</answer>{BODY}", None, "<think> after </answer>; step after </answer>; </think> after </answer>",
    ),
    "think, numbers": ("<think>Step 1: a\nStep 3: b</think><answer>3</answer>", "3", "steps not numbered 1..n"),
    "think, tags in capitals": (
        BODY + "<Answer>3</Answer>", None,
        'no <answer> (found "<Answer>3</Answer>"); no </answer> (found "</Answer>"); '
        "text outside the tags after </think>",
    ),
    "think, other tags": (
        f"<thinking>{FIRST}</thinking>\n<answer>3</answer>", "3",
        'no </think> (found "<thinking>AD is a median, so 12/2 = 6 is")',
    ),
    "boxed, no box": (f"{PARAGRAPHS} Answer: 3", None, "no final answer"),
    "boxed, a lead-in": (f"{PARAGRAPHS}\nAnswer: 3", None, 'no final answer (found "Answer: 3")'),
    "boxed, no backslash": (f"{PARAGRAPHS} boxed{{3}}", None, 'no final answer (found "boxed{3}")'),
    "boxed, cut": (f"{PARAGRAPHS} \\boxed{{3", None, 'no final answer (found "\\boxed{3")'),
    "boxed, alone": ("$\\boxed{3}$", "3", "no step"),
    "boxed, goes on": (f"{FIRST} \\boxed{{3}}\n\n{SECOND}", "3", "paragraph after final answer"),
    "boxed, numbers": (f"Step 2: {FIRST}\n\\boxed{{3}}", "3", "steps not numbered 1..n"),
    "r1vl, near misses": (
        NEAR, None,
        'no image description (found "## Image Description: A."); no rationale (found "### Rationale: B."); '
        'no step (found "###Step 1: AD is a median, so 12/2 = 6 i"); '
        'no final answer (found "**The final answer is:** 3")',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_answers_that_are_not_complete_or_not_in_order(name):
    text, final, faults = FAULTY[name]
    score = scored(text, name.partition(",")[0])
    assert score.validity == 0.0
    assert (score.answer, "; ".join(score.faults)) == (final, faults)
    assert score.correct == (final == "3") and (score.accuracy > 0) == (final is not None)


def test_empty_sections():
    empty = "<think>\nStep 1:\nStep 2: x\n</think>\n<answer> </answer>"
    assert scored(empty, "think", "paper").faults == ()
    assert scored(empty, "think", "robust").faults == ("empty step", "empty <answer>")
    assert scored("Step 1: x\n\\boxed{}", "boxed", "robust").faults == ("empty final answer",)


def test_key_steps_count_only_in_the_steps():
    outside = f"<think>\nNothing.\n</think>\n{PARAGRAPHS}<answer>3 {FIRST}</answer>{PARAGRAPHS}"
    assert scored(outside, "think").k == 0.0
    assert scored(f"Nothing. \\boxed{{3}}\n\n{PARAGRAPHS}", "boxed").k == 0.0


def test_what_a_format_writes_is_complete_and_earns_everything():
    for name, form in FORMATS.items():
        for line, gap in (("\n", "\n\n"), (" ", "\n")):
            text = form.write("A triangle.", "Use areas.", [FIRST, SECOND], "3", line=line, gap=gap)
            for rules in ("paper", "robust"):
                score = scored(text, name, rules)
                assert (score.accuracy, score.validity, len(score.step_starts)) == (pytest.approx(1.1), 1.0, 2), name
            assert score_answer("3", text, None).expected == "3"  # any format is read as a solution


def test_released_is_only_for_the_format_of_r1vl():
    for answer_format in ("think", "boxed"):
        with pytest.raises(ValueError, match=f"format {answer_format} needs answer_from_section"):
            get_rules("released", answer_format=answer_format)
        assert get_rules("robust", answer_format=answer_format).format == answer_format
    with pytest.raises(ValueError, match=r"no format is called 'thinks'; known formats: r1vl, think, boxed.*think"):
        score_answer("3", "3", None, answer_format="thinks")
    with pytest.raises(ValueError, match="no option is called 'format'"):
        get_rules("paper", {"format": True})
    assert {rules.format for rules in PRESETS.values()} == {"r1vl"}


def test_the_other_functions_take_a_format():
    texts = [VALID["think, paragraphs"][0], VALID["boxed, paragraphs"][0]]
    columns = (texts, ["3", "3"], [KEY_STEPS] * 2)
    assert step_accuracy(*columns, answer_format="think").tolist() == [pytest.approx(1.1), 0.0]
    assert step_validity(texts, answer_format="boxed").tolist() == [0.0, 1.0]
    with ScorerPool(1) as pool:
        scores = pool.score(*columns, rules=get_rules("robust", answer_format="boxed"))
    assert [score.correct for score in scores] == [False, True]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_the_example_in_a_configuration_earns_what_it_says(path):
    text = path.read_text()
    example = re.search(r"^# An answer to.*\n((?:#(?:   .*)?\n)+)", text, re.MULTILINE)
    config = load(path, ["--model.path", "m"])
    if config.rl.format == "r1vl" and example is None:
        return
    assert example is not None
    answer = "\n".join(line[4:] for line in example[1].splitlines())
    steps = re.findall(r'"(.*?)"', re.search(r"With the key steps (.*?) it earns", text, re.DOTALL)[1])
    assert len(steps) == 4
    score = score_answer(answer, "### The final answer is: 3", steps, rules=config.rl.reward_rules)
    assert (score.accuracy, score.validity) == (pytest.approx(1.1), 1.0), score.faults


LONG = {
    "thinking": lambda n: "<think>" * (n // 7),
    "ends of thinking": lambda n: "</think>" * (n // 8),
    "answers": lambda n: "<answer>" * (n // 8),
    "closed answers": lambda n: "<answer>3</answer>" * (n // 18),
    "tags in turn": lambda n: "<think>a</think><answer>" * (n // 24),
    "nearly tags": lambda n: "< /think" * (n // 8),
    "a tag and blanks": lambda n: "<" + " " * n,
    "paragraphs": lambda n: "a\n\n" * (n // 3),
    "lines": lambda n: "a\n" * (n // 2),
    "line ends": lambda n: "\n" * n,
    "lines of blanks": lambda n: "\n  " * (n // 3),
    "lines of many blanks": lambda n: ("a\n" + " " * 1000) * (n // 1002),
    "blanks": lambda n: " " * n,
    "step lines": lambda n: "\nStep 1: a" * (n // 10),
    "steps in one line": lambda n: "Step 1: " * (n // 8),
    "a step's number": lambda n: "Step " + "1" * n,
    "hashes": lambda n: "\n" + "#" * n,
    "headers of nothing": lambda n: "\n### " * (n // 5),
    "open boxes": lambda n: "\\boxed{" * (n // 7),
    "empty boxes": lambda n: "\\boxed{}" * (n // 8),
    "listed boxes": lambda n: "\\boxed{1}, " * (n // 11),
    "boxes in words": lambda n: "\\boxed{1} a " * (n // 12),
    "open braces": lambda n: "\\boxed{1}" + "{" * n,
}


@pytest.mark.parametrize("answer_format", FORMATS)
@pytest.mark.parametrize("kind", LONG)
def test_formats_take_linear_time(answer_format, kind):
    """Of processor time; the text alone, as a step and as the final answer."""
    rules, form = get_rules("paper", answer_format=answer_format), FORMATS[answer_format]

    def work(text):
        for completion in (text, form.write("a", "b", [text], "3"), form.write("a", "b", ["c"], text)):
            key_step_hits(completion, [["6"]], rules)
            section_faults(completion, rules)
            form.step_starts(completion)
            form.final_answer(completion)

    assert_linear(work, LONG[kind], 10**5)
