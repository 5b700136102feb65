r"""SRPO stage 2: GRPO with the reflection reward.

    python -m srpo_jax.train_grpo --config=configs/grpo.py:size=7b --workdir=runs/rl \
        --config.hf_dir=Qwen2.5-VL-7B-Instruct --config.init_from=runs/sft \
        --config.data.train=rl.jsonl --config.eval.file=held_out.jsonl

Reading guide: `train` sets up what `Stage` needs and hands its `step` to the session's loop:

    prompts -> image features -> completions -> verdicts on the host (`Stage.sample_round`)
            -> groups that teach something (run/pool.py) -> updates on the device (`Stage.update`)

Rewards, advantages, KL and the loss are computed inside of jitted steps (learn/steps.py,
learn/lane_tokens.py, learn/grpo.py, rewards/profiles.py); run/rollout.py samples and grades;
run/session.py owns the train state, restores, logs, evaluates, saves and exports. A run that is
stopped (SIGTERM, Ctrl-C) finishes its step or gives it up, saves and leaves with exit code 75; the
same command goes on from there, bit for bit.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.data.batching import Layout
from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.loader import LoadedBatch, Loader
from srpo_jax.evaluate import Evaluator
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.lanes import LaneBudgets, pack, pair_cost
from srpo_jax.learn.optim import Optimizer, make_optimizer, trains_vision
from srpo_jax.learn.perception import make_mask_step
from srpo_jax.learn.state import merge_params
from srpo_jax.learn.steps import GrpoSteps, grpo_update, make_grpo_steps, make_logp_step
from srpo_jax.model import sharding
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.remote.reward import open_judge
from srpo_jax.rewards.answers import gold_problem
from srpo_jax.rewards.profiles import Profile
from srpo_jax.run import processes
from srpo_jax.run.command import main
from srpo_jax.run.diagnostics import added_up, counts_of
from srpo_jax.run.feed import Ahead, Encode, bucket_of, open_training
from srpo_jax.run.late import Stored, Waiting
from srpo_jax.run.lesson import (
    Lesson,
    Packed,
    lengths_to_learn,
    row_of,
    work_of,
)
from srpo_jax.run.own import OwnTerms
from srpo_jax.run.parts import Parts, start
from srpo_jax.run.pool import Pool, informative
from srpo_jax.run.preflight import before_training, check_sampler, truncation_note
from srpo_jax.run.reference import Reference
from srpo_jax.run.resume import allows
from srpo_jax.run.rollout import (
    Drawer,
    Generator,
    Graded,
    Round,
    Sampled,
    examples_of,
    make_score_step,
    write_rollouts,
)
from srpo_jax.run.sections import GrpoSettings
from srpo_jax.run.session import Done, Session
from srpo_jax.run.settings import batch_layout, fit_rows, grpo_config, grpo_settings
from srpo_jax.run.trackers import Example
from srpo_jax.structs import Batch, Experience, Lanes, Params, TrainState

SHOWN = ("reward/mean", "accuracy/first", "accuracy/final", "format_rate", "kl", "time/step")
Logps = tuple[jax.Array | None, jax.Array | None]  # [P, G, R] before the update, of the reference


def train(
    config: Any,
    workdir: str,
    *,
    profile: Profile | None = None,
    encode: Encode | None = None,
) -> dict[str, Any]:
    """Run stage 2, or go on with it where it was stopped; returns what `Session.run` does.

    Args:
        config: of configs/grpo.py.
        workdir: folder for checkpoints/, metrics.jsonl, rollouts/ and quarantine.jsonl.
        profile: reward design, instead of the configured one.
        encode: record -> Encoded prompt, instead of the configured one.
    """
    settings = grpo_settings(config, workdir, profile)
    with contextlib.ExitStack() as stack:
        parts = stack.enter_context(start(settings))
        stack.enter_context(processes.hold(settings.workdir))
        settings = fit_rows(settings, parts.shards, parts.processor.geometry.window_slots)
        encode = encode or PromptEncoder(parts.processor, settings.data.prompt)
        loader, _ = open_training(settings, parts, encode, check=gold_problem)
        place = processes.data_place(parts.mesh)
        judge = open_judge(settings.reward.judge, settings.workdir, *place)
        own = stack.enter_context(OwnTerms(settings.reward, parts.mesh, judge))
        own.try_on(loader.source)
        cfg = grpo_config(settings, parts.shards, parts.forbidden_ids, own.weights)
        if settings.preflight:
            before_training(settings, cfg, loader.source, parts.processor.tokenizer)
        engine = open_engine(settings, parts)
        pool = Pool(encode, parts.processor, settings.data, settings.filter.max_age)
        evaluator = None
        if settings.eval.file:
            evaluator = Evaluator(settings, parts, settings.design, encode)
        optimizer = make_optimizer(settings.optim, settings.steps * cfg.updates, settings.seed)
        run = Session(settings, parts, optimizer, settings.steps, SHOWN)
        if note := truncation_note(settings):
            processes.say(note)
        if run.hosts:
            mended = allows(settings.checkpoint.allow_changes, "data.train")
            loader.set_state(*[values["data"] for values, _ in run.hosts], mended=mended)
            pool.load(run.hosts, place, len(own.names))
        reference = Reference(settings, parts, cfg, run)
        held = (loader, pool, reference, own, engine)
        stage = Stage(settings, parts, cfg, optimizer, *held)
        if len(run.hosts) == place[1]:
            stage.stored = Stored.of(run.hosts[place[0]])
        return run.run(stage.step, stage.host_state, evaluator)


def open_engine(settings: GrpoSettings, parts: Parts) -> Drawer | None:
    """What draws the samples in the sampler's place; None where nothing does."""
    if not settings.sampling.engine.url:
        return None
    from srpo_jax.remote.rollouts import Engine  # seconds to import: only to ask something

    return Engine(settings, parts)


