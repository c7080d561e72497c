"""Provides the code that all kernels share: running a kernel on each platform, argument checks, and padding."""

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
    """Runs a kernel. "pallas" chooses the kernel's form by the platform that the program is lowered for, which need not
    be the platform of this machine.

    Args:
      call: call(*arrays, form=..., **options) runs a pallas_call with these options; form is "gpu" or "tpu".
      backend: "pallas" or "interpret"; "interpret" runs the GPU form.
      arrays: arrays or trees of arrays.
    """
    if backend == "interpret":
        return call(*arrays, form="gpu", interpret=True)
    gpu = partial(call, form="gpu", compiler_params=triton.CompilerParams(num_warps=4, num_stages=3))
    return jax.lax.platform_dependent(
        *arrays, cuda=gpu, tpu=partial(call, form="tpu"), default=partial(_refuse, kernel=gpu)
    )


def _refuse(*arrays: jax.Array, kernel: Callable[..., Any]) -> Any:
    """Returns placeholders shaped like `kernel`'s outputs; lowering a program that contains them raises an error."""
    outs, tree = jax.tree.flatten(jax.eval_shape(kernel, *arrays))
    return jax.tree.unflatten(tree, refused_p.bind(outs=tuple((out.shape, out.dtype) for out in outs)))


def _raise(platform: str) -> NoReturn:
    raise NotImplementedError(
        f"backend 'pallas' has kernels for NVIDIA GPUs and for TPUs; this program is for {platform}. "
        "Use backend 'reference'."
    )


# platform_dependent traces all branches and lowers one, so a missing kernel must raise at lowering, not at tracing.
refused_p = Primitive("r1vl_kernel_refused")
refused_p.multiple_results = True
refused_p.def_impl(lambda *, outs: _raise(jax.default_backend()))
refused_p.def_abstract_eval(lambda *, outs: [ShapedArray(shape, dtype) for shape, dtype in outs])
mlir.register_lowering(refused_p, lambda ctx, *, outs: _raise(" and ".join(ctx.module_context.platforms)))


def check_backend(backend: str) -> None:
    """Raises ValueError if the backend is unknown."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")


def check_array(name: str, array: jax.Array, kind: Any, shape: tuple[int, ...] | None = None, source: str = "") -> None:
    """Raises ValueError unless the array has this shape and a dtype of this kind.

    Args:
      name: the argument's name. The letters after its last "_" are the array's axes.
      kind: a dtype or a class of dtypes, such as jnp.floating.
      shape: the expected shape; None: only the number of axes is checked.
      source: the argument that the expected shape comes from, for the error message.
    """
    letters = name.rsplit("_", 1)[1]
    if shape is None and array.ndim != len(letters):
        raise ValueError(f"{name} has shape {array.shape}; expected the {len(letters)} axes ({', '.join(letters)})")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}{source and f' as {source}'}")
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} has dtype {array.dtype}; expected {getattr(kind, '__name__', kind)}")


def round_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def padded(array: jax.Array, *sizes: int) -> jax.Array:
    """Returns the array with its last axes extended to these sizes by zeros at their ends."""
    lead = array.ndim - len(sizes)
    missing = [(0, size - present) for size, present in zip(sizes, array.shape[lead:], strict=True)]
    return jnp.pad(array, [(0, 0)] * lead + missing) if any(after for _, after in missing) else array


def token_block(tokens: int, largest: int) -> int:
    """Returns the number of tokens in a block: a power of two from 128 to `largest`.

    The result is the largest such block that needs no more padding than a block of 128.
    """
    block = 128
    while block < largest and round_up(tokens, 128) % (2 * block) == 0:
        block *= 2
    return block
