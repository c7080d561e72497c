"""Reads from the text of an optimized HLO which data devices exchange, over which links, and how often."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
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
      ports: devices of a group on one host, at least, through which it reaches other hosts; 0: it has one host.
    """

    kind: str
    bytes: float
    times: int
    size: int
    ports: int

    def seconds(self, link: float, network: float) -> dict[str, float]:
        """Returns the seconds on the links inside of hosts, and between hosts. A ring leaves a host through all ports.

        Args:
          link, network: bytes/s of a device.
        """
        total = self.bytes * self.times
        inside = total if self.ports != 1 else 0.0
        return {"link": inside / link, "network": total / (self.ports * network) if self.ports else 0.0}


def collectives(text: str, devices: int, per_host: int, *, rounds: int = 1) -> list[Collective]:
    """Returns the exchanges of a program.

    Args:
      devices: that run the program; those of a host have consecutive numbers.
      rounds: of a loop whose number of rounds XLA does not know.
    """
    found, entry = computations(text)
    return list(_of(found, entry, 1, devices, per_host, rounds, set()))


def _of(
    found: dict[str, list[Instruction]],
    name: str,
    times: int,
    devices: int,
    per_host: int,
    rounds: int,
    seen: set[str],
    fused: bool = False,
) -> Iterator[Collective]:
    """Yields the exchanges of a computation.

    Args:
      seen: channels of exchanges in fusions. For TPUs one exchange is in several: its start, its end, what runs beside.
    """
    shape_of = {each.name: each.shape for each in found.get(name, [])}
    for each in found.get(name, []):
        kind = each.opcode.removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"channel_id=\d+", each.line) if fused else None
            if channel is None or channel.group() not in seen:
                seen |= {channel.group()} if channel else set()
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind  # so TPUs name it
                yield _collective(kind, each, shape_of, times, devices, per_host)
            continue
        repeats, inside = (rounds_of(each, found, rounds), 1) if each.opcode == "while" else (1, rounds)
        for attribute in ("body", "calls", "to_apply"):
            if inner := each.called(attribute):
                in_fusion = fused or each.opcode == "fusion"
                yield from _of(found, inner, times * repeats, devices, per_host, inside, seen, fused=in_fusion)


def _collective(
    kind: str, each: Instruction, shape_of: dict[str, str], times: int, devices: int, per_host: int
) -> Collective:
    groups = replica_groups(each.line, devices)
    size = len(groups[0])
    sent = sum(array_bytes(shape_of.get(operand, ""), fast=True) for operand in each.operands)
    whole = sent * size if kind == "all-gather" else sent
    share = 1.0 if kind == "collective-permute" else (size - 1) / size * _PASSES.get(kind, 1)
    hosts = [Counter(device // per_host for device in group) for group in groups]
    ports = min((min(counts.values()) for counts in hosts if len(counts) > 1), default=0)
    return Collective(kind, whole * share if size > 1 else 0.0, times, size, ports)


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
