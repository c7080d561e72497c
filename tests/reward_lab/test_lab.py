"""The reward lab: groups under several rules, the probe's attacks, and the score command that shows both."""

import dataclasses
import json
import re
import unicodedata

import pytest

from r1vl_jax import score
from r1vl_jax.reward_lab.attacks import attack_answers, honest_answers
from r1vl_jax.reward_lab.probe import probe_report
from r1vl_jax.reward_lab.problems import built_in, make_problem
from r1vl_jax.reward_lab.rescoring import Group, groups_of, rescore
from r1vl_jax.reward_lab.tables import WIDTH, probe_table, rescore_table
from r1vl_jax.rewards import PRESETS, Score, ScorerPool, get_rules, score_answer
from r1vl_jax.rewards.formats import FORMATS
from r1vl_jax.rewards.key_steps import key_step_groups

BUILT_IN = built_in()
HEAD = "### Image Description: d\n### Rationales: r\n"
TRUE = HEAD + "### Step 1: we see one thing\n### The final answer is: 3"
FALSE = HEAD + "### Step 1: we see one thing\n### The final answer is: 4"
HOLLOW = "### Step 1: no more\n### The final answer is: 4"
SILENT = HEAD + "### Step 1: we see one thing"


def run_row(step=1, texts=(TRUE, FALSE), **fields):
    row = {"stage": "step_grpo", "step": step, "source": "rl.json", "row": 7, "images": [], "question": "How many?"}
    row |= {"solution": "### The final answer is: 3", "key_steps": {"Steps": [["one thing"], ["two things"]]}}
    return row | {"answers": [{"text": text, "reward": 9.0, "tokens": 5} for text in texts]} | fields


def single(completion=TRUE, **fields):
    return {"completion": completion, "solution": "### The final answer is: 3", "key_steps": None} | fields


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(*args):
    return score.main([*map(str, args), "--workers", "1"])


def scored(correct, k, validity, alpha=0.1, **fields):
    accuracy = correct + alpha * k
    return Score(accuracy=accuracy, validity=validity, reward=accuracy + validity, correct=bool(correct), k=k, **fields)


# --- reports, by hand -------------------------------------------------------------------------------------------------


def test_a_group_under_two_rules_by_hand():
    group = Group({"step": 4}, "q", "s", None, ("a", "b", "c", "d"))
    first = [scored(1, 0, 1), scored(0, 1, 1), scored(0, 0, 1), scored(0, 0, 0)]  # 2, 1.1, 1, 0
    second = [scored(0, 0, 0), scored(0, 1, 1), scored(0, 0, 1), scored(0, 0, 1)]  # 0, 1.1, 1, 1
    report = rescore([group], {"x": first, "y": second})
    (row,) = report["groups"]
    x, y = row["rules"]["x"], row["rules"]["y"]
    assert (row["step"], row["question"], row["texts"]) == (4, "q", ["a", "b", "c", "d"])
    assert x["mean"] == pytest.approx(1.025) and x["std"] == pytest.approx(0.818026, abs=1e-6)
    assert [answer["advantage"] for answer in x["answers"]] == pytest.approx(
        [1.19175, 0.09167, -0.03056, -1.25286], abs=1e-4
    )
    assert [answer["advantage"] for answer in y["answers"]] == pytest.approx(
        [-1.49305, 0.62537, 0.43384, 0.43384], abs=2e-3
    )
    assert [answer["flip"] for answer in y["answers"]] == [True, False, True, True]
    assert (x["sign_flips"], y["sign_flips"]) == (0, 3)
    assert x["reward_share"] == pytest.approx({"outcome": 1 / 4.1, "key_steps": 0.1 / 4.1, "validity": 3 / 4.1})
    # centred products with the reward: of the outcome 0.975, key steps 0.0075, validity 1.025, of the reward 2.0075
    assert x["variance_share"] == pytest.approx(
        {"outcome": 0.975 / 2.0075, "key_steps": 0.0075 / 2.0075, "validity": 1.025 / 2.0075}
    )
    assert y["variance_share"]["outcome"] == 0 and sum(y["variance_share"].values()) == pytest.approx(1)
    assert (x["shaping_only"], y["shaping_only"]) == (False, True)
    gaps = [abs(a["advantage"] - b["advantage"]) for a, b in zip(x["answers"], y["answers"], strict=True)]
    assert row["disagreement"] == pytest.approx(sum(gaps))


