"""Defines the values that the check keeps in memory: a small record per example and a survey per data set."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from r1vl_jax.config import RLSection, SFTSection, SourceSection
from r1vl_jax.data.batching import Size
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.data.sources import Source
from r1vl_jax.keysteps import lint

# Why training drops a row: a pattern for the error message after the row's name, and the reason in words. The first
# pattern that matches is used.
REASONS = {
    "unread": ("$", "could not be read"),
    "image": (r", (images|videos)\[", "an image or a video is missing or cannot be used"),
    "prompt": (r": the prompt has \d+ tokens", "the prompt is over data.max_prompt_tokens"),
    "answer": (r", answer: \d+ tokens", "the answer is over sft.max_answer_tokens"),
    "special": (r", \w+: the text holds the special token", "a special token in a text"),
    "other": ("", "something else"),
}
FILTERED = "filtered"  # left out by drop_matching when the row is read (TfdsSource); not counted as dropped


def reason_of(message: str, name: str) -> str:
    """Returns the key of REASONS for an error message. `name`: name of the row, with which the message begins."""
    problem = message.removeprefix(name)
    return next(reason for reason, (pattern, _) in REASONS.items() if re.match(pattern, problem))


class Picture(NamedTuple):
    """An image or a video as the model sees it.

    Attributes:
      t, h, w: the grid, in patches.
      pixels: width * height of the image file; 0 for a video.
      scaled: -1 if the pixel budget shrinks the image, 1 if it enlarges the image, else 0.
      digest: hash of the patches and the grid.
    """

    t: int
    h: int
    w: int
    pixels: int
    scaled: int
    digest: int


class Record(NamedTuple):
    """The check's record of one example, which is a question with its answer.

    Attributes:
      row: number of the row in the file; -1 if it is not known.
      turn: number of the question within the row, from 0.
      prompt: number of tokens of the prompt; 0 if it could not be encoded.
      answer: number of tokens of the answer (RL: of the reference solution).
      image_tokens: number of tokens of the prompt that are images and videos.
      question: hash of the text of all questions, ignoring case and white space.
      reason, message: why training drops the example: a key of REASONS (or FILTERED) and the error; empty if it does
        not.
    """

    row: int = -1
    turn: int = 0
    prompt: int = 0
    answer: int = 0
    image_tokens: int = 0
    pictures: tuple[Picture, ...] = ()
    question: int = 0
    reason: str = ""
    message: str = ""


class Unreachable(NamedTuple):
    """A question whose own solution earns no accuracy.

    Attributes:
      row: number of the row.
      expected: what the reward takes for the solution's answer.
      why: why the solution could not be scored; empty if it could.
    """

    row: int
    expected: str
    why: str


class Plan(NamedTuple):
    """How a stage makes batches of one size from a data set.

    Attributes:
      batches: a function that groups the sizes of examples into batches.
      shapes: a function that plans shapes from a sample of batches.
    """

    name: str
    batches: Callable[[list[Size]], list[list[Size]]]
    shapes: Callable[[list[list[Size]]], Buckets]


@dataclasses.dataclass(frozen=True)
class Part:
    """A data set as a stage reads it.

    Attributes:
      key: data.sft, data.rl or data.heldout.
      section: the section of the configuration that names the data set.
      stage: the section with the pixel budget.
      plans: the kinds of batches that are made of the data set.
      planned: number of examples, from the start of an epoch, from which shapes are planned.
      budgets: for each series of numbers (see numbers.py), the configuration's limits by name.
      max_answer_tokens: token limit of an answer; None if training encodes no answers.
      limit: maximum number of examples to read; None: all.
    """

    key: str
    section: SourceSection
    stage: SFTSection | RLSection
    plans: tuple[Plan, ...]
    planned: int
    budgets: dict[str, dict[str, int]]
    max_answer_tokens: int | None = None
    limit: int | None = None


@dataclasses.dataclass
class Survey:
    """The records of a data set, as far as it has been read.

    Attributes:
      records: one per example, in the source's order.
      order: indices of the examples in training's order; empty until the order is known.
      findings: findings of the key-step lint, with the index of an example as `row`; None if the lint was not run.
      unreachable: the questions whose own solution earns no accuracy; None if the solutions were not scored.
    """

    part: Part
    source: Source
    records: list[Record] = dataclasses.field(default_factory=list)
    order: Sequence[int] = ()
    findings: list[lint.Finding] | None = None
    unreachable: list[Unreachable] | None = None

    @property
    def to_read(self) -> int:
        """The number of examples that training reads."""
        return min(len(self.source), self.part.limit or len(self.source))

    @property
    def usable(self) -> list[Record]:
        """The records of the examples that training uses."""
        return [record for record in self.records if not record.reason]

    @property
    def dropped(self) -> dict[str, list[str]]:
        """The errors of the rows that training drops, by reason."""
        errors: dict[str, list[str]] = {reason: [] for reason in REASONS}
        errors["unread"] = [str(error) for error in self.source.errors]
        for record in self.records:
            if record.reason not in ("", FILTERED):
                errors[record.reason].append(record.message)
        return {reason: messages for reason, messages in errors.items() if messages}
