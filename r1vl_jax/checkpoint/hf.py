"""Weights in the layout of Hugging Face: safetensors, one or sharded, beside config.json and the tokenizer's files.

Reading accepts the published names (`visual.*`, `model.layers.N.*`) and those that transformers 5 uses in memory
(`model.visual.*`, `model.language_model.*`); writing gives the published ones, which transformers 4 and 5 and vLLM
read. Which tensor becomes which parameter is said once, in model.spec.

Tensors are read one by one from the memory-mapped files into preallocated stacked arrays, and written shard by shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp  # also tells NumPy, and so safetensors, what bfloat16 is
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from r1vl_jax.checkpoint.flat_config import write_flat_config
from r1vl_jax.checkpoint.folder import copy_companions, new_folder
from r1vl_jax.common.files import read_object
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import ModelConfig, load_config
from r1vl_jax.model.spec import param_spec
from r1vl_jax.types import ParamSpec, is_spec

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of a checkpoint: where it lies, under which name, and what its header says."""

    file: Any
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        try:
            return self.file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: {self.name}: cannot be read ({error})") from error


def published_name(name: str) -> str:
    """The published name of a tensor that may carry the name transformers 5 gives it in memory."""
    for prefix, published in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    return name


def tensor_names(spec: ParamSpec) -> list[str]:
    """The published names of a parameter's tensors: one for each layer where it is stacked."""
    return [spec.hf_name.format(layer) for layer in range(spec.shape[0])] if spec.stacked else [spec.hf_name]


def load_hf(
    folder: str | Path,
    cfg: ModelConfig,
    *,
    dtype: Any = None,
    shardings: Any = None,
    on_tensor: Callable[[str], None] | None = None,
) -> Any:
    """Reads a checkpoint into the tree of `param_spec(cfg)`.

    Args:
      folder: holds model.safetensors, or model.safetensors.index.json and the shards that it names.
      dtype: what to convert to; None keeps each parameter's own.
      shardings: a tree of NamedSharding; each leaf is placed and its host copy freed before the next is read.
      on_tensor: called with the name of every tensor that has been read.
    Returns:
      jax arrays where shardings are given, else host NumPy arrays.
    Raises:
      CheckpointError naming the file that is missing or damaged, or every tensor that is unknown, missing, misshaped
      or of an unreadable dtype, all of them in one message.
    """
    specs, treedef = jax.tree.flatten(param_spec(cfg), is_leaf=is_spec)
    places = [None] * len(specs) if shardings is None else treedef.flatten_up_to(shardings)
    with contextlib.ExitStack() as stack:
        tensors = _check(Path(folder), specs, cfg, *_open(Path(folder), stack))
        leaves = []
        for spec, place in zip(specs, places, strict=True):
            leaf = _read_leaf([tensors[name] for name in tensor_names(spec)], spec, dtype, on_tensor)
            if place is not None:
                leaf = jax.make_array_from_callback(leaf.shape, place, leaf.__getitem__).block_until_ready()
            leaves.append(leaf)
    return treedef.unflatten(leaves)


def _read_leaf(tensors: list[_Tensor], spec: ParamSpec, dtype: Any, on_tensor) -> np.ndarray:
    """Reads one parameter into a preallocated array, layer by layer."""
    out = np.empty(spec.shape, _DTYPES[tensors[0].dtype] if dtype is None else np.dtype(dtype))
    parts = out if spec.stacked else out[None]
    for part, tensor in zip(parts, tensors, strict=True):
        value = cast(tensor.read(), out.dtype, tensor.name)
        if spec.transpose:  # (out, in...) there, (in..., out...) here: the transpose of the matrix (out, in)
            matrix = value.reshape(value.shape[0], -1)
            transpose_into(part.reshape(matrix.shape[::-1]), matrix)
        else:
            part.reshape(value.shape)[...] = value
        if on_tensor:
            on_tensor(tensor.name)
    return out


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in another dtype. Raises CheckpointError where float16 cannot hold a value."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if dtype == np.float16 and not np.array_equal(np.isinf(out), np.isinf(array)):
        raise CheckpointError(f"{name}: has values beyond float16's range (65504); convert to bfloat16 instead")
    return out


