"""The configuration: frozen dataclasses filled from a YAML file and dotted overrides, checked when they are made.

An unknown key is an error that names the nearest known one. Each field's `help` is what `--help` prints.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from r1vl_jax.errors import ConfigError
from r1vl_jax.rewards.rules import PRESETS, get_rules


def _field(default: Any, help: str) -> Any:
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def _require(holds: bool, key: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {value!r}, expected {expected}")


def _one_of(key: str, value: Any, known: tuple) -> None:
    _require(value in known, key, value, "one of " + ", ".join(known))


def _at_least(section: str, config: Any, **bounds: float) -> None:
    for key, bound in bounds.items():
        value = getattr(config, key)
        _require(value is None or value >= bound, f"{section}.{key}", value, f"at least {bound}")


REMAT = ("none", "matmuls", "full")
ATTENTION = ("auto", "xla", "cudnn", "splash")
KERNELS = ("auto", "pallas", "reference")


@dataclasses.dataclass(frozen=True)
class ModelSection:
    path: str = _field("", "a Qwen2-VL folder: Hugging Face layout, or made by r1vl_jax.convert from-hf")
    dtype: str = _field("bfloat16", "dtype of the computation; master weights are always float32")
    remat: str = _field("full", "what the gradient computes again: full: layers; matmuls: layers but for these; none")
    attention: str = _field("auto", "cudnn (GPU, bfloat16), splash (TPU), xla (anywhere), or auto: the platform's")
    kernels: str = _field("auto", "pallas (GPU, TPU), their reference in XLA, or auto: pallas where there is one")
    shared_prefix: bool = _field(True, "StepGRPO runs a prompt once for all its answers; false: once each")

    def __post_init__(self):
        _one_of("model.dtype", self.dtype, ("bfloat16", "float32"))
        _one_of("model.remat", self.remat, REMAT)
        _one_of("model.attention", self.attention, ATTENTION)
        _one_of("model.kernels", self.kernels, KERNELS)


@dataclasses.dataclass(frozen=True)
class MeshSection:
    data: int = _field(-1, "replicas; -1 takes the devices that are left")
    fsdp: int = _field(1, "devices that one train state is split over")
    tensor: int = _field(1, "devices that heads, MLP and vocabulary are split over")
    rollout_weights: str = _field("replicated", "the rollout's copy of the weights: replicated or tensor")

    def __post_init__(self):
        for axis in ("data", "fsdp", "tensor"):
            size = getattr(self, axis)
            _require(size == -1 or size >= 1, f"mesh.{axis}", size, "at least 1, or -1 for the devices that are left")
        _one_of("mesh.rollout_weights", self.rollout_weights, ("replicated", "tensor"))


@dataclasses.dataclass(frozen=True)
class SourceSection:
    path: str = _field("", "JSON array or JSONL, in the R1-VL-10K or the ShareGPT schema")
    image_root: str | None = _field(None, "folder that image paths start from; default: the file's own folder")
    tfds: str = _field("", "in place of path: a TFDS data set, NAME or NAME:VERSION, made by r1vl_jax.data.build")
    tfds_dir: str | None = _field(None, "folder of TFDS data sets; default: TFDS_DATA_DIR or ~/tensorflow_datasets")
    split: str = _field("train", "split of the TFDS data set")
    drop_matching: tuple[str, ...] = _field(
        ("I think I have made a mistake. Let me rethink it.",),
        "rows whose answer holds one of these texts are left out; the default is Mulberry's reflective rows",
    )

    @property
    def name(self) -> str:
        """The file or the TFDS data set; "" where none is given."""
        return self.path or (f"tfds:{self.tfds}/{self.split}" if self.tfds else "")


@dataclasses.dataclass(frozen=True)
class VideoSection:
    fps: float = _field(2.0, "frames taken from a second of video")
    max_frames: int = _field(16, "frames taken from a video at most, spread over all of it; an even number")
    max_pixels: int = _field(100_352, "frames are shrunk to this, and to the stage's max_pixels")

    def __post_init__(self):
        _require(0 < self.fps < math.inf, "video.fps", self.fps, "more than 0")
        _at_least("video", self, max_frames=2, max_pixels=784)
        _divides("video.max_frames", self.max_frames, "the frames in a patch", 2)


@dataclasses.dataclass(frozen=True)
class DataSection:
    sft: SourceSection = _field(SourceSection, "")
    rl: SourceSection = _field(SourceSection, "")
    heldout: SourceSection = _field(SourceSection, "")
    video: VideoSection = _field(VideoSection, "")
    max_prompt_tokens: int = _field(2048, "questions with more tokens, image tokens included, are dropped and named")
    pad_multiple: int = _field(64, "token and patch counts are padded to multiples of this: fewer compilations")
    buckets: int = _field(6, "shapes planned for a stage's batches: more means less padding, more compilations")
    workers: int = _field(0, "processes that decode images, for which they use /dev/shm; 0: threads of this process")

    def __post_init__(self):
        _at_least("data", self, max_prompt_tokens=1, pad_multiple=1, buckets=1, workers=0)
        for key in ("sft", "rl", "heldout"):
            section = getattr(self, key)
            expected = f"data.{key}.path ({section.path!r}) or this, not both"
            _require(not (section.path and section.tfds), f"data.{key}.tfds", section.tfds, expected)
            texts = list(section.drop_matching)
            _require(all(texts), f"data.{key}.drop_matching", texts, "texts that are not empty")


@dataclasses.dataclass(frozen=True)
class ShapesSection:
    dir: str | None = _field(None, "make the built-in task and a tiny random model here; paths not set are then its")
    seed: int = _field(0, "seed of pictures, questions and initial weights")
    sft_rows: int = _field(6000, "warm-up rows")
    rl_rows: int = _field(1800, "StepGRPO rows")
    heldout_rows: int = _field(200, "held-out rows")
    careless_share: float = _field(0.6, "share of the warm-up answers with no rationale and a guess at the end")


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    learning_rate: float = _field(1e-5, "peak learning rate")
    schedule: str = _field("cosine", "after the warm-up: cosine or linear to 0, or constant")
    warmup_ratio: float = _field(0.03, "share of the steps in which the rate rises from 0")
    weight_decay: float = _field(0.0, "AdamW's, on matrices only")
    b2: float = _field(0.999, "AdamW's second moment decay")
    max_grad_norm: float = _field(1.0, "gradients are clipped to this global norm")
    freeze_vision: bool = _field(False, "leave vision tower and merger as they are")

    def __post_init__(self):
        _one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        _at_least("optimizer", self, learning_rate=0, weight_decay=0)
        _require(0 <= self.warmup_ratio <= 1, "optimizer.warmup_ratio", self.warmup_ratio, "0 to 1")
        _require(self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm, "more than 0")


@dataclasses.dataclass(frozen=True)
class SFTSection:
    epochs: float = _field(2.0, "passes over the data; not used where steps is set")
    steps: int | None = _field(None, "number of updates")
    batch_size: int = _field(128, "rows per update")
    micro_batch_size: int = _field(8, "rows per gradient computation, over all devices")
    min_pixels: int = _field(3136, "smaller images are enlarged to this")
    max_pixels: int = _field(589_824, "larger images are shrunk to this")
    max_answer_tokens: int = _field(2048, "rows with longer answers are dropped and named")
    optimizer: OptimizerSection = _field(OptimizerSection, "")

    def __post_init__(self):
        _at_least("sft", self, steps=1, batch_size=1, micro_batch_size=1, max_answer_tokens=1, min_pixels=1)
        _at_least("sft", self, max_pixels=max(784, self.min_pixels))
        _require(self.epochs > 0, "sft.epochs", self.epochs, "more than 0")
        _divides("sft.batch_size", self.batch_size, "sft.micro_batch_size", self.micro_batch_size)


@dataclasses.dataclass(frozen=True)
class RLSection:
    steps: int = _field(13_125, "number of updates")
    questions_per_step: int = _field(16, "questions per update")
    group_size: int = _field(4, "answers sampled per question (M)")
    micro_batch_size: int = _field(4, "questions per gradient computation, over all devices")
    temperature: float = _field(1.2, "of sampling and of the trained log-probability")
    top_p: float = _field(1.0, "nucleus; 1 keeps everything. Never taken from the checkpoint")
    top_k: int = _field(0, "0 keeps everything. Never taken from the checkpoint")
    max_new_tokens: int = _field(1024, "longest answer, stop token included")
    rewards: tuple[str, ...] = _field(
        ("step_accuracy", "step_validity"),
        "what is paid: step_accuracy, step_validity, functions as my_module:my_reward",
    )
    reward_weights: tuple[float, ...] | None = _field(None, "one for each of rewards; default: 1 each")
    rules: str = _field("paper", f"reward rules: {', '.join(PRESETS)}")
    rule_options: dict = _field(dict, "options of the rules to set alone, such as {require_answer: false}")
    alpha: float = _field(0.1, "weight of the key-step share in the accuracy reward")
    gate: str = _field("none", "where step rewards count: none (always), mixed (groups of right and wrong), correct")
    advantage: str = _field("trajectory", "trajectory (the paper's: one for each answer) or step (one for each step)")
    scale: str = _field("std", "advantages are divided by the group's std; none: not; floor: by std_floor at least")
    std_floor: float = _field(0.1, "scale floor: the least standard deviation to divide by")
    zero_variance: str = _field("keep", "groups with equal rewards: keep, skip, or resample (take further questions)")
    max_resamples: int = _field(3, "zero_variance resample: rounds of further questions in an update")
    beta: float = _field(0.04, "weight of the KL to the frozen reference")
    updates_per_rollout: int = _field(1, "updates made from the same answers; after the first, ratios are clipped")
    clip_low: float = _field(0.2, "updates_per_rollout: the probability ratio is cut below 1 - clip_low")
    clip_high: float = _field(0.2, "updates_per_rollout: and above 1 + clip_high (DAPO: 0.28)")
    average: str = _field(
        "sequence", "of the loss: sequence (the paper's), token (DAPO), constant (Dr. GRPO: over max_new_tokens)"
    )
    min_pixels: int = _field(3136, "smaller images are enlarged to this")
    max_pixels: int = _field(400_000, "larger images are shrunk to this")
    optimizer: OptimizerSection = _field(OptimizerSection, "")

    def __post_init__(self):
        _one_of("rl.rules", self.rules, tuple(PRESETS))
        try:
            get_rules(self.rules, self.rule_options)
        except ValueError as error:
            raise ConfigError(f"rl.rule_options is {self.rule_options!r}: {error}") from None
        _one_of("rl.gate", self.gate, ("none", "mixed", "correct"))
        _one_of("rl.advantage", self.advantage, ("trajectory", "step"))
        _one_of("rl.scale", self.scale, ("std", "none", "floor"))
        _one_of("rl.zero_variance", self.zero_variance, ("keep", "skip", "resample"))
        _require(
            len(self.rewards) == len(set(self.rewards)) > 0,
            "rl.rewards",
            self.rewards,
            "one name or more, all different",
        )
        if self.reward_weights is not None:
            expected = f"{len(self.rewards)} numbers, one for each of rl.rewards"
            _require(len(self.reward_weights) == len(self.rewards), "rl.reward_weights", self.reward_weights, expected)
            finite = all(map(math.isfinite, self.reward_weights)) and any(self.reward_weights)
            _require(finite, "rl.reward_weights", self.reward_weights, "finite numbers, not all 0")
        _one_of("rl.average", self.average, ("sequence", "token", "constant"))
        for key in ("alpha", "beta", "temperature", "std_floor", "clip_low", "clip_high"):
            _require(math.isfinite(getattr(self, key)), f"rl.{key}", getattr(self, key), "a finite number")
        _at_least("rl", self, max_resamples=0)
        _require(self.std_floor > 0, "rl.std_floor", self.std_floor, "more than 0")
        _at_least("rl", self, steps=1, questions_per_step=1, group_size=2, micro_batch_size=1, max_new_tokens=2)
        _at_least("rl", self, alpha=0, beta=0, top_k=0, min_pixels=1, updates_per_rollout=1, clip_low=0, clip_high=0)
        _at_least("rl", self, max_pixels=max(784, self.min_pixels))
        _require(self.clip_low <= 1, "rl.clip_low", self.clip_low, "at most 1")
        _require(self.temperature > 0, "rl.temperature", self.temperature, "more than 0: a group needs variety")
        _require(0 < self.top_p <= 1, "rl.top_p", self.top_p, "more than 0 and at most 1")
        _divides("rl.questions_per_step", self.questions_per_step, "rl.micro_batch_size", self.micro_batch_size)


@dataclasses.dataclass(frozen=True)
class EvalSection:
    rows: int = _field(0, "held-out rows judged greedily before and after each stage; 0 judges none")
    batch_size: int = _field(64, "questions per batch")
    max_new_tokens: int = _field(2048, "longest answer")

    def __post_init__(self):
        _at_least("eval", self, rows=0, batch_size=1, max_new_tokens=1)


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    every: int = _field(100, "steps between checkpoints; the last step always has one")
    keep: int = _field(2, "checkpoints kept per stage")

    def __post_init__(self):
        _at_least("checkpoint", self, every=1, keep=1)


@dataclasses.dataclass(frozen=True)
class ScoringSection:
    workers: int = _field(2, "processes that score answers")
    timeout: float = _field(20.0, "seconds for one answer; over it the answer earns 0 and is counted")

    def __post_init__(self):
        _at_least("scoring", self, workers=1)
        _require(self.timeout > 0, "scoring.timeout", self.timeout, "more than 0")


@dataclasses.dataclass(frozen=True)
class Config:
    output_dir: str = _field("runs/r1vl", "the run folder")
    stages: tuple[str, ...] = _field(("sft", "step_grpo"), "the stages to run, in order: sft, step_grpo")
    seed: int = _field(0, "fixes the order of rows and every sampled token")
    compilation_cache: str = _field(
        "auto", "folder of compiled programs, kept between runs; auto: r1vl_jax in the user's cache folder; or off"
    )
    model: ModelSection = _field(ModelSection, "")
    mesh: MeshSection = _field(MeshSection, "")
    data: DataSection = _field(DataSection, "")
    shapes: ShapesSection = _field(ShapesSection, "")
    sft: SFTSection = _field(SFTSection, "")
    rl: RLSection = _field(RLSection, "")
    eval: EvalSection = _field(EvalSection, "")
    checkpoint: CheckpointSection = _field(CheckpointSection, "")
    scoring: ScoringSection = _field(ScoringSection, "")

    def __post_init__(self):
        known = (("sft",), ("step_grpo",), ("sft", "step_grpo"))
        _require(self.stages in known, "stages", list(self.stages), "[sft], [step_grpo] or [sft, step_grpo]")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(bool(self.model.path), "model.path", self.model.path, "the folder of a Qwen2-VL checkpoint")
        needs = {"sft": ("data.sft.path", self.data.sft), "step_grpo": ("data.rl.path", self.data.rl)}
        for stage in self.stages:
            key, source = needs[stage]
            _require(bool(source.name), key, source.path, f"a file, or a data set in tfds, since stages has {stage}")
        if self.eval.rows:
            expected = "a file, or a data set in tfds, since eval.rows is not 0"
            _require(bool(self.data.heldout.name), "data.heldout.path", "", expected)


def _divides(key: str, value: int, by_key: str, by: int) -> None:
    _require(value % by == 0, key, value, f"a multiple of {by_key} = {by}")


_OTHER_SOURCE = {
    f"data.{name}.{one}": f"data.{name}.{other}"
    for name in ("sft", "rl", "heldout")
    for one, other in (("path", "tfds"), ("tfds", "path"))
}


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Reads a YAML file, applies overrides such as ["--rl.beta", "0.02"] or ["--rl.beta=0.02"].

    Raises ConfigError naming key, value and expectation.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections at the top")
    for key, value in _pairs(list(overrides)):
        _put(tree, key, value)
        other = _OTHER_SOURCE.get(key)
        if value and _get(tree, other or ""):  # a data set on the command line takes the place of the configuration's
            _put(tree, other, "")
    _default_to_shapes(tree)
    return _build(Config, tree, "")


def _default_to_shapes(tree: dict) -> None:
    """Where shapes.dir is set, paths that are not are those of the task and the model made there."""
    shapes = tree.get("shapes")
    if isinstance(shapes, dict) and isinstance(shapes.get("dir"), str):
        folder = Path(shapes["dir"])
        made = {f"data.{split}.path": folder / "task" / f"{split}.json" for split in ("sft", "rl", "heldout")}
        for key, path in {"model.path": folder / "model", **made}.items():
            if not _get(tree, key) and not (key != "model.path" and _get(tree, key.replace(".path", ".tfds"))):
                _put(tree, key, str(path))


def _get(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _pairs(arguments: list[str]) -> list[tuple[str, Any]]:
    pairs = []
    while arguments:
        head = arguments.pop(0)
        if not head.startswith("--"):
            raise ConfigError(f"argument {head!r}: expected an override such as --rl.beta 0.02")
        key, has_value, value = head[2:].partition("=")
        if not has_value:
            if not arguments:
                raise ConfigError(f"--{key}: a value is missing")
            value = arguments.pop(0)
        try:
            pairs.append((key, yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key} is {value!r}, expected a value as YAML writes it") from error
    return pairs


def _put(tree: dict, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{key}: {section} is a value, not a section")
    tree[last] = value


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the file'} is {tree!r}, expected a section with keys")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1) or _elsewhere(str(key))
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(hints)}"
            raise ConfigError(f"{prefix}{key} is not a known key{hint}")
    values = {key: _convert(hints[key], value, prefix + key) for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError as error:  # a section knows its own name, but not that of the one it stands in
        above = prefix.rstrip(".").rpartition(".")[0]
        raise ConfigError(f"{above}.{error}" if above else str(error)) from None


def _elsewhere(key: str) -> list[str]:
    """The full name of a key that stands in another section."""
    return [name for name, *_ in describe() if name.rsplit(".", 1)[-1] == key][:1]


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key + ".")
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{key} is {value!r}, expected a list")
        return tuple(_convert(typing.get_args(hint)[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-5, with no point, as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{key} is {value!r}, expected {hint.__name__}")
    return value


def describe(cls: type = Config, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted key, default, help) of every field."""
    rows = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            rows += describe(hints[field.name], f"{prefix}{field.name}.")
        else:
            default = {} if field.default is dataclasses.MISSING else field.default
            rows.append((prefix + field.name, default, field.metadata["help"]))
    return rows


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back."""
    tree = dataclasses.asdict(config)
    return yaml.safe_dump(_lists(tree), sort_keys=False)


def _lists(value: Any) -> Any:
    """The value with lists for tuples, which YAML does not know."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
