"""Counts the FLOPs of a traced program: of its matmuls and of attention, on all devices together.

The count does not depend on the machine. Recomputation in a backward pass counts, as it is executed. Fused attention
counts every pair of a query and a key, also those that a mask leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax

_ATTENTION = {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5}  # matmuls of a pair of query and key


def flops(traced: jax.stages.Traced, *, rounds: int = 1) -> float:
    """Returns the FLOPs of a program; a multiplication and an addition are two.

    Args:
      rounds: how often a `while` loop runs.
    """
    return _of(traced.jaxpr.jaxpr, rounds)


def _of(jaxpr: Any, rounds: int) -> float:
    return sum(_equation(each, rounds) for each in jaxpr.eqns)


def _equation(each: Any, rounds: int) -> float:
    name, params = each.primitive.name, each.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = each.invars[0].aval.shape
        return 2.0 * math.prod(each.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    name = name.removesuffix("_wrapper")
    if name in _ATTENTION:
        (B, T, N, H), S = each.invars[0].aval.shape, each.invars[1].aval.shape[1]
        return 2.0 * _ATTENTION[name] * B * N * T * S * H
    if name == "cond":
        return max(_of(branch.jaxpr, rounds) for branch in params["branches"])
    times = {"scan": params.get("length"), "while": rounds}.get(name, 1)
    if name == "pallas_call":
        times = math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    if name == "shard_map":  # its body is the work of one device
        times = math.prod(params["mesh"].shape[axis] for axis in params.get("manual_axes", params["mesh"].axis_names))
    inside = 1 if name in ("while", "pallas_call") else rounds  # only the outermost loop is the one that is known
    return times * sum(_of(inner, inside) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs among an equation's parameters."""
    for key, value in params.items():
        if key in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun", "cond_jaxpr"):
            continue
        for item in value if isinstance(value, tuple | list) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
