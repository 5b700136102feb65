r"""SRPO stage 2: GRPO with the reflection reward.

    python -m srpo_jax.train_grpo --config=configs/grpo.py:size=7b --workdir=runs/rl \
        --config.hf_dir=Qwen2.5-VL-7B-Instruct --config.init_from=runs/sft \
        --config.data.train=rl.jsonl --config.eval.file=held_out.jsonl

Reading guide: `train` sets up what `Stage` needs and runs the loop; one step is `Stage.step`:

    prompts -> image features -> completions -> verdicts on the host (`Stage.sample_round`)
            -> groups that teach something (groups.py) -> updates on the device (`Stage.update`)

Rewards, advantages, KL and the loss are computed inside of ``grpo_step`` (steps.py, grpo.py,
rewards.py, losses.py); rollout.py samples and grades; session.py restores, logs, evaluates, saves
and exports. A run that is stopped (SIGTERM, Ctrl-C) finishes its step, saves and leaves with exit
code 0; the same command goes on from there, bit for bit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.files import write_jsonl
from srpo_jax.evaluate import make_evaluator
from srpo_jax.learn import grpo, optim
from srpo_jax.learn.state import merge_params
from srpo_jax.learn.steps import make_encode_step, make_grpo_step, make_logp_step, micro_indices
from srpo_jax.model import sharding
from srpo_jax.rewards.answers import gold_problem
from srpo_jax.rewards.profiles import Profile, profile_named
from srpo_jax.run import setup
from srpo_jax.run.checkpoint import own_buffers
from srpo_jax.run.metrics import merge_metrics
from srpo_jax.run.pool import Pool, informative
from srpo_jax.run.rollout import (
    Generator,
    Round,
    Sampled,
    forbidden_ids,
    make_flops,
    make_score_step,
    make_token_text,
    rollout_rows,
    sampling_config,
    vision_work,
)
from srpo_jax.run.runtime import RunError
from srpo_jax.run.session import Session
from srpo_jax.structs import Batch, Params, TrainState, Verdict

SHOWN = ("reward/mean", "accuracy/first", "accuracy/final", "format_rate", "kl", "time/step")


def train(
    config: Any,
    workdir: str,
    *,
    profile: Profile | None = None,
    encode: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Run stage 2, or go on with it where it was stopped.

    Args:
        config: of configs/grpo.py.
        workdir: folder for checkpoints/, metrics.jsonl, rollouts/ and quarantine.jsonl.
        profile: reward design, instead of the configured one.
        encode: record -> Encoded prompt, instead of the configured one.

    Returns:
        the last row of metrics, with ``step``, ``finished`` (False where a signal stopped the run)
        and the last evaluation under "eval".
    """
    if profile is None:
        profile = profile_named(config.reward.profile)
    else:  # the run goes on under the same name only
        config.reward.profile = profile.name
    parts = setup.start(config)
    rows = setup.rows_per_shard(
        "data.global_batch_size",
        config.data.global_batch_size,
        config.data.prompts_per_row,
        parts.shards,
    )
    encode = encode or PromptEncoder(parts.processor, config.data.prompt)
    loader = open_data(config, workdir, parts, rows, encode)
    cfg = grpo_config(config, parts, rows, profile)

    optimizer = optim.make_optimizer(
        setup.optim_config(config.optim), config.steps * cfg.updates_per_rollout
    )
    run = Session(config, workdir, parts, optimizer, config.steps, SHOWN)
    stage = Stage(config, workdir, parts, cfg, optimizer, run, loader, encode)
    evaluator = None
    if config.eval.file:
        evaluator = make_evaluator(
            config, parts, stage.encode_step, stage.token_text, run.verifier, run.guard,
            profile=profile, prompt=config.data.prompt, encode=encode,
        )  # fmt: skip

    state = run.state
    del run.state  # the step donates it
    with run:
        if evaluator is not None and config.eval.at_start and run.step == 0:
            run.evaluate(state, evaluator)
        while run.step < config.steps:
            state = stage.step(state)
            if run.end_step(state, evaluator, stage.host_state):
                break
        return run.finish(state)


