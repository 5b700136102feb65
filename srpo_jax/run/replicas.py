"""Do devices that should hold the same bits hold the same bits? Silent corruption, found.

Every device sums up the bits that it holds itself, in one program; only these sums travel.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from srpo_jax.model import sharding
from srpo_jax.run.checksums import checksum, path_name


def held_by_several(tree: Any) -> dict[str, jax.Array]:
    """The arrays of which several devices hold the same part, by their paths."""

    def parts(x: jax.Array) -> int:
        own = x.sharding.shard_shape(x.shape)
        return math.prod(all // part for all, part in zip(x.shape, own, strict=True) if part)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(at): x for at, x in leaves if parts(x) < x.sharding.num_devices}


def differing(tree: Any, mesh: Mesh) -> str:
    """The first array of which two devices hold the same part with other bits, and these devices;
    "" where all agree (collective).

    A change of one entry is always found, another one but once in 2**32 times.
    """
    held = held_by_several(tree)
    if not held:
        return ""
    # Of a state on a mesh each is a NamedSharding.
    specs = tuple(x.sharding.spec for x in held.values())  # pyright: ignore[reportAttributeAccessIssue]
    sums = _program(mesh, specs)([*held.values()])
    sums_DX = np.asarray(sums.addressable_data(0))  # of D devices and X arrays
    devices = [*mesh.devices.flat]
    for (name, x), sums_D in zip(held.items(), sums_DX.T, strict=True):
        where = x.sharding.devices_indices_map(x.shape)
        groups: dict[str, list[int]] = {}
        for d, device in enumerate(devices):
            groups.setdefault(str(where[device]), []).append(d)
        for group in groups.values():
            if len({*sums_D[group].tolist()}) > 1:
                ((usual, _),) = Counter(sums_D[group].tolist()).most_common(1)
                odd = [d for d in group if sums_D[d] != usual]
                rest = [d for d in group if sums_D[d] == usual]
                told = [_named(devices[d] for d in some) for some in (odd, rest)]
                return f"{name} has other bits on {told[0]} than on {told[1]}"
    return ""


@functools.lru_cache(maxsize=4)
def _program(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[..., jax.Array]:
    def own_sums(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack([checksum(leaf) for leaf in leaves])[None]

    out = PartitionSpec(sharding.AXES)
    every = jax.shard_map(own_sums, mesh=mesh, in_specs=([*specs],), out_specs=out, check_vma=False)
    return jax.jit(every, out_shardings=sharding.replicated(mesh))


def _named(devices: Iterable[Any], limit: int = 8) -> str:
    found = [f"device {one.id} (process {one.process_index})" for one in devices]
    return ", ".join(found[:limit] + ["..."] * (len(found) > limit))
