"""The steps on meshes: every shape computes what one device computes; what a pass collects."""

import dataclasses
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_helpers import (
    ADAM,
    CFG,
    GRPO,
    IMAGE,
    KL,
    RECORD,
    G,
    M,
    P,
    R,
    S,
    assert_close,
    conversations,
    features,
    grpo_steps,
    new_state,
    old_logp,
    one_update,
    packed,
    params,
    prompts,
    rollout,
    run_grpo,
    sft_step,
    with_,
)
from test_forks import forked

from srpo_jax.data.batching import Layout
from srpo_jax.learn import lanes, micro_batches, state, steps
from srpo_jax.learn.head import HeadConfig, TokenLoss, model_token_loss, token_logps
from srpo_jax.learn.steps import SftConfig
from srpo_jax.model import sharding
from srpo_jax.model.qwen2_5_vl import abstract_params, for_sampling
from srpo_jax.structs import Experience

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


QUICK = [(1, 1, 2), (2, 2, 2)]  # of the fast tier: nothing divides the rows, everything is divided
# (data, fsdp, tensor). The slow tier adds each axis of the rows alone and each pair of axes.
MESHES = [*QUICK, (8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 1, 4), (4, 2, 1)]


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
    """Likewise; the mesh has the rows of a shard in another order, and several in a block; on some
    meshes completions change shards."""
    ref = np.asarray(old_logp()) - 0.1
    experience = Experience(prompts(), *rollout(), np.asarray(features()), ref_logp=ref)
    experience = repeated(experience, rows)
    cfg = with_(KL, micro_batches=rows)
    one = grpo_steps(cfg, ADAM)
    cfg_many = with_(KL, micro_batches=rows // shards)
    many = grpo_steps(cfg_many, ADAM, mesh=mesh)
    held = (experience.batch, experience.rollout)
    (every,) = packed(cfg_many, *held, shards=shards, spread=shards % 4 == 0)
    on_mesh = sharding.to_global((experience, every), mesh)
    return (
        lambda now: one_update(one, cfg, now, experience),
        lambda now: steps.grpo_update(many, now, *on_mesh),
    )


def perceiving_runs(mesh, rows, shards):
    """As grpo_runs; beside images their masked counterparts, and pairs of samples that share a
    first round, which is computed once."""
    experience = dataclasses.replace(forked(), masked=np.asarray(features()) * 0.5)
    experience = repeated(experience, rows)
    cfg = with_(GRPO, micro_batches=rows, perception_coef=0.5, masked_entropy_coef=-0.2, forks=2)
    one = grpo_steps(cfg, ADAM)
    cfg_many = with_(cfg, micro_batches=rows // shards)
    many = grpo_steps(cfg_many, ADAM, mesh=mesh)
    shown = np.asarray(experience.batch.valid & (experience.weight != 0))
    lengths = np.asarray(experience.rollout.completion_mask).sum(-1) * shown[:, None]
    runs = lanes.family_runs(lengths, experience.verdict.first_end, 2)

    def families(shards):
        layout = Layout(len(shown) // shards, rows=rows // shards)
        budgets = lanes.LaneBudgets(layout, G, S, R, spread=shards % 4 == 0).of_families(2)
        return lanes.pack(experience.batch.lengths, runs, budgets)[0]

    every = families(1)
    on_mesh = sharding.to_global((experience, families(shards)), mesh)
    return (
        lambda now: steps.grpo_update(one, now, experience, every),
        lambda now: steps.grpo_update(many, now, *on_mesh),
    )


def repeated(tree, rows):
    """Eight shards want eight rows."""
    return jax.tree.map(lambda x: np.concatenate([x, x]), tree) if rows > M else tree


CASES = [
    pytest.param(runs, shape, marks=() if shape in QUICK else pytest.mark.slow)
    for runs in (sft_runs, grpo_runs)
    for shape in MESHES
] + [pytest.param(perceiving_runs, (2, 2, 2), marks=pytest.mark.slow)]


@pytest.mark.parametrize(("runs", "shape"), CASES)
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


@pytest.mark.parametrize("spread", [False, True])
def test_encode_and_logps_on_two_shards_of_two_micro_batches(spread):
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    placed = jax.device_put(params(), sharding.param_specs(params(), mesh))
    batch, samples = sharding.to_global((prompts(), rollout()[0]), mesh)
    feats = steps.make_encode_step(CFG, mesh=mesh)(placed, batch.vision)
    np.testing.assert_allclose(feats, features(), atol=1e-5)
    cfg = with_(GRPO, micro_batches=2)
    step = steps.make_logp_step(CFG, cfg, mesh=mesh)
    logp = sharding.to_global(np.zeros((P, G, R), np.float32), mesh)
    everyone = prompts().replace(valid=np.ones(P, bool))
    (every,) = packed(cfg, everyone, rollout()[0], shards=2, spread=spread)
    for part in sharding.to_global(every, mesh):
        logp = step(logp, placed, batch, samples, feats, part)
    np.testing.assert_allclose(logp, old_logp(), atol=1e-5)
    assert logp.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)


def test_a_layer_s_matrices_are_collected_once_in_each_pass():
    """Once forward and once backward, for prompts and completions together. Of what is dealt out
    anew to the shards, images are the largest that moves."""
    mesh = sharding.make_mesh(1, 8, 1)
    cfg = with_(GRPO, micro_batches=1)
    batch, samples, verdict = repeated((prompts(), *rollout()), 8)
    experience = Experience(batch, samples, verdict, np.zeros((8, 8, 16), np.float32))
    parts = steps.make_grpo_steps(CFG, cfg, RECORD, mesh=mesh)
    ready, total = parts.prepare.eval_shape(experience, 0)
    now = state.abstract_state(CFG, RECORD)
    ((lanes_of_all,),) = packed(cfg, batch, samples, shards=8, spread=True)
    lowered = parts.accumulate.lower(total, now, experience, ready, lanes_of_all)
    computation, collected = "", {"forward": [], "backward": [], "before": []}
    for line in lowered.compile().as_text().splitlines():
        computation = line if line.endswith("{") else computation
        if found := re.search(r"= f32\[([\d,]+)\]\S* all-gather\(", line):
            which = "backward" if "transpose(jvp" in line else "forward"
            which = "before" if computation.startswith("ENTRY") else which
            collected[which].append(math.prod(int(n) for n in found[1].split(",")))
    layer = [x for path, x in now.params.items() if re.match("text/layers/.*kernel", path)]
    sizes = sorted(x.size // CFG.text.num_hidden_layers for x in layer)
    assert sorted(collected["forward"]) == sorted(collected["backward"]) == sizes
    assert max(collected["before"]) == experience.features.size


LOGPS = TokenLoss(lambda logp, *_: (logp.sum(), ()), lambda aux: aux, HeadConfig(8))


def head_gradient(mesh, targets_BT, head_DV):
    """The jitted gradient of the log-probs by hidden states and head, which lies as in training."""

    def loss(h, head):
        model = types.SimpleNamespace(head_kernel=lambda: head)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return model_token_loss(model, h, targets_BT, (), LOGPS, jnp.int32(32))[0]

    head_layout = sharding.param_specs({"text/lm_head/kernel": head_DV}, mesh)
    layouts = (sharding.batch_sharding(mesh), head_layout["text/lm_head/kernel"])
    return jax.jit(jax.grad(loss, (0, 1)), in_shardings=layouts, out_shardings=layouts)


def test_head_gradient_is_summed_over_devices_once_and_not_per_chunk():
    h_BTD, head_DV = jnp.ones((8, 32, 16)), jnp.ones((16, 64))
    targets_BT = jnp.zeros((8, 32), jnp.int32)
    grads = head_gradient(sharding.make_mesh(2, 2, 2), targets_BT, head_DV)
    program = grads.lower(h_BTD, head_DV).compile().as_text()
    computation, inside = "", []
    for line in program.splitlines():
        computation = line if line.endswith("{") else computation
        found = re.search(r"= f32\[([\d,]+)\]\S* (all-reduce|reduce-scatter)\(", line)
        if found and not computation.startswith("ENTRY"):
            inside.append(np.prod([int(n) for n in found[1].split(",")]))
    assert inside  # partial sums over the divided vocabulary are in the loop
    assert max(inside) < head_DV.size // 2  # the gradient of a device's half of the head is not
    want = jax.grad(lambda head: token_logps(h_BTD, targets_BT, head, HeadConfig())[0].sum())(
        head_DV
    )
    np.testing.assert_allclose(grads(h_BTD, head_DV)[1], want, rtol=1e-5)


def test_the_head_is_collected_in_the_dtype_of_its_products_and_learns_in_its_own():
    rng = np.random.default_rng(0)
    h_BTD = jnp.asarray(rng.normal(size=(8, 32, 16)), jnp.bfloat16)
    head_DV = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)
    targets_BT = jnp.asarray(rng.integers(0, 64, (8, 32)), jnp.int32)
    grads = head_gradient(sharding.make_mesh(1, 8, 1), targets_BT, head_DV)
    lowered = grads.lower(h_BTD, head_DV)
    assert re.search(r"all_gather.*tensor<16x64xbf16>", lowered.as_text())
    # (CPUs compute bfloat16, and so exchange it, in float32.)
    program = lowered.compile().as_text()
    assert len(re.findall(r"= \w+\[16,64\]\S* all-gather\(", program)) == 1
    assert re.search(r"= f32\[2,64\]\S* reduce-scatter\(", program)  # of the gradient
    got = grads(h_BTD, head_DV)[1]
    assert got.dtype == jnp.float32
    want = jax.grad(lambda head: token_logps(h_BTD, targets_BT, head, HeadConfig())[0].sum())(
        head_DV
    )
    # Each device rounds the products of its own tokens to bfloat16.
    np.testing.assert_allclose(got, want, atol=0.02 * float(jnp.abs(want).max()))


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
