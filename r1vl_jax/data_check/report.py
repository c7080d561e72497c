"""What `r1vl_jax.data.check` says: from one small record a row to numbers, and from those to text and a figure.

Flow: check.py reads rows into `Survey`s -> numbers (check.json) -> text (standard output); records -> check.png.
Everything here is a function of what was read. No other module imports this one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from r1vl_jax.config import RLSection, SFTSection, SourceSection
from r1vl_jax.data.batching import Size, need_of
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.data.sources import Source
from r1vl_jax.keysteps import lint

INDENT = " " * 13
NAMED = 5  # rows of a kind that the text names; check.json has all
# Why training drops a row: how its message goes on behind the row's name, and the same in words. The first that fits.
REASONS = {
    "unread": ("$", "could not be read"),
    "image": (r", (images|videos)\[", "an image or a video is missing or cannot be used"),
    "prompt": (r": the prompt has \d+ tokens", "the prompt is over data.max_prompt_tokens"),
    "answer": (r", answer: \d+ tokens", "the answer is over sft.max_answer_tokens"),
    "special": (r", \w+: the text holds the special token", "a special token in a text"),
    "other": ("", "something else"),
}
FILTERED = "filtered"  # by drop_matching, where the source says so only when the row is read; not a drop


class Picture(NamedTuple):
    """An image or a video as the model sees it.

    Attributes:
      t, h, w: its grid in patches.
      pixels: width * height of the image file; 0 for a video.
      scaled: -1 where the pixel budget shrinks it, 1 where it enlarges it, else 0.
      digest: hash of its patches and its grid.
    """

    t: int
    h: int
    w: int
    pixels: int
    scaled: int
    digest: int


class Record(NamedTuple):
    """What stays of one example: a question with its answer. `prompt` is 0 where it could not be encoded.

    Attributes:
      row, turn: where it stands in its file; row -1: unknown.
      prompt, answer: tokens; of an RL row the reference solution's.
      image_tokens: those of the prompt that stand for images and videos.
      question: hash of the questions' text, white space and case left out of account.
      reason, message: why training drops it (see REASONS), or empty.
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
    """Batches of one size that a stage makes of a data set, and the shapes that it plans from a sample of them."""

    name: str
    batches: Callable[[list[Size]], list[list[Size]]]
    shapes: Callable[[list[list[Size]]], Buckets]


