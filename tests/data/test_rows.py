"""The forms in which people have rows: each is read whole, or refused by name. Keys that nobody reads are named."""

import json

import pytest

from r1vl_jax.config import SourceSection
from r1vl_jax.data import json_file
from r1vl_jax.data.rows import parse_row
from r1vl_jax.data.sources import JsonSource, check_source, open_source
from r1vl_jax.errors import RowError

QUESTION, ANSWER = "What colour is the card?", "### Step 1:\nThe card is red.\n\n### The final answer is:\nA: red"
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
SFT = {"messages": [USER, ASSISTANT]}
RL = {"problem": QUESTION, "solution": "A"}
GPT = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]


def write(folder, rows, name="rows.json"):
    text = rows if isinstance(rows, str) else json.dumps(rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def parse(row):
    (example,) = parse_row(row, source="f.json", number=7, image_root="/d")
    return example


def refused(row):
    with pytest.raises(RowError) as caught:
        parse_row(row, source="f.json", number=7, image_root="/d")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Where images and videos are.


@pytest.mark.parametrize("field", ["images", "image", "image_path"])
@pytest.mark.parametrize("row", [SFT, RL])
def test_each_key_of_images(field, row):
    assert parse(row | {field: "i/a.png"}).images == ("/d/i/a.png",)
    assert parse(row | {field: "i/a.png"}).question == f"<image>{QUESTION}"
    assert parse(row | {field: [["a.png"], ["b.png", "c.png"]]}).images == ("/d/a.png", "/d/b.png", "/d/c.png")
    assert parse(row | {field: {"path": "a.png", "bytes": None}}).images == ("/d/a.png",)
    assert parse(row | {field: "file:///e/a.png"}).images == ("/e/a.png",)
    for nothing in (None, [], {"path": None, "bytes": None}):
        assert parse(row | {field: nothing}).images == () and parse(row | {field: nothing}).question == QUESTION
    assert "f.json, row 7, " + field in refused(row | {field: ["a.png", 3]})


@pytest.mark.parametrize("field", ["videos", "video"])
@pytest.mark.parametrize("row", [SFT, RL])
def test_each_key_of_videos(field, row):
    example = parse(row | {field: "a.mp4"})
    assert example.videos == ("/d/a.mp4",) and example.question == f"<video>{QUESTION}" and example.images == ()
    assert parse(row | {field: ["a.mp4", ["f.png", "g.png"]]}).videos == ("/d/a.mp4", ("/d/f.png", "/d/g.png"))
    assert parse(row | {field: {"path": "a.mp4", "bytes": None}}).videos == ("/d/a.mp4",)
    message = refused(row | {field: ["f.png", "g.png"]})  # frames, or videos? The answer would be half the data
    assert message.startswith(f"f.json, row 7, {field}[0]: 'f.png' is an image; expected a video file, or a list of")


def test_two_keys_of_images_are_refused():
    message = refused(SFT | {"images": ["a.png"], "image": "b.png"})
    assert message == "f.json, row 7, images and image: all of them have images; expected one of them"
    assert "videos and video" in refused(RL | {"videos": "a.mp4", "video": "a.mp4"})
    assert parse(SFT | {"images": [], "image": "b.png", "image_path": None}).images == ("/d/b.png",)


def test_contents_of_images_in_the_row():
    """As parquet has them: bytes alone, or with a name that is no path."""
    both = parse(RL | {"images": [{"bytes": b"one", "path": "a.png"}, {"bytes": b"two", "path": None}]})
    assert both.image_bytes == (b"one", b"two") and both.images == ("a.png", "images[1]")
    assert both.question == f"<image><image>{QUESTION}"
    assert parse(RL | {"image": b"one"}).image_bytes == (b"one",)
    assert parse(RL | {"image": "a.png"}).image_bytes is None and parse(RL | {"image": None}).image_bytes is None
    assert "images: 1 of 2 images are in the row; expected all" in refused(RL | {"images": [b"one", "a.png"]})
    assert "images: its bytes are b''" in refused(RL | {"images": [{"bytes": b"", "path": "a.png"}]})
    assert "videos[0]: {'bytes': b'x'" in refused(RL | {"videos": [{"bytes": b"x", "path": None}]})
    turns = [*GPT, {"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "b"}]
    first, second = parse_row({"images": [b"1", b"2"], "messages": turns}, source="", number=0, image_root="")
    assert (first.image_bytes, second.image_bytes) == ((b"1",), (b"1", b"2"))


def test_audio_is_refused():
    audio = {"messages": [USER | {"content": f"<audio>{QUESTION}"}, ASSISTANT], "audios": ["a.mp3"]}
    assert refused(audio) == "f.json, row 7, audios: audio is not read; expected images, videos or text"
    assert "f.json, row 7, audio: audio" in refused(RL | {"image": "a.png", "audio": {"path": "a.mp3"}})
    assert "row 7: <audio> in the question" in refused(audio | {"audios": []})
    part = {"type": "input_audio", "input_audio": {"data": "x"}}
    assert "messages[0], content[0]: audio is not read" in refused(
        {"messages": [USER | {"content": [part]}, ASSISTANT]}
    )
    for nothing in ([], None, "", {"bytes": None, "path": None}):
        assert parse(SFT | {"audios": nothing}).question == QUESTION


def test_a_question_without_a_key_of_images_is_refused():
    """Null says that there is none. Here the images are under another key."""
    row = {"problem": QUESTION, "solution": "<answer>A</answer>", "path": "a.png", "options": ["A) red", "B) blue"]}
    assert refused(row) == (
        "f.json, row 7, image_path: missing; expected a path, a list of paths, or null for a text-only question; the "
        "row has the keys path, options, which are not read"
    )
    assert "row 7, images: missing" in refused({"conversations": GPT})


# Conversations.


def test_sharegpt():
    example = parse({"id": "1", "image": "a.png", "conversations": GPT})
    assert (example.question, example.answer) == (f"<image>\n{QUESTION}", ANSWER)
    assert example.images == ("/d/a.png",) and example.system is None
    # The two forms of a turn are read under both names.
    assert parse({"image": "a.png", "messages": GPT}) == example
    assert parse({"conversations": [USER, ASSISTANT]}) == parse(SFT)
    assert parse({"conversations": [{"from": "system", "value": "Be brief."}, *GPT], "image": "a.png"}).system
    assert "conversations: roles are ['gpt']; expected user" in refused({"conversations": GPT[1:]})
    assert "conversations[0], value: 3; expected a text" in refused({"conversations": [GPT[0] | {"value": 3}, GPT[1]]})
    assert "roles are [['x'], 'assistant']" in refused({"messages": [USER | {"role": ["x"]}, ASSISTANT]})
    assert "expected a list of {role, content} or {from, value}" in refused({"messages": ["x"]})


@pytest.mark.parametrize("row", [SFT, RL | {"image_path": None}])
def test_the_system_column(row):
    assert parse(row | {"system": "Answer like a teacher."}).system == "Answer like a teacher."
    assert parse(row | {"system": None}).system is None and parse(row | {"system": ""}).system is None
    assert "row 7, system: ['x']; expected a text" in refused(row | {"system": ["x"]})


def test_a_system_turn_and_a_system_column():
    row = {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]}
    assert parse(row).system == parse(row | {"system": "Be brief."}).system == "Be brief."
    assert "row 7, system: 'Be long.', and a system turn with another text" in refused(row | {"system": "Be long."})


def parts(*content, **row):
    return {"messages": [{"role": "user", "content": [*content]}, ASSISTANT]} | row


TEXT = {"type": "text", "text": QUESTION}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}, "text": None},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "file:///d/a.png"},
    ],
)
def test_a_part_that_names_its_image(part):
    example = parse(parts(part, TEXT, part))
    assert example.images == ("/d/a.png",) * 2 and example.question == f"<image>{QUESTION}<image>"
    assert example == parse(parts(part, TEXT, part, images=[]))
    assert "images and content: all of them have images" in refused(parts(part, TEXT, images=["b.png"]))


