"""What the check keeps of the data: a small record for each example, and a survey for each data set."""

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

# Why training drops a row: a pattern that its error matches after the row's name, and the reason in words. The first
# pattern that matches counts.
REASONS = {
    "unread": ("$", "could not be read"),
    "image": (r", (images|videos)\[", "an image or a video is missing or cannot be used"),
    "prompt": (r": the prompt has \d+ tokens", "the prompt is over data.max_prompt_tokens"),
    "answer": (r", answer: \d+ tokens", "the answer is over sft.max_answer_tokens"),
    "special": (r", \w+: the text holds the special token", "a special token in a text"),
    "other": ("", "something else"),
}
FILTERED = "filtered"  # left out by drop_matching, by a source that applies it when the row is read; not dropped


def reason_of(message: str, name: str) -> str:
    """Which of REASONS an error is. `name`: that of its row, with which the message begins."""
    problem = message.removeprefix(name)
    return next(reason for reason, (pattern, _) in REASONS.items() if re.match(pattern, problem))


class Picture(NamedTuple):
    """An image or a video as the model sees it.

    Attributes:
      t, h, w: its grid in patches.
      pixels: width * height of the image file; 0 for a video.
      scaled: -1 where the pixel budget shrinks the image, 1 where it enlarges it, else 0.
      digest: hash of its patches and its grid.
    """

    t: int
    h: int
    w: int
    pixels: int
    scaled: int
    digest: int


class Record(NamedTuple):
    """One example: a question with its answer.

    Attributes:
      row, turn: its row in the file, -1 where that is not known, and its turn in the row.
      prompt, answer: tokens of the prompt (0 where it could not be encoded) and of the answer (RL: of the reference
        solution).
      image_tokens: tokens of the prompt that are images and videos.
      question: hash of the questions' text, ignoring case and white space.
      reason, message: why training drops it (see REASONS); empty where it does not.
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


class Plan(NamedTuple):
    """Batches of one size that a stage makes of a data set.

    Attributes:
      batches: the sizes of examples in batches.
      shapes: the shapes that are planned from a sample of batches.
    """

    name: str
    batches: Callable[[list[Size]], list[list[Size]]]
    shapes: Callable[[list[list[Size]]], Buckets]


@dataclasses.dataclass(frozen=True)
class Part:
    """A data set as a stage reads it.

    Attributes:
      key: data.sft, data.rl or data.heldout.
      stage: the section with the pixel budget.
      plans: the batches that are made of it, in shapes planned from the first `planned` examples of an epoch.
      budgets: for each series of numbers (see numbers.py), the configuration's limits by name.
      max_answer_tokens: None where training encodes no answers.
      limit: the most examples that are read; None: all.
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
    """A data set, as far as it has been read.

    Attributes:
      records: one for each example, in the source's order.
      order: indices of the examples in training's order; empty while it is not known.
      findings: key-step lint, `row` being the index of an example; None where it was not run.
    """

    part: Part
    source: Source
    records: list[Record] = dataclasses.field(default_factory=list)
    order: Sequence[int] = ()
    findings: list[lint.Finding] | None = None

    @property
    def to_read(self) -> int:
        """How many examples training reads."""
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
