"""The score command: rows in, rows out, and what it says about bad ones."""

import json
import os
import subprocess
import sys

import pytest
from helpers.paths import GOLDEN, ROOT

from r1vl_jax import score
from r1vl_jax.reward_lab import scoring

GOOD = {
    "id": 7,
    "completion": "### Image Description: d\n### Rationales: r\n### Step 1: one\n### The final answer is: 3",
    "solution": "### The final answer is: 3",
    "key_steps": {"Steps": [["one"], "two"]},
}


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(tmp_path, rows, *options):
    """Exit code and output rows (None where there is no output)."""
    out = tmp_path / "out.jsonl"
    code = score.main([write(tmp_path / "in.jsonl", rows), str(out), "--workers", "1", *options])
    assert [path.name for path in tmp_path.glob("*.tmp")] == []
    return code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else None


def test_rows_keep_their_fields_and_order(tmp_path, capsys):
    strange = GOOD | {"id": 9, "completion": "三\ud800\x00", "key_steps": None, "faults": "old"}
    wrong = GOOD | {"id": 8, "completion": GOOD["completion"] + "4"}
    del wrong["key_steps"]
    code, rows = command(tmp_path, [GOOD, "\n", wrong, strange])
    assert code == 0 and [row["id"] for row in rows] == [7, 8, 9]
    assert rows[0] == GOOD | {
        "accuracy": 1.05,
        "validity": 1.0,
        "reward": 2.05,
        "answer": "3",
        "expected": "3",
        "reason": "text: the same",
        "key_steps_matched": [0],
        "key_steps_total": 2,
        "faults": [],
        "status": "ok",
        "note": "",
    }
    assert rows[1]["accuracy"] == 0 and rows[1]["answer"] == "34" and rows[1]["note"] == "key steps missing"
    assert rows[2]["completion"] == strange["completion"] and rows[2]["answer"] is None and len(rows[2]["faults"]) == 4
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "3 rows, rules paper: accuracy 0.3500, validity 0.6667, reward 1.0167; "
        "final answer found in 66.7%; 0 timeout, 0 error, 0 crash; 2 with missing, empty or faulty key steps"
    )


BAD = {
    "not json": ("{oops\n", "property name"),
    "not an object": ("[1]\n", "expected a JSON object, got [1]"),
    "missing": ({"completion": "a"}, "field 'solution' is missing, expected a text"),
    "number": (GOOD | {"completion": 3}, "field 'completion': expected a text, got 3"),
    "null": (GOOD | {"solution": None}, "field 'solution': expected a text, got null"),
    "key steps": (GOOD | {"key_steps": "one"}, "field 'key_steps': expected an object with Steps, a list or null"),
    "steps": (GOOD | {"key_steps": {"Steps": 5}}, "field 'key_steps': expected a list under 'Steps', got 5"),
    "misspelt": (
        GOOD | {"key_steps": {"steps": ["one"]}},
        "field 'key_steps': expected 'Steps' in it, got [\"steps\"]",
    ),
    "deep": ("[" * 100_000 + "\n", "recursion"),
    "digits": ('{"completion": ' + "1" * 5000 + "}\n", "integer string"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_and_nothing_is_scored(name, tmp_path, capsys):
    bad, message = BAD[name]
    code, rows = command(tmp_path, [GOOD, "\n", bad])
    lines = capsys.readouterr().err.splitlines()
    assert (code, rows) == (2, None)
    assert lines[0].startswith(f"{tmp_path / 'in.jsonl'}, row 1 (line 3): ") and message in lines[0]
    assert len(lines) == 2 and "--skip-bad" in lines[1]


def test_every_bad_row_is_named_up_to_a_limit(tmp_path, capsys):
    code, _ = command(tmp_path, ["x\n"] * 25)
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 22 and lines[20] == "... and 5 more bad rows"


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, capsys):
    code, rows = command(tmp_path, ["x\n", GOOD, {}], "--skip-bad", "--rules", "released", "--alpha", "1")
    assert code == 0 and [row["accuracy"] for row in rows] == [1.5]
    assert capsys.readouterr().err.splitlines()[-1].endswith("; 2 bad rows skipped")


def test_bytes_that_are_not_utf8_and_a_byte_order_mark(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    rows, faults = score.read_rows(str(path))
    assert rows == [GOOD] and len(faults) == 1 and "row 1 (line 2): 'utf-8' codec" in faults[0]


def test_no_rows_give_an_empty_file(tmp_path, capsys):
    assert command(tmp_path, []) == (0, [])
    assert "0 rows" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["missing/out.jsonl", "", "device"])
def test_an_output_that_cannot_be_written_is_said_before_scoring(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "score_rows", lambda *_: pytest.fail("scored"))
    if out == "device":
        os.mkfifo(tmp_path / out)
    code = score.main([write(tmp_path / "in.jsonl", [GOOD]), str(tmp_path / out)])
    assert code == 2 and capsys.readouterr().err.startswith(f"{tmp_path / out}: cannot be written: ")


def test_a_missing_input_is_said(tmp_path, capsys):
    assert score.main([str(tmp_path / "no.jsonl"), str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'no.jsonl'}: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("option", [("--workers", "0"), ("--timeout", "-1"), ("--timeout", "x"), ("--rules", "papr")])
def test_wrong_options_end_with_usage(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        score.main(["in", "out", *option])
    said = capsys.readouterr().err
    assert option[0] in said and ("expected" in said or "did you mean 'paper'" in said)


def test_an_old_output_survives_a_failure(tmp_path, monkeypatch):
    old = tmp_path / "out.jsonl"
    old.write_text("old")
    monkeypatch.setattr(scoring, "score_fields", lambda _: {"set": {1}})  # cannot be written as JSON
    with pytest.raises(TypeError):
        command(tmp_path, [GOOD])
    assert old.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden rows of the released functions are not here")
def test_golden_rows_through_the_command_and_pipes():
    lines = GOLDEN.read_bytes().splitlines(keepends=True)[:40]
    done = subprocess.run(
        [sys.executable, "-m", "r1vl_jax.score", "--rules", "released", "--workers", "2", "-", "-"],
        input=b"".join(lines),
        capture_output=True,
        check=True,
        cwd=ROOT,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 40
    for row in rows:
        assert row["accuracy"] == pytest.approx(row["released_accuracy"], abs=1e-9)
        assert row["validity"] == row["released_validity"]
