"""A small model, batches and compiled steps, shared by the tests of the jitted steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.data.batching import Layout
from srpo_jax.data.vision_arrays import (
    VisionGeometry,
    VisionIds,
    mrope_positions,
    stack_rows,
    vision_arrays,
)
from srpo_jax.learn import lanes, state, steps
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.optim import OptimConfig, Optimizer, make_optimizer
from srpo_jax.learn.steps import SftConfig
from srpo_jax.model import sharding
from srpo_jax.model.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.structs import Batch, Experience, Rollout, Verdict

IMAGE = 60  # image token id
M, P, G, S, R = 4, 8, 4, 12, 5  # rows, prompts (two a row), samples, prompt and completion tokens
GEOMETRY = VisionGeometry(patch_size=2, window_size=8)
CFG = ModelConfig(
    vision=VisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=16,
        patch_size=2,
        window_size=8,
        fullatt_block_indexes=(1,),
    ),
    text=TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        mrope_section=(1, 1, 2),
        initializer_range=0.2,
    ),
    image_token_id=IMAGE,
)
SFT = SftConfig()
GRPO = GrpoConfig(micro_batches=M, temperature=0.8, forbidden_ids=(IMAGE,), logit_chunk=3)

# An optimizer that changes nothing and keeps the gradient where a test can read it.
RECORD = Optimizer(
    init=lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
    update=lambda grads, _, params: (jax.tree.map(jnp.zeros_like, params), grads),
    schedule=lambda count: 0.0,
)
ADAM = make_optimizer(
    OptimConfig(lr=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.1, eps=1e-5), 100
)
KL = dataclasses.replace(GRPO, kl_coef=0.3)
BONUS = dataclasses.replace(KL, entropy_coef=0.2)


@functools.cache
def params():
    """Random weights, every bias and scale moved off its starting value."""
    rng = np.random.default_rng(3)
    values = {}
    for path, shape in abstract_params(CFG).items():
        noise = rng.normal(size=shape.shape).astype(np.float32)
        values[path] = jnp.asarray(1 + 0.1 * noise if path.endswith("scale") else 0.15 * noise)
    return values


@functools.cache
def first_state(optimizer, freeze, mesh):
    own = jax.tree.map(jnp.copy, params())
    if mesh is not None:
        own = jax.device_put(own, sharding.param_specs(own, mesh))
    return state.init_state(CFG, optimizer, params=own, freeze=freeze, mesh=mesh)


def new_state(optimizer=RECORD, freeze=state.FREEZE_VISION, mesh=None):
    """The common start, each time in memory of its own, since steps donate their state."""
    return jax.tree.map(jnp.copy, first_state(optimizer, freeze, mesh))


@functools.cache
def prompts(rows=M) -> Batch:
    """Eight prompts with one image of 2x2 or 1x2 merged tokens each, in rows; one filler."""
    rng = np.random.default_rng(0)
    out = {
        "tokens": np.zeros((P, S), np.int32),
        "segment_ids": np.zeros((P, S), np.int32),
        "mrope": np.zeros((P, 3, S), np.int32),
        "vision_src": np.full((P, S), -1, np.int32),
        "lengths": np.zeros(P, np.int32),
        "next_pos": np.zeros(P, np.int32),
    }
    held, used = [[] for _ in range(rows)], [0] * rows
    for p in range(P):
        grid = [(1, 4, 4), (1, 2, 4)][p % 3 == 0]
        merged = grid[1] * grid[2] // 4
        pixels = rng.normal(size=(grid[1] * grid[2], GEOMETRY.patch_dim)).astype(np.float32)
        before, after = 1 + p % 2, 2 + p % 4
        ids = [*rng.integers(1, 50, before), *[IMAGE] * merged, *rng.integers(1, 50, after)]
        n, row = len(ids), p * rows // P
        out["tokens"][p, :n] = ids
        out["segment_ids"][p, :n] = 1
        positions, out["next_pos"][p] = mrope_positions(ids, VisionIds(IMAGE, 61), [grid])
        out["mrope"][p, :, :n] = positions
        out["vision_src"][p, before : before + merged] = np.arange(merged) + used[row]
        out["lengths"][p] = n
        held[row].append(vision_arrays(pixels, [grid], GEOMETRY))
        used[row] += merged
    return Batch(
        **out,
        loss_mask=np.zeros((P, S), np.float32),
        valid=np.arange(P) != 5,
        vision=stack_rows(held, 128 // rows, GEOMETRY),
    )


@functools.cache
def conversations() -> Batch:
    """The prompts as SFT samples, loss on the tokens after the image; one sequence is packed."""
    batch = prompts()
    last_image = S - np.argmax((batch.vision_src >= 0)[:, ::-1], axis=1)
    t = np.arange(S)[None]
    mask = (t >= last_image[:, None]) & (t < batch.lengths[:, None])
    packed = batch.segment_ids.copy()
    packed[2, batch.lengths[2] - 2 :] = 2
    packed[2, batch.lengths[2] :] = 0
    return batch.replace(loss_mask=mask.astype(np.float32), segment_ids=packed)


@functools.cache
def rollout() -> tuple[Rollout, Verdict]:
    rng = np.random.default_rng(1)
    length = rng.integers(1, R + 1, (P, G))
    mask = np.arange(R)[None, None] < length[:, :, None]
    samples = Rollout(
        completions=np.where(mask, rng.integers(1, 50, (P, G, R)), 0).astype(np.int32),
        completion_mask=mask,
        finished=rng.random((P, G)) < 0.7,
        sample_logp=np.where(mask, -3.0, 0.0).astype(np.float32),
        policy_logp=np.where(mask, -3.0, 0.0).astype(np.float32),
    )
    coin = lambda: rng.random((P, G)) < 0.5  # noqa: E731
    verdict = Verdict(
        first_correct=coin(),
        final_correct=coin(),
        has_first=np.ones((P, G), bool),
        has_second=coin(),
        format_ok=coin(),
        reflection_ok=coin(),
        reflection_new=coin(),
        stated=rng.integers(-1, 2, (P, G)).astype(np.int32),
        first_end=rng.integers(1, 9, (P, G)).astype(np.int32),
        first_tokens=rng.integers(1, 9, (P, G)).astype(np.int32),
        total_tokens=rng.integers(9, 30, (P, G)).astype(np.int32),
        block_tokens=rng.integers(0, 9, (P, G, 5)).astype(np.int32),
    )
    return samples, verdict


@functools.cache
def compiled(make, *args):
    *args, freeze, mesh = args
    return make(CFG, *args, freeze=freeze, mesh=mesh)


def sft_step(cfg=SFT, optimizer=RECORD, freeze=state.FREEZE_VISION, mesh=None):
    return compiled(steps.make_sft_step, cfg, optimizer, freeze, mesh)


def grpo_steps(cfg=GRPO, optimizer=RECORD, freeze=state.FREEZE_VISION, mesh=None):
    return compiled(steps.make_grpo_steps, cfg, optimizer, freeze, mesh)


@functools.cache
def features(rows=M):
    return steps.make_encode_step(CFG)(params(), prompts(rows).vision)


def update_of(cfg, shards=1, prompts=P):
    """[P] which update takes each prompt."""
    each = prompts // shards // cfg.updates_per_rollout
    return np.tile(np.repeat(np.arange(cfg.updates_per_rollout), each), shards)


def packed(cfg, batch, samples, weight=None, shards=1, spread=False):
    """The lanes of every micro-batch of every update, of samples that have a weight."""
    shown = np.asarray(batch.valid if weight is None else batch.valid & (weight != 0))
    lengths = np.asarray(samples.completion_mask).sum(-1) * shown[:, None]
    per_row = len(batch.lengths) // (shards * cfg.micro_batches)
    rows = cfg.micro_batches
    layout = Layout(per_row * rows, rows=rows, updates=cfg.updates_per_rollout)
    return lanes.pack(batch.lengths, lengths, lanes.LaneBudgets(layout, G, S, R, spread=spread))


@functools.cache
def logp_step():
    return steps.make_logp_step(CFG, GRPO)


def logps(now, batch=None, samples=None, feats=True):
    """[P, G, R] of all completions under parameters."""
    batch = prompts() if batch is None else batch
    samples = rollout()[0] if samples is None else samples
    found = jnp.zeros(samples.completions.shape)
    for part in packed(GRPO, batch.replace(valid=np.ones(P, bool)), samples)[0]:
        args = (batch, samples, features() if feats is True else feats, part)
        found = logp_step()(found, now, *args)
    return found


@functools.cache
def old_logp():
    return logps(params())


def run_grpo(
    cfg=GRPO,
    *,
    at=None,
    batch=None,
    samples=None,
    verdict=None,
    feats=True,
    old=None,
    ref=None,
    carried=None,
    weight=None,
    masked=None,
    update=0,
    freeze=state.FREEZE_VISION,
):
    """One update from the common start -> (gradient, metrics)."""
    experience = Experience(
        prompts() if batch is None else batch,
        rollout()[0] if samples is None else samples,
        rollout()[1] if verdict is None else verdict,
        features=features() if feats is True else feats,
        old_logp=old,
        ref_logp=ref,
        carried=carried,
        update=update_of(cfg) if cfg.updates_per_rollout > 1 else None,
        weight=weight,
        masked=masked,
    )
    at = new_state(freeze=freeze) if at is None else at
    new, metrics = one_update(grpo_steps(cfg, freeze=freeze), cfg, at, experience, update)
    return new.opt_state, metrics


def one_update(parts, cfg, now, experience, update=0):
    """The jitted parts in their order."""
    every = packed(cfg, experience.batch, experience.rollout, experience.weight)
    chosen = [part for part in every[update] if part is not None]
    return steps.grpo_update(parts, now, experience, chosen, update)


def with_(cfg, **changes):
    return dataclasses.replace(cfg, **changes)


def assert_close(got, want, atol):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=atol, rtol=0, err_msg=str(path))
