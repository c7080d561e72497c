"""Tiny models, prompts and runs that need no torch, for tests of the stages and of the commands.

Weights are ALL random (biases, norms), as in tiny.py. Prompts are made from tiny.Row.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from helpers.tiny import Row, config_dict
from r1vl_jax.checkpoint.hf import save_hf
from r1vl_jax.config import Config, load
from r1vl_jax.data.batching import collate_prompts
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.model.config import ModelConfig, load_config, parse_config
from r1vl_jax.model.spec import param_spec
from r1vl_jax.processing.positions import mrope_positions
from r1vl_jax.rewards import Score
from r1vl_jax.shapes import make_task
from r1vl_jax.shapes.tokenizer import task_texts, train_tokenizer, write_checkpoint_files
from r1vl_jax.types import EncodedPrompt, Prompts, is_spec


def tiny_config(**shape) -> ModelConfig:
    """A model of one text layer and one vision layer; `shape` as in `tiny.config_dict`."""
    raw = config_dict(**{"layers": 1, **shape})
    raw["vision_config"]["depth"] = 1
    return parse_config(raw)


def random_params(cfg: ModelConfig, seed: int = 0) -> Any:
    """fp32 parameters, every one random: kernels of unit gain, biases about 0, norms about 1."""
    rng = np.random.default_rng(seed)

    def draw(spec):
        values = rng.normal(size=spec.shape)
        if spec.init == "normal":
            embedding = spec.hf_name == "model.embed_tokens.weight"
            values *= 0.3 if embedding else math.prod(spec.hf_shape[1:]) ** -0.5
        else:
            values = 0.3 * values + (spec.init == "ones")
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, param_spec(cfg), is_leaf=is_spec)


def encode(row: Row) -> EncodedPrompt:
    """A row of tiny.py as a question."""
    kinds = np.array(row.kinds)
    segments, at, images = [], 0, iter(row.grids)
    while at < len(kinds):
        if kinds[at]:
            _, grid = next(images)
            segments.append(grid)
            at += math.prod(grid) // 4
        else:
            text = int(np.argmax(kinds[at:] > 0)) if (kinds[at:] > 0).any() else len(kinds) - at
            segments.append(text)
            at += text
    positions, after = mrope_positions(segments, 2)
    return EncodedPrompt(
        tokens_T=np.array(row.tokens, np.int32),
        positions_3T=positions,
        image_slot_T=np.where(kinds > 0, np.cumsum(kinds > 0) - 1, -1).astype(np.int32),
        patches_PC=np.concatenate([np.zeros((0, 1176), np.float32), *row.patches]),
        grids=tuple(grid for _, grid in row.grids),
        next_position=after,
    )


def questions(*rows: list, seed: int = 0) -> list[EncodedPrompt]:
    """Questions from lists of pieces (see tiny.Row.of)."""
    rng = np.random.default_rng(seed)
    return [encode(Row.of(rng, *pieces)) for pieces in rows]


def with_answer(prompt: EncodedPrompt, answer) -> EncodedPrompt:
    """Question and answer as one text: what a forward pass without any cache sees."""
    count = len(answer)
    positions = np.broadcast_to(prompt.next_position + np.arange(count, dtype=np.int32), (3, count))
    return EncodedPrompt(
        tokens_T=np.concatenate([prompt.tokens_T, np.asarray(answer, np.int32)]),
        positions_3T=np.concatenate([prompt.positions_3T, positions], axis=1),
        image_slot_T=np.concatenate([prompt.image_slot_T, np.full(count, -1, np.int32)]),
        patches_PC=prompt.patches_PC,
        grids=prompt.grids,
        next_position=prompt.next_position + count,
    )


def left_padded(prompts: Prompts) -> Prompts:
    """The same questions with their padding on the left."""
    shifts = [int((~row).sum()) for row in np.asarray(prompts.mask_BT)]

    def roll(rows):
        return np.stack([np.roll(row, shift, axis=-1) for row, shift in zip(np.asarray(rows), shifts, strict=True)])

    return prompts.replace(
        tokens_BT=roll(prompts.tokens_BT),
        mask_BT=roll(prompts.mask_BT),
        positions_3BT=np.stack([roll(row) for row in np.asarray(prompts.positions_3BT)]),
        image_slot_BT=roll(prompts.image_slot_BT),
    )


def batch_of(encoded: list[EncodedPrompt], *, pad_multiple: int = 8, shards: int = 1) -> Prompts:
    return collate_prompts(encoded, Buckets(pad_multiple, shards=shards))


# Runs.

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "mrope_section": (1, 1, 2),
    "vision_depth": 1,
    "vision_embed_dim": 16,
    "vision_num_heads": 2,
}


def write_run_inputs(folder: Path, **sizes) -> Path:
    """The shapes task of a few rows (folder/task) and a tiny random Qwen2-VL (folder/model) of SIZES or `sizes`."""
    task, draft = folder / "task", folder / "draft"
    make_task(task, sft_rows=24, rl_rows=24, heldout_rows=4, progress=False)
    tokenizer = train_tokenizer(task_texts(task), draft, vocab_size=384)
    write_checkpoint_files(draft, tokenizer, SIZES | sizes)
    cfg = load_config(draft)
    save_hf(random_params(cfg), cfg, folder / "model", source=draft)
    return folder


def run_config(inputs: Path, output: Path, **sections) -> Config:
    """A small run on `write_run_inputs`; `sections` replace or extend what stands here."""
    tree = {
        "output_dir": str(output),
        "stages": ["sft", "step_grpo"],
        "model": {"path": str(inputs / "model"), "dtype": "float32", "remat": "none"},
        "mesh": {"data": 1},
        "data": {
            "sft": {"path": str(inputs / "task" / "sft.json")},
            "rl": {"path": str(inputs / "task" / "rl.json")},
            "max_prompt_tokens": 256,
            "pad_multiple": 64,
        },
        "sft": {
            "steps": 4, "batch_size": 4, "micro_batch_size": 2, "max_pixels": 3136,
            "optimizer": {"learning_rate": 1e-2},
        },
        "rl": {
            "steps": 4, "questions_per_step": 4, "micro_batch_size": 2, "group_size": 2, "max_new_tokens": 12,
            "temperature": 1.0, "max_pixels": 3136, "optimizer": {"learning_rate": 1e-2, "schedule": "linear"},
        },
        "checkpoint": {"every": 2},
        "scoring": {"workers": 1},
        "compilation_cache": "off",
    }  # fmt: skip
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(_merged(tree, sections)))
    return load(file)


def _merged(tree: dict, changes: dict) -> dict:
    both = {
        key: _merged(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        for key, value in changes.items()
    }
    return {**tree, **both}


class FakeScorerPool:
    """Stands for ScorerPool: scores that depend on the answer's text alone and differ within a group."""

    def __init__(self, workers: int = 1, timeout_s: float = 1.0):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        pass

    def score(self, completions, solutions, key_steps, rules="paper", alpha=0.1) -> list[Score]:
        rewards = [zlib.crc32(text.encode()) % 7 / 7 for text in completions]
        return [Score(accuracy=reward, reward=reward) for reward in rewards]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
