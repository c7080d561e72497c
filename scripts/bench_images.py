"""Measures what it costs to notice images that change: `python scripts/bench_images.py` (a minute; --help).

Opens a JSON file of --rows rows, each with a file of --kb kB: without looking at the files; the first time, when all of
them are read, from the disk and from the system's cache; and again, when only their sizes and times are looked at. Then
it reads rows with and without a look at the file. Prints medians of --repeats, in one process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from r1vl_jax.common.arguments import positive_int
from r1vl_jax.common.files import cache_folder
from r1vl_jax.config import SourceSection
from r1vl_jax.data.sources import open_source


def write(folder: Path, count: int, size: int) -> Path:
    rng, rows = random.Random(0), []
    for i in range(count):
        name = f"{i // 1000:03d}/{i:06d}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(rng.randbytes(size))
        rows.append({"image_path": name, "problem": f"Question {i}", "solution": "3"})
    (folder / "rows.json").write_text(json.dumps(rows))
    os.sync()
    return folder / "rows.json"


def out_of_memory(folder: Path) -> None:
    """Asks the system to forget the contents of the files, so that they are read from the disk."""
    for file in folder.rglob("*.png"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive_int, default=20_000, help="default %(default)s")
    parser.add_argument("--kb", type=positive_int, default=20, help="kB of a file (default %(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="default %(default)s")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        section = SourceSection(path=str(write(folder, arguments.rows, 1000 * arguments.kb)))

        def add(name: str, watch: bool = True) -> None:
            found.setdefault(f"opened, {name}", []).append(seconds(lambda: open_source(section, watch_images=watch)))

        for _ in range(arguments.repeats):
            add("images not looked at", watch=False)
            for name in ("disk", "system's cache"):
                shutil.rmtree(cache_folder(), ignore_errors=True)
                if name == "disk":
                    out_of_memory(folder)
                add(f"first start, from the {name}")
            add("later start")
            for name, watch in (("not looked at", False), ("looked at", True)):
                source = open_source(section, watch_images=watch)
                places = random.Random(0).sample(range(len(source)), min(5000, len(source)))
                taken = seconds(lambda: [source[place] for place in places])  # noqa: B023 (called at once)
                found.setdefault(f"a row read, its image {name}", []).append(taken / len(places))
    print(f"{os.cpu_count()} x {platform.machine()}, {datetime.date.today()}, medians of {arguments.repeats}")
    for name, times in found.items():
        print(f"{name:50s} {1e3 * statistics.median(times):12.3f} ms")


if __name__ == "__main__":
    main()
