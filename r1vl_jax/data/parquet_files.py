"""Finds the parquet files of a data set, and reads what is known of them without reading a row: columns and row groups.

train.parquet                                          one file
data/train-00000-of-00002.parquet, data/test-...       a folder with the shards of splits, as on the Hub
rows/0.parquet, rows/1.parquet                         a folder of shards without names of splits
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r1vl_jax.common.text import first_few, one_line
from r1vl_jax.data.row_media import AUDIO, MEDIA
from r1vl_jax.data.rows import ANSWERS, COMMON_FIELDS, PROBLEM, TURNS
from r1vl_jax.errors import RowError

SHARD = re.compile(r"(\w+)-(\d{5})-of-(\d{5})(-\w+)?")  # the Hub's name of a shard
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # a file of this name has the whole split
MAX_GROUP = 2 << 30  # bytes of a row group, which is read as a whole

Stamp = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ParquetInfo:
    """What is known of a parquet file before its rows are read.

    Attributes:
      path: absolute path of the file.
      stamp: size and time of change. If one of them differs later, the file has changed.
      columns: the columns that are read.
      unread: the columns, and the fields of turns, that are not read.
      role: path of the column with the roles of a conversation's turns; None if the rows are questions.
      group_rows: number of rows of each row group.
      group_bytes: bytes of the columns of each row group that are read, uncompressed.
      digest: hash of the file's size and footer, which has the sizes of all columns and their least and largest texts.
    """

    path: str
    stamp: Stamp
    columns: tuple[str, ...]
    unread: tuple[str, ...]
    role: str | None
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]
    digest: bytes


def find_files(path: str | os.PathLike, split: str) -> list[str]:
    """Returns the absolute paths of a data set's files: the file `path`, or the sorted files of a folder's split.

    Raises: RowError if there is none, or if shards are missing.
    """
    path = Path(path)
    if path.is_file():
        names = {_split_of(path.name), "train"}
        if split not in names:
            raise RowError(f"{path}: one file; expected a folder with the split {split!r}, or the split train")
        return [os.path.abspath(path)]
    if not path.is_dir():
        raise RowError(f"{path}: no such file or folder; expected JSON, a parquet file or a folder of parquet files")
    files = sorted(file.name for file in path.glob("*.parquet") if not file.name.startswith((".", "_")))
    if not files:
        inner = sorted({file.parent.name for file in path.glob("*/*.parquet")})
        hint = f"; there are some in {first_few(inner)}" if inner else ""
        raise RowError(f"{path}: a folder without .parquet files; expected JSON or a folder of parquet files{hint}")
    splits = list(dict.fromkeys(map(_split_of, files)))
    if "" in splits and len(splits) > 1:
        others = [file for file in files if not _split_of(file)]
        raise RowError(f"{path}: has files of splits, and {first_few(others)}; expected one or the other")
    if split in splits:
        files = [file for file in files if _split_of(file) == split]
    elif split != "train" or len(splits) > 1 or splits[0] in SPLITS:
        there = f"there are {first_few(splits)}" if splits[0] else "its files have no names of splits"
        raise RowError(f"{path}: no split {split!r}; {there}")
    _check_complete(path, files)
    return [os.path.abspath(path / file) for file in files]


def _split_of(file: str) -> str:
    """Returns the split that the name of a file tells; "" if it tells none."""
    stem = file.removesuffix(".parquet")
    if match := SHARD.fullmatch(stem):
        return match[1]
    return stem if stem in SPLITS else ""


def _check_complete(folder: Path, files: list[str]) -> None:
    """Raises RowError if the names of shards say that there are more of them."""
    matches = [match for file in files if (match := SHARD.fullmatch(file.removesuffix(".parquet")))]
    counts = {int(match[3]) for match in matches}
    if counts and counts != {len(files)}:
        expected = " and ".join(map(str, sorted(counts)))
        raise RowError(f"{folder}: {len(files)} shards {matches[0][1]}-*.parquet; expected {expected} by their names")


def stamp(path: str) -> Stamp:
    """Returns a file's size and time of change."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=64)
