"""The configuration: frozen dataclasses filled from a YAML file and dotted overrides, checked when they are made.

An unknown key is an error that names the nearest known one. Each field's `help` is what `--help` prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1vl_jax.common import config_tree
from r1vl_jax.common.config_tree import at_least, at_most, divides, field, one_of, require
from r1vl_jax.common.limits import MAX_BATCH, MAX_PIXELS, MAX_ROWS, MAX_SECONDS, MAX_TOKENS, MAX_WORKERS
from r1vl_jax.config_stages import RLSection, SFTSection
from r1vl_jax.errors import ConfigError
from r1vl_jax.parallel.devices import PRECISIONS
from r1vl_jax.rewards.formats import FORMATS

REMAT = ("none", "matmuls", "full")
ATTENTION = ("auto", "xla", "cudnn", "splash")
KERNELS = ("auto", "pallas", "reference")


@dataclasses.dataclass(frozen=True)
class ModelSection:
    path: str = field("", "a Qwen2-VL folder: Hugging Face layout, or made by r1vl_jax.convert from-hf")
    dtype: str = field("bfloat16", "dtype of the computation; master weights are always float32")
    remat: str = field(
        "full",
        "recomputed in the backward pass: full (all but cuDNN's attention), matmuls (nor matmul outputs), none",
    )
    attention: str = field("auto", "cudnn (GPU, bfloat16), splash (TPU), xla (any), or auto: by platform")
    kernels: str = field("auto", "pallas (GPU, TPU), reference (XLA, any), or auto: pallas on GPUs and TPUs")
    matmul_precision: str = field(
        "auto", "of float32 matmuls: default, high, highest; auto: highest if dtype is float32"
    )
    shared_prefix: bool = field(True, "StepGRPO runs a prompt once for all its answers; false: once an answer")

    def __post_init__(self) -> None:
        one_of("model.dtype", self.dtype, ("bfloat16", "float32"))
        one_of("model.remat", self.remat, REMAT)
        one_of("model.attention", self.attention, ATTENTION)
        one_of("model.kernels", self.kernels, KERNELS)
        one_of("model.matmul_precision", self.matmul_precision, PRECISIONS)


@dataclasses.dataclass(frozen=True)
class MeshSection:
    data: int = field(-1, "replicas; -1: all remaining devices")
    fsdp: int = field(1, "devices that share one train state")
    tensor: int = field(1, "devices that share heads, MLP and vocabulary")
    rollout_weights: str = field("replicated", "the rollout's copy of the weights: replicated or tensor")

    def __post_init__(self) -> None:
        for axis in ("data", "fsdp", "tensor"):
            size = getattr(self, axis)
            require(size == -1 or size >= 1, f"mesh.{axis}", size, "at least 1, or -1 for the devices that are left")
        one_of("mesh.rollout_weights", self.rollout_weights, ("replicated", "tensor"))


@dataclasses.dataclass(frozen=True)
class SourceSection:
    path: str = field("", "JSON, JSONL, parquet, a folder of parquet, or hub:OWNER/NAME of a Hub data set")
    image_root: str | None = field(None, "folder that image paths start from; default: the file's own folder")
    allow_outside: bool = field(False, "images and videos may also be outside of image_root, links resolved")
    image_digests: bool = field(
        True,
        "of JSON: images and videos are read once, at the first start, to notice later if one has changed; false: only "
        "their sizes are compared",
    )
    tfds: str = field("", "in place of path: a TFDS data set, NAME or NAME:VERSION, made by r1vl_jax.data.build")
    tfds_dir: str | None = field(None, "folder of TFDS data sets; default: TFDS_DATA_DIR or ~/tensorflow_datasets")
    split: str = field("train", "split of a TFDS or Hub data set, of an object of splits, or of a folder of parquet")
    drop_matching: tuple[str, ...] = field(
        ("I think I have made a mistake. Let me rethink it.",),
        "rows whose answer holds one of these texts are left out; the default is Mulberry's reflective rows",
    )

    @property
    def name(self) -> str:
        """The file or the TFDS data set; "" where none is given."""
        return self.path or (f"tfds:{self.tfds}/{self.split}" if self.tfds else "")


@dataclasses.dataclass(frozen=True)
class VideoSection:
    fps: float = field(2.0, "frames taken from a second of video")
    max_frames: int = field(16, "most frames taken from a video, spread evenly; an even number")
    max_pixels: int = field(100_352, "larger frames are shrunk to this, or to the stage's max_pixels if that is less")

    def __post_init__(self) -> None:
        require(self.fps > 0, "video.fps", self.fps, "more than 0")
        at_least("video", self, max_frames=2, max_pixels=784)
        at_most("video", self, fps=1000, max_frames=10_000, max_pixels=MAX_PIXELS)
        divides("video.max_frames", self.max_frames, "the frames in a patch", 2)


@dataclasses.dataclass(frozen=True)
class DataSection:
    sft: SourceSection = field(SourceSection, "")
    rl: SourceSection = field(SourceSection, "")
    heldout: SourceSection = field(SourceSection, "")
    video: VideoSection = field(VideoSection, "")
    system_prompt: str = field("", "system turn of rows that have none; default: the chat template's")
    question_suffix: str = field("", "text appended to every question, such as the format that answers must have")
    max_prompt_tokens: int = field(2048, "questions with more tokens, image tokens included, are dropped and named")
    pad_multiple: int = field(64, "tokens and patches are padded to multiples of this: more means fewer compilations")
    buckets: int = field(6, "batch shapes planned for a stage: more means less padding and more compilations")
    workers: int = field(0, "processes that decode images (they use /dev/shm); 0: threads of this process")

    def __post_init__(self) -> None:
        at_least("data", self, max_prompt_tokens=1, pad_multiple=1, buckets=1, workers=0)
        at_most("data", self, max_prompt_tokens=MAX_TOKENS, pad_multiple=MAX_TOKENS, buckets=1000, workers=MAX_WORKERS)
        for key in ("sft", "rl", "heldout"):
            section = getattr(self, key)
            expected = f"data.{key}.path ({section.path!r}) or this, not both"
            require(not (section.path and section.tfds), f"data.{key}.tfds", section.tfds, expected)
            texts = list(section.drop_matching)
            require(all(texts), f"data.{key}.drop_matching", texts, "texts that are not empty")


@dataclasses.dataclass(frozen=True)
class ShapesSection:
    dir: str | None = field(None, "make the built-in task and a tiny model in a folder here; used where no path is set")
    seed: int = field(0, "seed of pictures, questions and initial weights")
    sft_rows: int = field(6000, "warm-up rows")
    rl_rows: int = field(1800, "StepGRPO rows")
    heldout_rows: int = field(200, "held-out rows")
    careless_share: float = field(0.6, "share of the warm-up answers with no rationale and a guess at the end")
    format: str = field(RLSection.format, "format of the solutions; where it is not set: that of rl.format")

    def __post_init__(self) -> None:
        one_of("shapes.format", self.format, tuple(FORMATS))
        at_least("shapes", self, seed=0, sft_rows=0, rl_rows=0, heldout_rows=0, careless_share=0)
        at_most("shapes", self, sft_rows=MAX_ROWS, rl_rows=MAX_ROWS, heldout_rows=MAX_ROWS, careless_share=1)


@dataclasses.dataclass(frozen=True)
class EvalSection:
    rows: int = field(0, "held-out rows answered greedily and scored before and after each stage; 0: none")
    batch_size: int = field(64, "questions per batch")
    max_new_tokens: int = field(2048, "longest answer")

    def __post_init__(self) -> None:
        at_least("eval", self, rows=0, batch_size=1, max_new_tokens=1)
        at_most("eval", self, batch_size=MAX_BATCH, max_new_tokens=MAX_TOKENS)


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    every: int = field(100, "steps between checkpoints; the last step always has one")
    minutes: float = field(
        0.0, "also a checkpoint after the first step that ends this many minutes after the last; 0: none"
    )
    keep: int = field(2, "checkpoints kept per stage")

    def __post_init__(self) -> None:
        at_least("checkpoint", self, every=1, minutes=0, keep=1)


@dataclasses.dataclass(frozen=True)
class GuardsSection:
    max_skipped: int = field(5, "the run stops after so many steps in a row whose update was skipped as not finite")
    mismatch: float | None = field(
        None,
        "largest mean |log p of the sampler - log p of the trainer| to start with; 0: any; default: 1e-4 in float32, "
        "0.05 in bfloat16",
    )
    kl: float = field(10.0, "alarm where the KL to the reference, per token, is above this; 0: never")
    length: float = field(
        0.9, "alarm where answers have more than this share of rl.max_new_tokens, on average; 1: never"
    )

    def __post_init__(self) -> None:
        at_least("guards", self, max_skipped=1, mismatch=0, kl=0, length=0)


@dataclasses.dataclass(frozen=True)
class ScoringSection:
    workers: int = field(2, "processes that score answers")
    timeout: float = field(20.0, "seconds for one answer; an answer that takes longer earns 0 and is counted")

    def __post_init__(self) -> None:
        at_least("scoring", self, workers=1)
        at_most("scoring", self, workers=MAX_WORKERS, timeout=MAX_SECONDS)
        require(self.timeout > 0, "scoring.timeout", self.timeout, "more than 0")


@dataclasses.dataclass(frozen=True)
class Config:
    output_dir: str = field("runs/r1vl", "the run folder")
    stages: tuple[str, ...] = field(("sft", "step_grpo"), "the stages to run, in order: sft, step_grpo")
    seed: int = field(0, "fixes the order of rows and every sampled token")
    deterministic: bool = field(False, "GPU: the same bits in every run, by slower operations; set before JAX is used")
    compilation_cache: str = field(
        "auto", "folder of compiled programs, kept between runs; auto: r1vl_jax in the user's cache folder; off"
    )
    rehearsal: str = field(
        "auto",
        "before the first step, run each stage once on its largest planned batch, to see at once whether the memory is "
        "enough: always, never, or auto: not on CPUs",
    )
    model: ModelSection = field(ModelSection, "")
    mesh: MeshSection = field(MeshSection, "")
    data: DataSection = field(DataSection, "")
    shapes: ShapesSection = field(ShapesSection, "")
    sft: SFTSection = field(SFTSection, "")
    rl: RLSection = field(RLSection, "")
    eval: EvalSection = field(EvalSection, "")
    checkpoint: CheckpointSection = field(CheckpointSection, "")
    guards: GuardsSection = field(GuardsSection, "")
    scoring: ScoringSection = field(ScoringSection, "")

    def __post_init__(self) -> None:
        known = (("sft",), ("step_grpo",), ("sft", "step_grpo"))
        require(self.stages in known, "stages", list(self.stages), "[sft], [step_grpo] or [sft, step_grpo]")
        one_of("rehearsal", self.rehearsal, ("auto", "always", "never"))
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(bool(self.model.path), "model.path", self.model.path, "the folder of a Qwen2-VL checkpoint")
        needs = {"sft": ("data.sft.path", self.data.sft), "step_grpo": ("data.rl.path", self.data.rl)}
        for stage in self.stages:
            key, source = needs[stage]
            require(bool(source.name), key, source.path, f"a file, or a data set in tfds, since stages has {stage}")
        if self.eval.rows:
            expected = "a file, or a data set in tfds, since eval.rows is not 0"
            require(bool(self.data.heldout.name), "data.heldout.path", "", expected)


_OTHER_SOURCE = {
    f"data.{name}.{one}": f"data.{name}.{other}"
    for name in ("sft", "rl", "heldout")
    for one, other in (("path", "tfds"), ("tfds", "path"))
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies overrides such as ["--rl.beta", "0.02"] or ["--rl.beta=0.02"].

    Raises ConfigError naming key, value and expectation.
    """
    tree = config_tree.read(Path(path))
    for key, value in config_tree.pairs(overrides):
        config_tree.put(tree, key, value)
        other = _OTHER_SOURCE.get(key)
        if value and other and config_tree.get(tree, other):  # a data set on the command line replaces the file's
            config_tree.put(tree, other, "")
    if tree.get("compilation_cache") is False:  # YAML 1.1 reads `off` as false
        tree["compilation_cache"] = "off"
    _default_to_shapes(tree)
    return config_tree.build(Config, tree)


