"""The sampler's state on device, and the copies in and out of it that stay on their own shard.

Z data shards each have C rows, which hold a prompt's cache, and J slots, which decode a sample
each (``schedule.py`` says which). Caches are one array a layer and read where they lie. The letter
A counts all prompts of the batch.

The copies run under ``shard_map``, so that an index is a local offset and no copy crosses devices
by construction.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from srpo_jax.model.config import ModelConfig
from srpo_jax.sampling.forks import CUT
from srpo_jax.sampling.schedule import Fill, Move
from srpo_jax.structs import Leaf, Rollout

ROWS = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()


@flax.struct.dataclass
class Prompts(Generic[Leaf]):
    """What prefill leaves in the rows; decode only reads it."""

    caches: tuple[tuple[Leaf, Leaf], ...]  # of each layer [Z, C, K, S, E], compute dtype
    segment_ids: Leaf  # [Z, C, S] int32, 0 in padding


@flax.struct.dataclass
class Slots(Generic[Leaf]):
    """What decode updates. Step t is written in column t modulo the window of that time."""

    rings: tuple[tuple[Leaf, Leaf], ...]  # of each layer [Z, J, K, R, E], compute dtype
    keys: Leaf  # [Z, J, 2] uint32 key data of the sample
    next_pos: Leaf  # [Z, J] int32 position of its first token
    last: Leaf  # [Z, J] int32 token to be fed next
    length: Leaf  # [Z, J] int32 tokens sampled, EOS included
    limit: Leaf  # [Z, J] int32 tokens at which the sample ends without an EOS
    done: Leaf  # [Z, J] bool
    finished: Leaf  # [Z, J] bool: done by an EOS, or a filler prompt
    tag: Leaf  # [Z, J] int32 state of `forks.Automaton` after its tokens; CUT without forks
    step: Leaf  # [] int32 tokens decoded so far, of every slot


Arrays = tuple[Prompts[jax.Array], Slots[jax.Array], Rollout[jax.Array]]
Specs = tuple[Prompts[PartitionSpec], Slots[PartitionSpec], Rollout[PartitionSpec]]
PER_SLOT = ("keys", "next_pos", "last", "length", "limit", "done", "finished", "tag")


def specs(cfg: ModelConfig, mesh: Mesh) -> Specs:
    """PartitionSpecs: shards over data x fsdp, key/value heads over tensor where they divide."""
    heads = "tensor" if cfg.text.num_key_value_heads % mesh.shape["tensor"] == 0 else None
    cache = PartitionSpec(ROWS[0], None, heads, None, None)
    caches = ((cache, cache),) * cfg.text.num_hidden_layers
    slots = Slots(rings=caches, step=REPLICATED, **dict.fromkeys(PER_SLOT, ROWS))
    return Prompts(caches=caches, segment_ids=ROWS), slots, Rollout(*[ROWS] * 5)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much there is of everything; see the module for the letters."""

    Z: int
    C: int
    J: int
    A: int
    S: int
    G: int
    R: int


