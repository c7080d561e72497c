"""Builds a TFDS data set in ArrayRecord from a JSON file and the image files that the JSON file names.

Flow: JSON files -> JsonSource -> shards.py -> records in the order of the file, image files byte for byte -> metadata.
So training on the data set gets the same batches as training on the JSON file.

If a build is interrupted or killed, only the shard that was being written is lost. The same call then writes that shard
and the remaining ones (work_folder.py).
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.splits import SplitDict

from r1vl_jax.data.builders import BUILDERS, QuestionsBuilder
from r1vl_jax.data.builders.shards import (
    FORMAT,
    LEFT_OUT,
    ROWS_PER_SHARD,
    Content,
    Problems,
    Shard,
    plan_shards,
    write_shards,
)
from r1vl_jax.data.builders.work_folder import BuildError, check_final, check_settings, claimed, publish
from r1vl_jax.data.sources import JsonSource
from r1vl_jax.shapes.task import DEFAULTS, make_task


def build(
    name: str,
    out: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    drop_matching: tuple[str, ...] | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    overwrite: bool = False,
    allow_outside: bool = False,
    task: Mapping[str, int] | None = None,
) -> str:
    """Builds `out`/`name`/VERSION, or continues an unfinished build of it. Returns a one-line summary.

    Rows that cannot be used are listed on standard error and in the data set's left_out.txt.

    Args:
      name: a key of BUILDERS.
      source: a JSON file, or a folder with one. For shapes: a folder made by data.shapes, or None to make the task.
      image_root: folder to which image paths are relative; None: the folder of the JSON file.
      drop_matching: rows with one of these texts in an answer are left out; None: the builder's DROP_MATCHING.
      overwrite: whether to replace a complete data set, or an unfinished build with other settings.
      allow_outside: whether images may be outside of that folder.
      task: arguments of `make_task`; used for shapes without `source`.
    Raises: BuildError or RowError if the data set cannot be built; OSError if a file cannot be read or written.
    """
    start = time.monotonic()
    builder = BUILDERS[name]
    final = Path(out).expanduser().absolute() / name / str(builder.VERSION)
    check_final(final, overwrite)
    if source is None and name != "shapes":
        raise BuildError(f"{name}: no --source; expected the JSON file of your download, or its folder")
    texts = builder.DROP_MATCHING if drop_matching is None else tuple(text for text in drop_matching if text)
    root = None if image_root is None else os.path.abspath(image_root)
    files = {} if source is None else builder.files(source)
    settings: dict[str, Any] = {
        "files": [_stamp(path) for path in files.values()],
        "task": DEFAULTS | dict(task or {}) if source is None else {},
        "image_root": root,
        "drop_matching": list(texts),
        "rows_per_shard": rows_per_shard,
    } | ({"allow_outside": True} if allow_outside else {})
    with claimed(final) as work:
        check_settings(work, settings, overwrite)
        if source is None:
            files = _make_task(builder, work / "task", settings["task"])
        options: dict[str, Any] = {"image_root": root, "drop_matching": texts, "allow_outside": allow_outside}
        sources = {split: JsonSource(path, **options) for split, path in files.items()}
        roots = {split: root or os.path.abspath(path.parent) for split, path in files.items()}
        contents, left_out = _write_rows(work, name, sources, roots, rows_per_shard)
        _write_metadata(builder, final, work / "data", contents)
        publish(work, final)
    return _summary(builder, out, final, contents, left_out, sources, time.monotonic() - start)


def _stamp(path: Path) -> list[str | int]:
    """Returns a file's path, size and time of change. If one of them differs later, the file has changed."""
    status = path.stat()
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def _make_task(builder: type[QuestionsBuilder], folder: Path, parameters: dict[str, Any]) -> dict[str, Path]:
    """Makes the built-in task and returns the file of each split."""
    try:
        make_task(folder, **parameters)
    except ValueError as error:
        raise BuildError(f"the task cannot be made: {error}") from error
    return builder.files(folder)


def _write_rows(
    work: Path, name: str, sources: Mapping[str, JsonSource], roots: Mapping[str, str], rows_per_shard: int
) -> tuple[dict[Shard, Content], int]:
    """Writes the shards that are not complete yet. Returns the contents of all shards and the number of rows left out.

    Raises: BuildError if a split has no usable row. The notes that mark shards as complete are then removed.
    """
    left_out = work / "data" / LEFT_OUT
    with open(left_out, "w", encoding="utf-8") as file:
        problems = Problems(file)
        shards = plan_shards(work / "data", name, sources, rows_per_shard)
        contents = write_shards(work, shards, sources, roots, problems)
    rows = {split: sum(contents[shard].rows for shard in shards if shard.split == split) for split in sources}
    empty = [split for split, count in rows.items() if not count]
    if empty:
        shutil.rmtree(work / "shards")
        why = f"{problems.count} were left out, first: {problems.first}" if problems.first else "all were dropped"
        raise BuildError(f"no usable row for {', '.join(empty)}: {why}")
    if not problems.count:
        left_out.unlink()
    return contents, problems.count


def _write_metadata(
    builder: type[QuestionsBuilder], final: Path, data: Path, contents: Mapping[Shard, Content]
) -> None:
    """Writes TFDS's dataset_info.json and features.json into `data`."""
    splits = []
    for split in dict.fromkeys(shard.split for shard in contents):
        shards = [content for shard, content in contents.items() if shard.split == split]
        lengths, size = [content.rows for content in shards], sum(content.record_bytes for content in shards)
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    identity = DatasetIdentity(
        name=builder.name,
        version=tfds.core.Version(str(builder.VERSION)),
        data_dir=os.fspath(final),
        module_name=builder.__module__,
        release_notes=builder.RELEASE_NOTES,
    )
    info = builder.describe(identity)
    info.set_file_format(FORMAT)
    info.set_splits(SplitDict(splits))
    info.write_to_directory(data)


def _summary(
    builder: type[QuestionsBuilder],
    out: str | os.PathLike,
    final: Path,
    contents: Mapping[Shard, Content],
    left_out: int,
    sources: Mapping[str, JsonSource],
    seconds: float,
) -> str:
    rows, size = sum(each.rows for each in contents.values()), sum(each.file_bytes for each in contents.values())
    where = f" ({final / LEFT_OUT})" if left_out else ""
    dropped = sum(source.filtered for source in sources.values())
    return (
        f"{final}: {rows} rows in {len(contents)} shards, {size:,} bytes, {left_out} left out{where}, {dropped} "
        f"dropped by --drop-matching, {seconds:.1f} s; train with {_options(builder, out)}"
    )


def _options(builder: type[QuestionsBuilder], out: str | os.PathLike) -> str:
    """Returns the options of r1vl_jax.train that select the data set."""
    options = []
    for split, section in builder.SECTIONS.items():
        options += [f"--data.{section}.tfds", builder.name, f"--data.{section}.tfds_dir", os.fspath(out)]
        options += [f"--data.{section}.split", split] if split != "train" else []
    return shlex.join(options)
