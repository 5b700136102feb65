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
    moment_dtype: str = "float32"  # of the first moment; the second is always float32
    max_skipped: int = 5  # updates in a row that are not finite, which end the run


Schedule = Callable[[ArrayLike], jax.Array]  # number of the update, from 0 -> learning rate


class Optimizer(NamedTuple):
    """An optax transformation, the learning-rate schedule that metrics report, a rounding seed."""

    init: Callable[[Params], Any]
    update: optax.TransformUpdateExtraArgsFn
    schedule: Schedule
    seed: int = 0


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
    resolution, and it would stand still). ``seed`` is that of the rounding of bfloat16 parameters.
    """
    schedule = make_schedule(cfg, total_steps)
    parts = []
    if cfg.grad_clip is not None:
        parts.append(optax.clip_by_global_norm(cfg.grad_clip))
    parts.append(_scale(cfg))
    if cfg.weight_decay:
        parts.append(optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask))
    parts.append(optax.scale_by_learning_rate(schedule))
    chain = optax.chain(*parts)

    def init(params: Params) -> Any:
        # optax sizes the moments after the parameters: show it float32 ones.
        return chain.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    return Optimizer(init=init, update=chain.update, schedule=schedule, seed=seed)


def _scale(cfg: OptimConfig) -> optax.GradientTransformation:
    """Gradient -> direction and size of the update, before the learning rate."""
    if cfg.kind == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.moment_dtype)
    if cfg.kind == "adamw":
        return adam
    # Its own learning rate is 1; its own Adam, which gets nothing here, has Nesterov's momentum.
    muon = contrib.muon(
        1.0,
        mu_dtype=cfg.moment_dtype,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )
    parts: dict[Hashable, optax.GradientTransformation]
    parts = {"matrix": optax.chain(muon, optax.scale(-1.0)), "other": adam}
    return optax.partition(parts, _parts)


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
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    params, squares, moved = _add(state, updates, finite, optimizer.seed)
    new_state = dataclasses.replace(
        state,
        step=state.step + finite.astype(jnp.int32),
        params=params,
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        skipped=state.skipped + (~finite).astype(jnp.int32),
    )
    metrics = {
        "grad_norm": grad_norm,
        "update_norm": jnp.where(finite, jnp.sqrt(squares), 0.0),
        **({} if moved is None else {"moved_share": moved}),
        "lr": jnp.asarray(optimizer.schedule(state.step)),
        "skipped": new_state.skipped,
    }
    return new_state, {name: value.astype(jnp.float32) for name, value in metrics.items()}


def _add(
    state: TrainState[jax.Array], updates: Any, finite: jax.Array, seed: int
) -> tuple[Params, jax.Array, jax.Array | None]:
    """Parameters after the update, the squared norm of their change, and the share that moved.

    A float32 parameter takes its update as it is. What rounding makes of the others is measured on
    a sample of their entries (the whole would cost a second copy of the parameters); the share is
    None where there are no others.
    """
    exact = {path: updates[path] for path, x in state.params.items() if x.dtype == jnp.float32}
    squares = jnp.square(optax.tree.norm(exact)) if exact else jnp.float32(0)
    moved, size = jnp.float32(0), 0.0  # their number may be beyond int32
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)
    params = {}
    for path, old in state.params.items():
        update = updates[path].astype(jnp.float32)
        new = old + update
        if path not in exact:
            key = jax.random.fold_in(step_key, zlib.crc32(path.encode()))
            new = _rounded_sum(old, update, key)
            few = _SAMPLE // math.prod(old.shape[1:]) + 1  # rounded alike: bits go by the place
            change = _rounded_sum(old[:few], update[:few], key).astype(jnp.float32)
            change -= old[:few].astype(jnp.float32)
            share = old.size / change.size
            squares += jnp.sum(jnp.square(change)) * share
            moved, size = moved + jnp.sum(change != 0, dtype=jnp.float32) * share, size + old.size
        params[path] = jnp.where(finite, new, old)
    return params, squares, jnp.where(finite, moved / size, 0.0) if size else None


def _rounded_sum(param: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
    """``param + update`` in bfloat16, right in the mean.

    An update at a learning rate of 1e-6 is far below the distance between two bfloat16 numbers, and
    rounding to the nearest would lose nearly all of them. Stochastic rounding (Gupta et al., arXiv
    1502.02551) goes up with the probability of the part that is cut off: 16 random bits are added
    to a float32's lower half, which is then cut off.
    """
    total = jax.lax.bitcast_convert_type(param.astype(jnp.float32) + update, jnp.uint32)
    upper = (total + (_hashed_bits(key, param.shape) >> 16)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def _hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """32 bits for each place of ``shape``, of key and place alone: alike on any devices.

    A hash of the indices (lowbias32 of C. Wellons), since it melts into the addition where
    jax.random's kernels would hold four numbers for each entry.
    """
    bits = jax.random.bits(key, (), jnp.uint32)
    for axis in range(len(shape)):
        bits = bits + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
        bits = bits ^ (bits >> 16)
    return bits
