"""Defines `TfdsSource`, which reads questions from a TFDS data set in ArrayRecord made by r1vl_jax.data.build.

Flow: as_data_source of TFDS (random access, no TensorFlow) -> to_example -> source[i]. The data set has the usable rows
of a JSON file in the file's order, with their images. source[i] is the same example as in the JsonSource of that file.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, cast

import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from r1vl_jax.common.text import first_few
from r1vl_jax.data.builders.record import features, to_example
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example


class TfdsSource:
    """Reads the rows of one split; a `Source`. Instances can be pickled; each process opens the files itself.

    Args:
      name: NAME for the newest version, or NAME:VERSION.
      data_dir: folder of TFDS data sets; None: TFDS_DATA_DIR or ~/tensorflow_datasets.
      split: a TFDS split, such as "train" or "train[:1000]".
      drop_matching: reading a row with one of these texts in an answer raises RowError.
    Raises: RowError if the data set does not exist (the message lists those that exist), is not complete, or was not
      made by r1vl_jax.data.build.
    """

    def __init__(
        self,
        name: str,
        *,
        data_dir: str | os.PathLike | None = None,
        split: str = "train",
        drop_matching: tuple[str, ...] = (),
    ) -> None:
        folder = _find(name, Path(data_dir or constants.DATA_DIR).expanduser().absolute())
        self.name = os.path.join(folder, split)
        self.errors: list[RowError] = []
        self.filtered = 0
        self.notes: list[str] = []
        self._drop_matching = tuple(drop_matching)
        self._records, self.fingerprint = _open(folder, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: no record {index}; there are {len(self)}")
        try:
            record = self._records[index]
        except (RuntimeError, ValueError) as error:
            raise RowError(f"{self.name}, record {index}: cannot be read ({error})") from error
        example = to_example(record, self.name)
        answers = [answer for _, answer in example.history] + [example.answer]
        for text in self._drop_matching:
            if any(text in answer for answer in answers):
                raise RowError(
                    f"{example.name}: left out by drop_matching ({text!r}); r1vl_jax.data.build --drop-matching leaves "
                    "such rows out of the data set"
                )
        return example


def _find(name: str, root: Path) -> Path:
    """Returns the folder of the data set and version that `name` asks for. `root`: folder of TFDS data sets."""
    match = re.fullmatch(r"([A-Za-z]\w*)(?::(\d+\.\d+\.\d+))?", name)
    if not match:
        raise RowError(f"{name!r}: not the name of a TFDS data set; expected NAME or NAME:VERSION")
    dataset, version = match.groups()
    versions = _versions(root / dataset)
    if version in versions or (versions and version is None):
        return root / dataset / (version or versions[-1])
    unfinished = sorted((root / dataset).glob(f"{version or '*'}.incomplete"))
    if unfinished:
        raise RowError(
            f"{unfinished[-1]}: this data set is not complete; the r1vl_jax.data.build command that began it goes on "
            "where it stopped"
        )
    complete = [f"{path.name}:{each}" for path in sorted(root.glob("*/")) for each in _versions(path)]
    raise RowError(
        f"{root}: no TFDS data set {name}; found {first_few(complete) or 'none'}. r1vl_jax.data.build makes one, and "
        "tfds_dir says where it is"
    )


def _versions(folder: Path) -> list[str]:
    """Returns the complete versions of a data set, oldest first."""
    names = {path.parent.name for path in folder.glob("*/dataset_info.json")}
    return sorted(filter(tfds.core.Version.is_valid, names), key=tfds.core.Version)


def _open(folder: Path, split: str) -> tuple[Any, str]:
    """Returns random access to a split's records, as dictionaries, and a fingerprint of the split's files."""
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS passes on any error of its parsers
        raise RowError(f"{folder}: cannot be read as a TFDS data set ({error})") from error
    info = builder.info
    # TFDS's annotation allows any structure of tensors; the structure of a FeaturesDict is a dictionary.
    expected = cast(dict[str, Any], features().get_tensor_info())
    actual = cast(dict[str, Any], info.features.get_tensor_info() if info.features else {})
    missing = sorted(field for field in expected if field not in actual or actual[field] != expected[field])
    if missing:
        raise RowError(
            f"{folder}: no field {', '.join(missing)} as r1vl_jax.data.build stores it; found {', '.join(actual)}"
        )
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        kind = info.file_format.value if info.file_format else "of an unknown format"
        raise RowError(f"{folder}: its files are {kind}; expected array_record")
    try:
        files = [part.filename for part in info.splits[split].file_instructions]
    except (KeyError, ValueError) as error:
        raise RowError(f"{folder}: no split {split!r}; there are {', '.join(info.splits)}") from error
    lost = [path for path in files if not os.path.isfile(path)]
    if lost:
        raise RowError(f"{lost[0]}: no such file, and {len(lost) - 1} more; files of the data set are missing")
    sizes = "".join(f"{os.path.basename(path)} {os.path.getsize(path)}\n" for path in files)
    records = builder.as_data_source(split)  # pyright: ignore[reportCallIssue] (a decorator hides the parameters)
    return records, hashlib.blake2b(sizes.encode(), digest_size=8).hexdigest()
