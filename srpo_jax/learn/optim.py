"""The optimizer (AdamW, Adafactor, Muon), its schedule; freezing; updates that are not finite."""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax import contrib

from srpo_jax.learn import rounding
from srpo_jax.learn.rounding import Scales
from srpo_jax.model.hf_table import TABLE
from srpo_jax.model.lora import LORA_A, LORA_B, is_adapter
from srpo_jax.structs import Leaf, Params, TrainState


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; warm-up as ``warmup_steps`` or as ``warmup_ratio``.

    "adafactor" (arXiv 1804.04235) has no first moment and the second by rows and columns, with
    ``lr`` as it is, relative to nothing; "muon" (arXiv 2502.16982) makes the momentum of matrices
    orthogonal and scales it as Adam's updates are, embedding, head and vectors are Adam's.
    """

    kind: Literal["adamw", "adafactor", "muon"] = "adamw"
    lr: float = 1e-6  # peak
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    warmup_steps: int | None = None  # None: warmup_ratio * total_steps
    warmup_ratio: float = 0.03
    final_fraction: float = 0.1  # of the peak, reached at total_steps
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # kernels and embeddings only, never biases and norm scales
    grad_clip: float | None = 1.0  # global norm
    moment_dtype: str = "float32"  # "bfloat16": of the first moment; "int8": of both
    offload: bool = False  # optimizer state and reference wait in the host's memory
    max_skipped: int = 5  # updates in a row that are not finite, which end the run


Schedule = Callable[[ArrayLike], jax.Array]  # number of the update, from 0 -> learning rate


class Optimizer(NamedTuple):
    """An optax transformation, the learning-rate schedule that metrics report, a rounding seed;
    whether the state waits in the host's memory, and whether updates are made once to be looked at
    and once more to be added, so that they are never held all together."""

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Any, Any]]  # of optax, with ``scales`` for `EightBit`
    schedule: Schedule
    seed: int = 0
    offload: bool = False
    twice: bool = False


class EightBit(NamedTuple):
    """State of an optimizer whose moments are `rounding.Blocks`."""

    count: jax.Array  # updates done, int32
    inner: Any


def make_schedule(cfg: OptimConfig, total_steps: int) -> Schedule:
    """Learning rate of update number ``count`` (from 0): linear warm-up, then cosine or constant.

    With W warm-up steps update ``W - 1`` is the first at the peak (update 0 is not wasted on a rate
    of 0), and the cosine reaches ``final_fraction * lr`` at ``total_steps``.
    """
    warmup = cfg.warmup_steps
    if warmup is None:
        warmup = round(cfg.warmup_ratio * total_steps)
    if not 0 <= warmup <= total_steps:
        raise ValueError(f"warm-up of {warmup} steps does not fit into {total_steps} total steps")
    if cfg.schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule must be cosine or constant, not {cfg.schedule!r}")

    def schedule(count: ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        ramp = jnp.minimum(1.0, (count + 1.0) / max(1, warmup))
        if cfg.schedule == "constant":
            return cfg.lr * ramp
        progress = jnp.clip((count - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return cfg.lr * ramp * (cfg.final_fraction + (1.0 - cfg.final_fraction) * cosine)

    return schedule


def make_optimizer(cfg: OptimConfig, total_steps: int, seed: int = 0) -> Optimizer:
    """Clip by global norm -> ``cfg.kind`` -> decoupled weight decay -> learning rate.

    Takes float32 gradients, whatever the dtype of the parameters. Moments are stored as
    ``moment_dtype`` (first) and float32 (second: with b2 near 1 its increments are below bfloat16's
    resolution, and it would stand still), or both in 8 bits. ``seed`` is that of the rounding, of
    these and of bfloat16 parameters.
    """
    schedule = make_schedule(cfg, total_steps)
    parts = []
    if cfg.grad_clip is not None:
        parts.append(optax.clip_by_global_norm(cfg.grad_clip))
    scale = _scale(cfg)
    parts.append(_in_eight_bits(scale, seed) if cfg.moment_dtype == "int8" else scale)
    if cfg.weight_decay:
        parts.append(optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask))
    parts.append(optax.scale_by_learning_rate(schedule))
    chain = optax.chain(*parts)

    def init(params: Params) -> Any:
        # optax sizes the moments after the parameters: show it float32 ones.
        return chain.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    # What is made elementwise is cheap to make twice, but what waits on the host would be here for
    # as long as both take.
    twice = cfg.kind != "muon" and (cfg.moment_dtype == "int8" or not cfg.offload)
    return Optimizer(init, chain.update, schedule, seed, cfg.offload, twice)


def _scale(cfg: OptimConfig) -> optax.GradientTransformation:
    """Gradient -> direction and size of the update, before the learning rate."""
    if cfg.kind == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    mu_dtype = "float32" if cfg.moment_dtype == "int8" else cfg.moment_dtype
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=mu_dtype)
    if cfg.kind == "adamw":
        return adam
    # Its own learning rate is 1; its own Adam, which gets nothing here, has Nesterov's momentum.
    muon = contrib.muon(
        1.0,
        mu_dtype=mu_dtype,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )
    parts: dict[Hashable, optax.GradientTransformation]
    parts = {"matrix": optax.chain(muon, optax.scale(-1.0)), "other": adam}
    return optax.partition(parts, _parts)


def _in_eight_bits(
    inner: optax.GradientTransformation, seed: int
) -> optax.GradientTransformationExtraArgs:
    """``inner``, which computes in float32, with moments that are stored in 8 bits."""

    def stored(state: Any, count: jax.Array, scales: Scales | None = None) -> EightBit:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return EightBit(count, rounding.in_blocks(state, key, scales))

    def init(params: Any) -> EightBit:
        return stored(inner.init(params), jnp.zeros((), jnp.int32))

    def update(
        grads: Any, state: EightBit, params: Any = None, *, scales: Scales | None = None, **_: Any
    ) -> tuple[Any, EightBit]:
        updates, new = inner.update(grads, rounding.from_blocks(state.inner), params)
        return updates, stored(new, state.count + 1, scales)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _scales(opt_state: Any) -> Scales:
    """Of the moments in 8 bits."""
    is_ours = lambda x: isinstance(x, EightBit)  # noqa: E731
    parts = filter(is_ours, jax.tree.leaves(opt_state, is_leaf=is_ours))
    return {name: scale for x in parts for name, scale in rounding.scales_of(x.inner).items()}


def _matrices(params: Any) -> Any:
    return {path: _matrix(path) for path in params}


def _parts(params: Any) -> dict[str, str]:
    return {path: "matrix" if _matrix(path) else "other" for path in params}


def _matrix(path: str) -> contrib.MuonDimensionNumbers | None:
    """Inputs and outputs among the dimensions of a linear layer's weight, those before are layers;
    None for what is no such weight."""
    weight = re.sub("/lora_[ab]$", "/kernel", path)
    row = next((row for row in TABLE if row.path == weight and weight.endswith("/kernel")), None)
    if row is None or weight == "text/lm_head/kernel":
        return None
    outputs, inputs = map(len, row.groups)
    inputs = 1 if path.endswith(LORA_B) else inputs
    outputs = 1 if path.endswith(LORA_A) else outputs
    dims = tuple(range(row.stacked + inputs + outputs))[row.stacked :]
    return contrib.MuonDimensionNumbers(dims[:inputs], dims[inputs:])


def decay_mask(params: Params) -> dict[str, bool]:
    """Which parameters decay: matrices and embeddings, not biases and norm scales."""
    kinds = ("kernel", "embedding", LORA_A, LORA_B)
    return {path: path.rsplit("/", 1)[-1] in kinds for path in params}


def split_frozen(
    params: Mapping[str, Leaf], freeze: tuple[str, ...] = ("vision/",)
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Split by path prefix into (trained, frozen); works on arrays, shapes and shardings alike.

    Frozen parameters stay outside of the function that is differentiated and outside of the
    optimizer: no gradient, no moments, no decay. Where there are adapters, all but them is frozen.
    Raises ValueError for a prefix that matches nothing (a misspelt prefix would silently train) or
    an adapter, and when nothing is left to train.
    """
    for prefix in freeze:
        if not any(path.startswith(prefix) for path in params):
            raise ValueError(f"freeze prefix {prefix!r} matches no parameter, e.g. {min(params)!r}")
    frozen = {p: x for p, x in params.items() if p.startswith(tuple(freeze))} if freeze else {}
    if any(map(is_adapter, params)):
        if still := next(filter(is_adapter, frozen), None):
            raise ValueError(
                f"freeze={freeze!r} holds the adapter {still}: set --config.freeze='()', or leave "
                "its layer out of lora.targets"
            )
        frozen = {p: x for p, x in params.items() if not is_adapter(p)}
    trained = {p: x for p, x in params.items() if p not in frozen}
    if not trained:
        raise ValueError(f"freeze={freeze!r} leaves no parameter to train")
    return trained, frozen