def test_the_parts_of_a_reward_are_what_pays_and_not_what_is_right():
    """A right answer out of its place earns nothing under rules that require one."""
    unpaid = Score(correct=True, k=1.0)
    group = Group({}, "q", "s", None, ("a", "b"))
    answers = rescore([group], {"x": [unpaid, scored(1, 1, 1)]})["groups"][0]["rules"]["x"]["answers"]
    assert [(a["outcome"], a["key_steps"], a["validity"]) for a in answers] == [
        (0, 0, 0),
        (1, pytest.approx(0.1), 1),
    ]


def test_equal_rewards_have_no_advantage_and_no_sign():
    """0.1 + 0.2 and 0.3 differ by rounding: neither a variance nor a flip may come of it."""
    same = [Score(accuracy=0.1 + 0.2, reward=0.1 + 0.2), Score(accuracy=0.3, reward=0.3)]
    group = Group({}, "q", "s", None, ("a", "b"))
    report = rescore([group], {"x": [scored(1, 0, 1), scored(0, 0, 1)], "y": same})
    y = report["groups"][0]["rules"]["y"]
    assert y["zero_variance"] and not y["shaping_only"] and y["variance_share"] is None and y["sign_flips"] == 0
    assert [answer["advantage"] for answer in y["answers"]] == [0, 0]
    assert report["totals"]["y"]["zero_variance"] == 1 and report["totals"]["x"]["zero_variance"] == 0


def test_an_answer_at_the_mean_has_no_sign():
    """0.2 lies below the mean of 0.1, 0.2 and 0.3 by rounding alone."""
    middle = [Score(accuracy=reward, reward=reward) for reward in (0.1, 0.2, 0.3)]
    assert (0.1 + 0.2 + 0.3) / 3 > 0.2
    group = Group({}, "q", "s", None, ("a", "b", "c"))
    report = rescore([group], {"x": [scored(0, 0, 0), scored(1, 0, 1), scored(0, 0, 0)], "y": middle})
    answers = report["groups"][0]["rules"]["y"]["answers"]
    assert answers[1]["advantage"] == 0 and [answer["flip"] for answer in answers] == [False, False, True]


def test_totals_leave_lone_answers_out_of_what_groups_have():
    groups = [Group({}, "q", "s", None, ("t",) * size) for size in (2, 1, 2)]
    lost = Score(status="timeout", note="took longer")
    x = [scored(1, 0, 1), scored(0, 0, 1, answer="4"), scored(0, 1, 1, note="key steps empty"), scored(0, 0, 1), lost]
    y = [scored(0, 0, 1), scored(1, 0, 1), *x[2:]]
    totals = rescore(groups, {"x": x, "y": y})["totals"]
    got = totals["x"]
    assert (got["groups"], got["groups_of_one"], got["answers"]) == (3, 1, 5)
    assert got["reward"] == pytest.approx((2 + 1 + 1.1 + 1) / 5) and got["correct"] == 0.2 and got["key_steps"] == 0.2
    assert got["no_answer"] == 0.6  # the answer that was not scored may well have one
    assert got["shaping_only"] == 0.5 and (got["failures"], got["key_step_faults"]) == (1, 1)
    assert (totals["x"]["sign_flips"], totals["y"]["sign_flips"]) == (0, 0.5)
    alone = rescore(groups[1:2], {"x": x[:1]})
    assert alone["totals"]["x"]["zero_variance"] is None and alone["groups"][0]["rules"]["x"]["std"] is None


def test_the_largest_disagreement_comes_first_and_else_the_largest_spread():
    groups = [Group({"row": row}, "q", "s", None, ("a", "b")) for row in range(3)]
    even, one, two = [scored(0, 0, 1)] * 2, [scored(1, 0, 1), scored(0, 0, 1)], [scored(0, 0, 1), scored(1, 0, 1)]
    rows = rescore(groups, {"x": [*one, *one, *one], "y": [*one, *even, *two]})["groups"]
    assert [row["row"] for row in rows] == [2, 1, 0]
    rows = rescore(groups, {"x": [*even, scored(0, 1, 1), scored(0, 0, 1), *one]})["groups"]
    assert [row["row"] for row in rows] == [2, 1, 0]


