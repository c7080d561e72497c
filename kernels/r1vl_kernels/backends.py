"""Shared by the kernels: how to run one, which form each platform gets, checks of arguments, padding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental.pallas import triton
from jax.extend.core import Primitive
from jax.interpreters import mlir

BACKENDS = ("reference", "pallas", "interpret")


def on_device(call: Callable[..., Any], backend: str, *arrays: Any) -> Any:
    """Runs a kernel. "pallas" chooses the form by the platform the program is lowered for, not the machine it is on.

    Args:
      call: call(*arrays, form=..., **options) runs a pallas_call with these options; form is "gpu" or "tpu".
      backend: "pallas", or "interpret", which runs the GPU form.
      arrays: arrays or trees of arrays.
    """
    if backend == "interpret":
        return call(*arrays, form="gpu", interpret=True)
    gpu = partial(call, form="gpu", compiler_params=triton.CompilerParams(num_warps=4, num_stages=3))
    return jax.lax.platform_dependent(
        *arrays, cuda=gpu, tpu=partial(call, form="tpu"), default=partial(_refuse, kernel=gpu)
    )


def _refuse(*arrays: jax.Array, kernel: Callable[..., Any]) -> Any:
    """Has the outputs of `kernel`, and raises when a program that contains it is lowered."""
    outs, tree = jax.tree.flatten(jax.eval_shape(kernel, *arrays))
    return jax.tree.unflatten(tree, refused_p.bind(outs=tuple((out.shape, out.dtype) for out in outs)))


def _raise(platform: str) -> NoReturn:
    raise NotImplementedError(
        f"backend 'pallas' has kernels for NVIDIA GPUs and for TPUs; this program is for {platform}. "
        "Use backend 'reference'."
    )


# platform_dependent traces every branch and lowers one: a platform without a kernel must fail at lowering, not tracing.
refused_p = Primitive("r1vl_kernel_refused")
refused_p.multiple_results = True
refused_p.def_impl(lambda *, outs: _raise(jax.default_backend()))
refused_p.def_abstract_eval(lambda *, outs: [ShapedArray(shape, dtype) for shape, dtype in outs])
mlir.register_lowering(refused_p, lambda ctx, *, outs: _raise(" and ".join(ctx.module_context.platforms)))


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")


def check_array(name: str, array: jax.Array, kind: Any, shape: tuple[int, ...] | None = None, source: str = "") -> None:
    """Raises ValueError unless the array has this shape and a dtype of this kind.

    Args:
      name: the argument's name. Its letters after the last "_" are its axes.
      kind: a dtype or a class of dtypes, such as jnp.floating.
      shape: None checks only that there are as many axes as letters.
      source: the argument that the expected shape comes from, for the message.
    """
    letters = name.rsplit("_", 1)[1]
    if shape is None and array.ndim != len(letters):
        raise ValueError(f"{name} has shape {array.shape}; expected the {len(letters)} axes ({', '.join(letters)})")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}{source and f' as {source}'}")
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} has dtype {array.dtype}; expected {getattr(kind, '__name__', kind)}")


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not less than `size`."""
    return -(-size // multiple) * multiple


def padded(array: jax.Array, *sizes: int) -> jax.Array:
    """The array with its last axes extended to these sizes by zeros at their ends."""
    lead = array.ndim - len(sizes)
    missing = [(0, size - present) for size, present in zip(sizes, array.shape[lead:], strict=True)]
    return jnp.pad(array, [(0, 0)] * lead + missing) if any(after for _, after in missing) else array


def token_block(tokens: int, largest: int) -> int:
    """Tokens in a block: a power of two from 128 to `largest`, the largest that needs no more padding than 128."""
    block = 128
    while block < largest and round_up(tokens, 128) % (2 * block) == 0:
        block *= 2
    return block
