"""Schedule, optimizers, freezing and the skipping of non-finite gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srpo_jax.learn import optim, rounding
from srpo_jax.learn.optim import OptimConfig
from srpo_jax.learn.state import state_shardings
from srpo_jax.model import sharding
from srpo_jax.structs import TrainState

PARAMS = {
    "text/layers/attn/q/kernel": jnp.full((2, 3), 2.0),
    "text/layers/attn/q/bias": jnp.full((3,), 2.0),
    "text/norm/scale": jnp.full((3,), 2.0),
    "text/embed/embedding": jnp.full((4, 3), 2.0),
}


def _state(cfg: OptimConfig, params=PARAMS, total_steps: int = 10):
    optimizer = optim.make_optimizer(cfg, total_steps)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        step=zero, params=params, frozen={}, opt_state=optimizer.init(params), skipped=zero
    )
    step = jax.jit(lambda state, grads: optim.apply_gradients(state, grads, optimizer))
    return state, step


def _like(params, value):
    return {path: jnp.full(x.shape, value, jnp.float32) for path, x in params.items()}


def _values(tree):
    return [np.asarray(x).copy() for x in jax.tree.leaves(tree)]


def test_schedule_by_hand():
    cfg = OptimConfig(lr=1.0, warmup_steps=4, final_fraction=0.1)
    schedule = optim.make_schedule(cfg, 12)
    got = [float(schedule(i)) for i in (0, 1, 3, 4, 8, 12, 99)]
    # Warm-up 1/4, 2/4, 4/4; the cosine starts at 4, is half way down (0.55) at 8, ends at 12.
    np.testing.assert_allclose(got, [0.25, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1], rtol=1e-6)


def test_warmup_ratio_and_constant_schedule():
    cfg = OptimConfig(lr=2.0, warmup_ratio=0.1, schedule="constant")
    schedule = optim.make_schedule(cfg, 20)
    np.testing.assert_allclose([float(schedule(i)) for i in (0, 1, 19)], [1.0, 2.0, 2.0])
    no_warmup = optim.make_schedule(OptimConfig(lr=2.0, warmup_steps=0), 20)
    np.testing.assert_allclose(no_warmup(0), 2.0)


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="warm-up of 11 steps"):
        optim.make_schedule(OptimConfig(warmup_steps=11), 10)
    with pytest.raises(ValueError, match="linear"):
        optim.make_schedule(OptimConfig(schedule="linear"), 10)


def test_adamw_by_hand_decays_matrices_only_and_decoupled():
    cfg = OptimConfig(
        lr=0.1,
        warmup_steps=0,
        schedule="constant",
        b1=0.9,
        b2=0.99,
        eps=0.0,
        weight_decay=0.5,
        grad_clip=None,
    )
    state, step = _state(cfg)
    state, _ = step(state, _like(PARAMS, 3.0))
    # Bias correction makes the first Adam step sign(g); decay subtracts lr * 0.5 * 2 on matrices.
    for path, x in state.params.items():
        decayed = path.endswith(("kernel", "embedding"))
        np.testing.assert_allclose(x, 2.0 - 0.1 - (0.1 if decayed else 0.0), rtol=1e-6)
    state, _ = step(state, _like(PARAMS, -1.0))
    # m = .1 * (.9 * 3 - 1) = .17 over 1 - .81; v = .01 * (.99 * 9 + 1) = .0991 over 1 - .9801.
    update = (0.17 / 0.19) / np.sqrt(0.0991 / 0.0199)
    np.testing.assert_allclose(state.params["text/norm/scale"], 1.9 - 0.1 * update, rtol=1e-5)


def test_clipping_by_global_norm_and_reported_norms():
    params = {"a/kernel": jnp.zeros(1), "b/kernel": jnp.zeros(1)}
    cfg = OptimConfig(lr=0.5, warmup_steps=0, schedule="constant", grad_clip=1.0, eps=1.0, b1=0.0)
    state, step = _state(cfg, params)
    state, metrics = step(state, {"a/kernel": jnp.array([3.0]), "b/kernel": jnp.array([4.0])})
    np.testing.assert_allclose(metrics["grad_norm"], 5.0)  # before clipping
    # Clipped to 0.6 and 0.8; with eps = 1: g / (|g| + 1).
    want = 0.5 * np.array([0.6 / 1.6, 0.8 / 1.8])
    got = [-float(state.params[k][0]) for k in ("a/kernel", "b/kernel")]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["update_norm"], np.linalg.norm(want), rtol=1e-5)
    np.testing.assert_allclose(metrics["lr"], 0.5)


def test_moment_dtypes_with_bfloat16_parameters():
    params = {"a/kernel": jnp.ones((2,), jnp.bfloat16)}
    state, step = _state(OptimConfig(moment_dtype="bfloat16"), params)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    adam = next(s for s in state.opt_state if hasattr(s, "nu"))
    assert adam.mu["a/kernel"].dtype == jnp.bfloat16 and adam.nu["a/kernel"].dtype == jnp.float32
    state, _ = step(state, _like(params, 1.0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before  # no recompile, donatable


MATRICES = {  # of two layers
    "text/layers/attn/o/kernel": (2, 2, 4, 6),  # [L, H, E, D]
    "text/layers/attn/q/lora_a": (2, 6, 3),
    "text/layers/attn/q/lora_b": (2, 3, 2, 4),
    "vision/merger/fc1/kernel": (5, 5),
}
OTHERS = {"text/embed/embedding": (7, 6), "text/norm/scale": (6,), "text/lm_head/kernel": (6, 7)}


def _drawn(shapes):
    rng = np.random.default_rng(0)
    return {path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in shapes.items()}


def test_muon_makes_each_layers_matrix_orthogonal_and_leaves_the_rest_to_adam():
    cfg = OptimConfig(kind="muon", lr=0.1, warmup_steps=0, schedule="constant", grad_clip=None)
    params, grads = _drawn(MATRICES | OTHERS), _drawn(MATRICES | OTHERS)
    state, step = _state(cfg, params)
    state, _ = step(state, grads)
    moved = {path: np.asarray(params[path] - x) for path, x in state.params.items()}
    as_matrix = {
        "text/layers/attn/o/kernel": lambda x: x.reshape(2, 8, 6),
        "text/layers/attn/q/lora_a": lambda x: x,
        "text/layers/attn/q/lora_b": lambda x: x.reshape(2, 3, 8),
        "vision/merger/fc1/kernel": lambda x: x[None],
    }
    for path, matrix in as_matrix.items():
        x = matrix(moved[path])
        values = np.linalg.svd(x, compute_uv=False) / (0.1 * 0.2 * math.sqrt(max(x.shape[1:])))
        assert values.min() > 0.6 and values.max() < 1.3, path  # Newton-Schulz is a rough 1
        assert np.sum(x * matrix(np.asarray(grads[path]))) > 0  # downhill
    for path in OTHERS:  # Adam's first step is the sign
        np.testing.assert_allclose(moved[path], 0.1 * np.sign(grads[path]), rtol=0.05)


def test_adafactor_scales_by_rows_and_columns_and_keeps_no_moment_of_a_matrix():
    cfg = OptimConfig(kind="adafactor", lr=0.1, warmup_steps=0, schedule="constant", grad_clip=None)
    rows, columns = np.geomspace(0.1, 10, 256), np.geomspace(1, 100, 128)
    params = {"text/layers/mlp/up/kernel": jnp.ones((1, 256, 128))}
    grads = {path: jnp.asarray(np.outer(rows, columns)[None], jnp.float32) for path in params}
    state, step = _state(cfg, params)
    held = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert held < 256 + 128 + 8  # of 32,768
    state, _ = step(state, grads)
    (moved,) = (np.asarray(1.0 - x) for x in state.params.values())
    np.testing.assert_allclose(moved, 0.1, rtol=1e-3)  # what has rank 1 is scaled away whole


@pytest.mark.parametrize("kind", ["adafactor", pytest.param("muon", marks=pytest.mark.slow)])
def test_each_kind_decays_matrices_alone_and_does_on_a_mesh_what_it_does_on_one_device(kind):
    changes = {"lr": 0.1, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.5}
    cfg = OptimConfig(kind=kind, **changes)
    params, grads = _drawn(MATRICES | OTHERS), _drawn(MATRICES | OTHERS)
    state, step = _state(cfg, params)
    end, _ = step(state, grads)
    decayed, _ = step(state, _like(params, 0.0))
    for path, x in params.items():
        kept = 1.0 if path.endswith("scale") else 0.95
        np.testing.assert_allclose(decayed.params[path], kept * x, atol=1e-6, err_msg=path)
    mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    shapes = jax.eval_shape(lambda: state)
    placed = jax.device_put(state, state_shardings(shapes, mesh))
    many, _ = step(placed, grads)
    for path, x in end.params.items():
        np.testing.assert_allclose(many.params[path], x, atol=1e-5, err_msg=path)


# --- moments in 8 bits ---------------------------------------------------------------------------


def _uneven(shape, decades=3.0, seed=0):
    """Magnitudes over ``decades`` inside of each block, signs of both kinds."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** (-decades * rng.random(shape))
    return jnp.asarray(sizes * rng.choice([-1.0, 1.0], shape), jnp.float32)