@dataclasses.dataclass(frozen=True)
class Part:
    """A data set as a stage reads it.

    Attributes:
      key: data.sft, data.rl or data.heldout.
      stage: has the pixel budget.
      plans: the batches that are made of it, in shapes planned from the first `planned` examples of an epoch.
      budgets: for a series of numbers, the configuration's limits by name.
      max_answer_tokens: None: training encodes no answers.
      limit: how many examples are read at most; None: all.
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
    """A data set as far as it has been read.

    Attributes:
      records: one for each example, in the source's order.
      order: indices of the examples as training takes them; empty: not known yet.
      findings: of the key steps, `row` the index of an example; None: not looked at.
    """

    part: Part
    source: Source
    records: list[Record] = dataclasses.field(default_factory=list)
    order: Sequence[int] = ()
    findings: list[lint.Finding] | None = None

    @property
    def wanted(self) -> int:
        """Examples that training reads."""
        return min(len(self.source), self.part.limit or len(self.source))

    @property
    def usable(self) -> list[Record]:
        return [record for record in self.records if not record.reason]

    @property
    def dropped(self) -> dict[str, list[str]]:
        """Messages about what training drops, by reason."""
        found = {reason: [] for reason in REASONS} | {"unread": [str(error) for error in self.source.errors]}
        for record in self.records:
            if record.reason not in ("", FILTERED):
                found[record.reason].append(record.message)
        return {reason: messages for reason, messages in found.items() if messages}


# What a record adds to each series of numbers, and what the series is called.
SERIES: dict[str, tuple[str, Callable[[Record], Iterable[int]]]] = {
    "prompt_tokens": ("prompt tokens", lambda record: [record.prompt]),
    "image_tokens": ("image tokens", lambda record: [record.image_tokens]),
    "answer_tokens": ("answer tokens", lambda record: [record.answer] * bool(record.answer)),
    "pixels": ("pixels of an image", lambda record: [picture.pixels for picture in record.pictures if picture.pixels]),
    "patches": ("patches", lambda record: [sum(picture.t * picture.h * picture.w for picture in record.pictures)]),
}
# The histograms: the numbers on their axes, and what is counted.
PANELS = {
    "prompt_tokens": ("prompt tokens of an example, image tokens among them", "examples"),
    "answer_tokens": ("answer tokens of an example", "examples"),
    "image_tokens": ("image tokens of an example", "examples"),
    "pixels": ("pixels of an image file, width x height", "images"),
}
# Two rows are alike where they share one of these keys.
ALIKE: dict[str, tuple[str, Callable[[Record], set]]] = {
    "image": ("same image", lambda record: {picture.digest for picture in record.pictures}),
    "question": ("same question", lambda record: {record.question}),
    "both": (
        "same question and images",
        lambda record: {(record.question, *(picture.digest for picture in record.pictures))},
    ),
}


def values(survey: Survey, series: str) -> np.ndarray:
    """A series of all examples that could be encoded, those over a budget too."""
    encoded = (record for record in survey.records if record.prompt)
    return np.fromiter(chain.from_iterable(map(SERIES[series][1], encoded)), np.int64)


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    low, five, median, most, high = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
    return {"min": low, "5%": five, "median": median, "mean": float(values.mean()), "95%": most, "max": high}


def rows_alike(first: Sequence[Record], second: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Pairs of rows, one of `first` and one of `second`, that have an image, the question, or all of both in common.

    A row of `second` is paired with the first one that it is like; within one set (`first` is `second`) not with
    itself, which it is in its other turns.
    """
    found = {}
    for kind, (_, keys) in ALIKE.items():
        owner: dict[Any, int] = {}
        for record in first:
            for key in keys(record):
                owner.setdefault(key, record.row)
        pairs = ((owner[key], record.row) for record in second for key in keys(record) if key in owner)
        distinct = list(dict.fromkeys(pair for pair in pairs if first is not second or pair[0] != pair[1]))
        found[kind] = {"rows": len({row for _, row in distinct}), "pairs": distinct}
    return found


def numbers(survey: Survey) -> dict[str, Any]:
    """A data set in numbers, as check.json has them."""
    source, usable = survey.source, survey.usable
    turns = Counter(record.row for record in survey.records if record.row >= 0)
    unknown = sum(record.row < 0 for record in survey.records)
    pictures = [picture for record in usable for picture in record.pictures]
    stills = [picture for picture in pictures if picture.pixels]
    found = {
        "source": source.name,
        "rows": len(turns) + unknown + len(source.errors) + source.filtered,
        "examples": {"read": len(survey.records), "wanted": survey.wanted, "there": len(source)},
        "turns": _counts(turns.values()),
        "filtered": source.filtered + sum(record.reason == FILTERED for record in survey.records),
        "dropped": survey.dropped,
        "usable": len(usable),
        "images": {
            "of_an_example": _counts(sum(picture.pixels > 0 for picture in record.pictures) for record in usable),
            "all": len(stills),
            "distinct": len({picture.digest for picture in stills}),
            "shrunk": sum(picture.scaled < 0 for picture in stills),
            "enlarged": sum(picture.scaled > 0 for picture in stills),
        },
        "videos": len(pictures) - len(stills),
        "quantiles": {series: quantiles(values(survey, series)) for series in SERIES},
        "budgets": survey.part.budgets,
        "batches": _batches(survey),
        "alike": rows_alike(usable, usable),
    }
    if survey.findings is not None:
        found["key_steps"] = {
            "rows": len({finding.row for finding in survey.findings}),
            "kinds": {kind: count for kind, count in lint.counts(survey.findings).items() if count},
            "findings": [
                dataclasses.asdict(finding) | {"row": survey.records[finding.row].row} for finding in survey.findings
            ],
        }
    return found


