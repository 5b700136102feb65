"""Losses against numbers worked by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from srpo_jax.learn import losses

B, T, D, V = 2, 7, 8, 33


def _inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    h = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    head = jax.random.normal(keys[1], (D, V)).astype(dtype)
    return h, jax.random.randint(keys[2], (B, T), 7, V), head


def _dense(h, targets, head, temperature=1.0, forbidden=()):
    """Reference: the whole [B, T, V] array and jax.nn.log_softmax."""
    logits = jnp.einsum("btd,dv->btv", h.astype(jnp.float32), head.astype(jnp.float32))
    allowed = np.setdiff1d(np.arange(V), np.array(forbidden, int))
    logp = jax.nn.log_softmax(logits[..., allowed] / temperature, -1)
    index = jnp.searchsorted(jnp.asarray(allowed), targets)
    picked = jnp.take_along_axis(logp, index[..., None], -1)[..., 0]
    return picked, -jnp.sum(jnp.exp(logp) * logp, -1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature,forbidden", [(1.0, ()), (0.7, (5, 6))])
def test_token_logps_equal_dense_log_softmax(chunk, temperature, forbidden):
    h, targets, head = _inputs()
    kwargs = dict(temperature=temperature, forbidden_ids=forbidden, chunk=chunk)
    got = losses.token_logps(h, targets, head, **kwargs)
    want = _dense(h, targets, head, temperature, forbidden)
    for g, w in zip(got, want, strict=True):
        assert g.shape == (B, T) and g.dtype == jnp.float32
        np.testing.assert_allclose(g, w, atol=2e-6)


def test_token_logps_gradients_equal_dense_log_softmax():
    h, targets, head = _inputs()
    c_BT = jax.random.normal(jax.random.key(9), (2, B, T))

    def scalar(fn, h, head):
        logp, entropy = fn(h, head)
        return jnp.sum(c_BT[0] * logp + c_BT[1] * entropy)

    def chunked(h, head):
        return losses.token_logps(
            h,
            targets,
            head,
            temperature=0.7,
            forbidden_ids=(5, 6),
            chunk=3,
            entropy_grad=True,
        )

    def dense(h, head):
        return _dense(h, targets, head, 0.7, (5, 6))

    got = jax.grad(lambda *a: scalar(chunked, *a), (0, 1))(h, head)
    want = jax.grad(lambda *a: scalar(dense, *a), (0, 1))(h, head)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3, 4, T])
def test_positions_beyond_the_count_are_left_out_and_take_no_gradient(count):
    h, targets, head = _inputs()

    def total(h, head, **kwargs):
        logp, entropy = losses.token_logps(h, targets, head, chunk=3, **kwargs)
        kept = jnp.arange(T) < count
        return jnp.sum(jnp.where(kept, logp, 0.0)), (logp, entropy)

    grad = jax.grad(total, (0, 1), has_aux=True)
    got, (logp, entropy) = jax.jit(grad)(h, head, count=jnp.int32(count))
    want, _ = grad(h, head)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6)
    computed = -(-count // 3) * 3  # whole chunks
    assert not np.any(logp[:, computed:])
    assert not np.any(entropy[:, computed:])
    assert np.all(logp[:, :count] < 0)


def test_the_head_is_not_saved_once_per_chunk():
    """Of 16 chunks, each left out or not: what the backward pass keeps holds no head at all."""
    h, targets = jnp.zeros((1, 64, 8), jnp.bfloat16), jnp.zeros((1, 64), jnp.int32)

    def loss(head, count):
        return losses.token_logps(h, targets, head, chunk=4, count=count)[0].sum()

    program = jax.jit(jax.grad(loss)).lower(jnp.ones((8, 128)), jnp.int32(64)).compile().as_text()
    assert "[8,128]" in program and not re.search(r"\[16,(1,)?8,128\]", program)


def test_weighted_positions_come_first_in_their_order():
    h, targets, _ = _inputs()
    weights = jnp.zeros((B, T)).at[0, 2].set(0.5).at[0, 4].set(0.25).at[1, 1].set(1.0)
    order, count = losses.weighted_first(weights)
    targets2, weights2 = (jnp.take_along_axis(x, order, 1) for x in (targets, weights))
    h2 = jnp.take_along_axis(h, order[..., None], 1)
    assert count == 2
    assert weights2[0, :2].tolist() == [0.5, 0.25]
    assert not weights2[:, 2:].any()
    assert targets2[0, :2].tolist() == [targets[0, 2], targets[0, 4]]
    np.testing.assert_array_equal(h2[1, 0], h[1, 1])


def test_token_logps_of_bfloat16_states_are_float32():
    h, targets, head = _inputs(jnp.bfloat16)
    got, _ = losses.token_logps(h, targets, head, chunk=4)
    want, _ = _dense(h, targets, head)  # products of bfloat16 numbers, added up in float32
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_head_gradient_is_summed_over_chunks_in_the_dtype_of_the_head():
    h, targets, head = _inputs()
    t = jnp.tile(targets, (1, 40))
    h = jnp.tile(h, (1, 40, 1)).astype(jnp.bfloat16)

    def total(head, chunk):
        return losses.token_logps(h, t, head, chunk=chunk)[0].sum()

    one = jax.grad(total)(head, 280)
    many = jax.grad(total)(head, 2)
    assert many.dtype == jnp.float32
    # bfloat16 sums of 140 chunks would be off by percents.
    np.testing.assert_allclose(many, one, rtol=2e-2, atol=1e-2 * float(jnp.abs(one).max()))


def _avals(jaxpr):
    for eqn in jaxpr.eqns:
        for var in (*eqn.invars, *eqn.outvars):
            yield eqn.primitive.name, var.aval
        for sub in jaxprs_in_params(eqn.params):
            yield from _avals(sub)


def test_no_array_of_the_size_of_all_logits_exists():
    b, t, d, v, chunk = 2, 64, 4, 512, 8
    h, head = jnp.ones((b, t, d)), jnp.ones((d, v))
    targets = jnp.zeros((b, t), jnp.int32)

    def loss(h, head):
        logp, entropy = losses.token_logps(h, targets, head, chunk=chunk, entropy_grad=True)
        return logp.sum() + entropy.sum()

    sizes = {
        a.shape: a.size for _, a in _avals(jax.make_jaxpr(jax.grad(loss, (0, 1)))(h, head).jaxpr)
    }
    assert (b, chunk, v) in sizes  # the walk does see inside of scan and remat
    assert max(sizes.values()) == b * chunk * v


def test_forbidden_target_is_finite_and_masks_away():
    h, targets, head = _inputs()
    targets = targets.at[0, 0].set(5)

    def loss(h):
        logp, _ = losses.token_logps(h, targets, head, forbidden_ids=(5,), chunk=4)
        return losses.aggregate(logp, jnp.ones((B, T)).at[0, 0].set(0.0)), logp

    (value, logp), grad = jax.value_and_grad(loss, has_aux=True)(h)
    assert logp[0, 0] < -1e29 and np.isfinite(logp[0, 0]) and np.isfinite(value)
    assert np.isfinite(grad).all() and (grad[0, 0] == 0).all() and (grad[0, 1] != 0).any()


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
