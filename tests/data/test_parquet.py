"""Rows from parquet: the same rows as from JSON, read one row group at a time, with faults that name file and row."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from r1vl_jax.config import SourceSection
from r1vl_jax.data import parquet_files, parquet_source
from r1vl_jax.data.loader import Loader, Position, read_rows
from r1vl_jax.data.parquet_source import ParquetSource
from r1vl_jax.data.sources import JsonSource, check_source, open_source
from r1vl_jax.errors import RowError

REFLECTION = SourceSection().drop_matching[0]
GROUPS = [["AD is a median", "median is AD"], ["equal area"]]


def picture(i):
    file = io.BytesIO()
    Image.new("RGB", (28, 28 + i), (i, 2 * i, 3)).save(file, "PNG")
    return file.getvalue()


def question(i, **more):
    """A row as in the sets of geometry3k for RL."""
    return {"images": [picture(i)], "problem": f"<image>Question {i}?", "answer": f"{i}", "key_steps": GROUPS} | more


def turns(*texts, keys=("role", "content"), roles=("user", "assistant")):
    return [{keys[0]: roles[i % 2], keys[1]: text} for i, text in enumerate(texts)]


def talk(i, *texts):
    return {"images": [{"bytes": picture(i), "path": f"{i}.png"}], "messages": turns(f"<image>Question {i}?", *texts)}


def write(path, rows, group=2, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    return path


def examples(source):
    return [source[i] for i in range(len(source))]


@pytest.fixture
def reads(monkeypatch):
    """The columns of each row group that is read, and of each column that is read while a source is opened."""
    seen = []

    def watch(name):
        original = getattr(pq.ParquetFile, name)

        def watched(self, *args, columns=None, **options):
            seen.append((name, *args, sorted(columns)))
            return original(self, *args, columns=columns, **options)

        monkeypatch.setattr(pq.ParquetFile, name, watched)

    for name in ("read_row_group", "read_row_groups", "iter_batches", "read"):
        watch(name)
    return seen


# The rows.


def test_rows_are_those_of_the_json_file(tmp_path):
    """With images inside, as files beside it, and none."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(5):
        (images / f"{i}.png").write_bytes(picture(i))
    plain = [
        {"image": f"images/{i}.png", "problem": f"Question {i}?", "solution": str(i), "key_steps": {"Steps": GROUPS}}
        for i in range(5)
    ]
    plain[3]["image"], plain[2]["key_steps"], plain[4]["system"] = None, None, "Be brief."
    (tmp_path / "rows.json").write_text(json.dumps(plain))
    theirs = JsonSource(tmp_path / "rows.json")
    inside = [row | {"image": row["image"] and {"bytes": (tmp_path / row["image"]).read_bytes()}} for row in plain]
    for rows in (plain, inside):
        path = write(tmp_path / "rows.parquet", [row | {"system": row.get("system")} for row in rows])
        source = open_source(SourceSection(path=str(path)))
        assert isinstance(source, ParquetSource) and source.name == str(path)
        assert source.errors == [] and source.filtered == 0 and len(source) == 5
        for ours, other in zip(examples(source), examples(theirs), strict=True):
            assert ours.source == str(path) and ours.name == f"{path}, row {other.row}"
            if rows is plain or not other.images:
                assert ours == dataclasses.replace(other, source=str(path))
            else:
                assert ours.image_bytes == (Path(other.images[0]).read_bytes(),) and ours.images == ("image[0]",)
                changed = dataclasses.replace(other, source=str(path), images=ours.images, image_bytes=ours.image_bytes)
                assert ours == changed
    root = open_source(SourceSection(path=str(write(tmp_path / "x.parquet", plain)), image_root="/d"))
    assert root[0].images == ("/d/images/0.png",)


