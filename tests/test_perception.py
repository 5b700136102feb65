"""The policy compared with itself on masked images (PAPO): numbers, weights, gradients."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_helpers import (
    CFG,
    GRPO,
    P,
    new_state,
    params,
    prompts,
    run_grpo,
    with_,
)

from srpo_jax.learn import grpo, steps
from srpo_jax.learn.grpo import GrpoConfig, Masked, Tokens
from srpo_jax.learn.objectives import MAX_PERCEPTION, Samples, perception_kl
from srpo_jax.learn.perception import make_mask_step
from srpo_jax.train_grpo import Stage

ON = with_(GRPO, perception_coef=0.5, masked_entropy_coef=-0.2)
BLACK = np.full(prompts().vision.patches.shape[-1], -2.0, np.float32)


def masked_features(step=0, ratio=0.6):
    mask = make_mask_step(BLACK, ratio)(prompts().vision, np.uint32(3), np.int32(step))
    return steps.make_encode_step(CFG)(params(), mask)


def test_the_kl_to_the_masked_view_is_raised_and_so_is_its_entropy():
    ones = jnp.ones((1, 3))
    logp, masked = jnp.log(jnp.array([[0.5, 0.5, 0.5]])), jnp.log(jnp.array([[0.25, 1.0, 0.25]]))
    view = Masked(masked, jnp.array([[0.3, 0.4, 9.0]]), jnp.array([[True, True, False]]))
    samples = Samples(jnp.zeros((1, 3), jnp.int32), ones > 0, number=1)
    tokens = Tokens(0 * ones, 0.25 * ones, logp, logp, logp, None, samples)
    cfg = GrpoConfig(perception_coef=2.0, masked_entropy_coef=-0.5)
    loss, aux = grpo.policy_loss(cfg, logp, 0 * logp, dataclasses.replace(tokens, masked=view))
    # exp(d) - 1 - d at d = log(1/2) and log(2); the last token's prompt has no image.
    kl = np.array([0.5 - 1 + np.log(2), 2 - 1 - np.log(2)])
    want = -0.25 * (2.0 * kl.sum() - 0.5 * (0.3 + 0.4))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(aux["parts"]["loss/perception"], want, rtol=1e-6)
    np.testing.assert_allclose(aux["token_sums"]["perception/kl"], kl.sum(), rtol=1e-6)
    off = grpo.policy_loss(GrpoConfig(), logp, 0 * logp, tokens)
    assert off[0] == 0 and not any("perception" in n for part in off[1].values() for n in part)


def test_the_kl_to_the_masked_view_is_bounded():
    far = jax.grad(lambda x: perception_kl(x, jnp.log(0.5)))
    assert perception_kl(jnp.array(-15.0), jnp.log(0.5)) == MAX_PERCEPTION
    assert far(-15.0) == 0.0 and far(-1.0) != 0.0


def test_patches_are_blacked_out_by_place_and_step_and_padding_never():
    vision, mask = prompts().vision, make_mask_step(BLACK, 0.6)
    drawn = [
        mask(vision, np.uint32(seed), np.int32(step)) for seed, step in ((3, 0), (3, 0), (3, 1))
    ]
    black = [np.asarray((x.patches == -2.0).all(-1)) for x in drawn]
    real = vision.frame_id >= 0
    assert (black[0] == black[1]).all() and (black[0] != black[2]).any()
    assert not black[0][~real].any() and 0.4 < black[0][real].mean() < 0.8
    kept = real & ~black[0]
    np.testing.assert_array_equal(np.asarray(drawn[0].patches)[kept], vision.patches[kept])
    every = make_mask_step(BLACK, 1.0)(vision, np.uint32(3), np.int32(0))
    assert (np.asarray(every.patches)[real] == -2.0).all()


def test_without_a_coefficient_no_image_is_masked():
    stage, lesson = types.SimpleNamespace(cfg=GRPO), types.SimpleNamespace()
    lesson.local = types.SimpleNamespace(batch=prompts())
    assert Stage.with_masked(stage, None, lesson, 0) is lesson
    with pytest.raises(ValueError, match="masked_entropy_coef=-0.1: no image is masked; set perc"):
        GrpoConfig(masked_entropy_coef=-0.1)


@pytest.mark.slow
def test_the_gradient_is_that_of_finite_differences_through_both_views():
    other = masked_features()
    on, metrics = run_grpo(ON, masked=other)
    off, without = run_grpo(GRPO)
    assert metrics["perception/kl"] > 1e-3 and metrics["perception/entropy"] > 1
    np.testing.assert_allclose(
        metrics["loss"] - without["loss"], metrics["loss/perception"], atol=1e-6
    )
    rng, eps = np.random.default_rng(0), 2e-3
    along = {k: rng.normal(size=x.shape).astype(np.float32) for k, x in on.items()}
    slope = sum(float(jnp.vdot(on[k] - off[k], along[k])) for k in on)

    def loss_at(t):
        now = new_state()
        moved = {k: x + t * along[k] for k, x in now.params.items()}
        at = dataclasses.replace(now, params=moved)
        return float(run_grpo(ON, masked=other, at=at)[1]["loss/perception"])

    want = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    assert abs(want) > 0.05
    np.testing.assert_allclose(slope, want, rtol=2e-2)


@pytest.mark.slow
def test_a_tower_that_trains_encodes_the_masked_patches_itself():
    vision = make_mask_step(BLACK, 0.6)(prompts().vision, np.uint32(3), np.int32(0))
    frozen, _ = run_grpo(ON, masked=masked_features())
    trained, _ = run_grpo(ON, masked=vision.patches, feats=None, freeze=())
    for path, gradient in frozen.items():
        np.testing.assert_allclose(trained[path], gradient, atol=2e-6, err_msg=path)
    assert any(np.abs(trained[k]).max() > 1e-4 for k in trained if k.startswith("vision/"))


def test_prompts_without_an_image_have_no_part_in_it():
    whole = prompts()
    source = np.where((np.arange(P) == 0)[:, None], whole.vision_src, -1)  # one prompt has one
    batch = whole.replace(vision_src=source)
    _, one = run_grpo(ON, batch=batch, masked=masked_features())
    _, every = run_grpo(ON, masked=masked_features())
    assert 0 < one["perception/kl"] < every["perception/kl"]
    assert 0 < one["perception/entropy"] < 0.5 * every["perception/entropy"]
    nothing = whole.replace(vision_src=np.full_like(source, -1))
    got, none = run_grpo(ON, batch=nothing, masked=masked_features())
    want, off = run_grpo(GRPO, batch=nothing)
    assert none["loss/perception"] == 0
    np.testing.assert_allclose(none["loss"], off["loss"], atol=1e-7)
    for path, gradient in want.items():
        np.testing.assert_allclose(got[path], gradient, atol=1e-7, err_msg=path)
