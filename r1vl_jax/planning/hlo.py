"""Reads what a program does from the text of its optimized HLO: kernels, bytes, FLOPs, passes over the logits.

The body of a loop counts as often as XLA says that it runs. If XLA does not know (a decode loop), it counts `rounds`
times: with 1, the figures are those of one round. (Instructions outside all loops then count too; decode has almost
none.)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
NO_KERNEL = {
    "parameter", "get-tuple-element", "tuple", "constant", "bitcast", "while", "after-all", "partition-id", "call",
    "opt-barrier", "conditional",
}  # fmt: skip
SLICES = {"slice", "dynamic-slice", "gather"}
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*S\(1\)[^}]*\})?")  # S(1): a TPU's fast memory
INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. `shape` is the text of its result's shape, `operands` the names of its operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str

    def called(self, attribute: str) -> str:
        """Returns the name of the computation that the instruction calls, or ""."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.line)
        return found.group(1) if found else ""

    @property
    def kind(self) -> str:
        """Returns the opcode, and the target of a custom call."""
        target = re.search(r'custom_call_target="([^"]+)"', self.line)
        return f"{self.opcode}:{target.group(1)}" if target else self.opcode


@dataclasses.dataclass
class Cost:
    """Figures of a program, or of one round of its loop.

    Attributes:
      kernels: operations that a GPU starts.
      bytes: read and written by all kernels; an update in place counts what it writes.
      elementwise_bytes: those of kernels that are neither matmuls nor fused attention nor our own.
      flops: of matmuls, without fused attention and kernels of our own.
      logit_passes: how often kernels read or write an array of `logits` elements.
      attention_calls: kernels of cuDNN's fused attention.
    """

    kernels: int = 0
    bytes: float = 0
    elementwise_bytes: float = 0
    flops: float = 0
    logit_passes: int = 0
    attention_calls: int = 0


def shapes(text: str) -> Iterator[tuple[str, list[int]]]:
    """Yields (dtype, sizes) of each array in the text of a shape."""
    for dtype, sizes, _ in SHAPE.findall(text):
        yield dtype, [int(size) for size in sizes.split(",") if size]


def array_bytes(text: str, *, fast: bool = False) -> int:
    """Returns the bytes of all arrays in the text of a shape. `fast`: also of those in a TPU's fast memory."""
    found = SHAPE.findall(text)
    sizes = ((dtype, sizes.split(",")) for dtype, sizes, is_fast in found if fast or not is_fast)
    return sum(_width(dtype) * math.prod(int(size) for size in axes if size) for dtype, axes in sizes)


def _width(dtype: str) -> int:
    bits = re.fullmatch(r"[su](\d+)", dtype)
    return max(1, int(bits.group(1)) // 8) if bits else BYTES.get(dtype, 1 if dtype.startswith("f8") else 0)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns (the instructions of each computation by name, the name of the entry computation)."""
    found: dict[str, list[Instruction]] = {}
    current, entry = [], ""
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head:
            current = found.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif parsed := INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line.strip())):
            name, shape, opcode, rest = parsed.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split(")")[0]))
            current.append(Instruction(name, shape, opcode, operands, line))
    return found, entry


def program_cost(text: str, logits: int = 0, *, rounds: int = 1) -> Cost:
    """Returns the cost of a program from its HLO text.

    Args:
      logits: the number of elements of a chunk of logits.
      rounds: of a loop whose number of rounds XLA does not know; loops inside of it count once.
    """
    found, entry = computations(text)
    cost = Cost()
    _add(cost, found, entry, 1, logits, rounds)
    return cost


def rounds_of(loop: Instruction, found: dict[str, list[Instruction]], unknown: int) -> int:
    """Returns how often a loop runs; `unknown`: if XLA does not know it.

    For GPUs and CPUs XLA says the number. For TPUs the loop's condition has it: a counter is less than a constant.
    """
    if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.line):
        return int(known.group(1))
    condition = found.get(loop.called("condition"), [])
    limits = [number for each in condition for number in re.findall(r"= s32\[\]\S* constant\((\d+)\)", each.line)]
    counts = any(re.search(r"^\s*ROOT .* compare\(.*direction=LT", each.line) for each in condition)
    return int(limits[0]) if counts and len(limits) == 1 else unknown