def test_paths_outside_of_the_image_root(tmp_path):
    images = [{"bytes": None, "path": "/etc/passwd"}], [{"bytes": picture(1), "path": "/etc/passwd"}]
    path = str(write(tmp_path / "x.parquet", [question(i, images=value) for i, value in enumerate(images)]))
    source = open_source(SourceSection(path=path))
    with pytest.raises(RowError, match="row 0, images: /etc/passwd: outside of .*image_root names another .*allow_out"):
        source[0]
    assert source[1].image_bytes
    assert open_source(SourceSection(path=path, allow_outside=True))[0].images == ("/etc/passwd",)
    assert open_source(SourceSection(path=path, image_root="/etc"))[0].images == ("/etc/passwd",)


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    "kind, wrap",
    [
        (pa.list_(pa.binary()), lambda data: [data]),
        (pa.list_(STRUCT), lambda data: [{"bytes": data, "path": None}]),
        (pa.large_list(STRUCT), lambda data: [{"bytes": data, "path": None}]),
        (pa.list_(pa.list_(STRUCT)), lambda data: [[{"bytes": data, "path": None}]]),
        (STRUCT, lambda data: {"bytes": data, "path": None}),
        (pa.large_binary(), lambda data: data),
    ],
)
def test_images_of_every_layout(tmp_path, kind, wrap):
    rows = [question(i, images=wrap(picture(i))) for i in range(3)] + [question(3, problem="None?", images=None)]
    schema = pa.schema([("images", kind), ("problem", pa.string()), ("answer", pa.large_string())])
    found = examples(ParquetSource(write(tmp_path / "a.parquet", rows, schema=schema)))
    assert [example.image_bytes for example in found] == [*((picture(i),) for i in range(3)), None]
    assert [example.answer for example in found] == ["0", "1", "2", "3"]


def test_key_steps_of_every_layout(tmp_path):
    expected = tuple(map(tuple, GROUPS))
    for steps in (GROUPS, {"Steps": GROUPS}, json.dumps(GROUPS), json.dumps({"Steps": GROUPS})):
        nothing = "" if isinstance(steps, str) else None
        path = write(tmp_path / "a.parquet", [question(0, key_steps=steps), question(1, key_steps=nothing)])
        assert [example.key_steps for example in examples(ParquetSource(path))] == [expected, None]
    table = pa.table({"image": [picture(0)], "problem": pa.array(["a"]).dictionary_encode(), "solution": ["b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    (example,) = examples(ParquetSource(tmp_path / "a.parquet"))
    assert (example.question, example.answer, example.key_steps) == ("<image>a", "b", None)


@pytest.mark.parametrize(
    "keys, roles", [(("role", "content"), ("user", "assistant")), (("from", "value"), ("human", "gpt"))]
)
def test_each_answer_of_a_conversation_is_an_example(tmp_path, keys, roles):
    said = [["<image>a", "b"], ["<image>a", "b", "c", "d", "e", "f"], ["<image>a"], ["<image>a", "b", "c", "d"], None]
    rows = [
        {"images": [picture(i)], "conversations": texts and turns(*texts, keys=keys, roles=roles)}
        for i, texts in enumerate(said)
    ]
    source = ParquetSource(write(tmp_path / "a.parquet", rows))
    assert len(source) == 1 + 3 + 1 + 2 + 1
    turn = pa.struct([(keys[0], pa.large_string()), (keys[1], pa.large_string())])
    schema = pa.schema([("images", pa.list_(pa.binary())), ("conversations", pa.large_list(turn))])
    same = ParquetSource(write(tmp_path / "b.parquet", rows, schema=schema))
    assert [same[i].answer for i in (0, 1, 2, 3)] == [source[i].answer for i in (0, 1, 2, 3)] and len(same) == 8
    good = [source[i] for i in (0, 1, 2, 3, 5, 6)]
    assert [(example.row, example.answer) for example in good] == [
        (0, "b"), (1, "b"), (1, "d"), (1, "f"), (3, "b"), (3, "d"),
    ]  # fmt: skip
    assert good[3].history == (("<image>a", "b"), ("c", "d")) and good[3].image_bytes == (picture(1),)
    with pytest.raises(RowError, match=r"a.parquet, row 2, conversations: roles are \['\w+'\]; expected user"):
        source[4]
    with pytest.raises(RowError, match="a.parquet, row 4: has the keys "):
        source[7]
    with pytest.raises(IndexError):
        source[8]


def test_typed_parts(tmp_path):
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    schema = pa.schema(
        [
            ("images", pa.list_(STRUCT)),
            ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))),
        ]
    )
    parts = [[{"type": "image"}, {"type": "text", "text": "Find x."}], [{"type": "text", "text": "3"}]]
    rows = [{"images": [{"bytes": picture(0)}], "messages": turns(*parts)}]
    (example,) = examples(ParquetSource(write(tmp_path / "a.parquet", rows, schema=schema)))
    assert (example.question, example.answer, example.image_bytes) == ("<image>Find x.", "3", (picture(0),))


