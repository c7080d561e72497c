"""Reads from the text of an optimized HLO which data devices exchange, over which links, and how often."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from r1vl_jax.planning.hlo import Instruction, array_bytes, computations, rounds_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_PASSES = {"all-reduce": 2}  # a ring reduces and then gathers


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange, by all devices of the program.

    Attributes:
      kind: one of KINDS.
      bytes: that each device sends, in rings.
      times: how often it runs.
      size: devices of a group.
      between_hosts: a group has devices of several hosts.
    """

    kind: str
    bytes: float
    times: int
    size: int
    between_hosts: bool


def collectives(text: str, devices: int, per_host: int, *, rounds: int = 1) -> list[Collective]:
    """Returns the exchanges of a program.

    Args:
      devices: that run the program; those of a host have consecutive numbers.
      rounds: how often a loop runs of which XLA does not know it.
    """
    found, entry = computations(text)
    return list(_of(found, entry, 1, devices, per_host, rounds))


def _of(
    found: dict[str, list[Instruction]], name: str, times: int, devices: int, per_host: int, rounds: int
) -> Iterator[Collective]:
    shape_of = {each.name: each.shape for each in found.get(name, [])}
    for each in found.get(name, []):
        kind = each.opcode.removesuffix("-start")
        if kind in KINDS:
            yield _collective(kind, each, shape_of, times, devices, per_host)
            continue
        repeats = rounds_of(each, rounds) if each.opcode == "while" else 1
        inside = 1 if each.opcode == "while" else rounds
        for attribute in ("body", "calls", "to_apply", "true_computation", "false_computation"):
            if inner := each.called(attribute):
                yield from _of(found, inner, times * repeats, devices, per_host, inside)


def _collective(
    kind: str, each: Instruction, shape_of: dict[str, str], times: int, devices: int, per_host: int
) -> Collective:
    groups = replica_groups(each.line, devices)
    size = len(groups[0])
    sent = sum(array_bytes(shape_of.get(operand, "")) for operand in each.operands)
    whole = sent * size if kind == "all-gather" else sent
    share = 1.0 if kind == "collective-permute" else (size - 1) / size * _PASSES.get(kind, 1)
    hosts = any(len({device // per_host for device in group}) > 1 for group in groups)
    return Collective(kind, whole * share if size > 1 else 0.0, times, size, hosts)


def replica_groups(line: str, devices: int) -> list[list[int]]:
    """Returns the groups of device numbers in a line of HLO: `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh[...] {...}`."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", line):
        return _lists(pairs.group(1))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*)\{([^}]*)\}", line):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        sizes, inside = [int(size) for size in axes.values()], re.findall(r"'([^']+)'", mesh.group(2))
        return _grouped(np.arange(math.prod(sizes)).reshape(sizes), [list(axes).index(axis) for axis in inside])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = ([int(n) for n in iota.group(i).split(",")] for i in (1, 2))
        order = [int(n) for n in iota.group(3).split(",")] if iota.group(3) else range(len(dims))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()
    if lists := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line):
        return _lists(lists.group(1))
    return [list(range(devices))]


def _lists(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",") if n.strip()] for group in re.findall(r"\{([\d, ]*)\}", text)]


def _grouped(grid: np.ndarray, axes: Sequence[int]) -> list[list[int]]:
    """Returns the groups of a grid of devices that differ along these axes alone."""
    others = [axis for axis in range(grid.ndim) if axis not in axes]
    size = math.prod(grid.shape[axis] for axis in axes)
    return grid.transpose([*others, *axes]).reshape(-1, size).tolist()
