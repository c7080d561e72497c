"""Writes parameters with orbax part by part, and opens the arrays of an orbax checkpoint without reading them.

The files are those of any orbax checkpoint. An array is stored in chunks of at most CHUNK_BYTES, of one layer each, so
that a part can be read without the rest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from r1vl_jax.checkpoint.arrays import blocks, read_part
from r1vl_jax.checkpoint.tensors import tensor_names
from r1vl_jax.common.text import first_few, one_line
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.spec import param_spec
from r1vl_jax.types import ParamSpec, is_spec

CHUNK_BYTES = 2**26


def chunked(array: Any) -> ocp.SaveArgs:
    """Returns orbax's arguments to store an array in chunks. Arrays of three and more axes have layers first."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if len(array.shape) > 2 else ())


class OrbaxArray:
    """An array in an orbax checkpoint. `array[index]` is a part of it, which np.asarray reads.

    Attributes:
      name: says in messages which array it is.
    """

    def __init__(self, store: ts.TensorStore, name: str) -> None:
        self._store, self.name = store, name
        self.shape, self.dtype = tuple(store.shape), store.dtype.numpy_dtype

    def __getitem__(self, index: Any) -> OrbaxArray:
        return OrbaxArray(self._store[index], self.name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            return np.asarray(self._store.read().result(), dtype)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.name}: cannot be read ({one_line(error)})") from error


def open_orbax(folder: Path, cfg: ModelConfig, part: str | None = None) -> Any:
    """Opens the parameters in an orbax folder.

    Arrays that earlier versions wrote have one chunk for all layers. These are read at once.

    Args:
      part: key of the parameters in the folder's tree; None: the parameters are the whole tree.
    Returns: a tree of OrbaxArray, or NumPy arrays, like that of `param_spec(cfg)`.
    Raises: CheckpointError if orbax cannot read the folder, or naming the parameters that are unknown, missing or of a
      wrong shape.
    """
    try:
        # orbax is annotated with the path class of etils, but accepts any path.
        stored = ocp.PyTreeCheckpointHandler().metadata(folder).tree  # pyright: ignore[reportArgumentType]
        stored = stored if part is None else stored[part]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder}: not an orbax checkpoint, or damaged ({one_line(error)})") from error
    _check(folder, stored, cfg)

    def open_array(path: tuple, spec: ParamSpec) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        name = name if part is None else f"{part}.{name}"
        kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
        try:
            store = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{folder}: {name}: cannot be read ({one_line(error)})") from error
        array = OrbaxArray(store, f"{folder}: {name}")
        return array if math.prod(_chunk(store)) * array.dtype.itemsize <= CHUNK_BYTES else np.asarray(array)

    return jax.tree_util.tree_map_with_path(open_array, param_spec(cfg), is_leaf=is_spec)


def _chunk(store: ts.TensorStore) -> tuple[int, ...]:
    """Returns the shape of the chunks that an array is stored in."""
    return tuple(size or 1 for size in store.chunk_layout.write_chunk.shape or ())


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


# Writing.


def write_orbax(
    folder: Path, params: Any, cfg: ModelConfig, *, dtype: Any = None, on_tensor: Callable[[str], object] | None = None
) -> None:
    """Writes parameters, part by part; for the arguments see `store.save_params`."""
    leaves = jax.tree.map(
        lambda spec, array: _Leaf(array, spec, np.dtype(array.dtype if dtype is None else dtype), on_tensor),
        param_spec(cfg),
        params,
        is_leaf=is_spec,
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Leaf, _LeafHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        try:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(leaves, save_args=jax.tree.map(chunked, leaves)))
        except CheckpointError:
            raise
        except ValueError as error:  # of tensorstore, for example on a full disk
            raise CheckpointError(f"{folder}: cannot be written ({one_line(error)})") from error


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An array to write: that of `array`, converted to `dtype`."""

    array: Any
    spec: ParamSpec
    dtype: np.dtype
    on_tensor: Callable[[str], object] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def size(self) -> int:
        return math.prod(self.spec.shape)


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes what orbax's own handler of NumPy arrays would write, but at once, and one part of one array at a time."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._lock = asyncio.Lock()
        self._error: Exception | None = None

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        await self._background_serialize(values, infos, args)
        if self._error is not None:
            raise self._error
        return []

    async def _open_and_write(self, value: _Leaf, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        async with self._lock:
            try:
                if self._error is None:
                    await self._write(value, await ts.open(tspec, create=True, open=True, context=ts_context))
            except Exception as error:  # is raised when nothing is being written
                self._error = error

    async def _write(self, value: _Leaf, store: ts.TensorStore) -> None:
        for start, stop in blocks(value.shape, value.dtype, _chunk(store)[0]):
            part = read_part(value.array, value.spec, value.dtype, start, stop)
            await store[start:stop].write(part, can_reference_source_data_indefinitely=True)
            if value.on_tensor:
                for name in tensor_names(value.spec)[start:stop]:
                    value.on_tensor(name)
