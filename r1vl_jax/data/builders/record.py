"""Converts an `Example` to the record that a TFDS data set stores, which includes the image files, and back.

Flow: JsonSource -> Example -> to_record -> ArrayRecord -> to_example -> Example. TFDS cannot store lists of lists of
texts without TensorFlow, so they are stored as JSON text. None is stored as the empty text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from r1vl_jax.common.image_files import read_image_file
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example


def features() -> tfds.features.FeaturesDict:
    """Returns the fields of a record. `images` has image files, byte for byte; `image_paths` has their names."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "row": tfds.features.Tensor(shape=(), dtype=np.int64),
            "question": text(),
            "answer": text(),
            "key_steps": text(),  # JSON: a list of groups of alternatives
            "system": text(),
            "history": text(),  # JSON: a list of [question, answer]
            "images": tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_)),
            "image_paths": tfds.features.Sequence(text()),
        }
    )


def to_record(example: Example, root: str | os.PathLike) -> dict[str, Any]:
    """Returns the record of an example. Reads its image files, and decodes them to see that they can be.

    Args:
      root: absolute path of a folder. An image inside the folder is named by its path relative to the folder, any other
        image by its absolute path.
    Raises: RowError if the example has videos, or if an image file cannot be read.
    """
    if example.videos:
        raise RowError(f"{example.name}: has videos, which a TFDS record cannot hold; train from the JSON file")
    return {
        "row": example.row,
        "question": example.question,
        "answer": example.answer,
        "key_steps": "" if example.key_steps is None else json.dumps(example.key_steps),
        "system": example.system or "",
        "history": json.dumps(example.history),
        "images": [_read(path, example.name) for path in example.images],
        "image_paths": [_name(path, Path(root)) for path in example.images],
    }


def to_example(record: Mapping[str, Any], source: str) -> Example:
    """Returns the example that a record was made from, with image names and image bytes.

    Args:
      source: name of the data set.
    """
    text = {field: record[field].decode() for field in ("question", "answer", "key_steps", "system", "history")}
    return Example(
        source,
        int(record["row"]),
        tuple(path.decode() for path in record["image_paths"]),
        text["question"],
        text["answer"],
        tuple(map(tuple, json.loads(text["key_steps"]))) if text["key_steps"] else None,
        system=text["system"] or None,
        history=tuple(map(tuple, json.loads(text["history"]))),
        image_bytes=tuple(record["images"]),
    )


def _read(path: str, name: str) -> bytes:
    """Returns the bytes of an image file that can be decoded. Raises RowError naming the row and the file."""
    try:
        return read_image_file(path)
    except ValueError as error:
        raise RowError(f"{name}, image {error}") from error


def _name(path: str, root: Path) -> bytes:
    """Returns the name under which a record stores an image file; see `to_record`."""
    inside = Path(path).is_relative_to(root)
    return os.fspath(Path(path).relative_to(root) if inside else path).encode("utf-8", "replace")
