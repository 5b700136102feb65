"""The sampler: each prompt prefilled once, its G samples decoded against one prompt cache.

Reading guide. Three jitted functions work on blocks of slots (``slots.py``; a block holds one row):
``prefill`` puts a pending row of every data shard into a block, ``decode_segment`` advances every
slot by up to ``segment`` tokens, ``collect`` copies finished blocks to the result.
``Sampler.generate`` is the Python loop around them.

All slots write the same physical column (global step modulo R) of their own cache in every step, so
that the write is one slice update. A slot that started later sees only the columns younger than
itself; as a sample has at most R tokens, none of its columns is overwritten before it ends. Rotary
positions are applied before caching, hence the physical order does not matter to attention.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from srpo_jax.model.config import TOKEN_IDS, ModelConfig
from srpo_jax.model.qwen2_5_vl import bind
from srpo_jax.model.sharding import batch_sharding, num_data_shards, replicated, to_global
from srpo_jax.sampling import logits as sampling_logits
from srpo_jax.sampling import slots as blocks
from srpo_jax.sampling.slots import Prompts, Slots
from srpo_jax.structs import Array, Batch, Params, Rollout

Carry = tuple[jax.Array, Slots[jax.Array]]  # tokens decoded in a segment, and the slots


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    ``segment`` is the number of tokens decoded between two looks of the host at what is done;
    ``concurrent_rows`` the rows per data shard in the cache at a time (0: all), which bounds its
    memory: 2 * layers * kv_heads * head_dim * (S + G * R) numbers per prompt. ``forbidden_ids`` are
    never sampled and have no part in any log-probability.
    """

    max_new_tokens: int
    group_size: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    eos_ids: tuple[int, ...] = (151_645, 151_643)
    pad_id: int = 151_643
    forbidden_ids: tuple[int, ...] = ()
    segment: int = 32
    concurrent_rows: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_ids", tuple(int(i) for i in self.eos_ids))
        forbidden = tuple(sorted({int(i) for i in self.forbidden_ids}))
        object.__setattr__(self, "forbidden_ids", forbidden)
        for key in ("max_new_tokens", "group_size", "segment"):
            value = getattr(self, key)
            _require(value >= 1, f"{key}: must be at least 1, is {value}")
        object.__setattr__(self, "segment", min(self.segment, self.max_new_tokens))
        rows = self.concurrent_rows
        _require(rows >= 0, f"concurrent_rows: must not be negative (0 is all), is {rows}")
        _require(self.temperature >= 0, f"temperature: must not be negative, is {self.temperature}")
        _require(self.top_k >= 0, f"top_k: must not be negative (0 is off), is {self.top_k}")
        _require(0 < self.top_p <= 1, f"top_p: must be in (0, 1] (1 is off), is {self.top_p}")
        _require(0 <= self.min_p <= 1, f"min_p: must be in [0, 1] (0 is off), is {self.min_p}")
        clash = sorted(set(self.eos_ids) & set(self.forbidden_ids))
        _require(not clash, f"forbidden_ids: {clash} are EOS ids, no sample could end with them")


def vision_token_ids(cfg: ModelConfig) -> tuple[int, ...]:
    """The ids that a completion must never hold: image, video and vision marker tokens."""
    return tuple(getattr(cfg, key) for key in TOKEN_IDS)