def _add(cost: Cost, found: dict[str, list[Instruction]], name: str, times: int, logits: int, unknown: int) -> None:
    """Adds the kernels of one computation, and of the loops in it."""
    shape_of = {each.name: each.shape for each in found[name]}
    for each in found[name]:
        if each.opcode == "while":
            for part in ("condition", "body"):
                _add(cost, found, each.called(part), times * rounds_of(each, found, unknown), logits, 1)
        if each.opcode in NO_KERNEL or each.opcode.endswith("-done") or "AllocateBuffer" in each.kind:
            continue
        body = found.get(each.called("calls"), []) if each.opcode.startswith("fusion") else []
        sizes = [array_bytes(shape_of.get(operand, "")) for operand in each.operands]
        # The shape of an operation that runs beside others ("-start") repeats its operands.
        out = [body[-1].shape if each.opcode.endswith("-start") and body else each.shape]
        read, written = _fused_bytes(body, sizes) if body else _plain_bytes(each, shape_of, sizes)
        moved = sum(read) + array_bytes(out[0]) + written
        flops = sum(_dot_flops(found, body or [each], shape_of))
        cost.kernels += times
        cost.bytes += times * moved
        cost.flops += times * flops
        cost.attention_calls += times * ("fmha" in each.kind)
        if not flops and "fmha" not in each.kind and "gemm" not in each.kind and "triton" not in each.kind:
            cost.elementwise_bytes += times * moved
        whole = [shape_of.get(operand, "") for operand, a, b in zip(each.operands, read, sizes, strict=True) if a == b]
        elements = [math.prod(size) for text in out + whole for _, size in shapes(text)]
        cost.logit_passes += times * (logits > 0 and elements.count(logits))


def _plain_bytes(each: Instruction, shape_of: dict[str, str], sizes: list[int]) -> tuple[list[int], int]:
    """Returns what `_fused_bytes` does for a kernel that is a single instruction."""
    if each.opcode == "dynamic-update-slice":
        return [0, *sizes[1:]], sizes[1] - array_bytes(each.shape)
    if each.opcode in SLICES:
        return [array_bytes(each.shape), *sizes[1:]], 0
    return sizes, 0


def _fused_bytes(body: list[Instruction], sizes: list[int]) -> tuple[list[int], int]:
    """Returns (bytes that a fusion reads of each operand, bytes of its result that it does not write, negative).

    It reads a part of an operand of which only slices are used, and writes a part of a result that it updates in place.
    """
    shape_of = {each.name: each.shape for each in body}
    shares: dict[str, dict[int, float]] = {}  # of each operand, the share that is read to compute a name
    unwritten = 0
    for each in body:
        behind = [shares.get(operand, {}) for operand in each.operands]
        if each.opcode == "parameter":
            behind = [{int(each.line.split("parameter(")[1].split(")")[0]): 1.0}]
        elif each.opcode == "dynamic-update-slice":
            unwritten += array_bytes(shape_of.get(each.operands[1], "")) - array_bytes(each.shape)
            behind = behind[1:]
        elif each.opcode in SLICES:
            share = array_bytes(each.shape) / max(1, array_bytes(shape_of[each.operands[0]]))
            behind[0] = {operand: share * part for operand, part in behind[0].items()}
        merged: dict[int, float] = {}
        for part in behind:
            for operand, share in part.items():
                merged[operand] = min(1.0, merged.get(operand, 0.0) + share)
        shares[each.name] = merged
    return [int(size * shares[body[-1].name].get(i, 0.0)) for i, size in enumerate(sizes)], unwritten


def _dot_flops(found: dict[str, list[Instruction]], body: list[Instruction], outer: dict[str, str]) -> Iterator[float]:
    """Yields the FLOPs of the matmuls in a kernel's instructions, those in computations that they call included."""
    shape_of = outer | {each.name: each.shape for each in body}
    for each in body:
        if each.opcode == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.line)
            _, left = next(shapes(shape_of[each.operands[0]]))
            _, out = next(shapes(each.shape))
            yield 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in axes.group(1).split(",")) if axes else 0
        elif each.opcode in ("fusion", "call"):
            yield from _dot_flops(found, found.get(each.called("calls") or each.called("to_apply"), []), {})
