"""TFDS data sets: what is stored is what the JSON file gives, builds survive anything, and errors say what to do."""

from __future__ import annotations

import fcntl
import functools
import io
import itertools
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from helpers.paths import GEOMETRY, ROOT
from PIL import Image

from r1vl_jax.config import SourceSection, load
from r1vl_jax.data.builders import BUILDERS, MulberrySft, R1vl10k, Shapes, command, shards
from r1vl_jax.data.sources import JsonSource, open_source
from r1vl_jax.data.tfds_source import TfdsSource
from r1vl_jax.errors import RowError
from r1vl_jax.shapes import make_task

REFLECTION = SourceSection().drop_matching[0]


def picture(kind, size=(28, 28)):
    file = io.BytesIO()
    Image.effect_noise(size, 90).save(file, kind)
    return file.getvalue()


PICTURES = {"a.png": picture("PNG"), "b.jpg": picture("JPEG", (200, 100)), "deep/c.webp": picture("WEBP")}
PICTURES["d.png"] = picture("PNG", (1, 1))


def message(role, content):
    return {"role": role, "content": content}


def warm_up_row(number, image="a.png"):
    return {"messages": [message("user", f"<image>Question {number}?"), message("assistant", "3")], "images": image}


def question_row(number, image="a.png"):
    return {"image_path": image, "problem": f"Question {number}?", "solution": "3", "key_steps": {"Steps": [["3"]]}}


WARM_UP = [
    warm_up_row(0),
    {"messages": [message("user", "No picture, é ∠ 角"), message("assistant", " x\n\0y ")]},
    {
        "messages": [
            message("system", "Be brief."),
            message("user", "<image> and <image>?"),
            message("assistant", "first"),
            message("user", "And <image>?"),
            message("assistant", "second"),
        ],
        "images": ["b.jpg", "a.png", "deep/c.webp"],
    },
    warm_up_row(3, "d.png"),
]
QUESTIONS = [
    question_row(0) | {"key_steps": {"Steps": [["AD is a median", "median is AD"], "equal", []]}},
    question_row(1, ["b.jpg", "a.png"]) | {"key_steps": None},
    question_row(2, "deep/c.webp") | {"key_steps": {"Steps": []}},
    question_row(3, None) | {"key_steps": ["half a pair: \ud800"]},
]


def write(folder, rows, name="rows.json"):
    for path, data in PICTURES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return folder / name


def run(*args):
    return command.main([str(arg) for arg in args])


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_equal(ours, theirs, root):
    """A TfdsSource gives what the JsonSource gives, and the bytes of the files."""
    assert len(ours) == len(theirs) > 0 and ours.errors == [] and ours.filtered == 0
    for index in range(len(theirs)):
        one, other = ours[index], theirs[index]
        for field in ("row", "question", "answer", "key_steps", "videos", "system", "history"):
            assert getattr(one, field) == getattr(other, field), (index, field)
        assert one.image_bytes == tuple(Path(path).read_bytes() for path in other.images)
        assert tuple(os.path.join(root, path) for path in one.images) == other.images
        assert not any(os.path.isabs(path) for path in one.images)
        assert one.source == ours.name


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows", "examples"), [("mulberry_sft", WARM_UP, 5), ("r1vl_10k", QUESTIONS, 4)])
def test_what_is_stored_is_what_the_file_gives(tmp_path, capsys, name, rows, examples):
    path, out = write(tmp_path / "in", rows), tmp_path / "out"
    assert run(name, "--source", path.parent, "--out", out, "--rows-per-shard", 2) == 0
    theirs = JsonSource(path)
    assert len(theirs) == examples and not theirs.errors
    section = SourceSection(tfds=name, tfds_dir=str(out))
    for ours in (TfdsSource(name, data_dir=out), TfdsSource(f"{name}:1.0.0", data_dir=out), open_source(section)):
        assert ours.name == str(out / name / "1.0.0" / "train")
        check_equal(ours, theirs, path.parent)
    with pytest.raises(IndexError):
        ours[examples]
    printed = capsys.readouterr()
    kind = "sft" if name == "mulberry_sft" else "rl"
    shards = (examples + 1) // 2
    size = sum(path.stat().st_size for path in (out / name / "1.0.0").glob("*array_record*"))
    assert f"{out / name / '1.0.0'}: {examples} rows in {shards} shards, {size:,} bytes, 0 left out" in printed.out
    assert printed.out.endswith(f"train with --data.{kind}.tfds {name} --data.{kind}.tfds_dir {out}\n")
    assert f"{examples}/{examples}" in printed.err  # the progress bar, and nothing else
    assert "left out" not in printed.err


