"""Converted checkpoints in orbax, and one door for every kind of checkpoint folder.

Layout of a converted checkpoint:

    FOLDER/params/   the parameter tree, written by orbax; restores straight onto a mesh
    FOLDER/hf/       config.json, tokenizer, processor and template files of the checkpoint it came from

`load_model` also takes a Hugging Face folder, and a run folder that holds one under export/. The state of a training
run (optimizer, step) is not kept here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from r1vl_jax.checkpoint.folder import copy_companions, new_folder
from r1vl_jax.checkpoint.hf import cast, load_hf
from r1vl_jax.model.config import CheckpointError, ModelConfig, load_config
from r1vl_jax.model.spec import is_spec, param_spec


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """Where a checkpoint's parts lie: `weights` (orbax if `converted`, else safetensors) and `files` (config.json,
    tokenizer, processor)."""

    weights: Path
    files: Path
    converted: bool


def find_model(folder: str | Path) -> ModelFolder:
    """Recognises a checkpoint folder of any kind. Raises CheckpointError that says what was expected."""
    folder = Path(folder).absolute()
    if (folder / "params").is_dir() and (folder / "hf" / "config.json").is_file():
        return ModelFolder(folder, folder / "hf", True)
    for place in (folder, folder / "export"):
        if (place / "config.json").is_file():
            return ModelFolder(place, place, False)
    problem = "no such folder" if not folder.is_dir() else "not a checkpoint"
    raise CheckpointError(
        f"{folder}: {problem}; expected a Hugging Face folder (config.json and safetensors), a converted checkpoint "
        "(params/ and hf/) or a run folder with export/"
    )


def load_model(
    folder: str | Path,
    *,
    dtype: Any = None,
    shardings: Callable[[ModelConfig], Any] | None = None,
    on_tensor: Callable[[str], None] | None = None,
) -> tuple[Any, ModelConfig, Path]:
    """Reads any kind of checkpoint.

    Args:
      folder: see `find_model`.
      dtype: what to convert to; None keeps each parameter's own.
      shardings: gives the tree of NamedSharding for a config, for example
        `lambda cfg: param_shardings(param_spec(cfg), mesh)`; without it the arrays are NumPy's and on the host.
      on_tensor: called with the name of every tensor that has been read (Hugging Face folders only).
    Returns:
      (params, cfg, the folder with config.json and the tokenizer's files).
    Raises:
      CheckpointError, see `find_model`, `load_config`, `load_hf` and `load_params`.
    """
    found = find_model(folder)
    cfg = load_config(found.files)
    places = None if shardings is None else shardings(cfg)
    if found.converted:
        return load_params(found.weights, cfg, dtype=dtype, shardings=places), cfg, found.files
    return load_hf(found.weights, cfg, dtype=dtype, shardings=places, on_tensor=on_tensor), cfg, found.files


def save_params(folder: str | Path, params: Any, source: str | Path, *, overwrite: bool = False) -> None:
    """Writes a converted checkpoint, as a whole or not at all; dtypes stay as they are.

    Args:
      folder: new or empty; with `overwrite` an old checkpoint too (see checkpoint.folder).
      params: the tree of `param_spec`, host or device arrays, sharded or not.
      source: a folder with the config.json, tokenizer, processor and template files to take along, byte for byte.
    """
    with new_folder(folder, overwrite) as temporary:
        if jax.process_index() == 0:
            (temporary / "hf").mkdir()
            copy_companions(source, temporary / "hf")
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(temporary / "params", args=ocp.args.PyTreeSave(params))


def load_params(folder: str | Path, cfg: ModelConfig, *, dtype: Any = None, shardings: Any = None) -> Any:
    """Reads the parameters of a converted checkpoint.

    Args:
      folder: written by `save_params`.
      dtype: what to convert to; None keeps each parameter's own.
      shardings: a tree of NamedSharding: every device reads its own part; None gives NumPy arrays.
    Raises:
      CheckpointError where orbax cannot read the folder, or naming every parameter that is unknown, missing or
      misshaped.
    """
    folder = Path(folder).absolute() / "params"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            stored = checkpointer.metadata(folder).item_metadata.tree
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder}: not an orbax checkpoint, or damaged ({error})") from error
        _check(folder, stored, cfg)
        args = jax.tree.map(lambda meta: _restore_args(meta, None, dtype), stored)
        if shardings is not None:
            args = jax.tree.map(lambda meta, place: _restore_args(meta, place, dtype), stored, shardings)
        try:
            params = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=args))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    if shardings is None and dtype is not None:
        wanted = np.dtype(dtype)
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: cast(leaf, wanted, jax.tree_util.keystr(path)), params
        )
    return params


def _restore_args(meta, place, dtype):
    dtype = meta.dtype if dtype is None else np.dtype(dtype)
    if place is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=meta.dtype)
    return ocp.ArrayRestoreArgs(sharding=place, dtype=dtype, global_shape=meta.shape)


def _check(folder: Path, stored: Any, cfg: ModelConfig) -> None:
    def by_path(tree, is_leaf=None):
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    found, wanted = by_path(stored, lambda node: hasattr(node, "shape")), by_path(param_spec(cfg), is_spec)
    faults = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "misshaped": [
            f"{path} is {list(found[path])}, expected {list(wanted[path])}"
            for path in sorted(found.keys() & wanted.keys())
            if found[path] != wanted[path]
        ],
    }
    lists = "; ".join(f"{kind}: {', '.join(texts)}" for kind, texts in faults.items() if texts)
    if lists:
        raise CheckpointError(f"{folder}: parameters are not those that hf/config.json describes; {lists}")
