"""Plans a run: compiles the programs of its stages for a target, finds what fits, and searches for what is fastest."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from r1vl_jax.config import REMAT, Config
from r1vl_jax.errors import ConfigError, DeviceMemoryError
from r1vl_jax.model.backend import choose
from r1vl_jax.model.config import ModelConfig, load_config, parse_config
from r1vl_jax.model.published import PUBLISHED
from r1vl_jax.model.spec import num_params
from r1vl_jax.parallel.sharding import batch_shards, make_mesh
from r1vl_jax.planning.calls import Call, Rows, stage_calls, typical_rows
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
        self.config, self.target, self.say = config, target, say
        section = config.model
        platform = target.device.backend
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
        """Returns the size of a stage's questions."""
        rows, (prompt, images) = typical_rows(config, self.model, stage), self._rows
        count = rows.images if images is None else images
        tokens = rows.prompt + (count - rows.images) * rows.patches // self.model.vision.merge_size**2
        prompt = min(tokens, config.data.max_prompt_tokens) if prompt is None else prompt
        return dataclasses.replace(rows, prompt=prompt, images=count)

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
            programs.append(plan_program(call, mesh, self.target))
            self.say(row(programs[-1]))
        steps = section.steps or math.ceil(section.epochs * _ROWS / section.batch_size)
        plan = StepPlan(stage, self.target, dict(mesh.shape), tuple(programs), steps)
        self.say("\n" + "\n".join(summary(plan)))
        return plan

    def gradient(self, stage: str, overrides: Overrides) -> ProgramPlan:
        """Compiles the gradient program of a stage alone, which nearly always needs most memory.

        Raises: ConfigError or DeviceMemoryError if these overrides cannot be.
        """
        mesh, calls = self.calls(replaced(self.config, overrides), stage)
        return plan_program(next(call for call in calls if call.name == "gradient"), mesh, self.target)

    # What fits, and what would help.

    def advise(self, plan: StepPlan) -> None:
        """Prints the largest micro-batch that fits; if nothing fits, what each lever would save."""
        if self.target.device.memory == math.inf:
            return
        usable, key = self.target.device.usable, f"{SECTION[plan.stage]}.micro_batch_size"
        largest = self.largest_micro_batch(plan)
        if largest:
            count, peak = largest
            self.say(f"largest micro-batch whose gradient fits: {count} ({peak / 1e9:.1f} GB): --{key} {count}")
        else:
            self.say("no micro-batch fits")
        if plan.fits:
            return
        now = next(program for program in plan.programs if program.name == "gradient").peak
        for overrides in self.levers(plan.stage):
            try:
                peak = self.gradient(plan.stage, overrides).peak
            except (ConfigError, DeviceMemoryError):
                continue
            verdict = "fits" if peak <= usable else "does not fit alone"
            self.say(f"  {flags(overrides)}: {(peak - now) / 1e9:+.1f} GB, {peak / 1e9:.1f} GB: {verdict}")

    def levers(self, stage: str) -> Iterator[Overrides]:
        """Yields changes that need less memory."""
        config, key = self.config, SECTION[stage]
        section = getattr(config, key)
        if config.model.remat != "full":
            yield {"model.remat": "full"}
        if section.micro_batch_size > 1:
            yield {f"{key}.micro_batch_size": section.micro_batch_size // 2}
        if not section.optimizer.freeze_vision:
            yield {f"{key}.optimizer.freeze_vision": True}
        if section.optimizer.first_moment == "float32":
            yield {f"{key}.optimizer.first_moment": "bfloat16"}
        if stage == "step_grpo" and config.rl.reference == "device":
            yield {"rl.reference": "host"}
        if section.max_pixels > 200_000:
            yield {f"{key}.max_pixels": section.max_pixels // 2}
        mesh = self.mesh(config).shape
        for fsdp in (2 * mesh["fsdp"], mesh["data"] * mesh["fsdp"]):
            if mesh["data"] > 1 and mesh["data"] * mesh["fsdp"] % fsdp == 0:
                yield {"mesh.data": mesh["data"] * mesh["fsdp"] // fsdp, "mesh.fsdp": fsdp}

    def largest_micro_batch(self, plan: StepPlan) -> tuple[int, int] | None:
        """Returns the largest micro-batch whose gradient fits, and its peak. Memory grows in proportion to it."""
        section, key = getattr(self.config, SECTION[plan.stage]), f"{SECTION[plan.stage]}.micro_batch_size"
        whole = section.batch_size if plan.stage == "sft" else section.questions_per_step
        shards = plan.mesh["data"] * plan.mesh["fsdp"]
        counts = [count for count in range(shards, whole + 1, shards) if whole % count == 0]
        now = next(program for program in plan.programs if program.name == "gradient")
        return self.largest(plan.stage, {}, key, counts, {section.micro_batch_size: now.peak})

    def largest(
        self, stage: str, overrides: Overrides, key: str, counts: list[int], peaks: dict[int, int]
    ) -> tuple[int, int] | None:
        """Returns the largest of `counts` whose gradient fits, and its peak, by few compilations.

        Args:
          key: the micro-batch's key in the configuration.
          peaks: count -> peak, where it is known; what is found is added.
        """
        usable = self.target.device.usable

        def peak(count: int) -> int:
            if count not in peaks:
                try:
                    peaks[count] = self.gradient(stage, {**overrides, key: count}).peak
                except DeviceMemoryError:
                    peaks[count] = 1 << 62
            return peaks[count]

        low, high = -1, len(counts)  # counts[low] fits, counts[high] does not
        guess = next((i for i, count in enumerate(counts) if count in peaks), 0)
        while high - low > 1:
            low, high = (guess, high) if peak(counts[guess]) <= usable else (low, guess)
            known = sorted((count, size) for count, size in peaks.items() if size < 1 << 62)
            guess = guess + 1 if low == guess else guess - 1
            if len(known) > 1:
                (a, x), (b, y) = known[0], known[-1]
                reach = a + (usable - x) * (b - a) / max(1, y - x)
                guess = max((i for i, count in enumerate(counts) if count <= reach), default=low + 1)
            guess = min(max(guess, low + 1), high - 1)
        return (counts[low], peaks[counts[low]]) if low >= 0 else None

    # Search.

    def search(self) -> list[StepPlan]:
        """Tries meshes, remat and micro-batches for each stage, prints the best three, and plans the best."""
        return [self._search(stage) for stage in self.config.stages]

    def _search(self, stage: str) -> StepPlan:
        key = f"{SECTION[stage]}.micro_batch_size"
        section = getattr(self.config, SECTION[stage])
        whole = section.batch_size if stage == "sft" else section.questions_per_step
        found: list[tuple[float, int, Overrides]] = []
        for mesh, remat in itertools.product(self.meshes(whole), REMAT):
            shards = mesh["mesh.data"] * mesh["mesh.fsdp"]
            counts = [count for count in range(shards, whole + 1, shards) if whole % count == 0]
            overrides = {**mesh, "model.remat": remat}
            self.say(f"trying {flags(overrides)}")
            try:
                best = self.largest(stage, overrides, key, counts, {})
                if best is None:
                    continue
                overrides = {**overrides, key: best[0]}
                program = self.gradient(stage, overrides)
            except ConfigError as error:
                self.say(f"  {error}")
                continue
            found.append((program.time * whole / best[0], program.peak, overrides))
            self.say(f"  micro-batches of {best[0]}: {program.peak / 1e9:.1f} GB, {found[-1][0]:.2f} s")
        if not found:
            raise ConfigError(f"{self.target}: no mesh, remat and micro-batch fit {stage}")
        found.sort(key=lambda item: item[0])
        self.say(f"\n{stage}: the best by the time of their gradients, at the roofline")
        for seconds, peak, overrides in found[:3]:
            self.say(f"  {seconds:.2f} s, {peak / 1e9:.1f} GB: {flags(overrides)}")
        for _, _, overrides in found:
            plan = self.stage(replaced(self.config, overrides), stage)
            if plan.fits:
                break
        return plan

    def meshes(self, questions: int) -> list[Overrides]:
        """Returns meshes on which the train state may fit, with as little communication as that allows first."""
        count, tensors = self.target.count, [1, 2, 4, 8]
        state = STATE_BYTES * num_params(self.model)
        meshes = []
        for tensor in (t for t in tensors if t <= self.target.per_host and count % t == 0):
            for fsdp in (1 << i for i in range((count // tensor).bit_length())):
                shards = count // tensor
                if shards % fsdp or shards > questions or self.model.kv_heads % tensor:
                    continue
                if state / (fsdp * tensor) < self.target.device.usable:
                    meshes.append({"mesh.data": shards // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": tensor})
            if meshes:
                break  # tensor parallelism exchanges much more; it is tried only if nothing else may fit
        return meshes


_ROWS = 260_000  # of Mulberry-260k, for the length of an epoch whose data is not read


def _model(path: str, size: str | None) -> ModelConfig:
    """Returns the model of a folder, or a published one. Raises ConfigError."""
    if size:
        return parse_config(PUBLISHED[size])
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"model.path {path}: no config.json there; --size {', '.join(PUBLISHED)} plans for a published model"
        )
    return load_config(path)
