"""One draw: truncation, frequencies, log-probabilities and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_helpers import assert_frequencies, reference_truncation, softmax

from srpo_jax.sampling import logits as sampling_logits

draw = jax.jit(sampling_logits.draw)
sample_keys = jax.jit(sampling_logits.sample_keys, static_argnums=2)


def keys_of(count: int) -> jax.Array:
    base = sampling_logits.base_key(0, 0)
    return sample_keys(base, np.arange(count, dtype=np.uint32), 1)[:, 0]


@pytest.mark.parametrize("size", [5, 37, 152, 1024])  # one chunk, padded chunks, even chunks
def test_draws_follow_the_probabilities(size):
    row = np.random.default_rng(size).normal(0, 1.5, size).astype(np.float32)
    row[[0, size // 2, size - 1]] = -np.inf
    n = 10_000
    tokens, logp = draw(keys_of(n), np.broadcast_to(row, (n, size)))
    assert_frequencies(np.asarray(tokens), softmax(row))
    np.testing.assert_allclose(logp, np.log(softmax(row)[np.asarray(tokens)]), atol=2e-6)


def test_a_token_of_probability_zero_is_never_drawn_whatever_the_sums_round_to():
    size, n = 4096, 2000
    row = np.full(size, -np.inf, np.float32)
    row[[17, 1033, 4000]] = [0.0, -30.0, 3.0]  # sums full of equal neighbours
    tokens, _ = draw(keys_of(n), np.broadcast_to(row, (n, size)))
    assert set(np.asarray(tokens)) == {17, 4000}
    # The extreme uniforms too: 0 must not fall on the empty first entries, and just below 1 not on
    # the empty last ones, where a prefix sum may round to more than it was before them.
    weight = np.random.default_rng(0).random((3000, 1187), np.float32)
    weight[:, :100] = weight[:, 900:] = 0
    for uniform in (0.0, np.nextafter(1, 0, dtype=np.float32)):
        at = jax.jit(sampling_logits._invert)(weight, np.full(3000, uniform, np.float32))
        assert (np.take_along_axis(weight, np.asarray(at)[:, None], 1) > 0).all()


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, 1, 0), (7, 1, 0), (0, 0.05, 0), (0, 0.8, 0), (0, 0.99, 0), (0, 1, 0.1), (9, 0.7, 0.08)],
)
def test_truncation_keeps_the_tokens_that_sorting_would(top_k, top_p, min_p):
    rows = np.random.default_rng(1).normal(0, 2, (20, 151)).astype(np.float32)
    rows[:, 3] = -np.inf
    cut = functools.partial(sampling_logits.truncate, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = jax.jit(cut)(rows)
    expected = np.stack([reference_truncation(r, top_k, top_p, min_p) for r in rows])
    expected[:, 3] = False
    np.testing.assert_array_equal(np.isfinite(kept), expected)
    np.testing.assert_array_equal(np.asarray(kept)[expected], rows[expected])


def test_truncation_keeps_all_of_several_equal_tokens_and_is_off_by_default():
    row = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    kept = sampling_logits.truncate(row, top_k=2, top_p=1.0, min_p=0.0)
    assert np.isfinite(kept)[0].tolist() == [False, True, True, True, False]
    assert sampling_logits.truncate(row, top_k=0, top_p=1.0, min_p=0.0) is row
    assert sampling_logits.truncate(row, top_k=5, top_p=1.0, min_p=0.0) is row


def test_log_probabilities_are_of_the_truncated_and_of_the_whole_distribution():
    n, temperature = 4000, 0.7
    row = np.random.default_rng(2).normal(0, 1, 40).astype(np.float32)
    sample = functools.partial(
        sampling_logits.sample,
        temperature=temperature,
        top_k=6,
        top_p=0.9,
        forbidden_ids=(int(row.argmax()),),
    )
    rows = np.broadcast_to(row, (n, 40))
    token, sample_logp, policy_logp = jax.jit(sample)(rows, keys_of(n))
    scaled = np.where(np.arange(40) == row.argmax(), -np.inf, row) / temperature
    kept = reference_truncation(scaled, 6, 0.9, 0)
    sampled = softmax(np.where(kept, scaled, -np.inf))
    assert 1 < kept.sum() <= 6
    assert_frequencies(np.asarray(token), sampled)
    np.testing.assert_allclose(sample_logp, np.log(sampled[np.asarray(token)]), atol=1e-5)
    np.testing.assert_allclose(policy_logp, np.log(softmax(scaled)[np.asarray(token)]), atol=1e-5)


def test_greedy_takes_the_first_best_token_that_is_allowed():
    rows = jnp.array([[0.0, 3.0, 1.0, 3.0, 2.0], [5.0, 4.0, 4.5, 4.5, 0.0]])
    greedy = functools.partial(sampling_logits.sample, temperature=0.0, forbidden_ids=(0,))
    token, sample_logp, policy_logp = jax.jit(greedy)(rows, keys_of(2))
    assert token.tolist() == [1, 2]
    assert sample_logp.tolist() == [0.0, 0.0]
    allowed = np.asarray(rows)[:, 1:]
    expected = [np.log(softmax(allowed))[0, 0], np.log(softmax(allowed))[1, 1]]
    np.testing.assert_allclose(policy_logp, expected, atol=1e-6)
    long = np.random.default_rng(0).normal(size=(50, 299)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(sampling_logits.greedy)(long), long.argmax(-1))


def test_keys_are_the_documented_chain_of_fold_ins():
    key = jax.random.key(5, impl="threefry2x32")
    for part in (3, 900, 2):  # step, prompt key, sample
        key = jax.random.fold_in(key, part)
    base = sampling_logits.base_key(5, 3)
    keys = sampling_logits.sample_keys(base, jnp.array([1, 900], jnp.uint32), 4)
    np.testing.assert_array_equal(keys[1, 2], jax.random.key_data(key))
    token_7 = sampling_logits.token_keys(keys[:, :2], jnp.full((2, 2), 7))
    expected = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(keys[1, 1]), 7))
    np.testing.assert_array_equal(token_7[1, 1], expected)
