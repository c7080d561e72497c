"""What the kernels share: the ways to run one, the choice among platforms, checks of arguments, padding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton
from jax.extend.core import Primitive
from jax.interpreters import mlir

BACKENDS = ("reference", "pallas", "interpret")


def on_device(call: Callable, backend: str, *arrays: jax.Array):
    """Runs a kernel: for "pallas" on the platform that the program is lowered for, whichever machine lowers it.

    Args:
      call: call(*arrays, form=..., **options) makes the pallas_call, to which the options go; form is "gpu" or "tpu".
      backend: pallas or interpret, which runs the GPU's form.
    """
    if backend == "interpret":
        return call(*arrays, form="gpu", interpret=True)
    gpu = partial(call, form="gpu", compiler_params=triton.CompilerParams(num_warps=4, num_stages=3))
    return jax.lax.platform_dependent(
        *arrays, cuda=gpu, tpu=partial(call, form="tpu"), default=partial(_refuse, like=gpu)
    )


def _refuse(*arrays: jax.Array, like: Callable):
    outs, tree = jax.tree.flatten(jax.eval_shape(like, *arrays))
    return jax.tree.unflatten(tree, refused_p.bind(outs=tuple((out.shape, out.dtype) for out in outs)))


def _raise(platform: str):
    raise NotImplementedError(
        f"backend 'pallas' has kernels for NVIDIA GPUs and for TPUs; this program is for {platform}. "
        "Use backend 'reference'."
    )


# All branches of platform_dependent are traced and one is lowered: what cannot run must say so when it is lowered.
refused_p = Primitive("r1vl_kernel_refused")
refused_p.multiple_results = True
refused_p.def_impl(lambda *, outs: _raise(jax.default_backend()))
refused_p.def_abstract_eval(lambda *, outs: [jax.core.ShapedArray(shape, dtype) for shape, dtype in outs])
mlir.register_lowering(refused_p, lambda ctx, *, outs: _raise(" and ".join(ctx.module_context.platforms)))


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")


def check_array(name: str, array: jax.Array, kind, shape: tuple[int, ...] | None = None, like: str = "") -> None:
    """ValueError unless the array has the kind of dtype and the shape; `like` says where the shape comes from.

    With no shape given, the number of axes is the number of letters behind the name's last "_".
    """
    letters = name.rsplit("_", 1)[1]
    if shape is None and array.ndim != len(letters):
        raise ValueError(f"{name} has shape {array.shape}; expected the {len(letters)} axes ({', '.join(letters)})")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}{like and f' as {like}'}")
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} has dtype {array.dtype}; expected {getattr(kind, '__name__', kind)}")


def up_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def padded(array: jax.Array, *sizes: int) -> jax.Array:
    """The array with zeros behind it up to these sizes of its last axes."""
    lead = array.ndim - len(sizes)
    missing = [(0, size - had) for size, had in zip(sizes, array.shape[lead:], strict=True)]
    return jnp.pad(array, [(0, 0)] * lead + missing) if any(after for _, after in missing) else array


def token_block(tokens: int, largest: int) -> int:
    """A power of two for blocks of tokens, 128 at least: the largest up to `largest` that adds no padding to 128's."""
    block = 128
    while block < largest and up_to(tokens, 128) % (2 * block) == 0:
        block *= 2
    return block
