"""The built-in task (r1vl_jax/shapes) as a TFDS data set: tests the path of real data without a download."""

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
    """Pictures of coloured shapes with questions, drawn from a seed.

    Attributes:
      TASK: arguments of `make_task`.
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
        """The files in a folder made by r1vl_jax.data.shapes. Raises RowError where one is missing."""
        files = {split: Path(source) / f"{split}.json" for split in cls.SECTIONS}
        missing = [path.name for path in files.values() if not path.is_file()]
        if missing:
            raise RowError(f"{source}: no {', '.join(missing)}; expected a folder made by r1vl_jax.data.shapes")
        return files

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        """Makes the task in TFDS's folder of downloads, where it stays."""
        task = Path(dl_manager.download_dir) / "r1vl_jax_shapes"
        make_task(task, **self.TASK)
        return {split: self._generate_examples(path) for split, path in self.files(task).items()}