def trains_vision(params: Mapping[str, Any], freeze: tuple[str, ...]) -> bool:
    """Whether anything of the vision tower or its merger is trained; raises as `split_frozen`."""
    return any(path.startswith("vision/") for path in split_frozen(dict(params), freeze)[0])


_SAMPLE = 2**20  # entries of a rounded parameter, at least


def apply_gradients(
    state: TrainState[jax.Array], grads: Params, optimizer: Optimizer
) -> tuple[TrainState[jax.Array], dict[str, jax.Array]]:
    """One update, or none at all where the gradient or the update itself is not finite.

    A skipped update leaves parameters, moments, schedule and ``step`` as they were and adds 1 to
    ``skipped``.

    Returns:
        the new state; float32 scalars: ``grad_norm`` (before clipping), ``update_norm`` (of what
        the parameters really changed by), ``lr``, ``skipped`` (so far) and, where parameters are
        rounded, ``moved_share``, the share of their entries that changed at all.
    """
    grad_norm = optax.tree.norm(grads)
    put = jax.device_put if optimizer.offload else lambda tree, space: tree
    before, old = put(state.opt_state, jax.memory.Space.Device), state.params
    updates, opt_state = optimizer.update(grads, before, old)
    key = jax.random.fold_in(jax.random.key(optimizer.seed), state.step)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
    change = _change(old, updates, key)
    if optimizer.twice:  # or all updates are held until the last one is known to be finite
        held = (finite, change, _scales(opt_state), grads, before, old)
        finite, change, scales, grads, before, old = jax.lax.optimization_barrier(held)
        updates, opt_state = optimizer.update(grads, before, old, scales=scales)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    new_state = dataclasses.replace(
        state,
        step=state.step + finite.astype(jnp.int32),
        params={path: keep(_sum(path, x, updates[path], key), x) for path, x in old.items()},
        opt_state=put(jax.tree.map(keep, opt_state, before), jax.memory.Space.Host),
        skipped=state.skipped + (~finite).astype(jnp.int32),
    )
    metrics = {
        "grad_norm": grad_norm,
        **{name: jnp.where(finite, value, 0.0) for name, value in change.items()},
        "lr": jnp.asarray(optimizer.schedule(state.step)),
        "skipped": new_state.skipped,
    }
    return new_state, {name: value.astype(jnp.float32) for name, value in metrics.items()}


