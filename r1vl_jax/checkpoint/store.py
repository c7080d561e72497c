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

import yaml

from r1vl_jax.checkpoint.arrays import read_arrays
from r1vl_jax.checkpoint.folder import ADAPTER_CONFIG, copy_companions, new_folder, verify_folder
from r1vl_jax.checkpoint.foreign import refuse_adapter
from r1vl_jax.checkpoint.hf_files import open_hf
from r1vl_jax.checkpoint.orbax_files import open_orbax, write_orbax
from r1vl_jax.checkpoint.state import verify_part
from r1vl_jax.common.text import first_few, one_line
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import ModelConfig, load_config


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


def open_params(model: ModelFolder, cfg: ModelConfig) -> Any:
    """Verifies the weights of any kind of checkpoint by the sums that were written with them, and opens them.

    Verifying reads every byte, part by part. What reads the arrays later reads the files again.

    Returns: a tree like that of `param_spec(cfg)`, of arrays in files (see checkpoint/arrays.py).
    Raises: CheckpointError, see `open_hf` and `open_orbax`, or naming the files or arrays that differ from their sums.
    """
    if model.kind == "state":
        return _open_state(model.weights, cfg)
    verify_folder(model.weights, weights=True)
    return open_orbax(model.weights / "params", cfg) if model.kind == "converted" else open_hf(model.weights, cfg)


def load_model(
    folder: str | Path | ModelFolder, *, dtype: Any = None, shardings: Callable[[ModelConfig], Any] | None = None
) -> tuple[Any, ModelConfig, Path]:
    """Reads any kind of checkpoint.

    Args:
      folder: see `find_model`; or a ModelFolder that `find_model` returned.
      dtype: dtype to convert to; None keeps the dtype of each parameter.
      shardings: a function from a config to the tree of NamedSharding, for example `lambda cfg:
        param_shardings(param_spec(cfg), mesh)`. None: the arrays are NumPy's.
    Returns: (params, cfg, the folder with config.json and the tokenizer's files).
    Raises: CheckpointError, see `find_model`, `load_config`, `open_params` and `read_arrays`.
    """
    model = folder if isinstance(folder, ModelFolder) else find_model(folder)
    cfg = load_config(model.files)
    places = None if shardings is None else shardings(cfg)
    return read_arrays(open_params(model, cfg), cfg, dtype=dtype, shardings=places), cfg, model.files


def _open_state(folder: Path, cfg: ModelConfig) -> Any:
    """Opens the parameters of a train state, after their checksums were verified; `folder` is its folder `state`."""
    others = sorted(path.name for path in folder.parent.parent.glob("[0-9]*") if path != folder.parent)
    try:
        params = open_orbax(folder, cfg, part="params")
        verify_part(params, ".params", folder.parent / "host" / "metadata")
    except CheckpointError as error:
        hint = f"; other states are {first_few(others)} in {folder.parent.parent}" if others else ""
        raise CheckpointError(
            f"{folder}: {error}{hint}" if str(folder) not in str(error) else f"{error}{hint}"
        ) from error
    return params


def save_params(
    folder: str | Path,
    params: Any,
    source: str | Path,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    on_tensor: Callable[[str], object] | None = None,
) -> None:
    """Writes a converted checkpoint to a temporary folder, which is then renamed to `folder`.

    Args:
      folder: new or empty; with `overwrite` it may also contain an older checkpoint (see checkpoint/folder.py).
      params: the tree of `param_spec`; of arrays on the host or on devices, sharded or not, or in files.
      source: a folder whose config.json, tokenizer, processor and template files are copied, byte for byte.
      dtype: dtype to convert to; None keeps the dtype of each parameter.
      on_tensor: called with the Hugging Face name of each tensor after it has been written.
    """
    with new_folder(folder, overwrite) as temporary:
        (temporary / "hf").mkdir()
        copy_companions(source, temporary / "hf")
        write_orbax(temporary / "params", params, load_config(source), dtype=dtype, on_tensor=on_tensor)


def load_params(folder: str | Path, cfg: ModelConfig, *, dtype: Any = None, shardings: Any = None) -> Any:
    """Reads the parameters of a converted checkpoint; for arguments and errors see `open_orbax` and `read_arrays`.

    Args:
      folder: a folder written by `save_params`.
    """
    return read_arrays(open_orbax(Path(folder).absolute() / "params", cfg), cfg, dtype=dtype, shardings=shardings)