@pytest.mark.skipif(not GEOMETRY.is_dir(), reason="needs shared/real/geometry3k beside the checkout")
@pytest.mark.parametrize(("name", "file"), [("mulberry_sft", "sft.json"), ("r1vl_10k", "rl.json")])
def test_real_rows(tmp_path, name, file):
    assert run(name, "--source", GEOMETRY / file, "--out", tmp_path, "--rows-per-shard", 4) == 0
    ours = TfdsSource(name, data_dir=tmp_path)
    check_equal(ours, JsonSource(GEOMETRY / file), GEOMETRY)
    assert len(ours) == 10 and all(
        example.image_bytes[0].startswith(b"\x89PNG") for example in map(ours.__getitem__, range(10))
    )


def test_shapes(tmp_path):
    task, rows = tmp_path / "task", {"sft_rows": 25, "rl_rows": 12, "heldout_rows": 5}
    make_task(task, seed=3, **rows, progress=False)
    options = [f"--{name.replace('_', '-')}={count}" for name, count in rows.items()]
    for out, more in (("given", ["--source", task]), ("made", ["--seed", 3, *options])):
        assert run("shapes", "--out", tmp_path / out, "--rows-per-shard", 10, *more) == 0
        for split in ("sft", "rl", "heldout"):
            ours = TfdsSource("shapes", data_dir=tmp_path / out, split=split)
            assert len(ours) == rows[f"{split}_rows"]
            check_equal(ours, JsonSource(task / f"{split}.json"), task)
    given, made = (files_of(tmp_path / out / "shapes" / "1.0.0") for out in ("given", "made"))
    assert given == made and "shapes-sft.array_record-00002-of-00003" in made
    assert len(TfdsSource("shapes", data_dir=tmp_path / "made", split="sft[:10]")) == 10


def test_the_options_that_are_printed_are_those_of_a_configuration(tmp_path, capsys):
    out = tmp_path / "a folder"
    assert run("shapes", "--out", out, "--sft-rows", 3, "--rl-rows", 3, "--heldout-rows", 3) == 0
    options = shlex.split(capsys.readouterr().out.partition("train with ")[2])
    (tmp_path / "c.yaml").write_text("model: {path: x}\n")
    data = load(tmp_path / "c.yaml", options).data
    for section, split in ((data.sft, "sft"), (data.rl, "rl"), (data.heldout, "heldout")):
        assert open_source(section).name == str(out / "shapes" / "1.0.0" / split)


def test_images_elsewhere(tmp_path):
    """Paths start from --image-root, and an image outside of it keeps its whole path."""
    elsewhere = write(tmp_path / "pictures", []).parent
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([question_row(0, "a.png"), question_row(1, "../other.png")]))
    (tmp_path / "other.png").write_bytes(PICTURES["d.png"])
    options = ["--image-root", elsewhere, "--allow-outside"]
    assert run("r1vl_10k", "--source", path, *options, "--out", tmp_path / "out") == 0
    ours = TfdsSource("r1vl_10k", data_dir=tmp_path / "out")
    assert [ours[i].images for i in (0, 1)] == [("a.png",), (str(tmp_path / "other.png"),)]
    assert ours[1].image_bytes == (PICTURES["d.png"],)


