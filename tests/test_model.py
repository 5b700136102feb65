"""The model against itself: causality, isolation, caches, shared prompts, scans, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_helpers import (
    CFG,
    Sample,
    W,
    assert_same_gradients,
    close,
    encode,
    forward,
    make_batch,
    make_images,
    make_rows,
    make_sample,
    random_params,
    replace,
    text_hidden,
)

from srpo_jax.data.batching import Layout
from srpo_jax.learn import lanes
from srpo_jax.model import layers, qwen2_5_vl
from srpo_jax.model.attention import Sight, attention
from srpo_jax.model.layers import RMSNorm, SwiGLU, rotate, text_mrope
from srpo_jax.model.masks import Mask
from srpo_jax.model.qwen2_5_vl import (
    abstract_params,
    bind,
    for_sampling,
    init_params,
    predicting_slots,
)
from srpo_jax.model.sharding import batch_sharding, make_mesh, param_specs

# --- what a token may see ----------------------------------------------------------------------


def test_gradients_reach_exactly_the_tokens_before_in_the_same_segment():
    """Causal by index, image tokens among themselves too, and never across segments."""
    T, images = 16, slice(3, 9)
    tokens = jnp.arange(T)[None]  # each token once, so that embedding rows are positions
    segments = jnp.asarray([[1] * 11 + [2] * 4 + [0]])
    src = np.full((1, T), -1)
    src[0, images] = np.arange(6)
    # All image tokens share one position: causality must come from the index.
    mrope = np.arange(T)[None, None].repeat(3, 1)
    mrope[:, :, images] = 3
    features = jax.random.normal(jax.random.key(0), (1, 6, CFG.text.hidden_size))
    params = random_params(CFG)

    @jax.jit
    def gradient(t):
        def probe(embedding, features):
            model = bind(CFG, params | {"text/embed/embedding": embedding})
            h = model.hidden(tokens, jnp.asarray(mrope), segments, jnp.asarray(src), features)
            return jnp.sum(jnp.sin(h[0, t]))

        return jax.grad(probe, argnums=(0, 1))(params["text/embed/embedding"], features)

    for t in range(T):
        by_token, by_feature = gradient(t)
        reached = np.abs(by_token[:T]).max(-1)
        reached[images] = np.abs(by_feature[0]).max(-1)
        expected = [s <= t and segments[0, s] == segments[0, t] for s in range(T)]
        np.testing.assert_array_equal(reached > 0, expected, err_msg=f"position {t}")


def test_content_of_other_segments_and_padding_never_changes_a_result():
    sample = make_sample(0, 6, (1, 4, 6))
    batch = make_batch([sample, make_sample(1, 9)], 24, patches=4 * W)
    n = len(sample.ids)
    batch = batch.replace(segment_ids=batch.segment_ids.at[0, n : n + 5].set(2))
    before = forward(CFG, random_params(CFG), batch)
    other = batch.replace(
        tokens=batch.tokens.at[0, n:].set(3).at[1].set(5),
        mrope=batch.mrope.at[0, :, n:].set(11),
    )
    after = forward(CFG, random_params(CFG), other)
    np.testing.assert_array_equal(before[0, :n], after[0, :n])
    assert not np.array_equal(before[0, n : n + 5], after[0, n : n + 5])
    assert not np.array_equal(before[1, :9], after[1, :9])


# --- packed, padded, alone ---------------------------------------------------------------------


def test_samples_packed_padded_and_alone_agree():
    """Two rows of two sequences, images of three sizes; one sequence packs two samples."""
    samples = [
        make_sample(4, 5, (1, 4, 6)),
        make_sample(5, 7, (1, 2, 8), (1, 6, 4)),
        make_sample(6, 11),
    ]
    first, second, third = samples
    packed = Sample(
        np.concatenate([third.ids, first.ids]),
        np.concatenate([third.mrope, first.mrope], axis=1),
        0,
        first.images,
    )
    batch = make_batch([second, third, packed, first], 40, per_row=2, patches=8 * W)
    n = len(third.ids)
    batch = batch.replace(
        segment_ids=batch.segment_ids.at[2, n : len(packed.ids)].set(2),
    )
    together = forward(CFG, random_params(CFG), batch)
    alone = [
        forward(CFG, random_params(CFG), make_batch([s], len(s.ids), patches=8 * W))[0]
        for s in samples
    ]
    close(together[0, : len(second.ids)], alone[1])
    close(together[1, :n], alone[2])
    close(together[2, :n], alone[2])
    close(together[2, n : len(packed.ids)], alone[0])
    close(together[3, : len(first.ids)], alone[0])


def test_text_without_images_equals_a_batch_whose_images_nobody_uses():
    batch = make_batch([make_sample(7, 12)], 12)
    batch = batch.replace(vision=make_rows([make_images(3, (1, 4, 4))], patches=2 * W))
    text_only = text_hidden(CFG, random_params(CFG), batch)
    close(text_only, forward(CFG, random_params(CFG), batch), 1e-6)


def test_sequences_that_do_not_fill_rows_are_refused():
    model = bind(CFG, random_params(CFG))
    batch = make_batch([make_sample(7, 4)] * 3, 4)
    features = jnp.zeros((2, 4, CFG.text.hidden_size))
    with pytest.raises(ValueError, match="3 sequences cannot lie in 2 rows"):
        model.embed(batch.tokens, batch.vision_src, features)


# --- caches and lanes ---------------------------------------------------------------------------


def prompts_and_completions(R=6, G=2, per_row=1):
    """Three prompts of different lengths in one batch, their completions, and whole sequences."""
    prompts = [make_sample(8, 4, (1, 4, 4)), make_sample(9, 9), make_sample(10, 3, (1, 2, 6))]
    batch = make_batch(prompts, 14, per_row, patches=2 * W * per_row)
    completions = np.random.default_rng(11).integers(0, 100, (len(prompts), G, R))
    whole = []
    for p, prompt in enumerate(prompts):
        for g in range(G):
            own = np.arange(R)[None].repeat(3, 0) + prompt.next_pos
            whole.append(
                dataclasses.replace(
                    prompt,
                    ids=np.concatenate([prompt.ids, completions[p, g]]),
                    mrope=np.concatenate([prompt.mrope, own], axis=1),
                )
            )
    whole_batch = make_batch(whole, 20, patches=2 * W)
    return batch, jnp.asarray(completions, jnp.int32), whole_batch


def at_predictions(hidden_BTD, batch, R, G):
    """Hidden states [P, G, R, D] that predict the completions, cut from whole sequences."""
    starts = np.repeat(np.asarray(batch.lengths) - 1, G)
    picked = jnp.stack([h[s : s + R] for h, s in zip(hidden_BTD, starts, strict=True)])
    return picked.reshape(-1, G, R, hidden_BTD.shape[-1])


def test_prefill_and_decode_on_a_ring_equal_one_full_forward():
    R, G = 6, 2
    batch, completions, whole = prompts_and_completions(R, G)
    params = random_params(CFG)
    expected = at_predictions(forward(CFG, params, whole), batch, R, G)

    @jax.jit
    def prefill(params, batch):
        model = bind(CFG, params, "decoder")
        return model.prefill(
            batch.tokens, batch.mrope, batch.segment_ids, batch.vision_src, features
        )

    @jax.jit
    def step(params, token, position, prompt_caches, rings, column, sight):
        model = bind(CFG, params, "decoder")
        return model.decode(token, position, prompt_caches, rings, column, sight)

    features = encode(CFG, params, batch.vision)
    params = for_sampling(params)
    last, caches = prefill(params, batch)
    close(jnp.broadcast_to(last[:, None], expected[:, :, 0].shape), expected[:, :, 0])
    # One shard of 3 prompts, 6 samples in 7 slots: sample g of prompt c in slot slots[c, g].
    caches = jax.tree.map(lambda x: x[None], caches)
    slots = np.array([[3, 0], [6, 2], [1, 4]])
    place = np.zeros((1, 7), np.int32)
    place[0, slots.ravel()] = np.arange(6)
    text = CFG.text
    shape = (1, 7, text.num_key_value_heads, R + 3, text.head_dim)
    # What columns not yet written hold must not matter, nor do columns that are not read.
    rings = ((jnp.full(shape, 50.0, jnp.float32),) * 2,) * text.num_hidden_layers
    visible = np.zeros((1, 7, R), bool)
    of_slot = np.asarray(place[0])
    prompt_visible = jnp.asarray(batch.segment_ids == 1)[None]
    for t in range(R - 1):
        column = (t + 4) % R
        visible[..., column] = True
        sight = Sight(prompt_visible, jnp.asarray(visible), jnp.asarray(slots)[None], place)
        position = jnp.repeat(jnp.asarray(batch.next_pos), G)[of_slot][None] + t
        token = completions[..., t].reshape(-1)[of_slot][None]
        h, rings = step(params, token, position, caches, rings, column, sight)
        close(h[0, slots], expected[:, :, t + 1])
    assert step._cache_size() == 1


def lane_hidden(model, batch, features, completions, packed):
    """Normed states [X, C * T, D] that predict what stands in the slots of the lanes."""
    x_XYD = model.lane_stream(batch, features, completions, packed)
    per_row = len(batch.tokens) // len(packed.row)
    at = predicting_slots(packed, per_row, completions.shape[1])
    return model.text.norm(jnp.take_along_axis(x_XYD, at[..., None], axis=1))


@pytest.mark.parametrize("blocks", [1, 3])
def test_packed_completions_equal_whole_sequences_with_gradients(blocks):
    R, G = 6, 2
    batch, completions, whole = prompts_and_completions(R, G, per_row=3)
    params = random_params(CFG)
    text = {k: v for k, v in params.items() if k.startswith("text/") and "lm_head" not in k}
    features = encode(CFG, params, batch.vision)
    apart = encode(CFG, params, whole.vision)
    lengths = np.array([[6, 2], [1, 3], [3, 0]])  # one is left out; two lanes hold two
    mask = np.arange(R) < lengths[..., None]
    budgets = lanes.LaneBudgets(Layout(3), G, batch.tokens.shape[1], R, [1e-9, 9.0][blocks > 1])
    ((packed,),) = jax.tree.map(jnp.asarray, lanes.pack(batch.lengths, lengths, budgets))
    assert packed.sample.shape == {1: (1, 3, R), 3: (3, 2, R)}[blocks]
    real = np.flatnonzero(packed.sample.reshape(-1) >= 0)
    sample, at = (np.asarray(x).reshape(-1)[real] for x in (packed.sample, packed.sample_at))
    weight_PGRD = jax.random.normal(jax.random.key(2), (3, G, R, CFG.text.hidden_size))
    weight = weight_PGRD.reshape(3 * G, R, -1)[sample, at]

    def in_lanes(text, features, completions):
        h = lane_hidden(bind(CFG, params | text), batch, features, completions, packed)
        h = h.reshape(-1, h.shape[-1])[real]
        return jnp.sum(h * weight), h

    def separate(text, features):
        h = at_predictions(text_hidden(CFG, params | text, whole, features), batch, R, G)
        return jnp.sum(h * weight_PGRD * mask[..., None]), h

    differentiate = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    grad_in_lanes = jax.jit(differentiate(in_lanes))
    (_, h_lanes), grads = grad_in_lanes(text, features, completions)
    (_, h_whole), grads_whole = jax.jit(differentiate(separate))(text, apart)
    close(h_lanes, h_whole.reshape(3 * G, R, -1)[sample, at])
    for path, theirs in grads_whole[0].items():
        scale = np.abs(theirs).max() + 1e-9
        close(grads[0][path] / scale, theirs / scale)
    # Whole sequences have features of their own for each sample, 4 of prompt 0 and 3 of prompt 2.
    of_prompts = grads_whole[1].reshape(3, G, *grads_whole[1].shape[1:]).sum(1)
    wanted = np.concatenate([of_prompts[0, :4], of_prompts[2, :3]])
    close(grads[1][0, :7], wanted)
    assert np.abs(wanted).max(1).min() > 0.1 and not grads[1][0, 7:].any()

    # What stands behind the end of a completion changes nothing, bit for bit.
    other = grad_in_lanes(text, features, jnp.where(jnp.asarray(mask), completions, 77))
    np.testing.assert_array_equal(h_lanes, other[0][1])
    for path, grad in other[1][0].items():
        assert path == "text/embed/embedding" or np.array_equal(grad, grads[0][path]), path


# --- windows, patterns, scans ------------------------------------------------------------------


def test_scanned_layers_equal_a_loop_over_layers():
    batch = make_batch([make_sample(15, 12)], 14)

    @jax.jit
    def scan(params, batch):
        model = bind(CFG, params)
        x = model.embed(batch.tokens)
        mask = Mask(batch.segment_ids, batch.segment_ids)
        x, layers = model.text.run(x, batch.mrope, mask, lambda x, k, v: x)
        return model.text.norm(x), layers

    @jax.jit
    def loop(params, batch):
        model = bind(CFG, params)
        x, rope, outputs = model.embed(batch.tokens), model.text.rope(batch.mrope), []
        mask = Mask(batch.segment_ids, batch.segment_ids)
        for i in range(CFG.text.num_hidden_layers):
            layer = jax.tree.map(lambda p, i=i: p[i], model.text.layers)
            q, k, v = layer.qkv(x, rope)
            x = layer.finish(x, attention(q, k, v, mask, "xla"))
            outputs.append(x)
        return model.text.norm(x), jnp.stack(outputs)

    params = random_params(CFG)
    for ours, unrolled in zip(scan(params, batch), loop(params, batch), strict=True):
        close(ours, unrolled, 5e-6)


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_recomputing_layers_keeps_gradients(remat):
    batch = make_batch([make_sample(17, 9)], 12)
    params = {k: v for k, v in random_params(CFG).items() if k.startswith("text/")}

    def loss(text, policy):
        cfg = dataclasses.replace(CFG, remat=policy)
        return jnp.sum(text_hidden(cfg, random_params(CFG) | text, batch)[:, :9] ** 2)

    assert_same_gradients(loss, params, remat)


# --- dtypes, heads, devices --------------------------------------------------------------------


def test_bfloat16_compute_stays_near_float32():
    batch = make_batch([make_sample(16, 6, (1, 4, 6)), make_sample(17, 9)], 16)
    params = random_params(CFG)
    exact = forward(CFG, params, batch)
    half = forward(dataclasses.replace(CFG, dtype="bfloat16"), params, batch)
    assert half.dtype == jnp.bfloat16
    valid = np.asarray(batch.segment_ids) > 0
    difference = np.asarray(half.astype(jnp.float32) - exact)[valid]
    assert 1e-4 < np.sqrt(np.mean(difference**2) / np.mean(exact[valid] ** 2)) < 0.05


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_dtypes_follow_the_configuration(param_dtype):
    """Compute in bfloat16, parameters and so gradients in their own dtype, logits in float32."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16", param_dtype=param_dtype)
    batch = make_batch([make_sample(16, 6, (1, 4, 6)), make_sample(17, 9)], 16)

    def passes(params):
        model = bind(cfg, params)
        features = model.encode_images(batch.vision)
        args = (batch.tokens, batch.mrope, batch.segment_ids, batch.vision_src, features)
        last, caches = bind(cfg, for_sampling(params), "decoder").prefill(*args)
        logits = model.logits(model.hidden(*args))
        return jnp.sum(logits), dict(features=features, last=last, caches=caches, logits=logits)

    params = abstract_params(cfg)
    grads, out = jax.eval_shape(jax.grad(passes, has_aux=True), params)
    assert {v.dtype for v in (*params.values(), *grads.values())} == {jnp.dtype(param_dtype)}
    assert out.pop("logits").dtype == jnp.float32
    assert {v.dtype for v in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}


