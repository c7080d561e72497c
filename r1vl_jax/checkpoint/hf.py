"""Reads and writes weights in the Hugging Face layout: safetensors files beside config.json and the tokenizer's files.

Reading accepts the published tensor names (`visual.*`, `model.layers.N.*`) and those that transformers 5 uses in memory
(`model.visual.*`, `model.language_model.*`). Writing uses the published names, which transformers 4 and 5 and vLLM
read. model/spec.py defines which tensor becomes which parameter.

Tensors are read one by one from the memory-mapped files into preallocated stacked arrays, and written shard by shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp  # importing it also registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from r1vl_jax.checkpoint.flat_config import write_flat_config
from r1vl_jax.checkpoint.folder import INDEX, WEIGHTS, copy_companions, new_folder, other_weights
from r1vl_jax.checkpoint.foreign import refuse_foreign_tensors
from r1vl_jax.checkpoint.tensors import cast, published_name, tensor_names, transpose_into
from r1vl_jax.common.files import read_object, write_json
from r1vl_jax.common.text import first_few, one_line
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import ModelConfig, load_config
from r1vl_jax.model.spec import param_spec
from r1vl_jax.types import ParamSpec, is_spec

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of a checkpoint.

    Attributes:
      file: the open file.
      name: name of the tensor in the file.
      shape, dtype: read from the file's header.
    """

    file: Any  # returned by safetensors.safe_open; the type is not public
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        try:
            return self.file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: {self.name}: cannot be read ({one_line(error)})") from error