def _stored(x, name, seed=0):
    state = optax.ScaleByAdamState(jnp.int32(0), {}, {})._replace(**{name: {"a/kernel": x}})
    return getattr(rounding.in_blocks(state, jax.random.key(seed)), name)["a/kernel"]


@pytest.mark.parametrize("name", ["mu", "nu"])
def test_a_moment_in_8_bits_is_near_and_right_in_the_mean(name):
    x = _uneven((4, 16, 128)) if name == "mu" else _uneven((4, 16, 128)) ** 2
    read = jax.jit(lambda seed: rounding.from_blocks(_stored(x, name, seed)))
    drawn, x = np.stack([read(seed) for seed in range(256)]), np.asarray(x)
    scale = np.repeat(np.abs(x).reshape(4, 16, 2, 64).max(-1), 64, axis=-1)
    # A step of the code: 3 (s**(1/3) + 1/127)**2 / 127 at a share s of the scale, or 2**.1 - 1.
    share = np.abs(x) / scale
    step = 3 * (np.cbrt(share) + 1 / 127) ** 2 / 127 * scale if name == "mu" else 0.0718 * x
    inside = share > 2.0**-25
    assert (np.abs(drawn - x) <= step * 1.001 + 1e-12)[:, inside].all()
    assert (np.abs(drawn.mean(0) - x) < 5 * 0.5 * step / 16)[inside].all()
    assert name == "nu" or not np.allclose(drawn[0], drawn[1])


