"""Reading both schemas: the real rows, what is normalised, and errors that name file, row and field."""

import json
from pathlib import Path

import pytest

from r1vl_jax.data.sources import REFLECTION, read_examples, without_reflection
from r1vl_jax.types import Example

GEOMETRY = Path(__file__).parents[1].parent / "shared" / "real" / "geometry3k"
RL = {"image_path": "a.png", "problem": "Find x.", "solution": "### The final answer is: 3"}
USER = {"role": "user", "content": "<image>Question: Find x."}
ASSISTANT = {"role": "assistant", "content": "### Step 1: 3"}
SFT = {"messages": [USER, ASSISTANT], "images": "a.png"}


def write(tmp_path, rows, name="rows.json"):
    (tmp_path / name).write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return tmp_path / name


def read_one(tmp_path, row):
    examples, errors = read_examples(write(tmp_path, [row]))
    assert not errors, errors
    return examples[0]


@pytest.mark.skipif(not GEOMETRY.is_dir(), reason="needs shared/real/geometry3k beside the checkout")
def test_real_files():
    rl, errors = read_examples(GEOMETRY / "rl.json")
    sft, more_errors = read_examples(GEOMETRY / "sft.json")
    assert not errors and not more_errors and len(rl) == len(sft) == 10
    rows = json.loads((GEOMETRY / "rl.json").read_text())
    for number, (row, ours, warm_up) in enumerate(zip(rows, rl, sft, strict=True)):
        assert (ours.source, ours.row) == (str(GEOMETRY / "rl.json"), number)
        assert ours.images == warm_up.images and Path(ours.images[0]).is_file()
        assert ours.question == "<image>" + row["problem"]
        assert warm_up.question == "<image>Question: " + row["problem"]
        assert ours.answer == row["solution"] == warm_up.answer
        assert [list(group) for group in ours.key_steps] == row["key_steps"]["Steps"]
        assert warm_up.key_steps is None


def test_array_and_lines_read_alike(tmp_path):
    rows = [RL, SFT, RL | {"problem": "line\u2028end and \u00e9"}]
    array, _ = read_examples(write(tmp_path, rows, "x"))
    for text in (
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + "\r\n\n",
    ):
        lines, errors = read_examples(write(tmp_path, text, "x"))
        assert lines == array and not errors
    assert [example.row for example in array] == [0, 1, 2]


def test_rl_row(tmp_path):
    steps = {"Steps": [["AD is a median", "median is AD"], "equal area", []]}
    example = read_one(tmp_path, RL | {"key_steps": steps})
    assert example == Example(
        source=str(tmp_path / "rows.json"),
        row=0,
        images=(str(tmp_path / "a.png"),),
        question="<image>Find x.",
        answer="### The final answer is: 3",
        key_steps=(("AD is a median", "median is AD"), ("equal area",), ()),
    )
    assert read_one(tmp_path, RL | {"key_steps": {"Steps": []}}).key_steps == ()
    assert read_one(tmp_path, RL | {"key_steps": steps["Steps"]}) == example  # the list without the object around it
    for missing in ({}, {"key_steps": None}, {"key_steps": {}}, {"key_steps": {"Steps": None}}):
        assert read_one(tmp_path, RL | missing).key_steps is None


def test_images_and_placeholders(tmp_path):
    two = read_one(tmp_path, RL | {"image_path": ["a.png", "/b/c.png"], "problem": "one <image> two <image>"})
    assert two.images == (str(tmp_path / "a.png"), "/b/c.png") and two.question == "one <image> two <image>"
    assert read_one(tmp_path, RL | {"image_path": ["a.png", "b.png"]}).question == "<image><image>Find x."
    for none in (None, []):
        text_only = read_one(tmp_path, RL | {"image_path": none})
        assert text_only.images == () and text_only.question == "Find x."
    plain = {"messages": [USER | {"content": "Find x."}, ASSISTANT]}  # no placeholder, no picture to miss
    assert read_one(tmp_path, plain).images == ()
    examples, _ = read_examples(write(tmp_path, [SFT]), image_root=tmp_path / "pictures")
    assert examples[0].images == (str(tmp_path / "pictures" / "a.png"),)


def test_paths_are_absolute_from_a_relative_file(tmp_path, monkeypatch):
    write(tmp_path, [RL])
    monkeypatch.chdir(tmp_path)
    examples, _ = read_examples("rows.json")
    assert examples[0].images == (str(tmp_path / "a.png"),) and examples[0].source == "rows.json"


