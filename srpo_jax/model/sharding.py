"""Meshes, where each parameter lies on them, and the way between host arrays and global arrays.

The mesh has three axes: ``data`` (across slices and hosts; parameters are replicated over it),
``fsdp`` (parameters and optimizer state are divided) and ``tensor`` (heads, mlp and vocabulary are
divided). Rows of data are divided over ``data`` x ``fsdp``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from srpo_jax.structs import Array

AXES = ("data", "fsdp", "tensor")
LAYOUTS = ("train", "sample")
HOST = "pinned_host"  # the memory kind of what waits beside a device's memory
Axes = tuple[str | None, ...]  # the mesh axis of each dimension
_ = None

# Parameter path -> how its dimensions lie on the mesh. Training divides one large dimension over
# fsdp; sampling keeps it whole, so that decoding a token gathers no weights. An axis that does not
# divide its dimension is left out (`param_specs`).
TABLE: tuple[tuple[str, Axes], ...] = (
    (r"text/embed/embedding", ("tensor", "fsdp")),  # [V, D]
    (r"text/lm_head/kernel", ("fsdp", "tensor")),  # [D, V]
    (r"text/layers/attn/[qkv]/kernel", (_, "fsdp", "tensor", _)),  # [L, D, H, E]
    (r"text/layers/attn/[qkv]/bias", (_, "tensor", _)),  # [L, H, E]
    (r"text/layers/attn/o/kernel", (_, "tensor", _, "fsdp")),  # [L, H, E, D]
    (r"text/layers/mlp/(gate|up)/kernel", (_, "fsdp", "tensor")),  # [L, D, F]
    (r"text/layers/mlp/down/kernel", (_, "tensor", "fsdp")),  # [L, F, D]
    (r"text/layers/(input|post)_norm/scale", (_, _)),  # [L, D]
    (r"text/norm/scale", (_,)),  # [D]
    (r"vision/patch_embed/kernel", (_, "fsdp")),  # [1176, D]
    (r"vision/blocks/norm[12]/scale", (_, _)),  # [L, D]
    (r"vision/blocks/attn/qkv/kernel", (_, "fsdp", _, "tensor", _)),  # [L, D, 3, H, E]
    (r"vision/blocks/attn/qkv/bias", (_, _, "tensor", _)),  # [L, 3, H, E]
    (r"vision/blocks/attn/proj/kernel", (_, "tensor", _, "fsdp")),  # [L, H, E, D]
    (r"vision/blocks/attn/proj/bias", (_, _)),  # [L, D]
    (r"vision/blocks/mlp/(gate|up)/kernel", (_, "fsdp", "tensor")),  # [L, D, F]
    (r"vision/blocks/mlp/(gate|up)/bias", (_, "tensor")),  # [L, F]
    (r"vision/blocks/mlp/down/kernel", (_, "tensor", "fsdp")),  # [L, F, D]
    (r"vision/blocks/mlp/down/bias", (_, _)),  # [L, D]
    (r"vision/merger/norm/scale", (_,)),  # [D]
    (r"vision/merger/fc1/kernel", ("fsdp", "tensor")),  # [4 D, 4 D]
    (r"vision/merger/fc1/bias", ("tensor",)),  # [4 D]
    (r"vision/merger/fc2/kernel", ("tensor", "fsdp")),  # [4 D, out]
    (r"vision/merger/fc2/bias", (_,)),  # [out]
)

# Adapters: the inputs (A) or the outputs (B) lie as those of their weight, the rank is whole.
ADAPTERS: tuple[tuple[str, Axes], ...] = (
    (r"text/layers/attn/[qkv]/lora_a", (_, "fsdp", _)),  # [L, D, rank]
    (r"text/layers/attn/[qkv]/lora_b", (_, _, "tensor", _)),  # [L, rank, H, E]
    (r"text/layers/attn/o/lora_a", (_, "tensor", _, _)),  # [L, H, E, rank]
    (r"vision/blocks/attn/qkv/lora_a", (_, "fsdp", _)),  # [L, D, rank]
    (r"vision/blocks/attn/qkv/lora_b", (_, _, _, "tensor", _)),  # [L, rank, 3, H, E]
    (r"vision/blocks/attn/proj/lora_a", (_, "tensor", _, _)),  # [L, H, E, rank]
    (r".*/attn/(o|proj)/lora_b", (_, _, "fsdp")),  # [L, rank, D]
    (r".*/mlp/(gate|up)/lora_a", (_, "fsdp", _)),  # [L, D, rank]
    (r".*/mlp/(gate|up)/lora_b", (_, _, "tensor")),  # [L, rank, F]
    (r".*/mlp/down/lora_a", (_, "tensor", _)),  # [L, F, rank]
    (r".*/mlp/down/lora_b", (_, _, "fsdp")),  # [L, rank, D]
    (r"vision/merger/fc1/lora_a", ("fsdp", _)),  # [4 D, rank]
    (r"vision/merger/fc1/lora_b", (_, "tensor")),  # [rank, 4 D]
    (r"vision/merger/fc2/lora_a", ("tensor", _)),  # [4 D, rank]
    (r"vision/merger/fc2/lora_b", (_, "fsdp")),  # [rank, out]
)

# Scales of weights in 8 bits lie as the outputs, whole over fsdp: a sum over inputs needs them all.
SCALES: tuple[tuple[str, Axes], ...] = (
    (r"text/layers/attn/[qkv]/kernel_scale", (_, "tensor", _)),  # [L, H, E]
    (r"text/layers/mlp/(gate|up)/kernel_scale", (_, "tensor")),  # [L, F]
    (r"text/layers/(attn/o|mlp/down)/kernel_scale", (_, _)),  # [L, D]
)
ROWS = TABLE + ADAPTERS + SCALES


# --- mesh ------------------------------------------------------------------------------------


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp``, ``tensor`` over all devices; one size may be -1.

    ``tensor`` gets the closest devices (of one host where it fits) and ``data`` those farthest
    apart, so that only the sum of gradients crosses slices.

    Args:
        data: replicas of the parameters.
        fsdp: parts that parameters and optimizer state are divided into.
        tensor: parts that heads, mlp and vocabulary are divided into.
        devices: default ``jax.devices()``; may be those of a topology to compile for.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    found = list(np.ravel(np.asarray(jax.devices() if devices is None else devices, object)))
    grid = _mesh_grid(_mesh_shape((data, fsdp, tensor), len(found)), found)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mesh_grid(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Devices in an order in which neighbours on the last axis are the closest."""
    devices = sorted(devices, key=lambda d: (_slice_of(d), d.process_index, d.id))
    slices = sorted({_slice_of(d) for d in devices})
    if devices[0].platform != "tpu" or shape[0] % len(slices):
        return np.array(devices, object).reshape(shape)
    part = (shape[0] // len(slices), *shape[1:])
    grids = [_follow_torus([d for d in devices if _slice_of(d) == s], part) for s in slices]
    return np.concatenate(grids, axis=0)


def _mesh_shape(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    told = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {told}: sizes must be positive, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    shape = tuple(count // known if size == -1 else size for size in sizes)
    if math.prod(shape) != count:
        raise ValueError(
            f"mesh {told} does not fit {count} devices: the product must be {count}; "
            "set one of them to -1 to take what is left"
        )
    return shape


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def _follow_torus(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (ValueError, NotImplementedError, AssertionError):  # a shape that it does not know
        return np.array(devices, object).reshape(shape)


# --- shardings -------------------------------------------------------------------------------


def param_specs(
    abstract_params: Mapping[str, Any], mesh: Mesh, layout: str = "train"
) -> dict[str, NamedSharding]:
    """Parameter path -> sharding, by the one row of `ROWS` that matches.

    Args:
        abstract_params: path -> anything with ``shape``.
        layout: "train" (fsdp and tensor) or "sample" (tensor only). Paths of single layers, as
            `qwen2_5_vl.for_sampling` gives them, lie as their stack does.

    Raises:
        ValueError: a path that no row or more than one row matches, or an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    used = {axis: n for axis, n in mesh.shape.items() if n > 1}
    if layout == "sample":
        used.pop("fsdp", None)
    specs = {}
    for path, leaf in abstract_params.items():
        stacked = re.sub(r"^text/layers/\d+/", "text/layers/", path)
        rows = [axes for pattern, axes in ROWS if re.fullmatch(pattern, stacked)]
        if len(rows) != 1:
            raise ValueError(
                f"{path}: {len(rows)} rows of the table in sharding.py match it, one is needed"
            )
        dims = zip(rows[0][stacked != path :], leaf.shape, strict=True)
        kept = [axis if axis in used and size % used[axis] == 0 else None for axis, size in dims]
        specs[path] = NamedSharding(mesh, PartitionSpec(*kept))
    return specs


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis (rows) over ``data`` x ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def num_data_shards(mesh: Mesh) -> int:
    """How many parts the rows are divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def process_shards(mesh: Mesh, process_index: int | None = None) -> list[int]:
    """The data shards that this process holds, ascending: it passes their rows to `to_global`.

    Two processes hold the same shard where ``tensor`` spans both; both then pass the same rows.
    """
    index = jax.process_index() if process_index is None else process_index
    rows = mesh.devices.reshape(num_data_shards(mesh), -1)
    return [i for i, row in enumerate(rows) if any(d.process_index == index for d in row)]


def like_params(
    opt_state_shapes: Any, param_shardings: Mapping[str, NamedSharding], mesh: Mesh
) -> Any:
    """Shardings of an optimizer state: each leaf that mirrors a parameter lies as it does, along
    the dimensions that the mesh divides (those of a moment's scales are shorter).

    Args:
        opt_state_shapes: of ``jax.eval_shape(optimizer.init, params)``; a leaf mirrors the
            parameter whose path is a key on the way to it, as optax builds it.
        param_shardings: of `param_specs`.
        mesh: the same mesh; everything else (counts, factored statistics) is replicated on it.
    """

    def sharding_of(keys: tuple, leaf: Any) -> NamedSharding:
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        found = [param_shardings[name] for name in names if name in param_shardings]
        if len(found) == 1 and len(found[0].spec) == len(leaf.shape):
            dims = zip(found[0].spec, leaf.shape, strict=True)
            kept = [a if a and size % mesh.shape[a] == 0 else None for a, size in dims]
            return NamedSharding(mesh, PartitionSpec(*kept))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, opt_state_shapes)


def on_host(shardings: Any) -> Any:
    """The same places, in the memory of the devices' hosts."""
    return jax.tree.map(lambda one: one.with_memory_kind(HOST), shardings)


# --- host arrays and global arrays -----------------------------------------------------------


def to_global(tree: Any, mesh: Mesh) -> Any:
    """Host arrays -> global arrays whose leading axis (rows) lies over ``data`` x ``fsdp``.

    Args:
        tree: arrays holding the rows of this process's shards (`process_shards`), in order.

    Raises:
        ValueError: a leading axis that this process's shards do not divide.
    """
    sharding = batch_sharding(mesh)
    place = {shard: i for i, shard in enumerate(process_shards(mesh))}

    def put(leaf: Array) -> jax.Array:
        leaf = np.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] % len(place):
            raise ValueError(
                f"an array of shape {leaf.shape} cannot be divided into the {len(place)} data "
                "shards of this process: its leading axis must be a multiple of them"
            )
        each = leaf.shape[0] // len(place)
        shape = (each * num_data_shards(mesh), *leaf.shape[1:])

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            start = each * place[(index[0].start or 0) // max(each, 1)]
            return leaf[start : start + each]

        # jax's type lets the index be None, which it is for devices of other processes only.
        return jax.make_array_from_callback(shape, sharding, rows)  # pyright: ignore[reportArgumentType]

    return jax.tree.map(put, tree)