def test_norms_and_rotations_stay_float32_inside_bfloat16():
    """Each result is the float32 result, rounded once."""
    x = 3 * jax.random.normal(jax.random.key(6), (4, 64), jnp.bfloat16)
    exact = np.asarray(x, np.float32)
    exact = exact / np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-6)
    norm = RMSNorm(64, 1e-6, replace(CFG, dtype="bfloat16"))
    np.testing.assert_allclose(np.asarray(norm(x), np.float32), exact, rtol=2**-8)
    # Position 4,001 is not a bfloat16 number.
    cos, _ = text_mrope(jnp.full((1, 3, 1), 4001), 8, 16.0, (1, 1, 2), "bfloat16")
    expected = np.cos(4001 / np.array([1, 2, 4, 8] * 2))
    np.testing.assert_allclose(np.asarray(cos[0, 0], np.float32), expected, rtol=2**-8)
    angles = jax.random.normal(jax.random.key(7), (4, 1, 64))
    turned = rotate(x[:, None, None], jnp.cos(angles), jnp.sin(angles))
    assert turned.dtype == jnp.bfloat16
    wide = rotate(x[:, None, None].astype(jnp.float32), jnp.cos(angles), jnp.sin(angles))
    assert np.array_equal(turned, wide.astype(jnp.bfloat16))