def test_rows_become_groups():
    question = {"question": "How many?"}
    rows = [
        run_row(),
        single("a", **question),
        single("b", problem="How many?"),
        single("c", key_steps=[["x"]], **question),
        single("d"),
        single("e"),
        single("f", answers="a field of the user's"),
        run_row(),
        run_row(texts=("g",)),
    ]
    texts = [group.texts for group in groups_of(rows)]
    assert texts == [(TRUE, FALSE), ("a", "b"), ("c",), ("d",), ("e",), ("f",), (TRUE, FALSE), ("g",)]
    group = groups_of(rows)[0]
    assert group.place == {"stage": "step_grpo", "step": 1, "source": "rl.json", "row": 7}
    assert (group.question, group.key_steps) == ("How many?", {"Steps": [["one thing"], ["two things"]]})


# --- tables -----------------------------------------------------------------------------------------------------------


def width(line):
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def test_the_table_fits_the_terminal_whatever_the_texts_and_rules():
    hostile = "\x1b[2J\n\x00\ud800" + "三角形" * 500
    group = Group({"source": hostile, "row": 3}, hostile, hostile, None, ("a",) * 12)
    names = ["paper", *(f"paper,require_answer=false,option_{i}=true" for i in range(8))]
    column = [scored(index % 2, 0.5, 1, answer=hostile) for index in range(12)]
    text = rescore_table(rescore([group], dict.fromkeys(names, column)), 5)
    assert max(map(width, text.splitlines())) <= WIDTH
    assert "\x1b" not in text and "\x00" not in text and "\ud800" not in text
    assert all(name in text for name in names) and "三角形" in text
    assert text.count("+0.957 r") == 9 * 6  # 0.5 / (0.5 * sqrt(12 / 11)): every right answer under all rules


def test_the_table_says_what_happened():
    groups = [Group({"step": 3, "row": row}, f"question {row}", "s", None, ("a", "b", "c")) for row in range(2)]
    x = [scored(1, 0, 1, answer="3"), scored(0, 0, 1), Score(status="crash")]
    y = [scored(0, 0, 0, answer="3"), scored(0, 0, 1, answer="4"), Score(status="crash")]
    report = rescore(groups, {"x": x + x, "y": y + x})
    text = rescore_table(report, 1)
    assert "question 0" in text and "question 1" not in text and "The 1 of 2 groups" in text
    assert re.search(r"1 +2\.000 \+1\.000 r +0\.000 -0\.577 w\* +3", text)
    assert re.search(r"2 +1\.000 \+0\.000 - +1\.000 \+1\.155 w", text)
    assert re.search(r"3 +0\.000 -1\.000 ! +0\.000 -0\.577 !\n", text)
    assert re.search(r"y +0\.333 +0\.577 .* 1  shaping alone", text)
    assert re.search(r"answers not scored +2 +2\n", text) and re.search(r"mean reward +1\.000 +0\.667\n", text)
    assert rescore_table(report, 0).count("question") == 0


# --- the probe --------------------------------------------------------------------------------------------------------


def probed(problems, presets=PRESETS):
    """The probe's report of presets, through real worker processes."""
    cases, texts, owners = [], [], []
    for index, problem in enumerate(problems):
        for name, text in (honest_answers(problem) | attack_answers(problem)).items():
            cases, texts, owners = [*cases, (index, name)], [*texts, text], [*owners, problem]
    columns = texts, [owner.solution for owner in owners], [owner.key_steps for owner in owners]
    with ScorerPool(2) as pool:
        scores = {name: pool.score(*columns, rules=presets[name]) for name in presets}
    return probe_report(cases, scores, list(honest_answers(problems[0]))), cases, scores


@pytest.fixture(scope="module")
def probes():
    return probed(BUILT_IN)


@pytest.mark.parametrize("rules", PRESETS)
def test_honest_answers_earn_what_they_should(rules, probes):
    _, cases, scores = probes
    by_case = dict(zip(cases, scores[rules], strict=True))
    for index in range(len(BUILT_IN)):
        right, half, wrong = (by_case[index, name] for name in honest_answers(BUILT_IN[0]))
        assert (right.correct, right.k, right.validity) == (True, 1, 1)
        assert not half.correct and half.validity == 1 and 1 / 3 <= half.k <= 1 / 2
        assert (wrong.correct, wrong.k, wrong.validity, wrong.answer is None) == (False, 0, 1, False)


