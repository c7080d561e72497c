"""Draws check.png: a column per data set, with a histogram for each series of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from r1vl_jax.data_check.numbers import values
from r1vl_jax.data_check.records import Survey

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# For each series (see numbers.py): the label of the x axis, and that of the y axis.
PANELS = {
    "prompt_tokens": ("prompt tokens of an example, image tokens among them", "examples"),
    "answer_tokens": ("answer tokens of an example", "examples"),
    "image_tokens": ("image tokens of an example", "examples"),
    "pixels": ("pixels of an image file, width x height", "images"),
}
BARS = 40


def plot(surveys: Sequence[Survey], path: Path) -> None:
    """Draws the histograms and writes them to a PNG file. Budgets are dashed lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: it takes a while to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(surveys), 11), layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subfigures(1, len(surveys), squeeze=False)[0]
    for column, survey in zip(columns, surveys, strict=True):
        column.suptitle(f"{survey.part.key}: {len(survey.records):,} examples", fontsize=12)
        for axes, series in zip(column.subplots(len(PANELS), 1), PANELS, strict=True):
            _draw(axes, values(survey, series), series, survey.part.budgets.get(series, {}))
    figure.savefig(path, dpi=100)


def _draw(axes: Axes, numbers: np.ndarray, series: str, budgets: dict[str, int]) -> None:
    """Draws one histogram, with the budgets as a legend above it."""
    label, unit = PANELS[series]
    axes.set_xlabel(label, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not len(numbers):
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"{label}: none", transform=axes.transAxes, ha="center", color="0.6", fontsize=9)
        return
    _draw_bars(axes, numbers, unit, logarithmic=series == "pixels")
    low, high = int(numbers.min()), int(numbers.max())
    for number, (name, value) in enumerate(budgets.items(), 1):
        if low / 2 <= value <= 2 * high:
            axes.axvline(value, color=f"C{number}", linestyle="--", label=f"{name}: {value:,}")
        else:  # only in the legend, because a line so far away would squeeze the bars
            axes.plot([], [], " ", label=f"{name}: {value:,}, off the axis")
    axes.tick_params(labelsize=8)
    if budgets:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, fontsize=8, frameon=False)


def _draw_bars(axes: Axes, numbers: np.ndarray, unit: str, *, logarithmic: bool) -> None:
    """Draws the bars and both axes.

    Args:
      logarithmic: whether the x axis is logarithmic. The y axis is logarithmic if the counts differ much.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    low, high = int(numbers.min()), int(numbers.max())
    if logarithmic:
        edges = np.geomspace(max(1, low) / 1.6, high * 1.6, BARS + 1)
        axes.set_xscale("log")
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        width = -(-(high - low + 1) // BARS)  # each bar covers the same number of integers
        edges = np.arange(low, high + width + 1, width) - 0.5
        axes.xaxis.set(major_locator=MaxNLocator(6, integer=True), major_formatter=StrMethodFormatter("{x:,.0f}"))
        # An invisible line of 4 units, so that the x axis is at least 4 units long.
        axes.plot([(low + high) / 2 - 2, (low + high) / 2 + 2], [0, 0], alpha=0)
    counts, _ = np.histogram(numbers, edges)
    axes.stairs(counts, edges, fill=True, color="C0", alpha=0.8)
    if counts.max() > 100 * counts[counts > 0].min():
        axes.set_yscale("log")
        unit += ", logarithmic"
    else:
        axes.yaxis.set(major_locator=MaxNLocator(5, integer=True), major_formatter=StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel(unit, fontsize=9)
