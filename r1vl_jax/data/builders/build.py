"""Makes a TFDS data set in ArrayRecord from a JSON file and the image files that it names.

    python -m r1vl_jax.data.build mulberry_sft --source Mulberry-SFT/ --out ~/tensorflow_datasets
    python -m r1vl_jax.data.build r1vl_10k --source R1-VL-10K/r1vl_10k.json --image-root images/ --out DIR
    python -m r1vl_jax.data.build shapes --out DIR

Records keep the order of the file and images their bytes, so training from the data set sees what training from the
file would see. A build that is interrupted or killed loses one shard at most, and the same command goes on:

    DIR/NAME/VERSION.incomplete/settings.json   what the shards are made from; others are refused
                                shards/         which shards are complete: rows, bytes, examples left out
                                data/           the shards, then the metadata; becomes DIR/NAME/VERSION at the end
                                task/           shapes: the task
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import inspect
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from r1vl_jax.common.files import atomic_write
from r1vl_jax.data.builders import BUILDERS, QuestionsBuilder
from r1vl_jax.data.builders.shards import (
    FORMAT,
    LEFT_OUT,
    ROWS_PER_SHARD,
    Content,
    Problems,
    Shard,
    plan,
    read_note,
    write_shards,
)
from r1vl_jax.data.sources import JsonSource
from r1vl_jax.errors import RowError
from r1vl_jax.shapes import make_task

_TASK = {name: p.default for name, p in inspect.signature(make_task).parameters.items() if p.annotation == "int"}


class BuildError(ValueError):
    """The data set cannot be built. The message says what is in the way and what to do."""


def build(
    name: str,
    out: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    drop_matching: tuple[str, ...] | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    overwrite: bool = False,
    task: Mapping[str, int] | None = None,
) -> str:
    """Builds `out`/`name`/VERSION, or goes on with it, and returns a line that sums it up.

    Rows that cannot be used are named on standard error and in left_out.txt of the data set.

    Args:
      name: one of BUILDERS.
      source: a JSON file, or a folder with one; shapes: a folder that data.shapes made, or None to make the task.
      image_root: the folder that image paths start from; None: that of the file.
      drop_matching: rows with one of these texts in an answer are left out; None: the builder's own.
      overwrite: replace a data set that is complete, or an unfinished one made from something else.
      task: shapes: arguments of `make_task`.
    Raises: BuildError or RowError where the data set cannot be built; OSError where a file cannot be read or written.
    """
    start = time.monotonic()
    builder = BUILDERS[name]
    final = Path(out).expanduser().absolute() / name / str(builder.VERSION)
    _check_final(final, overwrite)
    if source is None and name != "shapes":
        raise BuildError(f"{name}: no --source; expected the JSON file of your download, or its folder")
    texts = builder.DROP_MATCHING if drop_matching is None else tuple(text for text in drop_matching if text)
    root = None if image_root is None else os.path.abspath(image_root)
    made = _TASK | dict(task or {}) if source is None else {}
    files = {} if made else builder.files(source)
    settings = {
        "files": [_stamp(path) for path in files.values()],
        "task": made,
        "image_root": root,
        "drop_matching": list(texts),
        "rows_per_shard": rows_per_shard,
    }
    with _claimed(final) as work:
        _check_settings(work, settings, overwrite)
        if made:
            _make_task(work / "task", made)
            files = builder.files(work / "task")
        sources = {split: JsonSource(path, image_root=root, drop_matching=texts) for split, path in files.items()}
        roots = {split: root or os.path.abspath(path.parent) for split, path in files.items()}
        shards = plan(work / "data", name, sources, rows_per_shard)
        with open(work / "data" / LEFT_OUT, "w", encoding="utf-8") as file:
            problems = Problems(file)
            contents = write_shards(work, shards, sources, roots, problems)
        _check_rows(work, {split: _rows(contents, split) for split in sources}, problems)
        _write_metadata(builder, final, work / "data", contents)
        if not problems.count:
            (work / "data" / LEFT_OUT).unlink()
        _publish(work, final)
    rows, size = (sum(getattr(content, field) for content in contents.values()) for field in ("rows", "file_bytes"))
    where = f" ({final / LEFT_OUT})" if problems.count else ""
    dropped = sum(source.filtered for source in sources.values())
    return (
        f"{final}: {rows} rows in {len(shards)} shards, {size:,} bytes, {problems.count} left out{where}, {dropped} "
        f"dropped by --drop-matching, {time.monotonic() - start:.1f} s; train with {_options(builder, out)}"
    )


def _check_final(final: Path, overwrite: bool) -> None:
    if final.exists() and not overwrite:
        raise BuildError(f"{final}: is there already and complete; --overwrite builds it anew")
    if final.exists() and not (final / "dataset_info.json").is_file():
        raise BuildError(f"{final}: is there and holds no data set, so it is not overwritten")


def _stamp(path: Path) -> list:
    status = path.stat()
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def _claimed(final: Path) -> Iterator[Path]:
    """The folder of unfinished work, for this process alone."""
    work = final.with_name(f"{final.name}.incomplete")
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        _lock(descriptor, work)
        try:
            yield work
        finally:
            if not _finished(work):  # nothing to go on with
                shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, work: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BuildError(f"{work}: another build is writing it") from error
    except OSError:
        pass  # a file system without locks


def _finished(work: Path) -> int:
    """How many shards are complete."""
    return len(list((work / "shards").glob("*.json")))


def _check_settings(work: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Leaves in `work` what the same settings made. Raises BuildError where complete shards are of other settings."""
    before = read_note(work / "settings.json")
    if before != settings:
        if (finished := _finished(work)) and not overwrite:
            key = next(key for key in before | settings if before.get(key) != settings.get(key))
            raise BuildError(
                f"{work}: holds {finished} shards of a build with other settings: {key} was {before.get(key)} and is "
                f"now {settings.get(key)}; --overwrite starts anew"
            )
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with atomic_write(work / "settings.json") as file:
            json.dump(settings, file, indent=1)
    for folder in ("shards", "data"):
        (work / folder).mkdir(exist_ok=True)


