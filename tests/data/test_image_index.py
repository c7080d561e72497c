"""Images and videos that change: before a resume, and while a source is open. What is read for it, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil

import pytest
from helpers.waiting import wait_until

from r1vl_jax.config import SourceSection
from r1vl_jax.data import image_index
from r1vl_jax.data.loader import Loader, Position
from r1vl_jax.data.sources import JsonSource, open_source
from r1vl_jax.errors import RowError

QUESTION = {"problem": "Find x.", "solution": "3"}
MISSING = "4.png"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "r1vl_jax" / "images"


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read, in order."""
    names, digest = [], image_index.hashlib.file_digest

    def file_digest(file, name):
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{file.fileno()}")))
        return digest(file, name)

    monkeypatch.setattr(image_index.hashlib, "file_digest", file_digest)
    return names


@pytest.fixture
def path(tmp_path):
    """A file of five rows with an image each, of which the last is missing."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"image %d" % i)
    return write(folder, [QUESTION | {"image_path": f"{i}.png"} for i in range(5)])


def write(folder, rows, name="rows.json"):
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def open_rows(path, **options):
    return open_source(SourceSection(path=str(path), **options))


def put(file, data):
    """Writes a file, at a time that differs from that of its last change. Clocks of file systems tick slowly."""
    before = file.stat().st_ctime_ns if file.exists() else 0

    def written():
        file.write_bytes(data)
        return file.stat().st_ctime_ns != before

    wait_until(written)


def put_with_old_time(file, data):
    """As a program does that copies files with their times."""
    times = file.stat()
    put(file, data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)


def put_pipe(file):
    file.unlink()
    os.mkfifo(file)


FAULTS = {
    "other bytes": ("1.png", lambda file: put(file, b"IMAGE 1")),
    "other bytes, the same time of writing": ("1.png", lambda file: put_with_old_time(file, b"IMAGE 1")),
    "other size": ("1.png", lambda file: put(file, b"image 1, larger")),
    "removed": ("1.png", lambda file: file.unlink()),
    "a pipe": ("1.png", put_pipe),
    "a folder": ("1.png", lambda file: (file.unlink(), file.mkdir())),
    "not missing any more": (MISSING, lambda file: put(file, b"image 4")),
}
faults = pytest.mark.parametrize("name, change", FAULTS.values(), ids=FAULTS)


def row_number(example):
    return example.row


def begun(source):
    """The position of a run that has read some rows."""
    with Loader(source, row_number, count=3, seed=0) as rows:
        rows.take()
        return rows.position


def resume(source, position, **options):
    with Loader(source, row_number, count=3, seed=0, position=position, **options) as rows:
        return [example.row for example, _ in rows.take()]


@faults
def test_a_run_does_not_resume_on_other_images(path, name, change):
    position = begun(open_rows(path))
    assert resume(open_rows(path), position)
    change(path.parent / name)
    source = open_rows(path)
    assert source.notes == [f"{path}: images or videos that have changed since the last start: {name}"]
    with pytest.raises(RowError, match=r"rows.json: has changed since this run began \(images\); a run continues on"):
        resume(source, position)
    again = open_rows(path)
    assert again.notes == [] and again.fingerprint == source.fingerprint


WORKERS = pytest.param(*FAULTS["other bytes"], 1, id="worker processes")  # to which the source travels


@pytest.mark.parametrize("name, change, workers", [*(pytest.param(*FAULTS[k], 0, id=k) for k in FAULTS), WORKERS])
def test_a_run_ends_when_an_image_changes(path, name, change, workers):
    with Loader(open_rows(path), row_number, count=2, seed=0, workers=workers) as rows:
        rows.take()
        change(path.parent / name)
        with pytest.raises(OSError, match=rf"rows.json, row {name[0]}: .*{name}: the file .*; start again") as caught:
            for _ in range(100):
                rows.take()
    gone = "can no longer be read" if not (path.parent / name).is_file() else "has changed since it was indexed"
    assert f"the file {gone};" in str(caught.value)


def test_only_a_time_changes(path, read):
    """The file is read once more and nothing is said, before a resume and in an open source."""
    source = open_rows(path)
    position = Position(1, frozenset(), source.fingerprint)  # not of a loader, whose threads might read beside this
    read.clear()
    put(path.parent / "1.png", b"image 1")
    assert (source[1].row, source[1].row, read) == (1, 1, ["1.png"])
    again = open_rows(path)
    assert again.notes == [] and resume(again, position) and read == ["1.png"] * 2
    open_rows(path)
    assert len(read) == 2


def test_a_copy_of_the_data_set_resumes(path, tmp_path):
    """On another machine, say: the names of folders and all times differ."""
    position = begun(open_rows(path))
    shutil.copytree(path.parent, tmp_path / "copy")
    assert resume(open_rows(tmp_path / "copy" / path.name), position)


def test_a_run_of_an_earlier_version_resumes(path):
    """Its train state has the digest of the rows alone."""
    source = open_rows(path)
    position = dataclasses.replace(begun(source), fingerprint=JsonSource(path).fingerprint)
    assert source.fingerprint.startswith(f"{position.fingerprint}-") and resume(source, position)
    write(path.parent, [QUESTION | {"image_path": "0.png"}])
    with pytest.raises(RowError, match=r"has changed since this run began \(rows\)"):
        resume(open_rows(path), position)


def test_sizes_alone(path, cache, read):
    """No file is read, and nothing is kept between starts."""
    source = open_rows(path, image_digests=False)
    position = begun(source)
    put(path.parent / "1.png", b"IMAGE 1")
    assert source[1].row == 1 and resume(open_rows(path, image_digests=False), position)
    put(path.parent / "1.png", b"larger than before")
    with pytest.raises(OSError, match=r"row 1: .*1.png: the file has changed"):
        source[1]
    with pytest.raises(RowError, match=r"began \(images\)"):
        resume(open_rows(path, image_digests=False), position)
    assert not read and not cache.exists()
    with pytest.raises(RowError, match=r"began \(image_digests\)"):
        resume(open_rows(path), position)


def test_a_missing_image_stays_the_fault_of_its_row(path):
    assert open_rows(path)[4].images == (str(path.parent / MISSING),)


def test_rows_without_images_have_the_plain_fingerprint(tmp_path):
    path = write(tmp_path, [QUESTION | {"image_path": None}])
    source = open_rows(path)
    assert source.fingerprint == JsonSource(path).fingerprint and source[0].images == ()


def test_each_file_is_read_once(path, read, cache, monkeypatch):
    """Whatever number of rows it has, also of videos and their frames; not those of rows that are left out."""
    monkeypatch.setattr(image_index, "BATCH", 3)
    monkeypatch.setattr(image_index, "PART", 2)
    turns = [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}]
    (path.parent / "a.mp4").write_bytes(b"video")
    rows = [QUESTION | {"images": ["0.png", "./1.png", "0.png"]}, QUESTION | {"images": "a/../1.png"}]
    rows += [QUESTION | {"image_path": None, "videos": ["a.mp4", ["2.png", "1.png"]]}]
    rows += [{"messages": turns * 2, "images": ["1.png", "3.png"]}]
    (path.parent / "left_out.png").write_bytes(b"image")
    rows += [QUESTION | {"image_path": "left_out.png", "solution": SourceSection().drop_matching[0]}]
    rows += [QUESTION | {"image_path": "left_out.png", "solution": None}]
    source = open_rows(write(path.parent, rows))
    assert sorted(read) == ["0.png", "1.png", "2.png", "3.png", "a.mp4"] and len(source) == 5
    assert open_rows(path).fingerprint == source.fingerprint and len(read) == 5 and len([*cache.iterdir()]) == 1
    for name, row in (("0.png", 0), ("1.png", 1), ("2.png", 2), ("a.mp4", 2), ("3.png", 4)):
        other = pickle.loads(pickle.dumps(source))
        data = (path.parent / name).read_bytes()
        put(path.parent / name, b"?" * len(data))
        with pytest.raises(OSError, match=rf"{name}: the file has changed since it was indexed"):
            other[row]
        assert open_rows(path).notes == [f"{path}: images or videos that have changed since the last start: {name}"]
        put(path.parent / name, data)
        assert open_rows(path).fingerprint == source.fingerprint and other[row]


def test_many_changes_are_five_names_and_a_number(path):
    for i in range(20):
        (path.parent / f"{i}.png").write_bytes(b"image")
    write(path.parent, [QUESTION | {"image_path": f"{i}.png"} for i in range(20)])
    open_rows(path)
    for i in range(20):
        put(path.parent / f"{i}.png", b"other")
    (note,) = open_rows(path).notes
    assert note.endswith("since the last start: 0.png, 1.png, 2.png, 3.png, 4.png and 15 more")


def test_what_no_row_may_read_is_not_read(path, read, tmp_path):
    """Files outside of the folder, without allow_outside; and pipes and devices, which might never end."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    (path.parent / "link.png").symlink_to(tmp_path / "secret.png")
    (path.parent / "folder").symlink_to(tmp_path)
    (path.parent / "inner.png").symlink_to("0.png")
    os.mkfifo(path.parent / "pipe.png")
    (path.parent / "zero.png").symlink_to("/dev/zero")
    names = ["link.png", "folder/secret.png", "../secret.png", "pipe.png", "zero.png", "/dev/zero", "no/a.png", "."]
    rows = [QUESTION | {"image_path": name} for name in [*names, "inner.png", "x" * 300 + ".png"]]
    source = open_rows(write(path.parent, rows))
    assert read == ["0.png"] and source[8].row == 8 and source[3].row == 3
    put(tmp_path / "secret.png", b"public")
    with pytest.raises(RowError, match="row 2, images: .*outside of"):
        source[2]
    assert open_rows(path).notes == []
    everywhere = open_rows(path, allow_outside=True)
    assert sorted(read) == ["0.png"] + ["secret.png"] * 3 and everywhere[0].row == 0
    put(tmp_path / "secret.png", b"SECRET")
    with pytest.raises(OSError, match="row 0: .*link.png: the file has changed"):
        everywhere[0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "longer", "folder"])