def empty(cfg: ModelConfig, pad_id: int, sizes: Sizes) -> Arrays:
    """Slots without work (all done) and a result that nothing was written to yet."""
    Z, C, J, A, S, G, R = dataclasses.astuple(sizes)
    text = cfg.text
    K, E = text.num_key_value_heads, text.head_dim

    def caches(count: int, columns: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
        new = lambda: jnp.zeros((Z, count, K, columns, E), cfg.dtype)  # noqa: E731
        return tuple((new(), new()) for _ in range(text.num_hidden_layers))

    slots = Slots(
        rings=caches(J, R),
        keys=jnp.zeros((Z, J, 2), jnp.uint32),
        next_pos=jnp.zeros((Z, J), jnp.int32),
        last=jnp.full((Z, J), pad_id, jnp.int32),
        length=jnp.zeros((Z, J), jnp.int32),
        limit=jnp.zeros((Z, J), jnp.int32),
        done=jnp.ones((Z, J), bool),
        finished=jnp.zeros((Z, J), bool),
        tag=jnp.full((Z, J), CUT, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )
    rollout = Rollout(
        completions=jnp.full((A, G, R), pad_id, jnp.int32),
        completion_mask=jnp.zeros((A, G, R), bool),
        finished=jnp.zeros((A, G), bool),
        sample_logp=jnp.zeros((A, G, R), jnp.float32),
        policy_logp=jnp.zeros((A, G, R), jnp.float32),
    )
    return Prompts(caches=caches(C, S), segment_ids=jnp.zeros((Z, C, S), jnp.int32)), slots, rollout


def select(mesh: Mesh, per_prompt: Any, per_row: Any, prompt_Z: jax.Array) -> Any:
    """From every shard the prompt that ``prompt_Z`` names (prompt 0 where it names none).

    Args:
        per_prompt: tree of arrays [A, ...].
        per_row: array [M, ...] of the batch's rows, A / M prompts each (or None).
        prompt_Z: [Z] int32 numbers of prompts in their shards, or -1.

    Returns: the prompts, and their whole rows, with leading axis Z.
    """

    def local(per_prompt: Any, per_row: Any, prompt_1: jax.Array) -> Any:
        prompt = jnp.maximum(prompt_1[0], 0)
        prompts = jax.tree.leaves(per_prompt)[0].shape[0]

        def take(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, prompt * x.shape[0] // prompts, 1, axis=0)

        return jax.tree.map(take, (per_prompt, per_row))

    return _per_shard(mesh, local, (ROWS, ROWS, ROWS), (ROWS, ROWS))(per_prompt, per_row, prompt_Z)


def place(
    mesh: Mesh,
    layout: Specs,
    state: Arrays,
    new: Prompts[jax.Array],
    first: dict[str, jax.Array],
    fill: Fill[jax.Array],
) -> Arrays:
    """Write one prompt of every shard, and the first token of its samples.

    Args:
        layout: ``specs`` of the state.
        state: everything; the rings stay as they are, since nothing old is visible.
        new: prompts [Z, ...] without the axis C.
        first: [Z, G] of the fields PER_SLOT, ``sample_logp``, ``policy_logp`` and ``valid``.
        fill: where to; a shard whose prompt is -1 is left unchanged.
    """

    def local(
        state: Arrays, new: Prompts[jax.Array], first: dict[str, jax.Array], fill: Fill[jax.Array]
    ):
        prompts, slots, rollout = state
        used, row = fill.prompt_Z[0] >= 0, fill.row_Z[0]

        def put(old: jax.Array, value: jax.Array) -> jax.Array:
            now = jax.lax.dynamic_slice_in_dim(old, row, 1, axis=1)
            value = jnp.where(used, value[:, None].astype(old.dtype), now)
            return jax.lax.dynamic_update_slice_in_dim(old, value, row, axis=1)

        slot_G = jnp.where(used, fill.slot_ZG[0], slots.done.shape[1])  # outside: dropped
        prompt = jnp.where(used, fill.prompt_Z[0], rollout.finished.shape[0])
        slots = dataclasses.replace(
            slots,
            **{f: getattr(slots, f).at[0, slot_G].set(first[f][0], mode="drop") for f in PER_SLOT},
        )
        tokens = Rollout(
            completions=first["last"],
            completion_mask=first["valid"],
            finished=first["finished"],
            sample_logp=first["sample_logp"],
            policy_logp=first["policy_logp"],
        )

        def write(old: jax.Array, value_1G: jax.Array) -> jax.Array:
            if old.ndim == 2:
                return old.at[prompt].set(value_1G[0], mode="drop")
            with_token = jnp.where(first["valid"][0, 0], prompt, old.shape[0])  # a filler has none
            return old.at[with_token, :, 0].set(value_1G[0], mode="drop")

        return jax.tree.map(put, prompts, new), slots, jax.tree.map(write, rollout, tokens)

    in_specs = (layout, jax.tree.map(_without_rows, layout[0]), ROWS, ROWS)
    return _per_shard(mesh, local, in_specs, layout)(state, new, first, fill)


def _without_rows(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(spec[0], *spec[2:])


def record(
    mesh: Mesh,
    rollout: Rollout[jax.Array],
    drawn: dict[str, jax.Array],
    sample_ZJ: jax.Array,
    length_ZJ: jax.Array,
    slots: Slots[jax.Array],
) -> Rollout[jax.Array]:
    """Write the tokens of a segment to the result.

    Args:
        drawn: [T, Z, J] of every field that has a value a token.
        sample_ZJ: the sample of each slot, or -1.
        length_ZJ: tokens before the segment.
        slots: after the segment, its fields [Z, J].
    """

    def local(rollout: Rollout[jax.Array], drawn, sample_1J, before_1J, after_1J, finished_1J):
        A, G, R = rollout.completions.shape
        T = drawn["completions"].shape[0]
        sample_J1 = jnp.where(sample_1J >= 0, sample_1J, A * G)[0, :, None]  # outside: dropped
        column_JT = before_1J[0, :, None] + jnp.arange(T)[None]
        column_JT = jnp.where(column_JT < after_1J[0, :, None], column_JT, R)

        def write(old: jax.Array, value_JT: jax.Array) -> jax.Array:
            flat = old.reshape(A * G, R).at[sample_J1, column_JT].set(value_JT, mode="drop")
            return flat.reshape(old.shape)

        finished = rollout.finished.reshape(-1).at[sample_J1[:, 0]].set(finished_1J[0], mode="drop")
        written = {f: write(getattr(rollout, f), drawn[f][:, 0].T) for f in drawn}
        mask = write(rollout.completion_mask, jnp.ones(column_JT.shape, bool))
        return dataclasses.replace(
            rollout, completion_mask=mask, finished=finished.reshape(A, G), **written
        )

    in_specs = (ROWS, PartitionSpec(None, ROWS[0]), ROWS, ROWS, ROWS, ROWS)
    write = _per_shard(mesh, local, in_specs, ROWS)
    return write(rollout, drawn, sample_ZJ, length_ZJ, slots.length, slots.finished)


def move(mesh: Mesh, ring: PartitionSpec, x: jax.Array, to: Move) -> jax.Array:
    """A field [Z, J] or a ring [Z, J, K, R, E] with its slots, and columns, taken anew: a copy."""
    layout = ring if x.ndim == len(ring) else ROWS

    def local(x: jax.Array, slot_1J: jax.Array, column_R: jax.Array) -> jax.Array:
        x = x[:, slot_1J[0]]
        return x if layout is ROWS else x[..., column_R, :]

    return _per_shard(mesh, local, (layout, ROWS, REPLICATED), layout)(x, *to)


def _per_shard(
    mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """``function`` on the local part of every device. step is replicated by its spec."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
