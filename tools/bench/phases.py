"""The phases that run on the device: vision tower, prefill, decode, log-probs, update, a step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.lanes import Budgets, pack, pair_cost, slots_and_tokens
from srpo_jax.learn.optim import OptimConfig, make_optimizer
from srpo_jax.learn.state import init_state, merge_params, relayout
from srpo_jax.learn.steps import grpo_update, make_encode_step, make_grpo_steps, make_logp_step
from srpo_jax.model import sharding
from srpo_jax.run.rollout import vision_work
from srpo_jax.sampling.sampler import Sampler, SamplingConfig
from srpo_jax.structs import Batch, Experience, Lanes, Params, Rollout, TrainState, Verdict
from tools.bench.measure import Phase
from tools.bench.workload import Workload, param_bytes


class Bench:
    """The arrays and programs that the phases share; each is made when it is first asked for."""

    def __init__(self, work: Workload):
        self.work = work
        self.optimizer = make_optimizer(OptimConfig(lr=1e-6), 1000)
        micro_batches = work.rows // sharding.num_data_shards(work.mesh)
        self.config = GrpoConfig(micro_batches=micro_batches, length_cap=work.max_new_tokens)

    # --- what is worked on ---

    @functools.cached_property
    def state(self) -> TrainState:
        """A fresh train state; an update replaces it."""
        work = self.work
        params = work.params(work.model.param_dtype)
        return init_state(work.model, self.optimizer, mesh=work.mesh, params=params)

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
        if self.batch.vision is None:
            return None
        return self.encode_step(merge_params(self.state), self.batch.vision)

    @functools.cached_property
    def lanes(self) -> list[Lanes[jax.Array]]:
        """The completions, packed as the trainer packs them."""
        work = self.work
        packed = pack(self.host_batch.lengths, work.lengths_PG, self.budgets)
        return [sharding.to_global(lanes, work.mesh) for lanes in packed if lanes is not None]

    @property
    def text_flops(self) -> float:
        """Forward FLOPs of the decoder over all prompts and completions."""
        return self.work.text_flops(np.asarray(self.host_batch.lengths, np.float64))

    @property
    def budgets(self) -> Budgets:
        """What the packing has to hold."""
        work = self.work
        return Budgets(
            prompts_per_row=work.prompts_per_row,
            group=work.group_size,
            prompt_tokens=work.prompt_tokens,
            completion_tokens=work.max_new_tokens,
            micro_batches=self.config.micro_batches,
            pair_cost=pair_cost(work.model.text),
        )

    @functools.cached_property
    def experience(self) -> Experience[jax.Array]:
        """Completions of the wanted lengths with made-up verdicts: half of each group is right."""
        work = self.work
        tokens, mask = work.completions()
        shape = mask.shape[:2]
        right = np.broadcast_to(np.arange(work.group_size) % 2 == 0, shape)
        zeros, logp = np.zeros(shape, np.int32), np.where(mask, -1.0, 0.0).astype(np.float32)
        yes = np.ones(shape, bool)
        verdict = Verdict(
            right, right, yes, yes, yes, yes, zeros + 1, work.lengths_PG,
            np.zeros((*shape, 5), np.int32),
        )  # fmt: skip
        rollout = Rollout(tokens, mask, yes, logp, logp)
        batch = dataclasses.replace(self.host_batch, vision=None)
        local = Experience(batch, rollout, verdict)
        found = sharding.to_global(local, work.mesh)
        return dataclasses.replace(found, features=self.features)

    # --- programs ---

    @functools.cached_property
    def encode_step(self) -> Callable[..., jax.Array]:
        """The vision tower."""
        return make_encode_step(self.work.model, mesh=self.work.mesh)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The sampler."""
        work = self.work
        return Sampler(work.model, SamplingConfig(work.max_new_tokens, work.group_size), work.mesh)

    @functools.cached_property
    def steps(self) -> Any:
        """The parts of an update."""
        return make_grpo_steps(self.work.model, self.config, self.optimizer, mesh=self.work.mesh)

    @functools.cached_property
    def logp_step(self) -> Callable[..., jax.Array]:
        """The log-probs of a micro-batch."""
        return make_logp_step(self.work.model, self.config, mesh=self.work.mesh)

    def sampling_params(self) -> Params:
        """The parameters as the sampler takes them."""
        mesh, dtype = self.work.mesh, self.work.model.dtype
        return relayout(merge_params(self.state), mesh, layout="sample", dtype=dtype)

    def generate(self, params: Params, limits_PG: np.ndarray) -> Rollout[jax.Array]:
        """Completions of at most these lengths."""
        keys, rows = np.arange(self.work.prompts, dtype=np.uint32), self.work.rows
        return self.sampler.generate(
            params, self.batch, self.features, keys, seed=0, step=0, limits=limits_PG, rows=rows
        )

    def update(self, experience: Experience[jax.Array]) -> Any:
        """One update with all micro-batches."""
        self.state, metrics = grpo_update(self.steps, self.state, experience, self.lanes)
        return metrics

    def logps(self) -> jax.Array:
        """Log-probs of all completions."""
        x, params = self.experience, merge_params(self.state)
        logp = jnp.zeros_like(x.rollout.sample_logp)
        for lanes in self.lanes:
            logp = self.logp_step(logp, params, x.batch, x.rollout, x.features, lanes)
        return logp

    # --- phases ---

    def vision(self) -> Phase:
        """The tower over the images of all prompts."""
        if self.host_batch.vision is None:
            raise ValueError("vision: --image 0x0 leaves nothing to encode")
        patches, windows, frames = vision_work(self.host_batch)
        return Phase(
            "vision",
            lambda: self.encode_step(merge_params(self.state), self.batch.vision),
            unit="patches",
            needed=patches,
            slots=float(np.prod(self.host_batch.vision.patches.shape[:2])),
            flops=self.work.flops.vision(patches, windows, frames),
        )

    def prefill(self) -> Phase:
        """Prompts to caches and first tokens: a rollout of one token."""
        work = self.work
        params, one = self.sampling_params(), np.ones_like(work.lengths_PG)
        prompts = self.host_batch.lengths
        return Phase(
            "prefill",
            lambda: self.generate(params, one),
            unit="tokens",
            needed=float(prompts.sum()),
            slots=float(work.prompts * work.prompt_tokens),
            flops=work.flops.text(prompts, head_tokens=work.prompts),
        )

    def decode(self) -> Phase:
        """A rollout less its prefill is what decode costs; this is the whole rollout."""
        work = self.work
        params, lengths = self.sampling_params(), work.lengths_PG
        text = work.model.text
        per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        per_token *= jnp.dtype(work.model.dtype).itemsize
        # Every token-step reads the weights once; a prompt's cache serves its whole group.
        steps, shards = int(lengths.max()), sharding.num_data_shards(work.mesh)
        cache = float((lengths.max(1) * self.host_batch.lengths).sum())
        cache += float((lengths.astype(np.float64) ** 2).sum() / 2)
        return Phase(
            "decode",
            lambda: self.generate(params, lengths),
            unit="tokens",
            needed=work.tokens,
            slots=float(steps * lengths.size),
            flops=self.text_flops,
            bytes=steps * param_bytes(params) + per_token * cache / shards,
        )

    def logprobs(self) -> Phase:
        """Log-probs of all completions under one policy."""
        slots, needed = slots_and_tokens(jax.device_get(self.lanes))
        return Phase("logprobs", self.logps, "tokens", needed, slots, flops=self.text_flops)

    def update_phase(self) -> Phase:
        """Forward and backward pass of all micro-batches, and the optimizer."""
        slots, needed = slots_and_tokens(jax.device_get(self.lanes))
        return Phase(
            "update",
            lambda: self.update(self.experience),
            unit="tokens",
            needed=needed,
            slots=slots,
            flops=3 * self.text_flops,
        )

    def step(self) -> Phase:
        """Images, a rollout and one update on it, as an on-policy step does them (no grading)."""
        work, verdict = self.work, self.experience.verdict
        vision = work.flops.vision(*vision_work(self.host_batch))

        def run() -> Any:
            params = merge_params(self.state)
            if self.batch.vision is not None:
                self.features = self.encode_step(params, self.batch.vision)
            rollout = self.generate(self.sampling_params(), work.lengths_PG)
            experience = dataclasses.replace(
                self.experience, rollout=rollout, verdict=verdict, features=self.features
            )
            return self.update(experience)

        return Phase(
            "step",
            run,
            unit="tokens",
            needed=work.tokens,
            flops=4 * self.text_flops + vision,
        )


PHASES: dict[str, Callable[[Bench], Phase]] = {
    "vision": Bench.vision,
    "prefill": Bench.prefill,
    "decode": Bench.decode,
    "logprobs": Bench.logprobs,
    "update": Bench.update_phase,
    "step": Bench.step,
}