def transpose_into(out: np.ndarray, matrix: np.ndarray, block: int = 128) -> None:
    """out = matrix.T by blocks of rows that fit a cache: five to ten times faster than in one go."""
    for row in range(0, matrix.shape[0], block):
        out[:, row : row + block] = matrix[row : row + block].T


def _open(folder: Path, stack: contextlib.ExitStack) -> tuple[list[_Tensor], list[str]]:
    """Opens a checkpoint's files. Returns what their headers list and the faults of the index."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a Qwen2-VL checkpoint")
    indexed: dict[str, str] = {}
    if (folder / INDEX).is_file():
        indexed = _read_index(folder / INDEX)
        names = sorted(set(indexed.values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; only safetensors are read")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{folder / INDEX}: names files that are not there: {', '.join(absent)}")
    tensors = []
    for name in names:
        path = folder / name
        try:
            file = stack.enter_context(safe_open(path, "np"))
            for key in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(key)
                tensors.append(_Tensor(file, path, key, tuple(header.get_shape()), header.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
    held = {(tensor.name, tensor.path.name) for tensor in tensors}
    faults = [f"{name} (the index places it in {file})" for name, file in indexed.items() if (name, file) not in held]
    return tensors, faults


def _read_index(path: Path) -> dict[str, str]:
    try:
        table = read_object(path).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{error}; expected an index of safetensors") from error
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{path}: weight_map is not a table from tensors to files")
    return table


def _check(
    folder: Path, specs: list[ParamSpec], cfg: ModelConfig, found: list[_Tensor], absent: list[str]
) -> dict[str, _Tensor]:
    """The tensors by published name. Raises one CheckpointError that lists every fault."""
    shapes = {name: spec.hf_shape for spec in specs for name in tensor_names(spec)}
    tensors: dict[str, _Tensor] = {}
    faults: dict[str, list[str]] = {"missing": absent}

    def fault(kind: str, text: str) -> None:
        faults.setdefault(kind, []).append(text)

    for tensor in found:
        name = published_name(tensor.name)
        if name in tensors:
            fault("given twice", f"{tensors[name].name} and {tensor.name}")
        tensors[name] = tensor
        wanted = shapes.get(_EMBED if cfg.tied and name == _HEAD else name)
        if wanted is None:
            fault("unknown", tensor.name)
        elif tensor.shape != wanted:
            fault("misshaped", f"{tensor.name} is {list(tensor.shape)}, expected {list(wanted)}")
        elif tensor.dtype not in _DTYPES:
            fault("of a dtype that is not read", f"{tensor.name} is {tensor.dtype}, expected one of {list(_DTYPES)}")
    for name in shapes:
        if name not in tensors and not any(text.startswith(f"{name} (") for text in absent):
            fault("missing", name)
    faults = {kind: texts for kind, texts in faults.items() if texts}
    for text in [] if faults else _content_faults(specs, cfg, tensors):
        fault("inconsistent", text)
    if faults:
        lists = "; ".join(f"{kind}: {', '.join(texts)}" for kind, texts in faults.items())
        raise CheckpointError(f"{folder}: weights are not those that its config.json describes; {lists}")
    return tensors


def _content_faults(specs: list[ParamSpec], cfg: ModelConfig, tensors: dict[str, _Tensor]) -> Iterator[str]:
    """Faults between tensors that are each well formed."""
    for spec in specs:
        dtypes = {tensors[name].dtype for name in tensor_names(spec)}
        if len(dtypes) > 1:
            yield f"{spec.hf_name} is {' and '.join(sorted(dtypes))} in different layers"
    if cfg.tied and _HEAD in tensors:
        head, embed = tensors[_HEAD], tensors[_EMBED]
        if head.dtype != embed.dtype or not np.array_equal(_bits(head.read()), _bits(embed.read())):
            yield f"{head.name} differs from {embed.name}, though tie_word_embeddings is true"


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


# Writing.


def save_hf(
    params: Any,
    cfg: ModelConfig,
    folder: str | Path,
    *,
    source: str | Path,
    dtype: Any = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    on_tensor: Callable[[str], None] | None = None,
) -> None:
    """Writes a checkpoint that transformers 4 and 5 and vLLM load, as a whole or not at all.

    Args:
      params: the tree of `param_spec(cfg)`, host or device arrays, sharded or not.
      folder: new or empty; with `overwrite` an old checkpoint too (see checkpoint.folder).
      source: a folder with the config.json, tokenizer, processor and template files to take along; config.json is
        written in the flat, published style.
      dtype: what to convert to; None keeps each parameter's own.
      max_shard_bytes: a file holds at most this much, but at least one tensor; one shard is in host memory at a time.
      on_tensor: called with the name of every tensor that has been written.
    Raises:
      CheckpointError where `params` is not the tree of `cfg`, `source` is not of the same model, or the destination
      may not be written.
    """
    specs, treedef = jax.tree.flatten(param_spec(cfg), is_leaf=is_spec)
    leaves = _flatten_checked(params, specs, treedef)
    if load_config(source) != cfg:
        raise CheckpointError(f"{Path(source) / 'config.json'}: describes another model than the weights to be written")
    dtypes = [np.dtype(leaf.dtype if dtype is None else dtype) for leaf in leaves]
    shards = _plan_shards(specs, dtypes, max_shard_bytes)
    total = sum(int(np.prod(spec.shape)) * dtype.itemsize for spec, dtype in zip(specs, dtypes, strict=True))
    with new_folder(folder, overwrite) as temporary:
        copy_companions(source, temporary)
        write_flat_config(Path(source) / "config.json", temporary / "config.json", cfg, _commonest(dtypes))
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name, leaf, layer in shard:
                array = leaves[leaf] if layer is None else leaves[leaf][layer]
                tensors[name] = _to_hf(np.asarray(array), specs[leaf], dtypes[leaf])
                weight_map[name] = file
            save_file(tensors, temporary / file, metadata={"format": "pt"})
            shutil.copymode(temporary / "config.json", temporary / file)  # safetensors lets nobody else read it
            for name in tensors if on_tensor else ():
                on_tensor(name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _flatten_checked(params: Any, specs: list[ParamSpec], treedef) -> list:
    try:
        leaves = treedef.flatten_up_to(params)
    except ValueError as error:
        raise CheckpointError(f"the parameters are not the tree of this config ({error})") from error
    wrong = [
        f"{spec.hf_name} is {list(np.shape(leaf))}, expected {list(spec.shape)}"
        for spec, leaf in zip(specs, leaves, strict=True)
        if tuple(np.shape(leaf)) != spec.shape
    ]
    if wrong:
        raise CheckpointError(f"misshaped parameters: {', '.join(wrong)}")
    return leaves


def _plan_shards(specs, dtypes, max_bytes: float) -> list[list[tuple[str, int, int | None]]]:
    """(tensor name, leaf, layer) in the order of writing, layer by layer, cut into files."""
    entries = []
    for leaf, spec in enumerate(specs):
        for layer, name in enumerate(tensor_names(spec)):
            entries.append((spec.stacked, layer, leaf, name))
    shards, size = [[]], 0
    for stacked, layer, leaf, name in sorted(entries):
        bytes_ = int(np.prod(specs[leaf].hf_shape)) * dtypes[leaf].itemsize
        if shards[-1] and size + bytes_ > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, leaf, layer if stacked else None))
        size += bytes_
    return shards


def _to_hf(array: np.ndarray, spec: ParamSpec, dtype: np.dtype) -> np.ndarray:
    """One tensor as the checkpoint holds it; contiguous, since safetensors writes the memory as it lies."""
    array = cast(array, dtype, spec.hf_name)
    if not spec.transpose:
        return np.ascontiguousarray(array).reshape(spec.hf_shape)
    matrix = array.reshape(-1, spec.hf_shape[0])
    out = np.empty(matrix.shape[::-1], dtype)
    transpose_into(out, matrix)
    return out.reshape(spec.hf_shape)


def _commonest(dtypes: list[np.dtype]) -> str:
    return Counter(dtype.name for dtype in dtypes).most_common(1)[0][0]
