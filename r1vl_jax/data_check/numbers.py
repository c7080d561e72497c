"""Computes the numbers of check.json from the records."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from r1vl_jax.data.batching import Size, need_of
from r1vl_jax.data_check.records import FILTERED, Plan, Record, Survey
from r1vl_jax.keysteps import lint

# For each series of numbers: its name in words, and a function that returns a record's numbers.
SERIES: dict[str, tuple[str, Callable[[Record], Iterable[int]]]] = {
    "prompt_tokens": ("prompt tokens", lambda record: [record.prompt]),
    "image_tokens": ("image tokens", lambda record: [record.image_tokens]),
    "answer_tokens": ("answer tokens", lambda record: [record.answer] * bool(record.answer)),
    "pixels": ("pixels of an image", lambda record: [picture.pixels for picture in record.pictures if picture.pixels]),
    "patches": ("patches", lambda record: [sum(picture.t * picture.h * picture.w for picture in record.pictures)]),
}
# For each way in which two rows can be alike: its name in words, and a function that returns a record's keys. Rows
# that share a key are alike.
ALIKE: dict[str, tuple[str, Callable[[Record], set[Any]]]] = {
    "image": ("same image", lambda record: {picture.digest for picture in record.pictures}),
    "question": ("same question", lambda record: {record.question}),
    "both": (
        "same question and images",
        lambda record: {(record.question, *(picture.digest for picture in record.pictures))},
    ),
}


def report(surveys: Sequence[Survey], leaks: dict[str, dict[str, Any]], complete: bool) -> dict[str, Any]:
    """Returns the contents of check.json.

    Args:
      leaks: for each training set, the pairs of training and held-out rows that are alike (see `rows_alike`).
      complete: False if reading was interrupted; data sets of which nothing was read are then left out.
    """
    leaked = {row for shared in leaks.values() for _, row in shared["both"]["pairs"]}
    return {
        "complete": complete,
        "sets": {survey.part.key: set_numbers(survey) for survey in surveys if complete or survey.records},
        "heldout_like": leaks,
        "rows_dropped": sum(len(messages) for survey in surveys for messages in survey.dropped.values()),
        "rows_leaked": len(leaked),
    }


def set_numbers(survey: Survey) -> dict[str, Any]:
    """Returns the numbers of one data set."""
    source, usable = survey.source, survey.usable
    turns = Counter(record.row for record in survey.records if record.row >= 0)
    unknown = sum(record.row < 0 for record in survey.records)
    numbers = {
        "source": source.name,
        "notes": source.notes,
        "rows": len(turns) + unknown + len(source.errors) + source.filtered,
        "examples": {"read": len(survey.records), "wanted": survey.to_read, "there": len(source)},
        "turns": _counts(turns.values()),
        "filtered": source.filtered + sum(record.reason == FILTERED for record in survey.records),
        "dropped": survey.dropped,
        "usable": len(usable),
        **_pictures(usable),
        "quantiles": {series: quantiles(values(survey, series)) for series in SERIES},
        "budgets": survey.part.budgets,
        "batches": _batches(survey),
        "alike": rows_alike(usable, usable),
    }
    if survey.findings is not None:
        numbers["key_steps"] = {
            "rows": len({finding.row for finding in survey.findings}),
            "kinds": {kind: count for kind, count in lint.counts(survey.findings).items() if count},
            "findings": [
                dataclasses.asdict(finding) | {"row": survey.records[finding.row].row} for finding in survey.findings
            ],
        }
    if survey.unreachable is not None:
        numbers["unreachable"] = [question._asdict() for question in survey.unreachable]
    return numbers


def _pictures(records: Sequence[Record]) -> dict[str, Any]:
    """Returns the numbers about images and videos."""
    pictures = [picture for record in records for picture in record.pictures]
    images = [picture for picture in pictures if picture.pixels]
    return {
        "images": {
            "of_an_example": _counts(sum(picture.pixels > 0 for picture in record.pictures) for record in records),
            "all": len(images),
            "distinct": len({picture.digest for picture in images}),
            "shrunk": sum(picture.scaled < 0 for picture in images),
            "enlarged": sum(picture.scaled > 0 for picture in images),
        },
        "videos": len(pictures) - len(images),
    }


def _counts(values: Iterable[int]) -> dict[str, int]:
    """Returns how often each value occurs."""
    return {str(value): count for value, count in sorted(Counter(values).items())}


def values(survey: Survey, series: str) -> np.ndarray:
    """Returns a series of numbers over all examples that could be encoded, including those over a budget."""
    encoded = (record for record in survey.records if record.prompt)
    return np.fromiter(chain.from_iterable(map(SERIES[series][1], encoded)), np.int64)


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Returns quantiles and the mean; None if there are no values."""
    if not len(values):
        return None
    low, five, median, most, high = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
    return {"min": low, "5%": five, "median": median, "mean": float(values.mean()), "95%": most, "max": high}


def rows_alike(first: Sequence[Record], second: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Finds pairs of rows that share an image, the question, or the question and all images.

    A pair has one row of `first` and one row of `second`. Each row of `second` is paired with the earliest such row of
    `first`. If `first` is `second`, a row is not paired with itself, even if its turns are alike.
    """
    alike = {}
    for kind, (_, keys) in ALIKE.items():
        owner: dict[Any, int] = {}
        for record in first:
            for key in keys(record):
                owner.setdefault(key, record.row)
        pairs = ((owner[key], record.row) for record in second for key in keys(record) if key in owner)
        distinct = list(dict.fromkeys(pair for pair in pairs if first is not second or pair[0] != pair[1]))
        alike[kind] = {"rows": len({row for _, row in distinct}), "pairs": distinct}
    return alike


def _batches(survey: Survey) -> dict[str, Any]:
    """For each plan, returns its shapes, how many batches of an epoch get each shape, and the share of padding."""
    part = survey.part
    sizes = [_size(survey.records[index], part.max_answer_tokens is not None) for index in survey.order]
    sample, epoch = [size for size in sizes[: part.planned] if size], [size for size in sizes if size]
    return {plan.name: _padding(plan, sample, epoch) for plan in part.plans if sample}


def _size(record: Record, answers: bool) -> Size | None:
    """Returns the size of an example, including its answer if `answers`; None if training drops the example."""
    grids = tuple((picture.t, picture.h, picture.w) for picture in record.pictures)
    answer = record.answer if answers else 0
    return None if record.reason else Size(record.prompt + answer, answer, grids)


def _padding(plan: Plan, sample: list[Size], epoch: list[Size]) -> dict[str, Any]:
    """Plans shapes from the examples of `sample`, and returns how much padding the batches of `epoch` then have."""
    planned, batches = plan.shapes(plan.batches(sample)), plan.batches(epoch)
    shapes = [planned.fit(need_of(batch, planned)) for batch in batches]
    uses = Counter(shapes)
    tokens = sum(size.tokens for batch in batches for size in batch)
    patches = sum(t * h * w for batch in batches for size in batch for t, h, w in size.grids)
    token_places = sum(len(batch) * shape.prompt for batch, shape in zip(batches, shapes, strict=True))
    patch_places = sum(shape.rows * shape.patches for shape in shapes)
    return {
        "planned_from": len(sample),
        "shapes": [
            {**dataclasses.asdict(shape), "planned": shape in planned.shapes, "batches": uses[shape]}
            for shape in dict.fromkeys([*planned.shapes, *shapes])
        ],
        "padding_tokens": 1 - tokens / token_places,
        "padding_patches": 1 - patches / patch_places if patch_places else 0.0,
    }