def test_parts():
    example = parse(parts({"type": "image"}, TEXT, {"type": "image"}, images=["a.png", "b.png"]))
    assert example.images == ("/d/a.png", "/d/b.png") and example.question == f"<image>{QUESTION}<image>"
    assert "images: 1 images for 2 <image>" in refused(parts({"type": "image"}, {"type": "image"}, images=["a.png"]))
    assert "images: missing" in refused(parts({"type": "image"}, TEXT))
    assert parse(parts(TEXT, TEXT)).question == QUESTION * 2
    assert parse(parts({"type": "image", "image": b"x"})).image_bytes == (b"x",)
    frames = parse(parts({"type": "video", "video": ["f.png", "g.png"]}, TEXT))
    assert frames.videos == (("/d/f.png", "/d/g.png"),) and frames.question == f"<video>{QUESTION}"
    assert parse(parts({"type": "video_url", "video_url": {"url": "a.mp4"}}, TEXT)).videos == ("/d/a.mp4",)
    answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
    assert parse({"messages": [USER, answer]}) == parse(SFT)
    for bad, says in (
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, "content: 'data:image/png;base64"),
        ({"type": "tool_use"}, "messages[0], content[0]: {'type': 'tool_use'}; expected a part of type text, image"),
        ({"type": "text", "text": None}, "messages[0], content[0]: {'type': 'text', 'text': None}"),
        ("text", "messages[0], content[0]: 'text'; expected a part"),
    ):
        assert says in refused(parts(bad, TEXT))
    drawn = {"role": "assistant", "content": [{"type": "image"}]}
    assert "messages[1], content[0]: {'type': 'image'}; expected a part of type text" in refused(
        {"messages": [USER, drawn], "images": "a.png"}
    )
    assert "messages[0], content: ''; expected a text" in refused(parts())