def open_data(
    config: Any, workdir: str, parts: setup.Parts, rows: int, encode: Callable[..., Any]
) -> Any:
    """The endless loader of prompts; records whose gold cannot be graded are set aside."""
    data = config.data
    source = setup.open_source("data.train", data.train, data.root)
    budgets = tuple(data.patch_budgets)
    setup.check_first_records(
        "data.train",
        source,
        encode,
        parts,
        tokens=data.prompt_tokens,
        patches=max(budgets, default=0),
        check=gold_problem,
    )
    return setup.open_loader(
        parts,
        source,
        encode,
        check_record=gold_problem,
        quarantine_path=f"{workdir}/quarantine.jsonl",
        global_batch_size=data.global_batch_size,
        rows_per_shard=rows,
        token_budget=data.prompt_tokens,
        patch_budgets=budgets,
        shuffle=data.shuffle,
        seed=config.seed,
        workers=data.workers,
        max_bad_share=data.max_bad_share,
    )


def grpo_config(config: Any, parts: setup.Parts, rows: int, profile: Profile) -> grpo.GrpoConfig:
    """`GrpoConfig` from the config; one micro-batch is one row of every data shard."""
    section = dict(config.grpo)
    for key in ("dual_clip", "tis_cap"):  # 0 is off
        section[key] = section[key] or None
    if config.sampling.group_size < 2:
        raise RunError(
            "sampling.group_size=1: an advantage compares at least 2 samples of a prompt"
        )
    data = config.data
    setup.check_updates(
        rows, section["updates_per_rollout"], data.global_batch_size, parts.shards,
        data.prompts_per_row,
    )  # fmt: skip
    return grpo.GrpoConfig(
        **section,
        micro_batches=rows,
        profile=profile,
        alpha=config.reward.alpha,
        temperature=config.sampling.temperature,
        forbidden_ids=forbidden_ids(parts),
        length_cap=config.sampling.max_new_tokens,
    )


