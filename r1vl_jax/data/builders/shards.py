"""Plans and writes the shards of a data set.

A shard is written as WORK/shard.tmp and then renamed. It is complete when WORK/shards/ has its note (work_folder.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer, naming
from tqdm import tqdm

from r1vl_jax.common.files import atomic_write
from r1vl_jax.data.builders.record import features, to_record
from r1vl_jax.data.builders.work_folder import read_note
from r1vl_jax.data.sources import JsonSource
from r1vl_jax.errors import RowError

ROWS_PER_SHARD = 1000
MAX_REPORTED = 20
LEFT_OUT = "left_out.txt"
FORMAT = "array_record"
WRITER_OPTIONS = "group_size:1"  # as TFDS does: each record can be read alone


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a split. It is for the examples with the indices `start` to `stop` - 1 of the split's source."""

    split: str
    index: int
    start: int
    stop: int
    path: Path


@dataclasses.dataclass(frozen=True)
class Content:
    """The contents of a complete shard.

    Attributes:
      rows: number of records.
      record_bytes, file_bytes: bytes of all records together, and of the file.
      left_out: indices of the source's examples that could not be stored.
    """

    rows: int
    record_bytes: int
    file_bytes: int
    left_out: tuple[int, ...]


def plan_shards(data: Path, name: str, sources: Mapping[str, JsonSource], rows: int) -> list[Shard]:
    """Returns the shards of all splits, for `rows` examples each.

    A shard whose examples are partly left out stays smaller; the examples of later shards do not change.
    """
    shards = []
    for split, source in sources.items():
        files = naming.ShardedFileTemplate(
            data_dir=data,  # pyright: ignore[reportArgumentType] (annotated with the path class of etils; any works)
            dataset_name=name,
            split=split,
            filetype_suffix=FORMAT,
        )
        starts = range(0, len(source), rows)
        for index, start in enumerate(starts):
            path = Path(files.sharded_filepath(shard_index=index, num_shards=len(starts)))
            shards.append(Shard(split, index, start, min(start + rows, len(source)), path))
    return shards


class Problems:
    """Writes the errors of rows that are left out to a file, and the first MAX_REPORTED of them to standard error.

    Attributes:
      count: number of rows left out so far.
      first: error of the first such row; None if there is none.
    """

    def __init__(self, file: TextIO) -> None:
        self.count = 0
        self.first: RowError | None = None
        self._file = file

    def add(self, error: RowError | None) -> None:
        """Writes an error; does nothing if `error` is None."""
        if error is None:
            return
        self.count += 1
        self.first = self.first or error
        self._file.write(f"{error}\n".encode("utf-8", "replace").decode())
        if self.count <= MAX_REPORTED:
            tqdm.write(f"left out: {error}", file=sys.stderr)
        elif self.count == MAX_REPORTED + 1:
            tqdm.write(f"left out: more, all of them named in {LEFT_OUT}", file=sys.stderr)


def write_shards(
    work: Path, shards: list[Shard], sources: Mapping[str, JsonSource], roots: Mapping[str, str], problems: Problems
) -> dict[Shard, Content]:
    """Writes the shards that are not complete yet. Returns the contents of each shard.

    Args:
      roots: for each split, the folder to which image names are relative; see `to_record`.
    """
    for source in sources.values():
        for note in source.notes:
            tqdm.write(note, file=sys.stderr)
        for error in source.errors:
            problems.add(error)
    total = sum(map(len, sources.values()))
    contents = {}
    with tqdm(total=total, desc="building", unit=" rows", file=sys.stderr) as bar:
        for shard in shards:
            source, root = sources[shard.split], roots[shard.split]
            content = _complete(work, shard, source, root)
            if content is None:
                content = _write_shard(work, shard, source, root, problems, bar)
            else:
                for index in content.left_out:
                    problems.add(_problem(source, index, root))
                bar.initial += shard.stop - shard.start  # tqdm leaves `initial` out of the speed
                bar.update(shard.stop - shard.start)
            contents[shard] = content
    return contents


def _note(work: Path, shard: Shard) -> Path:
    """Returns the path of a shard's note."""
    return work / "shards" / f"{shard.split}-{shard.index:05d}.json"


def _complete(work: Path, shard: Shard, source: JsonSource, root: str) -> Content | None:
    """Returns the contents of a shard if it is complete; None if it must be written.

    A shard must be written if it is missing or broken, or if an example that it leaves out can be read now.
    """
    note = read_note(_note(work, shard))
    if not note or not shard.path.is_file() or shard.path.stat().st_size != note["file_bytes"]:
        return None
    content = Content(note["rows"], note["record_bytes"], note["file_bytes"], tuple(note["left_out"]))
    return content if all(_problem(source, index, root) for index in content.left_out) else None


def _problem(source: JsonSource, index: int, root: str) -> RowError | None:
    """Returns the error that prevents an example from being stored; None if it can be stored."""
    try:
        to_record(source[index], root)
    except RowError as error:
        return error
    return None


def _write_shard(work: Path, shard: Shard, source: JsonSource, root: str, problems: Problems, bar: tqdm) -> Content:
    """Writes a shard to a temporary file, renames the file, and then writes the shard's note."""
    fields = features()
    # TFDS's annotation allows any structure; the structure of a FeaturesDict is a dictionary.
    serializer = example_serializer.ExampleSerializer(cast(dict[str, Any], fields.get_serialized_info()))
    temporary = work / "shard.tmp"
    rows, size, left_out = 0, 0, []
    with _array_record(temporary) as writer:
        for index in range(shard.start, shard.stop):
            try:
                record = to_record(source[index], root)
            except RowError as error:
                problems.add(error)
                left_out.append(index)
            else:
                example = serializer.get_tf_example(fields.encode_example(record))
                data = example.SerializeToString(deterministic=True)
                writer.write(data)
                rows, size = rows + 1, size + len(data)
            bar.update()
    content = Content(rows, size, temporary.stat().st_size, tuple(left_out))
    note = _note(work, shard)
    note.unlink(missing_ok=True)  # the old note describes the file that is now replaced
    os.replace(temporary, shard.path)
    with atomic_write(note) as file:
        json.dump(dataclasses.asdict(content), file)
    return content


@contextlib.contextmanager
def _array_record(path: Path) -> Iterator[ArrayRecordWriter]:
    """Yields a writer of ArrayRecord. Turns its RuntimeErrors into OSErrors."""
    try:
        writer = ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS)
        yield writer
        writer.close()
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
