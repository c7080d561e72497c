"""Builds TFDS data sets of questions (R1-VL-10K, Mulberry-SFT, the built-in task) in ArrayRecord, without TensorFlow.

Importing this package registers the builders with TFDS, so that `tfds.builder(NAME)` finds them. The command
r1vl_jax.data.build runs the builders and can continue an interrupted build; TFDS's own download_and_prepare works, too.

    record.py                                converts an `Example` to a record, and back
    base.py                                  has the base class of the builders
    r1vl_10k.py, mulberry_sft.py, shapes.py  have one builder each
    shards.py                                writes the files of a data set
    work_folder.py                           manages the folder of an unfinished build
    build.py, command.py                     implement r1vl_jax.data.build
"""

from r1vl_jax.data.builders.base import QuestionsBuilder
from r1vl_jax.data.builders.mulberry_sft import MulberrySft
from r1vl_jax.data.builders.r1vl_10k import R1vl10k
from r1vl_jax.data.builders.shapes import Shapes

BUILDERS: dict[str, type[QuestionsBuilder]] = {builder.name: builder for builder in (R1vl10k, MulberrySft, Shapes)}

__all__ = ["BUILDERS", "MulberrySft", "QuestionsBuilder", "R1vl10k", "Shapes"]
