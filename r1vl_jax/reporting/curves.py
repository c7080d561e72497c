"""Turns the metrics.jsonl of a run folder into curves.png and a table of held-out results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r1vl_jax.common.files import read_json_lines

if TYPE_CHECKING:  # matplotlib is loaded when something is drawn
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class Panel:
    """The content of one panel: metrics by name, of one stage or of all, on a linear or logarithmic scale."""

    title: str
    names: tuple[str, ...]
    stage: str | None = None
    scale: str = "linear"


PANELS = (
    Panel("warm-up: loss", ("loss",), "sft", "log"),
    Panel("reward", ("reward", "accuracy", "validity")),
    Panel("share of answers", ("correct", "key_steps", "truncated")),
    Panel("tokens per second", ("tokens_per_second",)),
    # No panel for the loss of StepGRPO: on policy its value is beta times this one.
    Panel("KL to the reference, per token", ("kl",)),
    Panel("StepGRPO: share of groups", ("zero_variance", "shaping_alone")),
    Panel("answer length in tokens", ("length", "length_max")),
    Panel("entropy, per token", ("entropy",)),
    Panel("gradient norm", ("grad_norm",), scale="log"),
)
SMOOTHED_FROM = 60  # steps; a longer curve is drawn pale, under its running mean


def read_metrics(folder: str | Path) -> list[dict]:
    """Returns the rows of metrics.jsonl; an empty list if there are none yet."""
    return list(read_json_lines(Path(folder) / "metrics.jsonl"))


def plot_metrics(folder: str | Path) -> Path:
    """Draws the curves of all stages side by side; held-out results are dots. Returns the picture's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    lengths: dict[str, int] = {}
    for row in rows:
        lengths[row["stage"]] = max(row["step"], lengths.get(row["stage"], 1))
    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(3, 3).flat, PANELS, strict=True):
        _draw(axes, panel, rows, lengths)
    if any(row.get("event") == "heldout" for row in rows):
        figure.supxlabel("dots: held-out questions, answered greedily", fontsize=9, color="0.4")
    path = Path(folder) / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def _draw(axes: Axes, panel: Panel, rows: list[dict[str, Any]], lengths: dict[str, int]) -> None:
    """Draws one panel. Every stage is one unit wide, whatever its number of steps."""
    stages = list(lengths)
    shown: set[int] = set()
    positive = False
    for number, name in enumerate(panel.names):
        for place, stage in enumerate(stages):
            of_stage = [row for row in rows if row["stage"] == stage and row.get(name) is not None]
            if of_stage and panel.stage in (None, stage):
                shown.add(place)
                positive |= any(row[name] > 0 for row in of_stage)
                _curve(axes, of_stage, name, f"C{number}", place, lengths[stage])
        if len(panel.names) > 1:
            axes.plot([], [], color=f"C{number}", linewidth=1.8, label=name.replace("_", " "))
    axes.set_title(panel.title, fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not shown:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color="0.6")
        return
    if panel.scale == "log" and positive:
        axes.set_yscale("log")
    _stage_ticks(axes, range(min(shown), max(shown) + 1), stages, lengths)
    axes.grid(alpha=0.2)
    if len(panel.names) > 1:
        axes.legend(fontsize=8, frameon=False)


def _curve(axes: Axes, rows: list[dict[str, Any]], name: str, colour: str, place: int, length: int) -> None:
    """Draws one metric of one stage: steps as a line, held-out rows as dots."""
    for heldout in (False, True):
        points = [(row["step"], row[name]) for row in rows if (row.get("event") == "heldout") == heldout]
        if not points:
            continue
        steps, values = np.array(points, float).T
        x = place + steps / length
        if heldout:
            axes.plot(x, values, "o", color=colour, markersize=7, markeredgecolor="white", zorder=3)
            continue
        long = len(x) >= SMOOTHED_FROM
        axes.plot(x, values, color=colour, linewidth=1.2, alpha=0.25 if long else 1)
        if long:
            axes.plot(x, _running_mean(values, len(x) // 20), color=colour, linewidth=1.8)


def _stage_ticks(axes: Axes, places: range, stages: list[str], lengths: dict[str, int]) -> None:
    """Draws ticks in each stage's own steps, the stage's name below the ticks, and a line between stages."""
    halves = [(place + part, round(part * lengths[stages[place]])) for place in places for part in (0.5, 1)]
    ticks = [(places[0], 0), *halves]
    axes.set_xticks([x for x, _ in ticks], [str(step) for _, step in ticks], fontsize=8)
    axes.set_xlabel("   |   ".join(f"{stages[place]} step" for place in places), fontsize=9)
    axes.set_xlim(places[0] - 0.04, places[-1] + 1.04)
    for place in places[1:]:
        axes.axvline(place, color="0.6", linewidth=1, zorder=0)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean over a window around each point; the window is shorter at both ends."""
    kernel = np.ones(width + 1 - width % 2)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def heldout_table(folder: str | Path) -> str:
    """Returns the held-out results of a run as a text table; an empty string if there are none."""
    rows = [row for row in read_metrics(folder) if row.get("event") == "heldout"]
    names = {"reward": "reward", "correct": "answers right", "validity": "valid", "key_steps": "key steps"}
    if not rows:
        return ""
    lines = [f"{'held out, greedy':24}" + "".join(f"{title:>15}" for title in names.values())]
    for row in rows:
        place = f"after {row['stage']} {row['step']}" if row["step"] else "before training"
        cells = [f"{row[name]:15.3f}" if name == "reward" else f"{row[name]:15.1%}" for name in names]
        lines.append(f"{place:24}" + "".join(cells))
    return "\n".join(lines)
