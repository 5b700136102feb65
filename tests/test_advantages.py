"""Advantages against numbers worked by hand."""

import itertools
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.learn.advantages import AdvantageKind, advantages, has_signal, of_terms


def test_group_advantages_by_hand():
    reward = jnp.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]])
    # Row 1: mean 2.5, sample variance 5/3. Row 2: mean 1/4, variance (3/16 + 9/16) / 3 = 1/4.
    std = np.sqrt([[5 / 3], [1 / 4]])
    centred = np.array([[-1.5, -0.5, 0.5, 1.5], [-0.25, -0.25, -0.25, 0.75]])
    np.testing.assert_allclose(advantages(reward, eps=0.0), centred / std, rtol=1e-6)
    np.testing.assert_allclose(advantages(reward, eps=1.0), centred / (std + 1.0), rtol=1e-6)
    np.testing.assert_allclose(advantages(reward, "centred"), centred)
    # The mean of the other three: 1 - 3, 2 - 8/3, ...
    others = [[-2.0, -2 / 3, 2 / 3, 2.0], [-1 / 3, -1 / 3, -1 / 3, 1.0]]
    np.testing.assert_allclose(advantages(reward, "rloo"), others, rtol=1e-6)
    whole = np.sqrt((centred**2).sum() / 7)
    np.testing.assert_allclose(
        advantages(reward, "batch_std", eps=0.5), centred / (whole + 0.5), rtol=1e-6
    )
    with pytest.raises(ValueError, match="group, centred, rloo or batch_std"):
        advantages(reward, "std")


def test_equal_rewards_give_exactly_zero_and_one_sample_is_safe():
    # 0.1 added seven times and divided by seven is not 0.1 in float32.
    for kind, value in itertools.product(get_args(AdvantageKind), (0.1, 1.3, -0.7)):
        assert (advantages(jnp.full((3, 7), value), kind, eps=1e-9) == 0).all()
        assert (advantages(jnp.array([[value], [2.0]]), kind, eps=1e-9) == 0).all()


def test_eps_decides_how_loud_a_minor_difference_is():
    reward = jnp.array([[1.0, 1.0 + 1e-3]])
    loud = advantages(reward, eps=1e-9)
    quiet = advantages(reward, eps=1e-1)
    assert abs(loud[0, 1]) > 0.5 and abs(quiet[0, 1]) < 0.01


def test_has_signal():
    got = has_signal(jnp.array([[1.0, 1.0], [1.0, 1.25], [0.1, 0.1]]))
    assert got.tolist() == [False, True, False]


def test_a_baseline_of_alike_samples_by_hand():
    reward, alike = jnp.array([[1.0, 3.0, 0.0, 5.0]]), jnp.array([[True, True, False, False]])
    centred = np.array([[-1.0, 1.0, -2.5, 2.5]])
    np.testing.assert_allclose(advantages(reward, "centred", alike_PG=alike), centred)
    np.testing.assert_allclose(advantages(reward, "rloo", alike_PG=alike), 2 * centred)
    std = np.sqrt((1 + 1 + 6.25 + 6.25) / 3)
    np.testing.assert_allclose(
        advantages(reward, eps=0.0, alike_PG=alike), centred / std, rtol=1e-6
    )
    alone = jnp.array([[True, False, False, False]])
    assert advantages(reward, "rloo", alike_PG=alone)[0, 0] == 0


def test_the_std_of_the_batch_is_that_of_the_samples_that_count():
    reward = jnp.array([[0.0, 2.0], [0.0, 100.0]])
    counted = jnp.array([[True, True], [False, False]])
    got = advantages(reward, "batch_std", eps=0.0, counted_PG=counted)
    np.testing.assert_allclose(got[0] * np.sqrt(2), [-1.0, 1.0], rtol=1e-6)


def test_a_light_term_of_a_tied_group_stays_light_where_terms_are_normalised_by_themselves():
    accuracy = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    length = jnp.array([[0.2, 0.2], [0.3, 0.9]])
    # Unbiased std of a pair that differs by d is d / sqrt(2): each is normalised to +-1/sqrt(2).
    parts = np.array([[1.0, -1.0], [-0.1, 0.1]]) / np.sqrt(2)
    whole = np.sqrt((parts**2).sum() / 3)
    got = of_terms([(1.0, accuracy), (0.1, length)], eps=1e-9)
    np.testing.assert_allclose(got, parts / whole, rtol=1e-5)
    summed = advantages(accuracy + 0.1 * length, eps=1e-9)
    np.testing.assert_allclose(np.abs(summed), 1 / np.sqrt(2), rtol=1e-5)
