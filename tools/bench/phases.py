"""The phases that run on the device: vision tower, prefill, decode, log-probs, update, a step."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.lanes import LaneBudgets, pack, pair_cost, slots_and_tokens
from srpo_jax.learn.optim import OptimConfig, make_optimizer
from srpo_jax.learn.state import init_state, merge_params, relayout
from srpo_jax.learn.steps import grpo_update, make_encode_step, make_grpo_steps, make_logp_step
from srpo_jax.model import sharding
from srpo_jax.run.metrics import Timers
from srpo_jax.run.rollout import vision_work
from srpo_jax.sampling.sampler import Sampler, SamplingConfig
from srpo_jax.structs import Batch, Experience, Lanes, Params, Rollout, TrainState, Verdict
from tools.bench.measure import Phase
from tools.bench.workload import Workload

MANY_STEPS = 10**6  # of the learning-rate schedule


class Bench:
    """The arrays and programs that the phases share; each is made when it is first asked for."""

    def __init__(self, work: Workload, state: TrainState | None = None):
        """``state``: one of the same model, to be shared; None makes one."""
        self.work, self.timers, self.prefill_seconds = work, Timers(), 0.0
        self.optimizer = make_optimizer(OptimConfig(), MANY_STEPS)
        self.config = GrpoConfig(
            micro_batches=work.layout.rows,
            length_cap=work.max_new_tokens,
            forbidden_ids=work.processor.forbidden_ids,
        )
        if state is not None:
            self.state = state

    # --- what is worked on ---

    @functools.cached_property
    def state(self) -> TrainState:
        """A fresh train state; an update replaces it."""
        work = self.work
        return init_state(work.model, self.optimizer, mesh=work.mesh, params=work.params())

    @functools.cached_property
    def host_batch(self) -> Batch[np.ndarray]:
        """The prompts, on the host."""
        return self.work.batch()

    @functools.cached_property
    def batch(self) -> Batch[jax.Array]:
        """The prompts with their pixels."""
        return sharding.to_global(self.host_batch, self.work.mesh)

    @functools.cached_property
    def features(self) -> jax.Array | None:
        """Features of the prompts' images."""
        return self.encode()

    @functools.cached_property
    def host_lanes(self) -> list[Lanes[np.ndarray]]:
        """The completions, packed as the trainer packs them."""
        work = self.work
        budgets = LaneBudgets(
            work.layout,
            group=work.lengths_PG.shape[1],
            prompt_tokens=work.prompt_tokens,
            completion_tokens=work.max_new_tokens,
            pair_cost=pair_cost(work.model.text),
            spread=work.layout.shards > 1,  # as training does it while the tower is frozen
        )
        (packed,) = pack(self.host_batch.lengths, work.lengths_PG, budgets)
        return [lanes for lanes in packed if lanes is not None]

    @functools.cached_property
    def lanes(self) -> list[Lanes[jax.Array]]:
        """The same on the mesh."""
        return [sharding.to_global(lanes, self.work.mesh) for lanes in self.host_lanes]

    @functools.cached_property
    def text_flops(self) -> float:
        """Forward FLOPs of the decoder over every prompt once and its completions after it."""
        prompts, lengths = self.host_batch.lengths, self.work.lengths_PG
        flops, seen = self.work.flops, np.asarray(prompts)[:, None]
        return flops.text(prompts) + flops.text(lengths, prefix=seen, head_tokens=lengths.sum())

    @functools.cached_property
    def experience(self) -> Experience[jax.Array]:
        """Completions of the wanted lengths with made-up verdicts: half of each group is right."""
        work = self.work
        tokens, mask = work.completions()
        shape = work.lengths_PG.shape
        right, yes = np.broadcast_to(np.arange(shape[1]) % 2 == 0, shape), np.ones(shape, bool)
        blocks, logp = np.zeros((*shape, 5), np.int32), np.where(mask, -1.0, 0).astype(np.float32)
        flags = {f.name: yes for f in dataclasses.fields(Verdict) if f.name != "own"}
        flags |= {"block_tokens": blocks}
        flags |= dict.fromkeys(("first_correct", "final_correct"), right)
        flags |= dict.fromkeys(("stated", "first_tokens", "first_end"), yes.astype(np.int32))
        verdict = Verdict(**flags | {"total_tokens": work.lengths_PG})
        rollout = Rollout(tokens, mask, yes, logp, logp)
        batch = dataclasses.replace(self.host_batch, vision=None)
        found = sharding.to_global(Experience(batch, rollout, verdict), work.mesh)
        return dataclasses.replace(found, features=self.features)

    # --- programs ---

    @functools.cached_property
    def encode_step(self) -> Callable[..., jax.Array]:
        """The vision tower."""
        return make_encode_step(self.work.model, mesh=self.work.mesh)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """A sampler whose completions end at their limits alone, with a clock around prefill."""
        work = self.work
        sampling = SamplingConfig(
            work.max_new_tokens,
            work.lengths_PG.shape[1],
            eos_ids=(),
            pad_id=work.processor.pad_id,
            forbidden_ids=work.processor.forbidden_ids,
        )
        sampler = Sampler(work.model, sampling, work.mesh)
        prefill = sampler.prefill

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            done = jax.block_until_ready(prefill(*args))
            self.prefill_seconds += time.perf_counter() - start
            return done

        sampler.prefill = timed
        return sampler

    @functools.cached_property
    def steps(self) -> Any:
        """The parts of an update."""
        return make_grpo_steps(self.work.model, self.config, self.optimizer, mesh=self.work.mesh)

    @functools.cached_property
    def logp_step(self) -> Callable[..., jax.Array]:
        """The log-probs of a micro-batch."""
        return make_logp_step(self.work.model, self.config, mesh=self.work.mesh)

    # --- what a step does ---

    def encode(self) -> jax.Array | None:
        """Image features."""
        if self.batch.vision is None:
            return None
        return self.encode_step(merge_params(self.state), self.batch.vision)

    def sampling_params(self) -> Params:
        """The parameters as the sampler takes them."""
        model = self.work.model
        return relayout(
            merge_params(self.state), self.work.mesh, dtype=model.dtype, lora=model.lora
        )

    def generate(self, params: Params, limits_PG: np.ndarray) -> Rollout[jax.Array]:
        """Completions of these lengths; ``prefill_seconds`` says how long prefill took."""
        keys, rows = np.arange(len(limits_PG), dtype=np.uint32), len(limits_PG)
        self.prefill_seconds = 0.0
        return self.sampler.generate(
            params,
            self.batch,
            self.features,
            keys,
            seed=0,
            step=0,
            rows=rows // self.work.prompts_per_row,
            limits_PG=limits_PG,
        )

    def learn(self, experience: Experience[jax.Array]) -> dict[str, jax.Array]:
        """One update with all micro-batches -> metrics."""
        self.state, metrics = grpo_update(self.steps, self.state, experience, self.lanes)
        return metrics

    # --- phases ---

    def vision(self) -> Phase:
        """The tower over the images of all prompts."""
        if self.host_batch.vision is None:
            raise ValueError("vision: --image 0x0 leaves nothing to encode")
        work = vision_work(self.host_batch)
        slots = float(np.prod(self.host_batch.vision.patches.shape[:2]))
        flops = self.work.flops.vision(*work)
        return Phase(self.encode, "patches", work[0], flops, padding=lambda: 1 - work[0] / slots)

    def prefill(self) -> Phase:
        """Prompts to caches and first tokens: a rollout of one token."""
        work, params = self.work, self.sampling_params()
        one, lengths = np.ones_like(work.lengths_PG), self.host_batch.lengths
        needed = float(lengths.sum())
        return Phase(
            lambda: self.generate(params, one),
            "prompt tokens",
            needed,
            work.flops.text(lengths, head_tokens=len(lengths)),
            len(lengths) / work.layout.shards * bytes_per_device(params),
            padding=lambda: 1 - needed / (len(lengths) * work.prompt_tokens),
        )

    def decode(self) -> Phase:
        """The tokens after the first one of every sample."""
        work, params = self.work, self.sampling_params()
        lengths_PG, prompts_P = work.lengths_PG.astype(np.float64), self.host_batch.lengths
        text, flops = work.model.text, work.flops
        # A step reads the weights once, a prompt's cache for its whole group, each sample's own.
        steps = float(lengths_PG.max() - 1)
        seen = (lengths_PG.max(1) * prompts_P).sum() + (lengths_PG**2).sum() / 2
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        cache *= seen * jnp.dtype(work.model.dtype).itemsize / work.layout.shards
        needed = float((lengths_PG - 1).sum())
        prefix = np.asarray(prompts_P)[:, None] + 1
        return Phase(
            lambda: self.generate(params, work.lengths_PG),
            "answer tokens",
            needed,
            flops.text(lengths_PG - 1, prefix=prefix, head_tokens=needed),
            steps * bytes_per_device(params) + cache,
            padding=lambda: self.sampler.idle_share,
            aside=lambda: self.prefill_seconds,
        )

    def logprobs(self) -> Phase:
        """Log-probs of all completions under one policy."""

        def run() -> jax.Array:
            x, params = self.experience, merge_params(self.state)
            logp = jnp.zeros_like(x.rollout.sample_logp)
            for lanes in self.lanes:
                logp = self.logp_step(logp, params, x.batch, x.rollout, x.features, lanes)
            return logp

        return self.packed(run, passes=1)

    def update(self) -> Phase:
        """Forward and backward pass of all micro-batches, and the optimizer."""
        return self.packed(lambda: self.learn(self.experience), passes=3)

    def packed(self, run: Callable[[], Any], *, passes: int) -> Phase:
        """A phase that runs over the lanes; a backward pass counts as two."""
        slots, tokens = slots_and_tokens(self.host_lanes)
        flops = passes * self.text_flops
        return Phase(run, "tokens", tokens, flops, padding=lambda: 1 - tokens / slots)

    def step(self) -> Phase:
        """Images, a rollout and one update on it, as an on-policy step does them; no grading."""

        def run() -> Any:
            self.timers.take()
            with self.timers("vision"):
                self.features = jax.block_until_ready(self.encode())
            with self.timers("rollout"):
                rollout = self.generate(self.sampling_params(), self.work.lengths_PG)
            with self.timers("update"):
                changed = {"rollout": rollout, "features": self.features}
                return jax.block_until_ready(
                    self.learn(dataclasses.replace(self.experience, **changed))
                )

        def parts() -> dict[str, float]:
            spent = self.timers.take()
            return {name: spent[f"time/{name}"] for name in ("vision", "rollout", "update")}

        vision = self.work.flops.vision(*vision_work(self.host_batch))
        needed = float(self.work.lengths_PG.sum())
        return Phase(run, "answer tokens", needed, 4 * self.text_flops + vision, parts=parts)


def bytes_per_device(params: Params) -> int:
    """Bytes of the parameters on one device."""
    shapes = ((x.sharding.shard_shape(x.shape), jnp.dtype(x.dtype)) for x in params.values())
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes)


PHASES: dict[str, Callable[[Bench], Phase]] = {
    "vision": Bench.vision,
    "prefill": Bench.prefill,
    "decode": Bench.decode,
    "logprobs": Bench.logprobs,
    "update": Bench.update,
    "step": Bench.step,
}