def test_drop_matching(tmp_path, capsys):
    answers = ["plain", f"1. {REFLECTION} 2.", "has a word"]
    rows = [
        warm_up_row(n) | {"messages": [message("user", "?"), message("assistant", a)]} for n, a in enumerate(answers)
    ]
    path = write(tmp_path, rows)
    for out, options, kept in (
        ("default", [], [0, 2]),
        ("own", ["--drop-matching", "a word", "--drop-matching", "plain"], [1]),
        ("all", ["--drop-matching", ""], [0, 1, 2]),
    ):
        assert run("mulberry_sft", "--source", path, "--out", tmp_path / out, *options) == 0
        ours = TfdsSource("mulberry_sft", data_dir=tmp_path / out)
        assert [ours[i].row for i in range(len(ours))] == kept
        assert f"{3 - len(kept)} dropped by --drop-matching" in capsys.readouterr().out
    reading = TfdsSource("mulberry_sft", data_dir=tmp_path / "all", drop_matching=(REFLECTION,))
    assert (reading[0].row, reading[2].row) == (0, 2)
    with pytest.raises(RowError, match="train, row 1: left out by drop_matching .*build --drop-matching"):
        reading[1]


# --- interrupted builds -----------------------------------------------------------------------------------------------


def big_rows(folder, count):
    """Rows whose one image takes a while to compress."""
    path = write(folder, [warm_up_row(n, "big.png") for n in range(count)])
    (folder / "big.png").write_bytes(picture("PNG", (400, 400)))
    return path


DRIVER = """
import os, signal, sys
from r1vl_jax.data.builders import command
from r1vl_jax.data.builders import shards

last, how, real = int(sys.argv[1]), int(sys.argv[2]), shards.to_record
rows = 0

def counted(*arguments):
    global rows
    rows += 1
    if rows == last:
        os.kill(os.getpid(), how)
    return real(*arguments)

signal.signal(signal.SIGINT, signal.default_int_handler)
shards.to_record = counted
sys.exit(command.main(sys.argv[3:]))
"""


def test_a_killed_build_goes_on(tmp_path):
    """SIGKILL and Ctrl-C at random rows of real processes: no complete shard is made again, and the result is that of a
    build left alone."""
    path = big_rows(tmp_path / "in", 400)
    options = ["--source", str(path), "--rows-per-shard", "20"]
    assert run("mulberry_sft", *options, "--out", tmp_path / "alone") == 0
    alone = files_of(tmp_path / "alone" / "mulberry_sft" / "1.0.0")
    final = tmp_path / "out" / "mulberry_sft" / "1.0.0"
    work = final.with_name("1.0.0.incomplete")
    arguments = ["mulberry_sft", *options, "--out", str(tmp_path / "out")]
    draw, inodes = random.Random(), {}

    def complete():
        notes = {path.stem for path in (work / "shards").glob("*.json")}
        paths = (work / "data").glob("*array_record*")
        return {path.name: path.stat().st_ino for path in paths if f"train-{path.name[-14:-9]}" in notes}

    def build_until(row, how):
        command = [sys.executable, "-c", DRIVER, str(row), str(int(how)), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    for how, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGKILL, -9)):
        row, before = draw.randrange(1, 90), len(inodes)
        done = build_until(row, how)
        assert done.returncode == code, done.stderr
        assert how == signal.SIGKILL or ("the same command goes on" in done.stderr and "Traceback" not in done.stderr)
        if len(complete()) == 0:  # stopped in the first shard: a Ctrl-C leaves nothing
            continue
        assert inodes.items() <= complete().items()
        inodes = complete()
        assert len(inodes) == before + (row - 1) // 20  # what was being written is lost
        with pytest.raises(RowError, match="1.0.0.incomplete: this data set is not complete; .* goes on"):
            TfdsSource("mulberry_sft", data_dir=tmp_path / "out")
    done = build_until(0, signal.SIGKILL)
    assert done.returncode == 0, done.stderr
    assert files_of(final) == alone
    assert inodes.items() <= {path.name: path.stat().st_ino for path in final.iterdir()}.items()
    assert [path.name for path in final.parent.iterdir()] == ["1.0.0"]


def stop_at(monkeypatch, number, before):
    """Ctrl-C just before or after the given rename."""
    calls = itertools.count(1)

    def stopping(real, *args):
        call = next(calls)
        if call == number and before:
            raise KeyboardInterrupt
        real(*args)
        if call == number:
            raise KeyboardInterrupt

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, functools.partial(stopping, getattr(os, name)))


