"""The config.json of published Qwen2-VL models, for work that needs a model's sizes and not its weights."""

from __future__ import annotations

from typing import Any

TOWER = {"layers": 32, "width": 1280, "heads": 16}  # the vision tower of all sizes


def flat_config(
    *,
    width: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool,
    tower: dict[str, int] = TOWER,
    special_ids: tuple[int, int, int, int] = (151655, 151656, 151652, 151653),
) -> dict[str, Any]:
    """Returns a flat config.json in the published style.

    Args:
      tower: layers, width and heads of the vision tower.
      special_ids: of image, video, vision start and vision end.
    """
    half = width // heads // 2
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]},
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "use_sliding_window": False,
        "hidden_act": "silu",
        **dict(zip(names, special_ids, strict=True)),
        "vision_config": {
            "depth": tower["layers"],
            "embed_dim": tower["width"],
            "num_heads": tower["heads"],
            "hidden_size": width,
            "mlp_ratio": 4,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


PUBLISHED = {
    "2b": flat_config(width=1536, mlp=8960, layers=28, heads=12, kv_heads=2, vocab=151936, tied=True),
    "7b": flat_config(width=3584, mlp=18944, layers=28, heads=28, kv_heads=4, vocab=152064, tied=False),
    "72b": flat_config(width=8192, mlp=29568, layers=80, heads=64, kv_heads=8, vocab=152064, tied=False),
}