def test_sharegpt_row(tmp_path):
    system = {"role": "system", "content": "You are a helpful assistant."}
    example = read_one(tmp_path, SFT | {"messages": [system, USER, ASSISTANT]})
    assert (example.question, example.answer) == ("<image>Question: Find x.", "### Step 1: 3")
    assert read_one(tmp_path, SFT | {"images": ["a.png"]}).images == example.images


BAD = {
    "not an object": ([1, 2], "row 1: holds a list; expected an object"),
    "unknown keys": ({"conversations": []}, r"row 1: has the keys \['conversations'\]; expected image_path"),
    "no solution": ({"problem": "x"}, "row 1, solution: None; expected a text"),
    "blank problem": (RL | {"problem": " "}, "row 1, problem: ' '"),
    "number as solution": (RL | {"solution": 3}, "row 1, solution: 3;"),
    "steps by another name": (RL | {"key_steps": {"steps": ["a"]}}, r"row 1, key_steps: {'steps'.*; expected .\"Steps"),
    "a number in a plain list": (RL | {"key_steps": ["a", 3]}, r"row 1, key_steps\[1\]: 3; expected a text"),
    "steps are a number": (RL | {"key_steps": 3}, "row 1, key_steps: 3; expected a list of groups"),
    "steps are a text": (RL | {"key_steps": {"Steps": "a"}}, "row 1, key_steps.Steps: 'a'; expected a list"),
    "a number as step": (RL | {"key_steps": {"Steps": ["a", 3]}}, r"row 1, key_steps.Steps\[1\]: 3; expected a text"),
    "empty path": (RL | {"image_path": ""}, "row 1, image_path: ''; expected the path"),
    "no image_path": (
        {"problem": "Find x.", "solution": "3"},
        "row 1, image_path: missing; expected a path, a list of paths, or null for a text-only question",
    ),
    "no images": ({"messages": [USER, ASSISTANT]}, "row 1, images: missing; expected a path"),
    "address": (RL | {"image_path": "https://x/a.png"}, "row 1, image_path: 'https"),
    "path object": (SFT | {"images": [{"bytes": "x"}]}, "row 1, images: {'bytes'"),
    "too few images": (RL | {"problem": "<image> <image>"}, "row 1, image_path: 1 images for 2 <image>"),
    "half a pair": (RL | {"problem": "\ud800"}, "row 1, problem: not valid Unicode"),
    "messages": (SFT | {"messages": "x"}, "row 1, messages: 'x'; expected a list"),
    "no messages": (SFT | {"messages": []}, r"row 1, messages: roles are \[\]"),
    "two turns": (SFT | {"messages": [USER, ASSISTANT] * 2}, "row 1, messages: .*only one user and one assistant turn"),
    "own system": (SFT | {"messages": [{"role": "system", "content": "Hi"}, USER, ASSISTANT]}, "turn 'Hi'; only"),
    "parts": (SFT | {"messages": [USER | {"content": [{}]}, ASSISTANT]}, r"row 1, messages\[0\], content: \[{}\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_stops_no_other(tmp_path, case):
    row, message = BAD[case]
    path = write(tmp_path, [RL, row, SFT])
    examples, errors = read_examples(path)
    assert [example.row for example in examples] == [0, 2]
    assert len(errors) == 1
    with pytest.raises(ValueError, match=message):
        raise errors[0]
    assert str(errors[0]).startswith(f"{path}, row 1")


def test_a_broken_line_is_named(tmp_path):
    lines = f'{json.dumps(RL)}\n\n{{"problem": \n{json.dumps(SFT)}'
    examples, errors = read_examples(write(tmp_path, lines, "x.jsonl"))
    assert [example.row for example in examples] == [0, 3]
    assert len(errors) == 1 and "x.jsonl, row 2: not JSON" in str(errors[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"[]", "empty"),
        (b"[{]", "not JSON"),
        (b"problem,solution\n1,2\n", "not JSON"),
        (b"\x89PNG\r\n\xff\xfe", "not UTF-8 text"),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_a_bad_file_is_an_error(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json: {message}.*expected"):
        read_examples(tmp_path / "x.json")


def test_a_missing_file_is_an_error(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            read_examples(path)


def test_reflective_rows_can_be_left_out(tmp_path):
    reflective = SFT | {"messages": [USER, {"role": "assistant", "content": f"### Step 1: 2. {REFLECTION} 3"}]}
    examples, _ = read_examples(write(tmp_path, [SFT, reflective]))
    assert without_reflection(examples) == examples[:1]
