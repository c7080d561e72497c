"""Checkpoint folders: written whole or not at all, and the files that travel with the weights.

A folder is filled under a temporary name beside its place and renamed at the end, so a run that dies leaves the old
folder or none.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from r1vl_jax.errors import CheckpointError

_COMPANIONS = (".json", ".jinja", ".txt", ".model")


def companion_files(folder: str | Path) -> list[Path]:
    """The files of a Hugging Face checkpoint that are not weights: config, tokenizer, processor, chat template."""
    files = (path for path in Path(folder).iterdir() if path.is_file())
    return sorted(path for path in files if path.suffix in _COMPANIONS and not path.name.endswith(".index.json"))


def copy_companions(source: str | Path, destination: Path) -> None:
    """Copies `companion_files(source)` into the existing folder `destination`, byte for byte."""
    for path in companion_files(source):
        shutil.copyfile(path, destination / path.name)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint: a config.json at its top, or params/ and hf/."""
    return (folder / "config.json").is_file() or ((folder / "params").is_dir() and (folder / "hf").is_dir())


def check_destination(destination: str | Path, overwrite: bool = False) -> Path:
    """The rule for writing: a new or empty folder always; an old checkpoint with `overwrite`; nothing else.

    Raises CheckpointError naming the folder.
    """
    destination = Path(destination).absolute()
    if not destination.exists():
        return destination
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file, expected a folder to write a checkpoint to")
    if not any(destination.iterdir()):
        return destination
    if not overwrite:
        raise CheckpointError(f"{destination}: is not empty; name another folder, or ask to overwrite the checkpoint")
    if not is_checkpoint(destination):
        raise CheckpointError(f"{destination}: is not empty and holds no checkpoint, so it is not overwritten")
    return destination


@contextlib.contextmanager
def new_folder(destination: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that takes the place of `destination` when the block ends well, and is removed if not.

    Raises CheckpointError where `check_destination` does.
    """
    destination = check_destination(destination, overwrite)
    temporary = destination.with_name(f".{destination.name}.partial")
    replaced = destination.with_name(f".{destination.name}.replaced")
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if destination.exists():
        destination.rename(replaced)
    temporary.rename(destination)
    shutil.rmtree(replaced, ignore_errors=True)
