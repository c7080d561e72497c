"""Maps logical axes to mesh axes in one table, and applies the table. No layer names a mesh axis.

Mesh axes: `data` (replicas), `fsdp` (replicas that each store a part of the train state), `tensor` (heads, MLP columns,
vocabulary).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from r1vl_jax.types import ParamSpec, is_spec

MESH_AXES = ("data", "fsdp", "tensor")
Rules = Mapping[str, str | tuple[str, ...]]

# The rules of the train state. A logical axis that is not in the table is not sharded.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# The rules of the rollout's copy of the weights. It is never split over fsdp; the config may split it over tensor.
ROLLOUT_RULES: Mapping[str, Rules] = {
    "tensor": {axis: mesh_axis for axis, mesh_axis in RULES.items() if axis != "embed"},
    "replicated": {"batch": ("data", "fsdp")},
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of these sizes. At most one size may be -1; it takes all devices that the other two leave.

    Args:
      devices: None: all devices.
    Raises:
      ValueError: a size is not positive, there are too few devices, or their number is not a multiple of the sizes.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    given = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise ValueError(f"mesh {sizes}: sizes are positive, and at most one is -1")
    if free:
        if len(devices) % given:
            raise ValueError(f"mesh {sizes}: {len(devices)} devices do not divide by {given}")
        sizes[free[0]] = len(devices) // given
    total = int(np.prod(list(sizes.values())))
    if total > len(devices):
        raise ValueError(f"mesh {sizes} needs {total} devices, there are {len(devices)}")
    grid = np.array(devices[:total]).reshape(tuple(sizes.values()))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into; a batch's number of groups must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def partition_spec(axes: tuple[str | None, ...], rules: Rules = RULES) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*[rules.get(axis) if axis else None for axis in axes])


def param_shardings(spec_tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns a NamedSharding for each ParamSpec of the tree.

    Raises:
      ValueError: names every dimension that is not a multiple of its mesh axis.
    """
    faults = []

    def sharding(path: tuple, spec: ParamSpec) -> NamedSharding:
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            mesh_axis = rules.get(axis) if axis else None
            if mesh_axis and size % mesh.shape[mesh_axis]:
                faults.append(f"{jax.tree_util.keystr(path)}: {axis} {size} over {mesh_axis}={mesh.shape[mesh_axis]}")
        return NamedSharding(mesh, partition_spec(spec.axes, rules))

    shardings = jax.tree_util.tree_map_with_path(sharding, spec_tree, is_leaf=is_spec)
    if faults:
        raise ValueError("sizes that the mesh does not divide: " + "; ".join(faults))
    return shardings


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_axes(batch: Any) -> Any:
    """Returns the batch axis of each array of a tree: `batch_axis` in the metadata of its dataclass field, else 0."""

    def axes(node: Any) -> Any:
        if not dataclasses.is_dataclass(node) or isinstance(node, type):
            return 0
        fields = {}
        for field in dataclasses.fields(node):
            value, declared = getattr(node, field.name), field.metadata.get("batch_axis")
            fields[field.name] = batch_axes(value) if declared is None else jax.tree.map(lambda _, a=declared: a, value)
        return dataclasses.replace(node, **fields)

    return jax.tree.map(axes, batch, is_leaf=dataclasses.is_dataclass)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a host batch on the mesh, each array split along its batch axis into `batch_shards` parts.

    Args:
      batch: Prompts, TrainBatch, an array, or a tree of these.
    Raises:
      ValueError: names an array whose batch axis is not a multiple of the number of parts.
    """
    shards = batch_shards(mesh)

    def put(path: tuple, array: Any, axis: int) -> jax.Array:
        if array.shape[axis] % shards:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"{name}: {array.shape[axis]} rows do not divide over data*fsdp = {shards}")
        spec = PartitionSpec(*[None] * axis, RULES["batch"])
        return jax.device_put(array, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, batch, batch_axes(batch))


def ambient_shards() -> int:
    """Returns the number of parts that a batch is split into on the ambient mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how to shard an activation over the ambient mesh; does nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def per_shard(f: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """Returns `f` wrapped so that each device runs it on its own rows and heads.

    Kernels need this, because the compiler cannot partition them. Without a mesh of several devices, returns `f`
    itself.

    Args:
      in_axes, out_axes: a tuple of logical axes per argument and per result; a tuple for a tree of arrays applies to
        each of its arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f
    specs = [jax.tree.map(partition_spec, axes, is_leaf=is_axes) for axes in (in_axes, out_axes)]
    return jax.shard_map(f, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def is_axes(node: Any) -> bool:
    """Returns True for a tuple of logical axes."""
    return type(node) is tuple and all(axis is None or isinstance(axis, str) for axis in node)
