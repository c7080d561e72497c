"""Reading both schemas: the real rows, what is normalised, and errors that name file, row and field."""

import json
import pickle
import tracemalloc
from pathlib import Path

import pytest
from helpers.paths import GEOMETRY

from r1vl_jax.config import SourceSection
from r1vl_jax.data import json_file
from r1vl_jax.data.sources import JsonSource, open_source
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example

RL = {"image_path": "a.png", "problem": "Find x.", "solution": "### The final answer is: 3"}
USER = {"role": "user", "content": "<image>Question: Find x."}
ASSISTANT = {"role": "assistant", "content": "### Step 1: 3"}
SFT = {"messages": [USER, ASSISTANT], "images": "a.png"}


def write(tmp_path, rows, name="rows.json"):
    (tmp_path / name).write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return tmp_path / name


def read_examples(path, **options):
    source = JsonSource(path, **options)
    return [source[i] for i in range(len(source))], source.errors


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


def test_files_outside_of_the_image_root(tmp_path):
    """Symbolic links are resolved on both sides; the error says what to set."""
    folder, other = tmp_path / "in", tmp_path / "in2"
    folder.mkdir()
    other.mkdir()
    (folder / "link").symlink_to(other)
    (tmp_path / "in-link").symlink_to(folder)
    inside = ["a.png", str(folder / "a.png"), str(tmp_path / "in-link" / "a.png"), "link/../a.png", "./b/../a.png"]
    outside = ["/etc/passwd", "../a.png", "../in2/a.png", str(other / "a.png"), "link/a.png", "a/../../x.png"]
    rows = [RL | {"image_path": path} for path in inside + outside]
    rows += [RL | {"image_path": None, "videos": videos} for videos in (["/etc/a.mp4"], [["a.png", "../b.png"]])]
    path = write(folder, rows)
    for name in (path, tmp_path / "in-link" / path.name):
        source = JsonSource(name)
        assert not source.errors
        for index in range(len(inside)):
            assert source[index].images
        for index in range(len(inside), len(rows)):
            with pytest.raises(RowError, match=rf"row {index}, .*: outside of {folder}( |;).*allow_outside allows any"):
                source[index]
    everywhere = JsonSource(path, allow_outside=True)
    assert all(everywhere[index].images or everywhere[index].videos for index in range(len(rows)))
    root = JsonSource(path, image_root=tmp_path)
    assert root[len(inside) + 3].images == (str(other / "a.png"),)


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
    paths = ["a.png", str(tmp_path / "b/c.png")]
    two = read_one(tmp_path, RL | {"image_path": paths, "problem": "one <image> two <image>"})
    assert (
        two.images == (str(tmp_path / "a.png"), str(tmp_path / "b/c.png")) and two.question == "one <image> two <image>"
    )
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


