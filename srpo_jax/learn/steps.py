"""The jitted steps: encode images, SFT update, log-probs, GRPO update.

Every ``make_*`` factory is pure: it takes configurations and a mesh (or None for one device) and
returns a ``jax.jit`` function that runs on arrays and can be lowered from shapes alone. Arguments
are POSITIONAL, all of them, None where optional: jit refuses keywords beside explicit shardings.
The mesh is entered while tracing, so no ``jax.set_mesh`` is needed around a call.

State is donated: after ``state, metrics = step(state, ...)`` the arrays of the old state are gone.
Whoever keeps parameters across a step (a reference model) needs a copy of its own:
``ref = jax.tree.map(jnp.copy, state.params)`` once, ``merge_params(state, ref)`` at each use.

Micro-batches: the leading axis of every array is [shard, micro-batch, rest]. A scan takes
micro-batch i of all shards together; losses are weighted by weights of the whole update batch
(losses.py), so gradients are plain sums, held in float32, and the result does not depend on how
many micro-batches there are.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from srpo_jax.learn import grpo, losses, optim
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.optim import Optimizer
from srpo_jax.learn.state import FREEZE_VISION, abstract_state, state_shardings
from srpo_jax.model import sharding
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.layers import BATCH_AXES, shard
from srpo_jax.model.qwen2_5_vl import Qwen2_5_VL, abstract_params, bind
from srpo_jax.structs import Batch, Experience, Params, Rollout, TrainState, VisionInputs


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """What an SFT update does."""

    micro_batches: int = 1
    logit_chunk: int = 128  # positions whose logits exist at a time

    def __post_init__(self):
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches}: must be at least 1")


# --- steps -----------------------------------------------------------------------------------


def make_encode_step(model_cfg: ModelConfig, *, mesh: Mesh | None = None) -> jax.stages.Wrapped:
    """-> ``encode_step(params, vision) -> features_MND``: the vision tower, once per prompt.

    Runs one row of each data shard at a time, so that memory does not grow with the batch.
    ``features`` are [M, N/4, D] in the compute dtype, row by row like ``vision``.
    """
    shards = 1 if mesh is None else sharding.num_data_shards(mesh)

    def encode_step(params: Params, vision: VisionInputs) -> jax.Array:
        model = bind(model_cfg, params)
        count = _micro_count(vision.patches.shape[0], shards)

        def body(_, i):
            return None, model.encode_images(micro_batch(vision, i, shards, count))

        _, features_A = jax.lax.scan(body, None, jnp.arange(count))
        return _join_micro_batches(features_A, shards)

    params = _param_shardings(model_cfg, mesh)
    return _jit(encode_step, mesh, (params, _batch(mesh)), _batch(mesh))


def make_sft_step(
    model_cfg: ModelConfig,
    cfg: SftConfig,
    optimizer: Optimizer,
    *,
    freeze: tuple[str, ...] = FREEZE_VISION,
    mesh: Mesh | None = None,
) -> jax.stages.Wrapped:
    """-> ``sft_step(state, batch, features) -> (state, metrics)``; the state is donated.

    ``batch`` are conversations, packed or not. ``features`` None: images (if any) are encoded
    inside the loss, which is required when the tower trains. Metrics: ``loss`` (mean over loss
    tokens), ``tokens`` (loss tokens), ``sequences`` and those of ``optim.apply_gradients``.
    """
    shards = 1 if mesh is None else sharding.num_data_shards(mesh)
    layout = _state_layout(model_cfg, optimizer, freeze, mesh)

    def sft_step(state: TrainState, batch: Batch, features_MND: jax.Array | None):
        _check_features(state.params, features_MND)
        weights_BT = losses.sft_weights(batch.loss_mask, batch.valid)
        data = (_without_vision(batch, features_MND), features_MND, weights_BT)

        def loss_fn(params, i):
            rows, features, weights = micro_batch(data, i, shards, cfg.micro_batches)
            model = bind(model_cfg, {**state.frozen, **params})
            if features is None and rows.vision is not None:
                features = model.encode_images(rows.vision)
            h_BTD = model.hidden(
                rows.tokens, rows.mrope, rows.segment_ids, rows.vision_src, features
            )
            targets_BT = jnp.roll(rows.tokens, -1, axis=1)  # the last one has weight 0
            # The head reads loss positions only: they come first, and the rest is left out.
            h_BTD, targets_BT, weights, count = losses.weighted_first(h_BTD, targets_BT, weights)
            logp_BT, _ = _token_logps(model, h_BTD, targets_BT, chunk=cfg.logit_chunk, count=count)
            loss = losses.sft_loss(logp_BT, weights)
            return loss, loss

        indices = jnp.arange(cfg.micro_batches)
        grads, loss_A = _accumulate(loss_fn, state.params, indices, layout)
        state, metrics = optim.apply_gradients(state, grads, optimizer)
        metrics["loss"] = loss_A.sum()
        metrics["tokens"] = jnp.sum(weights_BT != 0, dtype=jnp.float32)
        metrics["sequences"] = jnp.sum(batch.valid, dtype=jnp.float32)
        return state, metrics

    return _jit(
        sft_step, mesh, (layout, _batch(mesh), _batch(mesh)), (layout, _replicated(mesh)), donate=0
    )


def make_logp_step(
    model_cfg: ModelConfig, cfg: GrpoConfig, *, mesh: Mesh | None = None
) -> jax.stages.Wrapped:
    """-> ``logp_step(params, batch, rollout, features) -> (logp_PGR, entropy_PGR)``, float32.

    For the reference and for old log-probs: same micro-batches, temperature and forbidden tokens
    as the update. 0 outside of the completion mask.
    """
    shards = 1 if mesh is None else sharding.num_data_shards(mesh)

    def logp_step(
        params: Params, batch: Batch, rollout: Rollout, features_MND: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        model = bind(model_cfg, params)
        data = (_without_vision(batch, features_MND), rollout, features_MND)

        def body(_, i):
            rows, samples, features = micro_batch(data, i, shards, cfg.micro_batches)
            values = _completion_logps(model, cfg, rows, samples, features)
            return None, [jnp.where(samples.completion_mask, x, 0.0) for x in values]

        _, (logp_A, entropy_A) = jax.lax.scan(body, None, jnp.arange(cfg.micro_batches))
        return _join_micro_batches(logp_A, shards), _join_micro_batches(entropy_A, shards)

    params = _param_shardings(model_cfg, mesh)
    data = _batch(mesh)
    return _jit(logp_step, mesh, (params, data, data, data), (data, data))


def make_grpo_step(
    model_cfg: ModelConfig,
    cfg: GrpoConfig,
    optimizer: Optimizer,
    *,
    freeze: tuple[str, ...] = FREEZE_VISION,
    mesh: Mesh | None = None,
) -> jax.stages.Wrapped:
    """-> ``grpo_step(state, experience, micro_indices) -> (state, metrics)``; the state is donated.

    ``micro_indices`` is int32 from `micro_indices(cfg, k)`, or None: all micro-batches. Normalisers
    and metrics are those of the chosen ones. Raises ValueError, when traced, for an experience that
    contradicts the configuration.
    """
    shards = 1 if mesh is None else sharding.num_data_shards(mesh)
    layout = _state_layout(model_cfg, optimizer, freeze, mesh)

    def grpo_step(state: TrainState, experience: Experience, micro_indices_A: jax.Array | None):
        _check_features(state.params, experience.features)
        _check_experience(cfg, experience, micro_indices_A)
        valid_P = experience.batch.valid
        indices_A = jnp.arange(cfg.micro_batches) if micro_indices_A is None else micro_indices_A
        chosen_P = _in_micro_batches(indices_A, valid_P.shape[0], shards, cfg.micro_batches)
        include_P = valid_P & chosen_P
        ready = grpo.prepare(cfg, experience, include_P)
        batch = _without_vision(experience.batch, experience.features)
        data = (dataclasses.replace(experience, batch=batch), ready.adv_PG, ready.weights_PGR)

        def loss_fn(params, i):
            rows, adv_PG, weights_PGR = micro_batch(data, i, shards, cfg.micro_batches)
            model = bind(model_cfg, {**state.frozen, **params})
            logp, entropy = _completion_logps(model, cfg, rows.batch, rows.rollout, rows.features)
            return grpo.policy_loss(cfg, logp, entropy, rows, adv_PG, weights_PGR)

        grads, aux_A = _accumulate(loss_fn, state.params, indices_A, layout)
        state, metrics = optim.apply_gradients(state, grads, optimizer)
        metrics |= grpo.update_metrics(aux_A, ready.tokens)
        metrics["trained_tokens"] = ready.tokens
        metrics |= grpo.rollout_metrics(
            ready.terms, experience.verdict, experience.rollout, include_P
        )
        return state, metrics

    shardings = (layout, _batch(mesh), _replicated(mesh))
    return _jit(grpo_step, mesh, shardings, (layout, _replicated(mesh)), donate=0)


def micro_indices(cfg: GrpoConfig, update: int) -> np.ndarray:
    """The micro-batches of update ``update`` of a rollout, int32 [update_size]."""
    if not 0 <= update < cfg.updates_per_rollout:
        raise ValueError(f"update {update} of a rollout with {cfg.updates_per_rollout} updates")
    start = update // cfg.sharing * cfg.update_size
    return np.arange(start, start + cfg.update_size, dtype=np.int32)


def _completion_logps(
    model: Qwen2_5_VL, cfg: GrpoConfig, batch: Batch, rollout: Rollout, features
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [P, G, R] of the completions of one micro-batch."""
    if features is None and batch.vision is not None:
        features = model.encode_images(batch.vision)
    h_PGRD = model.completion_hidden(batch, features, rollout.completions, rollout.completion_mask)
    longest = rollout.completion_mask.sum(-1, dtype=jnp.int32).max()
    logp_BR, entropy_BR = _token_logps(
        model,
        grpo.merge_group(h_PGRD),
        grpo.merge_group(rollout.completions),
        count=longest,
        temperature=cfg.temperature,
        forbidden_ids=cfg.forbidden_ids,
        chunk=cfg.logit_chunk,
        entropy_grad=bool(cfg.entropy_coef),
    )
    shape = rollout.completions.shape
    return logp_BR.reshape(shape), entropy_BR.reshape(shape)


