"""Prints the measurements of gpu_check.py as a table: `python scripts/gpu_check_table.py DIR/gpu_check.json`.

The floor is the best that the card's bandwidth and FLOP/s allow; the target is what we aim at. They are known for the
2B on an H100 and on an H200. R3's target is 90% of R2's value in the same run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GOALS: dict[str, dict[str, tuple[float | None, float]]] = {  # by card and row: (floor, target)
    "H100": {
        "R1": (43e3, 31e3),
        "R2": (80e3, 56e3),
        "R4": (3.8e3, 2.0e3),
        "T1": (2.45, 2.6),
        "T2": (None, 600),
        "S": (4.0, 5.0),
        "K": (3.0, 0.8 * 3.0),
    },
    "H200": {
        "R1": (62e3, 43e3),
        "R2": (114e3, 80e3),
        "R4": (5.4e3, 2.8e3),
        "T1": (2.45, 2.5),
        "T2": (None, 600),
        "S": (3.5, 4.4),
        "K": (4.3, 0.8 * 4.3),
    },
}
PEAK_GB = {"H100": 70}  # target of S
R3_SHARE, ROLLOUT_RATIO, STEP_RATIO = 0.9, 10, 2.5  # targets: of R2's value; against torch
LINE = "{:14}{:>10}  {:12}{:>9}{:>9}{:>34}{:>4}{:>6}{:>9}{:>11}"
HEADS = "", "measured", "unit", "floor", "target", "s: median (min to max)", "of", "MFU", "peak GB", "compile s"

Row = dict[str, Any]


def cell(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form or (",.0f" if value >= 1000 else ".4g"))


def lines(rows: dict[str, Row], card: str) -> Iterator[str]:
    """Yields the table. `card`: H100, H200, or anything else if no targets are known."""
    goals: dict[str, tuple[float | None, float]] = dict(GOALS.get(card, {}))
    if goals and "R2" in rows:
        goals["R3"] = None, R3_SHARE * rows["R2"]["value"]
    yield LINE.format(*HEADS)
    for name, row in rows.items():
        floor, target = goals.get(name, (None, None))
        seconds = f"{row['seconds']:.3g} ({row['min']:.3g} to {row['max']:.3g})"
        figures = cell(row.get("mfu"), ".0%"), cell(row["peak_gb"], ".1f"), cell(row["compile_s"], ".1f")
        measured = cell(row["value"]), row["unit"], cell(floor), cell(target)
        yield LINE.format(name, *measured, seconds, row["repeats"], *figures).rstrip()


def details(rows: dict[str, Row], card: str) -> Iterator[str]:
    """Yields figures that only some rows have, then our speed divided by that of transformers in the same run."""
    for name, row in rows.items():
        if "micro" in row:
            yield f"{name}: micro-batches of {row['micro']} questions, remat {row['remat']}"
        if "phases" in row:
            yield f"{name}: " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in row["phases"].items())
        if "extra_gb" in row:
            yield f"{name}: {row['extra_gb']:.2f} GB besides its inputs"
        if "reference" in row:
            yield f"{name}: the reference {row['reference']:.2f} TB/s"
        if name == "S" and card in PEAK_GB:
            yield f"S: peak {row['peak_gb']:.1f} GB (target: at most {PEAK_GB[card]})"
    for name in ("R1", "R4", "R2"):
        if name in rows and "torch rollout" in rows:
            ratio = rows[name]["value"] / rows["torch rollout"]["value"]
            yield f"rollout, {name} against torch: {ratio:.1f}x" + (f" (target {ROLLOUT_RATIO}x)" if card else "")
    if "T1" in rows and "torch step" in rows:
        ratio = rows["torch step"]["value"] * rows["T1"]["answers"] / rows["T1"]["value"]
        yield f"training step, T1 against torch: {ratio:.1f}x" + (f" (target {STEP_RATIO}x)" if card else "")


def report(result: dict[str, Any]) -> str:
    """Returns the table of the contents of gpu_check.json, or an empty string if nothing was measured."""
    rows = {row["name"]: row for row in result["rows"] if "unit" in row}
    if not rows:
        return ""
    cards = ", ".join(sorted({row["card"] for row in rows.values()}))
    known = next((card for card in GOALS if card in cards and result["size"] == "2b"), "")
    title = f"{result['size']}, {cards}, {result['date']}"
    return "\n".join([title, "", *lines(rows, known), "", *details(rows, known)])


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())))
