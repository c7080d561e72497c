"""Fetches a split of a Hugging Face Hub data set once, as a parquet file with the images inside, into the cache folder.

Flow: hub:OWNER/NAME -> the library `datasets`, streaming -> SPLIT.parquet -> ParquetSource. Later runs read the file
and need no network. To fetch the data set again, delete the file.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
from tqdm import tqdm

from r1vl_jax.common.files import cache_folder
from r1vl_jax.common.text import one_line
from r1vl_jax.errors import RowError

GROUP_ROWS = 100  # rows of a row group, as the Hub writes files with images


def fetch(path: str, split: str) -> Path:
    """Returns the parquet file of a split, and fetches it if it is not in the cache folder.

    Args:
      path: hub:OWNER/NAME, or hub:OWNER/NAME:CONFIG for one of the data set's configurations.
    Raises: RowError if the data set cannot be fetched.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", path.removeprefix("hub:"))
    if not match or not re.fullmatch(r"[\w.-]+", split):
        raise RowError(f"{path}, split {split!r}: expected hub:OWNER/NAME or hub:OWNER/NAME:CONFIG, and a split's name")
    name, config = match.groups()
    file = cache_folder() / "hub" / name.replace("/", "--") / (config or "default") / f"{split}.parquet"
    if not file.is_file():
        datasets = _library(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            _stream(datasets, name, config, split, temporary)
            os.replace(temporary, file)
        except Exception as error:  # the library passes on any error of its readers and of the network
            problem = one_line(f"{type(error).__name__}: {error}")
            raise RowError(f"{path}, split {split!r}: cannot be fetched from the Hub ({problem})") from error
        finally:
            temporary.unlink(missing_ok=True)
    return file


def _library(path: str) -> ModuleType:
    """Returns the library `datasets`. Raises RowError if it is not installed."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise RowError(
            f"{path}: a Hub data set needs the package datasets (pip install datasets); or download its parquet files "
            "and give their folder"
        ) from error


def _stream(datasets: ModuleType, name: str, config: str | None, split: str, file: Path) -> None:
    """Writes the rows of a split to a parquet file. Images that are files of their own are put into it."""
    rows = datasets.load_dataset(name, config, split=split, streaming=True).with_format("arrow")
    writer = None
    try:
        for table in tqdm(rows.iter(batch_size=GROUP_ROWS), desc=f"fetching {name}", unit=f" x {GROUP_ROWS} rows"):
            table = datasets.table.embed_table_storage(table)
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table, row_group_size=GROUP_ROWS)
        if writer is None:
            raise ValueError("it has no rows")
    finally:
        if writer is not None:
            writer.close()
