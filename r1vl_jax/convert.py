"""Converts checkpoints between the Hugging Face layout and orbax, bit for bit unless a dtype is given.

    python -m r1vl_jax.convert from-hf Qwen2-VL-2B-Instruct checkpoints/qwen2_vl_2b
    python -m r1vl_jax.convert to-hf checkpoints/qwen2_vl_2b exported --dtype bfloat16

Training and generation read both layouts. Parameters go tensor by tensor: no conversion needs a host that can hold the
model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from r1vl_jax.checkpoint.folder import check_destination
from r1vl_jax.checkpoint.hf import save_hf
from r1vl_jax.checkpoint.store import find_model, open_params, save_params
from r1vl_jax.checkpoint.tensors import tensor_names
from r1vl_jax.common.arguments import Parser
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import ModelConfig, load_config
from r1vl_jax.model.spec import num_params, param_spec
from r1vl_jax.types import is_spec

DTYPES = {name: np.dtype(getattr(jnp, name)) for name in ("float32", "bfloat16", "float16")}


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").partition("\n")[0]  # python -OO removes docstrings
    parser = Parser(prog="python -m r1vl_jax.convert", description=summary)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("from-hf", "safetensors to orbax: DST/params and DST/hf (config, tokenizer, processor files)"),
        ("to-hf", "to safetensors with a flat config.json, which transformers 4 and 5 and vLLM load"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "src",
            type=Path,
            help="a Hugging Face folder, a converted checkpoint, or a training run's folder: its export, or the newest "
            "checkpoint of a run that has not finished",
        )
        command.add_argument("dst", type=Path, help="the folder to write; it appears when it is complete")
        command.add_argument("--dtype", choices=DTYPES, help="convert every parameter (default: keep)")
        command.add_argument("--overwrite", action="store_true", help="replace the checkpoint that DST holds")
    return parser


def convert(command: str, src: Path, dst: Path, dtype: str | None = None, overwrite: bool = False) -> str:
    """Runs one conversion and returns a one-line summary.

    Args:
      command: "from-hf" or "to-hf".
      dtype: a name of DTYPES; None keeps the dtype of each parameter.
      overwrite: whether to replace the checkpoint in `dst`.
    Raises: CheckpointError if `src` cannot be read or `dst` may not be written to.
    """
    start = time.monotonic()
    inner, outer = src.resolve(), dst.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise CheckpointError(f"{dst}: source and destination must be separate folders, neither inside the other")
    model = find_model(src)
    files = model.files
    cfg = load_config(files)
    check_destination(dst, overwrite)
    if model.note:
        print(model.note, file=sys.stderr)
    to_dtype = None if dtype is None else DTYPES[dtype]
    params = open_params(model, cfg)
    with _bar(cfg) as bar:
        options: Any = {"dtype": to_dtype, "overwrite": overwrite, "on_tensor": lambda _: bar.update()}
        if command == "from-hf":
            save_params(dst, params, files, **options)
        else:
            save_hf(params, cfg, dst, source=files, **options)
    dtypes = Counter(str(to_dtype or leaf.dtype) for leaf in jax.tree.leaves(params))
    size = sum(path.stat().st_size for path in dst.rglob("*") if path.is_file())
    return (
        f"{dst}: {num_params(cfg):,} parameters, {' and '.join(sorted(dtypes))}, {size:,} bytes, "
        f"{time.monotonic() - start:.1f} s"
    )


def _bar(cfg: ModelConfig) -> tqdm:
    """Returns a progress bar over the tensors of a checkpoint."""
    tensors = sum(len(tensor_names(spec)) for spec in jax.tree.leaves(param_spec(cfg), is_leaf=is_spec))
    return tqdm(total=tensors, desc="converting", unit=" tensors", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 0, or 2 with one line on standard error."""
    args = _parser().parse_args(argv)
    try:
        print(convert(args.command, args.src, args.dst, args.dtype, args.overwrite))
    except (CheckpointError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # conversion computes nothing, so it leaves accelerators free
    sys.exit(main())
