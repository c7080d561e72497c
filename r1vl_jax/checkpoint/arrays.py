"""Reads arrays onto the devices of a mesh, or into NumPy, a layer at a time.

An array is one of NumPy or jax, or one in files (HfArray, OrbaxArray) whose parts are read when they are needed. All
have `shape`, `dtype` and `array[layer]`, `array[start:stop]`; np.asarray of these is the part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from r1vl_jax.checkpoint.tensors import cast, tensor_names
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.spec import param_spec
from r1vl_jax.types import ParamSpec, is_spec

BLOCK_BYTES = 128e6


def blocks(shape: tuple[int, ...], dtype: np.dtype, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of parts of an array's first axis, of 128 MB or a little more.

    Args:
      multiple: each part has a multiple of so many rows, except the last one.
    """
    bytes_ = max(1, multiple * math.prod(shape[1:]) * dtype.itemsize)
    rows = multiple * max(1, int(BLOCK_BYTES // bytes_))
    return ((start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def whole(array: Any) -> Any:
    """Returns the whole array. A jax array is copied, because it would keep what NumPy sees of it on the host."""
    return jnp.copy(array) if isinstance(array, jax.Array) else array[:]


def read_arrays(params: Any, cfg: ModelConfig, *, dtype: Any = None, shardings: Any = None) -> Any:
    """Reads the parameters of a model.

    Args:
      params: a tree of arrays like that of `param_spec(cfg)`.
      dtype: dtype to convert to; None keeps the dtype of each parameter.
      shardings: a tree of NamedSharding. The host holds one parameter at a time, or one layer of a larger parameter,
        besides what its devices hold.
    Returns: a tree of jax arrays if `shardings` is given, else of NumPy arrays.
    Raises: CheckpointError naming what cannot be read or converted.
    """
    specs, treedef = jax.tree.flatten(param_spec(cfg), is_leaf=is_spec)
    arrays = treedef.flatten_up_to(params)
    places = [None] * len(specs) if shardings is None else treedef.flatten_up_to(shardings)
    leaves = []
    for array, spec, place in zip(arrays, specs, places, strict=True):
        to = np.dtype(array.dtype if dtype is None else dtype)
        leaves.append(_to_host(array, spec, to) if place is None else _to_devices(array, spec, to, place))
    return treedef.unflatten(leaves)


def read_part(array: Any, spec: ParamSpec, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    """Returns array[start:stop] of a parameter, converted to `dtype`."""
    part = np.asarray(array[start:stop])
    if part.dtype == dtype or not spec.stacked:
        return cast(part, dtype, spec.hf_name)
    out = np.empty(part.shape, dtype)
    for layer, name in enumerate(tensor_names(spec)[start:stop]):
        out[layer] = cast(part[layer], dtype, name)
    return out


def _to_host(array: Any, spec: ParamSpec, dtype: np.dtype) -> np.ndarray:
    out = np.empty(spec.shape, dtype)
    for start, stop in blocks(spec.shape, dtype):
        out[start:stop] = read_part(array, spec, dtype, start, stop)
    return out


def _to_devices(array: Any, spec: ParamSpec, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    if not spec.stacked or math.prod(spec.shape) * dtype.itemsize <= BLOCK_BYTES:
        return _place(array[:], spec.hf_name, dtype, sharding)
    layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    out = jnp.zeros(spec.shape, dtype, device=sharding)
    set_layer = jax.jit(_set_layer, donate_argnums=0, out_shardings=sharding)  # in place
    for layer, name in enumerate(tensor_names(spec)):
        out = set_layer(out, _place(array[layer], name, dtype, layer_sharding), layer)
    return out


def _set_layer(stacked: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, value, layer, 0)


def _place(part: Any, name: str, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    """Puts a part of an array on the devices. Each slice that they hold is read, or taken, by itself."""

    def slice_of(index: Any) -> np.ndarray:
        return cast(np.asarray(part[index]), dtype, name)

    placed = jax.make_array_from_callback(part.shape, sharding, slice_of)
    return placed.block_until_ready()  # parts do not pile up on the host
