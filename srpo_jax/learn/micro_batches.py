"""What the jitted steps share: micro-batches, summed gradients, the mesh."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from srpo_jax.learn.optim import Optimizer
from srpo_jax.learn.state import abstract_state, state_shardings
from srpo_jax.model import sharding
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.layers import shard
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.structs import Batch, Params, TrainState

# --- micro-batches ---------------------------------------------------------------------------


def micro_batch(tree: Any, i: jax.Array, shards: int, count: int) -> Any:
    """Micro-batch ``i`` of every array in ``tree``: [shards * count * n, ...] -> [shards * n, ...].

    Shard-major in and out, so that each device takes from its own part. Raises ValueError for a
    leading axis that does not divide.
    """

    def take(x):
        n = micro_count(x.shape[0], shards * count)
        x = x.reshape(shards, count, n, *x.shape[1:])
        x = jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)
        x = x.reshape(shards * n, *x.shape[2:])
        return shard(x, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(take, tree)


def micro_count(size: int, parts: int) -> int:
    """``size / parts``; ValueError where that is no whole number."""
    if size % parts:
        raise ValueError(
            f"leading axis of {size} does not divide into {parts} (data shards x micro-batches)"
        )
    return size // parts


def join_micro_batches(x_A: jax.Array, shards: int) -> jax.Array:
    """[count, shards * n, ...], as a scan stacks them -> [shards * count * n, ...]."""
    count, rows, *rest = x_A.shape
    x = x_A.reshape(count, shards, rows // shards, *rest).swapaxes(0, 1)
    x = x.reshape(count * rows, *rest)
    return shard(x, "batch", *(None,) * len(rest))


def rows_of(tree: Any, row_M: jax.Array, count: int) -> Any:
    """Of every array row ``row_M[m]`` of data shard m: [M * count * n, ...] -> [M * n, ...]."""

    def take(x):
        n = micro_count(x.shape[0], len(row_M) * count)
        x = x.reshape(len(row_M), count, n, *x.shape[1:])
        pick = functools.partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False)
        x = jax.vmap(pick)(x, row_M).reshape(-1, *x.shape[3:])
        return shard(x, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(take, tree)


def dealt_out(
    batch: Batch, features_MND: jax.Array | None, rest: Any, pick_MQ: jax.Array
) -> tuple[Batch, jax.Array | None, Any]:
    """A micro-batch with the prompts that ``Lanes.pick`` names: [M * Q, ...] of arrays [P, ...].

    Every device collects what stands in all of its rows, and takes its own part. Features become
    [1, M * N/4, D], those of all rows, where ``vision_src`` then counts.
    """

    def whole(x):
        return shard(x, *(None,) * x.ndim)

    def take(x):
        x = jnp.take(whole(x), pick_MQ.reshape(-1), axis=0, mode="clip")
        return shard(x, "batch", *(None,) * (x.ndim - 1))

    if features_MND is not None:
        merged, per_row = features_MND.shape[1], len(batch.valid) // len(pick_MQ)
        first_P1 = jnp.arange(len(batch.valid))[:, None] // per_row * merged
        source_PS = jnp.where(batch.vision_src >= 0, batch.vision_src + first_P1, -1)
        batch = dataclasses.replace(batch, vision_src=source_PS)
        features_MND = whole(features_MND.reshape(1, -1, features_MND.shape[2]))
    batch, rest = jax.tree.map(take, (batch, rest))
    return batch, features_MND, rest


def used_micro_batches(valid_B: jax.Array, shards: int, count: int) -> jax.Array:
    """How many there are up to the last one in which any shard has a sequence."""
    used_A = valid_B.reshape(shards, count, -1).any((0, 2))
    return jnp.max(jnp.where(used_A, jnp.arange(1, count + 1), 0))


def sum_gradients(
    loss_fn: Callable, params: Params, count: jax.Array, layout: TrainState | None
) -> tuple[Params, jax.Array]:
    """Sums over i < ``count`` of the gradients of ``loss_fn(params, i)``, in float32, and of it."""

    def body(i, total):
        loss, grads = jax.value_and_grad(loss_fn)(params, i)
        return add_gradient(total[0], grads, layout), total[1] + loss

    return jax.lax.fori_loop(0, count, body, (zero_gradient(params, layout), jnp.float32(0)))


def zero_gradient(params: Any, layout: TrainState | None) -> Params:
    """No gradient yet, float32."""
    nothing = {path: jnp.zeros(x.shape, jnp.float32) for path, x in params.items()}
    return _keep_sharded(nothing, layout)


def add_gradient(total: Params, grads: Params, layout: TrainState | None) -> Params:
    """The gradient of a sharded parameter is reduced straight into the parameter's layout."""
    grads = _keep_sharded(grads, layout)
    return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)


def _keep_sharded(grads: Params, layout: TrainState | None) -> Params:
    return grads if layout is None else jax.lax.with_sharding_constraint(grads, layout.params)


def without_vision(batch: Batch, features_MND: jax.Array | None) -> Batch:
    """Pixels are not needed where features are given; jit then leaves them out altogether."""
    return batch if features_MND is None else dataclasses.replace(batch, vision=None)


# --- jit -------------------------------------------------------------------------------------


def _on_mesh(fn: Callable, mesh: Mesh | None) -> Callable:
    """``fn`` traced with the mesh in force, which the model's sharding constraints look for."""

    @functools.wraps(fn)
    def traced(*args):
        context = contextlib.nullcontext()
        if mesh is not None:
            context = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
        with context:
            return fn(*args)

    return traced


def jit_on_mesh(
    fn: Callable[..., Any], mesh: Mesh | None, inputs: Any, outputs: Any, donate: int | None = None
) -> jax.stages.Wrapped:
    """``jax.jit`` with explicit shardings when there is a mesh."""
    donated = () if donate is None else (donate,)
    if mesh is None:
        return jax.jit(fn, donate_argnums=donated)
    return jax.jit(
        _on_mesh(fn, mesh), in_shardings=inputs, out_shardings=outputs, donate_argnums=donated
    )


def param_layout(model_cfg: ModelConfig, mesh: Mesh | None) -> dict | None:
    """Shardings of all parameters in the update."""
    if mesh is None:
        return None
    return sharding.param_specs(abstract_params(model_cfg), mesh, "train")


def state_layout(
    model_cfg: ModelConfig, optimizer: Optimizer, freeze: tuple[str, ...], mesh: Mesh | None
) -> TrainState | None:
    """Shardings of the train state."""
    if mesh is None:
        return None
    shapes = abstract_state(model_cfg, optimizer, freeze=freeze)
    return state_shardings(shapes, mesh, offload=optimizer.offload)


def rows_layout(mesh: Mesh | None) -> NamedSharding | None:
    """Rows over the data shards."""
    return None if mesh is None else sharding.batch_sharding(mesh)


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """The same on every device."""
    return None if mesh is None else sharding.replicated(mesh)
