"""How fast rows and images come: `python scripts/bench_data.py` (about three minutes; --help).

    index    a Mulberry-shaped JSON array of 260,000 rows: seconds and peak memory to index it, time to read a row;
             beside json.load of the same file
    load     images of 400 x 300 from files to padded batches: images a second with threads, and with worker
             processes; beside the image processor of transformers, which makes patches and no more

Each measurement is a process of its own. Figures are medians of --repeats.
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
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from r1vl_jax.common.arguments import positive_int

WORDS = ("the", "of", "and", "triangle", "circle", "angle", "equal", "length", "figure", "since", "so", "we", "have")
BATCH, MICRO = 64, 16


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + "."


def answer(rng: random.Random) -> str:
    """As long as Mulberry's are, some 400 tokens, with a character that is not ASCII here and there."""
    steps = "\n\n".join(f"### Step {k}:\n{sentence(rng, 40)}" for k in range(1, 5))
    return (
        f"### Image Description:\n{sentence(rng, 80)}\n\n### Rationales:\n{sentence(rng, 60)}\n\n"
        f"### Let's think step by step.\n\n{steps}\n\n### The final answer is: {rng.randrange(180)}\u00b0"
    )


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_rows(folder: Path, count: int) -> Path:
    """The published layout: one array, indented, and an image file a row (links to a thousand small ones)."""
    rng = random.Random(0)
    pictures = [encoded(Image.new("RGB", (56, 56), tuple(rng.randbytes(3))), "PNG") for _ in range(1000)]
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


def write_pictures(folder: Path, count: int, format: str) -> Path:
    """Rows on different pictures of 400 x 300 that look like photographs: smooth, with some noise."""
    rng, draw = random.Random(1), np.random.default_rng(1)
    folder.mkdir()
    rows = []
    for i in range(count):
        smooth = Image.fromarray(draw.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((400, 300), 3)
        noisy = np.clip(np.asarray(smooth, np.int16) + draw.integers(-4, 5, (300, 400, 3)), 0, 255).astype(np.uint8)
        name = f"{i}.{format.lower()}"
        (folder / name).write_bytes(encoded(Image.fromarray(noisy), format))
        user = {"role": "user", "content": f"<image>Question: {sentence(rng, 30)}"}
        rows.append({"messages": [user, {"role": "assistant", "content": answer(rng)}], "images": name})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def write_checkpoint(folder: Path) -> Path:
    """Tokenizer and processor files, no weights."""
    from r1vl_jax.shapes.tokenizer import train_tokenizer, write_checkpoint_files

    rng = random.Random(2)
    write_checkpoint_files(folder, train_tokenizer([answer(rng) for _ in range(200)], folder))
    return folder


# What is measured; each runs in a process of its own and prints one JSON object.


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure_index(path: str) -> dict:
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


def measure_json_load(path: str) -> dict:
    before, started = peak_mb(), time.perf_counter()
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    return {
        "rows": len(rows), "seconds": time.perf_counter() - started, "peak_mb": peak_mb(), "before_mb": before
    }  # fmt: skip


def measure_load(path: str, checkpoint: str, workers: int, batches: int) -> dict:
    """From files to padded batches of images, prompts and answers; what comes before the first batch is left out."""
    from r1vl_jax.data.batching import by_length, collate_pairs, size_of
    from r1vl_jax.data.buckets import Buckets
    from r1vl_jax.data.loader import Loader
    from r1vl_jax.data.sources import JsonSource
    from r1vl_jax.processing.processor import Processor

    def size(pair):
        return size_of(*pair)

    def make(rows):
        parts = by_length([pair for _, pair in rows], MICRO, size)
        return [collate_pairs(part, Buckets(128)) for part in parts]

    encode = Processor.from_folder(checkpoint, max_pixels=589_824).encode_pair
    with Loader(JsonSource(path), encode, count=BATCH, seed=0, make=make, workers=workers) as loader:
        loader.take()
        started = time.perf_counter()
        patches = sum(int((prompts.segment_WP >= 0).sum()) for _ in range(batches) for prompts, *_ in loader.take())
        seconds = time.perf_counter() - started
    return {"images_per_second": batches * BATCH / seconds, "patches_per_image": patches / (batches * BATCH)}


def measure_peer(path: str, checkpoint: str, images: int) -> dict:
    """transformers' own image processor, without torch: one image after the other, to patches and no further."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    files = sorted(Path(path).parent.glob("*.[pj]*g"))[:images]
    started = time.perf_counter()
    for file in files:
        processor(images=Image.open(file).convert("RGB"), return_tensors="np")
    return {"images_per_second": len(files) / (time.perf_counter() - started)}


def measured(name: str, *arguments, repeats: int) -> dict:
    """Medians of a measurement's figures."""
    found = []
    for _ in tqdm(range(repeats), desc=f"{name} {arguments[-2] if name == 'load' else ''}".strip(), leave=False):
        command = [sys.executable, __file__, "--measure", json.dumps([name, *map(str, arguments)])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def run_measurement(text: str) -> None:
    name, *arguments = json.loads(text)
    measure = {
        "index": measure_index,
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
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and no table")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return run_measurement(arguments.measure)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = write_rows(folder / "mulberry", arguments.rows)
        size = rows.stat().st_size / 1e6
        again = partial(measured, repeats=arguments.repeats)
        index, non_negative_int = again("index", rows), again("json.load", rows)
        checkpoint = write_checkpoint(folder / "checkpoint")
        loads = {}
        for format in ("PNG", "JPEG"):
            pictures = write_pictures(folder / format, 512, format)
            found = {"transformers": again("peer", pictures, checkpoint, 200)}
            for workers in arguments.workers:
                label = f"{workers} worker{'s'[: workers != 1]}" if workers else "threads"
                found[label] = again("load", pictures, checkpoint, workers, arguments.batches)
            loads[format] = found
    machine = f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("grain", "pillow", "numpy", "transformers"))
    about = {"machine": machine, "versions": versions, "date": str(datetime.date.today()), "file_mb": size}
    if arguments.json:
        print(json.dumps(about | {"index": index, "json.load": non_negative_int, "load": loads}, indent=1))
        return
    print(f"{machine}; {versions}; {about['date']}; medians of {arguments.repeats}\n")
    print(f"{index['rows']:,.0f} rows, {size:,.0f} MB           seconds   peak MB (before)     a row, ms   99%")
    for name, found in (("JsonSource", index), ("json.load", non_negative_int)):
        row = f"{found['row_ms']:13.3f} {found['row_ms_p99']:5.3f}" if "row_ms" in found else ""
        print(f"{name:32}{found['seconds']:8.1f} {found['peak_mb']:9,.0f} ({found['before_mb']:,.0f}) {row:>22}")
    print("\nimages of 400 x 300 a second          PNG    JPEG")
    for label in loads["PNG"]:
        name = "transformers: patches only" if label == "transformers" else f"to batches: {label}"
        print(f"{name:34}" + "".join(f"{loads[format][label]['images_per_second']:8.0f}" for format in loads))


if __name__ == "__main__":
    main()
