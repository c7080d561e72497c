"""Opens the safetensors files of a Hugging Face folder, and checks their tensors, without reading them.

Accepts the published tensor names (`visual.*`, `model.layers.N.*`) and those that transformers 5 uses in memory
(`model.visual.*`, `model.language_model.*`). model/spec.py defines which tensor becomes which parameter.

Tensors are read with plain reads, not memory-mapped: a process holds what it has read and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp  # importing it also registers bfloat16 with NumPy
import numpy as np
from safetensors import SafetensorError, safe_open

from r1vl_jax.checkpoint.arrays import blocks
from r1vl_jax.checkpoint.folder import INDEX, WEIGHTS, other_weights
from r1vl_jax.checkpoint.foreign import refuse_foreign_tensors
from r1vl_jax.checkpoint.tensors import published_name, tensor_names, transpose_into
from r1vl_jax.common.files import read_object
from r1vl_jax.common.text import first_few, one_line, shown
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.spec import param_spec
from r1vl_jax.types import ParamSpec, is_spec

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of a checkpoint.

    Attributes:
      name: name of the tensor in the file.
      shape, dtype: read from the file's header.
      offset: the position of its first byte in the file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads the tensor, or its rows from `start` to `stop`."""
        dtype, rows = DTYPES[self.dtype], (self.shape[0] if stop is None else stop) - start
        row = math.prod(self.shape[1:]) * dtype.itemsize
        try:
            data = np.fromfile(self.path, np.uint8, rows * row, offset=self.offset + start * row)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {self.name}: cannot be read ({one_line(error)})") from error
        if len(data) != rows * row:
            raise CheckpointError(f"{self.path}: {self.name}: cannot be read (the file became shorter)")
        return data.view(dtype).reshape(rows, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class HfArray:
    """A parameter in safetensors files. `array[layer]` or `array[start:stop]` reads that part into a NumPy array.

    Attributes:
      tensors: a tensor per layer if the parameter is stacked, else one.
    """

    spec: ParamSpec
    tensors: list[_Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.tensors[0].dtype]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if isinstance(index, int):
            return self[index : index + 1][0]
        start, stop, _ = index.indices(self.shape[0])
        if not self.spec.stacked and not self.spec.transpose:
            return self.tensors[0].read(start, stop).reshape(stop - start, *self.shape[1:])
        tensors = self.tensors[start:stop] if self.spec.stacked else self.tensors
        out = np.empty((len(tensors), *self.shape[self.spec.stacked :]), self.dtype)
        for part, tensor in zip(out, tensors, strict=True):
            value = tensor.read()
            if self.spec.transpose:  # stored as (out, in...), used as (in..., out...): the matrix (out, in), transposed
                matrix = value.reshape(value.shape[0], -1)
                transpose_into(part.reshape(matrix.shape[::-1]), matrix)
            else:
                part.reshape(value.shape)[...] = value
        return out if self.spec.stacked else out[0][start:stop]


def open_hf(folder: str | Path, cfg: ModelConfig) -> Any:
    """Opens a checkpoint.

    Args:
      folder: has model.safetensors, or model.safetensors.index.json and the shards that it names.
    Returns: a tree of HfArray like that of `param_spec(cfg)`.
    Raises: CheckpointError naming the file that is missing or damaged, or listing all faulty tensors: unknown, missing,
      of a wrong shape, or of a dtype that is not read.
    """
    specs, treedef = jax.tree.flatten(param_spec(cfg), is_leaf=is_spec)
    tensors = _check(Path(folder), specs, cfg, *_open(Path(folder)))
    return treedef.unflatten([HfArray(spec, [tensors[name] for name in tensor_names(spec)]) for spec in specs])


def _open(folder: Path) -> tuple[list[_Tensor], list[str]]:
    """Returns the tensors in a checkpoint's files, and texts about tensors that only the index names."""
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
    tensors = [tensor for name in names for tensor in _read_header(folder / name)]
    in_files = {(tensor.name, tensor.path.name) for tensor in tensors}
    absent = [
        f"{name} (the index places it in {file})" for name, file in indexed.items() if (name, file) not in in_files
    ]
    return tensors, absent


def _read_header(path: Path) -> list[_Tensor]:
    """Returns the tensors in a file."""
    try:
        with safe_open(path, "np"):  # checks that the header is right, and fits the length of the file
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({one_line(error)})") from error
    header.pop("__metadata__", None)
    return [
        _Tensor(path, name, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    ]


def _read_index(path: Path) -> dict[str, str]:
    """Returns the index's table from tensor names to file names."""
    try:
        table = read_object(path).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{error}; expected an index of safetensors") from error
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{path}: weight_map is not a table from tensors to files")
    others = sorted({name for name in table.values() if not _is_file_name(name)})
    if others:
        found = first_few([shown(name) for name in others])
        raise CheckpointError(f"{path}: expected names of files in its folder, found {found}")
    return table


def _is_file_name(name: str) -> bool:
    """Returns whether a text can be the name of a file in a folder, and is no path to somewhere else."""
    plain = name not in ("", ".", "..") and "/" not in name and "\\" not in name and name.isprintable()
    return plain and len(name.encode()) < 256


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
        elif tensor.dtype not in DTYPES:
            fault("of a dtype that is not read", f"{tensor.name} is {tensor.dtype}, expected one of {list(DTYPES)}")
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
        parts = blocks(head.shape, DTYPES[head.dtype])
        if head.dtype != embed.dtype or not all(
            np.array_equal(_bits(head, *rows), _bits(embed, *rows)) for rows in parts
        ):
            yield f"{head.name} differs from {embed.name}, though tie_word_embeddings is true"


def _bits(tensor: _Tensor, start: int, stop: int) -> np.ndarray:
    """Returns the bits of some rows as unsigned integers, so that NaN equals NaN."""
    rows = tensor.read(start, stop)
    return rows.view(f"u{rows.dtype.itemsize}")
