"""Compiles the programs of a step for a target, and says what each needs: memory, FLOPs, bytes, time at the roofline.

program -> trace -> FLOPs
        -> lower, compile for the target -> memory, bytes moved, collectives
time at the roofline = the largest of FLOPs / rate, bytes / bandwidth, and bytes exchanged / links
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from r1vl_jax.common.text import one_line
from r1vl_jax.planning.calls import Call, device_bytes
from r1vl_jax.planning.collectives import Collective, collectives
from r1vl_jax.planning.flops import flops
from r1vl_jax.planning.hlo import program_cost
from r1vl_jax.planning.targets import Target


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What a program needs on each device. Bytes, FLOPs and seconds are those of one run of the program.

    Attributes:
      arguments, temporaries: bytes. Arguments that are donated count once.
      beside: bytes of what else is on the device.
      flops: of all devices together, divided by their number.
      moved: bytes that kernels read and write in the device's memory, at most.
      exchanged: kind of collective -> bytes that a device sends.
      seconds: bound -> seconds: compute, memory, link, network. Empty if the device's rates are not known.
      refused: why the compiler says that it cannot fit; "" if it does not.
      times: how often it runs in a step.
    """

    name: str
    arguments: int
    temporaries: int
    beside: int
    flops: float
    moved: float
    exchanged: dict[str, float]
    seconds: dict[str, float]
    times: int
    compile_seconds: float
    refused: str = ""

    @property
    def peak(self) -> float:
        """Bytes on a device while it runs; infinity if the compiler refused it."""
        return math.inf if self.refused else self.arguments + self.temporaries + self.beside

    @property
    def bound(self) -> str:
        """What limits it: compute, memory, link or network; "-": not known."""
        return max(self.seconds, key=lambda bound: self.seconds[bound]) if self.time else "-"

    @property
    def time(self) -> float:
        """Seconds at the roofline; 0: not known."""
        return max(self.seconds.values(), default=0.0)


def plan_program(call: Call, mesh: Mesh, target: Target) -> ProgramPlan:
    """Compiles a program for the target. Returns what it needs."""
    device, started = target.device, time.perf_counter()
    beside = sum(map(device_bytes, call.beside))
    with jax.set_mesh(mesh):
        traced = call.program.trace(*call.args)
        lowered = traced.lower(lowering_platforms=(device.platform,))
    work = flops(traced, rounds=call.rounds) / mesh.size
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler gives up if the memory is too small
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - started
        return ProgramPlan(call.name, 0, 0, beside, work, 0, {}, {}, call.times, seconds, one_line(error))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    moved = program_cost(text, rounds=call.rounds).bytes
    exchanges = collectives(text, mesh.size, target.per_host, rounds=call.rounds)
    seconds = {"compute": work / device.rate("flops"), "memory": moved / device.rate("bandwidth")}
    waits = [each.seconds(device.link, device.network) for each in exchanges]
    seconds |= {kind: sum(wait[kind] for wait in waits) for kind in ("link", "network")}
    return ProgramPlan(
        call.name, own, memory.temp_size_in_bytes, beside, work, moved, _exchanged(exchanges), seconds, call.times,
        time.perf_counter() - started,
    )  # fmt: skip


def _exchanged(exchanges: Iterable[Collective]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for each in exchanges:
        total[each.kind] += each.bytes * each.times
    return {kind: bytes_ for kind, bytes_ in total.items() if bytes_}


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The programs of a step, on a target.

    Attributes:
      steps: of the run; None: it depends on the number of rows.
    """

    stage: str
    target: Target
    mesh: dict[str, int]
    programs: tuple[ProgramPlan, ...]
    steps: int | None

    @property
    def largest(self) -> ProgramPlan:
        """The program that needs most memory."""
        return max(self.programs, key=lambda program: program.peak)

    @property
    def fits(self) -> bool:
        return self.largest.peak <= self.target.device.usable

    @property
    def seconds(self) -> float:
        """Of a step, at the roofline."""
        return sum(program.time * program.times for program in self.programs)

    @property
    def device_hours(self) -> float | None:
        """Of the whole stage, at the roofline, of the devices in the mesh."""
        return None if self.steps is None else self.seconds * self.steps * math.prod(self.mesh.values()) / 3600

    def to_json(self) -> dict[str, Any]:
        programs = [
            dataclasses.asdict(program) | {"peak": _finite(program.peak), "bound": program.bound}
            for program in self.programs
        ]
        return {
            "stage": self.stage,
            "target": str(self.target),
            "mesh": self.mesh,
            "fits": self.fits,
            "peak": _finite(self.largest.peak),
            "usable": _finite(self.target.device.usable),
            "steps": self.steps,
            "seconds_per_step": self.seconds,
            "device_hours": self.device_hours,
            "programs": programs,
        }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


HEADINGS = (
    f"{'':<16}{'times':>6}{'args':>8}{'temp':>8}{'beside':>8}{'peak, GB':>10}{'TFLOP':>10}{'moved, GB':>11}"
    f"{'sent, GB':>10}{'seconds':>10}  {'bound':<8}{'compile, s':>10}"
)


def row(program: ProgramPlan) -> str:
    """Returns a line of the table. Bytes and FLOPs are of one run, seconds of all runs in a step."""
    if program.refused:
        return f"{program.name:<16}{program.times:>6}  does not fit: {program.refused}"
    sent = sum(program.exchanged.values())
    seconds = f"{program.time * program.times:.3f}" if program.time else "-"
    return (
        f"{program.name:<16}{program.times:>6}{program.arguments / 1e9:>8.1f}{program.temporaries / 1e9:>8.1f}"
        f"{program.beside / 1e9:>8.1f}{program.peak / 1e9:>10.1f}{program.flops / 1e12:>10.2f}"
        f"{program.moved / 1e9:>11.1f}{sent / 1e9:>10.2f}{seconds:>10}  {program.bound:<8}"
        f"{program.compile_seconds:>10.0f}"
    )


def summary(plan: StepPlan) -> Iterator[str]:
    """Yields the lines after the table."""
    exchanged: Counter[str] = Counter()
    for program in plan.programs:
        exchanged.update({kind: bytes_ * program.times for kind, bytes_ in program.exchanged.items()})
    if exchanged:
        kinds = ", ".join(f"{kind} {bytes_ / 1e9:.1f}" for kind, bytes_ in exchanged.most_common())
        yield f"sent by each device in a step, GB: {kinds}"
    idle = plan.target.count - math.prod(plan.mesh.values())
    if idle:
        yield f"{idle} of {plan.target.count} devices have nothing to do: the mesh does not use them"
    if plan.seconds:
        hours = plan.device_hours
        price = "" if hours is None else f", {plan.steps:,} steps {hours:,.0f} device-hours"
        yield (
            f"at the roofline a step takes {plan.seconds:.1f} s{price}. That is what compute, memory and links allow; "
            "nothing was measured, and a real step takes longer"
        )
    usable, peak = plan.target.device.usable, plan.largest.peak
    if math.isinf(peak):
        yield f"{plan.largest.name} does not fit in {usable / 1e9:.1f} GB"
    elif math.isinf(usable):
        yield f"peak {peak / 1e9:.2f} GB, in {plan.largest.name}"
    else:
        verdict = "fits" if plan.fits else "does not fit"
        yield f"peak {peak / 1e9:.1f} GB, in {plan.largest.name}: {verdict} in {usable / 1e9:.1f} GB"
