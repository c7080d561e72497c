"""Defines the base class of the TFDS builders. A subclass says from which JSON file each split is made.

Flow: JSON files -> JsonSource -> record.py -> records in the order of the file. The records are written by build.py,
which can continue an interrupted build, or by TFDS's own download_and_prepare(file_format="array_record").
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from absl import logging

from r1vl_jax.common.text import first_few
from r1vl_jax.data.builders.record import features, to_record
from r1vl_jax.data.sources import JsonSource
from r1vl_jax.errors import RowError

MANUAL_DOWNLOAD = """
Put the published JSON file (.json or .jsonl) and the images, at the paths that its rows name, into one folder, which is
manual_dir. It must not contain a second JSON file.
"""


class QuestionsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builds a data set of questions with images.

    Attributes:
      DESCRIPTION, HOMEPAGE, CITATION: texts for dataset_info.json.
      DROP_MATCHING: rows with one of these texts in an answer are left out.
      SECTIONS: for each split, the section of the configuration's `data` that uses it ("sft", "rl" or "heldout").
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "The fields of r1vl_jax.types.Example, images as files."}
    DESCRIPTION: ClassVar[str] = ""
    HOMEPAGE: ClassVar[str | None] = None
    CITATION: ClassVar[str | None] = None
    DROP_MATCHING: ClassVar[tuple[str, ...]] = ()
    SECTIONS: ClassVar[dict[str, str]] = {"train": "rl"}

    @classmethod
    def files(cls, source: str | os.PathLike) -> dict[str, Path]:
        """Returns the JSON file of each split. `source`: a JSON file, or a folder with exactly one; see `find_file`."""
        return {"train": find_file(source)}

    @classmethod
    def describe(cls, builder: tfds.core.DatasetBuilder | Any) -> tfds.core.DatasetInfo:
        """Returns the data set's TFDS metadata, without splits. `builder`: a builder, or TFDS's DatasetIdentity."""
        return tfds.core.DatasetInfo(
            builder=builder,
            features=features(),
            description=cls.DESCRIPTION,
            homepage=cls.HOMEPAGE,
            citation=cls.CITATION,
            disable_shuffling=True,  # record i is example i of the file
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.describe(self)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        files = self.files(dl_manager.manual_dir)
        return {split: self._generate_examples(path) for split, path in files.items()}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (index, record) for each example. Logs and leaves out rows that cannot be used."""
        source = JsonSource(path, drop_matching=self.DROP_MATCHING)
        for error in source.errors:
            logging.warning("left out: %s", error)
        for index in range(len(source)):
            try:
                record = to_record(source[index], path.parent.absolute())
            except RowError as error:
                logging.warning("left out: %s", error)
                continue
            yield index, record


def find_file(source: str | os.PathLike) -> Path:
    """Returns `source` if it is a file, or the only JSON file in the folder `source`.

    Raises: RowError if the folder has no JSON file or more than one.
    """
    source = Path(source)
    if source.is_file():
        return source
    if not source.is_dir():
        raise RowError(f"{source}: no such file or folder; expected a JSON file, or a folder with one")
    names = sorted(path.name for path in source.iterdir() if not path.name.startswith("."))
    files = [name for name in names if name.lower().endswith((".json", ".jsonl"))]
    if len(files) != 1:
        raise RowError(
            f"{source}: {len(files)} JSON files; expected one .json or .jsonl file, found "
            f"{first_few(files or names) or 'an empty folder'}"
        )
    return source / files[0]