def test_a_moment_in_8_bits_by_hand():
    x = np.zeros((64, 128), np.float32)  # two blocks a row
    x[0, :3], x[0, 64:66] = (8.0, -1.0, 0.0), (1e-3, -1e-3 / 127**3)
    mu = _stored(jnp.asarray(x), "mu")
    assert mu.code.dtype == jnp.int8 and mu.code.shape == x.shape and mu.scale.shape == (64, 2)
    np.testing.assert_allclose(mu.scale[0], [8.0, 1e-3])
    np.testing.assert_array_equal(mu.code[0, [0, 2, 64, 65]], [127, 0, 127, -1])
    assert mu.code[0, 1] in (-63, -64) and not mu.code[1:].any()  # 127 * cbrt(1 / 8)
    nu = _stored(jnp.asarray(x**2), "nu")
    assert nu.code.dtype == jnp.uint8
    np.testing.assert_array_equal(nu.code[0, [0, 1, 2, 64]], [0, 60, 255, 0])  # 2**-6
    back = np.asarray(rounding.from_blocks({"v": nu})["v"])
    assert (back[0] > 0).all() and not back[1:].any()  # none is 0 beside one that is not


def test_adam_in_8_bits_goes_where_adam_goes():
    """Least squares with noise in each step, and columns of a gradient a thousand times another's.

    The end is as good, and updates point the same way.
    """
    rng = np.random.default_rng(0)
    sizes = np.repeat(np.geomspace(1, 1e-3, 16), 16)[rng.permutation(256)]
    goal = rng.normal(size=(64, 256)).astype(np.float32)
    noise = rng.normal(size=(80, 64, 256)).astype(np.float32)
    ends, paths = {}, {}
    for dtype in ("float32", "int8"):
        cfg = OptimConfig(
            lr=0.05, schedule="cosine", warmup_steps=0, grad_clip=None, moment_dtype=dtype
        )
        state, step = _state(cfg, {"a/kernel": jnp.zeros((64, 256))}, total_steps=80)
        paths[dtype], now = [], np.zeros((64, 256), np.float32)
        for drawn in noise:
            before = now
            state, _ = step(state, {"a/kernel": sizes * (now - goal + drawn)})
            now = np.asarray(state.params["a/kernel"])
            paths[dtype].append(now - before)
        ends[dtype] = np.mean((now - goal) ** 2)
    assert ends["int8"] < 1.05 * ends["float32"] < 0.05
    exact, ours = paths["float32"][5], paths["int8"][5]
    assert np.sum(exact * ours) > 0.99 * np.linalg.norm(exact) * np.linalg.norm(ours)