@pytest.mark.parametrize("before", [True, False])
def test_interrupted_at_every_rename(tmp_path, monkeypatch, before, capsys):
    """A build that replaces another: the old data set is there until the swap, and the same command ends well."""
    path = write(tmp_path / "in", WARM_UP)
    options = ["mulberry_sft", "--source", path, "--rows-per-shard", 2]
    assert run(*options, "--out", tmp_path / "alone") == 0
    alone = files_of(tmp_path / "alone" / "mulberry_sft" / "1.0.0")
    assert run("mulberry_sft", "--source", path, "--out", tmp_path / "old") == 0
    old = files_of(tmp_path / "old" / "mulberry_sft" / "1.0.0")
    for number in range(1, 100):
        out = shutil.copytree(tmp_path / "old", tmp_path / f"{number}")
        final = out / "mulberry_sft" / "1.0.0"
        with monkeypatch.context() as patch:
            stop_at(patch, number, before)
            code = run(*options, "--out", out, "--overwrite")
        if code == 0:
            break
        assert code == 130
        assert not final.exists() or files_of(final) in (old, alone)
        assert run(*options, "--out", out, "--overwrite") == 0
        assert files_of(final) == alone and [path.name for path in final.parent.iterdir()] == ["1.0.0"]
    assert (
        files_of(final) == alone and number == 2 * 3 + 3 + 1
    )  # notes and shards; settings, old one away, new one there


def half_built(tmp_path, monkeypatch, *options):
    path = write(tmp_path / "in", WARM_UP)
    arguments = ["mulberry_sft", "--source", path, "--out", tmp_path / "out", "--rows-per-shard", 2, *options]
    with monkeypatch.context() as patch:
        stop_at(patch, 4, before=True)
        assert run(*arguments) == 130
    return path, arguments


def test_other_settings_do_not_go_on(tmp_path, monkeypatch, capsys):
    path, arguments = half_built(tmp_path, monkeypatch)
    work = tmp_path / "out" / "mulberry_sft" / "1.0.0.incomplete"
    for more, key in (
        (["--rows-per-shard", 3], "rows_per_shard was 2 and is now 3"),
        (["--drop-matching", "x"], "drop_matching was "),
        (["--image-root", tmp_path], "image_root was None and is now "),
    ):
        capsys.readouterr()
        assert run(*arguments, *more) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(f"error: {re.escape(str(work))}: holds .* shards .*{key}.*--overwrite starts anew\n", said)
    path.write_text(json.dumps(WARM_UP[::-1][:2]))
    assert run(*arguments) == 2
    assert "files was" in capsys.readouterr().err
    assert run(*arguments, "--overwrite") == 0
    assert run("mulberry_sft", "--source", path, "--out", tmp_path / "fresh", "--rows-per-shard", 2) == 0
    made, fresh = (files_of(tmp_path / out / "mulberry_sft" / "1.0.0") for out in ("out", "fresh"))
    assert made == fresh


def test_a_shard_is_made_again_if_broken_or_what_it_lacked_is_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in", [warm_up_row(n, image) for n, image in enumerate(["none.png", "a.png"] * 3)])
    arguments = ["mulberry_sft", "--source", path, "--out", tmp_path / "out", "--rows-per-shard", 2]
    data = tmp_path / "out" / "mulberry_sft" / "1.0.0.incomplete" / "data"
    with monkeypatch.context() as patch:
        stop_at(patch, 6, before=True)
        assert run(*arguments) == 130
    first, second = sorted(data.glob("*array_record*"))[:2]
    first.write_bytes(b"")
    untouched = second.stat().st_ino
    with monkeypatch.context() as patch:  # as before: none.png is still not there
        stop_at(patch, 3, before=True)
        assert run(*arguments) == 130
    assert first.stat().st_size and second.stat().st_ino == untouched
    capsys.readouterr()
    (tmp_path / "in" / "none.png").write_bytes(PICTURES["a.png"])
    with monkeypatch.context() as patch:
        stop_at(patch, 2, before=True)
        assert run(*arguments) == 130
    assert run(*arguments) == 0
    assert "6 rows in 3 shards" in (printed := capsys.readouterr()).out and "left out:" not in printed.err
    check_equal(TfdsSource("mulberry_sft", data_dir=tmp_path / "out"), JsonSource(path), path.parent)
    assert not (tmp_path / "out" / "mulberry_sft" / "1.0.0" / "left_out.txt").exists()


