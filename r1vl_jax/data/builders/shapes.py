"""Defines the builder of the built-in task (r1vl_jax/shapes), which exercises the TFDS path without a download."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from r1vl_jax.data.builders.base import QuestionsBuilder
from r1vl_jax.errors import RowError
from r1vl_jax.shapes import make_task


class Shapes(QuestionsBuilder):
    """Builds the built-in task: pictures of coloured shapes with questions, drawn from a seed.

    Attributes:
      TASK: arguments of `make_task`, used by TFDS's download_and_prepare.
    """

    name = "shapes"
    DESCRIPTION = """
    Pictures of coloured shapes with questions, step-by-step solutions and key steps, drawn from a seed: answers to
    imitate (sft), questions for StepGRPO (rl), and others to measure with (heldout).
    """
    SECTIONS = {"sft": "sft", "rl": "rl", "heldout": "heldout"}
    TASK: ClassVar[dict[str, Any]] = {}

    @classmethod
    def files(cls, source: str | os.PathLike) -> dict[str, Path]:
        """Returns the files in a folder made by r1vl_jax.data.shapes. Raises RowError if one is missing."""
        files = {split: Path(source) / f"{split}.json" for split in cls.SECTIONS}
        missing = [path.name for path in files.values() if not path.is_file()]
        if missing:
            raise RowError(f"{source}: no {', '.join(missing)}; expected a folder made by r1vl_jax.data.shapes")
        return files

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        """Makes the task in TFDS's download folder, where it stays. Returns a generator of records per split."""
        task = Path(dl_manager.download_dir) / "r1vl_jax_shapes"
        make_task(task, **self.TASK)
        return {split: self._generate_examples(path) for split, path in self.files(task).items()}
