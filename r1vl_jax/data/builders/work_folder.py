"""Manages the folder of an unfinished build, which one process at a time writes and a later one can continue.

DIR/NAME/VERSION.incomplete/settings.json   settings of the build
                            shards/         one note per complete shard: rows, bytes, examples left out
                            data/           the shards, then the metadata; renamed to DIR/NAME/VERSION at the end
                            task/           the built-in task, for shapes without --source
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1vl_jax.common.files import atomic_write, read_object, replace_folder


class BuildError(ValueError):
    """The data set cannot be built. The message says why and what to do."""


def check_final(final: Path, overwrite: bool) -> None:
    """Raises BuildError if DIR/NAME/VERSION exists and may not be replaced."""
    if final.exists() and not overwrite:
        raise BuildError(f"{final}: is there already and complete; --overwrite builds it anew")
    if final.exists() and not (final / "dataset_info.json").is_file():
        raise BuildError(f"{final}: is there and holds no data set, so it is not overwritten")


@contextlib.contextmanager
def claimed(final: Path) -> Iterator[Path]:
    """Locks the folder of the unfinished build for this process, and yields its path.

    Removes the folder at the end if no shard is complete.

    Raises: BuildError if another process has locked the folder.
    """
    work = final.with_name(f"{final.name}.incomplete")
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        _lock(descriptor, work)
        try:
            yield work
        finally:
            if not _complete_shards(work):  # nothing to continue from
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


def _complete_shards(work: Path) -> int:
    return len(list((work / "shards").glob("*.json")))


def check_settings(work: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Prepares the folder `work` for a build with these settings.

    Keeps the shards in `work` if they were made with the same settings. Otherwise empties `work` and saves the
    settings.

    Raises: BuildError if there are complete shards with other settings and `overwrite` is False.
    """
    before = read_note(work / "settings.json")
    if before != settings:
        if (count := _complete_shards(work)) and not overwrite:
            key = next(key for key in before | settings if before.get(key) != settings.get(key))
            raise BuildError(
                f"{work}: holds {count} shards of a build with other settings: {key} was {before.get(key)} and is "
                f"now {settings.get(key)}; --overwrite starts anew"
            )
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with atomic_write(work / "settings.json") as file:
            json.dump(settings, file, indent=1)
    for folder in ("shards", "data"):
        (work / folder).mkdir(exist_ok=True)


def read_note(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Returns {} if the file is missing or broken, as after a power failure."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def publish(work: Path, final: Path) -> None:
    """Moves the complete data set to DIR/NAME/VERSION, replacing an older one, and removes the work folder."""
    replace_folder(work / "data", final)
    shutil.rmtree(work, ignore_errors=True)
