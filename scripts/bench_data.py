"""Measures how fast rows and images are read: `python scripts/bench_data.py` (about three minutes; --help).

    index    indexes a JSON array of 260,000 rows, like Mulberry-SFT: seconds, peak memory, and the time to read a row;
             compared with json.load of the same file
    load     reads images of 400 x 300 pixels from files to padded batches: images per second with threads, and with
             worker processes; compared with the image processor of transformers, which makes patches, not batches
    parquet  only with --parquet: opens a parquet file of --rows rows with images of 10 kB inside, in row groups of 100:
             seconds, peak memory, and the time to read a row in training's order and in the file's

Each measurement runs in its own process. The reported numbers are medians of --repeats.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from r1vl_jax.common.arguments import positive_int

if TYPE_CHECKING:
    from r1vl_jax.data.batching import Size
    from r1vl_jax.data.loader import Row
    from r1vl_jax.types import EncodedPrompt, Prompts

WORDS = ("the", "of", "and", "triangle", "circle", "angle", "equal", "length", "figure", "since", "so", "we", "have")
BATCH, MICRO = 64, 16
GROUP = 100  # rows of a row group, as the Hub writes files with images


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + "."


def answer(rng: random.Random) -> str:
    """Returns an answer as long as Mulberry's, about 400 tokens, with a character that is not ASCII."""
    steps = "\n\n".join(f"### Step {k}:\n{sentence(rng, 40)}" for k in range(1, 5))
    return (
        f"### Image Description:\n{sentence(rng, 80)}\n\n### Rationales:\n{sentence(rng, 60)}\n\n"
        f"### Let's think step by step.\n\n{steps}\n\n### The final answer is: {rng.randrange(180)}\u00b0"
    )


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_rows(folder: Path, count: int) -> Path:
    """Writes `count` rows in the published layout: one indented array, and an image file per row.

    The image files are hard links to a thousand small ones.
    """
    rng = random.Random(0)
    colours = [tuple(rng.randbytes(3)) for _ in range(1000)]
    pictures = [encoded(Image.new("RGB", (56, 56), colour), "PNG") for colour in colours]
    texts = [(sentence(rng, 30), answer(rng)) for _ in range(1000)]
    (folder / "small").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        (folder / "small" / f"{i}.png").write_bytes(picture)
    with open(folder / "rows.json", "w", encoding="utf-8") as file:
        for i in tqdm(range(count), desc="writing rows", leave=False):
            name = f"images/{i // 1000:03d}/{i:06d}.png"
            if i % 1000 == 0:
                (folder / name).parent.mkdir(parents=True)
            os.link(folder / "small" / f"{i % 1000}.png", folder / name)
            question, text = texts[i % 1000]
            user = {"role": "user", "content": f"<image>Question: {i} {question}"}
            row = {"messages": [user, {"role": "assistant", "content": text}], "images": name}
            file.write(("[\n" if i == 0 else ",\n") + json.dumps(row, ensure_ascii=False, indent=1))
        file.write("\n]\n")
    return folder / "rows.json"


def write_parquet(path: Path, count: int) -> Path:
    """Writes `count` rows for StepGRPO with a picture of noise (10 kB) inside, as the Hub's sets of geometry3k."""
    import pyarrow as pa  # not at the top: the time to import it belongs to the time to open a file
    import pyarrow.parquet as pq

    rng, draw = random.Random(0), np.random.default_rng(0)
    noise = (draw.integers(0, 256, (58, 58, 3), dtype=np.uint8) for _ in range(1000))
    pictures = [{"bytes": encoded(Image.fromarray(pixels), "PNG"), "path": None} for pixels in noise]
    texts = [(sentence(rng, 30), answer(rng)) for _ in range(1000)]
    rows = [
        {"images": [picture], "problem": text, "solution": solution, "key_steps": {"Steps": [[text[:20], "b"], ["c"]]}}
        for picture, (text, solution) in zip(pictures, texts, strict=True)
    ]
    with pq.ParquetWriter(path, pa.Table.from_pylist(rows).schema) as writer:
        for i in tqdm(range(0, count, GROUP), desc="writing parquet", leave=False):
            numbered = [rows[n % 1000] | {"problem": f"<image>{n} {texts[n % 1000][0]}"} for n in range(i, i + GROUP)]
            writer.write_table(pa.Table.from_pylist(numbered[: count - i]))
    return path