def _token_logps(
    model: Qwen2_5_VL, h_BTD: jax.Array, targets_BT: jax.Array, *, count: jax.Array, **kwargs
) -> tuple[jax.Array, jax.Array]:
    """``losses.token_logps`` under the model's head, each data shard by itself.

    Left to the compiler, the gradient of the head would be summed over all devices once per chunk.
    Here the head is collected over data and fsdp once, each shard adds up its own chunks, and one
    sum over devices follows. The vocabulary stays divided over ``tensor``.
    """
    head_DV = shard(model.head_kernel(), None, "tensor")
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of size 1 divide nothing, and the partitioner knows no manual ones beside others.
    axes = tuple(axis for axis in BATCH_AXES if not mesh.empty and mesh.shape[axis] > 1)
    if not axes:
        return losses.token_logps(h_BTD, targets_BT, head_DV, count=count, **kwargs)

    # ``count`` is the same on all devices: with a divided vocabulary each chunk is a collective.
    def local(h, targets, head, count):
        # "varying" from here on: otherwise the sum over devices moves into the scan again.
        head = jax.lax.pcast(head, axes, to="varying")
        return losses.token_logps(h, targets, head, count=count, **kwargs)

    batch = PartitionSpec(axes)
    return jax.shard_map(
        local,
        in_specs=(batch, batch, PartitionSpec(), PartitionSpec()),
        out_specs=(batch, batch),
        axis_names=set(axes),
    )(h_BTD, targets_BT, head_DV, count)


