"""Reads the ids of the vision tokens from a checkpoint's files; they are never assumed.

config.json has them at the top level or, as some versions of transformers write it, in text_config or vision_config. An
id that is in none of these places is read from the tokenizer's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r1vl_jax.common.fields import Fields
from r1vl_jax.common.files import inner_object, read_object

# The fields of config.json, and the texts of their tokens in the tokenizer.
VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def read_vision_ids(config: dict[str, Any], path: str | Path) -> dict[str, int]:
    """Returns the ids by their names in config.json. The top level comes first, then text_config, then vision_config.

    Args:
      config: the contents of config.json.
      path: the file. The tokenizer's files are looked for beside it.
    Raises: ValueError, naming the file and the field, if an id is in no place or is not an id.
    """
    tables = {"": config} | {f"{key}.": inner_object(config, key, path) for key in ("text_config", "vision_config")}
    fields = Fields(path, tables)
    if any(fields.find(key)[1] is None for key in VISION_TOKENS):  # only then, because tokenizer.json has megabytes
        added = _added_tokens(Path(path).parent)
        tokenizer = {key: added.get(token) for key, token in VISION_TOKENS.items()}
        fields = Fields(path, {**tables, "the tokenizer's ": tokenizer})
    return {key: fields.whole(key, least=0) for key in VISION_TOKENS}


def _added_tokens(folder: Path) -> dict[str, Any]:
    """Returns the ids of the tokens that the tokenizer's files list beside the vocabulary, by their texts."""
    added: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        for number, token in inner_object(read_object(path), "added_tokens_decoder", path).items():
            if isinstance(token, dict) and number.isdecimal():
                added[str(token.get("content"))] = int(number)
    path = folder / "tokenizer.json"
    if path.is_file():
        tokens = read_object(path).get("added_tokens")
        for token in tokens if isinstance(tokens, list) else []:
            if isinstance(token, dict):
                added[str(token.get("content"))] = token.get("id")
    return added