@pytest.mark.parametrize("answer_format", FORMATS)
def test_under_robust_no_attack_earns_more_than_an_honest_wrong_answer(answer_format, probes):
    problems = built_in(answer_format)
    robust = {"robust": get_rules("robust", answer_format=answer_format)}
    report, cases, scores = probes if answer_format == "r1vl" else probed(problems, robust)
    honest = dict(zip(cases, scores["robust"], strict=True))
    for index in range(len(problems)):
        right, half, wrong = (honest[index, name] for name in honest_answers(problems[0]))
        assert (right.correct, right.k, right.validity, half.validity, wrong.reward) == (True, 1, 1, 1, 1)
        assert not half.correct and 1 / 3 <= half.k <= 1 / 2 and wrong.answer is not None
    won = {
        row["name"]: row["rules"]["robust"]["excess"]
        for row in report["completions"]
        if row["attack"] and row["rules"]["robust"]["excess"] > 1e-9
    }
    assert not won
    assert all(row["rules"]["robust"]["failures"] == 0 for row in report["completions"])


def test_the_attacks_have_teeth(probes):
    """What they win where the rules have holes: under robust they win nothing because of the rules, not the texts."""
    report, _, _ = probes
    excess = {
        row["name"]: {name: cell["excess"] for name, cell in row["rules"].items()} for row in report["completions"]
    }
    for name, gains in excess.items():
        if name.startswith(("key steps in one step", "key steps, a step each", "guessed", "key steps, all")):
            assert gains["paper"] > 0.02, name
        if re.match("key steps in (longer|decimals|thousands|fractions|powers)", name):
            assert gains["paper"] > 0.04, name
    assert excess["key steps, empty final answer"]["released"] == pytest.approx(1.1)
    assert excess["key steps, no final answer"]["released"] > 0 > excess["key steps, no final answer"]["paper"]
    assert excess["headers only"]["paper"] == 0 > excess["headers only"]["robust"]


CHANGED = {
    "7/2": ("7", "7/2 or 2", "7/2 million", "not 7/2", "$(2.5, 4.5)$", "-7/2"),
    "12 cm": ("1", "12 cm or 2", "12 kg", "not 12 cm", "$(11.0, 13.0)$", "-12 cm"),
    "7 kg": ("2", "7 kg or 2", "7 m", "not 7 kg", "$(6.0, 8.0)$", "-7 kg"),
    "x^2 - 3": ("2", "x^2 - 3 or 2", "2 million", "not x^2 - 3", "$(1.0, 3.0)$", "x^2 + 3"),
    "±3": ("2", "±3 or 2", "3 million", "not ±3", "$(2.0, 4.0)$", "2"),
    "0": ("2", "0 or 2", "2", "not 0", "2", "2"),
    "(B) 12": ("A", "(B) 12 or A", "A", "not (B) 12", "A", "A"),
    "red": ("2", "red or 2", "2", "not red", "2", "2"),
}


@pytest.mark.parametrize("gold", CHANGED)
def test_attacks_that_change_the_right_answer_are_wrong(gold):
    """Where a change would be none, such as a sign before 0, a wrong answer takes its place."""
    problem = dataclasses.replace(make_problem("q", gold, None), wrong="A" if "(B)" in gold else "2")
    texts = {name: text for name, text in attack_answers(problem).items() if name.startswith("the answer")}
    assert tuple(text.rpartition("is: ")[2] for text in texts.values()) == CHANGED[gold]
    for rules in ("paper", "robust"):
        assert not any(score_answer(text, gold, None, rules=rules).correct for text in texts.values())


def test_every_kind_of_attack_is_there_and_attacks_no_right_answer(probes):
    names = [list(attack_answers(problem)) for problem in BUILT_IN]
    assert len(BUILT_IN) == 5 and all(other == names[0] for other in names) and len(names[0]) > 60
    for problem in BUILT_IN:
        texts = attack_answers(problem)
        firsts = [group[0] for group in key_step_groups(problem.key_steps)[0]]
        assert all(text in texts["key steps in one step, commas"] for text in firsts)
        assert texts["10,000 empty steps"].count("### Step ") == 10_000
        assert texts["the question as every step"].count(problem.question) == 3
        assert "\x00" in texts["key steps between null bytes"]
        assert not any(
            name.startswith("key steps") and f"is: {problem.solution}" in text for name, text in texts.items()
        )
        for name, text in texts.items():
            if not name.startswith(("key steps", "guessed", "the answer")):
                assert not any(first in text for first in firsts), name