def test_rows_that_match_are_left_out(tmp_path):
    rows = [talk(0, "a"), talk(1, f"2. {REFLECTION}", "Sure?", "3"), talk(2, "c")]
    source = open_source(SourceSection(path=str(write(tmp_path / "a.parquet", rows))))
    assert len(source) == 4 and source[0].answer == "a" and source[3].answer == "c"
    for index in (1, 2):
        with pytest.raises(RowError, match="a.parquet, row 1: left out by drop_matching"):
            source[index]
    everything = open_source(SourceSection(path=str(tmp_path / "a.parquet"), drop_matching=()))
    assert [example.answer for example in examples(everything)] == ["a", f"2. {REFLECTION}", "3", "c"]


# What is read.


def test_opening_reads_no_row(tmp_path, reads):
    source = ParquetSource(write(tmp_path / "a.parquet", [question(i) for i in range(9)]))
    assert len(source) == 9 and reads == []
    check_source(SourceSection(path=str(tmp_path / "a.parquet")))
    assert reads == []


def test_opening_conversations_reads_their_roles(tmp_path, reads):
    source = ParquetSource(write(tmp_path / "a.parquet", [talk(i, "a", "b", "c") for i in range(9)]))
    assert len(source) == 18
    ((name, (column,)),) = reads
    assert name == "iter_batches" and column.startswith("messages.") and column.endswith(".role")


def test_reading_a_row_reads_its_row_group(tmp_path, reads):
    rows = [question(i, extra="not read", solution=None) for i in range(20)]
    source = ParquetSource(write(tmp_path / "a.parquet", rows, group=4))
    columns = ["answer", "images", "key_steps", "problem", "solution"]
    assert source[9].answer == "9"
    assert reads == [("read_row_group", 2, columns)]
    assert [source[i].answer for i in (8, 11, 10, 9)] == ["8", "11", "10", "9"] and len(reads) == 1
    assert source[0].answer == "0" and reads[1:] == [("read_row_group", 0, columns)]


def test_in_order_each_row_group_is_read_once(tmp_path, reads):
    """By the loader's threads, which ask for the same row group at once."""
    path = write(tmp_path / "a.parquet", [question(i) for i in range(40)], group=10)
    rows = list(read_rows(ParquetSource(path), lambda example: example.answer, seed=None))
    assert [row[1] for _, row in rows] == [str(i) for i in range(40)]
    assert sorted(group for _, group, _ in reads) == [0, 1, 2, 3]


def test_few_row_groups_are_kept(tmp_path, reads, monkeypatch):
    path = write(tmp_path / "a.parquet", [question(i) for i in range(8)], group=2)
    table = pq.ParquetFile(path).read_row_group(0, columns=["images", "problem", "answer", "key_steps"])
    for kept, expected in ((1, [0, 1, 0, 1]), (int(2.5 * table.nbytes), [0, 1, 2, 0])):
        monkeypatch.setattr(parquet_source, "KEPT", kept)
        source = ParquetSource(path)
        reads.clear()
        for index in (0, 2, 0, 2) if kept == 1 else (0, 2, 0, 2, 4, 2, 0):
            assert source[index].answer == str(index)
        assert [group for _, group, _ in reads] == expected