SYSTEM_TURN = {"role": "system", "content": "Be brief."}
BAD = {
    "not an object": ([1, 2], "row 1: holds a list; expected an object"),
    "unknown keys": ({"b": 1, "a": []}, r"row 1: has the keys \['a', 'b'\]; expected image_path, problem,"),
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
    "bytes as text": (SFT | {"images": [{"bytes": "x"}]}, "row 1, images: its bytes are 'x'; expected the contents"),
    "object without a path": (SFT | {"images": [{"src": "x"}]}, "row 1, images: {'src': 'x'}; expected the path"),
    "too few images": (RL | {"problem": "<image> <image>"}, "row 1, image_path: 1 images for 2 <image>"),
    "half a pair": (RL | {"problem": "\ud800"}, "row 1, problem: not valid Unicode"),
    "messages": (SFT | {"messages": "x"}, "row 1, messages: 'x'; expected a list"),
    "no messages": (SFT | {"messages": []}, r"row 1, messages: roles are \[\]"),
    "no answer": (SFT | {"messages": [USER, ASSISTANT, USER]}, r"row 1, messages: roles are .*ending with assistant"),
    "answer first": (SFT | {"messages": [ASSISTANT, USER]}, r"row 1, messages: roles are \['assistant', 'user'\]"),
    "two answers": (SFT | {"messages": [USER, ASSISTANT, ASSISTANT]}, "row 1, messages: roles are"),
    "system later": (SFT | {"messages": [USER, ASSISTANT, SYSTEM_TURN]}, "row 1, messages: roles are .*one system"),
    "a tool": (SFT | {"messages": [USER, {"role": "tool", "content": "x"}, ASSISTANT]}, "row 1, messages: roles are"),
    "empty turn": (SFT | {"messages": [USER, ASSISTANT | {"content": ""}]}, r"row 1, messages\[1\], content: ''"),
    "image in no turn": (SFT | {"images": ["a.png"] * 3}, "row 1, images: 3 images for 1 <image>"),
    "video address": (RL | {"videos": "http://x/a.mp4"}, r"row 1, videos\[0\]: 'http"),
    "no frames": (RL | {"videos": [[]]}, r"row 1, videos\[0\]: no frames; expected"),
    "a number as frame": (RL | {"videos": [["a.png", 3]]}, r"row 1, videos\[0\]: 3; expected the path"),
    "too few videos": (RL | {"problem": "<video><video>", "videos": "a.mp4"}, "row 1, videos: 1 videos for 2 <video>"),
    "videos by another name": (RL | {"problem": "<video>", "clip": "a.mp4"}, "row 1, videos: 0 videos for 1 <video>"),
    "a still as video": (RL | {"video": "a.PNG"}, r"row 1, video\[0\]: 'a.PNG' is an image; expected a video file, or"),
    "null byte": (RL | {"image_path": "a\0.png"}, "row 1, image_path: .*expected the path"),
    "part": (SFT | {"messages": [USER | {"content": [{}]}, ASSISTANT]}, r"row 1, messages\[0\], content\[0\]: {}; exp"),
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
    for path, problem in ((tmp_path / "none.json", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(RowError, match=f"{path}: {problem}; expected a JSON array or JSONL file"):
            read_examples(path)


REFLECTION = "I think I have made a mistake. Let me rethink it."


def test_rows_that_match_are_left_out(tmp_path):
    """By default those that Mulberry calls reflective."""
    reflective = SFT | {"messages": [USER, {"role": "assistant", "content": f"### Step 1: 2. {REFLECTION} 3"}]}
    path = write(tmp_path, [SFT, reflective, RL])
    source = open_source(SourceSection(path=str(path)))
    assert [example.row for example in source] == [0, 2] and source.filtered == 1 and not source.errors
    assert len(open_source(SourceSection(path=str(path), drop_matching=()))) == 3
    assert [example.row for example in JsonSource(path, drop_matching=("final answer", "rethink"))] == [0]
    everything = JsonSource(path, drop_matching=("#",))
    assert len(everything) == 0 and everything.filtered == 3


# Conversations and videos.

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two? <image> <video>"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "3"},
]


def test_each_answer_of_a_conversation_is_an_example(tmp_path):
    """It has all that came before it, and no image of a later turn."""
    row = {"messages": TURNS, "images": ["a.png", "b.png"], "videos": "c.mp4"}
    path = write(tmp_path, [SFT, row, SFT])
    (_, *turns, _), errors = read_examples(path)
    a, b, c = (str(tmp_path / name) for name in ("a.png", "b.png", "c.mp4"))
    assert not errors and [turn.row for turn in turns] == [1, 1, 1]
    assert [turn.name for turn in turns] == [f"{path}, row 1", f"{path}, row 1, turn 1", f"{path}, row 1, turn 2"]
    assert [(turn.question, turn.answer) for turn in turns] == [
        ("<image>One?", "1"), ("Two? <image> <video>", "2"), ("Three?", "3")
    ]  # fmt: skip
    assert [turn.images for turn in turns] == [(a,), (a, b), (a, b)]
    assert [turn.videos for turn in turns] == [(), (c,), (c,)]
    assert turns[2].history == (("<image>One?", "1"), ("Two? <image> <video>", "2")) and not turns[0].history
    assert {turn.system for turn in turns} == {"Be brief."}


def test_placeholders_that_are_missing_stand_in_front_of_the_first_turn(tmp_path):
    turns = [TURNS[1] | {"content": "One?"}, TURNS[2], TURNS[5], TURNS[6]]
    row = {"messages": turns, "images": ["a.png", "b.png"], "videos": ["c.mp4"]}
    examples, _ = read_examples(write(tmp_path, [row]))
    assert examples[0].question == "<image><image><video>One?" and examples[1].question == "Three?"
    assert len(examples[0].images) == len(examples[1].images) == 2


def test_videos(tmp_path):
    def videos(value, **row):
        return read_one(tmp_path, {"problem": "Find x.", "solution": "3", "videos": value} | row).videos

    a, b = str(tmp_path / "a.mp4"), str(tmp_path / "b.png")
    assert videos("a.mp4") == videos(["a.mp4"]) == (a,)
    assert videos([["b.png", "b.png"], "a.mp4"]) == ((b, b), a)
    assert videos(None, image_path="x.png") == videos([], image_path="x.png") == ()
    assert read_one(tmp_path, RL | {"videos": "a.mp4"}).question == "<image><video>Find x."


# The index.


def test_any_place_of_the_read_ends(tmp_path, monkeypatch):
    """Rows of every length and kind, read in chunks that end anywhere, within characters too."""
    odd = RL | {"problem": "\u00e9\U0001f600 " * 9, "n": [1.5, True, None, {"}": "]"}]}
    rows = [SFT, odd, RL | {"solution": "x" * 300}]
    for name, text in {
        "indented": json.dumps(rows, ensure_ascii=False, indent=3),
        "dense": json.dumps(rows, ensure_ascii=False, separators=(",", ":")),
        "loose": " [\n\t" + " ,\r\n".join(json.dumps(row) for row in rows) + "\n] \n",
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    }.items():
        path = write(tmp_path, text, f"{name}.json")
        whole, _ = read_examples(path)
        assert [example.row for example in whole] == [0, 1, 2] and whole[1].question.startswith("<image>\u00e9")
        for chunk in (1, 2, 3, 7, 64, 1000):
            monkeypatch.setattr(json_file, "CHUNK", chunk)
            assert read_examples(path) == (whole, []), (name, chunk)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "text, problem",
    [
        ("[{}, ]", "row 1, byte 5"),
        ("[{} {}]", "expected a comma or the closing bracket, found '{'"),
        ("[{}] {}", "expected nothing after the array, found '{'"),
        ("[{}", "found ''"),
        ('[{"problem": "x]', "row 0, byte 1"),
    ],
)
def test_where_an_array_breaks(tmp_path, text, problem):
    with pytest.raises(RowError, match="rows.json: not JSON") as caught:
        JsonSource(write(tmp_path, text))
    assert problem in str(caught.value)


def test_an_array_that_is_cut_short_is_not_read_into_memory(tmp_path, monkeypatch):
    """A quote or a bracket that nothing closes."""
    monkeypatch.setattr(json_file, "CHUNK", 1000)
    monkeypatch.setattr(json_file, "MAX_ROW", 5000)
    path = write(tmp_path, '[{"problem": "' + "x" * 100_000)
    with pytest.raises(RowError, match="not JSON"):
        JsonSource(path)
    rows = [RL | {"problem": "y" * 4000}] * 30
    assert len(JsonSource(write(tmp_path, rows))) == 30


def test_one_line_that_is_no_text_stops_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(RL).encode() + b'\n{"problem": "\xff"}\n' + json.dumps(SFT).encode())
    examples, (error,) = read_examples(path)
    assert [example.row for example in examples] == [0, 2] and "row 1: not UTF-8 text" in str(error)