def test_logits_use_the_head_or_the_transposed_embedding():
    tied = dataclasses.replace(CFG, tie_word_embeddings=True)
    params = random_params(CFG)
    h = jax.random.normal(jax.random.key(4), (2, 3, CFG.text.hidden_size))
    head = params["text/lm_head/kernel"]
    model = bind(CFG, params)
    close(model.logits(h), np.asarray(h) @ np.asarray(head), 1e-5)
    assert np.array_equal(model.head_kernel(), head)
    assert "text/lm_head/kernel" not in abstract_params(tied)
    params = {k: v for k, v in params.items() if k != "text/lm_head/kernel"}
    model = bind(tied, params)
    table = np.asarray(params["text/embed/embedding"])
    close(model.logits(h), np.asarray(h) @ table.T, 1e-5)
    assert np.array_equal(model.head_kernel(), table.T)


def test_one_device_and_a_mesh_of_eight_agree():
    """Images, whole sequences and lanes; rows over data x fsdp, heads over tensor."""
    cfg = replace(
        CFG,
        vision=dict(num_heads=4, hidden_size=32),
        text=dict(num_attention_heads=4, num_key_value_heads=2, mrope_section=(1, 2, 2)),
    )
    samples = [make_sample(20 + i, 5 + i, (1, 4, 2 + 2 * (i % 3))) for i in range(8)]
    batch = make_batch(samples, 20, per_row=2, patches=4 * W)
    params = random_params(cfg)
    completions = jnp.asarray(np.random.default_rng(5).integers(0, 100, (8, 2, 4)))
    lengths = np.random.default_rng(6).integers(1, 5, (8, 2))
    budgets = lanes.LaneBudgets(Layout(2), 2, 20, 4)
    ((packed,),) = lanes.pack(batch.lengths, lengths, budgets)

    @jax.jit
    def passes(params, batch, completions, packed):
        model = bind(cfg, params)
        features = model.encode_images(batch.vision)
        args = (batch.tokens, batch.mrope, batch.segment_ids, batch.vision_src, features)
        whole = jnp.where((batch.segment_ids > 0)[..., None], model.hidden(*args), 0)
        h = lane_hidden(model, batch, features, completions, packed)
        h = jnp.where(packed.sample.reshape(*h.shape[:2], 1) >= 0, h, 0)
        return whole, model.logits(h)

    expected = passes(params, batch, completions, packed)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put((batch, completions, packed), batch_sharding(mesh))
        params = jax.device_put(params, param_specs(abstract_params(cfg), mesh))
        found = passes(params, *sharded)
    assert found[0].sharding.spec[0] == ("data", "fsdp")
    for ours, single in zip(found, expected, strict=True):
        close(ours, single)