# Solutions and key steps.


@pytest.mark.parametrize(
    "solution",
    ["<answer> A </answer>", "So \\boxed{A}", "Red.\n#### A", "Answer: A", "<think>x</think><answer>A</answer>"],
)
def test_solutions_in_other_frames_stay_as_they_are(solution):
    assert parse({"image": "a.png", "problem": QUESTION, "solution": solution, "key_steps": None}).answer == solution


def test_answer_in_place_of_solution():
    row = {"images": ["a.png"], "problem": f"<image>{QUESTION}", "answer": "A"}
    assert parse(row).answer == "A" and parse(row).question == row["problem"] and parse(row).key_steps is None
    assert parse(row | {"solution": None}).answer == parse(row | {"solution": ""}).answer == "A"
    assert parse(row | {"solution": "### The final answer is: B"}).answer == "### The final answer is: B"
    assert "row 7, answer: 3; expected a text" in refused(row | {"answer": 3})
    assert "row 7, solution: None; expected a text" in refused(row | {"answer": None})


def test_key_steps_as_json_text():
    groups = [["AD is a median", "median is AD"], "equal area"]
    expected = (("AD is a median", "median is AD"), ("equal area",))
    for value in (groups, {"Steps": groups}):
        row = RL | {"image": "a.png"}
        assert parse(row | {"key_steps": value}).key_steps == expected
        assert parse(row | {"key_steps": json.dumps(value)}).key_steps == expected
    for nothing in ("", " ", "null", "{}"):
        assert parse(row | {"key_steps": nothing}).key_steps is None
    assert "row 7, key_steps: a text that is not JSON (Expecting value" in refused(
        row | {"key_steps": "AD is a median"}
    )
    assert "row 7, key_steps.Steps[0]: 3;" in refused(row | {"key_steps": '{"Steps": [3]}'})


# Keys that nobody reads.


def test_keys_that_nobody_reads_are_named_once(tmp_path):
    rows = [
        RL | {"image": "a.png", "key_step": {"Steps": ["x"]}, "id": 1, "video": None},
        RL | {"image": "a.png", "answer": "B", "id": 2, "empty": None},
        {"messages": [USER | {"loss": 0}, ASSISTANT], "source": "web"},
        {"conversations": [GPT[0] | {"w": 1}, GPT[1]], "image": "a.png"},
        3,
    ]
    source = JsonSource(write(tmp_path, rows))
    assert source.notes == [
        f"{source.name}: keys that are not read: key_step (did you mean 'key_steps'?), id, answer, source, "
        "messages[].loss, conversations[].w"
    ]
    assert JsonSource(write(tmp_path, [RL | {"image": "a.png"}])).notes == []
    many = JsonSource(write(tmp_path, [SFT | {f"k{i}": 1 for i in range(30)}]))
    assert many.notes[0].endswith("k8, k9 and 20 more")