def test_one_build_at_a_time(tmp_path, monkeypatch, capsys):
    _, arguments = half_built(tmp_path, monkeypatch)
    work = tmp_path / "out" / "mulberry_sft" / "1.0.0.incomplete"
    other = os.open(work, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert run(*arguments) == 2
    assert capsys.readouterr().err.endswith(f"error: {work}: another build is writing it\n")
    os.close(other)
    assert run(*arguments) == 0


# --- what is in the way -----------------------------------------------------------------------------------------------


def test_a_complete_data_set_stays(tmp_path, capsys):
    path = write(tmp_path / "in", WARM_UP)
    arguments = ["mulberry_sft", "--source", path, "--out", tmp_path / "out"]
    final = tmp_path / "out" / "mulberry_sft" / "1.0.0"
    assert run(*arguments) == 0
    before = files_of(final)
    path.write_text(json.dumps(WARM_UP[:1]))
    capsys.readouterr()
    assert run(*arguments) == 2
    assert capsys.readouterr().err == f"error: {final}: is there already and complete; --overwrite builds it anew\n"
    assert files_of(final) == before
    assert run(*arguments, "--overwrite") == 0
    assert len(TfdsSource("mulberry_sft", data_dir=tmp_path / "out")) == 1
    (final / "dataset_info.json").unlink()
    assert run(*arguments, "--overwrite") == 2
    assert "holds no data set, so it is not overwritten" in capsys.readouterr().err


def test_bad_rows_are_named_and_left_out(tmp_path, capsys):
    video = {"messages": [message("user", "<video>?"), message("assistant", "3")], "videos": "v.mp4"}
    many = [warm_up_row(n, "none.png") for n in range(shards.MAX_REPORTED)]
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in", [warm_up_row(0), {"x": 1}, video, warm_up_row(3, "."), warm_up_row(4), *many])
    assert run("mulberry_sft", "--source", path, "--out", tmp_path / "out") == 0
    ours = TfdsSource("mulberry_sft", data_dir=tmp_path / "out")
    assert [ours[i].row for i in range(len(ours))] == [0, 4]
    printed = capsys.readouterr()
    final = tmp_path / "out" / "mulberry_sft" / "1.0.0"
    assert f"2 rows in 1 shards, {131072:,} bytes, {len(many) + 3} left out ({final / 'left_out.txt'})" in printed.out
    named = (final / "left_out.txt").read_text().splitlines()
    assert len(named) == len(many) + 3
    for line, text in zip(
        named,
        (
            r"row 1: has the keys \['x'\]",
            "row 2: has videos, .*train from the JSON file",
            f"row 3, image {path.parent}: no such image file",
            f"row 5, image {path.parent}/none.png: no such image file",
        ),
        strict=False,
    ):
        assert re.search(text, line), line
        assert f"left out: {line}\n" in printed.err
    assert printed.err.count("left out: ") == shards.MAX_REPORTED + 1
    assert "left out: more, all of them named in left_out.txt" in printed.err and named[-1] not in printed.err


def test_only_image_files_of_the_folder_are_stored(tmp_path, monkeypatch, capsys):
    """A row may name any file of the machine. Nothing that could wait is opened for long."""
    private = tmp_path / "private.png"
    private.write_bytes(PICTURES["a.png"])
    folder = tmp_path / "in"
    write(folder, [])
    (folder / "link.png").symlink_to(private)
    (folder / "text.png").write_text("ssh-ed25519 ...")
    (folder / "cut.png").write_bytes(PICTURES["a.png"][:-30])
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "fifo.png")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)
        server.bind("socket.png")
    outside = [
        "/etc/passwd",
        str(private),
        "../private.png",
        "deep/../../private.png",
        "link.png",
        "file:///etc/passwd",
    ]
    unusable = ["text.png", "cut.png", "folder.png", "fifo.png", "socket.png"]
    paths = ["a.png", str(folder / "a.png"), *outside, *unusable, "/dev/zero"]
    path = write(folder, [question_row(n, image) for n, image in enumerate(paths)])
    assert run("r1vl_10k", "--source", path, "--out", tmp_path / "out") == 0
    stored = TfdsSource("r1vl_10k", data_dir=tmp_path / "out")
    assert [stored[i].row for i in range(len(stored))] == [0, 1]
    assert {stored[i].images for i in range(len(stored))} == {("a.png",)}
    lines = (tmp_path / "out" / "r1vl_10k" / "1.0.0" / "left_out.txt").read_text().splitlines()
    assert len(lines) == len(paths) - 2
    for line in lines[: len(outside)]:
        assert f"outside of {folder}" in line and "image_root names another" in line and "allow_outside" in line
    assert not any("outside" in line for line in lines[len(outside) : -1])
    capsys.readouterr()
    assert run("r1vl_10k", "--source", path, "--out", tmp_path / "all", "--allow-outside") == 0
    stored = TfdsSource("r1vl_10k", data_dir=tmp_path / "all")
    assert [stored[i].row for i in range(len(stored))] == [0, 1, 3, 4, 5, 6]  # and no file that is no image
    assert run("r1vl_10k", "--source", path, "--out", tmp_path / "root", "--image-root", tmp_path) == 0
    stored = TfdsSource("r1vl_10k", data_dir=tmp_path / "root")
    assert [stored[i].row for i in range(len(stored))] == [1, 3]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--rows-per-shard", "0"), ("--rl-rows", "-1"), ("--rl-rows", "1.5"), ("--sft-rows", str(10**12))]
    + [("--seed", "-1"), ("--seed", str(2**63))],
)
def test_numbers_out_of_range(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        run("shapes", "--out", tmp_path / "out", option, value)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"argument {option}: expected a whole number from " in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["r1vl_10k"], "r1vl_10k: no --source; expected the JSON file"),
        (["r1vl_10k", "--source", "none.json"], "none.json: no such file or folder"),
        (
            ["r1vl_10k", "--source", "two"],
            r"two: 2 JSON files; expected one .json or .jsonl file, found a.json, b.jsonl",
        ),
        (["r1vl_10k", "--source", "none"], "none: 0 JSON files; .*found notes.txt"),
        (["r1vl_10k", "--source", "empty"], "empty: 0 JSON files; .*found an empty folder"),
        (["r1vl_10k", "--source", "none/notes.txt"], "notes.txt, row 0: not JSON|notes.txt: not JSON"),
        (["r1vl_10k", "--source", "rows.json", "--image-root", "nowhere"], "no usable row for train: 1 were left out"),
        (["r1vl_10k", "--source", "rows.json", "--drop-matching", "3"], "no usable row for train: all were dropped"),
        (["r1vl_10k", "--source", "rows.json", "--sft-rows", "3"], "--sft-rows is for shapes without --source"),
        (["shapes", "--source", "two", "--seed", "3"], "--seed is for shapes without --source"),
        (["shapes", "--source", "two"], "two: no sft.json, rl.json, heldout.json; expected a folder made by"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, text):
    for name in ("two/a.json", "two/b.jsonl", "two/.c.json", "none/notes.txt", "empty/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no JSON")
    write(tmp_path, [question_row(0)])
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--out", "out") == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and re.search(text, lines[-1])
    assert not list(tmp_path.glob("out/*/*"))