def test_wrong_numbers_hold_the_text_of_key_steps_inside_longer_ones():
    texts = attack_answers(
        make_problem("q", "s ### The final answer is: 3", [["12/2 = 6", "a"], ["no digit"], ["6 cups"]])
    )
    assert "112/2 = 61 " in texts["key steps in longer numbers (6: 61)"]
    assert "16 cups" in texts["key steps in longer numbers (6: 61)"]
    assert "no digit" not in texts["key steps in longer numbers (6: 61)"]
    assert "12/2 = 6,001 " in texts["key steps in thousands (6: 6,001)"]
    assert "s6 cups" not in texts["key steps in longer words (cup: cups)"]
    assert "6 cupss" in texts["key steps in longer words (cup: cups)"]


@pytest.mark.parametrize(
    ("solution", "wrong"),
    [
        ("### The final answer is: B", "A"),
        ("### The final answer is:\n(A) cat", "B"),
        ("271828", "271829"),
        ("yes", "271828"),
    ],
)
def test_the_wrong_answer_to_a_problem_of_the_user_is_not_its_solution(solution, wrong):
    assert make_problem("q", solution, None).wrong == wrong


@pytest.mark.parametrize("key_steps", [None, [], {"Steps": None}, [[], [""], 3, [None, "a"]], ["{0}{x}%s", "\ud800"]])
def test_faulty_key_steps_are_attacked_all_the_same(key_steps):
    problem = make_problem("", "", key_steps)
    assert list(attack_answers(problem)) == list(attack_answers(BUILT_IN[0]))
    texts = attack_answers(problem) | honest_answers(problem)
    assert all(isinstance(text, str) for text in texts.values())
    stepless = texts["key steps, all alternatives, a step each"]
    assert "### Step 1:\n\n" not in stepless  # an empty alternative is no step


def test_excess_is_counted_from_validity_and_from_the_same_problem():
    cases = [(0, "honest"), (0, "hack"), (1, "honest"), (1, "hack")]
    # the honest answer to problem 1 met a key step by chance: that is not what an attack is measured against
    column = [scored(0, 0, 1), scored(0, 0, 1), scored(0, 1, 1), scored(0, 0.5, 1)]
    report = probe_report(cases, {"x": column, "y": [*column[:3], Score(status="timeout")]}, ["honest"])
    honest, hack = report["completions"]
    assert (report["problems"], honest["attack"], hack["attack"]) == (2, False, True)
    assert honest["rules"]["x"]["exceeds"] is False and honest["rules"]["x"]["excess"] == pytest.approx(0.1)
    got = hack["rules"]["x"]
    assert (got["mean"], got["max"], got["excess"]) == pytest.approx((1.025, 1.05, 0.05))
    assert (got["problem"], got["exceeds"]) == (1, True)
    assert (hack["rules"]["y"]["exceeds"], hack["rules"]["y"]["failures"]) == (False, 1)
    text = probe_table(report)
    assert re.search(r"hack +1\.025 1\.050 \+0\.050 ! +0\.500 1\.000 \+0\.000", text)
    assert "x: 1 of 1 attacks earn more" in text and "1 completions could not be scored" in text


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_is_reported_and_its_rows_selected(tmp_path, capsys):
    rows = [run_row(1), run_row(2, [TRUE, HOLLOW, SILENT]), run_row(2, [TRUE], event="heldout"), run_row(3), single()]
    path = write(tmp_path / "rollouts.jsonl", rows)
    assert command("--rules", "paper", "released", path, "--json", "--step", "2", "--stage", "step_grpo") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rules"], report["alpha"], len(report["groups"])) == (["paper", "released"], 0.1, 1)
    (group,) = report["groups"]
    assert (group["step"], group["source"], group["expected"]) == (2, "rl.json", "3")
    paper = group["rules"]["paper"]["answers"]
    assert [answer["reward"] for answer in paper] == pytest.approx([2.05, 0, 0])
    assert [answer["answer"] for answer in paper] == ["3", "4", None]
    assert group["rules"]["released"]["answers"][2]["reward"] == pytest.approx(0.05)

    def steps(*options):
        assert command(path, "--json", "--groups", "9", *options) == 0
        groups = json.loads(capsys.readouterr().out)["groups"]
        return sorted((group.get("step", -1), group.get("event", "")) for group in groups)

    assert steps("--steps", "2:") == [(2, ""), (2, "heldout"), (3, "")]
    assert steps("--steps", ":1") == [(1, "")]
    assert steps("--stage", "heldout") == [(2, "heldout")]
    assert steps("--limit", "1") == [(1, "")]
    assert steps("--limit", "1", "--steps", "2:") == [(2, "")]
    assert command(path, "--stage", "sft") == 2
    assert "no row of the stage and steps asked for; stages and steps there: step_grpo 1" in capsys.readouterr().err


