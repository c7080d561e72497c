"""Lists the files that are copied along with the weights, and checks which folders may be written to, and read from.

A folder that this project writes has a SHA-256 sum of each of its files in SUMS, in the format of `sha256sum -c`. It is
verified when the folder is read. Folders from elsewhere have no such file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from r1vl_jax.common.files import atomic_folder
from r1vl_jax.common.text import shown
from r1vl_jax.errors import CheckpointError

SUMS = "r1vl_sha256sums.txt"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# The files that belong to the model whatever its weights are: config, tokenizer, processor, chat template. A folder may
# also have an adapter's files, indexes of other weights, settings of a quantization and logs of an earlier training.
_COMPANION = re.compile(
    r"(?:config|generation_config|(?:\w+_)?(?:pre)?processor_config|special_tokens_map|added_tokens"
    r"|tokenizer(?:_config)?|vocab|chat_template)\.json|\w*template\.jinja|(?:merges|vocab)\.txt|tokenizer\.model"
)
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def companion_files(folder: str | Path) -> list[Path]:
    """Returns a Hugging Face checkpoint's files that are not weights: config, tokenizer, processor, chat template."""
    files = (path for path in Path(folder).iterdir() if path.is_file())
    return sorted(path for path in files if _COMPANION.fullmatch(path.name))


def has_weights(folder: Path) -> bool:
    """Returns whether a folder has the safetensors of a whole model."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def other_weights(folder: Path) -> list[str]:
    """Returns the names of files that look like weights."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHT_FILES)


def copy_companions(source: str | Path, destination: Path) -> None:
    """Copies `companion_files(source)` into the existing folder `destination`, byte for byte."""
    for path in companion_files(source):
        shutil.copyfile(path, destination / path.name)


def is_checkpoint(folder: Path) -> bool:
    """Returns whether a folder looks like a checkpoint: it has a config.json, or the folders params/ and hf/."""
    return (folder / "config.json").is_file() or ((folder / "params").is_dir() and (folder / "hf").is_dir())


def check_destination(destination: str | Path, overwrite: bool = False) -> Path:
    """Checks that a checkpoint may be written to `destination`, and returns its absolute path.

    A new or empty folder may always be written to, a folder that contains a checkpoint only with `overwrite`.

    Raises: CheckpointError, naming the folder, if it may not be written to.
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
    """Yields a temporary folder that is renamed to `destination` if the block ends without an error.

    Raises: CheckpointError if `check_destination` does.
    """
    with atomic_folder(check_destination(destination, overwrite)) as temporary:
        yield temporary
        names = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
        lines = (f"{digest}  {name}\n" for name, digest in zip(names, _digests(temporary, names), strict=True))
        (temporary / SUMS).write_text("".join(lines), encoding="utf-8")


def verify_folder(folder: Path, *, weights: bool) -> None:
    """Compares the files of a folder with the sums that were written with them. Does nothing if the folder has no sums.

    Args:
      weights: compare all files; False: only those that are not weights, which takes no time.
    Raises: CheckpointError that names the file which is missing or differs.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / SUMS}: cannot be read ({error})") from error
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    strange = [name for name in expected if os.path.isabs(name) or ".." in Path(name).parts or not name.isprintable()]
    if strange:
        raise CheckpointError(f"{folder / SUMS}: names {shown(strange[0])}, expected files of the folder; damaged")
    names = [name for name in expected if weights or ("/" not in name and not name.endswith(_WEIGHT_FILES))]
    try:
        actual = _digests(folder, names)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read ({error.strerror}); {_SUMS_SAY}") from error
    for name, digest in zip(names, actual, strict=True):
        if digest != expected[name]:
            raise CheckpointError(f"{folder / name}: {_SUMS_SAY}")


_SUMS_SAY = f"not the file that was written; damaged, or changed since: then remove {SUMS}"


def _digests(folder: Path, names: list[str]) -> list[str]:
    """Returns the SHA-256 sum of each file, in hexadecimal. Reads several files at a time."""

    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as threads:  # hashlib works without Python's lock
        return list(threads.map(digest, names))