def write_pictures(folder: Path, count: int, format: str) -> Path:
    """Writes rows with different pictures of 400 x 300 pixels: smooth colours with some noise, like photographs."""
    rng, draw = random.Random(1), np.random.default_rng(1)
    folder.mkdir()
    rows = []
    for i in range(count):
        smooth = Image.fromarray(draw.integers(0, 256, (8, 10, 3), dtype=np.uint8))
        smooth = smooth.resize((400, 300), Image.Resampling.BICUBIC)
        noisy = np.clip(np.asarray(smooth, np.int16) + draw.integers(-4, 5, (300, 400, 3)), 0, 255).astype(np.uint8)
        name = f"{i}.{format.lower()}"
        (folder / name).write_bytes(encoded(Image.fromarray(noisy), format))
        user = {"role": "user", "content": f"<image>Question: {sentence(rng, 30)}"}
        rows.append({"messages": [user, {"role": "assistant", "content": answer(rng)}], "images": name})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def write_checkpoint(folder: Path) -> Path:
    """Writes a checkpoint folder with tokenizer and processor files, without weights."""
    from r1vl_jax.shapes.tokenizer import train_tokenizer, write_checkpoint_files

    rng = random.Random(2)
    write_checkpoint_files(folder, train_tokenizer([answer(rng) for _ in range(200)], folder))
    return folder


# The measurements. Each runs in its own process, which prints one JSON object.


def peak_mb() -> float:
    """Returns the peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure_index(path: str) -> dict[str, float]:
    from r1vl_jax.data.sources import JsonSource

    before, started = peak_mb(), time.perf_counter()
    source = JsonSource(path)
    seconds, places = time.perf_counter() - started, random.Random(0).sample(range(len(source)), min(5000, len(source)))
    times = []
    for place in places:
        started = time.perf_counter()
        example = source[place]
        times.append(time.perf_counter() - started)
        assert f"Question: {place} " in example.question and Path(example.images[0]).is_file()
    times.sort()
    return {
        "rows": len(source), "seconds": seconds, "peak_mb": peak_mb(), "before_mb": before,
        "row_ms": 1e3 * statistics.median(times), "row_ms_p99": 1e3 * times[int(0.99 * len(times))],
    }  # fmt: skip


def measure_parquet(path: str) -> dict[str, float]:
    from r1vl_jax.config import SourceSection
    from r1vl_jax.data.sources import open_source

    before, started = peak_mb(), time.perf_counter()
    source = open_source(SourceSection(path=path))
    seconds, peak = time.perf_counter() - started, peak_mb()

    def read(places: Sequence[int]) -> float:
        """Returns the milliseconds to read a row."""
        started = time.perf_counter()
        assert all(source[place].question.startswith(f"<image>{place} ") for place in places)
        return 1e3 * (time.perf_counter() - started) / len(places)

    count = min(2000, len(source))
    return {
        "rows": len(source), "seconds": seconds, "peak_mb": peak, "before_mb": before,
        "row_ms": read(random.Random(0).sample(range(len(source)), count)), "row_in_order_ms": read(range(count)),
    }  # fmt: skip


def measure_json_load(path: str) -> dict[str, float]:
    before, started = peak_mb(), time.perf_counter()
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    return {
        "rows": len(rows), "seconds": time.perf_counter() - started, "peak_mb": peak_mb(), "before_mb": before
    }  # fmt: skip


def measure_load(path: str, checkpoint: str, workers: int, batches: int) -> dict[str, float]:
    """Measures images per second from files to padded batches of images, prompts and answers, after the first batch."""
    from r1vl_jax.data.batching import by_length, collate_pairs, size_of
    from r1vl_jax.data.buckets import Buckets
    from r1vl_jax.data.loader import Loader
    from r1vl_jax.data.sources import JsonSource
    from r1vl_jax.processing.processor import Processor

    def size(pair: tuple[EncodedPrompt, np.ndarray]) -> Size:
        return size_of(*pair)

    def make(rows: list[Row]) -> list[tuple[Prompts, np.ndarray, np.ndarray, np.ndarray]]:
        parts = by_length([pair for _, pair in rows], MICRO, size)
        return [collate_pairs(part, Buckets(128)) for part in parts]

    encode = Processor.from_folder(checkpoint, max_pixels=589_824).encode_pair
    with Loader(JsonSource(path), encode, count=BATCH, seed=0, make=make, workers=workers) as loader:
        loader.take()
        started = time.perf_counter()
        patches = sum(int((prompts.segment_WP >= 0).sum()) for _ in range(batches) for prompts, *_ in loader.take())
        seconds = time.perf_counter() - started
    return {"images_per_second": batches * BATCH / seconds, "patches_per_image": patches / (batches * BATCH)}


def measure_peer(path: str, checkpoint: str, images: int) -> dict[str, float]:
    """Measures images per second to patches, one by one, with the image processor of transformers, without torch."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    files = sorted(Path(path).parent.glob("*.[pj]*g"))[:images]
    started = time.perf_counter()
    for file in files:
        processor(images=Image.open(file).convert("RGB"), return_tensors="np")
    return {"images_per_second": len(files) / (time.perf_counter() - started)}