def test_a_disk_that_is_full(tmp_path, monkeypatch, capsys):
    class Full:
        def __init__(self, *args):
            pass

        def write(self, data):
            raise RuntimeError("write() failed: No space left on device")

    path = write(tmp_path, WARM_UP)
    arguments = ["mulberry_sft", "--source", path, "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(shards, "ArrayRecordWriter", Full)
        assert run(*arguments) == 2
    assert re.search(r"error: .*shard.tmp: cannot be written \(.*No space left", capsys.readouterr().err)
    assert run(*arguments) == 0


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    path = write(folder / "in", WARM_UP)
    assert run("mulberry_sft", "--source", path, "--out", folder / "out", "--rows-per-shard", 2) == 0
    return folder / "out"


READER = """
import pickle, sys
source = pickle.load(sys.stdin.buffer)
examples = [source[i] for i in range(len(source))]
assert "tensorflow" not in sys.modules, "tensorflow was loaded"
sys.stdout.buffer.write(pickle.dumps((source.name, examples)))
"""
BUILDER = """
import sys
from r1vl_jax.data.builders.command import main
assert main(sys.argv[1:]) == 0
assert "tensorflow" not in sys.modules, "tensorflow was loaded"
"""


@pytest.mark.parametrize("read_before", [False, True])
def test_a_source_goes_to_another_process(made, read_before):
    source = TfdsSource("mulberry_sft", data_dir=made, drop_matching=("third",))
    if read_before:
        assert source[0].row == 0
    process = subprocess.run([sys.executable, "-c", READER], input=pickle.dumps(source), cwd=ROOT, capture_output=True)
    assert process.returncode == 0 and process.stderr == b"", process.stderr.decode()
    assert pickle.loads(process.stdout) == (source.name, [source[i] for i in range(len(source))])


def test_building_needs_no_tensorflow(tmp_path):
    path = write(tmp_path, WARM_UP)
    arguments = ["mulberry_sft", "--source", str(path), "--out", str(tmp_path / "out")]
    process = subprocess.run([sys.executable, "-c", BUILDER, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert all(line.startswith("building: ") for line in process.stderr.split("\n") if line), process.stderr


def test_threads_read_one_source(made):
    source = TfdsSource("mulberry_sft", data_dir=made)
    order = list(range(len(source))) * 40
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(source.__getitem__, order)) == [source[index] for index in order]


def break_(made, tmp_path, change):
    out = shutil.copytree(made, tmp_path / "out")
    change(out / "mulberry_sft" / "1.0.0")
    return out


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "arguments", "text"),
    [
        (None, {"name": "none"}, r"out: no TFDS data set none; found mulberry_sft:1.0.0. .*data.build"),
        (None, {"name": "mulberry_sft:2.0.0"}, r"no TFDS data set mulberry_sft:2.0.0; found mulberry_sft:1.0.0"),
        (None, {"name": "a/b"}, "'a/b': not the name of a TFDS data set; expected NAME or NAME:VERSION"),
        (None, {"split": "test"}, r"1.0.0: no split 'test'; there are train"),
        (lambda path: path.rename(path.with_name("1.0.0.incomplete")), {}, "1.0.0.incomplete: this data set is not"),
        (lambda path: min(path.glob("*array_record*")).unlink(), {}, "00000-of-00003: no such file, and 0 more"),
        (lambda path: (path / "features.json").unlink(), {}, "1.0.0: cannot be read as a TFDS data set"),
        (lambda path: (path / "dataset_info.json").write_text("{"), {}, "1.0.0: cannot be read as a TFDS data set"),
        (
            edit("features.json", '"history"', '"past"'),
            {},
            "1.0.0: no field history as .*build stores it; found .*past",
        ),
        (edit("features.json", "int64", "float32"), {}, "1.0.0: no field row as "),
        (
            edit("dataset_info.json", '"array_record"', '"tfrecord"'),
            {},
            "its files are tfrecord; expected array_record",
        ),
    ],
)
def test_a_data_set_that_cannot_be_read(made, tmp_path, change, arguments, text):
    out = break_(made, tmp_path, change or (lambda path: None))
    with pytest.raises(RowError, match=text):
        TfdsSource(**{"name": "mulberry_sft", "data_dir": out} | arguments)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(RowError, match="none: no TFDS data set mulberry_sft; found none"):
        TfdsSource("mulberry_sft", data_dir=tmp_path / "none")


