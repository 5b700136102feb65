"""The jitted steps on a tiny real model: exactness of batching, freezing, meshes, and learning."""

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import completion_hidden

from srpo_jax.data.vision_arrays import (
    VisionGeometry,
    VisionIds,
    mrope_positions,
    stack_rows,
    vision_arrays,
)
from srpo_jax.learn import grpo, lanes, losses, micro_batches, state, steps
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.optim import OptimConfig, Optimizer, make_optimizer
from srpo_jax.learn.steps import SftConfig
from srpo_jax.model import sharding
from srpo_jax.model.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.model.qwen2_5_vl import abstract_params, bind, for_sampling
from srpo_jax.rewards.profiles import PAPER
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


def packed(cfg, batch, samples, weight=None, shards=1):
    """The lanes of every micro-batch of every update, of samples that have a weight."""
    shown = np.asarray(batch.valid if weight is None else batch.valid & (weight != 0))
    lengths = np.asarray(samples.completion_mask).sum(-1) * shown[:, None]
    per_row = len(batch.lengths) // (shards * cfg.micro_batches)
    budgets = lanes.Budgets(per_row, G, S, R, cfg.micro_batches, cfg.updates_per_rollout)
    return lanes.pack(batch.lengths, lengths, budgets)


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


# --- SFT -------------------------------------------------------------------------------------


def test_sft_loss_and_gradient_equal_a_plain_dense_cross_entropy():
    batch = conversations()

    def loss(trained):
        model = bind(CFG, {**params(), **trained})
        feats = model.encode_images(batch.vision)
        h = model.hidden(batch.tokens, batch.mrope, batch.segment_ids, batch.vision_src, feats)
        logp = jax.nn.log_softmax(model.logits(h), -1)
        total, count = 0.0, 0.0
        for b in range(P):
            for t in range(1, S):
                if batch.valid[b] and batch.loss_mask[b, t]:
                    total, count = total - logp[b, t - 1, batch.tokens[b, t]], count + 1
        return total / count

    trained = new_state().params
    want_loss, want = jax.jit(jax.value_and_grad(loss))(trained)
    new, metrics = sft_step()(new_state(), batch, features())
    np.testing.assert_allclose(metrics["loss"], want_loss, rtol=1e-5)
    assert_close(new.opt_state, want, 1e-6)
    assert metrics["tokens"] == (batch.loss_mask * batch.valid[:, None]).sum()
    assert metrics["sequences"] == P - 1


def test_sft_does_not_depend_on_the_number_of_micro_batches():
    whole, metrics = sft_step()(new_state(), conversations(), features())
    cfg = SftConfig(micro_batches=4, logit_chunk=5)
    new, other = sft_step(cfg)(new_state(), conversations(), features())
    assert_close(new.opt_state, whole.opt_state, 1e-6)
    np.testing.assert_allclose(other["loss"], metrics["loss"], atol=1e-6)


def test_sft_reaches_the_tower_when_it_trains_and_only_then():
    new, metrics = sft_step(freeze=())(new_state(freeze=()), conversations(), None)
    vision = {p: g for p, g in new.opt_state.items() if p.startswith("vision/")}
    assert vision and all(jnp.abs(g).max() > 0 for g in vision.values())
    assert new.frozen == {}
    frozen, same = sft_step()(new_state(), conversations(), features())
    assert not any(p.startswith("vision/") for p in frozen.opt_state)
    assert set(frozen.frozen) == set(vision)
    # Images inside the loss are worth the same as features computed before.
    np.testing.assert_allclose(metrics["loss"], same["loss"], atol=1e-6)
    assert_close(frozen.opt_state, {p: new.opt_state[p] for p in frozen.opt_state}, 1e-6)


def test_precomputed_features_are_refused_when_the_tower_trains():
    with pytest.raises(ValueError, match="features=None"):
        sft_step(freeze=())(new_state(freeze=()), conversations(), features())