def _make_task(folder: Path, parameters: Mapping[str, int]) -> None:
    try:
        make_task(folder, **parameters)
    except ValueError as error:
        raise BuildError(f"the task cannot be made: {error}") from error


def _rows(contents: Mapping[Shard, Content], split: str) -> int:
    return sum(content.rows for shard, content in contents.items() if shard.split == split)


def _check_rows(work: Path, rows: Mapping[str, int], problems: Problems) -> None:
    """Raises BuildError where a split would be empty; nothing is then worth keeping."""
    empty = [split for split, count in rows.items() if not count]
    if empty:
        shutil.rmtree(work / "shards")
        why = f"{problems.count} were left out, first: {problems.first}" if problems.first else "all were dropped"
        raise BuildError(f"no usable row for {', '.join(empty)}: {why}")


def _write_metadata(
    builder: type[QuestionsBuilder], final: Path, data: Path, contents: Mapping[Shard, Content]
) -> None:
    """dataset_info.json and features.json, through TFDS."""
    splits = []
    for split in dict.fromkeys(shard.split for shard in contents):
        found = [content for shard, content in contents.items() if shard.split == split]
        lengths, size = [content.rows for content in found], sum(content.record_bytes for content in found)
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    identity = DatasetIdentity(
        name=builder.name,
        version=builder.VERSION,
        data_dir=os.fspath(final),
        module_name=builder.__module__,
        release_notes=builder.RELEASE_NOTES,
    )
    info = builder.describe(identity)
    info.set_file_format(FORMAT)
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(data)


def _publish(work: Path, final: Path) -> None:
    """The data set takes its place, and that of an older one."""
    replaced = final.with_name(f"{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    (work / "data").rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


def _options(builder: type[QuestionsBuilder], out: str | os.PathLike) -> str:
    """How a configuration names the data set."""
    options = []
    for split, section in builder.SECTIONS.items():
        options += [f"--data.{section}.tfds", builder.name, f"--data.{section}.tfds_dir", os.fspath(out)]
        options += [f"--data.{section}.split", split] if split != "train" else []
    return shlex.join(options)


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m r1vl_jax.data.build",
        description="\n\n".join(lines[:3]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=BUILDERS, help=", ".join(BUILDERS))
    parser.add_argument("--source", metavar="PATH", help="JSON array or JSONL, or the folder that holds one")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder of TFDS data sets")
    parser.add_argument(
        "--image-root", metavar="DIR", help="folder that image paths start from (default: the file's own folder)"
    )
    parser.add_argument(
        "--drop-matching",
        metavar="TEXT",
        action="append",
        help="leave out rows whose answer holds this text; may be given again; an empty text keeps all rows (default: "
        f"nothing, but for mulberry_sft {BUILDERS['mulberry_sft'].DROP_MATCHING[0]!r})",
    )
    parser.add_argument(
        "--rows-per-shard", type=int, default=ROWS_PER_SHARD, metavar="N", help=f"rows of a file ({ROWS_PER_SHARD})"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a complete data set, or an unfinished one made otherwise"
    )
    group = parser.add_argument_group("shapes without --source: the task to make")
    for name, default in _TASK.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"(default: {default})")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 2 with one line on standard error, or 130 on Ctrl-C."""
    args = _parser().parse_args(argv)
    task = {name: getattr(args, name) for name in _TASK if getattr(args, name) is not None}
    try:
        if args.rows_per_shard < 1:
            raise BuildError(f"--rows-per-shard is {args.rows_per_shard}; expected at least 1")
        if task and (args.name != "shapes" or args.source):
            raise BuildError(f"--{next(iter(task)).replace('_', '-')} is for shapes without --source")
        line = build(
            args.name,
            args.out,
            source=args.source,
            image_root=args.image_root,
            drop_matching=None if args.drop_matching is None else tuple(args.drop_matching),
            rows_per_shard=args.rows_per_shard,
            overwrite=args.overwrite,
            task=task,
        )
    except (BuildError, RowError, OSError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; complete shards are kept, and the same command goes on with the others", file=sys.stderr)
        return 130
    print(line)
    return 0