def test_modules_work_as_plain_pytrees_too():
    """Flax is about to make tree mode the default; nothing here may depend on graph mode."""
    batch = make_batch([make_sample(17, 9)], 12)
    params = random_params(CFG)
    expected = text_hidden(CFG, params, batch)
    qwen2_5_vl._structure.cache_clear()
    try:
        with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
            close(jax.jit(text_hidden.__wrapped__, static_argnums=0)(CFG, params, batch), expected)
    finally:
        qwen2_5_vl._structure.cache_clear()


# --- rotary positions --------------------------------------------------------------------------


def test_mrope_takes_each_section_from_its_axis():
    """Head width 8, theta 16: frequencies 1, 1/2, 1/4, 1/8; sections 1, 1, 2."""
    cos, sin = text_mrope(jnp.asarray([[[5], [6], [8]]]), 8, 16.0, (1, 1, 2), "float32")
    angles = np.array([5 * 1, 6 / 2, 8 / 4, 8 / 8] * 2)
    close(cos[0, 0], np.cos(angles), 1e-6)
    close(sin[0, 0], np.sin(angles), 1e-6)


def test_rotation_turns_pairs_half_a_head_apart():
    """Pair 0 is (1, 0), turned by 90 degrees (0, 1); pair 1 is (0, 1), turned by 180 (0, -1)."""
    x = jnp.asarray([1.0, 0, 0, 1]).reshape(1, 1, 1, 4)
    angles = jnp.asarray([np.pi / 2, np.pi] * 2).reshape(1, 1, 4)
    close(rotate(x, jnp.cos(angles), jnp.sin(angles)).ravel(), [0, 0, 1, -1], 1e-6)


