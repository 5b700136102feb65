"""The sampler: each prompt prefilled once, its G samples decoded against one prompt cache.

Reading guide. ``schedule.py`` decides on the host which sample runs in which slot; ``slots.py`` is
what the device holds of them. Two jitted functions do the work: ``prefill`` puts a prompt of every
data shard into a row and its samples into slots, ``decode_segment`` advances every slot by up to
``segment`` tokens and writes them to the result. ``Sampler.generate`` is the Python loop around
them. There is a ``decode_segment`` for each number of slots and each window of columns
(``schedule.widths``, ``schedule.windows``), compiled when it is first needed and under a name of
its own.

All slots write the same physical column (step modulo the window) of their own cache in every step,
so that the write is one slice update. A slot sees only the columns that it wrote since its sample
began, and the window is as long as the oldest sample. Rotary positions are applied before caching,
hence the physical order does not matter to attention.

With ``forks`` every sample of a family decodes the first round in a slot of its own, on the tokens
that its leader drew (``forks.py``): where a step costs what its weights cost, the copies are free.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from srpo_jax.model.attention import Sight
from srpo_jax.model.config import TOKEN_IDS, ModelConfig
from srpo_jax.model.qwen2_5_vl import PROMPT_SEGMENT, bind
from srpo_jax.model.sharding import batch_sharding, num_data_shards, replicated, to_global
from srpo_jax.sampling import logits as sampling_logits
from srpo_jax.sampling import slots as on_device
from srpo_jax.sampling.forks import CUT, Automaton, follow, of_leader
from srpo_jax.sampling.schedule import Fill, Move, Places, Schedule
from srpo_jax.sampling.slots import PER_SLOT, Prompts, Sizes, Slots
from srpo_jax.structs import Array, Batch, Params, Rollout

Drawn = dict[str, jax.Array]  # [segment, Z, J] of completions, sample_logp and policy_logp
Carry = tuple[jax.Array, Slots[jax.Array], Drawn]  # tokens decoded in a segment, what they changed


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    ``segment`` is the number of tokens decoded between two looks of the host at what is done (it
    looks earlier when it can fill or narrow); ``concurrent_rows`` the rows per data shard whose
    samples are decoded at a time (0: all), which bounds the cache: 2 * layers * kv_heads * head_dim
    * (2 S + G R) numbers per prompt, S instead of 2 S for all. ``forbidden_ids`` are never sampled
    and have no part in any log-probability. ``forks`` samples in a row are a family: to the end of
    the first answer their tokens and log-probs are those of its first one, then each draws its own.
    """

    max_new_tokens: int
    group_size: int = 1
    forks: int = 1
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
        for key in ("max_new_tokens", "group_size", "forks", "segment"):
            value = getattr(self, key)
            _require(value >= 1, f"{key}: must be at least 1, is {value}")
        _require(
            self.group_size % self.forks == 0,
            f"forks: must divide group_size={self.group_size}, is {self.forks}",
        )
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

    ``prefill`` and ``decode_segment`` are jitted and can be lowered from shapes alone
    (``abstract_args``). ``prefill`` compiles once per budget (P, M, S, N).
    ``idle_share`` is that of the last ``generate``: steps of slots without a live sample.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        sampling: SamplingConfig,
        mesh: Mesh,
        token_bytes: Sequence[bytes] = (),
    ):
        """ValueError where an EOS, pad or forbidden id lies outside the vocabulary.

        ``token_bytes`` of every id: where families part (``sampling.forks``); no first answer ever
        ends without them.
        """
        size = cfg.text.vocab_size
        ids = {*sampling.eos_ids, sampling.pad_id, *sampling.forbidden_ids}
        outside = sorted(i for i in ids if not 0 <= i < size)
        _require(not outside, f"token ids {outside} lie outside the vocabulary of {size} tokens")
        self.cfg, self.sampling, self.mesh = cfg, sampling, mesh
        self.automaton = Automaton.of_tokens(token_bytes if sampling.forks > 1 else (), size)
        self.shards, self.idle_share = num_data_shards(mesh), 0.0
        self.between_segments: Callable[[], None] = lambda: None  # may end `generate` by an error
        self._specs = on_device.specs(cfg, mesh)
        self._layout = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            self._specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        self._new_state = functools.partial(on_device.empty, cfg, sampling.pad_id)
        self._empty = jax.jit(self._new_state, static_argnames="sizes", out_shardings=self._layout)
        self.prefill: Any = jax.jit(
            self._prefill, donate_argnames="state", out_shardings=self._layout
        )
        self._late: dict[str, Any] = {}

    def decode_segment(self, width: int, window: int) -> Any:
        """The jitted ``_decode_segment`` of ``width`` slots and ``window`` columns."""
        return self._jitted(
            f"decode_{width}_slots_{window}_columns",
            functools.partial(self._decode_segment, window),
            donate_argnames="work",
            out_shardings=(self._layout[1:], replicated(self.mesh)),
        )

    def _jitted(self, name: str, function: Callable[..., Any], **options: Any) -> Any:
        """``function``, compiled once for ``name``: the sizes that it depends on beside a budget.

        Sizes may be first needed at any time. With a name of their own they do not look like a
        program that is compiled again.
        """
        if name not in self._late:
            setattr(function, "__name__", name)  # noqa: B010 (types do not know it of a partial)
            self._late[name] = jax.jit(function, **options)
        return self._late[name]

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
        limits_PG: np.ndarray | None = None,
    ) -> Rollout[jax.Array]:  # eight: the work, its random numbers, and two that are mostly None
        """Sample ``group_size`` completions of every prompt of ``batch``.

        Args:
            params: the decoder's, as ``learn.state.relayout`` gives them.
            batch: P prompts (global arrays); filler prompts (``valid`` False) get empty samples.
            features_MND: output of ``encode_images``, [M, N/4, D]; None for text only.
            keys: [P] uint32, a stable number per prompt. Token t of sample g of prompt p is drawn
                with fold_in(fold_in(fold_in(fold_in(key(seed), step), keys[p]), g), t), so that a
                sample depends neither on its neighbours nor on sizes, order or refilling.
            seed, step: non-negative integers.
            rows: M where features_MND does not tell; None means one row per data shard.
            limits_PG: int32, this process's part: tokens at which each sample ends, in
                [1, max_new_tokens]; None: max_new_tokens. With ``eos_ids=()`` nothing else ends it.
                A family's is that of its first sample.

        Returns: Rollout on device, axes [P, G, R], P sharded as in the batch. Log-probs are those
        of ``logits.sample`` and 0 after the end of a sample.

        Raises ValueError where P, M and the mesh do not divide, and for limits out of range.
        """
        if features_MND is not None:
            rows = features_MND.shape[0]
        schedule = self.schedule(batch.tokens.shape[0], self.shards if rows is None else rows)
        if not isinstance(keys, jax.Array):
            keys = to_global(np.asarray(keys, np.uint32), self.mesh)
        if limits_PG is not None:
            R, lowest, highest = self.sampling.max_new_tokens, limits_PG.min(), limits_PG.max()
            _require(1 <= lowest <= highest <= R, f"limits: {lowest} to {highest}, not 1 to {R}")
            limits_PG = to_global(np.asarray(limits_PG, np.int32), self.mesh)
        base = sampling_logits.base_key(seed, step)
        text = dataclasses.replace(batch, vision=None)
        with jax.set_mesh(self.mesh):
            return self._loop((params, text, features_MND, (keys, limits_PG), base), schedule)

    def abstract_args(
        self,
        params: Mapping[str, jax.ShapeDtypeStruct],
        *,
        prompts: int,
        prompt_tokens: int,
        rows: int,
        merged_tokens: int | None,
    ) -> dict[str, tuple[Any, ...]]:
        """Positional arguments of the two functions as ShapeDtypeStructs, by their names.

        Args:
            params: with shardings, as for ``generate``.
            prompts, prompt_tokens, rows, merged_tokens: P, S, M and N/4 (None: text only).
        """
        A, S = prompts, prompt_tokens
        sizes, along_rows = self._sizes(self.schedule(A, rows), S), batch_sharding(self.mesh)

        def array(shape: tuple[int, ...], dtype: Any, sharding: Any = along_rows) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        state = jax.tree.map(
            lambda x, sharding: array(x.shape, x.dtype, sharding),
            jax.eval_shape(lambda: self._new_state(sizes)),
            self._layout,
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
        tables = lambda *shapes: [array(s, jnp.int32, replicated(self.mesh)) for s in shapes]  # noqa: E731
        Z, C, J, G = sizes.Z, sizes.C, sizes.J, sizes.G
        fill, places = Fill(*tables((Z,), (Z,), (Z, G))), Places(*tables((Z, J), (Z, J), (Z, C, G)))
        own, base = (array((A,), jnp.uint32), None), array((2,), jnp.uint32, replicated(self.mesh))
        return {
            "prefill": (params, batch, features, own, base, state, fill),
            "decode_segment": (params, state[0], state[1:], places, *tables((2,))),
        }

    def schedule(self, prompts: int, rows: int) -> Schedule:
        """Of a batch; ValueError where it does not divide."""
        _require(
            rows % self.shards == 0 and prompts % rows == 0,
            f"{prompts} prompts in {rows} rows do not divide over {self.shards} data shards",
        )
        c, per_shard = self.sampling, prompts // self.shards
        concurrent = min(c.concurrent_rows * (prompts // rows) or per_shard, per_shard)
        return Schedule(
            self.shards, per_shard, concurrent, c.group_size, c.max_new_tokens, c.segment
        )

    def _sizes(self, schedule: Schedule, prompt_tokens: int) -> Sizes:
        return Sizes(
            Z=schedule.shards,
            C=schedule.C,
            J=schedule.J,
            A=schedule.shards * schedule.prompts,
            S=prompt_tokens,
            G=schedule.group,
            R=schedule.tokens,
        )

    def _loop(self, inputs: tuple[Any, ...], schedule: Schedule) -> Rollout[jax.Array]:
        """Fill the slots and decode segment by segment until every sample is done."""
        state = self._empty(sizes=self._sizes(schedule, inputs[1].tokens.shape[1]))
        while not schedule.over:
            while (fill := schedule.next_fill()) is not None:
                state = self.prefill(*inputs, state, fill)
            prompts, slots, rollout = state
            if (to := schedule.arrange()) is not None:
                slots = self._moved(slots, to)
            decode = self.decode_segment(schedule.width, schedule.window)
            work, look = decode(
                inputs[0], prompts, (slots, rollout), schedule.places(), schedule.limits()
            )
            state = (prompts, *work)
            # Every process keeps the same schedule, since what it looks at is replicated.
            length_ZJ, done_ZJ, step = (np.asarray(x) for x in look)
            schedule.look(length_ZJ, done_ZJ, int(step))
            self.between_segments()
        self.idle_share = schedule.idle_share
        return state[2]

    def _moved(self, slots: Slots[jax.Array], to: Move) -> Slots[jax.Array]:
        """One array after the other, so that no more than one is held twice."""
        move = self._jitted(
            f"move_{slots.done.shape[1]}_to_{to.slot_ZJ.shape[1]}_slots",
            functools.partial(on_device.move, self.mesh, self._specs[1].rings[0][0]),
        )

        def moved(x: jax.Array) -> jax.Array:
            new = move(x, to)
            x.delete()
            return new

        fields = {f: moved(getattr(slots, f)) for f in PER_SLOT}
        return dataclasses.replace(slots, rings=jax.tree.map(moved, slots.rings), **fields)

    def _prefill(
        self,
        params: Params,
        batch: Batch[jax.Array],
        features_MND: jax.Array | None,
        own: tuple[jax.Array, jax.Array | None],
        base: jax.Array,
        state: on_device.Arrays,
        fill: Fill[jax.Array],
    ) -> on_device.Arrays:
        """Run a prompt of every shard and put it into a row, its first tokens into slots.

        ``own``: the prompts' keys [A] and the limits [A, G] of their samples (None: the budget).
        """
        (batch, (keys_Z, limit_ZG)), features = on_device.select(
            self.mesh, (batch, own), features_MND, fill.prompt_Z
        )
        model = bind(self.cfg, params, "decoder")
        h_ZD, caches = model.prefill(
            batch.tokens, batch.mrope, batch.segment_ids, batch.vision_src, features
        )
        logits_ZV = model.logits(h_ZD)
        shape = (h_ZD.shape[0], self.sampling.group_size)
        keys_ZG2 = sampling_logits.sample_keys(base, keys_Z, shape[1])
        token_ZG, sample_logp_ZG, policy_logp_ZG = self._sample(
            jnp.broadcast_to(logits_ZV[:, None], (*shape, logits_ZV.shape[-1])),
            keys_ZG2,
            jnp.zeros(shape, jnp.int32),
        )
        if limit_ZG is None:
            limit_ZG = jnp.full(shape, self.sampling.max_new_tokens, jnp.int32)
        tag_ZG = jnp.full(shape, CUT, jnp.int32)
        if (forks := self.sampling.forks) > 1:
            shared = (token_ZG, sample_logp_ZG, policy_logp_ZG, limit_ZG)
            token_ZG, sample_logp_ZG, policy_logp_ZG, limit_ZG = (
                of_leader(x, forks) for x in shared
            )
            tag_ZG = self.automaton.after(jnp.zeros_like(tag_ZG), token_ZG)
        valid_ZG = jnp.broadcast_to(batch.valid[:, None], shape)
        finished_ZG = self._is_eos(token_ZG) | ~valid_ZG
        length_ZG = valid_ZG.astype(jnp.int32)
        first = dict(
            keys=keys_ZG2,
            next_pos=jnp.broadcast_to(batch.next_pos[:, None], shape),
            last=token_ZG,
            length=length_ZG,
            limit=limit_ZG,
            tag=tag_ZG,
            done=finished_ZG | (length_ZG >= limit_ZG),
            finished=finished_ZG,
            sample_logp=sample_logp_ZG,
            policy_logp=policy_logp_ZG,
            valid=valid_ZG,
        )
        new = Prompts(caches=caches, segment_ids=batch.segment_ids)
        return on_device.place(self.mesh, self._specs, state, new, first, fill)

    def _decode_segment(
        self,
        window: int,
        params: Params,
        prompts: Prompts[jax.Array],
        work: tuple[Slots[jax.Array], Rollout[jax.Array]],
        places: Places[jax.Array],
        limits: jax.Array,
    ) -> tuple[Any, Any]:
        """Up to ``limits[0]`` tokens of every sample that is not done.

        Args:
            window: columns of the rings that are used.
            work: the slots and the result, which come back.
            limits: see ``Schedule.limits``.

        Returns: work, and what the host looks at: (tokens of each sample, done, steps).
        """
        slots, rollout = work
        before_ZJ = slots.length
        visible_ZCS = prompts.segment_ids == PROMPT_SEGMENT

        def running(carry: Carry) -> jax.Array:
            live_Z = jnp.sum(~carry[1].done & (places.sample_ZJ >= 0), axis=1)
            return (carry[0] < limits[0]) & (jnp.max(live_Z) > limits[1])

        def advance(carry: Carry) -> Carry:
            count, slots, drawn = carry
            # Steps since each column was written.
            age_W = (slots.step % window - jnp.arange(window)) % window
            own_ZJW = age_W[None, None] < slots.length[..., None]
            sight = Sight(visible_ZCS, own_ZJW, places.slot_ZCG, places.place_ZJ)
            slots, token = self._decode_token(params, prompts, slots, sight)
            drawn = {f: drawn[f].at[count].set(token[f]) for f in drawn}
            return count + 1, slots, drawn

        zeros = functools.partial(jnp.zeros, (self.sampling.segment, *before_ZJ.shape))
        drawn = dict(completions=zeros(jnp.int32), sample_logp=zeros(), policy_logp=zeros())
        _, slots, drawn = jax.lax.while_loop(running, advance, (jnp.int32(0), slots, drawn))
        rollout = on_device.record(self.mesh, rollout, drawn, places.sample_ZJ, before_ZJ, slots)
        return (slots, rollout), (slots.length, slots.done, slots.step)

    def _decode_token(
        self, params: Params, prompts: Prompts[jax.Array], slots: Slots[jax.Array], sight: Sight
    ) -> tuple[Slots[jax.Array], Drawn]:
        """Feed every slot's last token, sample its next one."""
        model = bind(self.cfg, params, "decoder")
        h_ZJD, rings = model.decode(
            slots.last,
            slots.next_pos + slots.length - 1,
            prompts.caches,
            slots.rings,
            slots.step % sight.own_ZJW.shape[-1],
            sight,
        )
        drawn = self._sample(model.logits(h_ZJD), slots.keys, slots.length)
        live_ZJ, tag_ZJ = ~slots.done, slots.tag
        if (forks := self.sampling.forks) > 1:
            drawn = follow(drawn, tag_ZJ, sight.place_ZJ, sight.slot_ZCG, forks)
            tag_ZJ = jnp.where(live_ZJ, self.automaton.after(tag_ZJ, drawn[0]), tag_ZJ)
        token_ZJ, sample_logp_ZJ, policy_logp_ZJ = drawn
        length_ZJ = slots.length + live_ZJ
        finished_ZJ = slots.finished | (live_ZJ & self._is_eos(token_ZJ))
        slots = dataclasses.replace(
            slots,
            rings=rings,
            last=jnp.where(live_ZJ, token_ZJ, slots.last),
            length=length_ZJ,
            done=slots.done | finished_ZJ | (length_ZJ >= slots.limit),
            finished=finished_ZJ,
            tag=tag_ZJ,
            step=slots.step + 1,
        )
        drawn = dict(completions=token_ZJ, sample_logp=sample_logp_ZJ, policy_logp=policy_logp_ZJ)
        return slots, drawn

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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
