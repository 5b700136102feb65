"""Meshes, the sharding table, and the way of arrays between host and mesh."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from srpo_jax.model import sharding
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sizes import size_config


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What a device of a machine that is not here tells about itself."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"


def test_mesh_has_three_automatic_axes_and_fills_the_free_one():
    mesh = sharding.make_mesh(data=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(sharding.make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(sharding.make_mesh(8, 1, 1).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    few = sharding.make_mesh(devices=jax.devices()[:3])
    assert dict(few.shape) == {"data": 1, "fsdp": 3, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, -1, 1), (16, 1, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=f"mesh data={sizes[0]}, fsdp={sizes[1]}, tensor=1"):
        sharding.make_mesh(*sizes)


def test_data_is_the_axis_across_slices_and_hosts():
    # Two slices of two hosts of four devices, told in an order that means nothing.
    devices = [FakeDevice(100 * s + 10 * h + i, 2 * s + h, s)
               for i in range(4) for h in range(2) for s in range(2)]  # fmt: skip
    grid = sharding._mesh_grid((2, 4, 2), devices)
    assert grid.shape == (2, 4, 2)
    assert {d.slice_index for d in grid[0].flat} == {0}
    assert {d.slice_index for d in grid[1].flat} == {1}
    for pair in grid.reshape(-1, 2):
        assert pair[0].process_index == pair[1].process_index
    hosts = sharding._mesh_grid((4, 2, 2), devices)
    for row in hosts:
        assert len({d.process_index for d in row.flat}) == 1


def test_processes_know_their_data_shards():
    devices = np.array([FakeDevice(i, i // 4, 0) for i in range(8)], object)
    shards = lambda shape, p: sharding.process_shards(  # noqa: E731
        sharding.Mesh(devices.reshape(shape), sharding.AXES), p
    )
    assert shards((2, 2, 2), 0) == [0, 1] and shards((2, 2, 2), 1) == [2, 3]
    # Tensor over both processes: both hold the one shard.
    assert shards((1, 1, 8), 0) == [0] and shards((1, 1, 8), 1) == [0]
    assert sharding.process_shards(sharding.make_mesh(2, 2, 2)) == [0, 1, 2, 3]
    assert sharding.num_data_shards(sharding.make_mesh(2, 2, 2)) == 4


# --- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_each_parameter_matches_exactly_one_row_and_each_row_is_used(size):
    params = abstract_params(size_config(size, tie_word_embeddings=False))
    hits = {row[0]: 0 for row in sharding.TABLE}
    for path, leaf in params.items():
        rows = [row for row in sharding.TABLE if re.fullmatch(row[0], path)]
        assert len(rows) == 1, path
        assert len(rows[0][1]) == len(leaf.shape), path
        hits[rows[0][0]] += 1
    assert all(hits.values())


def test_a_path_without_a_row_is_an_error():
    odd = {"text/layers/attn/z/kernel": jax.ShapeDtypeStruct((1, 2), jnp.float32)}
    with pytest.raises(ValueError, match="text/layers/attn/z/kernel: 0 rows"):
        sharding.param_specs(odd, sharding.make_mesh())
    with pytest.raises(ValueError, match="layout 'serve'"):
        sharding.param_specs({}, sharding.make_mesh(), "serve")


def test_training_divides_and_sampling_keeps_over_fsdp():
    params, mesh = abstract_params(size_config("7b")), sharding.make_mesh(1, 4, 2)
    train = sharding.param_specs(params, mesh)
    sample = sharding.param_specs(params, mesh, "sample")
    q, down = "text/layers/attn/q/kernel", "text/layers/mlp/down/kernel"
    assert train[q].spec == P(None, "fsdp", "tensor", None)
    assert sample[q].spec == P(None, None, "tensor", None)
    assert train[down].spec == P(None, "tensor", "fsdp")
    assert train["text/embed/embedding"].spec == P("tensor", "fsdp")
    assert train["text/lm_head/kernel"].spec == P("fsdp", "tensor")
    for specs in (train, sample):
        assert specs["text/norm/scale"].is_fully_replicated
    assert all("fsdp" not in s.spec and "data" not in s.spec for s in sample.values())
    # What is not divided in training is small: less than 1 in 1000 of all parameters.
    whole = sum(math.prod(params[k].shape) for k, s in train.items() if "fsdp" not in s.spec)
    assert whole < 1e-3 * sum(math.prod(p.shape) for p in params.values())


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_every_device_holds_its_part(size):
    """A device's share of the parameters stays within 5 % of the whole divided by all devices."""
    params, mesh = abstract_params(size_config(size)), sharding.make_mesh(1, 4, 2)
    specs = sharding.param_specs(params, mesh)
    share = sum(math.prod(specs[k].shard_shape(p.shape)) for k, p in params.items())
    assert share * 8 < 1.05 * sum(math.prod(p.shape) for p in params.values())