def test_the_table_and_every_group_in_a_file(tmp_path, capsys):
    path = write(tmp_path / "rollouts.jsonl", [run_row(step, [TRUE, FALSE, HOLLOW]) for step in range(4)])
    out = tmp_path / "groups.jsonl"
    assert command(path, out, "--rules", "paper", "--rules", "paper,require_answer=false", "--groups", "1") == 0
    text = capsys.readouterr().out
    assert "[2] paper,require_answer=false" in text and "12 answers, 4 groups" in text
    assert text.count("How many?") == 1 and "step_grpo" in text
    assert [json.loads(line)["texts"] for line in out.read_text().splitlines()] == [[TRUE, FALSE, HOLLOW]] * 4


def test_single_completions_without_an_output_are_reported(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", [single(TRUE, question="q"), single(FALSE, question="q"), single(HOLLOW)])
    assert command(path) == 0
    assert "3 answers, 2 groups (1 of one answer)" in capsys.readouterr().out
    assert command(path, "-") == 0  # as ever: scores
    assert [json.loads(line)["reward"] for line in capsys.readouterr().out.splitlines()] == [2, 1, 0]
    assert command(path, "-", "--rules", "paper", "robust") == 2
    assert "OUT.jsonl: expected a file" in capsys.readouterr().err


BAD = {
    "no answers": (run_row(answers=[]), "field 'answers': expected a list of at least one answer, got []"),
    "answers": (run_row(answers={"text": "a"}), "field 'answers': expected a list of at least one answer"),
    "answer": (
        run_row(answers=[{"text": "a"}, "b"]),
        "field 'answers[1]': expected an object with a text 'text', got \"b\"",
    ),
    "text": (run_row(answers=[{"text": None}]), "field 'answers[0]': expected an object with a text 'text'"),
    "step": (run_row(step="3"), "field 'step': expected a whole number, got \"3\""),
    "solution": (run_row(solution=None), "field 'solution': expected a text, got null"),
    "key steps": (run_row(key_steps="a"), "field 'key_steps': expected an object with Steps"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_of_a_run_is_named(name, tmp_path, capsys):
    bad, message = BAD[name]
    path = write(tmp_path / "in.jsonl", [run_row(), bad])
    assert command(path) == 2
    got = capsys.readouterr()
    assert got.err.startswith(f"{path}, row 1 (line 2): {message}") and got.out == ""


def test_the_probe_of_a_file_of_problems(tmp_path, capsys):
    rows = [{"problem": "q", "solution": "### The final answer is: 3", "key_steps": {"Steps": ["a b", "c d"]}}]
    rows += [{"problem": "r", "solution": "5"}]
    path = tmp_path / "rl.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    assert command("--probe", path, "--json", "--rules", "paper", "robust") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["problems"], report["rules"], report["alpha"]) == (2, ["paper", "robust"], 0.1)
    by_name = {row["name"]: row for row in report["completions"]}
    listed = by_name["key steps in one step, commas"]["rules"]
    assert listed["paper"]["max"] == pytest.approx(1.1) and listed["paper"]["mean"] == pytest.approx(1.05)
    assert listed["paper"]["exceeds"] and not listed["robust"]["exceeds"]
    # a run's rows and scored rows are problems too, each once
    many = write(tmp_path / "many.jsonl", [run_row(), run_row(2), single(question="How many?"), single(), single()])
    assert command("--probe", many, "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 3
    assert command("--probe", path, "--limit", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 1


def test_the_probe_of_the_built_in_problems_is_a_table(capsys):
    assert command("--probe", "--rules", "paper", "robust", "released") == 0
    text = capsys.readouterr().out
    assert "Rewards over 5 problems" in text and max(map(width, text.splitlines())) <= WIDTH
    assert re.search(r"\nhonest wrong +1\.000 1\.000 \+0\.000 ", text)
    assert re.search(r"\npaper: [1-9]\d* of \d+ attacks earn more than an honest wrong answer\n", text)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[{]", "row 0 (line 1): Expecting property name"),
        ("[3]", "row 0: expected a JSON object, got 3"),
        ('[{"solution": "a", "problem": 3}]', "row 0: field 'question' or 'problem': expected a text, got 3"),
        ('[{"problem": "a"}]', "row 0: field 'solution' is missing"),
        ("", "no usable row"),
        ("[]", "no usable row"),
    ],
)
def test_bad_problems_are_named(rows, message, tmp_path, capsys):
    path = tmp_path / "rl.json"
    path.write_text(rows)
    assert command("--probe", path) == 2
    got = capsys.readouterr()
    assert message in got.err and got.out == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "argument IN: missing"),
        (["--probe", "in", "out"], "argument OUT.jsonl: 'out'; expected none"),
        (["in", "--rules", "robst"], "did you mean 'robust'"),
        (["in", "--rules", "paper", "robust,stuff=true"], "no option is called 'stuff'"),
        (["in", "--rules", "paper,require_answer"], "expected OPTION=true or OPTION=false"),
        (["in", "--rules", "paper,require_answer=1"], "expected OPTION=true or OPTION=false"),
        (["in", "--rules", "paper", "paper"], "argument --rules: expected each once, got paper paper"),
        (["in", "--step", "-1"], "--step"),
        (["in", "--steps", "3"], "expected A:B, A: or :B, got '3'"),
        (["in", "--steps", ":"], "expected A:B, A: or :B, got ':'"),
        (["in", "--steps", "a:b"], "expected a whole number from 0 to 4294967295, got 'a'"),
        (["in", "--step", "1", "--steps", "1:2"], "not allowed with"),
        (["in", "--alpha", "nan"], "expected a number from 0 to 4294967295, got 'nan'"),
        (["in", "--alpha", "-1"], "expected a number from 0 to 4294967295, got '-1'"),
        (["in", "--timeout", "1e300"], "expected a number above 0 to 1000000, got '1e300'"),
        (["in", "--workers", "1000000"], "expected a whole number from 1 to 1024, got '1000000'"),
    ],
)
def test_arguments_that_cannot_be_used_end_with_usage(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        score.main(args)
    assert message in capsys.readouterr().err


def test_presets_end_where_files_begin():
    args = score._arguments(["--rules", "paper", "robust,require_answer=false", "in", "out", "--json"])
    assert [name for name, _ in args.rules] == ["paper", "robust,require_answer=false"]
    assert (args.input, args.output, args.json) == ("in", "out", True)
    assert args.rules[1][1].require_answer is False and PRESETS["robust"].require_answer is True
    assert [name for name, _ in score._arguments(["in", "--rules", "released", "out"]).rules] == ["released"]


def test_the_command_scores_and_attacks_another_format(tmp_path, capsys):
    rows = [{"completion": f"It is so. \\boxed{{{final}}}", "solution": "3"} for final in (3, 4)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    assert score.main(["--answer-format", "boxed", *files]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["accuracy"], row["validity"], row["answer"]) for row in found] == [(1.0, 1.0, "3"), (0.0, 1.0, "4")]
    assert score.main(["--answer-format", "think", "--rules", "robust", "--probe", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not [row["name"] for row in report["completions"] if row["rules"]["robust"]["exceeds"]]
    with pytest.raises(SystemExit):
        score.main(["--answer-format", "think", "--rules", "released", "--probe"])
    assert "format think needs answer_from_section" in capsys.readouterr().err


def test_help_names_every_field_of_the_reports(capsys, probes):
    with pytest.raises(SystemExit, match="0"):
        score.main(["--help"])
    said = capsys.readouterr().out
    group = Group({"step": 1}, "q", "s", None, ("a", "b"))
    rescored = rescore([group], {"x": [scored(1, 0, 1), scored(0, 0, 1)]})

    def fields(value):
        if isinstance(value, dict):
            return {key for key in value if key not in {"x", *PRESETS}}.union(*map(fields, value.values()))
        return set().union(*map(fields, value)) if isinstance(value, list) else set()

    for field in fields(rescored) | fields(probes[0]):
        assert re.search(rf"\b{field}\b", said), field


def test_a_report_reaches_a_terminal_without_unicode(tmp_path, capsysbinary, monkeypatch):
    class Ascii:
        encoding = "ascii"
        written = ""

        def write(self, text):
            text.encode("ascii")
            self.written += text

    path = write(tmp_path / "in.jsonl", [run_row(question="三角形")])
    out = Ascii()
    monkeypatch.setattr("sys.stdout", out)
    assert command(path) == 0
    assert "\\u4e09" in out.written