class Stage:
    """One RL step and what it needs: compiled functions, the reference, pending groups."""

    def __init__(
        self,
        config: Any,
        workdir: str,
        parts: setup.Parts,
        cfg: grpo.GrpoConfig,
        optimizer: optim.Optimizer,
        run: Session,
        loader: Any,
        encode: Callable[..., Any],
    ):
        self.config, self.parts, self.cfg, self.run = config, parts, cfg, run
        self.loader, self.encode = loader, encode
        self.folder = Path(workdir) / "rollouts"
        self.trains_vision = any(path.startswith("vision/") for path in run.state.params)
        mesh, watch = parts.mesh, run.guard.watch
        self.encode_step = watch(make_encode_step(parts.model, mesh=mesh))
        self.logp_step = watch(make_logp_step(parts.model, cfg, mesh=mesh))
        self.score_step = watch(make_score_step(cfg, mesh))
        self.choose_old = watch(make_choose_old(mesh))
        self.grpo_step = watch(
            make_grpo_step(parts.model, cfg, optimizer, freeze=tuple(config.freeze), mesh=mesh)
        )
        section = config.sampling
        sampling = sampling_config(
            parts, section, group_size=section.group_size, temperature=section.temperature
        )
        self.token_text = make_token_text(parts)
        self.generator = Generator(
            parts, sampling, self.encode_step, self.token_text, run.verifier, cfg.profile,
            keep_pixels=self.trains_vision,
        )  # fmt: skip
        self.flops = make_flops(parts)
        self.reference = self.load_reference() if cfg.needs_reference else None
        self.pool = Pool()
        if run.host:
            loader.set_state(run.host["data"])
            self.pool.load(run.host["pending"], run.arrays)

    def load_reference(self) -> Params:
        """The trained part of the initial weights, in the dtype that log-probs are computed in."""
        dtype = self.config.model.dtype
        if self.run.step:
            params, _ = setup.load_weights(self.config, self.parts, dtype, self.run.origin)
            return {path: params[path] for path in self.run.state.params}
        return own_buffers({p: x.astype(dtype) for p, x in self.run.state.params.items()})

    def host_state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What the checkpoint keeps of this process: place in the data, pending groups."""
        pending, arrays = self.pool.state()
        return {"data": self.loader.get_state(), "pending": pending}, arrays

    # --- a step ---

    def step(self, state: TrainState) -> TrainState:
        """Sample, grade, update, write the rollouts, log."""
        run, timers = self.run, self.run.timers
        if self.config.filter.resample:
            rounds, inputs, mask_PGR = self.resample(state)
        else:
            one = self.sample_round(state, with_logps=True)
            rounds, inputs = [one], (one.sampled, one.verdict, one.weight, one.logps)
            mask_PGR = one.graded.rollout.completion_mask
        with timers("update"):
            state, updates = self.update(state, *inputs)
        run.step += 1
        with timers("write"):  # while the device is busy with the update
            self.write_rollouts(rounds)
        with timers("update"):
            updates = jax.device_get(updates)
        run.log(self.metrics(rounds, updates), **self.work(rounds, inputs[0].local, mask_PGR))
        return state

    def sample_round(self, state: TrainState, *, with_logps: bool) -> Round:
        """The next batch of prompts: completions, verdicts and, on the way, log-probs."""
        timers, parts = self.run.timers, self.parts
        with timers("data"):
            loaded = next(self.loader)
        bucket = setup.bucket_of(loaded.arrays)
        self.run.agree(bucket)
        with self.run.guard.step(f"sampling, {bucket}"):
            params = merge_params(state)
            with timers("sample"):
                sampled = self.generator.sample(
                    params,
                    self.generator.sampler_params(params),
                    loaded,
                    seed=self.config.seed,
                    step=self.run.step,
                )
            # Dispatched before grading: the host checks answers while the device computes.
            logps = (None, None)
            if with_logps:
                logps = self.logps(state, sampled, old=self.cfg.updates_per_rollout > 1)
            with timers("grade"):
                graded = self.generator.grade(sampled)
            with timers("logp"):
                jax.block_until_ready(logps)
            verdict = sharding.to_global(graded.verdict, parts.mesh)
            scores = self.score_step(verdict, sampled.rollout, sampled.batch.valid)
        weight = informative(graded.verdict, self.config.filter.low, self.config.filter.high)
        return Round(sampled, graded, verdict, weight, scores, logps)

    def logps(
        self, state: TrainState, sampled: Sampled, *, old: bool
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Log-probs [P, G, R] under the policy before the update and under the reference."""
        inputs = (sampled.batch, sampled.rollout, self.features_for(sampled))
        old_logp = self.logp_step(merge_params(state), *inputs)[0] if old else None
        ref_logp = None
        if self.reference is not None:
            ref_logp = self.logp_step(merge_params(state, self.reference), *inputs)[0]
        return old_logp, ref_logp

    def features_for(self, sampled: Sampled) -> jax.Array | None:
        """Image features as constants, unless the tower that makes them is trained."""
        return None if self.trains_vision else sampled.features

    def update(
        self,
        state: TrainState,
        sampled: Sampled,
        verdict: Verdict,
        weight: np.ndarray,
        logps: tuple[jax.Array | None, jax.Array | None],
    ) -> tuple[TrainState, list[dict[str, jax.Array]]]:
        """The updates of one rollout; one whose groups all have weight 0 is left out.

        (Its gradient would be zero, but Adam's momentum would still move the parameters.)
        """
        count = self.cfg.updates_per_rollout
        by_shard = weight.reshape(len(sharding.process_shards(self.parts.mesh)), count, -1)
        useful = setup.agree_any(by_shard.any(axis=(0, 2)))
        weight_P = sharding.to_global(weight, self.parts.mesh)
        done = []
        with self.run.guard.step(f"update, {sampled.bucket}"):
            for k in range(count):
                if useful[k]:
                    indices = micro_indices(self.cfg, k) if count > 1 else None
                    state, metrics = self.grpo_step(
                        state, sampled.batch, sampled.rollout, verdict, self.features_for(sampled),
                        *logps, weight_P, indices,
                    )  # fmt: skip
                    done.append(metrics)
        return state, done

    def resample(self, state: TrainState) -> tuple[list[Round], tuple[Any, ...], np.ndarray]:
        """Rounds until this step's batch is full of informative groups, then that batch.

        Returns:
            the rounds, the arguments of `update`, and the batch's completion mask on the host.
        """
        data, parts, rounds = self.config.data, self.parts, []
        per_row = data.prompts_per_row
        rows = self.cfg.micro_batches * len(sharding.process_shards(parts.mesh))
        while len(rounds) < self.config.filter.max_rounds:
            if rounds and not setup.agree_any([len(self.pool.groups) < rows * per_row])[0]:
                break
            rounds.append(self.sample_round(state, with_logps=False))
            self.pool.add(rounds[-1].sampled, rounds[-1].graded, rounds[-1].weight, self.run.step)
        taken = self.pool.take(
            self.run.step,
            self.encode,
            parts.processor,
            rows=rows,
            per_row=per_row,
            tokens=data.prompt_tokens,
            patch_budgets=tuple(data.patch_budgets),
            budget_index=setup.agree_maximum,
        )
        with self.run.guard.step(f"composing, {setup.bucket_of(taken.batch)}"):
            rollout, verdict, carried = sharding.to_global(
                (taken.rollout, taken.verdict, taken.carried), parts.mesh
            )
            batch, features = self.generator.encode(merge_params(state), taken.batch)
            nobody = np.zeros(0, np.int32)
            sampled = Sampled((), nobody, taken.batch, batch, features, rollout)
            with self.run.timers("logp"):
                old_logp, ref_logp = self.logps(state, sampled, old=True)
                # Groups carried over from an earlier step have that step's policy as the old one.
                old_logp = self.choose_old(carried, rollout.policy_logp, old_logp)
                jax.block_until_ready((old_logp, ref_logp))
        weight = taken.batch.valid.astype(np.float32)
        mask_PGR = taken.rollout.completion_mask
        return rounds, (sampled, verdict, weight, (old_logp, ref_logp)), mask_PGR

    # --- what is reported ---

    def metrics(
        self, rounds: list[Round], updates: list[dict[str, np.ndarray]]
    ) -> dict[str, float]:
        """One row: what the samples were like (before the filter), and what the updates did."""
        samples = merge_metrics([dict(jax.device_get(r.scores[2])) for r in rounds], "samples")
        for name in ("fix", "harm"):
            samples[f"{name}_rate"] = samples[f"{name}/count"] / max(samples[f"{name}/of"], 1.0)
        sampled_names = set(samples)
        learned = merge_metrics(updates, "tokens") if updates else {}
        kept = sum(float(r.weight[r.sampled.slots].sum()) for r in rounds)
        valid = sum(len(r.sampled.slots) for r in rounds)
        kept, valid, waiting = setup.add_up([kept, valid, len(self.pool.groups)])
        return {
            **samples,
            **{k: v for k, v in learned.items() if k not in sampled_names},
            "updates": len(updates),
            "filter/kept_share": kept / max(valid, 1.0),
            "filter/rounds": len(rounds),
            "filter/pending_groups": waiting,
        }

    def work(
        self, rounds: list[Round], learned: Batch, learned_mask_PGR: np.ndarray
    ) -> dict[str, float]:
        """Tokens sampled and model FLOPs of a step, this process's part."""
        passes = (self.cfg.updates_per_rollout > 1) + (self.reference is not None)
        # Log-probs are forward passes; the update is a forward and a backward pass.
        flops = (passes + 3) * self.forward_work(learned, learned_mask_PGR)[1]
        tokens = 0.0
        for one in rounds:
            mask_PGR = one.graded.rollout.completion_mask
            count, sampling = self.forward_work(one.sampled.local, mask_PGR)
            vision = self.flops.vision(*vision_work(one.sampled.local))
            tokens += count
            flops += sampling + vision * (3 if self.trains_vision else 1)
        return {"tokens": tokens, "flops": flops}

    def forward_work(self, batch: Batch, mask_PGR: np.ndarray) -> tuple[float, float]:
        """Tokens, and FLOPs of the decoder, for one pass over prompts and their completions."""
        prompts = batch.lengths[batch.valid].astype(np.float64)
        lengths = mask_PGR.sum(-1)[batch.valid].astype(np.float64)
        flops = self.flops.text(prompts) + self.flops.text(
            lengths, prefix=prompts[:, None], head_tokens=lengths.sum()
        )
        return float(prompts.sum() + lengths.sum()), flops

    def write_rollouts(self, rounds: list[Round]) -> None:
        """rollouts/<step>.jsonl: every completion with its verdict, reward terms, advantage."""
        every = self.config.rollouts.every
        if not every or self.run.step % every:
            return
        part = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        rows = [row for i, one in enumerate(rounds) for row in rollout_rows(one, self.run.step, i)]
        write_jsonl(self.folder / f"{self.run.step:06d}{part}.jsonl", rows)


def make_choose_old(mesh: Any) -> Callable[..., jax.Array]:
    """-> ``choose_old(carried_P, sampled_logp_PGR, logp_PGR)``: the former where carried."""

    def choose_old(carried_P, sampled_logp_PGR, logp_PGR):
        return jnp.where(carried_P[:, None, None], sampled_logp_PGR, logp_PGR)

    return jax.jit(choose_old, out_shardings=sharding.batch_sharding(mesh))


if __name__ == "__main__":
    setup.main(train)