def test_a_dimension_that_does_not_divide_stays_whole():
    params = abstract_params(size_config("7b"))  # 28 heads, 4 kv heads, mlp 18,944
    specs = sharding.param_specs(params, sharding.make_mesh(1, 1, 8))
    assert specs["text/layers/attn/q/kernel"].is_fully_replicated
    assert specs["text/layers/attn/k/bias"].is_fully_replicated
    assert specs["text/layers/mlp/gate/kernel"].spec == P(None, None, "tensor")
    assert specs["vision/blocks/mlp/gate/bias"].is_fully_replicated  # 3,420
    for path, leaf in params.items():
        specs[path].shard_shape(leaf.shape)  # raises where it does not divide


# --- optimizer state -------------------------------------------------------------------------


def test_optimizer_state_lies_as_its_parameters():
    mesh = sharding.make_mesh(1, 4, 2)
    full = abstract_params(size_config("7b"))
    params = {k: full[k] for k in ("text/layers/attn/q/kernel", "text/norm/scale")}
    specs = sharding.param_specs(params, mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    shapes = jax.eval_shape(tx.init, params)
    found = sharding.like_params(shapes, specs, mesh)
    adam = found[1][0]
    for tree in (adam.mu, adam.nu):
        assert tree == specs
    assert adam.count == sharding.replicated(mesh)
    assert jax.tree.structure(found) == jax.tree.structure(shapes)


def test_factored_statistics_are_replicated():
    mesh = sharding.make_mesh(1, 4, 2)
    params = {"text/embed/embedding": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
    specs = sharding.param_specs(params, mesh)
    shapes = jax.eval_shape(optax.adafactor(1e-3).init, params)
    found = sharding.like_params(shapes, specs, mesh)
    for leaf, where in zip(jax.tree.leaves(shapes), jax.tree.leaves(found), strict=True):
        where.shard_shape(leaf.shape)
        assert (where == specs["text/embed/embedding"]) == (leaf.shape == (256, 512))


# --- host and mesh ---------------------------------------------------------------------------


def test_rows_go_to_their_shards_and_come_back():
    mesh = sharding.make_mesh(2, 2, 2)
    tree = {"a": np.arange(24, dtype=np.int32).reshape(8, 3), "b": np.arange(4) > 1, "none": None}
    there = sharding.to_global(tree, mesh)
    assert there["none"] is None
    assert there["a"].sharding == sharding.batch_sharding(mesh)
    for shard in there["a"].addressable_shards:
        d, f, _ = np.argwhere(mesh.devices == shard.device)[0]
        row = 2 * (2 * d + f)
        assert np.array_equal(shard.data, tree["a"][row : row + 2])
    back = jax.tree.map(np.asarray, there)
    assert np.array_equal(back["a"], tree["a"]) and np.array_equal(back["b"], tree["b"])


def test_rows_reach_their_shards_on_a_mesh_in_any_order():
    """On a torus the devices of a process need not follow one another on the mesh."""
    devices = np.array(jax.devices())[[3, 0, 6, 5, 1, 7, 2, 4]].reshape(4, 2, 1)
    mesh = sharding.Mesh(devices, sharding.AXES)
    rows = np.arange(32).reshape(16, 2)
    there = sharding.to_global(rows, mesh)
    for shard in there.addressable_shards:
        place = int(np.flatnonzero(mesh.devices.ravel() == shard.device)[0])
        assert np.array_equal(shard.data, rows[2 * place : 2 * place + 2])


def test_rows_that_do_not_divide_are_refused():
    mesh = sharding.make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match=r"shape \(6, 2\).*4 data shards"):
        sharding.to_global(np.zeros((6, 2)), mesh)
    with pytest.raises(ValueError, match=r"shape \(\)"):
        sharding.to_global(np.float32(1), mesh)


def test_a_sum_over_the_mesh_is_the_sum_on_the_host():
    mesh = sharding.make_mesh(2, 2, 2)
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    total = jax.jit(lambda x: x.sum(0), out_shardings=sharding.replicated(mesh))(
        sharding.to_global(rows, mesh)
    )
    assert isinstance(total.sharding, NamedSharding)
    assert np.array_equal(total, rows.sum(0))
