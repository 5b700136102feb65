"""The jitted steps on a tiny real model: exactness of batching, freezing, meshes, and learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import completion_hidden
from step_helpers import (
    ADAM,
    BONUS,
    CFG,
    GEOMETRY,
    GRPO,
    IMAGE,
    KL,
    G,
    M,
    P,
    R,
    S,
    assert_close,
    conversations,
    features,
    grpo_steps,
    logps,
    new_state,
    old_logp,
    one_update,
    params,
    prompts,
    rollout,
    run_grpo,
    sft_step,
    update_of,
    with_,
)

from srpo_jax.data.batching import Media, collate, collate_packed, encode_arrays
from srpo_jax.data.packing import Packer, RowShape
from srpo_jax.data.vision_arrays import VisionIds
from srpo_jax.learn import grpo, micro_batches, state
from srpo_jax.learn.head import token_logps
from srpo_jax.learn.objectives import Samples
from srpo_jax.learn.steps import SftConfig
from srpo_jax.model.qwen2_5_vl import bind
from srpo_jax.rewards.profiles import PAPER
from srpo_jax.structs import Experience

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
    assert metrics["conversations"] == P  # one of them a filler, another one two


def test_sft_does_not_depend_on_the_number_of_micro_batches():
    whole, metrics = sft_step()(new_state(), conversations(), features())
    cfg = SftConfig(micro_batches=4, logit_chunk=5)
    new, other = sft_step(cfg)(new_state(), conversations(), features())
    assert_close(new.opt_state, whole.opt_state, 1e-6)
    np.testing.assert_allclose(other["loss"], metrics["loss"], atol=1e-6)


def test_sft_packs_conversations_without_changing_what_is_learnt():
    """Six conversations with images, one a sequence and packed; packed, rows of fillers are left,
    and what stands in those is not even read."""
    rng, samples = np.random.default_rng(5), []
    for length, rows in ((12, 4), (5, 0), (9, 2), (7, 0), (8, 2), (11, 4)):
        merged, grid = rows, [(1, rows, 4)] if rows else ()
        ids = [1, *[IMAGE] * merged, *rng.integers(1, 50, length - merged - 1)]
        pixels = rng.normal(size=(4 * merged, GEOMETRY.patch_dim)).astype(np.float32)
        media = Media(pixels if rows else None, grid)
        samples.append(
            encode_arrays(
                ids,
                VisionIds(IMAGE, 61, geometry=GEOMETRY),
                media,
                loss_mask=np.arange(length) > merged + 1,
            )
        )
    shapes = {"rows": 6, "patches": 64, "geometry": GEOMETRY}
    (way, *_) = Packer(shards=1, rows=6, patches=64).ways(samples, RowShape(1, 28))
    assert way is not None and way.rows == 2
    packed = collate_packed([[samples[i] for i in g] for g in way.groups], tokens=28, **shapes)
    alone = collate(samples, tokens=28, **shapes)
    assert packed.valid.tolist() == [True] * 2 + [False] * 4 and packed.vision is not None
    packed.vision.patches[2:], packed.vision_src[2:] = np.nan, 0
    step = sft_step(SftConfig(micro_batches=6))
    (want, expected), (got, metrics) = (step(new_state(), b, None) for b in (alone, packed))
    assert_close(got.opt_state, want.opt_state, 1e-6)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    assert metrics["conversations"] == 6


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
    reward = np.asarray(PAPER.rewards(rollout()[1]).total)
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


# What looks at a sample as a whole, and at where its first round ends.
OF_SAMPLES = with_(
    ALL_TERMS, objective="gspo", credit="segments", tis_level="sequence", tis_floor=0.1
)


@functools.cache
def padded_way(cfg=ALL_TERMS):
    """The loss of ``cfg``, and its gradient, where each sample is a padded sequence."""

    def loss(trained, experience, ready):
        samples, (P, G, R) = experience.rollout, experience.rollout.completions.shape
        model = bind(CFG, {**params(), **trained})
        mask = samples.completion_mask
        inputs = (experience.batch, experience.features, samples.completions, mask)
        h = completion_hidden(model, *inputs).reshape(P * G, R, -1)
        targets, head_cfg = samples.completions.reshape(P * G, R), cfg.head
        logp, entropy = token_logps(h, targets, model.head_kernel(), head_cfg)
        logp, entropy = logp.reshape(P, G, R), entropy.reshape(P, G, R)
        of_prompt = lambda x: x[:, None, None]  # noqa: E731
        old = jnp.where(of_prompt(experience.carried), samples.policy_logp, experience.old_logp)
        old = jnp.where(of_prompt(ready.on_policy_P), jax.lax.stop_gradient(logp), old)
        adv, rest, weight = (
            x[..., None] * mask for x in (ready.adv_PG, ready.rest_adv_PG, ready.weight_PG)
        )
        adv = jnp.where(jnp.arange(R)[None, None] < ready.first_end_PG[..., None], adv, rest)
        logps = (samples.sample_logp, samples.policy_logp, old, experience.ref_logp)
        number = jnp.broadcast_to(jnp.arange(G)[None, :, None], (P, G, R)).reshape(P, -1)
        flat = lambda x: x.reshape(P, -1)  # noqa: E731
        counted = flat(weight) != 0
        kl_coef = flat(jnp.broadcast_to(of_prompt(experience.kl_coef), (P, G, R)))
        values = map(flat, (adv, weight, *logps))
        tokens = grpo.Tokens(*values, Samples(number, counted, G), kl_coef=kl_coef)
        return grpo.policy_loss(cfg, flat(logp), flat(entropy), tokens)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def eventful():
    """Groups of weight 0, older policies, log-probs that all differ, a filler."""
    noise = np.random.default_rng(8).normal(size=(3, P, G, R)).astype(np.float32) * 0.2
    samples, verdict = rollout()
    near, far, ref = np.asarray(old_logp())[None] + noise
    samples = samples.replace(policy_logp=far, sample_logp=far - 0.1)
    weight = np.array([1, 0.5, 0, 1, 1, 1, 1, 2], np.float32)
    carried = np.arange(P) % 3 == 1
    taken = update_of(ALL_TERMS)
    kl_coef = np.linspace(0.05, 0.4, P, dtype=np.float32)
    of_group = dict(carried=carried, update=taken, weight=weight, kl_coef=kl_coef)
    return Experience(prompts(), samples, verdict, features(), near, ref, **of_group)


@pytest.mark.parametrize("update", [0, 1])
def test_lanes_compute_what_padded_sequences_compute(update):
    """Every aggregation, with each term in force, groups of weight 0, older policies, a filler."""
    every = eventful()
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


def test_lanes_know_the_samples_whose_tokens_they_hold():
    """A ratio of whole samples, and advantages by segments of them."""
    every = eventful()
    new, metrics = one_update(grpo_steps(OF_SAMPLES), OF_SAMPLES, new_state(), every, 1)
    ready = grpo.prepare(OF_SAMPLES, every, 1)
    (loss, aux), want = padded_way(OF_SAMPLES)(new_state().params, every, ready)
    assert_close(new.opt_state, want, 1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
    for name, value in grpo.update_metrics(aux, ready.tokens).items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-5, err_msg=name)
    assert (np.asarray(ready.adv_PG) != np.asarray(ready.rest_adv_PG)).any()
    assert 1.001 < metrics["ratio/max"] and np.abs(want["text/lm_head/kernel"]).max() > 1e-3


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_grpo_reaches_the_tower_when_it_trains():
    want, metrics = run_grpo()
    trained, other = run_grpo(feats=None, freeze=())
    np.testing.assert_allclose(other["loss"], metrics["loss"], atol=1e-6)
    assert_close({path: trained[path] for path in want}, want, 1e-6)
    vision = {path: g for path, g in trained.items() if path.startswith("vision/")}
    assert vision and all(jnp.abs(g).max() > 0 for g in vision.values())


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="need old_logp"):
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