def test_a_moment_in_8_bits_follows_changes_below_a_step_of_its_code():
    """At b2 = 0.999 of entries that begin behind their block's largest: rounded to the nearest they
    stop at half of what they should be here, and updates are half as long again."""
    largest = jnp.arange(4096).reshape(64, 64) % 64 == 0

    def body(t, moments):
        squares = jnp.where(largest, 1.0, jnp.where(t < 50, 0.0, 0.25))
        ours, exact = (0.999 * x + 0.001 * squares for x in moments)
        return rounding.from_blocks({"nu": _stored(ours, "nu", t)})["nu"], exact

    nothing = jnp.zeros((64, 64))
    ours, exact = jax.jit(lambda x: jax.lax.fori_loop(0, 150, body, (x, x)))(nothing)
    np.testing.assert_allclose(jnp.mean(ours[:, 1:] / exact[:, 1:]), 1.0, atol=0.02)


def test_moments_in_8_bits_lie_as_their_parameters_and_nothing_is_collected_for_them():
    mesh = sharding.make_mesh(1, 4, 2)
    shapes = {
        "text/layers/attn/o/kernel": (2, 2, 8, 256),  # [L, H, E, D]: D over fsdp
        "text/layers/mlp/up/kernel": (2, 16, 688),  # [L, D, F]: 688 = 16 * 43
    }
    cfg = OptimConfig(moment_dtype="int8", lr=0.1, grad_clip=None)
    params, grads = _drawn(shapes), _drawn(shapes)
    state, step = _state(cfg, params)
    one, _ = step(step(state, grads)[0], grads)
    layout = state_shardings(jax.eval_shape(lambda: state), mesh)
    optimizer = optim.make_optimizer(cfg, 10)
    many = jax.jit(
        lambda s, g: optim.apply_gradients(s, g, optimizer),
        in_shardings=(layout, layout.params),
        out_shardings=(layout, None),
    )
    placed = jax.device_put(state, layout)
    many = many.lower(placed, jax.device_put(grads, layout.params)).compile()
    text = many.as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text
    grads = jax.device_put(grads, layout.params)
    end, _ = many(many(placed, grads)[0], grads)
    mu = end.opt_state[0].inner.mu
    for path, where in layout.params.items():
        for x in mu[path]:
            assert x.sharding.is_equivalent_to(where, x.ndim), path
    for x, y in zip(jax.tree.leaves(end), jax.tree.leaves(one), strict=True):
        if x.dtype in (jnp.int8, jnp.uint8):  # the same bits are drawn; sums differ in their last
            assert np.mean(np.asarray(x) != np.asarray(y)) < 1e-3
        else:
            np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_update_that_is_not_finite_leaves_moments_in_8_bits_as_they_were(kind):
    params = _drawn({"text/layers/mlp/up/kernel": (2, 64, 64), "text/norm/scale": (64,)})
    state, step = _state(OptimConfig(kind=kind, moment_dtype="int8", lr=0.1), params)
    state, _ = step(state, _like(params, 1.0))
    held = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int8]
    assert [x.shape for x in held] == [(2, 64, 64)]  # the vector is too short to be worth it
    before = _values((state.params, state.opt_state))
    grads = _like(params, 1.0)
    grads["text/layers/mlp/up/kernel"] = grads["text/layers/mlp/up/kernel"].at[0, 1, 2].set(jnp.nan)
    state, metrics = step(state, grads)
    assert metrics["skipped"] == 1
    for x, y in zip(before, _values((state.params, state.opt_state)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_state_that_waits_in_host_memory_changes_nothing():
    mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    params, grads = _drawn(MATRICES | OTHERS), _drawn(MATRICES | OTHERS)
    ends = {}
    for offload in (False, True):
        optimizer = optim.make_optimizer(OptimConfig(offload=offload, lr=0.1), 10)
        state, _ = _state(OptimConfig(offload=offload), params)
        layout = state_shardings(jax.eval_shape(lambda state=state: state), mesh, offload=offload)
        step = jax.jit(
            lambda s, g, optimizer=optimizer: optim.apply_gradients(s, g, optimizer),
            in_shardings=(layout, layout.params),
            out_shardings=(layout, None),
            donate_argnums=0,
        )
        start = jax.device_put(jax.tree.map(jnp.copy, state), layout)  # each in a buffer of its own
        ends[offload], _ = step(start, jax.device_put(grads, layout.params))
        assert all(x.is_deleted() for x in jax.tree.leaves(start.opt_state))
    kinds = jax.tree.map(lambda x: x.sharding.memory_kind, ends[True])
    assert {*jax.tree.leaves(kinds.opt_state)} == {"pinned_host"}
    assert {*jax.tree.leaves(kinds.params)} == {"device"}
    for x, y in zip(jax.tree.leaves(ends[True]), jax.tree.leaves(ends[False]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_split_frozen_by_prefix():
    params = {"vision/blocks/x": 1, "vision/merger/y": 2, "text/z": 3}
    assert optim.split_frozen(params) == (
        {"text/z": 3},
        {"vision/blocks/x": 1, "vision/merger/y": 2},
    )
    trained, frozen = optim.split_frozen(params, ("vision/blocks/",))
    assert set(frozen) == {"vision/blocks/x"} and set(trained) == {"vision/merger/y", "text/z"}
    assert optim.split_frozen(params, ()) == (params, {})


def test_split_frozen_refuses_a_misspelt_prefix_and_freezing_everything():
    with pytest.raises(ValueError, match="visual/"):
        optim.split_frozen({"vision/x": 1}, ("visual/",))
    with pytest.raises(ValueError, match="no parameter to train"):
        optim.split_frozen({"vision/x": 1}, ("vision/",))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_gradient_leaves_everything_but_the_counter(bad):
    state, step = _state(OptimConfig(lr=0.1, warmup_steps=4, weight_decay=0.1))
    state, first = step(state, _like(PARAMS, 1.0))
    before = _values((state.step, state.params, state.opt_state))
    grads = _like(PARAMS, 1.0)
    grads["text/norm/scale"] = grads["text/norm/scale"].at[1].set(bad)
    state, metrics = step(state, grads)
    for x, y in zip(before, _values((state.step, state.params, state.opt_state)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert state.skipped == 1 and metrics["skipped"] == 1 and state.step == 1
    assert metrics["update_norm"] == 0 and not np.isfinite(metrics["grad_norm"])
    # The next good gradient continues as if the bad one had not been.
    state, second = step(state, _like(PARAMS, 1.0))
    np.testing.assert_allclose([first["lr"], second["lr"]], [0.025, 0.05], rtol=1e-6)
    assert state.step == 2 and state.skipped == 1 and second["update_norm"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_infinite_update_of_a_finite_gradient_is_not_applied(dtype):
    # The square of the gradient is 0 in float32, and so nothing bounds the step.
    params = {"a/kernel": jnp.ones((2, 2), dtype)}
    cfg = OptimConfig(lr=0.1, warmup_steps=0, schedule="constant", eps=1e-45)
    state, step = _state(cfg, params)
    state, metrics = step(state, {"a/kernel": jnp.full((2, 2), 1e-30)})
    assert np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1 and state.step == 0
    assert (state.params["a/kernel"] == 1).all() and metrics["update_norm"] == 0
    assert all(np.isfinite(x).all() for x in _values(state.opt_state))


def test_bfloat16_parameters_move_as_float32_ones_do():
    """Updates of 1e-6 lie far below the distance of bfloat16 numbers around 0.02 and around 1."""
    cfg = OptimConfig(lr=1e-6, schedule="constant", warmup_steps=0, grad_clip=None)
    key = jax.random.key(3)
    start = {
        "text/layers/attn/q/kernel": 0.02 * jax.random.normal(key, (2, 128, 512)),  # two layers
        "text/norm/scale": jnp.ones((300_000,)),
    }
    grads = {path: jnp.where(x > 0, 1.0, -1.0) for path, x in start.items()}  # a steady direction
    moved = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {path: x.astype(dtype) for path, x in start.items()}
        state, step = _state(cfg, params, total_steps=200)
        for _ in range(200):
            state, metrics = step(state, grads)
        moved[dtype] = {
            path: float(jnp.mean((x.astype(jnp.float32) - params[path]) * grads[path]))
            for path, x in state.params.items()
        }
        assert state.params["text/norm/scale"].dtype == dtype
        if dtype == jnp.bfloat16:
            assert 0.001 < metrics["moved_share"] < 0.1
    for path, exact in moved[jnp.float32].items():
        np.testing.assert_allclose(exact, -2e-4, rtol=0.02)
        np.testing.assert_allclose(moved[jnp.bfloat16][path], exact, rtol=0.05, err_msg=path)


def test_rounding_repeats_with_seed_step_and_parameter_and_keeps_exact_sums():
    params = {"text/norm/scale": jnp.linspace(0.5, 2.0, 1000).astype(jnp.bfloat16)}
    grads = {"text/norm/scale": jnp.ones(1000)}
    cfg = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0)
    ends = []
    for seed in (0, 0, 1):
        optimizer = optim.make_optimizer(cfg, 10, seed)
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, params, {}, optimizer.init(params), zero)
        for _ in range(2):
            state, _ = optim.apply_gradients(state, grads, optimizer)
        ends.append(np.asarray(state.params["text/norm/scale"], np.float32))
    np.testing.assert_array_equal(ends[0], ends[1])
    assert (ends[0] != ends[2]).any()
    # What a bfloat16 can hold is not rounded: 1 - 2**-8 + 2**-8, and adding nothing.
    values = jnp.array([1 - 2**-8, 3.0], jnp.bfloat16)
    assert rounding.rounded_sum(values, jnp.array([2**-8, 0]), jax.random.key(0)).tolist() == [1, 3]


def test_the_bits_of_rounding_are_even_and_independent():
    bits = np.asarray(rounding.hashed_bits(jax.random.key(1), (8, 64, 256))) >> 16
    share = bits.astype(np.float64) / 2**16
    for axes in ((1, 2), (0, 2), (0, 1)):  # no index along any axis leans to a side
        sizes = share.size / share.mean(axes).size
        assert np.abs(share.mean(axes) - 0.5).max() < 5 * np.sqrt(1 / 12 / sizes)
    flat = share.reshape(-1) - 0.5
    for lag in (1, 2, 255, 256, 257, 64 * 256):
        assert abs((flat[lag:] * flat[:-lag]).mean() * 12) < 5 / np.sqrt(flat.size)
    assert np.unique(bits).size > 0.8 * 2**16
