"""The jitted steps: encode images, SFT update, log-probs, the parts of a GRPO update.

Every ``make_*`` factory is pure: it takes configurations and a mesh (or None for one device) and
returns a ``jax.jit`` function that runs on arrays and can be lowered from shapes alone. Arguments
are POSITIONAL, all of them, None where optional: jit refuses keywords beside explicit shardings.
The mesh is entered while tracing, so no ``jax.set_mesh`` is needed around a call.

State is donated: after ``state, metrics = step(state, ...)`` the arrays of the old state are gone.
Whoever keeps parameters across a step (a reference model) needs a copy of its own:
``ref = jax.tree.map(jnp.copy, state.params)`` once, ``merge_params(state, ref)`` at each use.

Micro-batches: the leading axis of every array is [shard, micro-batch, rest], and a micro-batch is
one row of each shard. Losses are weighted by weights of the whole update batch (losses.py), so
gradients are plain sums, held in float32, and the result does not depend on how many micro-batches
there are. SFT loops over those that hold anything; those of a GRPO update differ in their shapes
(lanes.py), and each is a call of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from srpo_jax.learn import grpo, losses, optim
from srpo_jax.learn.grpo import GrpoConfig, Prepared
from srpo_jax.learn.head import (
    HeadConfig,
    TokenLoss,
    model_token_logps,
    model_token_loss,
)
from srpo_jax.learn.lane_tokens import lane_states, own_part, part_of, to_owners
from srpo_jax.learn.micro_batches import (
    add_gradient,
    jit_on_mesh,
    join_micro_batches,
    micro_batch,
    micro_count,
    param_layout,
    replicated,
    rows_layout,
    state_layout,
    sum_gradients,
    used_micro_batches,
    without_vision,
    zero_gradient,
)
from srpo_jax.learn.optim import Optimizer
from srpo_jax.learn.state import FREEZE_VISION, abstract_state
from srpo_jax.model import sharding
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.layers import shard
from srpo_jax.model.qwen2_5_vl import bind
from srpo_jax.structs import (
    Batch,
    Experience,
    Lanes,
    Params,
    Rollout,
    TrainState,
    VisionInputs,
)


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """What an SFT update does."""

    micro_batches: int = 1
    logit_chunk: int = 128  # positions whose logits exist at a time
    packed: bool = True  # sequences may hold several conversations

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
        count = micro_count(vision.patches.shape[0], shards)

        def body(_, i):
            return None, model.encode_images(micro_batch(vision, i, shards, count))

        _, features_A = jax.lax.scan(body, None, jnp.arange(count))
        return join_micro_batches(features_A, shards)

    params = param_layout(model_cfg, mesh)
    return jit_on_mesh(encode_step, mesh, (params, rows_layout(mesh)), rows_layout(mesh))


def make_sft_step(
    model_cfg: ModelConfig,
    cfg: SftConfig,
    optimizer: Optimizer,
    *,
    freeze: tuple[str, ...] = FREEZE_VISION,
    mesh: Mesh | None = None,
) -> jax.stages.Wrapped:
    """-> ``sft_step(state, batch, features) -> (state, metrics)``; the state is donated.

    ``batch`` are conversations, packed or not; micro-batches of fillers at its end cost nothing.
    ``features`` None: images (if any) are encoded inside the loss, which is required when the tower
    trains. Metrics: ``loss`` (mean over loss tokens), ``tokens`` (loss tokens), ``conversations``
    and those of ``optim.apply_gradients``.
    """
    shards = 1 if mesh is None else sharding.num_data_shards(mesh)
    layout = state_layout(model_cfg, optimizer, freeze, mesh)
    cross_entropy = TokenLoss(
        lambda logp, _, weights: (losses.sft_loss(logp, weights), ()),
        lambda aux: aux,
        HeadConfig(cfg.logit_chunk),
    )

    def sft_step(state: TrainState, batch: Batch, features_MND: jax.Array | None):
        _check_features(state.params, features_MND)
        weights_BT = losses.sft_weights(batch.loss_mask, batch.valid)
        data = (without_vision(batch, features_MND), features_MND, weights_BT)

        def loss_fn(params, i):
            rows, features, weights = micro_batch(data, i, shards, cfg.micro_batches)
            model = bind(model_cfg, {**state.frozen, **params})
            if features is None and rows.vision is not None:
                features = model.encode_images(rows.vision)
            h_BTD = model.hidden(
                rows.tokens,
                rows.mrope,
                rows.segment_ids,
                rows.vision_src,
                features,
                single=not cfg.packed,
            )
            targets_BT = jnp.roll(rows.tokens, -1, axis=1)  # the last one has weight 0
            # The head reads loss positions only: they come first, and the rest is left out.
            order_BT, count = losses.weighted_first(weights)
            targets_BT, weights = (
                jnp.take_along_axis(x, order_BT, axis=1) for x in (targets_BT, weights)
            )
            h_BTD = jnp.take_along_axis(h_BTD, order_BT[..., None], axis=1)
            return model_token_loss(model, h_BTD, targets_BT, weights, cross_entropy, count)[0]

        count = used_micro_batches(batch.valid, shards, cfg.micro_batches)
        grads, loss = sum_gradients(loss_fn, state.params, count, layout)
        state, metrics = optim.apply_gradients(state, grads, optimizer)
        metrics["loss"] = loss
        metrics["tokens"] = jnp.sum(weights_BT != 0, dtype=jnp.float32)
        packed_B = batch.segment_ids.max(axis=1)  # 1, 2, ... number those of a sequence
        metrics["conversations"] = jnp.sum(packed_B * batch.valid, dtype=jnp.float32)
        return state, metrics

    return jit_on_mesh(
        sft_step,
        mesh,
        (layout, rows_layout(mesh), rows_layout(mesh)),
        (layout, replicated(mesh)),
        donate=0,
    )


def make_logp_step(
    model_cfg: ModelConfig, cfg: GrpoConfig, *, mesh: Mesh | None = None
) -> jax.stages.Wrapped:
    """-> ``logp_step(logp_PGR, params, batch, rollout, features, lanes) -> logp_PGR``, float32.

    For the reference and for old log-probs, with the update's temperature and forbidden tokens:
    writes those of the tokens in ``lanes`` into ``logp_PGR``, which is donated.
    """

    def logp_step(
        logp_PGR: jax.Array,
        params: Params,
        batch: Batch,
        rollout: Rollout,
        features_MND: jax.Array | None,
        lanes: Lanes,
    ) -> jax.Array:  # six: a buffer, and what a micro-batch is made of
        data = (without_vision(batch, features_MND), features_MND, rollout)
        own, model = own_part(data, lanes, cfg), bind(model_cfg, params)
        h_MYD, targets_MY, picked = lane_states(model, own, lanes, lanes.sample >= 0)
        logp_MY, _ = model_token_logps(model, h_MYD, targets_MY, cfg.head, picked.count)
        G, R = logp_PGR.shape[1:]
        buffer = logp_PGR.reshape(len(lanes.row), cfg.micro_batches, -1)
        at_MY = jnp.where(picked.wanted_MY, picked.index(R), jnp.iinfo(jnp.int32).max)
        if lanes.pick is not None:
            per_row = len(logp_PGR) // (len(lanes.row) * cfg.micro_batches)
            at_MY, logp_MY = to_owners(lanes.pick, picked, logp_MY, (G, R), per_row)
        write = lambda x, row, at, new: x.at[row, at].set(new, mode="drop")  # noqa: E731
        buffer = jax.vmap(write)(buffer, lanes.row, at_MY, logp_MY)
        return shard(buffer.reshape(-1, G, R), "batch", None, None)

    params, data = param_layout(model_cfg, mesh), rows_layout(mesh)
    return jit_on_mesh(logp_step, mesh, (data, params, data, data, data, data), data, donate=0)


@flax.struct.dataclass
class Total:
    """What the micro-batches of an update add up to."""

    grads: Any  # Params: float32, laid out as the parameters
    aux: Any  # grpo.Aux


class GrpoSteps(NamedTuple):
    """The jitted parts of a GRPO update, as `make_grpo_steps` describes them."""

    prepare: Any
    accumulate: Any
    apply: Any


def make_grpo_steps(
    model_cfg: ModelConfig,
    cfg: GrpoConfig,
    optimizer: Optimizer,
    *,
    freeze: tuple[str, ...] = FREEZE_VISION,
    mesh: Mesh | None = None,
) -> GrpoSteps:
    """The parts of update number ``update`` (int32, from 0) of a rollout, in the order of calls.

        prepare(experience, update) -> (ready, total): weights and metrics; nothing added up yet
        accumulate(total, state, experience, ready, lanes) -> total: and one micro-batch
        apply(state, total, ready) -> (state, metrics)

    ``accumulate`` donates its total, ``apply`` its state. Micro-batches without a sample that has a
    weight may be left out. Raise ValueError, when traced, for an experience that contradicts the
    configuration.
    """
    layout = state_layout(model_cfg, optimizer, freeze, mesh)
    trained = abstract_state(model_cfg, optimizer, freeze=freeze).params
    loss = TokenLoss(functools.partial(grpo.policy_loss, cfg), grpo.combine_aux, cfg.head)

    def prepare(experience: Experience, update: jax.Array) -> tuple[Prepared, Total]:
        _check_experience(cfg, experience)
        ready = grpo.prepare(cfg, experience, update)
        return ready, Total(zero_gradient(trained, layout), grpo.no_aux(cfg))

    def accumulate(
        total: Total, state: TrainState, experience: Experience, ready: Prepared, lanes: Lanes
    ) -> Total:
        _check_features(state.params, experience.features)
        part = part_of(cfg, experience, ready, lanes)

        def loss_fn(params: Params):
            model = bind(model_cfg, {**state.frozen, **params})
            h_MYD, targets_MY, picked = part.states(model, part.view)
            tokens = part.tokens(model, picked)
            if cfg.by_token:
                return model_token_loss(model, h_MYD, targets_MY, tokens, loss, picked.count)
            found = model_token_logps(model, h_MYD, targets_MY, cfg.head, picked.count)
            return loss.of_tokens(*found, tokens)

        (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        joined = grpo.combine_aux(jax.tree.map(lambda *x: jnp.stack(x), total.aux, aux))
        return Total(add_gradient(total.grads, grads, layout), joined)

    def apply(state: TrainState, total: Total, ready: Prepared):
        state, metrics = optim.apply_gradients(state, total.grads, optimizer)
        metrics["trained_tokens"] = ready.tokens
        return state, metrics | grpo.update_metrics(total.aux, ready.tokens) | ready.metrics

    rows, one = rows_layout(mesh), replicated(mesh)
    ready = Prepared(*(rows,) * 5, tokens=one, metrics=one)
    total = Total(None if layout is None else layout.params, one)
    return GrpoSteps(
        jit_on_mesh(prepare, mesh, (rows, one), (ready, total)),
        jit_on_mesh(accumulate, mesh, (total, layout, rows, ready, rows), total, donate=0),
        jit_on_mesh(apply, mesh, (layout, total, ready), (layout, one), donate=0),
    )


def grpo_update(
    parts: GrpoSteps,
    state: TrainState,
    experience: Experience,
    packed: Iterable[Lanes],
    update: int = 0,
    *,
    around: Callable[[Lanes], AbstractContextManager] = lambda lanes: nullcontext(),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from its micro-batches -> (state, metrics); each of them runs in ``around``."""
    ready, total = parts.prepare(experience, np.int32(update))
    for lanes in packed:
        with around(lanes):
            total = parts.accumulate(total, state, experience, ready, lanes)
    return parts.apply(state, total, ready)


def _check_features(trained: Params, features_MND: jax.Array | None) -> None:
    if features_MND is not None and any(path.startswith("vision/") for path in trained):
        raise ValueError(
            "precomputed features would cut the gradient of the vision parameters that train: "
            "pass features=None, or freeze 'vision/'"
        )


def _check_experience(cfg: GrpoConfig, experience: Experience) -> None:
    if cfg.needs_reference and experience.ref_logp is None:
        raise ValueError(f"kl_coef={cfg.kl_coef} needs ref_logp; compute it with logp_step")
    held = (experience.old_logp, experience.update)
    if cfg.updates > 1 and any(x is None for x in held[: 1 + (cfg.updates_per_rollout > 1)]):
        raise ValueError(
            f"{cfg.updates} updates of a rollout need old_logp, from logp_step before the first "
            "update, and the update that takes each prompt"
        )
