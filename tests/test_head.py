"""Log-probs under the output head, and losses over them, against whole arrays of logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from srpo_jax.learn import losses
from srpo_jax.learn.head import HeadConfig, TokenLoss, token_logps, token_loss

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
    got = token_logps(h, targets, head, HeadConfig(chunk, temperature, forbidden))
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
        return token_logps(h, targets, head, HeadConfig(3, 0.7, (5, 6), entropy_grad=True))

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
        logp, entropy = token_logps(h, targets, head, HeadConfig(3), **kwargs)
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
        return token_logps(h, targets, head, HeadConfig(4), count=count)[0].sum()

    program = jax.jit(jax.grad(loss)).lower(jnp.ones((8, 128)), jnp.int32(64)).compile().as_text()
    assert "[8,128]" in program and not re.search(r"\[16,(1,)?8,128\]", program)


def test_token_logps_of_bfloat16_states_are_float32():
    h, targets, head = _inputs(jnp.bfloat16)
    got, _ = token_logps(h, targets, head, HeadConfig(4))
    want, _ = _dense(h, targets, head)  # products of bfloat16 numbers, added up in float32
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_head_gradient_is_summed_over_chunks_in_the_dtype_of_the_head():
    h, targets, head = _inputs()
    t = jnp.tile(targets, (1, 40))
    h = jnp.tile(h, (1, 40, 1)).astype(jnp.bfloat16)

    def total(head, chunk):
        return token_logps(h, t, head, HeadConfig(chunk))[0].sum()

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
        logp, entropy = token_logps(h, targets, head, HeadConfig(chunk, entropy_grad=True))
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
        logp, _ = token_logps(h, targets, head, HeadConfig(4, forbidden_ids=(5,)))
        return losses.aggregate(logp, jnp.ones((B, T)).at[0, 0].set(0.0)), logp

    (value, logp), grad = jax.value_and_grad(loss, has_aux=True)(h)
    assert logp[0, 0] < -1e29 and np.isfinite(logp[0, 0]) and np.isfinite(value)
    assert np.isfinite(grad).all() and (grad[0, 0] == 0).all() and (grad[0, 1] != 0).any()


# --- losses in one pass ----------------------------------------------------------------------

ENTROPY = HeadConfig(3, 0.7, (5, 6), entropy_grad=True)


def _of_tokens(logp, entropy, tokens):
    """Not linear in the log-probs, so that what a token weighs depends on its own."""
    weight = tokens["weight"]
    counted = weight != 0
    loss = jnp.sum(weight * (jnp.exp(0.3 * logp) - 0.2 * entropy))
    aux = {"sum": jnp.sum(counted * logp), "max": jnp.max(jnp.where(counted, logp, -jnp.inf))}
    return loss, jax.lax.stop_gradient(aux)


def _combine(aux):
    return {"sum": aux["sum"].sum(0), "max": aux["max"].max(0)}


def _both_ways(cfg, count, dtype=jnp.float32):
    """Loss, aux and gradients in one pass, and of the log-probs by automatic differentiation."""
    h, targets, head = _inputs(dtype)
    head = head.astype(jnp.float32)
    weight = jax.random.normal(jax.random.key(5), (B, T)) * (jnp.arange(T) < count)[None]
    tokens, loss = {"weight": weight}, TokenLoss(_of_tokens, _combine, cfg)

    def one_pass(h, head):
        out, aux = token_loss(h, targets, head, tokens, loss, count=jnp.int32(count))
        return 2 * out, aux  # what comes from above is passed on

    def two_passes(h, head):
        out, aux = _of_tokens(*token_logps(h, targets, head, cfg), tokens)
        return 2 * out, aux

    return [
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(h, head)
        for f in (one_pass, two_passes)
    ]


@pytest.mark.parametrize("cfg", [HeadConfig(3), HeadConfig(100), ENTROPY])
@pytest.mark.parametrize("count", [0, 1, 4, T])
def test_a_loss_in_one_pass_equals_automatic_differentiation(cfg, count):
    ours, theirs = _both_ways(cfg, count)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=3e-6)
    assert count == 0 or np.abs(ours[1][1]).max() > 0.01


def test_a_loss_in_one_pass_takes_bfloat16_states_and_gives_their_gradients():
    ours, theirs = _both_ways(HeadConfig(3), T, jnp.bfloat16)
    (_, (dh, dhead)), (_, (want_h, want_head)) = ours, theirs
    assert dh.dtype == jnp.bfloat16 and dhead.dtype == jnp.float32
    for got, want in ((dh, want_h), (dhead, want_head)):
        size = float(jnp.abs(want).max())
        np.testing.assert_allclose(np.float32(got), np.float32(want), atol=0.02 * size)


def test_a_forbidden_target_learns_nothing_in_one_pass():
    h, targets, head = _inputs()
    loss = TokenLoss(lambda logp, _, w: (jnp.sum(w * logp), ()), lambda aux: aux, ENTROPY)

    def total(h, head, targets):
        weight = jnp.ones((B, T))
        return token_loss(h, targets, head, weight, loss, count=jnp.int32(T))[0]

    _, dhead = jax.grad(total, (0, 1))(h, head, targets.at[0, 0].set(5))
    assert np.isfinite(dhead).all() and not np.any(dhead[:, 5:7])


def test_chunks_that_nothing_is_wanted_of_are_not_computed():
    h, targets, head = _inputs()
    seen = []

    def of_tokens(logp, _, weight):
        jax.debug.callback(lambda x: seen.append(x.shape), logp)
        return jnp.sum(weight * logp), ()

    loss = TokenLoss(of_tokens, lambda aux: aux, HeadConfig(2))
    run = jax.jit(lambda n: token_loss(h, targets, head, jnp.ones((B, T)), loss, count=n)[0])
    jax.block_until_ready(run(jnp.int32(3)))
    jax.effects_barrier()
    assert seen.count((B, 2)) == 2


def test_one_pass_has_three_products_of_logits_and_no_array_of_all():
    b, t, d, v, chunk = 2, 64, 4, 512, 8
    h, head, targets = jnp.ones((b, t, d)), jnp.ones((d, v)), jnp.zeros((b, t), jnp.int32)
    loss = TokenLoss(lambda logp, _, w: (jnp.sum(w * logp), ()), lambda a: a, HeadConfig(chunk))

    def total(h, head):
        return token_loss(h, targets, head, jnp.ones((b, t)), loss, count=jnp.int32(t))[0]

    found = list(_avals(jax.make_jaxpr(jax.grad(total, (0, 1)))(h, head).jaxpr))
    assert max(a.size for _, a in found) == b * chunk * v
    products = lambda by: jax.jit(jax.grad(total, by)).lower(h, head).compile().as_text()  # noqa: E731
    assert [products(by).count(" dot(") for by in ((0, 1), 0)] == [3, 2]  # 2: a head that is frozen