def test_norm_and_mlp_by_hand():
    norm = RMSNorm(2, 0.5, CFG)
    norm.scale[...] = jnp.asarray([1.0, 10])
    close(norm(jnp.asarray([[1.0, 2]])), np.array([[1, 20]]) / np.sqrt(2.5 + 0.5), 1e-6)
    mlp = SwiGLU(1, 1, CFG, bias=True, rngs=nnx.Rngs(0))
    mlp.gate.kernel[...], mlp.up.kernel[...], mlp.down.kernel[...] = ([[2.0]], [[3.0]], [[5.0]])
    mlp.down.bias[...] = jnp.asarray([7.0])
    sigmoid = 1 / (1 + np.exp(-2.0))
    close(mlp(jnp.asarray([[1.0]])), [[5 * (2 * sigmoid) * 3 + 7]], 1e-5)


# --- parameters --------------------------------------------------------------------------------


def test_initial_parameters_are_drawn_as_by_hugging_face():
    cfg = replace(CFG, vision=dict(depth=2, fullatt_block_indexes=(1,)))
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    shapes = {k: (v.shape, v.dtype) for k, v in abstract_params(cfg).items()}
    assert {k: (v.shape, v.dtype) for k, v in params.items()} == shapes
    for path, value in params.items():
        kind = path.rsplit("/", 1)[1]
        if kind in ("bias", "scale"):
            assert np.all(np.asarray(value) == (kind == "scale")), path
        else:
            assert abs(np.std(value) / 0.02 - 1) < 0.15 and abs(np.mean(value)) < 4e-3, path
    kernels = [v for k, v in params.items() if "/layers/" in k and k.endswith("kernel")]
    assert not any(np.array_equal(k[0], k[1]) for k in kernels), "layers must differ"


