"""Sums over the bits of arrays, made where they lie: is what was read what was saved?

Files on disk are compressed and cut up by process; a sum over an array's values holds in whatever
layout, needs no second look at the files, and costs one pass over device memory.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def checksums(tree: Any) -> dict[str, int]:
    """32 bits for each array, by its path; the same on any mesh, and on every process (collective).

    A change of one entry always changes its array's sum, another change but once in 2**32 times.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = _checksums([leaf for _, leaf in leaves])
    return {
        path_name(path): int(np.asarray(value.addressable_data(0)))
        for (path, _), value in zip(leaves, sums, strict=True)
    }


def changed(saved: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """The paths whose sums differ; of arrays that only one side has, others speak."""
    return sorted(name for name in saved.keys() & found.keys() if saved[name] != found[name])


def path_name(path: Any) -> str:
    """A key path in dots. Orbax stores tuples with names as dicts: their names are the same."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [checksum(leaf) for leaf in leaves]


def checksum(x: jax.Array) -> jax.Array:
    """The entries' bits, each times an odd number that its place decides, modulo 2**32."""
    x = jax.device_put(x, jax.memory.Space.Device)  # what waits on the host cannot be read there
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis in range(bits.ndim):
        iota = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place += iota * jnp.uint32(0x9E3779B1 + (axis << 16))
    place = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(bits * (place | jnp.uint32(1)), dtype=jnp.uint32)
