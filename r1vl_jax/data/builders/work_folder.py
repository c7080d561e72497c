"""The folder of an unfinished build: one process at a time writes it, and a later one goes on with it.

DIR/NAME/VERSION.incomplete/settings.json   what the shards are made from
                            shards/         a note for each complete shard: rows, bytes, examples left out
                            data/           the shards, then the metadata; becomes DIR/NAME/VERSION at the end
                            task/           shapes: the task
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
    """Raises BuildError where DIR/NAME/VERSION exists and may not be replaced."""
    if final.exists() and not overwrite:
        raise BuildError(f"{final}: is there already and complete; --overwrite builds it anew")
    if final.exists() and not (final / "dataset_info.json").is_file():
        raise BuildError(f"{final}: is there and holds no data set, so it is not overwritten")


@contextlib.contextmanager
def claimed(final: Path) -> Iterator[Path]:
    """Yields the folder of the unfinished build, locked for this process. Removes it where no shard is complete.

    Raises: BuildError where another process has locked it.
    """
    work = final.with_name(f"{final.name}.incomplete")
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        _lock(descriptor, work)
        try:
            yield work
        finally:
            if not _complete_shards(work):  # nothing to go on with
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
    """Keeps the shards in `work` that were made with the same settings; otherwise empties it and notes the settings.

    Raises: BuildError where there are complete shards of other settings, unless `overwrite`.
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
    """A JSON object; empty where the file is missing or broken, as it may be after a power failure."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def publish(work: Path, final: Path) -> None:
    """Moves the complete data set to DIR/NAME/VERSION, in place of an older one, and removes the work folder."""
    replace_folder(work / "data", final)
    shutil.rmtree(work, ignore_errors=True)
