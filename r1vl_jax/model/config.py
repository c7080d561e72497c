"""Reads the sizes of a Qwen2-VL model from a Hugging Face config.json.

Published checkpoints have a flat file (transformers 4: text fields at the top level, `rope_scaling`); transformers 5
writes a nested file (`text_config`, `rope_parameters`). This module reads both forms. No other module reads
config.json.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from r1vl_jax.common.files import inner_object, read_object
from r1vl_jax.errors import CheckpointError

LOGIT_ROWS = 4096  # rows of logits that a device holds at once


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes and constants of the vision tower.

    The tower has `layers` transformer blocks. It reads patches of `patch_dim` pixel values and merges each square of
    merge_size x merge_size patches into one image token.

    Attributes:
      width: the width of the hidden states.
      mlp: the width of the MLP's hidden layer.
      pixel_mean, pixel_std: per channel, for pixel values in [0, 1]. The defaults are CLIP's; see
        ModelConfig.with_pixels.
    """

    layers: int
    width: int
    heads: int
    mlp: int
    patch_size: int = 14
    temporal_patch_size: int = 2
    channels: int = 3
    merge_size: int = 2
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_dim(self) -> int:
        return self.channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the text model and the vision tower, and the token ids that the forward pass needs.

    A ModelConfig is hashable, because it is a static jit argument. `attention` (xla, cudnn, splash), `kernels`
    (reference, pallas) and `logit_rows` (rows of logits that a device holds at once) change how the model is computed,
    not its result (up to rounding); see `with_backend`.
    """

    vocab: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tied: bool
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    attention: str = "xla"
    kernels: str = "reference"
    logit_rows: int = LOGIT_ROWS

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def vision_ids(self) -> tuple[int, ...]:
        """Returns the ids that a policy may never sample: the next forward pass would need image features for them."""
        return (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)

    def with_pixels(self, mean: tuple[float, ...], std: tuple[float, ...]) -> ModelConfig:
        """Returns the same model with the `mean` and `std` that the checkpoint's image processor uses for pixels."""
        return dataclasses.replace(self, vision=dataclasses.replace(self.vision, pixel_mean=mean, pixel_std=std))

    def with_backend(self, attention: str, kernels: str, logit_rows: int = LOGIT_ROWS) -> ModelConfig:
        """Returns the same model with these backends: see model.backend."""
        return dataclasses.replace(self, attention=attention, kernels=kernels, logit_rows=logit_rows)


def load_config(folder: str | Path) -> ModelConfig:
    """Reads `folder`/config.json. Raises CheckpointError if the file is missing or is not the config of a Qwen2-VL."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected the folder of a Qwen2-VL checkpoint")
    try:
        raw = read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return parse_config(raw, path)


def parse_config(raw: dict[str, Any], path: str | Path = "config.json") -> ModelConfig:
    """Returns the ModelConfig of a config.json's dictionary, flat or nested. CheckpointErrors name `path`."""
    try:
        return _parse(raw, path)
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:  # a value has the wrong type
        raise CheckpointError(f"{path}: not the config.json of a Qwen2-VL ({error})") from error


def _parse(raw: dict[str, Any], path: str | Path) -> ModelConfig:
    if raw.get("model_type") != "qwen2_vl":
        raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'qwen2_vl'")
    text = {**raw, **inner_object(raw, "text_config", path)}

    def need(table: dict[str, Any], key: str, where: str = "") -> Any:
        if table.get(key) is None:
            raise CheckpointError(f"{path}: {where}{key} is missing")
        return table[key]

    rope = inner_object(text, "rope_parameters", path) or inner_object(text, "rope_scaling", path)
    need(raw, "vision_config")
    section = tuple(need(rope, "mrope_section", "rope_scaling / rope_parameters: "))
    if text.get("use_sliding_window"):
        raise CheckpointError(
            f"{path}: use_sliding_window is true; no published Qwen2-VL uses it and it is not supported"
        )
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act is {text['hidden_act']!r}, expected 'silu'")
    cfg = ModelConfig(
        vocab=need(text, "vocab_size"),
        width=need(text, "hidden_size"),
        mlp=need(text, "intermediate_size"),
        layers=need(text, "num_hidden_layers"),
        heads=need(text, "num_attention_heads"),
        kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        norm_eps=float(text.get("rms_norm_eps", 1e-5)),  # transformers' class default; published files say 1e-6
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e6),
        mrope_section=section,
        tied=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        vision=_parse_vision(inner_object(raw, "vision_config", path), text["hidden_size"], path),
        **{key: need(raw, key) for key in _TOKEN_KEYS},
    )
    _check(cfg, path)
    return cfg


_TOKEN_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _parse_vision(raw: dict[str, Any], text_width: int, path: str | Path) -> VisionConfig:
    # A file may omit fields whose value is transformers' class default, which every published size shares.
    width = raw.get("embed_dim", 1280)
    if raw.get("hidden_size", text_width) != text_width:
        raise CheckpointError(f"{path}: vision_config.hidden_size is {raw['hidden_size']}, the text width {text_width}")
    if raw.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise CheckpointError(f"{path}: vision_config.hidden_act is {raw['hidden_act']!r}, expected 'quick_gelu'")
    return VisionConfig(
        layers=raw.get("depth", 32),
        width=width,
        heads=raw.get("num_heads", 16),
        mlp=int(width * raw.get("mlp_ratio", 4)),
        patch_size=raw.get("patch_size", 14),
        temporal_patch_size=raw.get("temporal_patch_size", 2),
        channels=raw.get("in_channels", raw.get("in_chans", 3)),
        merge_size=raw.get("spatial_merge_size", 2),
        rope_theta=float(inner_object(raw, "rope_parameters", path).get("rope_theta", 1e4)),
    )


def _check(cfg: ModelConfig, path: str | Path) -> None:
    for part, where in ((cfg, ""), (cfg.vision, "vision: ")):
        for field in dataclasses.fields(part):
            value, least = getattr(part, field.name), 0 if field.name in _TOKEN_KEYS else 1
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise CheckpointError(f"{path}: {where}{field.name} is {value!r}, expected a whole number from {least}")
    if cfg.width % cfg.heads or cfg.heads % cfg.kv_heads:
        raise CheckpointError(
            f"{path}: hidden_size {cfg.width} must be a multiple of {cfg.heads} query heads, "
            f"and that number a multiple of {cfg.kv_heads} kv heads"
        )
    if sum(cfg.mrope_section) * 2 != cfg.head_dim or len(cfg.mrope_section) != 3:
        raise CheckpointError(
            f"{path}: mrope_section {cfg.mrope_section} must be three numbers of sum {cfg.head_dim // 2}"
        )
    if cfg.vision.width % cfg.vision.heads or cfg.vision.head_dim % 4:
        raise CheckpointError(
            f"{path}: vision width {cfg.vision.width} must be a multiple of 4 times its {cfg.vision.heads} heads"
        )