def test_a_source_in_another_process(tmp_path):
    source = JsonSource(write(tmp_path, [SFT, RL]))
    first = source[0]  # opens the file, which does not travel
    again = pickle.loads(pickle.dumps(source))
    assert (again[0], again[1]) == (first, source[1]) and len(again) == 2


@pytest.mark.parametrize("opened", [False, True])
def test_a_file_that_changes_is_an_error(tmp_path, opened):
    """Rewritten before the first row is read, or in place under an open file."""
    source = JsonSource(write(tmp_path, [SFT, RL]))
    if opened:
        assert source[0].answer == "### Step 1: 3"
    write(tmp_path, [RL, SFT, RL])
    with pytest.raises(OSError, match="rows.json: the file has changed since it was indexed"):
        source[0]


def test_the_fingerprint_is_of_all_rows(tmp_path):
    def fingerprint(rows):
        return JsonSource(write(tmp_path, rows)).fingerprint

    assert fingerprint([SFT, RL]) == fingerprint([SFT, RL])
    lines = "\n".join(json.dumps(row) for row in (SFT, RL))
    kinds = {fingerprint(rows) for rows in ([SFT, RL], [RL, SFT], [SFT, RL | {"solution": "4"}], [SFT, RL, RL], lines)}
    assert len(kinds) == 5


@pytest.mark.parametrize(
    "text, problem",
    [
        (f'{{"rows": 2,\n"data": \n{json.dumps(RL)}\n}}', "one object over several lines"),
        (f'"rows"\n{json.dumps(RL)}\n', "not JSON of rows .line 0 holds 'rows'"),
        ("<html>\n</html>", "not JSON"),
    ],
)
def test_lines_that_do_not_begin_with_a_row_are_no_file_of_rows(tmp_path, text, problem):
    """One row a line inside of something else would give a data set of what happens to parse."""
    with pytest.raises(RowError, match=f"rows.json: {problem}.*; expected a JSON array, or one JSON object a line"):
        JsonSource(write(tmp_path, text))


def test_bytes_that_are_no_text_spoil_their_own_row(tmp_path):
    path = tmp_path / "rows.json"
    broken = json.dumps(RL | {"problem": "QQ"}).encode().replace(b"QQ", b"\xff\xc3")
    path.write_bytes(b"[" + b",".join([json.dumps(SFT).encode(), broken, json.dumps(RL).encode()]) + b"]")
    examples, (error,) = read_examples(path)
    assert [example.row for example in examples] == [0, 2] and examples[1].question == "<image>Find x."
    assert "row 1, problem: not valid Unicode" in str(error)


def test_a_system_turn_stays_as_it_stands(tmp_path):
    """The default one too: another checkpoint's template may have another default."""
    turn = {"role": "system", "content": "You are a helpful assistant."}
    assert read_one(tmp_path, SFT | {"messages": [turn, USER, ASSISTANT]}).system == turn["content"]
    assert read_one(tmp_path, SFT).system is None


def test_memory_does_not_grow_with_the_file(tmp_path):
    """20 MB of rows: the index takes 22 bytes a row, reading a few chunks."""
    row = json.dumps(RL | {"solution": "x" * 2000})
    path = write(tmp_path, "[" + ",\n".join([row] * 10_000) + "]")
    tracemalloc.start()
    source = JsonSource(path)
    index, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 20e6 and len(source) == 10_000
    assert index < 1e6 and peak < 10e6
