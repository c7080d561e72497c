"""Reads and writes weights in the Hugging Face layout: safetensors files beside config.json and the tokenizer's files.

Writing uses the published tensor names, which transformers 4 and 5 and vLLM read. Both go tensor by tensor: the host
holds one at a time, besides its devices' arrays.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from r1vl_jax.checkpoint.arrays import read_arrays, whole
from r1vl_jax.checkpoint.flat_config import write_flat_config
from r1vl_jax.checkpoint.folder import INDEX, WEIGHTS, copy_companions, new_folder
from r1vl_jax.checkpoint.hf_files import DTYPES, open_hf
from r1vl_jax.checkpoint.tensors import cast, tensor_names, transpose_into
from r1vl_jax.common.files import write_json
from r1vl_jax.common.text import first_few, one_line
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import ModelConfig, load_config
from r1vl_jax.model.spec import param_spec
from r1vl_jax.types import ParamSpec, is_spec

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_hf(folder: str | Path, cfg: ModelConfig, *, dtype: Any = None, shardings: Any = None) -> Any:
    """Reads a checkpoint into the tree of `param_spec(cfg)`; for arguments and errors see `open_hf`, `read_arrays`."""
    return read_arrays(open_hf(folder, cfg), cfg, dtype=dtype, shardings=shardings)


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
      params: the tree of `param_spec(cfg)`; of arrays on the host or on devices, sharded or not, or in files.
      folder: new or empty; with `overwrite` it may also contain an older checkpoint (see checkpoint/folder.py).
      source: a folder whose config.json, tokenizer, processor and template files are copied; config.json is converted
        to the flat, published style.
      dtype: dtype to convert to; None keeps the dtype of each parameter.
      max_shard_bytes: size limit of a file; a single larger tensor gets its own file.
      on_tensor: called with the name of each tensor after it has been written.
    Raises: CheckpointError if `params` is not the tree of `cfg`, if `source` describes another model, or if `folder`
      may not be written to.
    """
    specs, treedef = jax.tree.flatten(param_spec(cfg), is_leaf=is_spec)
    leaves = _flatten_checked(params, specs, treedef)
    if load_config(source) != cfg:
        raise CheckpointError(f"{Path(source) / 'config.json'}: describes another model than the weights to be written")
    dtypes = [np.dtype(leaf.dtype if dtype is None else dtype) for leaf in leaves]
    shards = _plan_shards(leaves, specs, dtypes, max_shard_bytes)
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    with new_folder(folder, overwrite) as temporary:
        copy_companions(source, temporary)
        write_flat_config(Path(source) / "config.json", temporary / "config.json", cfg, _commonest(dtypes))
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys((tensor.name for tensor in shard), file)
            _write_file(temporary / file, shard, on_tensor)
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


class _Output(NamedTuple):
    """One tensor to write. `layer`: which part of the array it is; None: the whole array."""

    name: str
    array: Any
    layer: int | None
    spec: ParamSpec
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.spec.hf_shape) * self.dtype.itemsize

    def value(self) -> np.ndarray:
        """Returns the tensor as the checkpoint stores it, contiguous."""
        array = np.asarray(whole(self.array) if self.layer is None else self.array[self.layer])
        array = cast(array, self.dtype, self.name)
        if not self.spec.transpose:
            return np.ascontiguousarray(array)
        matrix = array.reshape(-1, self.spec.hf_shape[0])
        out = np.empty(matrix.shape[::-1], self.dtype)
        transpose_into(out, matrix)
        return out


def _plan_shards(
    leaves: list[Any], specs: list[ParamSpec], dtypes: list[np.dtype], max_bytes: float
) -> list[list[_Output]]:
    """Plans the tensors of each file, in the order of writing, layer by layer."""
    entries = []
    for leaf, spec in enumerate(specs):
        for layer, name in enumerate(tensor_names(spec)):
            entries.append((spec.stacked, layer, leaf, name))
    shards, size = [[]], 0  # size: bytes of the last shard
    for stacked, layer, leaf, name in sorted(entries):
        tensor = _Output(name, leaves[leaf], layer if stacked else None, specs[leaf], dtypes[leaf])
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_file(path: Path, shard: list[_Output], on_tensor: Callable[[str], object] | None) -> None:
    """Writes a safetensors file: the length of the header, the header as JSON, the tensors one after another."""
    shard = sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)  # each begins at a multiple of its item size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.nbytes
        shape, dtype = list(tensor.spec.hf_shape), _DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            file.write(tensor.value().view(np.uint8).data)
            if on_tensor:
                on_tensor(tensor.name)


def _commonest(dtypes: list[np.dtype]) -> str:
    """Returns the name of the most frequent dtype, since config.json has room for one dtype only."""
    return Counter(dtype.name for dtype in dtypes).most_common(1)[0][0]