def test_threads_share_a_row_group(tmp_path, monkeypatch):
    """All ask while the first one is reading. A failure is not kept."""
    source = ParquetSource(write(tmp_path / "a.parquet", [question(i) for i in range(8)], group=8))
    asked, calls, original = threading.Semaphore(0), [], parquet_source._read_group

    def read(file, group):
        calls.append(group)
        if len(calls) == 1:
            raise RowError("broken")
        for _ in range(8):
            asked.acquire()
        return original(file, group)

    def ask(index):
        asked.release()
        return source[index].answer

    monkeypatch.setattr(parquet_source, "_read_group", read)
    with pytest.raises(RowError, match="broken"):
        source[0]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(8))) == [str(i) for i in range(8)]
    assert calls == [0, 0]


# Folders.


def test_a_folder_of_shards_is_read_in_order(tmp_path):
    for shard in (1, 0, 2):
        rows = [question(10 * shard + i) for i in range(shard + 2)]
        write(tmp_path / "data" / f"train-0000{shard}-of-00003.parquet", rows)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [question(50)])
    source = open_source(SourceSection(path=str(tmp_path / "data")))
    assert [example.answer for example in examples(source)] == ["0", "1", "10", "11", "12", "20", "21", "22", "23"]
    assert [example.row for example in examples(source)] == list(range(9))
    assert source[3].name == f"{tmp_path / 'data'}, row 3"
    assert source[3].images == ("train-00001-of-00003.parquet, row 1: images[0]",)
    test = open_source(SourceSection(path=str(tmp_path / "data"), split="test"))
    assert [example.answer for example in examples(test)] == ["50"] and test.fingerprint != source.fingerprint


def test_a_fault_in_a_shard_names_the_shard(tmp_path):
    write(tmp_path / "0.parquet", [question(0), question(1)])
    write(tmp_path / "1.parquet", [question(2), question(3, answer=" ")])
    source = ParquetSource(tmp_path)
    with pytest.raises(RowError) as caught:
        source[3]
    assert str(caught.value) == (
        f"{tmp_path}, row 3, answer: ' '; expected a text that is not empty (1.parquet, row 1)"
    )


