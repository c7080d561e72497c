"""Computes checksums of arrays where the arrays are: on the devices, without a copy to the host.

A checksum does not depend on how an array is split over devices: a state can be verified on any mesh. It is a sum over
the elements of a hash of (bits of the element, index of the element), modulo 2**32, for two hashes: any change of one
element changes it, and other changes go unnoticed with a probability of 2**-64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1vl_jax.checkpoint.arrays import blocks


def checksums(tree: Any) -> dict[str, str]:
    """Returns the checksum of each array of a tree, as 16 hexadecimal digits, by the array's path in the tree.

    An array of NumPy or jax is taken at once; one in files (see checkpoint/arrays.py) is read part by part.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get([[_checksum(*part) for part in _parts(leaf)] for _, leaf in leaves])
    return {
        jax.tree_util.keystr(path): "".join(f"{sum(map(int, parts)) % 2**32:08x}" for parts in zip(*pairs, strict=True))
        for (path, _), pairs in zip(leaves, sums, strict=True)
    }


def _parts(array: Any) -> Iterator[tuple[Any, np.uint32]]:
    """Yields the parts of an array, each with its first index; to that the array's size is added."""
    size, row = math.prod(array.shape), math.prod(array.shape[1:])
    if isinstance(array, (np.ndarray, np.generic, jax.Array)):
        yield array, np.uint32(size % 2**32)  # arrays of zeros differ by their size
        return
    for start, stop in blocks(array.shape, array.dtype):
        yield np.asarray(array[start:stop]), np.uint32((size + start * row) % 2**32)


@jax.jit
def _checksum(array: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the two sums of an array of any shape, with elements of 1, 2 or 4 bytes, as uint32."""
    bits = jnp.asarray(array)
    if bits.dtype == jnp.bool_:
        bits = bits.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(bits, np.dtype(f"uint{8 * bits.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.full(words.shape, first)
    for axis in range(words.ndim):
        stride = int(np.prod(words.shape[axis + 1 :], dtype=np.uint64)) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride)
    hashed = _mix(words ^ _mix(index))
    return jnp.sum(hashed, dtype=jnp.uint32), jnp.sum(_mix(hashed + index), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Returns a one-to-one function of uint32 in which every bit depends on every bit (the end of MurmurHash3)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
