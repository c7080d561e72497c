"""Converted checkpoints in orbax, and one door for every kind of checkpoint folder.

Layout of a converted checkpoint:

    FOLDER/params/   the parameter tree, written by orbax; restores straight onto a mesh
    FOLDER/hf/       config.json, tokenizer, processor and template files of the checkpoint it came from

`load_model` also takes a Hugging Face folder, and the folder of a training run: the one under export/, or, while the
run has none, the parameters of its newest training state (see checkpoint.state), optimizer moments left on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml

from r1vl_jax.checkpoint.folder import copy_companions, new_folder
from r1vl_jax.checkpoint.hf import cast, load_hf
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import ModelConfig, load_config
from r1vl_jax.model.spec import param_spec
from r1vl_jax.types import is_spec


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """Where a checkpoint's parts lie.

    Attributes:
      weights: the folder with the safetensors ("hf"), with params/ ("converted"), or of a TrainState ("state").
      files: the folder with config.json, tokenizer and processor files.
      note: what people should know about the choice; "" where there was none.
    """

    weights: Path
    files: Path
    kind: Literal["hf", "converted", "state"]
    note: str = ""


_STAGES = ("sft", "step_grpo")  # in the order in which a run takes them


def find_model(folder: str | Path) -> ModelFolder:
    """Recognises a checkpoint folder of any kind. Raises CheckpointError that says what was expected."""
    folder = Path(folder).absolute()
    if (folder / "params").is_dir() and (folder / "hf" / "config.json").is_file():
        return ModelFolder(folder, folder / "hf", "converted")
    for place in (folder, folder / "export"):
        if (place / "config.json").is_file():
            return ModelFolder(place, place, "hf")
    states = [found for stage in _STAGES if (found := _newest_state(folder / "checkpoints" / stage))]
    if states and (folder / "config.yaml").is_file():
        stage, step = states[-1].parts[-3:-1]
        note = f"{folder}: this run has not finished; the parameters are those of {stage} step {step}"
        return ModelFolder(states[-1], _files_of_run(folder / "config.yaml"), "state", note)
    problem = "no such folder" if not folder.is_dir() else "not a checkpoint"
    raise CheckpointError(
        f"{folder}: {problem}; expected a Hugging Face folder (config.json and safetensors), a converted checkpoint "
        "(params/ and hf/) or the folder of a training run with export/ or checkpoints/"
    )


def _newest_state(folder: Path) -> Path | None:
    """The TrainState of a stage's newest step: orbax gives a step its bare number as name when it is complete."""
    steps = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal() and (path / "state").is_dir()]
    return folder / str(max(steps)) / "state" if steps else None


def _files_of_run(config: Path) -> Path:
    """The files that a run's parameters go with: those of the checkpoint it started from."""
    try:
        start = Path(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["path"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{config}: says no model.path, expected the configuration of a run ({error})") from error
    try:
        return find_model(start).files
    except CheckpointError as error:
        raise CheckpointError(f"{config}: model.path, where the run started: {error}") from error


def load_model(
    folder: str | Path | ModelFolder,
    *,
    dtype: Any = None,
    shardings: Callable[[ModelConfig], Any] | None = None,
    on_tensor: Callable[[str], None] | None = None,
) -> tuple[Any, ModelConfig, Path]:
    """Reads any kind of checkpoint.

    Args:
      folder: see `find_model`; or what that returned.
      dtype: what to convert to; None keeps each parameter's own.
      shardings: gives the tree of NamedSharding for a config, for example
        `lambda cfg: param_shardings(param_spec(cfg), mesh)`; without it the arrays are NumPy's and on the host.
      on_tensor: called with the name of every tensor that has been read (Hugging Face folders only).
    Returns:
      (params, cfg, the folder with config.json and the tokenizer's files).
    Raises:
      CheckpointError, see `find_model`, `load_config`, `load_hf` and `load_params`.
    """
    found = folder if isinstance(folder, ModelFolder) else find_model(folder)
    cfg = load_config(found.files)
    places = None if shardings is None else shardings(cfg)
    if found.kind == "converted":
        return load_params(found.weights, cfg, dtype=dtype, shardings=places), cfg, found.files
    if found.kind == "state":
        return _restore(found.weights, cfg, dtype=dtype, shardings=places, part="params"), cfg, found.files
    return load_hf(found.weights, cfg, dtype=dtype, shardings=places, on_tensor=on_tensor), cfg, found.files


def save_params(folder: str | Path, params: Any, source: str | Path, *, overwrite: bool = False) -> None:
    """Writes a converted checkpoint, as a whole or not at all; dtypes stay as they are.

    Args:
      folder: new or empty; with `overwrite` an old checkpoint too (see checkpoint.folder).
      params: the tree of `param_spec`, host or device arrays, sharded or not.
      source: a folder with the config.json, tokenizer, processor and template files to take along, byte for byte.
    """
    with new_folder(folder, overwrite) as temporary:
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
    return _restore(Path(folder).absolute() / "params", cfg, dtype=dtype, shardings=shardings)


def _restore(folder: Path, cfg: ModelConfig, *, dtype: Any, shardings: Any, part: str | None = None) -> Any:
    """The parameters in an orbax folder that holds their tree, or holds it as one `part` of a larger one."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            stored = ocp.PyTreeCheckpointHandler().metadata(folder).tree
            stored = stored if part is None else stored[part]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder}: not an orbax checkpoint, or damaged ({error})") from error
        _check(folder, stored, cfg)
        args = jax.tree.map(lambda meta: _restore_args(meta, None, dtype), stored)
        if shardings is not None:
            args = jax.tree.map(lambda meta, place: _restore_args(meta, place, dtype), stored, shardings)
        wanted = {"restore_args": args}
        if part is not None:  # what `item` leaves out stays on disk
            shapes = jax.tree.map(lambda meta: jax.ShapeDtypeStruct(meta.shape, meta.dtype), stored)
            wanted = {"item": {part: shapes}, "restore_args": {part: args}, "partial_restore": True}
        try:
            params = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(**wanted))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    params = params if part is None else params[part]
    if shardings is None and dtype is not None:
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: cast(leaf, np.dtype(dtype), jax.tree_util.keystr(path)), params
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
        raise CheckpointError(f"{folder}: parameters are not those that config.json describes; {lists}")
