"""Devices that should hold the same bits: one flipped bit is found, and where it is."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from srpo_jax.model import sharding
from srpo_jax.run import replicas

SPECS = {"kernel": ("fsdp", "tensor"), "norm": (None,), "count": (), "wide": (None, "fsdp")}
SHAPES = {"kernel": (4, 6), "norm": (8,), "count": (), "wide": (2, 2)}
DTYPES = {"kernel": "float32", "norm": "bfloat16", "count": "int32", "wide": "float32"}


def tree_on(mesh):
    """Arrays of each kind of layout and dtype."""
    return {
        name: jax.device_put(
            jnp.zeros(SHAPES[name], DTYPES[name]), NamedSharding(mesh, PartitionSpec(*spec))
        )
        for name, spec in SPECS.items()
    }


def flipped(x: jax.Array, device: int) -> jax.Array:
    """``x``, but for one bit of the copy that one device holds: a zero turns into -0 or so."""
    parts = [np.array(shard.data) for shard in x.addressable_shards]
    at = [shard.device.id for shard in x.addressable_shards].index(device)
    parts[at].reshape(-1)[-1:].view(np.uint8)[-1] ^= 0x80
    held = [
        jax.device_put(part, shard.device)
        for part, shard in zip(parts, x.addressable_shards, strict=True)
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, held)


def test_one_flipped_bit_of_one_device_is_found_and_an_intact_state_passes():
    mesh = sharding.make_mesh(2, 2, 2)
    whole = tree_on(mesh)
    assert replicas.differing(whole, mesh) == ""
    for name, others in (("norm", 7), ("count", 7), ("wide", 3)):
        found = replicas.differing(whole | {name: flipped(whole[name], 5)}, mesh)
        assert found.startswith(f"{name} has other bits on device 5 (process 0) than on device ")
        assert found.count("device") == 1 + others
    # Of two copies nobody knows which one is right: both are named.
    found = replicas.differing(whole | {"kernel": flipped(whole["kernel"], 5)}, mesh)
    assert found.startswith("kernel has other bits on device ") and "device 5" in found
    assert "device 1" in found and found.count("device") == 2


def test_what_one_device_alone_holds_is_not_compared():
    mesh = sharding.make_mesh(1, 8, 1)
    divided = jax.device_put(jnp.zeros((8, 2)), NamedSharding(mesh, PartitionSpec("fsdp")))
    norm = jax.device_put(jnp.zeros(3), sharding.replicated(mesh))
    assert [*replicas.held_by_several({"divided": divided, "norm": norm})] == ["norm"]
    assert replicas.differing({"divided": divided}, mesh) == ""