def test_the_newest_version_and_the_default_folder(made, tmp_path, monkeypatch):
    for version in ("0.9.0", "1.10.0", "1.9.0"):
        folder = shutil.copytree(made / "mulberry_sft" / "1.0.0", tmp_path / "mulberry_sft" / version)
        edit("dataset_info.json", '"version": "1.0.0"', f'"version": "{version}"')(folder)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    assert TfdsSource("mulberry_sft").name == str(tmp_path / "mulberry_sft" / "1.10.0" / "train")
    assert TfdsSource("mulberry_sft:0.9.0").name == str(tmp_path / "mulberry_sft" / "0.9.0" / "train")


def test_a_broken_record_is_named_and_stops_no_other(tmp_path):
    (tmp_path / "in").mkdir()
    path = big_rows(tmp_path / "in", 3)
    assert run("mulberry_sft", "--source", path, "--out", tmp_path / "out") == 0
    (shard,) = (tmp_path / "out" / "mulberry_sft" / "1.0.0").glob("*array_record*")
    data = bytearray(shard.read_bytes())
    start = data.find((path.parent / "big.png").read_bytes()[1000:1100])
    data[start : start + 9] = b"123456789"
    shard.write_bytes(data)
    source = TfdsSource("mulberry_sft", data_dir=tmp_path / "out")
    with pytest.raises(RowError, match="1.0.0/train, record 0: cannot be read .*mismatch"):
        source[0]
    assert [source[1].row, source[2].row] == [1, 2]


