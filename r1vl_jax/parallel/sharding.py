"""One table from logical axes to mesh axes, and the functions that apply it. No layer names a mesh axis.

Mesh axes: `data` (replicas), `fsdp` (replicas that split the train state), `tensor` (heads, MLP, vocabulary).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# The rules of the train state. A logical axis that is not here is not sharded.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# The rollout's copy of the weights: never split over fsdp; over tensor where the config says so.
ROLLOUT_RULES = {
    "tensor": {axis: mesh for axis, mesh in RULES.items() if axis != "embed"},
    "replicated": {"batch": ("data", "fsdp")},
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of the given sizes; one of them may be -1 and takes the devices that are left.

    Raises ValueError where the devices do not divide.
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
    """Number of parts that a batch is split into: groups per batch must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def partition_spec(axes: tuple[str | None, ...], rules=RULES) -> PartitionSpec:
    return PartitionSpec(*[rules.get(axis) if axis else None for axis in axes])


def param_shardings(spec_tree: Any, mesh: Mesh, rules=RULES) -> Any:
    """A NamedSharding for each ParamSpec. Raises ValueError naming every dimension that does not divide."""
    faults = []

    def one(path, spec):
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            mesh_axis = rules.get(axis) if axis else None
            if mesh_axis and size % mesh.shape[mesh_axis]:
                faults.append(f"{jax.tree_util.keystr(path)}: {axis} {size} over {mesh_axis}={mesh.shape[mesh_axis]}")
        return NamedSharding(mesh, partition_spec(spec.axes, rules))

    shardings = jax.tree_util.tree_map_with_path(one, spec_tree, is_leaf=lambda node: hasattr(node, "hf_name"))
    if faults:
        raise ValueError("sizes that the mesh does not divide: " + "; ".join(faults))
    return shardings


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a host batch, split over its rows (axis 0; axis 1 of M-RoPE positions) by whole groups."""
    shards = batch_shards(mesh)

    def put(path, array):
        name = jax.tree_util.keystr(path)
        axis = 1 if "positions_3" in name else 0
        if array.shape[axis] % shards:
            raise ValueError(f"{name}: {array.shape[axis]} rows do not divide over data*fsdp = {shards}")
        spec = PartitionSpec(*[None] * axis, RULES["batch"])
        return jax.device_put(array, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, batch)


def ambient_shards() -> int:
    """Parts that a batch is split into on the ambient mesh; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how an activation lies on the ambient mesh; does nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def per_shard(f: Any, in_axes: Any, out_axes: Any) -> Any:
    """`f` run by each device on its own rows and heads: for kernels, which the partitioner cannot split.

    Args:
      in_axes, out_axes: trees of tuples of logical axes, one for each argument and result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f
    specs = [jax.tree.map(partition_spec, axes, is_leaf=is_axes) for axes in (in_axes, out_axes)]
    return jax.shard_map(f, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def is_axes(node: Any) -> bool:
    """True for a tuple of logical axes."""
    return type(node) is tuple and all(axis is None or isinstance(axis, str) for axis in node)