class Stage:
    """One RL step and what it needs: compiled functions, data, pending groups, the reference."""

    # One parameter for each thing that a step works with.
    def __init__(
        self,
        settings: GrpoSettings,
        parts: Parts,
        cfg: GrpoConfig,
        optimizer: Optimizer,
        loader: Loader,
        pool: Pool,
        reference: Reference,
        own: OwnTerms,
        engine: Drawer | None = None,
    ):
        self.settings, self.parts, self.cfg = settings, parts, cfg
        self.loader, self.pool, self.reference = Ahead(loader), pool, reference
        self.check_first_update, self.engine = settings.preflight, engine
        self.trains_vision = trains_vision(parts.shapes, settings.freeze)
        # [P] of this process: the update that each place belongs to; -1: filler.
        layout = batch_layout(settings, parts.shards)
        self.update_P = layout.places(*processes.data_place(parts.mesh))
        mesh, watch = parts.mesh, parts.guard.watch
        self.update_on_mesh = sharding.to_global(self.update_P, mesh)
        self.zeros_like = watch(
            jax.jit(jnp.zeros_like, out_shardings=sharding.batch_sharding(mesh))
        )
        self.logp_step = watch(make_logp_step(parts.model, cfg, mesh=mesh))
        self.score_step = watch(make_score_step(cfg, mesh))
        update = make_grpo_steps(parts.model, cfg, optimizer, freeze=settings.freeze, mesh=mesh)
        self.grpo_steps = GrpoSteps(*map(watch, update))
        self.budgets = lane_budgets(settings, layout, parts.model)
        kept = {"keep_pixels": self.trains_vision, "own": own, "engine": engine}
        self.generator = Generator(parts, settings.sampling, cfg.profile, **kept)
        black_X, ratio = parts.processor.black_patch, cfg.perception_mask
        self.mask_step = watch(make_mask_step(black_X, ratio, mesh=mesh))
        self.told = False  # that a group had no reward
        # Of ``rollouts.late``: the round for the next step, and the one that a checkpoint held.
        self.waiting: Waiting | None = None
        self.stored: Stored | None = None

    def host_state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What the checkpoint keeps of this process: place in the data, what waits, kl_coef."""
        values, arrays = self.pool.state()
        values |= {"data": self.loader.get_state(), "kl_coef": self.reference.kl_coef}
        if self.waiting:
            late, held = self.waiting.state()
            values, arrays = values | late | {"data": self.waiting.data}, arrays | held
        return values, arrays

    # --- a step ---

    def step(self, state: TrainState, step: int) -> Done:
        """Sample, grade, update, write the rollouts; ``step`` counts those done before."""
        timers, ahead, place = self.parts.timers, None, {}
        left, late = self.settings.steps - step - 1, self.settings.rollouts.late
        self.reference.before(step)
        if self.settings.filter.resample:
            lesson = self.resample(state, step)
        elif late:
            lesson, place = self.late_lesson(state, step), self.loader.get_state()
            if left:
                ahead = self.sample(state, self.next_batch(step + 1), step + 1)
        else:
            lesson = self.lesson_of(*self.sample_round(state, step, with_logps=True))
        with timers("update"):
            lesson = self.with_masked(state, lesson, step)
            learned_PG = lengths_to_learn(lesson.local, self.cfg)
            packed = self.pack(lesson.local.batch, learned_PG, update_P=self.update_P)
            state, updates = self.update(state, lesson, packed)
        # While the device is busy with the update:
        with timers("write", behind=updates):
            examples = self.write_rollouts(lesson.rounds, step + 1)
            counts = added_up(map(counts_of, lesson.rounds))
        if ahead:
            with timers("grade", behind=updates):
                one = self.round_of(ahead, self.generator.grade(ahead))
                self.waiting = Waiting(one, step + 1, place)
        if left > int(late):
            with timers("data", behind=updates):
                self.loader.draw()
        with timers("update"):
            updates = jax.device_get(updates)
        if updates:
            self.check(lesson, updates[0])
        pending = len(self.pool.groups)
        metrics, reason = row_of(lesson, updates, packed, counts, self.parts, pending)
        self.tell(reason)
        self.reference.follow(state, step + 1, metrics)
        kinds = {"refers": self.reference.params is not None, "trains_vision": self.trains_vision}
        work = work_of(lesson, learned_PG, self.cfg, self.parts, **kinds)
        return Done(state, metrics, *work, len(updates), examples)

    def check(self, lesson: Lesson, metrics: dict[str, np.ndarray]) -> None:
        """Whether the first update had the log-probs of what sampled: once, or of an engine always,
        where it should have these weights."""
        fresh = self.engine and not any(one.sampled.age for one in lesson.rounds)
        if self.check_first_update or fresh:
            told = check_sampler(metrics, self.parts.model.dtype, engine=bool(self.engine))
            if self.check_first_update:
                processes.say(f"preflight: {told}", "preflight")
        self.check_first_update = False

    def next_batch(self, step: int) -> LoadedBatch:
        """The prompts of ``step``."""
        with self.parts.timers("data"):
            loaded = next(self.loader)
        self.parts.lockstep(step, bucket_of(loaded.arrays))
        return loaded

    def sample(self, state: TrainState, loaded: LoadedBatch, step: int) -> Sampled:
        """Completions that the updates of ``step`` are to take."""
        with self.sampling(loaded.arrays), self.parts.timers("sample"):
            seed, params = self.settings.seed, merge_params(state)
            sampled = self.generator.sample(params, loaded, seed=seed, step=step)
        self.parts.stop.between_phases()
        return sampled

    def sampling(self, local: Batch) -> AbstractContextManager:
        """Around what is compiled for a batch of prompts."""
        return self.parts.guard.step(f"sampling, {bucket_of(local)}")

    def sample_round(
        self, state: TrainState, step: int, *, with_logps: bool
    ) -> tuple[Round, Logps]:
        """The next batch of prompts: completions, verdicts and, on the way, log-probs."""
        sampled, logps = self.sample(state, self.next_batch(step), step), (None, None)
        # Dispatched before grading: the host checks answers while the device computes.
        if with_logps:
            logps = self.logps(state, sampled, old=self.cfg.updates > 1)
        with self.parts.timers("grade", behind=logps):
            one = self.round_of(sampled, self.generator.grade(sampled))
        with self.parts.timers("logp"):
            jax.block_until_ready(logps)
        self.parts.stop.between_phases()
        return one, logps

    def round_of(self, sampled: Sampled, graded: Graded) -> Round:
        """What is sampled and graded, with weights and scores."""
        groups = self.settings.filter
        weight = informative(graded.verdict, groups.low, groups.high, groups.on) * graded.rewarded
        rewarded = np.asarray(sampled.local.valid) & graded.rewarded
        held = sharding.to_global((graded.verdict, graded.rollout, rewarded), self.parts.mesh)
        with self.sampling(sampled.local):
            return Round(sampled, graded, weight, self.score_step(*held))

    def lesson_of(self, one: Round, logps: Logps, age: int = 0) -> Lesson:
        """A whole round for the updates, ``age`` steps after it was sampled."""
        verdict, weight_P = sharding.to_global((one.graded.verdict, one.weight), self.parts.mesh)
        experience = self.experience(one.sampled, verdict, logps, weight_P)
        age_P = np.where(one.weight != 0, age + one.sampled.age, 0).astype(np.int32)
        return Lesson(experience, one.local, [one], age_P)

    def late_lesson(self, state: TrainState, step: int) -> Lesson:
        """The round that was sampled in the step before; where there is none, a new one.

        The old policy is the sampler's, of whatever age: its programs do not depend on that.
        """
        one, age = self.late_round(state, step)
        _, ref_logp = self.logps(state, one.sampled, old=False)
        late_P = sharding.to_global(np.full(len(one.weight), age > 0), self.parts.mesh)
        old_logp = one.sampled.rollout.policy_logp if self.cfg.updates > 1 else None
        lesson = self.lesson_of(one, (old_logp, ref_logp), age)
        experience = dataclasses.replace(lesson.experience, carried=late_P)
        return dataclasses.replace(lesson, experience=experience)

    def late_round(self, state: TrainState, step: int) -> tuple[Round, int]:
        """The round for ``step``, and how many steps ago it was sampled."""
        waiting, self.waiting, stored, self.stored = self.waiting, None, self.stored, None
        if waiting and waiting.step == step:  # not of steps from which the run went back
            return waiting.one, 1
        loaded = self.next_batch(step)
        if stored and stored.fits(loaded, step):
            self.check_first_update = False  # of no use where the policy is another
            with self.sampling(loaded.arrays):
                found = stored.round(loaded, merge_params(state), self.generator)
            return self.round_of(*found), 1
        sampled = self.sample(state, loaded, step)
        with self.parts.timers("grade"):
            return self.round_of(sampled, self.generator.grade(sampled)), 0

    def experience(
        self, sampled: Sampled, verdict: Any, logps: Logps, weight_P: jax.Array
    ) -> Experience:
        """Global arrays put together."""
        features = self.features_for(sampled)
        parts = (sampled.batch, sampled.rollout, verdict, features, *logps)
        kl_coef_P = None
        if self.cfg.kl_target:
            coef_P = np.full(len(self.update_P), self.reference.kl_coef, np.float32)
            kl_coef_P = sharding.to_global(coef_P, self.parts.mesh)
        held = {"update": self.update_on_mesh, "weight": weight_P, "kl_coef": kl_coef_P}
        return Experience(*parts, **held)

    def logps(self, state: TrainState, sampled: Sampled, *, old: bool) -> Logps:
        """Log-probs [P, G, R] under the policy before the update and under the reference.

        The first update of a rollout needs no old ones: there the policy itself is the old one.
        """
        if not old and self.reference.params is None:
            return None, None
        mask_PGR = processes.to_local(sampled.rollout.completion_mask)
        features = self.features_for(sampled)

        def under(params: Params, wanted_P: np.ndarray) -> jax.Array:
            logp_PGR = self.zeros_like(sampled.rollout.sample_logp)
            (packed,) = self.pack(sampled.local, mask_PGR.sum(-1) * wanted_P[:, None])
            for lanes in self.on_mesh(packed):
                with self.guard_lanes(sampled.local, lanes):
                    args = (sampled.batch, sampled.rollout, features, lanes)
                    logp_PGR = self.logp_step(logp_PGR, params, *args)
            return logp_PGR

        valid_P = np.asarray(sampled.local.valid)
        # In later passes over the rollout no prompt's policy is the one that is updated.
        later_P = (self.update_P > 0) | (self.cfg.epochs > 1)
        old_logp = under(merge_params(state), valid_P & later_P) if old else None
        ref_logp = None
        if self.reference.params is not None:
            ref_logp = under(merge_params(state, self.reference.weights()), valid_P)
        return old_logp, ref_logp

    def with_masked(self, state: TrainState, lesson: Lesson, step: int) -> Lesson:
        """Its images with masked patches beside it, where the objective compares with them."""
        vision = lesson.local.batch.vision
        if not self.cfg.perception_coef or vision is None:
            return lesson
        with self.parts.guard.step(f"masking, {bucket_of(lesson.local.batch)}"):
            vision = sharding.to_global(vision, self.parts.mesh)
            masked = self.mask_step(vision, np.uint32(self.settings.seed), np.int32(step))
            if self.trains_vision:
                found = masked.patches
            else:
                found = self.parts.encode_step(merge_params(state), masked)
        experience = dataclasses.replace(lesson.experience, masked=found)
        return dataclasses.replace(lesson, experience=experience)

    # --- lanes ---

    def pack(
        self, local: Batch, lengths_PG: np.ndarray, update_P: np.ndarray | None = None
    ) -> Packed:
        """Lanes of this process's completions, or of its `family_runs`: each update's, or all
        together (collective)."""
        budgets = self.budgets
        if lengths_PG.ndim == 3:
            budgets = budgets.of_families(self.cfg.forks)
        if update_P is None:
            together = dataclasses.replace(budgets.layout, updates=1, sharing=1)
            budgets = dataclasses.replace(budgets, layout=together)
        held = (local.lengths, lengths_PG, budgets)
        mesh = self.parts.mesh
        return pack(
            *held,
            update_P=update_P,
            everyone=functools.partial(processes.all_rows, mesh=mesh),
            place=processes.data_place(mesh),
        )

    def on_mesh(self, packed: list[Lanes | None]) -> Iterator[Lanes]:
        """The micro-batches that hold anything, as global arrays."""
        return (sharding.to_global(lanes, self.parts.mesh) for lanes in packed if lanes)

    def guard_lanes(self, local: Batch, lanes: Lanes) -> AbstractContextManager:
        """The shapes of lanes are budgets of their own."""
        sizes = f"lanes {list(lanes.sample.shape)}, prompts in {list(lanes.prompt.shape)}"
        return self.parts.guard.step(f"{bucket_of(local)}, {sizes}")

    def features_for(self, sampled: Sampled) -> jax.Array | None:
        """Image features as constants, unless the tower that makes them is trained."""
        return None if self.trains_vision else sampled.features

    def update(
        self, state: TrainState, lesson: Lesson, packed: Packed
    ) -> tuple[TrainState, list[dict[str, jax.Array]]]:
        """The updates of one rollout; one whose groups all have weight 0 is left out.

        (Its gradient would be zero, but Adam's momentum would still move the parameters.)
        """
        local, done = lesson.local.batch, []
        around = functools.partial(self.guard_lanes, local)
        with self.parts.guard.step(f"update, {bucket_of(local)}"):
            for k, own in enumerate(packed * self.cfg.epochs):
                if any(own):
                    args = (state, lesson.experience, self.on_mesh(own), k)
                    state, metrics = grpo_update(self.grpo_steps, *args, around=around)
                    done.append(metrics)
        return state, done

    def resample(self, state: TrainState, step: int) -> Lesson:
        """Rounds until there are informative groups for the whole batch, then that batch."""
        parts, mesh, rounds = self.parts, self.parts.mesh, []
        usable_P = self.update_P >= 0
        room = int(usable_P.sum())
        dropped = self.pool.drop_old(step)
        while len(rounds) < self.settings.filter.max_rounds:
            if rounds and not self.pool.short(mesh, room):
                break
            rounds.append(self.sample_round(state, step, with_logps=False)[0])
            self.pool.add(rounds[-1], step)
        self.pool.even_out(mesh, room)
        local, age = self.pool.take(step, usable_P)
        with parts.guard.step(f"composing, {bucket_of(local.batch)}"):
            rollout, verdict, weight_P, carried_P = sharding.to_global(
                (local.rollout, local.verdict, local.weight, age > 0), mesh
            )
            batch, features = self.generator.encode(merge_params(state), local.batch)
            nobody = np.zeros(0, np.int32)
            sampled = Sampled((), nobody, local.batch, batch, features, rollout)
            with parts.timers("logp"):
                logps = self.logps(state, sampled, old=self.cfg.updates > 1)
                jax.block_until_ready(logps)
        parts.stop.between_phases()
        experience = self.experience(sampled, verdict, logps, weight_P)
        experience = dataclasses.replace(experience, carried=carried_P)
        return Lesson(experience, local, rounds, age, dropped)

    def tell(self, reason: str) -> None:
        """Say once why groups have no reward."""
        if reason and not self.told:
            self.told = True
            processes.say(
                f"a group without a reward gets weight 0 (reward/failed counts them): {reason}"
            )

    def write_rollouts(self, rounds: list[Round], step: int) -> list[Example]:
        """rollouts/<step>.jsonl: every completion with its verdict, reward terms, advantage; a few
        of these."""
        every = self.settings.rollouts.every
        if not every or step % every or not processes.speaks(self.parts.mesh):
            return []
        write_rollouts(self.settings.workdir / "rollouts", rounds, step, self.parts.mesh)
        return examples_of(rounds[0])


def lane_budgets(settings: GrpoSettings, layout: Layout, model: ModelConfig) -> LaneBudgets:
    """What the lanes of an update are packed for."""
    # Images that are encoded inside the update stay on their shard, and so do prompts.
    fixed = trains_vision(abstract_params(model), settings.freeze)
    return LaneBudgets(
        layout,
        group=settings.sampling.group_size,
        prompt_tokens=settings.data.prompt_tokens,
        completion_tokens=settings.sampling.max_new_tokens,
        pair_cost=pair_cost(model.text),
        spread=layout.shards > 1 and not fixed,
    )


if __name__ == "__main__":
    main(train)
