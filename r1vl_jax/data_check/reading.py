"""Reads the data sets of a configuration as training would, and makes one record per example.

This needs no accelerator and no weights, only the model's tokenizer, image processor settings and config.json.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from r1vl_jax.common.image_files import FORMATS
from r1vl_jax.config import Config, DataSection, RLSection, SFTSection
from r1vl_jax.data.loader import read_rows
from r1vl_jax.data.sources import Source, open_source
from r1vl_jax.data_check.numbers import rows_alike
from r1vl_jax.data_check.parts import parts
from r1vl_jax.data_check.records import FILTERED, Picture, Record, Survey, reason_of
from r1vl_jax.data_check.solutions import unreachable
from r1vl_jax.errors import RowError
from r1vl_jax.inference.open_model import open_model
from r1vl_jax.keysteps import lint
from r1vl_jax.processing.images import ImageSpec, smart_resize
from r1vl_jax.processing.processor import Processor
from r1vl_jax.types import EncodedPrompt, Example


@dataclasses.dataclass(frozen=True)
class Measure:
    """A callable that encodes an example as training does and returns its `Record`.

    It is passed to `read_rows` as `encode`, so it runs in the threads or worker processes that read rows. It can be
    pickled.

    Attributes:
      max_tokens: token limit of a prompt.
      max_answer_tokens: token limit of an answer; None if training encodes the question alone.
    """

    processor: Processor
    max_tokens: int
    max_answer_tokens: int | None

    def __call__(self, example: Example) -> Record:
        limits = {"max_tokens": self.max_tokens}
        if self.max_answer_tokens is not None:
            limits["max_answer_tokens"] = self.max_answer_tokens
        record = Record(row=example.row, turn=len(example.history))
        try:
            prompt, answer = self._encode(example, **limits)
        except RowError as error:
            record = record._replace(message=str(error), reason=reason_of(str(error), example.name))
            try:
                prompt, answer = self._encode(example)  # without limits, to report the lengths of a long row, too
            except RowError:
                return record
        return record._replace(
            prompt=len(prompt.tokens_T),
            answer=answer,
            image_tokens=prompt.num_image_tokens,
            pictures=tuple(_pictures(example, prompt, self.processor.image_spec)),
            question=_hash(_normal(example).encode()),
        )

    def _encode(self, example: Example, **limits: int) -> tuple[EncodedPrompt, int]:
        """Returns the prompt and the number of tokens of the answer.

        The number is 0 if training does not encode the answer and the answer cannot be encoded.
        """
        if self.max_answer_tokens is not None:
            prompt, answer = self.processor.encode_pair(example, **limits)
            return prompt, len(answer)
        prompt, tokens = self.processor.encode_prompt(example, **limits), 0
        with suppress(RowError):
            tokens = len(self.processor.encode_answer(example.answer))
        return prompt, tokens


def _pictures(example: Example, prompt: EncodedPrompt, spec: ImageSpec) -> Iterator[Picture]:
    """Yields a Picture for each image and video of an example, in order."""
    text = "".join([*(question for question, _ in example.history), example.question])
    files, start = iter(example.image_bytes or example.images), 0
    for kind, (t, h, w) in zip(re.findall("<(image|video)>", text), prompt.grids, strict=True):
        patches_PC = prompt.patches_PC[start : start + t * h * w]
        digest, start = _hash(patches_PC.tobytes(), f"{t} {h} {w}".encode()), start + t * h * w
        if kind == "video":
            yield Picture(t, h, w, 0, 0, digest)
            continue
        width, height = _file_size(next(files))
        without_budget = smart_resize(height, width, factor=spec.factor, min_pixels=1, max_pixels=sys.maxsize)
        resized = (h * spec.patch_size) * (w * spec.patch_size)
        yield Picture(t, h, w, width * height, int(np.sign(resized - math.prod(without_budget))), digest)


def _file_size(file: str | bytes) -> tuple[int, int]:
    """Returns the width and height of an image file, read from its header."""
    known = [name for name in FORMATS if name in Image.OPEN]
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=known) as image:
        return image.size


def _normal(example: Example) -> str:
    """Returns all questions as one text for comparison.

    The text is in lower case, without placeholders, repeated spaces, and Mulberry's "Question:" at the start.
    """
    text = " ".join([*(question for question, _ in example.history), example.question])
    return " ".join(re.sub("<image>|<video>", " ", text).casefold().split()).removeprefix("question: ")


def _hash(*parts: bytes) -> int:
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def read(
    survey: Survey,
    processor: Processor,
    data: DataSection,
    *,
    stage: SFTSection | RLSection | None = None,
    workers: int = 0,
) -> Iterator[Record]:
    """Yields the records of a data set, one for each example that training reads.

    Args:
      stage: section with the pixel budget; None: the section of the stage that trains on the data set.
    """
    part = survey.part
    processor = processor.for_stage(stage or part.stage, data)
    measure = Measure(processor, data.max_prompt_tokens, part.max_answer_tokens)
    label = part.key if stage is None else f"{part.key} as the warm-up sees it"
    workers = 0 if part.limit else workers  # these are few rows, which training reads in threads
    with closing(read_rows(survey.source, measure, seed=None, workers=workers)) as rows:
        for _, row in tqdm(islice(rows, survey.to_read), total=survey.to_read, desc=label, unit="row", file=sys.stderr):
            if isinstance(row, RowError):  # the source could not read it
                reason = FILTERED if "left out by drop_matching" in str(row) else "unread"
                yield Record(reason=reason, message=str(row))
            else:
                yield row[1]


@dataclasses.dataclass
class _Blank:
    """A source of `count` empty examples. The row number of each example is its index."""

    count: int
    name: str = ""
    fingerprint: str = ""
    errors: list[RowError] = dataclasses.field(default_factory=list)
    filtered: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return Example("", index, (), "", "")


def training_order(count: int, seed: int) -> list[int]:
    """Returns the order of `count` examples in the first epoch of training, as indices."""
    with closing(read_rows(_Blank(count), lambda example: None, seed=seed)) as rows:
        bar = tqdm(islice(rows, count), total=count, desc="order", unit="row", delay=2, leave=False, file=sys.stderr)
        return [example.row for _, (example, _) in bar]


def lint_key_steps(source: Source, answer_format: str) -> list[lint.Finding]:
    """Returns the findings of r1vl_jax.keysteps lint. `row` of a finding is the index of an example."""

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for index in tqdm(range(len(source)), desc="key steps", unit="row", file=sys.stderr):
            try:
                example = source[index]
            except RowError:
                continue
            problem = re.sub("<image>|<video>", " ", example.question)
            yield index, {"problem": problem, "solution": example.answer, "key_steps": example.key_steps}

    return lint.lint_rows(rows(), answer_format=answer_format)


@dataclasses.dataclass
class Reading:
    """All that was read.

    Attributes:
      surveys: one per data set.
      leaks: for each training set, the pairs of training and held-out rows that are alike (see `rows_alike`).
      complete: False if reading was interrupted.
    """

    surveys: list[Survey]
    leaks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    complete: bool = False


def read_all(config: Config, workers: int) -> Reading:
    """Reads all data sets; Ctrl-C ends it early. Raises the errors that r1vl_jax.train raises for wrong input."""
    # No weights are read and nothing is computed: the plain backend, which every machine has.
    processor = open_model(config.model.path, attention="xla", kernels="reference").processor
    reading = Reading(
        [Survey(part, open_source(part.section, watch_images=False)) for part in parts(config, processor.image_spec)]
    )
    options: dict[str, Any] = {"processor": processor, "data": config.data, "workers": workers}
    try:
        for survey in reading.surveys:
            for record in read(survey, **options):
                survey.records.append(record)
        for survey in reading.surveys:
            if survey.part.key != "data.sft":
                survey.unreachable = unreachable(survey.source, survey.records, config)
            if survey.part.key == "data.heldout":
                reading.leaks = _leaks(survey, reading.surveys, options)
                survey.order = range(survey.to_read)
                continue
            survey.order = training_order(len(survey.source), config.seed)
            if survey.part.key == "data.rl":
                survey.findings = lint_key_steps(survey.source, config.rl.format)
        reading.complete = True
    except KeyboardInterrupt:
        pass
    return reading


def _leaks(heldout: Survey, surveys: list[Survey], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each training set, finds the pairs of training and held-out rows that are alike.

    Images of both rows are encoded with the pixel budget of the training set's stage.

    Args:
      options: arguments of `read`.
    """
    leaks = {}
    for survey in surveys:
        if survey is heldout:
            continue
        stage, records = survey.part.stage, heldout.records
        if (stage.min_pixels, stage.max_pixels) != (heldout.part.stage.min_pixels, heldout.part.stage.max_pixels):
            records = read(heldout, stage=stage, **options)
        pairs = zip(heldout.records, records, strict=True)
        leaks[survey.part.key] = rows_alike(survey.usable, [other for own, other in pairs if not own.reason])
    return leaks