def _change(params: Params, updates: Any, key: jax.Array) -> dict[str, jax.Array]:
    """``update_norm`` and, where any is rounded, ``moved_share``.

    A float32 parameter takes its update as it is. What rounding makes of the others is measured on
    a sample of their entries: the whole would cost a second copy of the parameters.
    """
    exact = {path: updates[path] for path, x in params.items() if x.dtype == jnp.float32}
    squares = jnp.square(optax.tree.norm(exact)) if exact else jnp.float32(0)
    moved, size = jnp.float32(0), 0.0  # their number may be beyond int32
    for path, old in params.items():
        if path in exact:
            continue
        few = _SAMPLE // math.prod(old.shape[1:]) + 1  # rounded alike: bits go by the place
        new = _sum(path, old[:few], updates[path][:few], key)
        change = new.astype(jnp.float32) - old[:few].astype(jnp.float32)
        share = old.size / change.size
        squares += jnp.sum(jnp.square(change)) * share
        moved, size = moved + jnp.sum(change != 0, dtype=jnp.float32) * share, size + old.size
    found = {"update_norm": jnp.sqrt(squares)}
    return found | ({"moved_share": moved / size} if size else {})


def _sum(path: str, param: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
    """The parameter at ``path`` after its update, in its dtype."""
    update = update.astype(jnp.float32)
    if param.dtype == jnp.float32:
        return param + update
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return rounding.rounded_sum(param, update, own)