def test_sft_learns_and_leaves_frozen_parameters_alone():
    start = {path: np.asarray(x) for path, x in params().items()}
    old = now = new_state(ADAM)
    paths = [str(path) for path, _ in jax.tree_util.tree_leaves_with_path(old.opt_state)]
    assert any("text/" in path for path in paths) and not any("vision/" in p for p in paths)
    history = []
    for _ in range(25):
        step = sft_step(SftConfig(micro_batches=2), ADAM)
        now, metrics = step(now, conversations(), features())
        history.append(float(metrics["loss"]))
    assert history[-1] < 0.7 * history[0] and now.step == 25
    # Neither gradient nor weight decay has touched the tower.
    for path, x in state.merge_params(now).items():
        moved = bool((np.asarray(x) != start[path]).any())
        assert moved == (not path.startswith("vision/")), path
    # The state was donated: nothing of the old one is held in memory beside the new one.
    assert all(x.is_deleted() for x in jax.tree.leaves(old.params))


# --- encode and log-probs --------------------------------------------------------------------


def test_encoding_row_by_row_equals_encoding_all_rows():
    whole = jax.jit(lambda p, v: bind(CFG, p).encode_images(v))(params(), prompts().vision)
    np.testing.assert_allclose(features(), whole, atol=1e-6)


