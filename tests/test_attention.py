"""The attention implementations against a naive loop, each other, and themselves in chunks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from srpo_jax.model import attention as attention_lib
from srpo_jax.model import cudnn, decode_kernel
from srpo_jax.model.attention import (
    Sight,
    attention,
    choose_impl,
    decode_attention,
    lane_attention,
)
from srpo_jax.model.masks import LaneMask, Mask


def draw(seed, B=2, T=6, S=6, H=4, K=2, E=8, dtype=np.float32):
    """Queries, keys, values."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, E), (B, S, K, E), (B, S, K, E))
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


def naive(q, k, v, q_segments, kv_segments, causal, q_offset=0):
    """Attention written as loops over batch, heads and queries, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    B, T, H, E = q.shape
    S, K = k.shape[1:3]
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        seen = [
            s
            for s in range(S)
            if q_segments[b][t] == kv_segments[b][s] and (not causal or s <= t + q_offset)
        ]
        scores = np.array([q[b, t, h] @ k[b, s, h * K // H] / np.sqrt(E) for s in seen])
        weights = np.exp(scores - scores.max())
        for weight, s in zip(weights / weights.sum(), seen, strict=True):
            out[b, t, h] += weight * v[b, s, h * K // H]
    return out


def segments_of(*rows):
    return jnp.asarray(rows, jnp.int32)


@pytest.mark.parametrize("causal", [True, False])
def test_dense_attention_equals_loops(causal):
    q, k, v = draw(0)
    segments = segments_of([1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1])
    out = attention(q, k, v, Mask(segments, segments, causal), "xla")
    np.testing.assert_allclose(out, naive(q, k, v, segments, segments, causal), atol=1e-6)


def test_query_offset_counts_keys_before_the_first_query():
    q, k, v = draw(1, T=3, S=7, H=3, K=3)
    q_segments = segments_of([1, 1, -1], [1, 1, 1])
    kv_segments = segments_of([1, 1, 0, 0, 1, 1, -1], [1, 1, 1, 1, 1, 1, 1])
    out = attention(q, k, v, Mask(q_segments, kv_segments, q_offset=4), "xla")
    np.testing.assert_allclose(out, naive(q, k, v, q_segments, kv_segments, True, 4), atol=1e-6)


def loss_and_grads(impl, q, k, v, q_segments, kv_segments, causal, q_offset, weight=None):
    """Weighted sum of the output, so that gradients see every element differently."""
    weight = jax.random.normal(jax.random.key(9), q.shape) if weight is None else weight

    def loss(q, k, v):
        out = attention(q, k, v, Mask(q_segments, kv_segments, causal, q_offset), impl)
        return jnp.sum(out * weight), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads


@pytest.mark.parametrize(("T", "S", "offset"), [(50, 50, 0), (37, 50, 13)])
def test_chunks_of_queries_equal_one_chunk(monkeypatch, T, S, offset):
    q, k, v = draw(2, T=T, S=S)
    kv_segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 1]], [20, 20, 10], axis=1))
    args = (q, k, v, kv_segments[:, S - T :], kv_segments, True, offset)
    dense = loss_and_grads("xla", *args)
    heads = q.shape[0] * q.shape[2]
    monkeypatch.setattr(attention_lib, "CHUNK_LOGITS", 16 * S * heads)
    assert attention_lib._chunk_size(T, S * heads) == 16
    for ours, theirs in zip(loss_and_grads("xla", *args), dense, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_memory_grows_with_length_not_with_its_square(monkeypatch):
    monkeypatch.setattr(attention_lib, "CHUNK_LOGITS", 2**20)

    def temporaries(T):
        q = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, T), jnp.int32)

        def loss(q, segments):
            return jnp.sum(attention(q, q, q, Mask(segments, segments), "xla"))

        return jax.jit(jax.grad(loss)).lower(q, segments).compile().memory_analysis()

    short, long = (temporaries(T).temp_size_in_bytes for T in (2048, 8192))
    assert long < 4.5 * short  # linear would be 4, quadratic 16
    assert long < 8192**2  # less than a quarter of one head's float32 logits


def test_rows_that_see_nothing_stay_finite():
    q, k, v = draw(3)
    ones = jnp.ones((2, 6), jnp.int32)
    for grads in loss_and_grads("xla", q, k, v, ones * 7, ones, True, 0):
        assert np.isfinite(grads).all()


def test_bfloat16_is_near_float32_and_keeps_its_dtype():
    q, k, v = draw(4, T=40, S=40)
    ones = jnp.ones((2, 40), jnp.int32)
    exact = loss_and_grads("xla", q, k, v, ones, ones, True, 0)
    half = loss_and_grads("xla", *(x.astype(jnp.bfloat16) for x in (q, k, v)), ones, ones, True, 0)
    assert all(x.dtype == jnp.bfloat16 for x in half)
    for a, b in zip(half, exact, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.06)


def test_softmax_of_large_logits_is_float32_in_bfloat16():
    """Logits near 40: in bfloat16 they would be off by 0.1, and their weights by a tenth."""
    q, k, v = draw(11, T=20, S=20, dtype=jnp.bfloat16)
    ones = jnp.ones((2, 20), jnp.int32)
    args = (Mask(ones, ones, causal=False), "xla")
    half = attention(q * 16, k, v, *args)
    exact = attention(*(x.astype(jnp.float32) for x in (q * 16, k, v)), *args)
    np.testing.assert_allclose(np.asarray(half, np.float32), exact, atol=0.015)


SPLASH_CASES = {
    "causal, packed, odd length": dict(T=150, S=150, H=4, K=2, causal=True, offset=0),
    "completions after a prompt": dict(T=40, S=140, H=3, K=1, causal=True, offset=100),
    "image frames": dict(T=136, S=136, H=3, K=3, causal=False, offset=0),
}


@pytest.mark.parametrize("case", SPLASH_CASES)
def test_splash_equals_xla_with_gradients(case):
    c = SPLASH_CASES[case]
    q, k, v = draw(5, T=c["T"], S=c["S"], H=c["H"], K=c["K"], E=20)
    kv_segments = np.ones((2, c["S"]), np.int32)
    kv_segments[0, 60:130] = 2
    kv_segments[0, 130:] = -1
    args = (q, k, v, kv_segments[:, c["S"] - c["T"] :], kv_segments, c["causal"], c["offset"])
    args = jax.tree.map(jnp.asarray, args[:5]) + args[5:]
    reference = loss_and_grads("xla", *args)
    for ours, theirs in zip(loss_and_grads("splash", *args), reference, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_splash_on_a_mesh_equals_one_device(kv_heads):
    """Heads over tensor, sequences over data x fsdp; one key/value head is repeated for two."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    q, k, v = draw(6, B=4, T=130, S=130, H=4, K=kv_heads)
    segments = jnp.asarray(np.arange(130)[None] // 50 + np.zeros((4, 1), int), jnp.int32)
    args = (q, k, v, segments, segments, True, 0)
    reference = loss_and_grads("xla", *args)
    with jax.set_mesh(mesh):
        sharded = loss_and_grads("splash", *args)
    assert len(sharded[0].sharding.device_set) == 8
    for ours, theirs in zip(sharded, reference, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def lane_case(X=2, U=9, C=2, T=11, H=4, K=2, E=8, forked=False):
    """Packed blocks: two prompts in a region, lanes of completions of both, padding everywhere.

    ``forked``: in each second lane the last sample goes on from the one before."""
    prompt = np.full((X, U), -1)
    sample, of_prompt = np.full((X, C, T), -1), np.full((X, C, T), -1)
    for x in range(X):
        prompt[x, :4], prompt[x, 4 : 7 + x % 2] = 0, 1
        for c, lane in enumerate([[(0, 4), (3, 3)], [(2, 6 + x % 2), (1, 1), (4, 2)]]):
            ids = np.repeat([s for s, _ in lane], [n for _, n in lane])
            sample[x, c, : len(ids)], of_prompt[x, c, : len(ids)] = ids, ids // 2 % 2
    trunk = np.where(sample == 4, 1, -1)
    *ids, trunk = (jnp.asarray(ids, jnp.int32) for ids in (prompt, sample, of_prompt, trunk))
    mask = LaneMask(*ids, trunk_XCT=trunk if forked else None)
    return draw(12, B=X, T=U + C * T, S=U + C * T, H=H, K=K, E=E), mask


def lane_loss(impl, qkv, mask, weight):
    """Output and gradients; nothing is asked of padding."""
    of_slot = [x.reshape(len(x), -1) for x in (mask.prompt_XU, mask.sample_XCT)]
    real = (jnp.concatenate(of_slot, axis=1) >= 0)[..., None, None]

    def loss(qkv):
        out = jnp.where(real, lane_attention(*qkv, mask, impl), 0)
        return jnp.sum(out * weight), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return out, *grads


@pytest.mark.parametrize("forked", [False, True])
def test_a_token_of_a_lane_sees_its_prompt_and_its_own_completion(forked):
    qkv, mask = lane_case(forked=forked)
    X, C, T = mask.sample_XCT.shape
    U = mask.prompt_XU.shape[1]
    out = np.asarray(lane_attention(*qkv, mask, "xla"))
    prompts = naive(*(x[:, :U] for x in qkv), mask.prompt_XU, mask.prompt_XU, True)
    np.testing.assert_allclose(out[:, :U], prompts, atol=1e-6)
    sample, of_prompt = (np.asarray(x) for x in (mask.sample_XCT, mask.lane_prompt_XCT))
    for x, c in itertools.product(range(X), range(C)):
        for s in set(sample[x, c].tolist()) - {-1}:
            own = U + c * T + np.flatnonzero(sample[x, c] == s)
            trunk = U + c * T + np.flatnonzero((sample[x, c] == 1) & (s == 4) & forked)
            before = np.flatnonzero(mask.prompt_XU[x] == of_prompt[x, c][sample[x, c] == s][0])
            q, k, v = (np.asarray(a)[x : x + 1] for a in qkv)
            before = np.concatenate([before, trunk])
            seen = np.concatenate([before, own])
            ones = np.ones((1, len(seen)), int)
            args = (q[:, own], k[:, seen], v[:, seen], ones[:, : len(own)], ones, True, len(before))
            np.testing.assert_allclose(out[x, own], naive(*args)[0], atol=1e-6)


def test_splash_lanes_equal_xla_with_gradients():
    sizes = dict(H=3, K=1, E=20, T=140, U=130)  # more than a kernel's block of each
    qkv, mask = lane_case(**sizes, forked=True)
    weight = jax.random.normal(jax.random.key(9), qkv[0].shape)
    reference = lane_loss("xla", qkv, mask, weight)
    for ours, theirs in zip(lane_loss("splash", qkv, mask, weight), reference, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)
        assert np.abs(theirs).max() > 0.1


def test_splash_lanes_on_a_mesh_equal_one_device():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    qkv, mask = lane_case(X=4, K=1)
    weight = jax.random.normal(jax.random.key(9), qkv[0].shape)
    reference = lane_loss("xla", qkv, mask, weight)
    with jax.set_mesh(mesh):
        sharded = lane_loss("splash", qkv, mask, weight)
    for ours, theirs in zip(sharded, reference, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_nothing_leaks_between_the_completions_of_a_lane():
    qkv, mask = lane_case()
    weight = jnp.zeros(qkv[0].shape).at[:, 9 + 4 : 9 + 7].set(1.0)  # sample 3, behind sample 0
    _, dq, dk, dv = lane_loss("xla", qkv, mask, weight)
    reached = np.abs(dk).sum((0, 2, 3)) + np.abs(dv).sum((0, 2, 3)) > 0
    assert np.flatnonzero(reached).tolist() == [4, 5, 6, 7, 13, 14, 15]  # its prompt and itself
    assert np.flatnonzero(np.abs(dq).sum((0, 2, 3))).tolist() == [13, 14, 15]


@pytest.fixture
def cudnn_calls(monkeypatch):
    """Arguments of cuDNN, which cannot run here: its portable twin takes the same ones."""
    calls, original = [], jax.nn.dot_product_attention

    def portable(q, k, v, *, implementation, **kwargs):
        assert implementation == "cudnn"
        calls.append({"T": q.shape[1], "S": k.shape[1], **kwargs})
        out = original(q, k, v, implementation="xla", **kwargs)
        if (lengths := kwargs.get("query_seq_lengths")) is None:
            return out
        inside = (
            jnp.arange(q.shape[1])[None] < lengths[:, None]
        )  # beyond, the kernel promises nothing
        return jnp.where(inside[..., None, None], out, jnp.nan)

    monkeypatch.setattr(jax.nn, "dot_product_attention", portable)
    monkeypatch.setattr(cudnn, "refusal", lambda q: None)  # float32 too
    return calls


@pytest.mark.parametrize(("T", "S", "offset"), [(5, 12, 7), (9, 9, 0), (520, 580, 60)])
def test_cudnn_gets_the_right_mask(cudnn_calls, T, S, offset):
    q, k, v = draw(7, T=T, S=S)
    kv_segments = segments_of([1, 1, 0, *[1] * (S - 3)], [*[1] * (S - 2), 2, 2])
    args = (q, k, v, kv_segments[:, S - T :], kv_segments, True, offset)
    ours = loss_and_grads("cudnn", *args)
    for call in cudnn_calls:  # half a last tile of keys would make NaN on the device
        assert call["T"] % 2 == 0 and call["S"] % 128 == 0
        assert call["is_causal"] is (offset == 0)
    for a, b in zip(ours, loss_and_grads("xla", *args), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_cudnn_leaves_out_keys_that_a_part_of_a_lane_does_not_see():
    ones = jnp.ones((1, 1), jnp.int32)
    parts = lambda T, S, **kwargs: cudnn.query_parts(T, S, Mask(ones, ones, **kwargs))  # noqa: E731
    assert parts(2048, 3072, q_offset=1000) == [
        (0, 512, 1536),
        (512, 1024, 2048),
        (1024, 1536, 2560),
        (1536, 2048, 3072),
    ]
    assert [part[1] for part in parts(1020, 2048, q_offset=999)] == [510, 1020]
    assert parts(256, 512, q_offset=200) == [(0, 256, 512)]
    assert parts(2048, 2048) == parts(2048, 2048, causal=False) == [(0, 2048, 2048)]


@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_takes_one_segment_by_its_length(cudnn_calls, causal):
    """No mask is made; what the kernel leaves in padding reaches neither output nor gradients."""
    q, k, v = draw(13, B=3, T=7, S=7)
    real = jnp.arange(7)[None] < jnp.asarray([4, 7, 1])[:, None]
    segments, weight = real.astype(jnp.int32), real[..., None, None] * jnp.ones(q.shape)

    def loss(impl, q, k, v):
        mask = Mask(segments, segments, causal, single=True)
        out = attention(q, k, v, mask, impl) * weight  # 0 times NaN is NaN
        return jnp.sum(out), out

    results = [
        jax.value_and_grad(functools.partial(loss, impl), (0, 1, 2), has_aux=True)(q, k, v)
        for impl in ("cudnn", "xla")
    ]
    (call,) = cudnn_calls
    assert call.keys() == {"T", "S", "is_causal", "query_seq_lengths", "key_value_seq_lengths"}
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("forked", [False, True])
def test_cudnn_lanes_equal_xla_with_gradients(cudnn_calls, monkeypatch, forked):
    """In parts of four queries: none sees another completion, or a key beyond its part."""
    monkeypatch.setattr(cudnn, "SHORTEST_PART", 4)
    monkeypatch.setattr(cudnn, "TILE", 2)
    qkv, mask = lane_case(T=16, forked=forked)
    weight = jax.random.normal(jax.random.key(9), qkv[0].shape)
    ours = lane_loss("cudnn", qkv, mask, weight)
    assert [call["S"] for call in cudnn_calls if call["T"] == 4] == [14, 18, 22, 26]
    for x, y in zip(ours, lane_loss("xla", qkv, mask, weight), strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-6), x, y)


def test_cudnns_mask_of_a_lane_shows_prompt_trunk_and_own_completion_and_nothing_else(cudnn_calls):
    qkv, mask = lane_case(forked=True)
    lane_attention(*qkv, mask, "cudnn")
    X, C, T = mask.sample_XCT.shape
    U = mask.prompt_XU.shape[1]
    (seen,) = (call["mask"] for call in cudnn_calls if not call["is_causal"])
    want = np.zeros((X * C, T, U + T), bool)
    sample, of_prompt = (np.asarray(x) for x in (mask.sample_XCT, mask.lane_prompt_XCT))
    for x, c, t in itertools.product(range(X), range(C), range(T)):
        own = sample[x, c, t]
        if own >= 0:
            want[x * C + c, t, :U] = mask.prompt_XU[x] == of_prompt[x, c, t]
            trunk = sample[x, c] == (1 if own == 4 else own)  # sample 4 goes on from sample 1
            want[x * C + c, t, U:] = (trunk | (sample[x, c] == own)) & (np.arange(T) <= t)
    real = (sample.reshape(X * C, T) >= 0)[..., None]
    np.testing.assert_array_equal(seen[:, 0, :T, : U + T] & real, want)
    assert not (seen[:, 0, :T, U + T :] & real).any()  # the kernel's padding


def test_cudnn_refuses_what_it_cannot_compute():
    q, k, v = draw(8)
    ones = jnp.ones((2, 6), jnp.int32)
    with pytest.raises(ValueError, match="float32.*attention=xla"):
        attention(q, k, v, Mask(ones, ones), "cudnn")


def test_auto_is_the_best_of_the_platform(monkeypatch):
    half = jax.ShapeDtypeStruct((1, 4, 2, 128), jnp.bfloat16)
    full = jax.ShapeDtypeStruct((1, 4, 2, 128), jnp.float32)
    odd = jax.ShapeDtypeStruct((1, 4, 2, 20), jnp.bfloat16)
    assert attention_lib.target_platform() == "cpu" and choose_impl("auto", half) == "xla"
    monkeypatch.setattr(attention_lib, "target_platform", lambda: "tpu")
    assert choose_impl("auto", full) == "splash" and choose_impl("xla", full) == "xla"
    monkeypatch.setattr(attention_lib, "target_platform", lambda: "cuda")
    assert [choose_impl("auto", q) for q in (half, full, odd)] == ["cudnn", "xla", "xla"]


def test_decode_attention_equals_attention_over_both_caches():
    rng = np.random.default_rng(10)
    C, G, S, W, H, K, E = 2, 3, 5, 4, 6, 2, 8
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    # One shard with 5 slots; prompt 0 has samples in three of them, prompt 1 in one, one is free.
    q = normal(1, 5, H, E)
    prompt = (normal(1, C, K, S, E), normal(1, C, K, S, E))
    own = (normal(1, 5, K, W, E), normal(1, 5, K, W, E))
    slots = {4: (0, 0), 0: (0, 1), 3: (0, 2), 1: (1, 2)}
    prompt_visible = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    own_visible = rng.random((1, 5, W)) < 0.5
    slot_ZCG, place_ZJ = np.zeros((1, C, G), np.int32), np.zeros((1, 5), np.int32)
    for slot, (c, g) in slots.items():
        slot_ZCG[0, c, g], place_ZJ[0, slot] = slot, c * G + g
    sight = Sight(*map(jnp.asarray, (prompt_visible[None], own_visible, slot_ZCG, place_ZJ)))
    out = jax.jit(decode_attention)(q, prompt, own, sight)
    for slot, (c, _) in slots.items():
        pairs = zip(prompt, own, strict=True)
        both = (np.concatenate([a[0, c], b[0, slot]], axis=1) for a, b in pairs)
        keys, values = (x.swapaxes(0, 1) for x in both)
        visible = np.concatenate([prompt_visible[c], own_visible[0, slot]])
        query = q[0, slot][None, None]
        expected = naive(query, keys[None], values[None], [[1]], visible[None], False)
        np.testing.assert_allclose(out[0, slot], expected[0, 0], atol=1e-6)


def part_case(Z=1, C=2, K=2, M=12, R=100, E=32, S=90):
    """Queries, keys and values with more columns than are looked at, and which of these count."""
    rng = np.random.default_rng(11)
    shapes = ((Z, C, K, M, E), (Z, C, K, R, E), (Z, C, K, R, E))
    q, *kv = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    visible = rng.random((Z, C, S)) < 0.5
    visible[0, 0, : S // 2] = False
    return q, tuple(kv), jnp.asarray(visible)


def parts_agree(ours, theirs):
    """Divided values are those of one softmax, whatever maximum each way has taken off."""
    (out, peak, total), (want, want_peak, want_total) = ours, theirs
    np.testing.assert_allclose(out / total[..., None], want / want_total[..., None], atol=0.01)
    np.testing.assert_allclose(peak + np.log(total), want_peak + np.log(want_total), atol=1e-4)


@pytest.mark.parametrize(
    "sizes", [{}, dict(C=1, K=1, M=7, R=64, S=64), dict(Z=2, M=20, R=200, S=130), dict(C=40, M=1)]
)
def test_the_decode_kernel_equals_plain_jax(sizes):
    """One block of keys and many, an uneven last one, many programs for a head and one."""
    case = part_case(**sizes)
    parts_agree(decode_kernel.part(*case), attention_lib._part(*case))


def test_a_row_that_sees_no_key_is_finite_and_weighs_nothing_beside_another_part():
    q, kv, visible = part_case()
    out, peak, total = decode_kernel.part(q, kv, visible & False)
    assert np.isfinite(out).all() and np.isfinite(total).all() and (total > 0).all()
    _, seen, _ = decode_kernel.part(q, kv, visible)
    assert (np.exp(np.float32(peak - seen)) == 0).all()


def test_the_decode_kernel_on_a_mesh_equals_one_device():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    case = part_case(Z=4)
    alone = decode_kernel.part(*case)
    with jax.set_mesh(mesh):
        parts_agree(jax.jit(decode_kernel.part)(*case), alone)


def test_decode_on_a_gpu_takes_the_kernel_where_it_can(monkeypatch):
    taken, case = [], part_case()
    monkeypatch.setattr(attention_lib, "target_platform", lambda: "cuda")
    monkeypatch.setattr(decode_kernel, "part", lambda *args: taken.append(args))
    attention_lib._part(*case)
    full = [jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in case[:2]]
    assert attention_lib._part(*full, case[2])[0].dtype == jnp.float32
    assert len(taken) == 1
    many = jnp.zeros((1, 1, 1, 129, 32), jnp.bfloat16)
    assert "129" in decode_kernel.refusal(many) and decode_kernel.refusal(case[0]) is None