def footer(path: str, stamp: Stamp) -> pq.FileMetaData:
    """Returns a file's parsed footer. `stamp`: a changed file has another one, so that its footer is read again.

    Raises: RowError if the file is not a parquet file.
    """
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise RowError(f"{path}: not a parquet file ({one_line(error)})") from error


def read_info(path: str) -> ParquetInfo:
    """Reads a file's footer. Raises RowError if the file is not parquet, or has not the columns of rows."""
    now = stamp(path)
    metadata = footer(path, now)
    schema = metadata.schema.to_arrow_schema()
    if PROBLEM in schema.names:
        fields = (PROBLEM, *ANSWERS, "key_steps")
    else:
        fields = tuple(name for name in TURNS if name in schema.names)[:1]
    columns = tuple(name for name in schema.names if name in (*fields, *COMMON_FIELDS))
    unread = [name for name in schema.names if name not in columns and not pa.types.is_null(schema.field(name).type)]
    role = None
    if PROBLEM in columns:
        _check_questions(path, columns)
    else:
        role, others = _role(path, fields, metadata)
        unread += others
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    paths = [metadata.schema.column(i).path.partition(".")[0] for i in range(metadata.num_columns)]
    read = [i for i, column in enumerate(paths) if column in columns]
    sizes = tuple(sum(group.column(i).total_uncompressed_size for i in read) for group in groups)
    if sizes and max(sizes) > MAX_GROUP:
        raise RowError(
            f"{path}: row group {sizes.index(max(sizes))} has {max(sizes) >> 20:,} MB, which are read at once; "
            f"expected at most {MAX_GROUP >> 20:,}: write the file with row groups of 100 rows"
        )
    return ParquetInfo(
        path, now, columns, tuple(unread), role, tuple(group.num_rows for group in groups), sizes, _digest(path)
    )


def _check_questions(path: str, columns: tuple[str, ...]) -> None:
    """Raises RowError if a file of questions has no column of answers, or none of images or videos."""
    if not set(ANSWERS) & set(columns):
        raise RowError(f"{path}: no column {' or '.join(ANSWERS)}; found {first_few(columns, 10)}")
    kinds = [name for kind, names in MEDIA.items() if kind != AUDIO for name in names]
    if not set(kinds) & set(columns):
        raise RowError(
            f"{path}: no column {', '.join(kinds)}; expected one of them, with nulls for text-only questions"
        )


def _role(path: str, names: tuple[str, ...], metadata: pq.FileMetaData) -> tuple[str, list[str]]:
    """Returns the path of the column with the roles of turns, and the names of fields of turns that are not read.

    Args:
      names: the name of the column of turns; empty if the file has none.
    """
    schema = metadata.schema.to_arrow_schema()
    if not names:
        raise RowError(
            f"{path}: has the columns {first_few(schema.names, 10)}; expected problem and solution (RL), or messages "
            "or conversations"
        )
    (name,), kind = names, schema.field(names[0]).type
    turn = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
    fields = [turn.field(i).name for i in range(turn.num_fields)] if turn and pa.types.is_struct(turn) else []
    forms = [form for form in (("role", "content"), ("from", "value")) if set(form) <= set(fields)]
    if len(forms) != 1:
        raise RowError(f"{path}: column {name} is {one_line(kind)}; expected a list of {{role, content}}")
    paths = (metadata.schema.column(i).path for i in range(metadata.num_columns))
    role = next(each for each in paths if re.fullmatch(rf"{name}\.[^.]+\.[^.]+\.{forms[0][0]}", each))
    return role, [f"{name}[].{field}" for field in fields if field not in forms[0]]


def _digest(path: str) -> bytes:
    """Returns a hash of a file's size and footer."""
    with open(path, "rb") as file:
        size = file.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.blake2b(size.to_bytes(8, "little") + file.read(length), digest_size=8).digest()
