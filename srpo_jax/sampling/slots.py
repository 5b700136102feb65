"""The sampler's state on device, and the copies in and out of it that stay on their own shard.

A *block* is a run of slots that holds one row: the prompts of one row of one data shard, G samples
each. Every data shard has C blocks. The letter P counts prompts in blocks here, A all prompts of
the batch, p the prompts of one row, D data shards.

The copies run under ``shard_map``, so that a block index is a local offset and no copy crosses
devices by construction.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from srpo_jax.model.config import ModelConfig
from srpo_jax.structs import Leaf, Rollout

ROWS = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()


@flax.struct.dataclass
class Prompts(Generic[Leaf]):
    """What prefill leaves in the blocks; decode only reads it."""

    k: Leaf  # [L, P, K, S, E] compute dtype
    v: Leaf  # [L, P, K, S, E]
    segment_ids: Leaf  # [P, S] int32, 0 in padding
    next_pos: Leaf  # [P] int32 position of the first sampled token
    start: Leaf  # [P] int32 global step at which the prompt's samples started
    keys: Leaf  # [P, G, 2] uint32 key data of every sample


@flax.struct.dataclass
class Slots(Generic[Leaf]):
    """What decode updates. In the rings, token j of a prompt lies in column (start + j) % R."""

    k: Leaf  # [L, P, G, K, R, E] ring, compute dtype
    v: Leaf  # [L, P, G, K, R, E] ring
    tokens: Leaf  # [P, G, R] int32 ring
    sample_logp: Leaf  # [P, G, R] float32 ring
    policy_logp: Leaf  # [P, G, R] float32 ring
    last: Leaf  # [P, G] int32 token to be fed next
    length: Leaf  # [P, G] int32 tokens sampled, EOS included
    done: Leaf  # [P, G] bool
    finished: Leaf  # [P, G] bool: done by an EOS, or a filler prompt
    step: Leaf  # [] int32 global step


Arrays = tuple[Prompts[jax.Array], Slots[jax.Array]]  # what the blocks hold
Specs = tuple[Prompts[PartitionSpec], Slots[PartitionSpec]]
RINGS = ("tokens", "sample_logp", "policy_logp")
PER_SLOT = ("last", "length", "done", "finished")


def specs(cfg: ModelConfig, mesh: Mesh) -> tuple[Specs, Rollout[PartitionSpec]]:
    """PartitionSpecs: prompts over data x fsdp, key/value heads over tensor where they divide."""
    heads = "tensor" if cfg.text.num_key_value_heads % mesh.shape["tensor"] == 0 else None
    prompt_cache = PartitionSpec(None, ROWS[0], heads, None, None)
    sample_cache = PartitionSpec(None, ROWS[0], None, heads, None, None)
    prompts = Prompts(k=prompt_cache, v=prompt_cache, **dict.fromkeys(_PROMPT_FIELDS, ROWS))
    slots = Slots(
        k=sample_cache,
        v=sample_cache,
        step=REPLICATED,
        **dict.fromkeys((*RINGS, *PER_SLOT), ROWS),
    )
    return (prompts, slots), Rollout(*[ROWS] * 5)


_PROMPT_FIELDS = ("segment_ids", "next_pos", "start", "keys")


def empty(
    cfg: ModelConfig, *, slot_prompts: int, all_prompts: int, S: int, G: int, R: int, pad_id: int
) -> tuple[Arrays, Rollout[jax.Array]]:
    """Blocks without work (every slot done) and a result that nothing was written to yet."""
    P, text = slot_prompts, cfg.text
    L, K, E = text.num_hidden_layers, text.num_key_value_heads, text.head_dim
    prompt_cache = jnp.zeros((L, P, K, S, E), cfg.dtype)
    sample_cache = jnp.zeros((L, P, G, K, R, E), cfg.dtype)
    prompts = Prompts(
        k=prompt_cache,
        v=prompt_cache,
        segment_ids=jnp.zeros((P, S), jnp.int32),
        next_pos=jnp.zeros((P,), jnp.int32),
        start=jnp.zeros((P,), jnp.int32),
        keys=jnp.zeros((P, G, 2), jnp.uint32),
    )
    slots = Slots(
        k=sample_cache,
        v=sample_cache,
        tokens=jnp.zeros((P, G, R), jnp.int32),
        sample_logp=jnp.zeros((P, G, R), jnp.float32),
        policy_logp=jnp.zeros((P, G, R), jnp.float32),
        last=jnp.full((P, G), pad_id, jnp.int32),
        length=jnp.zeros((P, G), jnp.int32),
        done=jnp.ones((P, G), bool),
        finished=jnp.zeros((P, G), bool),
        step=jnp.zeros((), jnp.int32),
    )
    rollout = Rollout(
        completions=jnp.full((all_prompts, G, R), pad_id, jnp.int32),
        completion_mask=jnp.zeros((all_prompts, G, R), bool),
        finished=jnp.zeros((all_prompts, G), bool),
        sample_logp=jnp.zeros((all_prompts, G, R), jnp.float32),
        policy_logp=jnp.zeros((all_prompts, G, R), jnp.float32),
    )
    return (prompts, slots), rollout


def select_row(mesh: Mesh, per_prompt: Any, per_row: Any, rows_DC: jax.Array, p: int) -> Any:
    """From every shard the row that ``rows_DC`` names (row 0 where it names none).

    Args:
        per_prompt: tree of arrays [A, ...].
        per_row: tree of arrays [M, ...] (or None).
        rows_DC: [D, C] int32, at most one entry per shard that is not -1.
        p: prompts per row.

    Returns: the two trees with leading axes D * p and D.
    """

    def local(per_prompt: Any, per_row: Any, rows_1C: jax.Array) -> Any:
        row = jnp.maximum(jnp.max(rows_1C), 0)

        def take(size: int, x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, row * size, size, axis=0)

        return (
            jax.tree.map(lambda x: take(p, x), per_prompt),
            jax.tree.map(lambda x: take(1, x), per_row),
        )

    return _per_shard(mesh, local, (ROWS, ROWS, ROWS), (ROWS, ROWS))(per_prompt, per_row, rows_DC)


def place(
    mesh: Mesh,
    layout: Specs,
    state: Arrays,
    new_prompts: Prompts[jax.Array],
    first: dict[str, jax.Array],
    rows_DC: jax.Array,
) -> Arrays:
    """Write one row of every shard into the block whose entry of ``rows_DC`` is not -1.

    Args:
        layout: ``specs`` of the state.
        state: the blocks; the sample caches stay as they are, since nothing old is visible.
        new_prompts: one row per shard, leading axis D * p.
        first: [D * p, G] of every field in RINGS (the first token) and PER_SLOT.
        rows_DC: [D, C] int32, at most one entry per shard that is not -1; a shard whose entries
            are all -1 is left unchanged.
    """

    def local(
        prompts: Prompts[jax.Array],
        slots: Slots[jax.Array],
        new: Prompts[jax.Array],
        first: dict[str, jax.Array],
        rows_1C: jax.Array,
    ) -> Arrays:
        used = jnp.max(rows_1C) >= 0
        p = new.next_pos.shape[0]
        at = jnp.argmax(rows_1C[0]) * p

        def put(old: jax.Array, value: jax.Array, axis: int = 0) -> jax.Array:
            now = jax.lax.dynamic_slice_in_dim(old, at, p, axis)
            value = jnp.where(used, value.astype(old.dtype), now)
            return jax.lax.dynamic_update_slice_in_dim(old, value, at, axis)

        def put_first(ring: jax.Array, value: jax.Array) -> jax.Array:
            now = jax.lax.dynamic_slice_in_dim(ring, at, p, 0)
            column = slots.step % ring.shape[2]
            now = jax.lax.dynamic_update_slice_in_dim(now, value[..., None], column, 2)
            return put(ring, now)

        prompts = Prompts(
            k=put(prompts.k, new.k, 1),
            v=put(prompts.v, new.v, 1),
            **{f: put(getattr(prompts, f), getattr(new, f)) for f in _PROMPT_FIELDS},
        )
        slots = dataclasses.replace(
            slots,
            **{f: put_first(getattr(slots, f), first[f]) for f in RINGS},
            **{f: put(getattr(slots, f), first[f]) for f in PER_SLOT},
        )
        return prompts, slots

    in_specs = (*layout, layout[0], ROWS, ROWS)
    return _per_shard(mesh, local, in_specs, layout)(*state, new_prompts, first, rows_DC)


def collect(
    mesh: Mesh, pad_id: int, rollout: Rollout[jax.Array], state: Arrays, rows_DC: jax.Array
) -> Rollout[jax.Array]:
    """Copy the blocks whose entry of ``rows_DC`` [D, C] is not -1 to that row of the result.

    The rings are turned back to the order of the tokens; logps are 0 after the end.
    """

    def local(
        rollout: Rollout[jax.Array],
        fields: dict[str, jax.Array],
        start_P: jax.Array,
        rows_1C: jax.Array,
    ) -> Rollout[jax.Array]:
        blocks = rows_1C.shape[1]
        P, G, R = fields["tokens"].shape
        order_PR = (start_P[:, None] + jnp.arange(R)[None]) % R
        mask_PGR = jnp.arange(R)[None, None] < fields["length"][..., None]

        def straight(ring_PGR: jax.Array, padding: int) -> jax.Array:
            values = jnp.take_along_axis(ring_PGR, order_PR[:, None], axis=2)
            return jnp.where(mask_PGR, values, padding)

        found = Rollout(
            completions=straight(fields["tokens"], pad_id),
            completion_mask=mask_PGR,
            finished=fields["finished"],
            sample_logp=straight(fields["sample_logp"], 0),
            policy_logp=straight(fields["policy_logp"], 0),
        )

        def put(old: jax.Array, value: jax.Array) -> jax.Array:
            by_row = old.reshape(-1, P // blocks, *old.shape[1:])
            index = jnp.where(rows_1C[0] >= 0, rows_1C[0], by_row.shape[0])  # outside: dropped
            value = value.reshape(blocks, P // blocks, *value.shape[1:])
            return by_row.at[index].set(value, mode="drop").reshape(old.shape)

        return jax.tree.map(put, rollout, found)

    prompts, slots = state
    fields = {f: getattr(slots, f) for f in (*RINGS, "length", "finished")}
    return _per_shard(mesh, local, (ROWS,) * 4, ROWS)(rollout, fields, prompts.start, rows_DC)


def _per_shard(
    mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """``function`` on the local part of every device. step is replicated by its spec."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
