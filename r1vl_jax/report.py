"""curves.png of a run folder, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

PANELS = {
    "reward": ("reward", "accuracy", "validity"),
    "answers": ("correct", "key_steps", "truncated", "zero_variance"),
    "loss": ("loss",),
    "KL to the reference": ("kl",),
    "entropy": ("entropy",),
    "answer length in tokens": ("length", "length_max"),
    "gradient norm": ("grad_norm",),
    "tokens per second": ("tokens_per_second",),
}


def read_metrics(folder: str | Path) -> list[dict]:
    """The rows of metrics.jsonl, empty where there are none yet."""
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot_metrics(folder: str | Path) -> Path:
    """Draws the curves of all stages behind each other; held-out judgements are dots. Returns the picture's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    offsets, end = {}, 0
    for stage in stages:
        offsets[stage] = end
        end += max(row["step"] for row in rows if row["stage"] == stage)
    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(2, 4).flat, PANELS.items(), strict=True):
        for name in names:
            _draw(axes, rows, name, offsets)
        for stage in stages[1:]:
            axes.axvline(offsets[stage], color="0.8", linewidth=1, zorder=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(" | ".join(stages) + " step", fontsize=8)
        axes.grid(alpha=0.2)
        if len(axes.get_lines()) > len(stages[1:]):
            axes.legend(fontsize=7)
    path = Path(folder) / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def _draw(axes, rows: list[dict], name: str, offsets: dict[str, int]) -> None:
    def points(heldout: bool):
        return [
            (offsets[row["stage"]] + row["step"], row[name])
            for row in rows
            if name in row and (row.get("event") == "heldout") == heldout
        ]

    steps, dots = points(False), points(True)
    if steps:
        colour = axes.plot(*zip(*steps, strict=True), linewidth=1, label=name)[0].get_color()
    else:
        colour = axes._get_lines.get_next_color()
    if dots:
        axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=5, label=f"{name}, held out")


def heldout_table(folder: str | Path) -> str:
    """The held-out judgements of a run as a table of text, empty where there are none."""
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