# Forms of a file.

ROWS = [RL | {"image": f"{i}.png", "problem": f"Question {i}?"} for i in range(3)]


def numbers(source):
    return [(source[i].row, source[i].question) for i in range(len(source))]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_of_splits(tmp_path, indent, monkeypatch):
    tree = {"version": {"rows": [1, 2]}, "test": ROWS[:1], "train": ROWS, "empty": []}
    path = write(tmp_path, json.dumps(tree, indent=indent))
    listed = numbers(JsonSource(write(tmp_path, ROWS, "list.json")))
    for chunk in (1, 7, 1 << 20):
        monkeypatch.setattr(json_file, "CHUNK", chunk)
        assert numbers(JsonSource(path)) == listed
        test = open_source(SourceSection(path=str(path), split="test"))
        assert numbers(test) == listed[:1] and test.fingerprint != JsonSource(path).fingerprint
    for split, says in (
        ("dev", "an object with the keys version, test, train, empty; expected the split 'dev'"),
        ("version", "not JSON .version is no list; row 0, byte .*; expected one array of objects"),
        ("empty", "empty; expected at least one row"),
    ):
        with pytest.raises(RowError, match=f"rows.json: {says}"):
            JsonSource(path, split=split)
    section = SourceSection(path=str(path), split="dev")
    with pytest.raises(RowError, match="expected the split 'dev'"):
        check_source(section)


@pytest.mark.parametrize(
    "end, says",
    [("]", "expected a comma or the closing brace, found ''"), ("]}x", "nothing after the object, found 'x'")],
)
def test_an_object_of_splits_that_is_cut_short(tmp_path, end, says):
    path = write(tmp_path, json.dumps({"train": ROWS})[:-2] + end)
    with pytest.raises(RowError, match=f"rows.json: not JSON .*{says}"):
        JsonSource(path)


def test_rows_are_no_splits(tmp_path):
    """A row has lists of objects too, and the first line of JSONL is an object."""
    odd = {"id": {"a": [1]}, "turns": [], **SFT, "more": [SFT], "image": "a.png"}
    lines = "\n".join(json.dumps(row) for row in [odd, RL | {"image": [{"path": "b.png"}]}])
    assert [row for row, _ in numbers(JsonSource(write(tmp_path, lines)))] == [0, 1]
    assert numbers(JsonSource(write(tmp_path, json.dumps(odd)))) == [(0, f"<image>{QUESTION}")]


@pytest.mark.parametrize("text", [json.dumps(ROWS), "\n".join(map(json.dumps, ROWS))])
def test_a_split_of_a_file_without_splits(tmp_path, text):
    """All rows would be the held-out ones and the trained ones."""
    with pytest.raises(RowError, match="rows.json: one list of rows; expected an object with the split 'test'"):
        JsonSource(write(tmp_path, text), split="test")


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_objects_over_several_lines(tmp_path, rows):
    path = write(tmp_path, "\n\n" + "\n".join(json.dumps(row, indent=1) for row in rows))
    with pytest.raises(RowError) as caught:
        JsonSource(path)
    assert str(caught.value) == (
        f"{path}: one object over several lines; expected a JSON array, or one JSON object a line, as `jq -c . FILE` "
        "writes them"
    )


@pytest.mark.parametrize(
    "encoding, name",
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16-LE"), ("utf-16-be", "UTF-16-BE"), ("utf-32", "UTF-32")],
)
def test_other_encodings(tmp_path, encoding, name):
    path = tmp_path / "rows.json"
    for text in (json.dumps(ROWS), "\n".join(map(json.dumps, ROWS))):
        path.write_text(text, encoding=encoding)
        with pytest.raises(RowError, match=f"rows.json: {name} text; expected UTF-8, as `iconv -f {name} -t UTF-8"):
            JsonSource(path)
