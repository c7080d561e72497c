"""Measures the host memory of from-hf, of a training run's load onto a mesh, and of to-hf.

    python scripts/bench_memory.py --size 2b FOLDER

Writes a random checkpoint to FOLDER/hf, converts it to FOLDER/orbax and back to FOLDER/back, checks that the weights
are the same, and loads both onto a mesh of four CPU devices (fsdp 2, tensor 2). Prints each step's peak of resident
memory, less what the process had before, and the bound: two of the checkpoint's files, and what the devices hold, which
on CPUs is host memory. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import bench_common  # noqa: E402 (jax reads the environment when it is imported)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from bench_common import table  # noqa: E402

from r1vl_jax.checkpoint import arrays, orbax_files  # noqa: E402
from r1vl_jax.checkpoint.checksums import checksums  # noqa: E402
from r1vl_jax.checkpoint.hf import save_hf  # noqa: E402
from r1vl_jax.checkpoint.hf_files import open_hf  # noqa: E402
from r1vl_jax.checkpoint.store import load_model  # noqa: E402
from r1vl_jax.convert import convert  # noqa: E402
from r1vl_jax.model.config import parse_config  # noqa: E402
from r1vl_jax.model.spec import num_params, param_spec, tree_map_spec  # noqa: E402
from r1vl_jax.parallel.sharding import make_mesh, param_shardings  # noqa: E402

# The layers of the 7B with a seventh of its width, and the models of bench_common.py.
_SMALL = bench_common.raw_config(512, 2688, 28, 4, 2, 19008, False, (32, 160, 4))
SIZES = {"small": _SMALL} | {name: size.raw for name, size in bench_common.SIZES.items()}


class RandomArray:
    """A parameter of random numbers, made when they are read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, np.dtype(jnp.bfloat16)

    def __getitem__(self, index: int | slice) -> np.ndarray:
        shape = self.shape if isinstance(index, slice) else self.shape[1:]
        values = np.random.default_rng(index if isinstance(index, int) else None).standard_normal(shape, np.float32)
        return (values * 0.02).astype(self.dtype)


def write_random(folder: Path, raw: dict[str, Any], shard_bytes: float) -> None:
    """Writes a checkpoint of the model that the config.json `raw` describes."""
    cfg = parse_config(raw)
    with tempfile.TemporaryDirectory() as source:
        (Path(source) / "config.json").write_text(json.dumps(raw))
        params = tree_map_spec(lambda spec: RandomArray(spec.shape), param_spec(cfg))
        save_hf(params, cfg, folder, source=source, max_shard_bytes=shard_bytes, overwrite=True)


def load(folder: Path) -> None:
    """Loads the weights as `train` does: in float32, onto a mesh."""
    mesh = make_mesh(data=1, fsdp=2, tensor=2)
    load_model(folder, dtype="float32", shardings=lambda cfg: param_shardings(param_spec(cfg), mesh))


def memory(key: str) -> int:
    """Returns the bytes of resident memory: VmRSS, now; VmHWM, the peak since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Returns memory that is free to the system, and lets the peak begin anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def run(folder: Path, raw: dict[str, Any], shard_bytes: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each step: its name, peak and bound in bytes, seconds."""
    write_random(folder / "hf", raw, shard_bytes)
    two = 2 * max(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
    cfg = parse_config(raw)
    on_devices = 4 * num_params(cfg)
    for name, step, bound in (
        ("from-hf", lambda: convert("from-hf", folder / "hf", folder / "orbax"), two),
        ("to-hf", lambda: convert("to-hf", folder / "orbax", folder / "back"), two),
        ("load hf", lambda: load(folder / "hf"), two + on_devices),
        ("load orbax", lambda: load(folder / "orbax"), two + on_devices),
    ):
        forget_peak()
        before, start = memory("VmRSS"), time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        yield {"step": name, "peak": memory("VmHWM") - before, "bound": bound, "seconds": seconds}
    if checksums(open_hf(folder / "hf", cfg)) != checksums(open_hf(folder / "back", cfg)):
        raise SystemExit("the weights did not come back as they were")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="an empty folder for the checkpoints")
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--shard-bytes", type=float, default=4e9, help="size of the checkpoint's files")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # a tiny model first: libraries and small programs are loaded
        list(run(Path(folder), bench_common.SIZES["tiny"].raw, 1e6))
    if args.size == "small":  # smaller than the parts in which large models are read
        arrays.BLOCK_BYTES, orbax_files.CHUNK_BYTES = 4e6, 2**20
    rows = list(run(args.folder, SIZES[args.size] | {"torch_dtype": "bfloat16"}, args.shard_bytes))
    if args.json:
        print(json.dumps(rows))
        return
    cells = [
        (row["step"], f"{row['peak'] / 1e9:.2f}", f"{row['bound'] / 1e9:.2f}", f"{row['seconds']:.0f}") for row in rows
    ]
    print(table([("", "peak, GB", "bound, GB", "seconds"), *cells]))


if __name__ == "__main__":
    main()