def test_a_damaged_cache_is_made_again(path, cache, read, damage):
    fingerprint = open_rows(path).fingerprint
    (file,) = cache.iterdir()
    data = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        damaged = {
            "cut": data[:-40],
            "flipped": data[:-1] + bytes([data[-1] ^ 1]),
            "empty": b"",
            "longer": data + bytes(40),
        }
        file.write_bytes(damaged[damage])
    read.clear()
    source = open_rows(path)
    assert source.fingerprint == fingerprint and source.notes == [] and len(read) == 4
    open_rows(path)
    assert len(read) == (8 if damage == "folder" else 4)


def test_a_cache_that_cannot_be_written(path, tmp_path, monkeypatch, read):
    fingerprint = open_rows(path).fingerprint
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_rows(path).fingerprint == open_rows(path).fingerprint == fingerprint and len(read) == 12


def test_data_sets_do_not_share_a_cache(path, cache, read):
    """Nor do splits of one file, and other folders of images."""
    one = [QUESTION | {"image_path": "0.png"}]
    other = write(path.parent, {"train": one, "test": [QUESTION | {"image_path": "1.png"}]}, "other.json")
    shutil.copytree(path.parent, path.parent / "copy")
    options = ({"path": other}, {"path": other, "split": "test"}, {"path": path}, {"path": path, "image_root": "copy"})
    for both in options:
        if "image_root" in both:
            both["image_root"] = str(path.parent / "copy")
        open_rows(**both)
    assert len([*cache.iterdir()]) == 4 and len(read) == 1 + 1 + 4 + 4
    for both in options:
        assert open_rows(**both).notes == []
    assert len(read) == 10


def test_sources_that_do_not_watch_images(path, cache, read):
    """Those of data.check and of data.build."""
    for source in (open_source(SourceSection(path=str(path)), watch_images=False), JsonSource(path)):
        put(path.parent / "1.png", b"other")
        assert source[1].row == 1 and "-" not in source.fingerprint
    assert not read and not cache.exists()
