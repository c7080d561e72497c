"""Tensors of a checkpoint in the Hugging Face layout: their names, their dtypes, and fast transposition."""

from __future__ import annotations

import numpy as np

from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.spec import ParamSpec


def published_name(name: str) -> str:
    """The published name of a tensor. `name`: that name, or the one that transformers 5 uses in memory."""
    for prefix, published in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    return name


def tensor_names(spec: ParamSpec) -> list[str]:
    """The published names of a parameter's tensors: one a layer for a stacked parameter, else one."""
    return [spec.hf_name.format(layer) for layer in range(spec.shape[0])] if spec.stacked else [spec.hf_name]


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in another dtype. Raises CheckpointError naming the tensor where a value is too large for float16."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if dtype == np.float16 and not np.array_equal(np.isinf(out), np.isinf(array)):
        raise CheckpointError(f"{name}: has values beyond float16's range (65504); convert to bfloat16 instead")
    return out


def transpose_into(out: np.ndarray, matrix: np.ndarray, block: int = 128) -> None:
    """out[:] = matrix.T, a block of rows at a time: blocks fit the CPU's cache, which is five to ten times faster."""
    for row in range(0, matrix.shape[0], block):
        out[:, row : row + block] = matrix[row : row + block].T
