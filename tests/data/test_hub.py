"""Hub data sets by name: fetched once into the cache folder, then read as parquet. Faults are one line."""

from __future__ import annotations

import importlib.util
import io
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from r1vl_jax.config import SourceSection
from r1vl_jax.data.sources import check_source, open_source
from r1vl_jax.errors import RowError


def picture(i):
    file = io.BytesIO()
    Image.new("RGB", (28, 28), (i, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows(count):
    return [
        {"images": [{"bytes": picture(i), "path": None}], "problem": f"Q{i}", "answer": f"{i}"} for i in range(count)
    ]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "r1vl_jax" / "hub"


@pytest.fixture
def asked(monkeypatch):
    """The calls of a stand-in for the library `datasets`: data sets, and rows of tables that get images."""
    calls = []

    class Rows:
        def __init__(self, name):
            self.name = name

        def with_format(self, kind):
            assert kind == "arrow"
            return self

        def iter(self, batch_size):
            table = pa.Table.from_pylist(rows(250))
            yield from (table.slice(start, batch_size) for start in range(0, 250, batch_size))
            if self.name == "owner/cut":
                raise ConnectionError("the network\nis gone")

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "owner/none":
            raise ValueError("Bad split: train. Available splits: ['test']")
        return Rows(name)

    def embed(table):
        calls.append(table.num_rows)
        return table

    library = types.SimpleNamespace(load_dataset=load_dataset, table=types.SimpleNamespace(embed_table_storage=embed))
    monkeypatch.setitem(sys.modules, "datasets", library)
    return calls


def test_a_split_is_fetched_once(asked, cache):
    section = SourceSection(path="hub:owner/name", split="test")
    check_source(section)
    assert asked == [("owner/name", None, "test", True), 100, 100, 50]
    source = open_source(section)
    assert len(asked) == 4 and len(source) == 250
    assert (source[249].answer, source[249].image_bytes) == ("249", (picture(249),))
    assert source[3].name == "hub:owner/name/test, row 3" and section.name == "hub:owner/name"
    file = cache / "owner--name" / "default" / "test.parquet"
    assert [*cache.rglob("*.*")] == [file]
    assert [pq.read_metadata(file).row_group(i).num_rows for i in range(3)] == [100, 100, 50]
    open_source(SourceSection(path="hub:owner/name:more"))
    assert asked[4] == ("owner/name", "more", "train", True)
    assert (cache / "owner--name" / "more" / "train.parquet").is_file()


@pytest.mark.parametrize(
    "path, says",
    [
        ("hub:owner/none", "cannot be fetched from the Hub .ValueError: Bad split: train. Available splits: ..test"),
        ("hub:owner/cut", "cannot be fetched from the Hub .ConnectionError: the network is gone.$"),
        ("hub:name", "expected hub:OWNER/NAME or hub:OWNER/NAME:CONFIG, and a split's name"),
        ("hub:a/../b", "expected hub:OWNER/NAME"),
    ],
)
def test_what_cannot_be_fetched(asked, cache, path, says):
    with pytest.raises(RowError, match=f"^{path}, split 'train': {says}") as caught:
        open_source(SourceSection(path=path))
    assert "\n" not in str(caught.value) and not [*cache.rglob("*.*")]


def test_without_the_library(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RowError) as caught:
        open_source(SourceSection(path="hub:owner/name"))
    assert str(caught.value) == (
        "hub:owner/name: a Hub data set needs the package datasets (pip install datasets); or download its parquet "
        "files and give their folder"
    )


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="needs the extra hub")
@pytest.mark.parametrize("layout", ["parquet", "files"])
def test_with_the_library(tmp_path, monkeypatch, layout):
    """It takes a folder for a data set of that name. Images are in parquet files, or files of their own."""
    folder = tmp_path / "owner" / "name" / ("data" if layout == "parquet" else "train")
    folder.mkdir(parents=True)
    if layout == "parquet":
        pq.write_table(pa.Table.from_pylist(rows(3)), folder / "train-00000-of-00001.parquet")
    else:
        for i in range(3):
            (folder / f"{i}.png").write_bytes(picture(i))
        lines = [f'{{"file_name": "{i}.png", "problem": "Q{i}", "answer": "{i}"}}\n' for i in range(3)]
        (folder / "metadata.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    source = open_source(SourceSection(path="hub:owner/name"))
    assert [source[i].image_bytes for i in range(3)] == [(picture(i),) for i in range(3)]
    assert [source[i].question for i in range(3)] == [f"<image>Q{i}" for i in range(3)]