# --- TFDS by itself ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def temporary_files(tmp_path, monkeypatch):
    """TFDS's builders leave an empty temporary folder behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("name", BUILDERS)
def test_tfds_builds_and_reads_the_same(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Shapes, "TASK", {"sft_rows": 8, "rl_rows": 5, "heldout_rows": 3, "progress": False})
    manual = tmp_path / "in"
    rows = WARM_UP if name == "mulberry_sft" else QUESTIONS
    reflective = {"messages": [message("user", "?"), message("assistant", REFLECTION)]}
    write(manual, [*rows, question_row(9, "none.png"), reflective])
    builder = BUILDERS[name](data_dir=tmp_path / "theirs")
    config = tfds.download.DownloadConfig(manual_dir=manual)
    builder.download_and_prepare(file_format="array_record", download_config=config)
    if name == "shapes":
        manual = tmp_path / "theirs" / "downloads" / "r1vl_jax_shapes"
    assert run(name, "--source", manual, "--out", tmp_path / "ours") == 0
    ours = tfds.builder(name, data_dir=tmp_path / "ours")
    again = tfds.builder_from_directory(tmp_path / "ours" / name / "1.0.0")
    assert list(builder.info.splits) == list(ours.info.splits) == list(again.info.splits)
    assert again.info.description == builder.info.description and again.info.citation == builder.info.citation
    for split in builder.info.splits:
        records = [list(one.as_data_source(split)) for one in (builder, ours, again)]
        assert records[0] == records[1] == records[2] and len(records[0]) == again.info.splits[split].num_examples > 0
        source = TfdsSource(name, data_dir=tmp_path / "theirs", split=split)
        assert [source[i].answer.encode() for i in range(len(source))] == [one["answer"] for one in records[0]]
    if name == "mulberry_sft":
        assert len(records[0]) == 5  # without the reflective row and the one with no picture


@pytest.mark.parametrize("builder", [R1vl10k, MulberrySft])
def test_tfds_asks_for_the_download(tmp_path, builder):
    config = tfds.download.DownloadConfig(manual_dir=tmp_path / "none")
    with pytest.raises(AssertionError, match="Put the published JSON file"):
        builder(data_dir=tmp_path).download_and_prepare(file_format="array_record", download_config=config)
    for name in "ab":
        write(tmp_path / "two", [], f"{name}.json")
    config = tfds.download.DownloadConfig(manual_dir=tmp_path / "two")
    with pytest.raises(RowError, match="two: 2 JSON files; expected one .json or .jsonl file, found a.json, b.json"):
        builder(data_dir=tmp_path).download_and_prepare(file_format="array_record", download_config=config)
