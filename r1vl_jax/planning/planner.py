"""Plans a run: compiles the programs of its stages for a target, finds what fits, and searches for what is fastest."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from r1vl_jax.config import REMAT, Config
from r1vl_jax.errors import ConfigError
from r1vl_jax.model.backend import choose
from r1vl_jax.model.config import ModelConfig, load_config, parse_config
from r1vl_jax.model.published import PUBLISHED
from r1vl_jax.model.spec import num_params
from r1vl_jax.parallel.devices import matmul_precision
from r1vl_jax.parallel.sharding import batch_shards, make_mesh
from r1vl_jax.planning.calls import Call, Rows, rows_of, stage_calls
from r1vl_jax.planning.report import HEADINGS, ProgramPlan, StepPlan, plan_program, row, summary
from r1vl_jax.planning.targets import Target
from r1vl_jax.training.programs import build_programs

SECTION = {"sft": "sft", "step_grpo": "rl"}  # stage -> its section of the configuration
Overrides = dict[str, Any]  # dotted key -> value
STATE_BYTES = 12  # a parameter and its moments


def replaced(config: Config, overrides: Overrides) -> Config:
    """Returns a configuration with other values of dotted keys."""
    for key, value in overrides.items():
        sections = [config]
        *path, name = key.split(".")
        for part in path:
            sections.append(getattr(sections[-1], part))
        value = dataclasses.replace(sections.pop(), **{name: value})
        for part, section in zip(reversed(path), reversed(sections), strict=True):
            value = dataclasses.replace(section, **{part: value})
        config = value
    return config


def flags(overrides: Overrides) -> str:
    """Returns overrides as arguments of a command line."""
    return " ".join(f"--{key} {str(value).lower()}" for key, value in overrides.items())


class Planner:
    """Plans the stages of a configuration on a target.

    Args:
      size: a published model; None: the one in model.path.
      prompt, images: tokens and images of a question; None: one image of max_pixels and 256 further tokens.
      say: prints a line.
    """

    def __init__(
        self,
        config: Config,
        target: Target,
        size: str | None = None,
        prompt: int | None = None,
        images: int | None = None,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        section, platform = config.model, target.device.backend
        if section.dtype != "bfloat16":  # the rates of devices are those of bfloat16
            target = untimed(target)
        self.config, self.target, self.say = config, target, say
        try:
            backend = choose(section.attention, section.kernels, dtype=section.dtype, platform=platform)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.model = _model(section.path, size).with_backend(*backend)
        self.devices = target.devices()
        self._rows = prompt, images
        say(
            f"{size or section.path}: {num_params(self.model) / 1e9:.2f}B parameters on {target}; compute in "
            f"{section.dtype}, attention {backend[0]}, kernels {backend[1]}"
        )

    def mesh(self, config: Config) -> Mesh:
        """Returns the mesh of a configuration on the target. Raises ConfigError if there is none."""
        sizes = config.mesh
        try:
            return make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices=self.devices)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def rows(self, config: Config, stage: str) -> Rows:
        """Returns the size of a stage's questions. Raises ConfigError if the images do not fit into the prompt."""
        prompt, images = self._rows
        return rows_of(config, self.model, stage, prompt=prompt, images=images)

    def calls(self, config: Config, stage: str) -> tuple[Mesh, Iterator[Call]]:
        """Returns the mesh and the programs of a stage. Raises ConfigError if the mesh does not divide the model."""
        mesh = self.mesh(config)
        section = getattr(config, SECTION[stage])
        if section.micro_batch_size % batch_shards(mesh):
            raise ConfigError(
                f"{SECTION[stage]}.micro_batch_size is {section.micro_batch_size}; expected a multiple of data*fsdp = "
                f"{batch_shards(mesh)}"
            )
        try:
            programs = build_programs(self.model, mesh, config, stage, 1000)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return mesh, stage_calls(self.model, config, mesh, stage, self.rows(config, stage), programs=programs)

    def run(self) -> list[StepPlan]:
        """Plans every stage, prints a table of each, and what fits or what would help."""
        plans = []
        for stage in self.config.stages:
            plans.append(self.stage(self.config, stage))
            self.advise(plans[-1])
        return plans

    def stage(self, config: Config, stage: str) -> StepPlan:
        """Compiles all programs of a stage and prints what each needs."""
        mesh, calls = self.calls(config, stage)
        rows, section = self.rows(config, stage), getattr(config, SECTION[stage])
        size = section.batch_size if stage == "sft" else section.questions_per_step
        group = f" x {section.group_size} answers of {section.max_new_tokens}" if stage == "step_grpo" else ""
        answer = f", answer {rows.answer}" if stage == "sft" else ""
        self.say(
            f"\n{stage} on mesh {dict(mesh.shape)}: {size} questions{group}, prompt {rows.prompt} tokens with "
            f"{rows.images} image(s) of {rows.patches} patches{answer}, micro-batches of {section.micro_batch_size}, "
            f"remat {config.model.remat}\n\n{HEADINGS}"
        )
        programs = []
        for call in calls:
            programs.append(self.program(config, call, mesh))
            self.say(row(programs[-1]))
        plan = StepPlan(stage, self.target, dict(mesh.shape), tuple(programs), section.steps)
        self.say("\n" + "\n".join(summary(plan)))
        return plan

    def program(self, config: Config, call: Call, mesh: Mesh) -> ProgramPlan:
        """Compiles a program as training does."""
        with jax.default_matmul_precision(matmul_precision(config.model.matmul_precision, config.model.dtype)):
            return plan_program(call, mesh, self.target)

    def alone(self, stage: str, overrides: Overrides, name: str = "gradient") -> ProgramPlan:
        """Compiles one program of a stage. Raises ConfigError if these overrides cannot be."""
        config = replaced(self.config, overrides)
        mesh, calls = self.calls(config, stage)
        return self.program(config, next(call for call in calls if call.name == name), mesh)

    # What fits, and what would help.

    def advise(self, plan: StepPlan) -> None:
        """Prints the largest micro-batch that fits; if nothing fits, what each lever would save."""
        if self.target.device.memory == math.inf:
            return
        usable, key = self.target.device.usable, f"{SECTION[plan.stage]}.micro_batch_size"
        if largest := self.largest_micro_batch(plan):
            count, gradient = largest
            self.say(
                f"largest micro-batch whose gradient fits: {count} ({gradient.peak / 1e9:.1f} GB): --{key} {count}"
            )
        else:
            self.say("no micro-batch fits")
        if plan.fits:
            return
        now = plan.largest
        self.say(f"what would help {now.name}:")
        for overrides in self.levers(plan.stage, now.name):
            try:
                peak = self.alone(plan.stage, overrides, now.name).peak
            except (ConfigError, StopIteration):
                continue
            sizes = f"{(peak - now.peak) / 1e9:+.1f} GB, {peak / 1e9:.1f} GB: "
            verdict = "fits" if peak <= usable else "not enough alone"
            self.say(f"  {flags(overrides)}: {sizes if math.isfinite(peak - now.peak) else ''}{verdict}")

    def levers(self, stage: str, program: str) -> Iterator[Overrides]:
        """Yields changes with which a program needs less memory."""
        config, key = self.config, SECTION[stage]
        section, mesh = getattr(config, key), self.mesh(config).shape
        shards = mesh["data"] * mesh["fsdp"]
        if program in ("rollout_weights", "prefill", "decode", "compact"):
            if config.mesh.rollout_weights == "replicated" and mesh["tensor"] > 1:
                yield {"mesh.rollout_weights": "tensor"}
            if section.questions_per_step // 2 >= max(section.micro_batch_size, shards):
                yield {"rl.questions_per_step": section.questions_per_step // 2}
        else:
            if config.model.remat != "full":
                yield {"model.remat": "full"}
            if section.micro_batch_size > shards:
                yield {f"{key}.micro_batch_size": section.micro_batch_size // 2}
        if not section.optimizer.freeze_vision:
            yield {f"{key}.optimizer.freeze_vision": True}
        if section.optimizer.first_moment == "float32":
            yield {f"{key}.optimizer.first_moment": "bfloat16"}
        if stage == "step_grpo" and config.rl.reference == "device":
            yield {"rl.reference": "host"}
        if section.max_pixels > 200_000:
            yield {f"{key}.max_pixels": section.max_pixels // 2}
        for fsdp in sorted({2 * mesh["fsdp"], shards} - {mesh["fsdp"]}):
            if shards % fsdp == 0:
                yield {"mesh.data": shards // fsdp, "mesh.fsdp": fsdp}

    def largest_micro_batch(self, plan: StepPlan) -> tuple[int, ProgramPlan] | None:
        """Returns the largest micro-batch whose gradient fits, and that gradient."""
        section, key = getattr(self.config, SECTION[plan.stage]), f"{SECTION[plan.stage]}.micro_batch_size"
        whole = section.batch_size if plan.stage == "sft" else section.questions_per_step
        counts = _divisors(whole, plan.mesh["data"] * plan.mesh["fsdp"])
        now = next(program for program in plan.programs if program.name == "gradient")
        return self.largest(plan.stage, {}, key, counts, {section.micro_batch_size: now})

    def largest(
        self, stage: str, overrides: Overrides, key: str, counts: list[int], compiled: dict[int, ProgramPlan]
    ) -> tuple[int, ProgramPlan] | None:
        """Returns the largest of `counts` whose gradient fits, and that gradient, by bisection.

        Args:
          key: the micro-batch's key in the configuration.
          compiled: count -> gradient, where it is known; what is compiled is added.
        """
        low, high = -1, len(counts)  # counts[low] fits, counts[high] does not
        while high - low > 1:
            known = [i for i in range(low + 1, high) if counts[i] in compiled]
            middle = known[0] if known else (low + high) // 2
            count = counts[middle]
            if count not in compiled:
                compiled[count] = self.alone(stage, {**overrides, key: count})
            low, high = (middle, high) if compiled[count].peak <= self.target.device.usable else (low, middle)
        return (counts[low], compiled[counts[low]]) if low >= 0 else None

    # Search.

    def search(self) -> list[StepPlan]:
        """Tries meshes, remat and micro-batches for each stage, prints the best three, and plans the best."""
        return [self._search(stage) for stage in self.config.stages]

    def _search(self, stage: str) -> StepPlan:
        key = f"{SECTION[stage]}.micro_batch_size"
        section = getattr(self.config, SECTION[stage])
        whole = section.batch_size if stage == "sft" else section.questions_per_step
        found: list[tuple[float, float, Overrides]] = []
        for mesh, remat in itertools.product(self.meshes(whole), REMAT):
            counts = _divisors(whole, mesh["mesh.data"] * mesh["mesh.fsdp"])
            overrides = {**mesh, "model.remat": remat}
            self.say(f"trying {flags(overrides)}")
            try:
                best = self.largest(stage, overrides, key, counts, {})
            except ConfigError as error:
                self.say(f"  {error}")
                continue
            if best:
                count, gradient = best
                found.append((gradient.time * whole / count, gradient.peak, {**overrides, key: count}))
                self.say(f"  micro-batches of {count}: {gradient.peak / 1e9:.1f} GB, {found[-1][0]:.2f} s")
        if not found:
            raise ConfigError(f"{self.target}: no mesh, remat and micro-batch fit {stage}")
        found.sort(key=lambda item: item[0])
        self.say(f"\n{stage}: the best by the time of their gradients, at the roofline")
        for seconds, peak, overrides in found[:3]:
            self.say(f"  {seconds:.2f} s, {peak / 1e9:.1f} GB: {flags(overrides)}")
        plans = (self.stage(replaced(self.config, overrides), stage) for _, _, overrides in found[:3])
        best = next(plans)
        return best if best.fits else next((plan for plan in plans if plan.fits), best)

    def meshes(self, questions: int) -> list[Overrides]:
        """Returns meshes on which the train state may fit, with as little communication as that allows first."""
        count, tensors = self.target.count, [1, 2, 4, 8]
        state = STATE_BYTES * num_params(self.model)
        meshes = []
        for tensor in (t for t in tensors if t <= self.target.per_host and count % t == 0):
            shards = count // tensor
            for fsdp in _divisors(shards, 1):
                if shards > questions or self.model.kv_heads % tensor:
                    continue
                if state / (fsdp * tensor) < self.target.device.usable:
                    meshes.append({"mesh.data": shards // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": tensor})
            if meshes:
                break  # tensor parallelism exchanges much more; it is tried only if nothing else may fit
        return meshes


def untimed(target: Target) -> Target:
    """Returns the target without its rates."""
    rates = {"flops": {"peak": math.inf}, "bandwidth": {"peak": math.inf}, "link": math.inf, "network": math.inf}
    return dataclasses.replace(target, device=dataclasses.replace(target.device, **rates))


def _divisors(whole: int, multiple: int) -> list[int]:
    """Returns the divisors of a number that are multiples of another, in ascending order."""
    return [count for count in range(multiple, whole + 1, multiple) if whole % count == 0]


def _model(path: str, size: str | None) -> ModelConfig:
    """Returns the model of a folder, or a published one. Raises ConfigError."""
    if size:
        return parse_config(PUBLISHED[size])
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"model.path {path}: no config.json there; --size {', '.join(PUBLISHED)} plans for a published model"
        )
    return load_config(path)
