"""Trains a small tokenizer for the built-in task, and writes the other files of a checkpoint except the weights.

A random Qwen2-VL needs the same files as a published one: tokenizer, config.json, generation_config.json,
preprocessor_config.json and chat template. This module writes them in the published layout (flat config.json, as in
transformers 4). folder.py draws the weights and adds model.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from r1vl_jax.common.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
SYSTEM_PROMPT = "You are a helpful assistant."

# Splits texts as Qwen2 does: into contractions, words with the sign before them, single digits, signs, line ends and
# blanks. But a digit keeps the blank before it, which saves a token for every number of the task.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if loop.first and message['role'] != 'system' %}"
    "{{- '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}"
    "{{- message['content'] }}"
    "{%- else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'video' or 'video' in part %}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}"
    "{{- part['text'] }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)

TINY_SIZES: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10.0,  # with 1e6, M-RoPE's row w would have frequencies too low to tell the few cells apart
    "mrope_section": (4, 6, 6),
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "torch_dtype": "float32",
    "vision_depth": 2,
    "vision_embed_dim": 64,
    "vision_num_heads": 4,
    "vision_mlp_ratio": 4,
}


def task_texts(task_dir: str | Path) -> Iterator[str]:
    """Yields the texts of sft.json and rl.json (not heldout.json), with the words that the chat template adds."""
    task_dir = Path(task_dir)
    pairs = [
        (row["messages"][0]["content"].replace("<image>", ""), row["messages"][1]["content"])
        for row in json.loads((task_dir / "sft.json").read_text(encoding="utf-8"))
    ]
    pairs += [
        (row["problem"], row["solution"]) for row in json.loads((task_dir / "rl.json").read_text(encoding="utf-8"))
    ]
    for question, answer in pairs:
        yield f"system\n{SYSTEM_PROMPT}"
        yield f"user\n{question}"
        yield f"assistant\n{answer}"


def train_tokenizer(texts: Iterable[str], out_dir: str | Path, vocab_size: int = 512) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE on texts, saves it in out_dir and returns it as AutoTokenizer loads it.

    Every text can be encoded, and decodes to the same text: the vocabulary has all 256 bytes, and texts are not
    normalised. Qwen2-VL's special tokens have the highest ids.

    Args:
      vocab_size: maximum number of tokens, including the special tokens. A small set of texts has fewer merges and so
        fewer tokens; the size of the model's vocabulary is len(tokenizer).
    Raises: ValueError if vocab_size is smaller than the number of bytes and special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size = {vocab_size}: expected {SMALLEST_VOCABULARY} or more (bytes, special tokens)")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    bpe.save(str(out_dir / "tokenizer.json"))
    write_json(out_dir / "tokenizer_config.json", _tokenizer_config(bpe))

    from transformers import AutoTokenizer  # here: it takes a second to import

    return AutoTokenizer.from_pretrained(out_dir)


def _tokenizer_config(bpe: Tokenizer) -> dict[str, Any]:
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(bpe.token_to_id(text)): {"content": text, **token} for text in SPECIAL_TOKENS},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        # Not Qwen2Tokenizer: transformers 5 would replace the split and the normaliser of tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def write_checkpoint_files(
    out_dir: str | Path, tokenizer: PreTrainedTokenizerBase, sizes: Mapping[str, Any] | None = None
) -> None:
    """Writes config.json, generation_config.json, preprocessor_config.json and chat_template.json into out_dir.

    Args:
      tokenizer: returned by `train_tokenizer`; config.json gets its special ids and the size of its vocabulary.
      sizes: entries that replace those of TINY_SIZES (about one million parameters); None: no entry is replaced.
    Raises: ValueError if a size is unknown or impossible, or if the tokenizer lacks one of SPECIAL_TOKENS.
    """
    sizes = dict(sizes or {})
    unknown = sorted(set(sizes) - set(TINY_SIZES))
    if unknown:
        raise ValueError(f"sizes: unknown {unknown}; known are {sorted(TINY_SIZES)}")
    merged = {**TINY_SIZES, **sizes}
    _check_sizes(merged)
    vocabulary = tokenizer.get_vocab()
    missing = [text for text in SPECIAL_TOKENS if text not in vocabulary]
    if missing:
        raise ValueError(f"tokenizer: the special tokens {missing} are missing")
    ids = {text: vocabulary[text] for text in SPECIAL_TOKENS}
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "config.json", _model_config(merged, ids, len(tokenizer)))
    write_json(
        out_dir / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    write_json(
        out_dir / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        },
    )
    write_json(out_dir / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raises ValueError if the model cannot have these sizes."""
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if sizes["hidden_size"] % (2 * heads) or heads % kv_heads:
        raise ValueError(
            f"num_attention_heads = {heads}, num_key_value_heads = {kv_heads}: expected heads of an even width "
            f"(hidden_size = {sizes['hidden_size']}) and as many query heads for each key/value head"
        )
    half = sizes["hidden_size"] // heads // 2
    if len(sizes["mrope_section"]) != 3 or sum(sizes["mrope_section"]) != half:
        raise ValueError(f"mrope_section = {sizes['mrope_section']}: expected three numbers with the sum {half}")
    if sizes["vision_embed_dim"] % (4 * sizes["vision_num_heads"]):
        raise ValueError(
            f"vision_embed_dim = {sizes['vision_embed_dim']}: expected a multiple of 4 * vision_num_heads = "
            f"{4 * sizes['vision_num_heads']} (2-D rope splits a head in four)"
        )


def _model_config(sizes: Mapping[str, Any], ids: Mapping[str, int], vocab_size: int) -> dict[str, Any]:
    """Returns the contents of config.json in the style of published Qwen2-VL files (text fields at the top level)."""
    text = {name: value for name, value in sizes.items() if not name.startswith("vision_") and name != "mrope_section"}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": sizes["max_position_embeddings"],
        "max_window_layers": sizes["num_hidden_layers"],
        "vocab_size": vocab_size,
        **text,
        "rope_scaling": {"type": "mrope", "mrope_section": list(sizes["mrope_section"])},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": sizes["vision_depth"],
            "embed_dim": sizes["vision_embed_dim"],
            "num_heads": sizes["vision_num_heads"],
            "mlp_ratio": sizes["vision_mlp_ratio"],
            "hidden_act": "quick_gelu",
            "hidden_size": sizes["hidden_size"],
            "in_chans": 3,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }
