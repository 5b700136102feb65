"""What is minimised for each token, against numbers worked by hand."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.learn.objectives import (
    KlKind,
    Samples,
    cispo_loss,
    clipped_loss,
    importance_weight,
    kl_estimate,
    perception_kl,
    ratio_of,
    sapo_loss,
    sequence_ratio,
)

# --- KL --------------------------------------------------------------------------------------


def test_kl_estimators_by_hand():
    logp, ref = jnp.log(jnp.array(0.5)), jnp.log(jnp.array(0.25))
    ln2 = np.log(2.0)
    want = {"k1": ln2, "k2": ln2**2 / 2, "k3": 0.5 - 1 + ln2}
    for kind, value in want.items():
        np.testing.assert_allclose(kl_estimate(logp, ref, kind), value, rtol=1e-6)
        assert kl_estimate(logp, logp, kind) == 0
    # The other way round: d = ln 2.
    want = {"k1": -ln2, "k2": ln2**2 / 2, "k3": 2 - 1 - ln2}
    want["k3+"] = want["k3"]
    for kind, value in want.items():
        np.testing.assert_allclose(kl_estimate(ref, logp, kind), value, rtol=1e-6)


def test_k1_and_k3_average_to_the_kl_of_policy_from_reference():
    p, q = np.array([0.7, 0.3]), np.array([0.4, 0.6])
    true = 0.7 * np.log(0.7 / 0.4) + 0.3 * np.log(0.3 / 0.6)  # KL(p || q), not KL(q || p)
    for kind in ("k1", "k3"):
        estimate = kl_estimate(jnp.log(p), jnp.log(q), kind)
        np.testing.assert_allclose(np.sum(p * estimate), true, rtol=1e-5)


@pytest.mark.parametrize("kind", get_args(KlKind))
def test_minimising_kl_lowers_tokens_the_policy_likes_more_than_the_reference(kind):
    grad = jax.grad(lambda logp: kl_estimate(logp, jnp.log(0.25), kind))(jnp.log(0.5))
    want = {"k1": 1.0, "k2": np.log(2.0), "k3+": np.log(2.0), "k3": 0.5}  # k3: 1 - exp(d)
    np.testing.assert_allclose(grad, want[kind], rtol=1e-6)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_minimising_kl_raises_tokens_the_reference_likes_more(kind):
    grad = jax.grad(lambda logp: kl_estimate(logp, jnp.log(0.5), kind))(jnp.log(0.25))
    np.testing.assert_allclose(grad, {"k2": -np.log(2.0), "k3": -1.0}[kind], rtol=1e-6)


def test_descending_on_k3_brings_two_distributions_together():
    ref = jax.nn.log_softmax(jnp.array([2.0, 0.0, -1.0]))

    def expected_kl(z):
        logp = jax.nn.log_softmax(z)
        probs = jax.lax.stop_gradient(jnp.exp(logp))
        return jnp.sum(probs * kl_estimate(logp, ref, "k3"))

    z = jnp.array([-1.0, 1.0, 0.0])
    start = expected_kl(z)
    z = jax.lax.fori_loop(0, 200, lambda _, z: z - 0.3 * jax.grad(expected_kl)(z), z)
    assert expected_kl(z) < 1e-3 < start


def test_kl_is_clamped_and_unknown_kind_is_refused():
    far = jnp.array([-1000.0, 1000.0])
    for kind in ("k1", "k2", "k3"):
        assert np.isfinite(kl_estimate(jnp.zeros(2), far, kind)).all()
    np.testing.assert_allclose(kl_estimate(jnp.zeros(()), far[0], "k1"), 20.0)
    with pytest.raises(ValueError, match="k1, k2, k3 or k3"):
        kl_estimate(far, far, "k4")


# --- clipped objective -----------------------------------------------------------------------


def _clip(ratio, advantage, **kwargs):
    def loss(logp):
        bounds = dict(clip_low=0.2, clip_high=0.3)
        return clipped_loss(jnp.exp(logp), jnp.array(advantage), **bounds, **kwargs)

    (value, stats), grad = jax.value_and_grad(loss, has_aux=True)(jnp.log(jnp.array(ratio)))
    return float(value), float(grad), {k: float(v) for k, v in stats.items()}


@pytest.mark.parametrize(
    "ratio,advantage,loss,grad,held",
    [
        (1.5, 1.0, -1.3, 0.0, "clip_high"),  # enough of a good thing
        (1.5, -1.0, 1.5, 1.5, None),  # a bad token that grew must still be pushed back
        (0.5, 1.0, -0.5, -0.5, None),  # a good token that shrank must still be pulled up
        (0.5, -2.0, 1.6, 0.0, "clip_low"),
        (1.25, 2.0, -2.5, -2.5, None),  # between 1 + clip_low and 1 + clip_high
        (1.0, 3.0, -3.0, -3.0, None),
    ],
)
def test_clipping_on_both_sides(ratio, advantage, loss, grad, held):
    got_loss, got_grad, stats = _clip(ratio, advantage)
    np.testing.assert_allclose([got_loss, got_grad], [loss, grad], rtol=1e-6, atol=1e-7)
    for name in ("clip_low", "clip_high", "clip_dual"):
        assert stats[name] == (1.0 if name == held else 0.0)


def test_dual_clip_bounds_the_loss_of_a_bad_token_with_a_huge_ratio():
    loss, grad, stats = _clip(5.0, -1.0, dual_clip=3.0)
    assert (loss, grad, stats["clip_dual"]) == (3.0, 0.0, 1.0)
    loss, grad, stats = _clip(2.0, -1.0, dual_clip=3.0)
    np.testing.assert_allclose([loss, grad, stats["clip_dual"]], [2.0, 2.0, 0.0], rtol=1e-6)
    assert _clip(5.0, 1.0, dual_clip=3.0)[2]["clip_dual"] == 0.0


def test_ratio_of_equal_log_probs_is_exactly_one_and_huge_ratios_are_finite():
    logp = jnp.array([-3.3, -0.001, -1e30])
    assert (ratio_of(logp, logp) == 1).all()
    assert np.isfinite(ratio_of(jnp.zeros(1), jnp.full(1, -1e30))).all()


# Two rows: of the first, samples 0 (tokens 0, 2, 3) and 1 (token 1); token 4 does not count.
SAMPLES = Samples(
    jnp.array([[0, 1, 0, 0, 1], [2, 2, 1, 1, 1]]),
    jnp.array([[True, True, True, True, False], [True, True, True, True, True]]),
    number=3,
)
X = jnp.array([[1.0, 2.0, 3.0, 5.0, 100.0], [1.0, 3.0, 0.0, 3.0, 6.0]])


def test_sums_and_means_of_samples_by_hand():
    sums = [[9.0, 2.0, 9.0, 9.0, 2.0], [4.0, 4.0, 9.0, 9.0, 9.0]]
    means = [[3.0, 2.0, 3.0, 3.0, 2.0], [2.0, 2.0, 3.0, 3.0, 3.0]]
    np.testing.assert_allclose(SAMPLES.sum(X), sums)
    np.testing.assert_allclose(SAMPLES.mean(X), means)


def test_a_sequence_ratio_is_a_geometric_mean_and_its_gradient_is_shared():
    old = jnp.zeros_like(X)
    logp = jnp.log(jnp.array([[2.0, 3.0, 4.0, 1.0, 7.0], [1.0, 1.0, 1.0, 1.0, 8.0]]))
    want = [[2.0, 3.0, 2.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0, 2.0]]
    np.testing.assert_allclose(sequence_ratio(logp, old, SAMPLES), want, rtol=1e-6)
    # The ratios of sample 0's three tokens add up to 3 * 2, of which each token moves a third.
    grad = jax.grad(lambda x: sequence_ratio(x, old, SAMPLES)[0, :4].sum())(logp)
    np.testing.assert_allclose(grad[0], [2.0, 3.0, 2.0, 2.0, 0.0], rtol=1e-6)


def test_cispo_bounds_the_weight_and_never_the_gradient():
    def loss(logp, old):
        return cispo_loss(ratio_of(logp, old), logp, jnp.array(2.0), clip_high=0.5)[0]

    old = jnp.log(0.1)
    for ratio, weight in ((0.2, 0.2), (1.4, 1.4), (3.0, 1.5)):
        logp = jnp.log(0.1 * ratio)
        np.testing.assert_allclose(loss(logp, old), -weight * 2.0 * logp, rtol=1e-5)
        np.testing.assert_allclose(jax.grad(loss)(logp, old), -weight * 2.0, rtol=1e-5)
    held = cispo_loss(jnp.array([1.4, 1.6]), jnp.zeros(2), jnp.ones(2), 0.5)[1]["clip_high"]
    assert held.tolist() == [False, True]


@pytest.mark.parametrize("advantage,t", [(2.0, 1.0), (-2.0, 1.05)])
def test_sapo_learns_as_the_policy_gradient_at_a_ratio_of_one_and_less_far_from_it(advantage, t):
    grad = jax.grad(lambda r: sapo_loss(r, jnp.array(advantage)))
    np.testing.assert_allclose(grad(1.0), -advantage, rtol=1e-6)
    s = 1 / (1 + np.exp(-t * 1.5))  # at a ratio of 2.5
    np.testing.assert_allclose(grad(2.5), -4 * s * (1 - s) * advantage, rtol=1e-5)
    np.testing.assert_allclose(sapo_loss(2.5, jnp.array(advantage)), -4 / t * s * advantage, 1e-5)


def test_importance_weights_are_cut_off_or_left_out():
    trainer, sampler = jnp.log(jnp.array([0.5, 0.2, 0.9])), jnp.log(jnp.array([0.25, 0.4, 0.1]))
    np.testing.assert_allclose(
        importance_weight(trainer, sampler, cap=2.5), [2.0, 0.5, 2.5], rtol=1e-6
    )
    np.testing.assert_allclose(
        importance_weight(trainer, sampler, cap=2.5, floor=0.6), [2.0, 0.0, 0.0], rtol=1e-6
    )
    grad = jax.grad(lambda x: importance_weight(x, -jnp.ones(()), cap=9.0))(-0.5)
    assert grad == 0


def test_importance_weights_of_whole_samples_are_products():
    d = jnp.log(jnp.array([[2.0, 3.0, 4.0, 0.5, 7.0], [1.0, 1.0, 1.0, 1.0, 8.0]]))
    got = importance_weight(d, jnp.zeros_like(d), cap=5.0, samples=SAMPLES)
    np.testing.assert_allclose(
        got, [[4.0, 3.0, 4.0, 4.0, 3.0], [1.0, 1.0, 5.0, 5.0, 5.0]], rtol=1e-5
    )


# --- gradients -------------------------------------------------------------------------------

OLD = np.random.default_rng(0).uniform(-3.0, -0.2, X.shape)
NOW = OLD + np.random.default_rng(1).normal(0, 0.5, X.shape)  # beyond every bound, somewhere
ADV = np.random.default_rng(2).normal(size=X.shape)
# Name -> loss of each token by (log-probs, the ones that constants are worked out at).
DIFFERENTIATED = {
    "clip": lambda x, _: clipped_loss(ratio_of(x, OLD), ADV, clip_high=0.3, dual_clip=1.5)[0],
    "gspo": lambda x, _: clipped_loss(sequence_ratio(x, OLD, SAMPLES), ADV, clip_high=0.1)[0],
    "cispo": lambda x, at: cispo_loss(ratio_of(at, OLD), x, ADV, 0.3)[0],
    "sapo": lambda x, _: sapo_loss(ratio_of(x, OLD), ADV),
    "k1": lambda x, _: kl_estimate(x, OLD, "k1"),
    "k2": lambda x, _: kl_estimate(x, OLD, "k2"),
    "k3": lambda x, _: kl_estimate(x, OLD, "k3"),
    "perception": lambda x, _: perception_kl(x, OLD),
    "perception_masked": lambda x, _: perception_kl(OLD, x),
    "tis": lambda x, at: importance_weight(at, OLD, cap=1.5, samples=SAMPLES) * x,
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_those_of_finite_differences_in_float64(name):
    loss, eps = DIFFERENTIATED[name], 1e-6
    with jax.enable_x64(True):
        total = jax.jit(lambda x, at: jnp.sum(jnp.asarray(loss(x, at)) * (1 + SAMPLES.of_token)))
        got = jax.grad(lambda x: total(x, x))(NOW)
        want = np.zeros_like(NOW)
        for at in np.ndindex(NOW.shape):
            step = np.zeros_like(NOW)
            step[at] = eps
            want[at] = (total(NOW + step, NOW) - total(NOW - step, NOW)) / (2 * eps)
        assert got.dtype == np.float64 and np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, atol=1e-8)
