"""Writes converted checkpoints in orbax, and reads every kind of checkpoint folder (`load_model`).

Layout of a converted checkpoint:

    FOLDER/params/   the parameter tree, written by orbax; each device of a mesh reads its own part
    FOLDER/hf/       config.json, tokenizer, processor and template files of the original checkpoint

`load_model` also reads a Hugging Face folder and the folder of a training run. In the latter it reads export/ or, if
there is no export/ yet, the parameters in the newest training state (see checkpoint/state.py), without the optimizer's
moments.
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

from r1vl_jax.checkpoint.folder import ADAPTER_CONFIG, copy_companions, new_folder, verify_folder
from r1vl_jax.checkpoint.foreign import refuse_adapter
from r1vl_jax.checkpoint.hf import load_hf
from r1vl_jax.checkpoint.state import verify_part
from r1vl_jax.checkpoint.tensors import cast
from r1vl_jax.common.text import first_few, one_line
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import ModelConfig, load_config
from r1vl_jax.model.spec import param_spec
from r1vl_jax.types import is_spec


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """The location and the kind of a checkpoint.

    Attributes:
      weights: folder with the safetensors ("hf"), with params/ ("converted"), or of a TrainState ("state").
      files: folder with config.json, tokenizer and processor files.
      note: a line for the user about the choice of the weights; empty in most cases.
    """

    weights: Path
    files: Path
    kind: Literal["hf", "converted", "state"]
    note: str = ""


_STAGES = ("sft", "step_grpo")  # in the order in which a run trains them


def find_model(folder: str | Path) -> ModelFolder:
    """Determines the kind of checkpoint in a folder.

    Raises: CheckpointError, saying what was expected, if the folder has no checkpoint, or an adapter alone.
    """
    folder = Path(folder).absolute()
    if (folder / "params").is_dir() and (folder / "hf" / "config.json").is_file():
        return ModelFolder(folder, folder / "hf", "converted")
    if folder.name.isdecimal() and (folder / "state").is_dir() and (folder.parents[2] / "config.yaml").is_file():
        return ModelFolder(folder / "state", _files_of_run(folder.parents[2] / "config.yaml"), "state")
    for place in (folder, folder / "export"):
        refuse_adapter(place)
        if (place / "config.json").is_file():
            stale = (place / ADAPTER_CONFIG).is_file()
            note = f"{place}: {ADAPTER_CONFIG} is not read, only the weights beside it" if stale else ""
            return ModelFolder(place, place, "hf", note)
    states = [state for stage in _STAGES if (state := _newest_state(folder / "checkpoints" / stage))]
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
    """Returns the folder of the TrainState of a stage's newest step; None if there is none.

    orbax renames the folder of a step to the step's number when it is complete.
    """
    steps = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal() and (path / "state").is_dir()]
    return folder / str(max(steps)) / "state" if steps else None


def _files_of_run(config: Path) -> Path:
    """Returns the folder with config.json and tokenizer of the checkpoint that a run started from.

    Args:
      config: path of the run's config.yaml.
    """
    try:
        start = Path(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["path"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        why = one_line(error)
        raise CheckpointError(f"{config}: has no model.path, expected the configuration of a run ({why})") from error
    try:
        return find_model(start).files
    except CheckpointError as error:
        raise CheckpointError(f"{config}: model.path, where the run started: {error}") from error


def load_model(
    folder: str | Path | ModelFolder,
    *,
    dtype: Any = None,
    shardings: Callable[[ModelConfig], Any] | None = None,
    on_tensor: Callable[[str], object] | None = None,
) -> tuple[Any, ModelConfig, Path]:
    """Reads any kind of checkpoint.

    Args:
      folder: see `find_model`; or a ModelFolder that `find_model` returned.
      dtype: dtype to convert to; None keeps the dtype of each parameter.
      shardings: a function from a config to the tree of NamedSharding, for example `lambda cfg:
        param_shardings(param_spec(cfg), mesh)`. None: the arrays are NumPy's.
      on_tensor: called with the name of each tensor after it has been read (Hugging Face folders only).
    Returns: (params, cfg, the folder with config.json and the tokenizer's files).
    Raises: CheckpointError, see `find_model`, `load_config`, `load_hf` and `load_params`.
    """
    model = folder if isinstance(folder, ModelFolder) else find_model(folder)
    cfg = load_config(model.files)
    places = None if shardings is None else shardings(cfg)
    if model.kind == "state":
        return _load_state(model.weights, cfg, dtype=dtype, shardings=places), cfg, model.files
    verify_folder(model.weights, weights=True)
    if model.kind == "converted":
        return load_params(model.weights, cfg, dtype=dtype, shardings=places), cfg, model.files
    return load_hf(model.weights, cfg, dtype=dtype, shardings=places, on_tensor=on_tensor), cfg, model.files


def _load_state(folder: Path, cfg: ModelConfig, *, dtype: Any, shardings: Any) -> Any:
    """Returns the parameters of a train state, after their checksums were verified; `folder` is its folder `state`."""
    others = sorted(path.name for path in folder.parent.parent.glob("[0-9]*") if path != folder.parent)
    try:
        params = _restore(folder, cfg, dtype=None, shardings=shardings, part="params")
        verify_part(params, ".params", folder.parent / "host" / "metadata")
    except CheckpointError as error:
        hint = f"; other states are {first_few(others)} in {folder.parent.parent}" if others else ""
        raise CheckpointError(
            f"{folder}: {error}{hint}" if str(folder) not in str(error) else f"{error}{hint}"
        ) from error
    if dtype is None:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: cast(leaf, np.dtype(dtype), jax.tree_util.keystr(path)), params
    )


def save_params(folder: str | Path, params: Any, source: str | Path, *, overwrite: bool = False) -> None:
    """Writes a converted checkpoint to a temporary folder, which is then renamed to `folder`. Keeps dtypes.

    Args:
      folder: new or empty; with `overwrite` it may also contain an older checkpoint (see checkpoint/folder.py).
      params: the tree of `param_spec`; host or device arrays, sharded or not.
      source: a folder whose config.json, tokenizer, processor and template files are copied, byte for byte.
    """
    with new_folder(folder, overwrite) as temporary:
        (temporary / "hf").mkdir()
        copy_companions(source, temporary / "hf")
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(temporary / "params", args=ocp.args.PyTreeSave(params))


def load_params(folder: str | Path, cfg: ModelConfig, *, dtype: Any = None, shardings: Any = None) -> Any:
    """Reads the parameters of a converted checkpoint.

    Args:
      folder: a folder written by `save_params`.
      dtype: dtype to convert to; None keeps the dtype of each parameter.
      shardings: a tree of NamedSharding, and each device reads its own part; None: NumPy arrays are returned.
    Raises: CheckpointError if orbax cannot read the folder, or naming the parameters that are unknown, missing or of a
      wrong shape.
    """
    return _restore(Path(folder).absolute() / "params", cfg, dtype=dtype, shardings=shardings)


def _restore(folder: Path, cfg: ModelConfig, *, dtype: Any, shardings: Any, part: str | None = None) -> Any:
    """Reads the parameters in an orbax folder.

    Args:
      part: key of the parameters in the folder's tree; None: the parameters are the whole tree.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            # orbax is annotated with the path class of etils, but accepts any path.
            stored = ocp.PyTreeCheckpointHandler().metadata(folder).tree  # pyright: ignore[reportArgumentType]
            stored = stored if part is None else stored[part]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder}: not an orbax checkpoint, or damaged ({one_line(error)})") from error
        _check(folder, stored, cfg)
        args = jax.tree.map(lambda meta: _restore_args(meta, None, dtype), stored)
        if shardings is not None:
            args = jax.tree.map(lambda meta, place: _restore_args(meta, place, dtype), stored, shardings)
        options: dict[str, Any] = {"restore_args": args}
        if part is not None:  # orbax reads only the parts that `item` has
            shapes = jax.tree.map(lambda meta: jax.ShapeDtypeStruct(meta.shape, meta.dtype), stored)
            options = {"item": {part: shapes}, "restore_args": {part: args}, "partial_restore": True}
        try:
            params = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(**options))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: cannot be read ({one_line(error)})") from error
    params = params if part is None else params[part]
    if shardings is None and dtype is not None:
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: cast(leaf, np.dtype(dtype), jax.tree_util.keystr(path)), params
        )
    return params


def _restore_args(meta: Any, place: jax.sharding.Sharding | None, dtype: Any) -> ocp.RestoreArgs:
    """Returns the orbax arguments to restore one array. `meta`: orbax's metadata of the array."""
    dtype = meta.dtype if dtype is None else np.dtype(dtype)
    if place is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=meta.dtype)
    return ocp.ArrayRestoreArgs(sharding=place, dtype=dtype, global_shape=meta.shape)


def _check(folder: Path, stored: Any, cfg: ModelConfig) -> None:
    """Raises CheckpointError if the stored tree (metadata of arrays) is not that of `param_spec(cfg)`."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    actual, expected = shapes(stored), shapes(param_spec(cfg))
    faults = {
        "missing": sorted(expected.keys() - actual.keys()),
        "unknown": sorted(actual.keys() - expected.keys()),
        "misshaped": [
            f"{path} is {list(actual[path])}, expected {list(expected[path])}"
            for path in sorted(actual.keys() & expected.keys())
            if actual[path] != expected[path]
        ],
    }
    lists = "; ".join(f"{kind}: {first_few(texts)}" for kind, texts in faults.items() if texts)
    if lists:
        raise CheckpointError(f"{folder}: parameters are not those that config.json describes; {lists}")