def load_hf(
    folder: str | Path,
    cfg: ModelConfig,
    *,
    dtype: Any = None,
    shardings: Any = None,
    on_tensor: Callable[[str], object] | None = None,
) -> Any:
    """Reads a checkpoint into the tree of `param_spec(cfg)`.

    Args:
      folder: has model.safetensors, or model.safetensors.index.json and the shards that it names.
      dtype: dtype to convert to; None keeps the dtype of each parameter.
      shardings: a tree of NamedSharding. Each array is put on the devices, and its host copy is freed, before the next
        array is read.
      on_tensor: called with the name of each tensor after it has been read.
    Returns: a tree of jax arrays if `shardings` is given, else of NumPy arrays.
    Raises: CheckpointError naming the file that is missing or damaged, or listing all faulty tensors: unknown, missing,
      of a wrong shape, or of a dtype that is not read.
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


def _read_leaf(
    tensors: list[_Tensor], spec: ParamSpec, dtype: Any, on_tensor: Callable[[str], object] | None
) -> np.ndarray:
    """Reads one parameter into a preallocated array, layer by layer."""
    out = np.empty(spec.shape, _DTYPES[tensors[0].dtype] if dtype is None else np.dtype(dtype))
    parts = out if spec.stacked else out[None]
    for part, tensor in zip(parts, tensors, strict=True):
        value = cast(tensor.read(), out.dtype, tensor.name)
        if spec.transpose:  # stored as (out, in...), used as (in..., out...): the transpose of the matrix (out, in)
            matrix = value.reshape(value.shape[0], -1)
            transpose_into(part.reshape(matrix.shape[::-1]), matrix)
        else:
            part.reshape(value.shape)[...] = value
        if on_tensor:
            on_tensor(tensor.name)
    return out


def _open(folder: Path, stack: contextlib.ExitStack) -> tuple[list[_Tensor], list[str]]:
    """Opens a checkpoint's files. Returns the tensors in them, and texts about tensors that only the index names."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a Qwen2-VL checkpoint")
    indexed: dict[str, str] = {}
    if (folder / INDEX).is_file():
        indexed = _read_index(folder / INDEX)
        names = sorted(set(indexed.values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        others = other_weights(folder)
        found = f", found {first_few(others)}" if others else ""
        raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; only safetensors are read{found}")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{folder / INDEX}: names files that are not there: {first_few(absent)}")
    tensors = []
    for name in names:
        path = folder / name
        try:
            file = stack.enter_context(safe_open(path, "np"))
            for key in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(key)
                tensors.append(_Tensor(file, path, key, tuple(header.get_shape()), header.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({one_line(error)})") from error
    in_files = {(tensor.name, tensor.path.name) for tensor in tensors}
    absent = [
        f"{name} (the index places it in {file})" for name, file in indexed.items() if (name, file) not in in_files
    ]
    return tensors, absent


def _read_index(path: Path) -> dict[str, str]:
    """Returns the index's table from tensor names to file names."""
    try:
        table = read_object(path).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{error}; expected an index of safetensors") from error
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{path}: weight_map is not a table from tensors to files")
    return table


def _check(
    folder: Path, specs: list[ParamSpec], cfg: ModelConfig, stored: list[_Tensor], absent: list[str]
) -> dict[str, _Tensor]:
    """Returns the tensors by published name. Raises one CheckpointError that lists faults of every kind.

    Args:
      stored: the tensors in the files.
      absent: texts about tensors that the index names but no file contains.
    """
    refuse_foreign_tensors(folder, ((tensor.name, tensor.dtype) for tensor in stored))
    shapes = {name: spec.hf_shape for spec in specs for name in tensor_names(spec)}
    tensors: dict[str, _Tensor] = {}
    faults: dict[str, list[str]] = {"missing": absent}

    def fault(kind: str, text: str) -> None:
        faults.setdefault(kind, []).append(text)

    for tensor in stored:
        name = published_name(tensor.name)
        if name in tensors:
            fault("given twice", f"{tensors[name].name} and {tensor.name}")
        tensors[name] = tensor
        shape = shapes.get(_EMBED if cfg.tied and name == _HEAD else name)
        if shape is None:
            fault("unknown", tensor.name)
        elif tensor.shape != shape:
            fault("misshaped", f"{tensor.name} is {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.dtype not in _DTYPES:
            fault("of a dtype that is not read", f"{tensor.name} is {tensor.dtype}, expected one of {list(_DTYPES)}")
    for name in shapes:
        if name not in tensors and not any(text.startswith(f"{name} (") for text in absent):
            fault("missing", name)
    faults = {kind: texts for kind, texts in faults.items() if texts}
    for text in [] if faults else _content_faults(specs, cfg, tensors):
        fault("inconsistent", text)
    if faults:
        lists = "; ".join(f"{kind}: {first_few(texts)}" for kind, texts in faults.items())
        raise CheckpointError(f"{folder}: weights are not those that its config.json describes; {lists}")
    return tensors


def _content_faults(specs: list[ParamSpec], cfg: ModelConfig, tensors: dict[str, _Tensor]) -> Iterator[str]:
    """Yields a text for each contradiction between tensors that have the right names, shapes and dtypes."""
    for spec in specs:
        dtypes = {tensors[name].dtype for name in tensor_names(spec)}
        if len(dtypes) > 1:
            yield f"{spec.hf_name} is {' and '.join(sorted(dtypes))} in different layers"
    if cfg.tied and _HEAD in tensors:
        head, embed = tensors[_HEAD], tensors[_EMBED]
        if head.dtype != embed.dtype or not np.array_equal(_bits(head.read()), _bits(embed.read())):
            yield f"{head.name} differs from {embed.name}, though tie_word_embeddings is true"


def _bits(array: np.ndarray) -> np.ndarray:
    """Returns the array's bits as unsigned integers, so that NaN equals NaN."""
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
    on_tensor: Callable[[str], object] | None = None,
) -> None:
    """Writes a checkpoint that transformers 4 and 5 and vLLM load, to a temporary folder that is then renamed.

    Args:
      params: the tree of `param_spec(cfg)`; host or device arrays, sharded or not.
      folder: new or empty; with `overwrite` it may also contain an older checkpoint (see checkpoint/folder.py).
      source: a folder whose config.json, tokenizer, processor and template files are copied; config.json is converted
        to the flat, published style.
      dtype: dtype to convert to; None keeps the dtype of each parameter.
      max_shard_bytes: size limit of a file; a single larger tensor gets its own file. One file at a time is in host
        memory.
      on_tensor: called with the name of each tensor after it has been written.
    Raises: CheckpointError if `params` is not the tree of `cfg`, if `source` describes another model, or if `folder`
      may not be written to.
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
            # safetensors makes its files readable for their owner alone.
            shutil.copymode(temporary / "config.json", temporary / file)
            for name in tensors:
                if on_tensor:
                    on_tensor(name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(temporary / INDEX, index)


def _flatten_checked(params: Any, specs: list[ParamSpec], treedef: Any) -> list[Any]:
    """Returns the leaves of `params` in the order of `specs`. Raises CheckpointError on another structure or shape."""
    try:
        leaves = treedef.flatten_up_to(params)
    except ValueError as error:
        raise CheckpointError(f"the parameters are not the tree of this config ({one_line(error)})") from error
    wrong = [
        f"{spec.hf_name} is {list(np.shape(leaf))}, expected {list(spec.shape)}"
        for spec, leaf in zip(specs, leaves, strict=True)
        if tuple(np.shape(leaf)) != spec.shape
    ]
    if wrong:
        raise CheckpointError(f"misshaped parameters: {first_few(wrong)}")
    return leaves


def _plan_shards(
    specs: list[ParamSpec], dtypes: list[np.dtype], max_bytes: float
) -> list[list[tuple[str, int, int | None]]]:
    """Plans the tensors of each file, in the order of writing, layer by layer.

    Returns: for each file, a list of (tensor name, index in `specs`, layer). layer is None if the parameter is not
      stacked.
    """
    entries = []
    for leaf, spec in enumerate(specs):
        for layer, name in enumerate(tensor_names(spec)):
            entries.append((spec.stacked, layer, leaf, name))
    shards, size = [[]], 0  # size: bytes of the last shard
    for stacked, layer, leaf, name in sorted(entries):
        bytes_ = int(np.prod(specs[leaf].hf_shape)) * dtypes[leaf].itemsize
        if shards[-1] and size + bytes_ > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, leaf, layer if stacked else None))
        size += bytes_
    return shards


def _to_hf(array: np.ndarray, spec: ParamSpec, dtype: np.dtype) -> np.ndarray:
    """Returns one tensor as the checkpoint stores it, as a contiguous array (safetensors ignores strides)."""
    array = cast(array, dtype, spec.hf_name)
    if not spec.transpose:
        return np.ascontiguousarray(array).reshape(spec.hf_shape)
    matrix = array.reshape(-1, spec.hf_shape[0])
    out = np.empty(matrix.shape[::-1], dtype)
    transpose_into(out, matrix)
    return out.reshape(spec.hf_shape)


def _commonest(dtypes: list[np.dtype]) -> str:
    """Returns the name of the most frequent dtype, since config.json has room for one dtype only."""
    return Counter(dtype.name for dtype in dtypes).most_common(1)[0][0]