def test_parameters_of_another_model_are_refused_by_name():
    params = dict(random_params(CFG))
    del params["text/norm/scale"]
    params["text/norm/bias"] = jnp.zeros(3)
    with pytest.raises(
        ValueError, match="missing .*text/norm/scale.* superfluous .*text/norm/bias"
    ):
        bind(CFG, params)


def test_offloaded_layer_inputs_keep_gradients(monkeypatch):
    def loss(policy, weights, x):
        body = layers.remat(lambda x, w: (jnp.tanh(x @ w), None), policy)
        return jnp.sum(jax.lax.scan(body, x, weights)[0] ** 2)

    weights = jax.random.normal(jax.random.key(0), (3, 8, 8))
    x = jax.random.normal(jax.random.key(1), (4, 8))
    expected = jax.grad(functools.partial(loss, "block"), (0, 1))(weights, x)
    with pytest.raises(ValueError, match="remat=offload needs a TPU or a GPU; set block"):
        loss("offload", weights, x)
    monkeypatch.setattr(layers, "target_platform", lambda: "gpu")
    grad = jax.grad(functools.partial(loss, "offload"), (0, 1))
    assert "f32<host>[3,4,8]" in str(jax.make_jaxpr(grad)(weights, x))  # one a layer
    for ours, theirs in zip(jax.jit(grad)(weights, x), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