def _check_features(trained: Params, features_MND: jax.Array | None) -> None:
    if features_MND is not None and any(path.startswith("vision/") for path in trained):
        raise ValueError(
            "precomputed features would cut the gradient of the vision parameters that train: "
            "pass features=None, or freeze 'vision/'"
        )


def _check_experience(cfg: GrpoConfig, experience: Experience, indices_A) -> None:
    if cfg.needs_reference and experience.ref_logp is None:
        raise ValueError(f"kl_coef={cfg.kl_coef} needs ref_logp; compute it with logp_step")
    if cfg.updates_per_rollout == 1:
        return
    size = cfg.update_size
    if experience.old_logp is None or indices_A is None or indices_A.shape != (size,):
        raise ValueError(
            f"updates_per_rollout={cfg.updates_per_rollout} needs old_logp (from logp_step before "
            f"the first update) and micro_indices(cfg, k), {size} of them"
        )


# --- micro-batches ---------------------------------------------------------------------------


def micro_batch(tree: Any, i: jax.Array, shards: int, count: int) -> Any:
    """Micro-batch ``i`` of every array in ``tree``: [shards * count * n, ...] -> [shards * n, ...].

    Shard-major in and out, so that each device takes from its own part. Raises ValueError for a
    leading axis that does not divide.
    """

    def take(x):
        n = _micro_count(x.shape[0], shards * count)
        x = x.reshape(shards, count, n, *x.shape[1:])
        x = jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)
        x = x.reshape(shards * n, *x.shape[2:])
        return shard(x, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(take, tree)


def _micro_count(size: int, parts: int) -> int:
    if size % parts:
        raise ValueError(
            f"leading axis of {size} does not divide into {parts} (data shards x micro-batches)"
        )
    return size // parts


def _join_micro_batches(x_A: jax.Array, shards: int) -> jax.Array:
    """[count, shards * n, ...], as a scan stacks them -> [shards * count * n, ...]."""
    count, rows, *rest = x_A.shape
    x = x_A.reshape(count, shards, rows // shards, *rest).swapaxes(0, 1)
    x = x.reshape(count * rows, *rest)
    return shard(x, "batch", *(None,) * len(rest))


def _in_micro_batches(indices_A: jax.Array, size: int, shards: int, count: int) -> jax.Array:
    """[size] bool: which entries of the leading axis belong to the given micro-batches."""
    chosen = jnp.zeros(count, bool).at[indices_A].set(True)
    shape = (shards, count, _micro_count(size, shards * count))
    return jnp.broadcast_to(chosen[None, :, None], shape).reshape(size)


def _accumulate(
    loss_fn: Callable, params: Params, indices_A: jax.Array, layout: TrainState | None
) -> tuple[Params, Any]:
    """Sum of the gradients of ``loss_fn(params, i)`` in float32, and its aux values, stacked."""

    def keep_sharded(grads):
        # The gradient of a sharded parameter is reduced straight into the parameter's layout.
        return grads if layout is None else jax.lax.with_sharding_constraint(grads, layout.params)

    def body(total, i):
        (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, i)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, keep_sharded(grads))
        return total, aux

    zeros = keep_sharded({path: jnp.zeros(x.shape, jnp.float32) for path, x in params.items()})
    return jax.lax.scan(body, zeros, indices_A)


def _without_vision(batch: Batch, features_MND: jax.Array | None) -> Batch:
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


def _jit(
    fn: Callable[..., Any], mesh: Mesh | None, inputs: Any, outputs: Any, donate: int | None = None
) -> jax.stages.Wrapped:
    """``jax.jit`` with explicit shardings when there is a mesh."""
    donated = () if donate is None else (donate,)
    if mesh is None:
        return jax.jit(fn, donate_argnums=donated)
    return jax.jit(
        _on_mesh(fn, mesh), in_shardings=inputs, out_shardings=outputs, donate_argnums=donated
    )


def _param_shardings(model_cfg: ModelConfig, mesh: Mesh | None) -> dict | None:
    if mesh is None:
        return None
    return sharding.param_specs(abstract_params(model_cfg), mesh, "train")


def _state_layout(model_cfg, optimizer, freeze, mesh: Mesh | None) -> TrainState | None:
    if mesh is None:
        return None
    return state_shardings(abstract_state(model_cfg, optimizer, freeze=freeze), mesh)


def _batch(mesh: Mesh | None) -> NamedSharding | None:
    return None if mesh is None else sharding.batch_sharding(mesh)


def _replicated(mesh: Mesh | None) -> NamedSharding | None:
    return None if mesh is None else sharding.replicated(mesh)
