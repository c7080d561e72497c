"""Recognises weights that are not those of a whole Qwen2-VL in floating point: quantized weights, and adapters (LoRA).

They are refused with the word, because the missing and unknown tensors alone would not tell the user what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from r1vl_jax.checkpoint.folder import ADAPTER_CONFIG, has_weights
from r1vl_jax.common.files import read_object
from r1vl_jax.errors import CheckpointError

# For each kind, how its tensors are called.
_KINDS = {
    "an adapter": r"^base_model\.|\.base_layer\.|\bmodules_to_save\b|\b(?:lora|ia3|hada|lokr|oft|vera)_",
    "quantized weights (GPTQ or AWQ)": r"\.(?:qweight|qzeros|g_idx|scales)$",
    "quantized weights (bitsandbytes)": r"\.(?:SCB|weight_format|(?:nested_)?(?:absmax|quant_map))$|\.quant_state\.",
    "quantized weights (compressed-tensors)": r"\.weight_(?:packed|shape|zero_point|g_idx|global_scale)$",
    "quantized weights (fp8 or int8)": r"\.(?:weight|input|output|activation|k|v)_scale(?:_inv)?$",
}
_QUANTIZED_DTYPE = re.compile(r"F[48]_|[IU][48]$")  # as safetensors calls them


def refuse_foreign_tensors(folder: Path, tensors: Iterable[tuple[str, str]]) -> None:
    """Raises CheckpointError if there are tensors of an adapter or of quantized weights.

    Args:
      tensors: pairs of a tensor's name and its dtype, as safetensors calls it.
    """
    found: dict[str, list[str]] = {}
    for name, dtype in tensors:
        kind = next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), None)
        if kind is None and _QUANTIZED_DTYPE.match(dtype):
            kind = f"quantized weights ({dtype})"
        if kind is not None:
            found.setdefault(kind, []).append(name)
    if found:
        said = " and ".join(f"{kind}: {len(names):,} tensors, the first {names[0]}" for kind, names in found.items())
        raise CheckpointError(f"{folder}: holds {said}; expected a whole model in bfloat16, float16 or float32")


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError if a folder holds an adapter without the weights of its base model."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or has_weights(folder):
        return
    try:
        base = read_object(path).get("base_model_name_or_path")
    except ValueError:  # the file is faulty, but the adapter would not be read anyway
        base = None
    of = f" of {base!r:.120}" if base else ""
    raise CheckpointError(
        f"{path}: an adapter{of} without the weights of its base model; expected a whole model, so merge them first"
    )
