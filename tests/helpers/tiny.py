"""Tiny Hugging Face Qwen2-VL models with ALL weights random, and batches for them, for tests that need torch.

Defaults of zeros and ones (biases, norms) would hide a dropped term. Batches are packed here by plain loops and take
their positions from transformers, so that nothing of the package's own batching is used.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1vl_jax.checkpoint.hf import load_hf
from r1vl_jax.model.config import load_config
from r1vl_jax.types import Prompts

IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT_IDS, VOCAB = 90, 96
PATCH_DIM = 1176


def config_dict(*, tied=True, heads=4, kv_heads=2, head_dim=16, section=(2, 3, 3), layers=2) -> dict[str, Any]:
    """A config.json in the flat style of the published checkpoints."""
    width = heads * head_dim
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "max_position_embeddings": 512,
        "max_window_layers": layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "mlp_ratio": 4,
            "num_heads": 2,
            "in_chans": 3,
            "hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(section)},
        "vocab_size": VOCAB,
    }


def tiny_hf(seed: int = 0, **shape):
    """A Qwen2VLForConditionalGeneration on the CPU in fp32; `shape` as in `config_dict`."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(**config_dict(**shape))
    config._attn_implementation = "eager"
    model = Qwen2VLForConditionalGeneration(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                scale = 0.2 if "embed_tokens" in name else parameter[0].numel() ** -0.5
                parameter.copy_(scale * draw)
            else:  # biases about 0, norms about 1
                norm = "norm" in name or "ln_q" in name
                parameter.copy_(0.3 * draw + (1.0 if norm and name.endswith("weight") else 0.0))
    return model


def save_tiny(model, folder: Path, *, nested: bool = False, dtype: str = "float32", max_shard_size="5GB") -> Path:
    """Saves with transformers (nested config), then puts the published flat config and some more files beside it."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if not nested:
        text = model.config.text_config
        shape = {
            "tied": model.config.tie_word_embeddings,
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
            "head_dim": text.hidden_size // text.num_attention_heads,
            "section": text.rope_parameters["mrope_section"],
            "layers": text.num_hidden_layers,
        }
        (folder / "config.json").write_text(json.dumps(config_dict(**shape) | {"torch_dtype": dtype}, indent=2))
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.0"}\r\n')
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}")
    (folder / "merges.txt").write_bytes("Ġ t\n".encode())
    return folder


def to_jax(model, folder: Path):
    """(params, cfg) of a torch model, by way of its saved checkpoint."""
    cfg = load_config(save_tiny(model, folder))
    return jax.tree.map(jnp.asarray, load_hf(folder, cfg)), cfg


def hf_gradients(model, folder: Path, cfg) -> Any:
    """The gradients in `model`, laid out as our parameters; zeros where torch has none."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        tensors[name] = gradient.contiguous()
    save_file(tensors, folder / "model.safetensors")
    return load_hf(folder, cfg)


def relative_errors(ours, theirs):
    """Per parameter: largest difference over the largest value of transformers' gradient."""
    errors = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        top, difference = np.abs(b).max(), np.abs(np.asarray(a) - b).max()
        errors[jax.tree_util.keystr(path)] = difference / top if top else difference
    return errors


def check_gradients(ours, model, folder, cfg):
    errors = relative_errors(ours, hf_gradients(model, folder, cfg))
    print(f"gradients {max(errors.values()):.1e}")
    assert not {path: error for path, error in errors.items() if not error < 1e-3}


@dataclasses.dataclass
class Row:
    """One row: pieces are a number of text tokens, or ("image" | "video", (t, h, w))."""

    tokens: list[int]
    kinds: list[int]  # 0 text, 1 image, 2 video
    grids: list[tuple[int, tuple[int, int, int]]]  # (kind, grid)
    patches: list[np.ndarray]

    @classmethod
    def of(cls, rng: np.random.Generator, *pieces) -> Row:
        row = cls([], [], [], [])
        for piece in pieces:
            if isinstance(piece, int):
                row.tokens += rng.integers(0, TEXT_IDS, piece).tolist()
                row.kinds += [0] * piece
                continue
            kind = {"image": 1, "video": 2}[piece[0]]
            t, h, w = piece[1]
            count = t * h * w // 4
            row.tokens += [START] + [IMAGE if kind == 1 else VIDEO] * count + [END]
            row.kinds += [0] + [kind] * count + [0]
            row.grids.append((kind, piece[1]))
            row.patches.append(rng.normal(size=(t * h * w, PATCH_DIM)).astype(np.float32))
        return row


def hf_inputs(rows: list[Row], side: str = "right") -> dict[str, Any]:
    """The keyword arguments of the torch model's forward pass, position_ids not among them."""
    import torch

    width = max(len(row.tokens) for row in rows)
    ids, mask, kinds = (np.zeros((len(rows), width), np.int64) for _ in range(3))
    for i, row in enumerate(rows):
        here = slice(0, len(row.tokens)) if side == "right" else slice(width - len(row.tokens), width)
        ids[i, here], mask[i, here], kinds[i, here] = row.tokens, 1, row.kinds
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    for kind, pixels, grid in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        chosen = [(g, p) for row in rows for (k, g), p in zip(row.grids, row.patches, strict=True) if k == kind]
        if chosen:
            inputs[pixels] = np.concatenate([p for _, p in chosen])
            inputs[grid] = np.array([g for g, _ in chosen])
    return {key: torch.from_numpy(value) for key, value in inputs.items()}


def hf_positions(model, inputs) -> tuple[np.ndarray, np.ndarray]:
    """(positions (3, B, T), the position of the token after each row) as transformers gives them."""
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    positions, delta = model.model.get_rope_index(**{key: inputs[key] for key in keys if key in inputs})
    after = delta[:, 0] + inputs["attention_mask"].sum(1)
    return positions.numpy().astype(np.int32), after.numpy().astype(np.int32)


def make_prompts(model, rows: list[Row], side="right", images_per_row: int = 1, shape=None) -> Prompts:
    """Packs rows into Prompts; `images_per_row` images lie behind each other in a vision row.

    `shape` (B, T, R, P) pads to at least these sizes: rows at the end, tokens on `side`, patches at the end.
    """
    B, T, R, P = shape or (0, 0, 0, 0)
    inputs = hf_inputs(rows, side)
    positions, after = hf_positions(model, inputs)
    images = [(grid, patches) for row in rows for (_, grid), patches in zip(row.grids, row.patches, strict=True)]
    bins = [images[i : i + images_per_row] for i in range(0, len(images), images_per_row)]
    R, P = max(R, len(bins)), max([P] + [sum(len(p) for _, p in bin_) for bin_ in bins])
    patches = np.full((R, P, PATCH_DIM), 50.0, np.float32)
    hw, segment = np.zeros((R, P, 2), np.int32), np.full((R, P), -1, np.int32)
    slots = []
    for r, bin_ in enumerate(bins):
        at, frame = 0, 0
        for (t, h, w), values in bin_:
            slots += range(r * P // 4 + at // 4, r * P // 4 + (at + len(values)) // 4)
            patches[r, at : at + len(values)] = values
            for _ in range(t):
                hw[r, at : at + h * w], segment[r, at : at + h * w] = _cells(h, w), frame
                at, frame = at + h * w, frame + 1
    ids, mask, kinds = (inputs[key].numpy() for key in ("input_ids", "attention_mask", "mm_token_type_ids"))
    slot = np.full(ids.shape, -1, np.int32)
    slot[kinds > 0] = slots
    more_B, more_T = (max(0, wanted - size) for wanted, size in zip((B, T), ids.shape, strict=True))
    widths = [(0, more_B), (0, more_T) if side == "right" else (more_T, 0)]
    return Prompts(
        tokens_BT=jnp.asarray(np.pad(ids.astype(np.int32), widths)),
        mask_BT=jnp.asarray(np.pad(mask.astype(bool), widths)),
        positions_3BT=jnp.asarray(np.pad(positions, [(0, 0), *widths])),
        image_slot_BT=jnp.asarray(np.pad(slot, widths, constant_values=-1)),
        next_position_B=jnp.asarray(np.pad(after, widths[:1])),
        patches_WPC=jnp.asarray(patches),
        patch_hw_WP2=jnp.asarray(hw),
        segment_WP=jnp.asarray(segment),
    )


def _cells(h: int, w: int) -> list[tuple[int, int]]:
    """(row, column) of a frame's patches in merge order."""
    inner = [(0, 0), (0, 1), (1, 0), (1, 1)]
    return [(2 * i + k, 2 * j + m) for i in range(h // 2) for j in range(w // 2) for k, m in inner]