def shapes_folder(shapes: ShapesSection) -> Path:
    """Returns the folder of the built-in task and its model: one in shapes.dir for each setting.

    So a run never changes the task of another one that has the same shapes.dir.
    """
    rows = f"{shapes.sft_rows}-{shapes.rl_rows}-{shapes.heldout_rows}"
    name = f"seed{shapes.seed}-rows{rows}-careless{shapes.careless_share:g}-{shapes.format}"
    return Path(shapes.dir or "") / name


def _default_to_shapes(tree: dict[str, Any]) -> None:
    """Where shapes.dir is set, model and data default to the task and the tiny model that are made there."""
    shapes = tree.get("shapes")
    if not isinstance(shapes, dict) or not isinstance(shapes.get("dir"), str):
        return
    shapes.setdefault("format", config_tree.get(tree, "rl.format", RLSection.format))
    try:
        folder = shapes_folder(config_tree.build(ShapesSection, shapes))
    except ConfigError:
        return  # the error is raised again, with the whole name of the key, when the configuration is built
    if not config_tree.get(tree, "model.path"):
        config_tree.put(tree, "model.path", str(folder / "model"))
    for split in ("sft", "rl", "heldout"):
        if not config_tree.get(tree, f"data.{split}.path") and not config_tree.get(tree, f"data.{split}.tfds"):
            config_tree.put(tree, f"data.{split}.path", str(folder / "task" / f"{split}.json"))


def describe() -> list[tuple[str, Any, str]]:
    """(dotted key, default, help) of every key."""
    return config_tree.describe(Config)


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back."""
    return config_tree.dump(config)