class Sampler:
    """Samples completions of a model on a mesh; owns its compiled functions.

    ``prefill``, ``decode_segment`` and ``collect`` are jitted and can be lowered from shapes alone
    (``abstract_args``). They compile once per budget (P, M, S, N).
    """

    def __init__(self, cfg: ModelConfig, sampling: SamplingConfig, mesh: Mesh):
        """ValueError where an EOS, pad or forbidden id lies outside the vocabulary."""
        size = cfg.text.vocab_size
        ids = {*sampling.eos_ids, sampling.pad_id, *sampling.forbidden_ids}
        outside = sorted(i for i in ids if not 0 <= i < size)
        _require(not outside, f"token ids {outside} lie outside the vocabulary of {size} tokens")
        self.cfg, self.sampling, self.mesh = cfg, sampling, mesh
        self.shards = num_data_shards(mesh)
        self._specs = blocks.specs(cfg, mesh)
        state, rollout = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            self._specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        self._new_state = functools.partial(
            blocks.empty,
            cfg,
            G=sampling.group_size,
            R=sampling.max_new_tokens,
            pad_id=sampling.pad_id,
        )
        self._empty = jax.jit(
            self._new_state,
            static_argnames=("slot_prompts", "all_prompts", "S"),
            out_shardings=(state, rollout),
        )
        self.prefill = jax.jit(self._prefill, donate_argnames=("state",), out_shardings=state)
        self.decode_segment = jax.jit(
            self._decode_segment,
            donate_argnames=("slots",),
            out_shardings=(state[1], replicated(mesh)),
        )
        self.collect = jax.jit(
            functools.partial(blocks.collect, mesh, sampling.pad_id),
            donate_argnames=("rollout",),
            out_shardings=rollout,
        )

    def generate(
        self,
        params: Params,
        batch: Batch[jax.Array],
        features_MND: jax.Array | None,
        keys: Array,
        *,
        seed: int,
        step: int,
        rows: int | None = None,
    ) -> Rollout[jax.Array]:
        """Sample ``group_size`` completions of every prompt of ``batch``.

        Args:
            params: parameters, best in the layout and dtype of ``param_specs(layout="sample")``.
            batch: P prompts (global arrays); filler prompts (``valid`` False) get empty samples.
            features_MND: output of ``encode_images``, [M, N/4, D]; None for text only.
            keys: [P] uint32, a stable number per prompt. Token t of sample g of prompt p is drawn
                with fold_in(fold_in(fold_in(fold_in(key(seed), step), keys[p]), g), t), so that a
                sample depends neither on its neighbours nor on sizes, order or refilling.
            seed, step: non-negative integers.
            rows: M where features_MND does not tell; None means one row per data shard.

        Returns: Rollout on device, axes [P, G, R], P sharded as in the batch. Log-probs are those
        of ``logits.sample`` and 0 after the end of a sample.

        Raises ValueError where P, M and the mesh do not divide.
        """
        prompts = batch.tokens.shape[0]
        if features_MND is not None:
            rows = features_MND.shape[0]
        rows = self.shards if rows is None else rows
        per_shard, concurrent = self._rows_per_shard(prompts, rows)
        if not isinstance(keys, jax.Array):
            keys = to_global(np.asarray(keys, np.uint32), self.mesh)
        base = sampling_logits.base_key(seed, step)
        text = dataclasses.replace(batch, vision=None)
        inputs = (params, text, features_MND, keys, base)
        with jax.set_mesh(self.mesh):
            return self._loop(inputs, prompts // rows, per_shard, concurrent)

    def abstract_args(
        self,
        params: Mapping[str, jax.ShapeDtypeStruct],
        *,
        prompts: int,
        prompt_tokens: int,
        rows: int,
        merged_tokens: int | None,
    ) -> dict[str, tuple[Any, ...]]:
        """Positional arguments of the three functions as ShapeDtypeStructs, by their names.

        Args:
            params: with shardings (layout "sample").
            prompts, prompt_tokens, rows, merged_tokens: P, S, M and N/4 (None: text only).
        """
        _, concurrent = self._rows_per_shard(prompts, rows)
        A, S = prompts, prompt_tokens
        slot_prompts = A // rows * concurrent * self.shards
        along_rows = batch_sharding(self.mesh)

        def array(shape: tuple[int, ...], dtype: Any, sharding: Any = along_rows) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        state, rollout = jax.tree.map(
            lambda x, spec: array(x.shape, x.dtype, NamedSharding(self.mesh, spec)),
            jax.eval_shape(lambda: self._new_state(slot_prompts=slot_prompts, all_prompts=A, S=S)),
            self._specs,
        )
        ints = {"tokens": (A, S), "segment_ids": (A, S), "mrope": (A, 3, S), "vision_src": (A, S)}
        ints |= {"lengths": (A,), "next_pos": (A,)}
        batch = Batch(
            loss_mask=array((A, S), jnp.float32),
            valid=array((A,), jnp.bool_),
            **{name: array(shape, jnp.int32) for name, shape in ints.items()},
        )
        features = merged_tokens and array(
            (rows, merged_tokens, self.cfg.vision.out_hidden_size), self.cfg.dtype
        )
        rows_DC = array((self.shards, concurrent), jnp.int32, replicated(self.mesh))
        base = array((2,), jnp.uint32, replicated(self.mesh))
        keys = array((A,), jnp.uint32)
        return {
            "prefill": (params, batch, features, keys, base, state, rows_DC),
            "decode_segment": (params, *state),
            "collect": (rollout, state, rows_DC),
        }

    def _rows_per_shard(self, prompts: int, rows: int) -> tuple[int, int]:
        """Rows of a data shard: all, and at a time; ValueError where they do not divide."""
        _require(
            rows % self.shards == 0 and prompts % rows == 0,
            f"{prompts} prompts in {rows} rows do not divide over {self.shards} data shards",
        )
        per_shard = rows // self.shards
        return per_shard, min(self.sampling.concurrent_rows or per_shard, per_shard)

    def _loop(
        self, inputs: tuple[Any, ...], row_prompts: int, per_shard: int, concurrent: int
    ) -> Rollout[jax.Array]:
        """Fill the blocks, decode segment by segment, retire and refill until every row is done."""
        state, rollout = self._empty(
            slot_prompts=self.shards * concurrent * row_prompts,
            all_prompts=self.shards * per_shard * row_prompts,
            S=inputs[1].tokens.shape[1],
        )
        # running[d, c] is the row that data shard d has in its block c, or -1. Every process keeps
        # the same table, since the flags it follows from are replicated.
        running = np.full((self.shards, concurrent), -1, np.int32)
        upcoming = np.zeros(self.shards, np.int32)
        while True:
            while (fill := _next_fill(running, upcoming, per_shard)) is not None:
                state = self.prefill(*inputs, state, fill)
            slots, prompt_done = self.decode_segment(inputs[0], *state)
            state = (state[0], slots)
            done = np.asarray(prompt_done).reshape(*running.shape, -1).all(axis=-1) & (running >= 0)
            if done.any():
                rollout = self.collect(rollout, state, np.where(done, running, -1))
                running[done] = -1
            if (running < 0).all() and (upcoming >= per_shard).all():
                return rollout

    def _prefill(
        self,
        params: Params,
        batch: Batch[jax.Array],
        features_MND: jax.Array | None,
        keys_A: jax.Array,
        base: jax.Array,
        state: blocks.Arrays,
        rows_DC: jax.Array,
    ) -> blocks.Arrays:
        """Run one pending row of every shard and put it, with its first tokens, into a block.

        rows_DC: [data shards, C] int32: the row, at the block it goes to; -1 elsewhere.
        """
        prompts, slots = state
        row_prompts = prompts.next_pos.shape[0] // rows_DC.size
        (batch, keys_P), features = blocks.select_row(
            self.mesh, (batch, keys_A), features_MND, rows_DC, row_prompts
        )
        model = bind(self.cfg, params)
        h_PD, k, v = model.prefill(
            batch.tokens, batch.mrope, batch.segment_ids, batch.vision_src, features
        )
        logits_PV = model.logits(h_PD)
        shape = (h_PD.shape[0], self.sampling.group_size)
        keys_PG2 = sampling_logits.sample_keys(base, keys_P, shape[1])
        token_PG, sample_logp_PG, policy_logp_PG = self._sample(
            jnp.broadcast_to(logits_PV[:, None], (*shape, logits_PV.shape[-1])),
            keys_PG2,
            jnp.zeros(shape, jnp.int32),
        )
        valid_PG = jnp.broadcast_to(batch.valid[:, None], shape)
        finished_PG = self._is_eos(token_PG) | ~valid_PG
        length_PG = valid_PG.astype(jnp.int32)
        new_prompts = Prompts(
            k=k,
            v=v,
            segment_ids=batch.segment_ids,
            next_pos=batch.next_pos,
            start=jnp.full(shape[:1], slots.step),
            keys=keys_PG2,
        )
        first = dict(
            tokens=token_PG,
            sample_logp=sample_logp_PG,
            policy_logp=policy_logp_PG,
            last=token_PG,
            length=length_PG,
            done=finished_PG | (length_PG >= self.sampling.max_new_tokens),
            finished=finished_PG,
        )
        return blocks.place(self.mesh, self._specs[0], state, new_prompts, first, rows_DC)

    def _decode_segment(
        self, params: Params, prompts: Prompts[jax.Array], slots: Slots[jax.Array]
    ) -> tuple[Slots[jax.Array], jax.Array]:
        """Up to ``segment`` tokens of every slot that is not done; (slots, done prompts [P])."""

        def running(carry: Carry) -> jax.Array:
            return (carry[0] < self.sampling.segment) & ~jnp.all(carry[1].done)

        def advance(carry: Carry) -> Carry:
            return carry[0] + 1, self._decode_token(params, prompts, carry[1])

        _, slots = jax.lax.while_loop(running, advance, (jnp.int32(0), slots))
        return slots, jnp.all(slots.done, axis=1)

    def _decode_token(
        self, params: Params, prompts: Prompts[jax.Array], slots: Slots[jax.Array]
    ) -> Slots[jax.Array]:
        """Feed every slot's last token, sample its next one."""
        P, G, R = slots.tokens.shape
        column = slots.step % R
        fed_P = slots.step - prompts.start  # index of the token that is fed
        age_R = (column - jnp.arange(R)) % R  # steps since a column was written, 0: now
        visible_PGR = jnp.broadcast_to((age_R[None] <= fed_P[:, None])[:, None], (P, G, R))
        model = bind(self.cfg, params)
        h_PGD, (k, v) = model.decode(
            slots.last,
            jnp.broadcast_to((prompts.next_pos + fed_P)[:, None], (P, G)),
            (prompts.k, prompts.v),
            prompts.segment_ids,
            (slots.k, slots.v),
            column,
            visible_PGR,
        )
        index_PG = jnp.broadcast_to((fed_P + 1)[:, None], (P, G))
        token_PG, sample_logp_PG, policy_logp_PG = self._sample(
            model.logits(h_PGD), prompts.keys, index_PG
        )
        alive_PG = ~slots.done
        length_PG = slots.length + alive_PG
        finished_PG = slots.finished | (alive_PG & self._is_eos(token_PG))

        def store(ring_PGR: jax.Array, value_PG: jax.Array) -> jax.Array:
            at = (column + 1) % R
            now_PG1 = jax.lax.dynamic_slice_in_dim(ring_PGR, at, 1, axis=2)
            value_PG1 = jnp.where(alive_PG[..., None], value_PG[..., None], now_PG1)
            return jax.lax.dynamic_update_slice_in_dim(ring_PGR, value_PG1, at, axis=2)

        return Slots(
            k=k,
            v=v,
            tokens=store(slots.tokens, token_PG),
            sample_logp=store(slots.sample_logp, sample_logp_PG),
            policy_logp=store(slots.policy_logp, policy_logp_PG),
            last=jnp.where(alive_PG, token_PG, slots.last),
            length=length_PG,
            done=slots.done | finished_PG | (length_PG >= R),
            finished=finished_PG,
            step=slots.step + 1,
        )

    def _sample(
        self, logits_PGV: jax.Array, keys_PG2: jax.Array, index_PG: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``logits.sample`` for token number ``index_PG`` of every sample."""
        c = self.sampling
        return sampling_logits.sample(
            logits_PGV,
            sampling_logits.token_keys(keys_PG2, index_PG),
            temperature=c.temperature,
            top_k=c.top_k,
            top_p=c.top_p,
            min_p=c.min_p,
            forbidden_ids=c.forbidden_ids,
        )

    def _is_eos(self, token: jax.Array) -> jax.Array:
        return jnp.isin(token, jnp.array(self.sampling.eos_ids, jnp.int32))


def _next_fill(running: np.ndarray, upcoming: np.ndarray, per_shard: int) -> np.ndarray | None:
    """Assign to every shard its next row, if it has one and a free block; update the tables.

    Returns: rows_DC for ``prefill``, or None where nothing can be filled.
    """
    fill = np.full_like(running, -1)
    for shard, row in enumerate(upcoming):
        free = np.flatnonzero(running[shard] < 0)
        if row < per_shard and free.size:
            fill[shard, free[0]] = running[shard, free[0]] = row
            upcoming[shard] += 1
    return fill if (fill >= 0).any() else None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
