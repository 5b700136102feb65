"""The train state: its shapes, its layout on a mesh, how it is made; parameters laid out anew."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from srpo_jax.learn import optim
from srpo_jax.learn.optim import Optimizer
from srpo_jax.model import sharding
from srpo_jax.model.config import Lora, ModelConfig
from srpo_jax.model.lora import adapters_of, is_adapter, is_scale, merge, scale_of
from srpo_jax.model.qwen2_5_vl import abstract_params, for_sampling, init_params
from srpo_jax.structs import Params, TrainState

FREEZE_VISION = ("vision/",)  # the tower and its merger


def abstract_state(
    model_cfg: ModelConfig, optimizer: Optimizer, *, freeze: tuple[str, ...] = FREEZE_VISION
) -> TrainState:
    """The train state as shapes and dtypes; no device work."""
    return jax.eval_shape(
        functools.partial(_new_state, optimizer=optimizer, freeze=freeze),
        abstract_params(model_cfg),
    )


def state_shardings(state: TrainState, mesh: Mesh, *, offload: bool = False) -> TrainState:
    """NamedSharding of every leaf: parameters by the table, moments like their parameters, with
    ``offload`` in the host's memory."""
    params = sharding.param_specs(state.params | state.frozen, mesh, "train")
    trained = {path: params[path] for path in state.params}
    moments = sharding.like_params(state.opt_state, trained, mesh)
    return TrainState(
        step=sharding.replicated(mesh),
        params=trained,
        frozen={path: params[path] for path in state.frozen},
        opt_state=sharding.on_host(moments) if offload else moments,
        skipped=sharding.replicated(mesh),
    )


def init_state(
    model_cfg: ModelConfig,
    optimizer: Optimizer,
    *,
    freeze: tuple[str, ...] = FREEZE_VISION,
    mesh: Mesh | None = None,
    key: jax.Array | None = None,
    params: Params | None = None,
) -> TrainState:
    """A fresh state, made directly in its shards: random from ``key``, or around ``params``.

    ``params`` (from ``hf.load_params`` with the table's shardings) are donated: the state takes
    over their memory. Raises ValueError unless exactly one of the two is given.
    """
    if (key is None) == (params is None):
        raise ValueError("init_state needs either key (random weights) or params (loaded ones)")
    out = None
    if mesh is not None:
        shapes = abstract_state(model_cfg, optimizer, freeze=freeze)
        out = state_shardings(shapes, mesh, offload=optimizer.offload)
    new_state = functools.partial(_new_state, optimizer=optimizer, freeze=freeze)
    if params is None:
        from_key = lambda key: new_state(init_params(model_cfg, key))  # noqa: E731
        return jax.jit(from_key, out_shardings=out)(key)
    return jax.jit(new_state, out_shardings=out, donate_argnums=0)(params)


def _new_state(params: Params, *, optimizer: Optimizer, freeze: tuple[str, ...]) -> TrainState:
    trained, frozen = optim.split_frozen(params, freeze)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero, params=trained, frozen=frozen, opt_state=optimizer.init(trained), skipped=zero
    )


def merge_params(state: TrainState, trained: Params | None = None) -> Params:
    """All parameters of the model; ``trained`` (a reference's copy) replaces the trained ones."""
    return {**state.frozen, **(state.params if trained is None else trained)}


# --- layouts ---------------------------------------------------------------------------------


def relayout(
    params: Params, mesh: Mesh, *, dtype: str, lora: Lora | None = None, take: bool = False
) -> Params:
    """The decoder's parameters as the sampler reads them (once per step).

    An array for every layer, in the table's column "sample", without the vision tower, adapters
    merged into their weights, which are 8 bits no more. Arrays that are right already are passed on
    without a copy; those results live only as long as the state they came from, until the next
    donating step. Stacks are taken apart one after the other;
    ``take`` empties ``params`` on the way, so that no more than one of them is held twice.
    """
    out = {}
    weights = [p for p in params if p.startswith("text/") and not (is_adapter(p) or is_scale(p))]
    for path in weights:
        x = params.pop(path) if take else params[path]
        target = sharding.param_specs(jax.eval_shape(for_sampling, {path: x}), mesh, "sample")
        beside = adapters_of(path, params) | scale_of(path, params)
        same = path in target and x.dtype == jnp.dtype(dtype) and not beside
        if same and x.sharding.is_equivalent_to(target[path], x.ndim):
            out[path] = x
        else:
            out |= _relayout_step(tuple(target.items()), dtype, lora)({path: x, **beside})
    return out


@functools.lru_cache(maxsize=64)
def _relayout_step(target: tuple, dtype: str, lora: Lora | None) -> Callable[[Params], Params]:
    def relayout_step(params: Params) -> Params:
        return merge(for_sampling(params), lora, dtype)

    return jax.jit(relayout_step, out_shardings=dict(target))
