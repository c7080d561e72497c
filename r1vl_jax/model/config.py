"""Reads the sizes of a Qwen2-VL model from a Hugging Face config.json.

Published checkpoints have a flat file (transformers 4: text fields at the top level, `rope_scaling`); transformers 5
writes a nested file (`text_config`, `rope_parameters`). This module reads both forms. No other module reads
config.json.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from r1vl_jax.common.fields import Fields
from r1vl_jax.common.files import inner_object, read_object
from r1vl_jax.common.text import shown
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.vision_ids import VISION_TOKENS, read_vision_ids

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
    """Reads `folder`/config.json, and the tokenizer's files for vision ids that config.json does not have.

    Raises: CheckpointError if the file is missing, is not the config of a Qwen2-VL, or says something that the port
      does not compute.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected the folder of a Qwen2-VL checkpoint")
    try:
        return _parse(read_object(path), path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def parse_config(raw: dict[str, Any], path: str | Path = "config.json") -> ModelConfig:
    """Returns the ModelConfig of a config.json's dictionary, flat or nested. CheckpointErrors name `path`."""
    try:
        return _parse(raw, path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _parse(raw: dict[str, Any], path: str | Path) -> ModelConfig:
    """Returns the ModelConfig. Raises ValueError, naming the file, the field, its value and what was expected."""
    if raw.get("model_type") != "qwen2_vl":
        raise ValueError(f"{path}: model_type is {shown(raw.get('model_type'))}, expected 'qwen2_vl'")
    nested = inner_object(raw, "text_config", path)
    text = Fields(path, {"text_config.": nested, "": raw})
    tables = {
        f"{prefix}{key}.": inner_object(table, key, path, prefix)
        for key in ("rope_parameters", "rope_scaling")
        for prefix, table in text.tables.items()
    }
    rope = Fields(path, tables)
    _refuse_other_computation(text, rope)
    width, heads, kv_heads = _parse_heads(text)
    ids: dict[str, Any] = read_vision_ids(raw, path)
    cfg = ModelConfig(
        vocab=text.whole("vocab_size"),
        width=width,
        mlp=text.whole("intermediate_size"),
        layers=text.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        norm_eps=text.positive("rms_norm_eps", 1e-5),  # transformers' class default; published files say 1e-6
        rope_theta=Fields(path, {**rope.tables, **text.tables}).positive("rope_theta", 1e6),
        mrope_section=_parse_mrope_section(rope, width // heads),
        tied=text.flag("tie_word_embeddings") or Fields(path, {"": raw}).flag("tie_word_embeddings"),
        vision=_parse_vision(raw, width, path),
        **ids,
    )
    for key in VISION_TOKENS:
        if getattr(cfg, key) >= cfg.vocab:
            raise ValueError(f"{path}: {key} is {getattr(cfg, key)}, expected less than vocab_size {cfg.vocab}")
    return cfg


def _refuse_other_computation(text: Fields, rope: Fields) -> None:
    """Raises ValueError if the file asks for what the port does not compute."""
    path = text.path
    for prefix, table in text.tables.items():
        if table.get("quantization_config"):
            name = f"{prefix}quantization_config"
            method = inner_object(table, "quantization_config", path, prefix).get("quant_method")
            said = f"{name} is there" if method is None else f"{name}.quant_method is {shown(method)}"
            raise ValueError(
                f"{path}: {said}; quantized weights are not read, expected weights in bfloat16, float16 or float32"
            )
    for prefix, table in rope.tables.items():
        _refuse_other_rope(table, ("mrope", "default"), prefix, path)
    if text.flag("use_sliding_window"):
        raise ValueError(f"{path}: use_sliding_window is true; no published Qwen2-VL uses it and it is not supported")
    text.only("hidden_act", "silu")


def _refuse_other_rope(rope: dict[str, Any], known: tuple[str, ...], prefix: str, path: str | Path) -> None:
    for key in ("rope_type", "type"):  # a file has one of them or both
        if rope.get(key) not in (None, *known):
            raise ValueError(
                f"{path}: {prefix}{key} is {shown(rope[key])}, expected {' or '.join(map(repr, known))}: no other rope "
                "is computed"
            )


def _parse_heads(text: Fields) -> tuple[int, int, int]:
    """Returns the width, the number of query heads and the number of key/value heads of the text model."""
    width, heads = text.whole("hidden_size"), text.whole("num_attention_heads")
    kv_heads = text.whole("num_key_value_heads", heads)
    if width % heads or heads % kv_heads:
        raise ValueError(
            f"{text.path}: hidden_size is {width}, expected a multiple of num_attention_heads {heads}, and that number "
            f"a multiple of num_key_value_heads {kv_heads}"
        )
    return width, heads, kv_heads


def _parse_mrope_section(rope: Fields, head_dim: int) -> tuple[int, int, int]:
    name, value = rope.find("mrope_section")
    if value is None:
        raise ValueError(f"{rope.path}: mrope_section is missing in rope_scaling / rope_parameters")
    whole = isinstance(value, list) and all(type(part) is int and part > 0 for part in value)
    if not whole or len(value) != 3 or 2 * sum(value) != head_dim:
        raise ValueError(
            f"{rope.path}: {name} is {shown(value)}, expected three whole numbers from 1 whose sum is half the head "
            f"width {head_dim} (hidden_size / num_attention_heads)"
        )
    return value[0], value[1], value[2]


def _parse_vision(config: dict[str, Any], text_width: int, path: str | Path) -> VisionConfig:
    """Reads vision_config. Fields may be missing whose value is transformers' default, which all published sizes share.

    Args:
      config: the whole file.
      text_width: the width of the text model, which the merger's output has.
    """
    raw = inner_object(config, "vision_config", path)
    if config.get("vision_config") is None:
        raise ValueError(f"{path}: vision_config is missing")
    fields = Fields(path, {"vision_config.": raw})
    if fields.whole("hidden_size", text_width) != text_width:
        raise ValueError(f"{path}: vision_config.hidden_size is {raw['hidden_size']}, the text width is {text_width}")
    fields.only("hidden_act", "quick_gelu")
    rope = inner_object(raw, "rope_parameters", path, "vision_config.")
    _refuse_other_rope(rope, ("axial", "default"), "vision_config.rope_parameters.", path)
    width, heads = fields.whole("embed_dim", 1280), fields.whole("num_heads", 16)
    if width % (4 * heads):
        raise ValueError(
            f"{path}: vision_config.embed_dim is {width}, expected a multiple of 4 times num_heads {heads}"
        )
    ratio = fields.positive("mlp_ratio", 4)
    if not 1 <= width * ratio <= sys.float_info.max:
        raise ValueError(f"{path}: vision_config.mlp_ratio is {ratio}, expected an MLP of some width")
    return VisionConfig(
        layers=fields.whole("depth", 32),
        width=width,
        heads=heads,
        mlp=int(width * ratio),
        patch_size=fields.whole("patch_size", 14),
        temporal_patch_size=fields.whole("temporal_patch_size", 2),
        channels=fields.whole("in_channels", fields.whole("in_chans", 3)),
        merge_size=fields.whole("spatial_merge_size", 2),
        rope_theta=Fields(path, {"vision_config.rope_parameters.": rope}).positive("rope_theta", 1e4),
    )