def _counts(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _batches(survey: Survey) -> dict[str, Any]:
    """For each plan its shapes, how many batches of an epoch get each, and how much of those is padding."""
    part = survey.part
    sizes = [_size(survey.records[index], part.max_answer_tokens is not None) for index in survey.order]
    sample, epoch = [size for size in sizes[: part.planned] if size], [size for size in sizes if size]
    return {plan.name: _padding(plan, sample, epoch) for plan in part.plans if sample}


def _size(record: Record, answers: bool) -> Size | None:
    """None for an example that training drops."""
    grids = tuple((picture.t, picture.h, picture.w) for picture in record.pictures)
    answer = record.answer if answers else 0
    return None if record.reason else Size(record.prompt + answer, answer, grids)


def _padding(plan: Plan, sample: list[Size], epoch: list[Size]) -> dict[str, Any]:
    planned, batches = plan.shapes(plan.batches(sample)), plan.batches(epoch)
    shapes = [planned.fit(need_of(batch, planned)) for batch in batches]
    uses = Counter(shapes)
    tokens = sum(size.tokens for batch in batches for size in batch)
    patches = sum(t * h * w for batch in batches for size in batch for t, h, w in size.grids)
    room = sum(len(batch) * shape.prompt for batch, shape in zip(batches, shapes, strict=True))
    places = sum(shape.rows * shape.patches for shape in shapes)
    return {
        "planned_from": len(sample),
        "shapes": [
            {**dataclasses.asdict(shape), "planned": shape in planned.shapes, "batches": uses[shape]}
            for shape in dict.fromkeys([*planned.shapes, *shapes])
        ],
        "padding_tokens": 1 - tokens / room,
        "padding_patches": 1 - patches / places if places else 0.0,
    }


def text(key: str, found: dict[str, Any], named: int | None) -> str:
    """A data set's numbers for people; `named` of each kind of thing are named, None: all of them."""
    examples, images, source = found["examples"], found["images"], found["source"]
    budgets = [f"{name} {value:,}" for limits in found["budgets"].values() for name, value in limits.items()]
    rows = ", ".join(["rows", *(f"{count:,} of {n} turn{'s' * (n != '1')}" for n, count in found["turns"].items())])
    part = f"; the first {examples['read']:,} of {examples['there']:,} examples"
    each = ", ".join(f"{n} in {count:,}" for n, count in images["of_an_example"].items())
    lines = [f"{key}: {source}", f"{INDENT}{', '.join(budgets[:-2])}", f"{INDENT}{', '.join(budgets[-2:])}"]
    lines += [_line(found["rows"], rows + part * (examples["read"] < examples["there"]))]
    lines += [_line(found["filtered"], "left out by drop_matching")]
    lines += [_line(sum(map(len, found["dropped"].values())), "dropped by training")]
    for reason, messages in found["dropped"].items():
        lines += [_line(len(messages), REASONS[reason][1], 4)]
        lines += _some([message.removeprefix(f"{source}, ") for message in messages], named)
    lines += [_line(found["usable"], "usable examples: an answer with all that comes before it")]
    lines += [_line(images["all"], f"images, {images['distinct']:,} different; of an example: {each}")]
    for change in ("shrunk", "enlarged"):
        share = images[change] / max(1, images["all"])
        lines += [_line(images[change], f"{change} to the pixel budget ({share:.1%})", 4)]
    lines += [_line(found["videos"], "videos"), "", *_quantile_table(found["quantiles"])]
    for name, batches in found["batches"].items():
        lines += [
            "",
            f"  {name}: batches of one pass on one device, shapes planned from {batches['planned_from']:,} examples",
        ]
        for shape in batches["shapes"]:
            size = f"of {shape['prompt']} tokens a row and {shape['rows']} x {shape['patches']} patches"
            lines += [_line(shape["batches"], size + " (not planned)" * (not shape["planned"]))]
        shares = f"{batches['padding_tokens']:.1%} of the tokens, {batches['padding_patches']:.1%} of the patches"
        lines += [f"{INDENT}padding: {shares}"]
    lines += ["", "  rows like an earlier one", *_alike_table(found["alike"], named)]
    if "key_steps" in found:
        steps = found["key_steps"]
        lines += ["", f"  key steps: {len(steps['findings']):,} findings in {steps['rows']:,} rows"]
        lines += [_line(count, f"{kind}: {lint.KINDS[kind]}") for kind, count in steps["kinds"].items()]
        lines += _some([_finding(finding) for finding in steps["findings"]], named)
    return "\n".join(lines)


def leak_text(key: str, found: dict[str, Any], named: int | None) -> str:
    """What the held-out rows share with a training set."""
    lines = [f"data.heldout: rows like one of {key}", *_alike_table(found, named)]
    if leaked := found["both"]["rows"]:
        lines += [f"  LEAK: {leaked:,} held-out rows stand in {key}, with the same question and images"]
    return "\n".join(lines)


def _line(count: int, what: str, deeper: int = 0) -> str:
    return f"{'':{deeper}}{count:>12,} {what}"


def _some(messages: Sequence[str], named: int | None) -> list[str]:
    more = len(messages) - len(messages[:named])
    return [f"{INDENT}    {message}" for message in messages[:named]] + [f"{INDENT}    and {more:,} more"] * bool(more)


def _finding(finding: dict[str, Any]) -> str:
    group = "" if finding["group"] is None else f", group {finding['group']}"
    return f"row {finding['row']}{group}: {finding['kind']}: {finding['detail']}"


def _alike_table(found: dict[str, Any], named: int | None) -> list[str]:
    lines = []
    for kind, (label, _) in ALIKE.items():
        pairs = found[kind]["pairs"]
        shown = [f"{second} like {first}" for first, second in pairs[:named]]
        shown += ["..."] * (len(shown) < len(pairs))
        lines += [_line(found[kind]["rows"], f"{label}{': ' * bool(pairs)}{', '.join(shown)}")]
    return lines


def _quantile_table(found: dict[str, Any]) -> list[str]:
    heads = ("min", "5%", "median", "mean", "95%", "max")
    lines = [f"{INDENT}{'':17}" + "".join(f"{head:>12}" for head in heads)]
    for series, (label, _) in SERIES.items():
        row = found[series] or {}
        cells = "".join(f"{f'{row[head]:,.0f}' if row else '-':>12}" for head in heads)
        lines += [f"{INDENT}{label:<17}{cells}"]
    return lines


def plot(surveys: Sequence[Survey], path: Path) -> None:
    """Draws the histograms, a column for each data set; budgets are dashed lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(surveys), 11), layout="constrained")
    FigureCanvasAgg(figure)
    for part, survey in zip(np.atleast_1d(figure.subfigures(1, len(surveys))), surveys, strict=True):
        part.suptitle(f"{survey.part.key}: {len(survey.records):,} examples", fontsize=12)
        for axes, series in zip(part.subplots(len(PANELS), 1), PANELS, strict=True):
            _draw(axes, values(survey, series), series, survey.part.budgets.get(series, {}))
    figure.savefig(path, dpi=100)


def _draw(axes, numbers: np.ndarray, series: str, budgets: dict[str, int]) -> None:
    """One histogram; its legend, the budgets, stands above it. A budget far from all numbers is named there alone."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    label, unit = PANELS[series]
    axes.set_xlabel(label, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not len(numbers):
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"{label}: none", transform=axes.transAxes, ha="center", color="0.6", fontsize=9)
        return
    low, high = int(numbers.min()), int(numbers.max())
    if series == "pixels":
        edges = np.geomspace(max(1, low) / 1.6, high * 1.6, 41)
        axes.set_xscale("log")
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        width = -(-(high - low + 1) // 40)  # whole numbers, as many in each bar
        edges = np.arange(low, high + width + 1, width) - 0.5
        axes.xaxis.set(major_locator=MaxNLocator(6, integer=True), major_formatter=StrMethodFormatter("{x:,.0f}"))
        axes.plot([(low + high) / 2 - 2, (low + high) / 2 + 2], [0, 0], alpha=0)  # the axis is no shorter than this
    counts, _ = np.histogram(numbers, edges)
    axes.stairs(counts, edges, fill=True, color="C0", alpha=0.8)
    if counts.max() > 100 * counts[counts > 0].min():
        axes.set_yscale("log")
        unit += ", logarithmic"
    else:
        axes.yaxis.set(major_locator=MaxNLocator(5, integer=True), major_formatter=StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel(unit, fontsize=9)
    for number, (name, value) in enumerate(budgets.items(), 1):
        if low / 2 <= value <= 2 * high:
            axes.axvline(value, color=f"C{number}", linestyle="--", label=f"{name}: {value:,}")
        else:
            axes.plot([], [], " ", label=f"{name}: {value:,}, off the axis")
    axes.tick_params(labelsize=8)
    if budgets:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, fontsize=8, frameon=False)
