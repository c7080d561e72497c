"""Writes config.json in the flat style of the published checkpoints: text fields are at the top level.

transformers 4 and 5 and vLLM read the flat style. transformers 5 writes the nested style, which has the text model's
fields under text_config. model/config.py reads both styles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r1vl_jax.common.files import read_object, write_json
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import ModelConfig, parse_config
from r1vl_jax.model.vision_ids import VISION_TOKENS

# Fields of a nested text_config that are not copied to the top level, because the flat style does not have them or
# because the top level's own value is used.
_NOT_FLAT = frozenset(
    ("model_type", "architectures", "dtype", "torch_dtype", "rope_parameters", "layer_types", "transformers_version")
    + ("vision_config", "tie_word_embeddings", *VISION_TOKENS)
)


def write_flat_config(source: Path, destination: Path, cfg: ModelConfig, dtype: str) -> None:
    """Reads the config.json `source`, flat or nested, and writes it to `destination` in the flat style.

    If the file is flat already and needs no change, copies it byte for byte.

    Args:
      cfg: the model that the file must describe.
      dtype: name of the dtype of the weights, for `torch_dtype`.
    Raises: CheckpointError if the flat file would not describe the model `cfg`.
    """
    raw = read_object(source)
    flat = flat_config(raw, cfg, dtype)
    if parse_config(flat, destination) != cfg:
        raise CheckpointError(f"{source}: cannot be written in the flat style without changing its meaning")
    if flat == raw:
        destination.write_bytes(source.read_bytes())
    else:
        write_json(destination, flat)


def flat_config(raw: dict[str, Any], cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """Converts the contents of a config.json, flat or nested, to the flat style of transformers 4.

    Moves the fields of `text_config` to the top level, except those of _NOT_FLAT. Replaces `rope_parameters` with
    `rope_theta` and `rope_scaling`, and `dtype` with `torch_dtype`. Omits keys that only transformers 5 reads.

    Args:
      raw: contents of the file.
      cfg: the model that the file describes. Fields that the two styles write differently are taken from it.
      dtype: name of the dtype of the weights.
    """
    flat = {key: value for key, value in raw.items() if key not in ("text_config", "rope_parameters", "dtype")}
    for key, value in (raw.get("text_config") or {}).items():
        if key not in _NOT_FLAT and value is not None:
            flat[key] = value
    vision = dict(raw["vision_config"])
    if "text_config" in raw:
        for key in ("model_type", "dtype", "torch_dtype"):
            vision.pop(key, None)
    if cfg.vision.rope_theta == 1e4:  # the only value that transformers 4 knows; it does not read the key
        vision.pop("rope_parameters", None)
    return flat | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "num_key_value_heads": cfg.kv_heads,
        "vision_config": vision,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(cfg.mrope_section)},
        "tie_word_embeddings": cfg.tied,
        "torch_dtype": dtype,
        **{key: getattr(cfg, key) for key in VISION_TOKENS},
    }
