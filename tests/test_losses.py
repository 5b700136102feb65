"""Losses against numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.learn import losses


def test_weighted_positions_come_first_in_their_order():
    h, targets = jnp.arange(28.0).reshape(2, 7, 2), jnp.arange(14).reshape(2, 7)
    weights = jnp.zeros((2, 7)).at[0, 2].set(0.5).at[0, 4].set(0.25).at[1, 1].set(1.0)
    order, count = losses.weighted_first(weights)
    targets2, weights2 = (jnp.take_along_axis(x, order, 1) for x in (targets, weights))
    h2 = jnp.take_along_axis(h, order[..., None], 1)
    assert count == 2
    assert weights2[0, :2].tolist() == [0.5, 0.25]
    assert not weights2[:, 2:].any()
    assert targets2[0, :2].tolist() == [targets[0, 2], targets[0, 4]]
    np.testing.assert_array_equal(h2[1, 0], h[1, 1])


# --- aggregation -----------------------------------------------------------------------------


def _uneven():
    """Lengths 10, 10, 10, 1000 with values 1, 1, 1, -1."""
    mask = jnp.arange(1000)[None] < jnp.array([10, 10, 10, 1000])[:, None]
    return jnp.broadcast_to(jnp.array([1.0, 1.0, 1.0, -1.0])[:, None], mask.shape), mask


def spread(mask, weight, **kwargs):
    """The weight of each token of ``mask``."""
    return mask * losses.token_weights(mask.sum(1), weight, **kwargs)[:, None]


@pytest.mark.parametrize(
    "mode,want",
    [
        ("sequence", (1 + 1 + 1 - 1) / 4),
        ("token", (30 - 1000) / 1030),
        ("constant", (30 - 1000) / (4 * 2000)),
    ],
)
def test_aggregation_of_uneven_lengths(mode, want):
    x, mask = _uneven()
    weights = spread(mask, jnp.ones(4), mode=mode, length_cap=2000)
    np.testing.assert_allclose(losses.aggregate(x, weights), want, rtol=1e-5)
    # Micro-batches of one sequence: shares add up to the same loss, with no further division.
    parts = [losses.aggregate(x[i : i + 1], weights[i : i + 1]) for i in range(4)]
    np.testing.assert_allclose(sum(parts), want, rtol=1e-5)


def test_constant_uses_the_configured_cap_and_not_the_width_of_the_batch():
    mask = jnp.array([[1, 1, 0]])
    wide = jnp.pad(mask, ((0, 0), (0, 9)))
    for m in (mask, wide):
        weights = spread(m, jnp.ones(1), mode="constant", length_cap=8)
        np.testing.assert_allclose(weights.sum(), 2 / 8)
    with pytest.raises(ValueError, match="length_cap"):
        spread(mask, jnp.ones(1), mode="constant")
    with pytest.raises(ValueError, match="aggregation"):
        spread(mask, jnp.ones(1), mode="mean")


@pytest.mark.parametrize("mode", ["sequence", "token", "constant"])
def test_a_sequence_of_weight_zero_or_without_tokens_counts_as_absent(mode):
    mask = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    x = jnp.array([[1.0, 2.0, 3.0, 99.0], [5.0, 5.0, 9.0, 9.0], [7.0] * 4, [4.0, 1.0, 1.0, 1.0]])
    kwargs = dict(mode=mode, length_cap=10)
    got = losses.aggregate(x, spread(mask, jnp.array([1, 0, 1, 1.0]), **kwargs))
    kept = jnp.array([0, 3])
    alone = losses.aggregate(x[kept], spread(mask[kept], jnp.ones(2), **kwargs))
    # By hand: sequence (2 + 4) / 2; token (6 + 4) / 4; constant (6 + 4) / 20.
    want = {"sequence": 3.0, "token": 2.5, "constant": 0.5}[mode]
    np.testing.assert_allclose([got, alone], [want, want], rtol=1e-6)


def test_sequence_weights_scale_a_sequence():
    mask = jnp.ones((2, 2))
    weights = spread(mask, jnp.array([3.0, 1.0]), mode="sequence")
    np.testing.assert_allclose(weights, [[3 / 8, 3 / 8], [1 / 8, 1 / 8]])


@pytest.mark.parametrize("mode", ["sequence", "token", "constant"])
def test_nothing_left_gives_zero_and_not_nan(mode):
    weights = spread(jnp.zeros((2, 3)), jnp.ones(2), mode=mode, length_cap=3)
    assert (weights == 0).all()
    assert losses.aggregate(jnp.full((2, 3), jnp.nan), weights) == 0
    assert not np.isnan(np.asarray(spread(jnp.ones((2, 3)), jnp.zeros(2)))).any()


def test_masked_tokens_have_exactly_zero_gradient():
    weights = spread(jnp.array([[1, 0, 1]]), jnp.ones(1))
    x = jnp.array([[1.0, jnp.inf, 2.0]])
    assert jax.grad(losses.aggregate)(x, weights).tolist() == [[0.5, 0.0, 0.5]]


# --- SFT -------------------------------------------------------------------------------------


def test_sft_weights_shift_by_one_and_are_a_mean_over_the_whole_batch():
    loss_mask = jnp.array([[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1]])
    weights = losses.sft_weights(loss_mask, jnp.array([True, True, False]))
    # Three loss tokens in the valid sequences; tokens 2, 3 of the first are predicted at 1, 2.
    third = 1 / 3
    want = [[0, third, third, 0], [third, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    logp = -jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(losses.sft_loss(logp, weights), (1 + 2 + 4) / 3, rtol=1e-6)


def test_sft_batch_of_fillers_has_zero_loss():
    weights = losses.sft_weights(jnp.ones((2, 3)), jnp.zeros(2, bool))
    assert losses.sft_loss(jnp.full((2, 3), -5.0), weights) == 0