def test_logp_step_equals_each_sample_alone_through_the_whole_model():
    samples, batch = rollout()[0], prompts()
    logp = logps(params(), feats=None)  # images inside
    np.testing.assert_allclose(logp, old_logp(), atol=1e-6)
    assert (np.asarray(logp)[~samples.completion_mask] == 0).all()

    @jax.jit
    def alone(ids, mrope, src, feats):
        model = bind(CFG, params())
        h = model.hidden(ids, mrope, (ids > 0).astype(jnp.int32), src, feats)
        return jax.nn.log_softmax((model.logits(h) / GRPO.temperature).at[..., IMAGE].set(-1e30))

    for p, g in ((0, 1), (3, 2), (6, 0)):
        n, r = int(batch.lengths[p]), int(samples.completion_mask[p, g].sum())
        ids = np.zeros((1, S + R), np.int32)
        ids[0, : n + r] = [*batch.tokens[p, :n], *samples.completions[p, g, :r]]
        mrope = np.zeros((1, 3, S + R), np.int32)
        mrope[0, :, :n] = batch.mrope[p, :, :n]
        mrope[0, :, n:] = batch.next_pos[p] + np.arange(S + R - n)
        src = np.full((1, S + R), -1)
        src[0, :n] = batch.vision_src[p, :n]
        all_logps = alone(ids, mrope, src, features()[p // 2][None])[0]
        want = all_logps[np.arange(n - 1, n + r - 1), ids[0, n : n + r]]
        np.testing.assert_allclose(logp[p, g, :r], want, atol=1e-5)


def test_the_last_token_of_a_row_counts_wherever_chunks_end():
    samples, tokens = rollout()[0], set()
    for longest in range(1, R + 1):  # chunks are of three tokens or fewer
        mask = samples.completion_mask & (np.arange(R) < longest)
        mask[:, 1:] &= np.arange(P)[:, None, None] % 3 > 0
        logp = np.asarray(logps(params(), samples=samples.replace(completion_mask=mask)))
        np.testing.assert_allclose(logp, np.where(mask, old_logp(), 0), atol=1e-6)
        tokens |= {int(n) % 3 for n in mask.reshape(M, -1).sum(1)}
    assert tokens == {0, 1, 2}


# --- GRPO ------------------------------------------------------------------------------------


def naive_grpo_loss(trained, ref, reward):
    """GRPO with k3 as the papers print it and an entropy bonus, dense: mean over tokens, then
    samples and prompts."""
    samples, batch = rollout()[0], prompts()
    model = bind(CFG, {**params(), **trained})
    mask = samples.completion_mask
    h = completion_hidden(model, batch, features(), samples.completions, mask)
    logits = (model.logits(h) / KL.temperature).at[..., IMAGE].set(-1e30)
    all_logps = jax.nn.log_softmax(logits, -1)
    logp = jnp.take_along_axis(all_logps, samples.completions[..., None], -1)[..., 0]
    adv = (reward - reward.mean(1, keepdims=True)) / (reward.std(1, ddof=1, keepdims=True) + 1e-6)
    d = ref - logp
    kl = jnp.exp(d) - 1 - d
    x = -jnp.exp(logp - jax.lax.stop_gradient(logp)) * adv[..., None] + KL.kl_coef * kl
    x -= BONUS.entropy_coef * -(jnp.exp(all_logps) * all_logps).sum(-1)
    of_sample = jnp.where(mask, x, 0).sum(-1) / mask.sum(-1)
    return of_sample[batch.valid].mean()


def test_grpo_loss_and_gradient_equal_a_naive_one():
    shift = 0.3 * jnp.sin(jnp.arange(P * G * R, dtype=jnp.float32)).reshape(P, G, R)
    ref = old_logp() + shift
    reward = np.asarray(PAPER.terms(rollout()[1], 0.1).total)
    naive = jax.jit(jax.value_and_grad(lambda trained: naive_grpo_loss(trained, ref, reward)))
    want_loss, want = naive(new_state().params)
    got, metrics = run_grpo(BONUS, ref=ref)
    np.testing.assert_allclose(metrics["loss"], want_loss, atol=1e-5)
    assert_close(got, want, 2e-6)


ALL_TERMS = with_(
    KL,
    updates_per_rollout=2,
    clip_low=0.05,
    clip_high=0.1,
    dual_clip=1.2,
    entropy_coef=0.05,
    tis_cap=1.5,
    mask_truncated=True,
    length_cap=9,
)


@functools.cache
def padded_way():
    """The loss of `ALL_TERMS`, and its gradient, where each sample is a padded sequence."""

    def loss(trained, experience, ready):
        samples, (P, G, R) = experience.rollout, experience.rollout.completions.shape
        model = bind(CFG, {**params(), **trained})
        mask = samples.completion_mask
        inputs = (experience.batch, experience.features, samples.completions, mask)
        h = completion_hidden(model, *inputs).reshape(P * G, R, -1)
        logp, entropy = losses.token_logps(
            h,
            samples.completions.reshape(P * G, R),
            model.head_kernel(),
            temperature=ALL_TERMS.temperature,
            forbidden_ids=ALL_TERMS.forbidden_ids,
            entropy_grad=True,
        )
        logp, entropy = logp.reshape(P, G, R), entropy.reshape(P, G, R)
        of_prompt = lambda x: x[:, None, None]  # noqa: E731
        old = jnp.where(of_prompt(experience.carried), samples.policy_logp, experience.old_logp)
        old = jnp.where(of_prompt(ready.on_policy_P), jax.lax.stop_gradient(logp), old)
        adv, weight = (x[..., None] * mask for x in (ready.adv_PG, ready.weight_PG))
        logps = (samples.sample_logp, samples.policy_logp, old, experience.ref_logp)
        return grpo.policy_loss(ALL_TERMS, logp, entropy, grpo.Tokens(adv, weight, *logps))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("update", [0, 1])
def test_lanes_compute_what_padded_sequences_compute(update):
    """Every aggregation, with each term in force, groups of weight 0, older policies, a filler."""
    noise = np.random.default_rng(8).normal(size=(3, P, G, R)).astype(np.float32) * 0.2
    samples, verdict = rollout()
    near, far, ref = np.asarray(old_logp())[None] + noise
    samples = samples.replace(policy_logp=far, sample_logp=far - 0.1)
    weight = np.array([1, 0.5, 0, 1, 1, 1, 1, 2], np.float32)
    carried = np.arange(P) % 3 == 1
    taken = update_of(ALL_TERMS)
    every = Experience(prompts(), samples, verdict, features(), near, ref, carried, taken, weight)
    for mode in ("sequence", "token", "constant"):
        cfg = with_(ALL_TERMS, aggregation=mode)
        # Which tokens weigh how much is settled before the first micro-batch.
        parts = grpo_steps(ALL_TERMS)._replace(prepare=grpo_steps(cfg).prepare)
        new, metrics = one_update(parts, cfg, new_state(), every, update)
        ready = grpo.prepare(cfg, every, update)
        (loss, aux), want = padded_way()(new_state().params, every, ready)
        assert_close(new.opt_state, want, 1e-5)
        np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
        for name, value in grpo.update_metrics(aux, ready.tokens).items():
            np.testing.assert_allclose(metrics[name], value, atol=1e-5, err_msg=name)
        assert np.abs(want["text/lm_head/kernel"]).max() > 1e-3
        assert metrics["ratio/max"] > 1.01


def test_grpo_does_not_depend_on_the_number_of_micro_batches():
    want, metrics = run_grpo()
    half = dict(batch=prompts(2), feats=features(2))
    got, other = run_grpo(with_(GRPO, micro_batches=2), **half)
    assert_close(got, want, 1e-6)
    for name in metrics:
        np.testing.assert_allclose(other[name], metrics[name], atol=2e-6, err_msg=name)


def test_first_update_has_ratio_exactly_one():
    _, metrics = run_grpo()
    for name in ("ratio/mean", "ratio/max", "ratio/min"):
        assert metrics[name] == 1.0, name
    assert metrics["clip/low"] == metrics["clip/high"] == 0
    assert metrics["grad_norm"] > 0


def test_old_log_probs_are_the_given_ones_where_the_policy_is_not_the_old_one_itself():
    want, base = run_grpo()
    # The rollout claims -3 everywhere.
    gap = np.abs(np.asarray(old_logp()) + 3.0)[
        rollout()[0].completion_mask & prompts().valid[:, None, None]
    ]
    np.testing.assert_allclose(base["sampler/logp_diff_mean"], gap.mean(), rtol=1e-5)
    np.testing.assert_allclose(base["sampler/logp_diff_max"], gap.max(), rtol=1e-5)
    # Groups of an older policy: what it said when it sampled.
    exact = rollout()[0].replace(policy_logp=old_logp())
    got, metrics = run_grpo(samples=exact, carried=np.ones(P, bool))
    for name in ("ratio/mean", "ratio/max", "ratio/min"):
        np.testing.assert_allclose(metrics[name], 1.0, atol=1e-5)
    assert_close(got, want, 1e-6)
    shifted = exact.replace(policy_logp=old_logp() + np.log(2.0))
    _, metrics = run_grpo(samples=shifted, carried=np.arange(P) < 4)
    np.testing.assert_allclose(metrics["ratio/min"], 0.5, atol=1e-5)
    assert metrics["ratio/max"] == 1.0
    # Later updates: what was computed before the first one; carried groups keep theirs.
    cfg = with_(GRPO, updates_per_rollout=2)
    past = dict(old=old_logp() - np.log(2.0), carried=np.arange(P) == 7)
    _, metrics = run_grpo(cfg, samples=exact, update=1, **past)
    np.testing.assert_allclose(metrics["ratio/max"], 2.0, atol=1e-5)
    np.testing.assert_allclose(metrics["ratio/min"], 1.0, atol=1e-5)
    _, metrics = run_grpo(cfg, samples=exact, update=0, **past)
    assert metrics["ratio/max"] == metrics["ratio/min"] == 1.0


def test_kl_is_zero_with_no_gradient_when_policy_is_the_reference():
    want, _ = run_grpo()
    got, metrics = run_grpo(KL, ref=old_logp())
    assert metrics["kl"] < 1e-9
    assert_close(got, want, 2e-6)


def test_descending_on_the_kl_alone_brings_the_policy_to_the_reference():
    now = new_state(ADAM)
    wrong = jax.tree.map(np.zeros_like, rollout()[1])  # equal rewards: no other gradient
    ref = jnp.where(rollout()[0].completion_mask, old_logp() + 0.5, 0.0)
    history = []
    for _ in range(10):
        experience = Experience(prompts(), rollout()[0], wrong, features(), ref_logp=ref)
        now, metrics = one_update(grpo_steps(KL, ADAM), KL, now, experience)
        assert metrics["loss/policy"] == 0
        history.append(float(metrics["kl"]))
    assert history[-1] < 0.5 * history[0]


def test_equal_rewards_give_exactly_zero_gradient():
    same = jax.tree.map(lambda x: np.broadcast_to(x[:, :1], x.shape), rollout()[1])
    grads, metrics = run_grpo(verdict=same)
    assert metrics["grad_norm"] == 0 and metrics["groups_without_signal"] == 1
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_tokens_after_the_end_do_not_matter():
    samples = rollout()[0]
    other = samples.replace(
        completions=np.where(samples.completion_mask, samples.completions, 33),
        policy_logp=np.where(samples.completion_mask, samples.policy_logp, 7.0),
    )
    want, metrics = run_grpo()
    got, same = run_grpo(samples=other)
    assert_close((got, same), (want, metrics), 0)


def test_fillers_and_groups_of_weight_zero_do_not_matter():
    filler = np.arange(P) == 5
    samples, verdict = rollout()
    other = np.where(filler[:, None, None], samples.completions % 49 + 1, samples.completions)
    scrambled = jax.tree.map(
        lambda x: np.where(filler.reshape(-1, *[1] * (x.ndim - 1)), x[:, ::-1], x), verdict
    )
    want, metrics = run_grpo()
    got, same = run_grpo(samples=samples.replace(completions=other), verdict=scrambled)
    assert_close((got, same), (want, metrics), 1e-7)
    assert metrics["samples"] == (P - 1) * G
    kept = (np.arange(P) != 2).astype(np.float32)
    gone, _ = run_grpo(batch=prompts().replace(valid=prompts().valid & (kept > 0)))
    weightless, metrics = run_grpo(weight=kept)
    assert_close(weightless, gone, 1e-6)
    trained = samples.completion_mask[(kept > 0) & prompts().valid].sum()
    assert metrics["trained_tokens"] == trained < metrics["tokens"]


def test_grpo_reaches_the_tower_when_it_trains():
    want, metrics = run_grpo()
    trained, other = run_grpo(feats=None, freeze=())
    np.testing.assert_allclose(other["loss"], metrics["loss"], atol=1e-6)
    assert_close({path: trained[path] for path in want}, want, 1e-6)
    vision = {path: g for path, g in trained.items() if path.startswith("vision/")}
    assert vision and all(jnp.abs(g).max() > 0 for g in vision.values())


def test_several_updates_per_rollout_are_those_of_their_rows_alone():
    cfg = with_(GRPO, micro_batches=4, updates_per_rollout=2, aggregation="token")
    samples, verdict = rollout()
    everything = (prompts(), samples, verdict)
    for k in (0, 1):
        got, metrics = run_grpo(cfg, old=old_logp(), update=k)
        half = lambda x, k=k: x[k * x.shape[0] // 2 : (k + 1) * x.shape[0] // 2]  # noqa: E731
        batch, part, graded = jax.tree.map(half, everything)
        want, alone = run_grpo(
            with_(GRPO, aggregation="token", micro_batches=2),
            batch=batch,
            samples=part,
            verdict=graded,
            feats=half(features()),
        )
        assert_close(got, want, 1e-6)
        for name in alone:
            np.testing.assert_allclose(metrics[name], alone[name], atol=2e-6, err_msg=name)
    with pytest.raises(ValueError, match="needs old_logp"):
        run_grpo(cfg)


def test_missing_reference_and_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="needs ref_logp"):
        run_grpo(with_(GRPO, kl_coef=0.1))
    with pytest.raises(ValueError, match="leading axis of 8 does not divide into 3"):
        micro_batches.rows_of(jnp.zeros(P), jnp.zeros(1, jnp.int32), count=3)


def test_a_non_finite_gradient_is_skipped_and_counted():
    bad = np.asarray(old_logp()).copy()
    bad[0, 0, 0] = np.nan
    now = new_state()
    before = jax.tree.map(np.asarray, now)
    samples, verdict = rollout()
    samples = samples.replace(policy_logp=bad)
    carried = np.ones(P, bool)
    experience = Experience(prompts(), samples, verdict, features(), carried=carried)
    now, metrics = one_update(grpo_steps(), GRPO, now, experience)
    assert_close(jax.tree.map(np.asarray, now.replace(skipped=before.skipped)), before, 0)
    assert now.skipped == 1 and metrics["skipped"] == 1 and not np.isfinite(metrics["grad_norm"])


def test_training_raises_the_probability_of_the_rewarded_sample():
    samples, verdict = rollout()
    best = np.zeros((P, G), bool)
    best[:, 1] = True
    verdict = jax.tree.map(np.zeros_like, verdict).replace(
        first_correct=best, final_correct=best, has_first=np.ones_like(best), has_second=best
    )
    now = new_state(ADAM)
    for _ in range(8):
        experience = Experience(prompts(), samples, verdict, features(), ref_logp=old_logp())
        now, _ = one_update(grpo_steps(KL, ADAM), KL, now, experience)
    gain = np.asarray(logps(state.merge_params(now)) - old_logp()).sum(-1)[prompts().valid]
    assert (gain[:, 1] > 0).all()
    assert gain[:, 1].mean() > 0.5 > gain[:, [0, 2, 3]].mean()


# --- meshes, layouts, compilation ------------------------------------------------------------


def shapes_on(shardings, tree):
    """Shapes with shardings, as a program for absent hardware is compiled from."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(shape, tree, shardings)


def three_steps(step, now):
    history = []
    for _ in range(3):
        now, metrics = step(now)
        history.append(metrics)
    return now, jax.tree.map(np.asarray, history)


MESHES = [
    (data, fsdp, tensor)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    for tensor in (1, 2, 4)
    if 1 < data * fsdp * tensor <= 8
]
QUICK = [(1, 1, 2), (2, 2, 2)]  # of the fast tier: nothing divides the rows, everything is divided


def sft_runs(mesh, rows, shards):
    """Three updates on one device and on a mesh, there compiled from shapes alone."""
    args = repeated((conversations(), np.asarray(features())), rows)
    one = sft_step(SftConfig(micro_batches=2), ADAM)
    many = sft_step(SftConfig(micro_batches=rows // shards), ADAM, mesh=mesh)
    shapes = state.abstract_state(CFG, ADAM)
    global_args = sharding.to_global(args, mesh)
    lowered = many.lower(
        shapes_on(state.state_shardings(shapes, mesh), shapes),
        *shapes_on(sharding.batch_sharding(mesh), global_args),
    )
    compiled_step = lowered.compile()
    return lambda now: one(now, *args), lambda now: compiled_step(now, *global_args)


def grpo_runs(mesh, rows, shards):
    """Likewise; the mesh has the rows of a shard in another order, and several in a block."""
    ref = np.asarray(old_logp()) - 0.1
    experience = Experience(prompts(), *rollout(), np.asarray(features()), ref_logp=ref)
    experience = repeated(experience, rows)
    cfg = with_(KL, micro_batches=rows)
    one = grpo_steps(cfg, ADAM)
    cfg_many = with_(KL, micro_batches=rows // shards)
    many = grpo_steps(cfg_many, ADAM, mesh=mesh)
    (every,) = packed(cfg_many, experience.batch, experience.rollout, shards=shards)
    on_mesh = sharding.to_global((experience, every), mesh)
    return (
        lambda now: one_update(one, cfg, now, experience),
        lambda now: steps.grpo_update(many, now, *on_mesh),
    )


def repeated(tree, rows):
    """Eight shards want eight rows."""
    return jax.tree.map(lambda x: np.concatenate([x, x]), tree) if rows > M else tree


@pytest.mark.parametrize("runs", [sft_runs, grpo_runs])
@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, marks=() if shape in QUICK else pytest.mark.slow) for shape in MESHES],
    ids=str,
)
def test_every_mesh_computes_what_one_device_computes(runs, shape):
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    shards = shape[0] * shape[1]
    one, many = runs(mesh, max(M, shards), shards)
    end_1, history_1 = three_steps(one, new_state(ADAM))
    start = new_state(ADAM, mesh=mesh)
    kernel = start.params["text/layers/mlp/up/kernel"]
    assert kernel.addressable_data(0).size * shape[1] * shape[2] == kernel.size
    end, history = three_steps(many, start)
    layout = state.state_shardings(state.abstract_state(CFG, ADAM), mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, end, layout))

    for a, b in zip(history_1, history, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], atol=1e-5, rtol=1e-5, err_msg=name)
    assert_close(end.params, end_1.params, 1e-5)


@pytest.mark.parametrize("kind", [pytest.param("sft", marks=pytest.mark.slow), "grpo"])
def test_shards_that_hold_nothing_but_fillers_change_no_loss_and_no_gradient(kind):
    """Four rows of sequences on eight shards, between rows of fillers with other contents."""
    mesh = sharding.make_mesh(2, 4, 1)
    if kind == "sft":
        args = (conversations(), np.asarray(features()))
        want, alone = sft_step()(new_state(), *args)
    else:
        args = (Experience(prompts(), *rollout(), np.asarray(features())),)
        want, alone = one_update(grpo_steps(), GRPO, new_state(), *args)

    def spread(x, filler):
        shape = (M, x.shape[0] // M, *x.shape[1:])
        rows = np.stack([np.asarray(x).reshape(shape), np.asarray(filler).reshape(shape)], axis=1)
        return rows.reshape(2 * x.shape[0], *x.shape[1:])

    def fill(batch):
        return dataclasses.replace(batch, valid=np.zeros_like(batch.valid))

    first, *rest = args
    empty = fill(first) if kind == "sft" else first.replace(batch=fill(first.batch))
    fillers = jax.tree.map(lambda x: np.asarray(x)[::-1], (empty, *rest))
    args = jax.tree.map(spread, args, fillers)
    on_mesh = sharding.to_global(args, mesh)
    if kind == "sft":
        got, metrics = sft_step(mesh=mesh)(new_state(mesh=mesh), *on_mesh)
    else:
        cfg = with_(GRPO, micro_batches=1)
        (every,) = packed(cfg, args[0].batch, args[0].rollout, shards=8)
        parts = grpo_steps(cfg, mesh=mesh)
        inputs = (*on_mesh, sharding.to_global(every, mesh))
        got, metrics = steps.grpo_update(parts, new_state(mesh=mesh), *inputs)
    assert_close(got.opt_state, want.opt_state, 1e-6)
    for name in alone:
        np.testing.assert_allclose(metrics[name], alone[name], atol=2e-6, err_msg=name)


def test_rows_are_shard_major():
    x = jnp.arange(8)  # two shards of two micro-batches of two rows
    parts = [micro_batches.micro_batch({"x": x}, i, shards=2, count=2)["x"] for i in (0, 1)]
    assert [p.tolist() for p in parts] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert micro_batches.join_micro_batches(jnp.stack(parts), shards=2).tolist() == x.tolist()
    # The first shard takes its second row, the second shard its first one.
    assert micro_batches.rows_of(x, jnp.array([1, 0]), 2).tolist() == [2, 3, 4, 5]


def test_encode_and_logps_on_two_shards_of_two_micro_batches():
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    placed = jax.device_put(params(), sharding.param_specs(params(), mesh))
    batch, samples = sharding.to_global((prompts(), rollout()[0]), mesh)
    feats = steps.make_encode_step(CFG, mesh=mesh)(placed, batch.vision)
    np.testing.assert_allclose(feats, features(), atol=1e-5)
    cfg = with_(GRPO, micro_batches=2)
    step = steps.make_logp_step(CFG, cfg, mesh=mesh)
    logp = sharding.to_global(np.zeros((P, G, R), np.float32), mesh)
    everyone = prompts().replace(valid=np.ones(P, bool))
    for part in sharding.to_global(packed(cfg, everyone, rollout()[0], shards=2)[0], mesh):
        logp = step(logp, placed, batch, samples, feats, part)
    np.testing.assert_allclose(logp, old_logp(), atol=1e-5)
    assert logp.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)


def test_a_layer_s_matrices_are_collected_once_in_each_pass():
    """Once forward and once backward, for prompts and completions together."""
    mesh = sharding.make_mesh(1, 8, 1)
    cfg = with_(GRPO, micro_batches=1)
    batch, samples, verdict = repeated((prompts(), *rollout()), 8)
    experience = Experience(batch, samples, verdict, np.zeros((8, 8, 16), np.float32))
    parts = steps.make_grpo_steps(CFG, cfg, RECORD, mesh=mesh)
    ready, total = parts.prepare.eval_shape(experience, 0)
    now = state.abstract_state(CFG, RECORD)
    ((lanes_of_all,),) = packed(cfg, batch, samples, shards=8)
    lowered = parts.accumulate.lower(total, now, experience, ready, lanes_of_all)
    computation, collected = "", {"forward": [], "backward": []}
    for line in lowered.compile().as_text().splitlines():
        computation = line if line.endswith("{") else computation
        found = re.search(r"= f32\[([\d,]+)\]\S* all-gather\(", line)
        if found and not computation.startswith("ENTRY"):
            which = "backward" if "transpose(jvp" in line else "forward"
            collected[which].append(math.prod(int(n) for n in found[1].split(",")))
    layer = [x for path, x in now.params.items() if re.match("text/layers/.*kernel", path)]
    sizes = sorted(x.size // CFG.text.num_hidden_layers for x in layer)
    assert sorted(collected["forward"]) == sorted(collected["backward"]) == sizes


def test_head_gradient_is_summed_over_devices_once_and_not_per_chunk():
    mesh = sharding.make_mesh(2, 2, 2)
    rows = sharding.batch_sharding(mesh)
    h_BTD, head_DV = jnp.ones((8, 32, 16)), jnp.ones((16, 64))
    targets_BT = jnp.zeros((8, 32), jnp.int32)

    def loss(h, head):
        model = types.SimpleNamespace(head_kernel=lambda: head)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            logp_BT, _ = micro_batches.token_logps(
                model, h, targets_BT, chunk=8, count=jnp.int32(32)
            )
            return logp_BT.sum()

    head_layout = sharding.param_specs({"text/lm_head/kernel": head_DV}, mesh)
    layouts = (rows, head_layout["text/lm_head/kernel"])
    grads = jax.jit(jax.grad(loss, (0, 1)), in_shardings=layouts, out_shardings=layouts)
    program = grads.lower(h_BTD, head_DV).compile().as_text()
    computation, inside = "", []
    for line in program.splitlines():
        computation = line if line.endswith("{") else computation
        found = re.search(r"= f32\[([\d,]+)\]\S* (all-reduce|reduce-scatter)\(", line)
        if found and not computation.startswith("ENTRY"):
            inside.append(np.prod([int(n) for n in found[1].split(",")]))
    assert inside  # partial sums over the divided vocabulary are in the loop
    assert max(inside) < head_DV.size // 2  # the gradient of a device's half of the head is not
    want = jax.grad(lambda head: losses.token_logps(h_BTD, targets_BT, head)[0].sum())(head_DV)
    np.testing.assert_allclose(grads(h_BTD, head_DV)[1], want, rtol=1e-5)


def test_a_random_state_is_made_in_its_shards():
    mesh = sharding.make_mesh(2, 2, 2)
    now = state.init_state(CFG, ADAM, key=jax.random.key(7, impl="rbg"), mesh=mesh)
    shapes = state.abstract_state(CFG, ADAM)
    layout = state.state_shardings(shapes, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, now, layout))
    as_shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert as_shapes(now) == as_shapes(shapes)
    assert 0.15 < now.params["text/embed/embedding"].std() < 0.25
    with pytest.raises(ValueError, match="either key"):
        state.init_state(CFG, ADAM)


def test_relayout_moves_and_casts_and_passes_on_what_is_right_already():
    mesh = sharding.make_mesh(1, 4, 2)
    shapes = params()
    placed = jax.device_put(shapes, sharding.param_specs(shapes, mesh, "train"))
    out = state.relayout(placed, mesh, dtype="bfloat16")
    single = for_sampling(shapes)
    wanted = sharding.param_specs(single, mesh, "sample")
    assert set(out) == set(single) == set(abstract_params(CFG, "decoder"))
    for path, x in out.items():
        assert x.dtype == jnp.bfloat16 and x.sharding.is_equivalent_to(wanted[path], x.ndim), path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(single[path]).astype(jnp.bfloat16))
    # A second time everything is right, and nothing is copied.
    again = state.relayout(out, mesh, dtype="bfloat16")
    assert all(again[path] is out[path] for path in out)


def test_relayout_may_take_the_parameters_and_then_holds_no_two_copies():
    mesh = sharding.make_mesh(1, 4, 2)
    shapes = params()
    placed = jax.device_put(shapes, sharding.param_specs(shapes, mesh, "train"))
    out = state.relayout(placed, mesh, dtype="float32", take=True)
    assert set(out) == set(for_sampling(shapes))
    assert placed and all(path.startswith("vision/") for path in placed)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_gradients_are_float32_whatever_the_model_computes_in(param_dtype):
    cfg = dataclasses.replace(CFG, dtype="bfloat16", param_dtype=param_dtype)
    step = steps.make_sft_step(cfg, SftConfig(micro_batches=2), RECORD)
    now = state.abstract_state(cfg, RECORD)
    new, metrics = jax.eval_shape(step, now, conversations(), None)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(new.opt_state))
    assert all(x.dtype == param_dtype for x in jax.tree.leaves(new.params))
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())


def test_the_forbidden_token_has_no_probability_and_gets_no_gradient():
    head = np.asarray(run_grpo()[0]["text/lm_head/kernel"])
    assert (head[:, IMAGE] == 0).all() and (head[:, 1:50] != 0).any()