def measured(name: str, *arguments: object, repeats: int) -> dict[str, float]:
    """Runs a measurement `repeats` times, each in a new process, and returns the medians of its numbers."""
    results = []
    for _ in tqdm(range(repeats), desc=f"{name} {arguments[-2] if name == 'load' else ''}".strip(), leave=False):
        command = [sys.executable, __file__, "--measure", json.dumps([name, *map(str, arguments)])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def run_measurement(text: str) -> None:
    """Runs one measurement and prints its numbers. `text`: a JSON list of the measurement's name and arguments."""
    name, *arguments = json.loads(text)
    measure = {
        "index": measure_index,
        "parquet": measure_parquet,
        "json.load": measure_json_load,
        "load": lambda path, folder, workers, batches: measure_load(path, folder, int(workers), int(batches)),
        "peer": lambda path, folder, images: measure_peer(path, folder, int(images)),
    }[name]
    print(json.dumps(measure(*arguments)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=positive_int, default=260_000, help="rows to index (default %(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="default %(default)s")
    parser.add_argument("--batches", type=positive_int, default=20, help=f"batches of {BATCH} (default %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="default 0 (threads), 1 and 2")
    parser.add_argument("--parquet", action="store_true", help="measure parquet, and nothing else")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and no table")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        run_measurement(arguments.measure)
        return
    with tempfile.TemporaryDirectory() as temporary:
        results = run_all(Path(temporary), arguments)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("grain", "pillow", "numpy", "transformers"))
    about = {
        "machine": f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
        "date": str(datetime.date.today()),
    }
    if arguments.json:
        print(json.dumps(about | results, indent=1))
    else:
        print(f"{about['machine']}; {versions}; {about['date']}; medians of {arguments.repeats}\n")
        print_tables(results)


def run_all(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the data into `folder` and runs all measurements, or that of --parquet."""
    if arguments.parquet:
        file = write_parquet(folder / "rows.parquet", arguments.rows)
        return {"file_mb": file.stat().st_size / 1e6, "parquet": measured("parquet", file, repeats=arguments.repeats)}
    rows = write_rows(folder / "mulberry", arguments.rows)
    again = partial(measured, repeats=arguments.repeats)
    results: dict[str, Any] = {
        "file_mb": rows.stat().st_size / 1e6,
        "index": again("index", rows),
        "json.load": again("json.load", rows),
        "load": {},
    }
    checkpoint = write_checkpoint(folder / "checkpoint")
    for format in ("PNG", "JPEG"):
        pictures = write_pictures(folder / format, 512, format)
        load = results["load"][format] = {"transformers": again("peer", pictures, checkpoint, 200)}
        for workers in arguments.workers:
            label = f"{workers} worker{'s'[: workers != 1]}" if workers else "threads"
            load[label] = again("load", pictures, checkpoint, workers, arguments.batches)
    return results


def print_tables(results: dict[str, Any]) -> None:
    """Prints the numbers as two tables, or those of --parquet as lines."""
    if found := results.get("parquet"):
        mb = f"peak {found['peak_mb']:,.0f} MB ({found['before_mb']:,.0f} before)"
        print(f"{found['rows']:,.0f} rows, {results['file_mb']:,.0f} MB: opened in {found['seconds']:.2f} s, {mb}")
        print(f"a row: {found['row_ms']:.2f} ms in random order, {found['row_in_order_ms']:.2f} ms in the file's")
        return
    index, loads = results["index"], results["load"]
    size = f"{index['rows']:,.0f} rows, {results['file_mb']:,.0f} MB"
    print(f"{size}           seconds   peak MB (before)     a row, ms   99%")
    for name, figures in (("JsonSource", index), ("json.load", results["json.load"])):
        row = f"{figures['row_ms']:13.3f} {figures['row_ms_p99']:5.3f}" if "row_ms" in figures else ""
        print(f"{name:32}{figures['seconds']:8.1f} {figures['peak_mb']:9,.0f} ({figures['before_mb']:,.0f}) {row:>22}")
    print("\nimages of 400 x 300 a second          PNG    JPEG")
    for label in loads["PNG"]:
        name = "transformers: patches only" if label == "transformers" else f"to batches: {label}"
        print(f"{name:34}" + "".join(f"{loads[format][label]['images_per_second']:8.0f}" for format in loads))


if __name__ == "__main__":
    main()