@pytest.mark.parametrize(
    "files, split, says",
    [
        (["a.txt"], "train", "a folder without .parquet files; expected JSON or a folder of parquet files$"),
        (["data/a.parquet", "b.json"], "train", "a folder without .parquet files; .*; there are some in data"),
        (["train.parquet", "test.parquet"], "dev", "no split 'dev'; there are test, train"),
        (["test.parquet"], "train", "no split 'train'; there are test"),
        (["a.parquet", "b.parquet"], "test", "no split 'test'; its files have no names of splits"),
        (
            ["train.parquet", "more.parquet"],
            "train",
            "has files of splits, and more.parquet; expected one or the other",
        ),
        (["train-00000-of-00003.parquet"], "train", "1 shards train-.*.parquet; expected 3 by their names"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, split, says):
    for file in files:
        write(tmp_path / file, [question(0)])
    with pytest.raises(RowError, match=f"^{tmp_path}: {says}"):
        open_source(SourceSection(path=str(tmp_path), split=split))


@pytest.mark.parametrize(
    "files, split, expected",
    [
        (["b.parquet", "a.parquet"], "train", ["1", "0"]),
        (["part-00001-of-00002.parquet", "part-00000-of-00002.parquet"], "train", ["1", "0"]),
        (["train.parquet", "test.parquet"], "test", ["1"]),
        (["train-00000-of-00001-0a1b2c.parquet", "_skipped.parquet"], "train", ["0"]),
    ],
)
def test_folders_that_are_read(tmp_path, files, split, expected):
    for i, file in enumerate(files):
        write(tmp_path / file, [question(i)])
    source = open_source(SourceSection(path=str(tmp_path), split=split))
    assert [example.answer for example in examples(source)] == expected


def test_a_split_of_one_file(tmp_path):
    path = write(tmp_path / "test-00000-of-00001.parquet", [question(0)])
    for split in ("train", "test"):
        assert len(open_source(SourceSection(path=str(path), split=split))) == 1
    with pytest.raises(RowError, match="test-00000-of-00001.parquet: one file; expected a folder with the split 'dev'"):
        open_source(SourceSection(path=str(path), split="dev"))


# Faults.


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


@pytest.mark.parametrize(
    "row, says",
    [
        ({"text": "a", "label": 1}, "has the columns text, label; expected problem and solution .RL., or messages or"),
        (without(question(0), "answer"), "no column solution or answer; found images, problem, key_steps"),
        (without(question(0), "images"), "no column images, image, image_path, videos, video; expected one of them"),
        ({"messages": "[]"}, "column messages is string; expected a list of {role, content}"),
        ({"messages": [{"role": "user"}]}, "column messages is list<.*>; expected a list of {role, content}"),
    ],
)
def test_a_file_without_the_columns_of_rows_is_refused(tmp_path, row, says):
    path = write(tmp_path / "a.parquet", [row])
    with pytest.raises(RowError, match=f"^{path}: {says}") as caught:
        ParquetSource(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [question(i) for i in range(4)])
    empty = write(tmp_path / "empty.parquet", [], schema=pq.read_schema(path))
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-9])
    (tmp_path / "text.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "magic.bin").write_bytes(path.read_bytes()[:4])
    for file, says in (
        ("cut.parquet", "not a parquet file"),
        ("text.parquet", "not a parquet file"),
        ("magic.bin", "not a parquet file"),
        ("none.parquet", "no such file"),
        ("empty.parquet", "empty; expected at least one row"),
    ):
        with pytest.raises(RowError, match=f"^{tmp_path / file}: {says}") as caught:
            open_source(SourceSection(path=str(tmp_path / file)))
        assert "\n" not in str(caught.value)
    assert empty.exists()
    monkeypatch.setattr(parquet_files, "MAX_GROUP", 100)
    with pytest.raises(RowError, match=r"a.parquet: row group \d has 0 MB, which are read at once; expected at most 0"):
        ParquetSource(path)


def test_large_row_groups_are_mentioned(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [question(i) for i in range(4)])
    assert ParquetSource(path).notes == []
    monkeypatch.setattr(parquet_source, "KEPT", 100)
    assert ParquetSource(path).notes == [
        f"{path}: row groups of 0 MB, each read for every row of it; faster with row groups of 100 rows"
    ]


def test_columns_that_nobody_reads_are_named(tmp_path):
    rows = [question(0, key_step="x", id=1, nothing=None)]
    path = write(tmp_path / "a.parquet", rows)
    assert ParquetSource(path).notes == [f"{path}: keys that are not read: key_step (did you mean 'key_steps'?), id"]
    said = [turn | {"loss": 1.0} for turn in turns("a", "b")]
    path = write(tmp_path / "a.parquet", [{"messages": said, "conversations": said, "problems": "x"}])
    assert ParquetSource(path).notes == [
        f"{path}: keys that are not read: problems (did you mean 'problem'?), conversations, messages[].loss"
    ]


def test_a_damaged_row_group_spoils_its_own_rows(tmp_path):
    path = write(tmp_path / "a.parquet", [question(i) for i in range(6)])
    chunk = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    source = ParquetSource(path)
    found = [row for _, row in read_rows(source, lambda example: example.answer, seed=None)]
    assert [row[1] for row in found if not isinstance(row, RowError)] == ["0", "1", "4", "5"]
    errors = [row for row in found if isinstance(row, RowError)]
    assert len(errors) == 2 and all(str(error).startswith(f"{path}, row group 1: cannot be read") for error in errors)


@pytest.mark.parametrize("read", [False, True])
def test_a_file_that_changes_is_an_error(tmp_path, read):
    path = write(tmp_path / "a.parquet", [question(i) for i in range(4)])
    source = ParquetSource(path)
    if read:
        assert source[0].answer == "0"
    write(path, [question(i) for i in range(5)])
    with pytest.raises(OSError, match="a.parquet: the file has changed since it was opened"):
        source[0]


def test_the_fingerprint_changes_with_the_rows(tmp_path):
    def fingerprint(*rows):
        return ParquetSource(write(tmp_path / "a.parquet", rows)).fingerprint

    one, two = question(1), question(2)
    assert fingerprint(one, two) == fingerprint(one, two)
    others = [(two, one), (one,), (one, two, two), (one, two | {"answer": "3"}), (one, two | {"images": [picture(3)]})]
    assert len({fingerprint(one, two), *(fingerprint(*rows) for rows in others)}) == 6


# Loading and resuming.


def digest(example):
    return hashlib.sha256(repr(example).encode() + b"".join(example.image_bytes)).hexdigest()


def write_shards(folder):
    """23 rows in two files, of which two cannot be used."""
    rows = [question(i) for i in range(23)]
    rows[4]["answer"], rows[17]["problem"] = "", "<image><image>?"
    write(folder / "train-00000-of-00002.parquet", rows[:9], group=3)
    write(folder / "train-00001-of-00002.parquet", rows[9:], group=4)
    return folder


def stream(folder, steps, position=None, workers=0):
    """(rows, digests, position) of so many batches."""
    with Loader(ParquetSource(folder), digest, count=4, seed=5, position=position, workers=workers) as rows:
        found = []
        for _ in range(steps):
            batch = rows.take()
            found.append(([example.row for example, _ in batch], [text for _, text in batch], rows.position))
        return found


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_after_any_step(tmp_path, workers):
    """Also with worker processes, to which the source travels."""
    folder = write_shards(tmp_path)
    whole = stream(folder, 12)
    assert whole[-1][2].rows > 46 and len(whole[-1][2].dropped) == 2
    for step in range(12) if workers == 0 else (5,):
        position = Position.from_json(whole[step - 1][2].to_json()) if step else None
        assert stream(folder, 12 - step, position, workers) == whole[step:]
    write(folder / "train-00001-of-00002.parquet", [question(i) for i in range(14)])
    with pytest.raises(RowError, match="has changed since this run began"):
        stream(folder, 1, whole[3][2])


def test_a_source_in_another_process(tmp_path, reads):
    source = ParquetSource(write_shards(tmp_path))
    first = source[0]
    again = pickle.loads(pickle.dumps(source))
    assert again[0] == first and len(again) == 23 and again.fingerprint == source.fingerprint
    assert len(reads) == 2  # what is kept does not travel
    assert len(pickle.dumps(source)) < 10_000


KILLED = """
import sys
sys.path[:0] = {paths!r}
import json, os, pathlib, signal
from test_parquet import Loader, ParquetSource, Position, digest

log = pathlib.Path({log!r})
done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
position = Position.from_json(done[-1][2]) if done else None
if __name__ == "__main__":
    with Loader(ParquetSource({folder!r}), digest, count=4, seed=5, position=position) as rows:
        for step in range(len(done), 12):
            batch = rows.take()
            line = [example.row for example, _ in batch], [text for _, text in batch], rows.position.to_json()
            with log.open("a") as file:
                file.write(json.dumps(line) + "\\n")
            if step == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_processes_go_on(tmp_path):
    folder, log, script = write_shards(tmp_path / "rows"), tmp_path / "log.jsonl", tmp_path / "main.py"
    here = Path(__file__).parent
    script.write_text(KILLED.format(paths=[str(here), str(here.parent)], log=str(log), folder=str(folder)))
    for last in (2, 7, -1):
        done = subprocess.run([sys.executable, script, str(last)], capture_output=True, text=True)
        assert done.returncode == (-signal.SIGKILL if last >= 0 else 0), done.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(rows, texts) for rows, texts, _ in lines] == [(rows, texts) for rows, texts, _ in stream(folder, 12)]
    assert os.path.isdir(folder)
