"""Whole rollouts: what is drawn, with which probability, and that nothing else influences it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import completion_hidden
from sampling_helpers import assert_frequencies, reference_truncation, softmax

from srpo_jax.model.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.model.qwen2_5_vl import abstract_params, bind, for_sampling
from srpo_jax.model.sharding import make_mesh, param_specs, to_global
from srpo_jax.sampling import logits as sampling_logits
from srpo_jax.sampling import schedule
from srpo_jax.sampling.sampler import Sampler, SamplingConfig, vision_token_ids
from srpo_jax.sampling.schedule import Schedule
from srpo_jax.structs import Batch, Rollout

V, EOS, PAD = 48, (40, 41), 47
CFG = ModelConfig(
    vision=VisionConfig(
        depth=1,
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        out_hidden_size=32,
        fullatt_block_indexes=(0,),
    ),
    text=TextConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(2, 1, 1),
    ),
    image_token_id=45,
    video_token_id=46,
    vision_start_token_id=42,
    vision_end_token_id=43,
    vision_token_id=44,
)
P, S, N4 = 8, 9, 6  # prompts, prompt budget, merged image tokens of a row
KEYS = np.array([11, 7, 3, 900, 2**31 + 5, 1, 0, 2**32 - 1], np.uint32)


@pytest.fixture(scope="module")
def params() -> dict:
    # Loud enough that the distributions differ from place to place and every cached token matters.
    rng = np.random.default_rng(1)
    made = {}
    for path, leaf in abstract_params(CFG).items():
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        std = 0.15 if path == "text/lm_head/kernel" else 0.08
        made[path] = 1 + 0.2 * noise if path.endswith("scale") else std * noise
    return made


def make_batch(*, fillers: int = 0, prompt_budget: int = S) -> tuple[Batch, np.ndarray]:
    """P prompts of different lengths, every other one with two image tokens, and row features.

    One feature row per prompt; ``in_rows`` merges them.
    """
    rng = np.random.default_rng(3)
    lengths = rng.integers(4, S + 1, P)
    valid = np.arange(P) < P - fillers
    column = np.arange(prompt_budget)[None]
    inside = column < lengths[:, None]
    words = rng.integers(0, 40, (P, S))
    tokens = np.where(inside, np.pad(words, ((0, 0), (0, prompt_budget - S))), 0)
    vision_src = np.full((P, prompt_budget), -1)
    vision_src[::2, 1:3] = [[2, 4]]
    position = np.broadcast_to(column[:, None], (P, 3, prompt_budget))
    batch = Batch(
        tokens=tokens.astype(np.int32),
        segment_ids=inside.astype(np.int32),
        mrope=position.astype(np.int32),
        vision_src=vision_src.astype(np.int32),
        lengths=lengths.astype(np.int32),
        next_pos=lengths.astype(np.int32),
        loss_mask=np.zeros((P, prompt_budget), np.float32),
        valid=valid,
    )
    return batch, rng.normal(size=(P, N4, 32)).astype(np.float32)


def in_rows(batch: Batch, features: np.ndarray, rows: int) -> tuple[Batch, np.ndarray]:
    """The same prompts in fewer rows: images of a row side by side, indices shifted."""
    per_row = len(features) // rows
    shift = (np.arange(len(features)) % per_row * N4)[:, None]
    source = np.where(batch.vision_src >= 0, batch.vision_src + shift, -1).astype(np.int32)
    return batch.replace(vision_src=source), features.reshape(rows, per_row * N4, -1)


BASE = dict(
    max_new_tokens=8,
    group_size=3,
    eos_ids=EOS,
    pad_id=PAD,
    forbidden_ids=vision_token_ids(CFG),
    segment=3,
)


def make_sampler(shape=(1, 1, 1), **changes) -> Sampler:
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    return Sampler(CFG, SamplingConfig(**(BASE | changes)), mesh)


def run(sampler, params, batch, features, keys=KEYS, *, rows=1, seed=6, **options) -> Rollout:
    """Sample on the sampler's mesh; the result on the host."""
    batch, features = in_rows(batch, features, rows)
    params = for_sampling(params)
    params = jax.device_put(params, param_specs(params, sampler.mesh, "sample"))
    on_mesh = to_global((batch, features), sampler.mesh)
    out = sampler.generate(params, *on_mesh, keys, **(dict(seed=seed, step=0) | options))
    return jax.tree.map(np.asarray, out)


@pytest.fixture(scope="module")
def plain(params) -> tuple[Sampler, Rollout]:
    """The rollout that others are compared with: one row, one device."""
    sampler = make_sampler()
    return sampler, run(sampler, params, *make_batch())


def assert_same(a: Rollout, b: Rollout, prompts=slice(None)) -> None:
    np.testing.assert_array_equal(a.completions, b.completions[prompts])
    np.testing.assert_array_equal(a.completion_mask, b.completion_mask[prompts])
    np.testing.assert_array_equal(a.finished, b.finished[prompts])
    np.testing.assert_allclose(a.sample_logp, b.sample_logp[prompts], atol=1e-5)
    np.testing.assert_allclose(a.policy_logp, b.policy_logp[prompts], atol=1e-5)


def compile_count(sampler):
    """Programs compiled so far."""
    functions = (sampler._empty, sampler.prefill, *sampler._late.values())
    return sum(f._cache_size() for f in functions)


def test_a_seed_gives_the_same_samples_and_everything_in_the_key_changes_them(plain, params):
    sampler, first = plain
    compiled = compile_count(sampler)
    assert_same(run(sampler, params, *make_batch()), first)
    for change in (dict(seed=1), dict(step=1), dict(keys=KEYS + np.uint32(1))):
        other = run(sampler, params, *make_batch(), **change)
        assert (other.completions != first.completions).any(axis=(1, 2)).all(), change
    assert compile_count(sampler) == compiled <= 9


def test_the_samples_of_a_group_differ(plain):
    completions = plain[1].completions
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (completions[:, i] != completions[:, j]).any(axis=1).all()


def test_samples_end_at_either_eos_or_at_the_budget_and_are_padded_after(params):
    sampler = make_sampler(max_new_tokens=24, group_size=6, segment=10)
    out = run(sampler, params, *make_batch())
    ends = set()
    for tokens, mask, finished in zip(
        out.completions.reshape(-1, 24),
        out.completion_mask.reshape(-1, 24),
        out.finished.reshape(-1),
        strict=True,
    ):
        where = np.flatnonzero(np.isin(tokens, EOS))
        length = where[0] + 1 if where.size else 24
        assert finished == bool(where.size)
        assert mask.tolist() == [True] * length + [False] * (24 - length)  # EOS is counted
        assert (tokens[length:] == PAD).all() and where.size <= 1
        ends.add(int(tokens[where[0]]) if where.size else None)
    assert ends == {*EOS, None}
    assert (out.policy_logp[~out.completion_mask] == 0).all()
    assert (out.sample_logp[~out.completion_mask] == 0).all()
    sampled = out.completions[out.completion_mask]
    assert not np.isin(sampled, vision_token_ids(CFG)).any() and len(set(sampled)) > 30


@pytest.mark.parametrize(
    ("shape", "rows", "concurrent_rows"),
    [((1, 1, 1), 4, 3), ((2, 2, 2), 8, 1)],
    ids=["one device", "mesh"],
)
def test_samples_depend_on_no_neighbour_refill_or_mesh(plain, params, shape, rows, concurrent_rows):
    # One sample a prompt: blocks end and are refilled at different times while the ring goes round.
    lengths = plain[1].completion_mask[:, 0].sum(-1)
    assert lengths.tolist() == [3, 4, 8, 8, 8, 2, 4, 8]
    sampler = make_sampler(shape, group_size=1, concurrent_rows=concurrent_rows)
    first = jax.tree.map(lambda x: x[:, :1], plain[1])
    assert_same(run(sampler, params, *make_batch(), rows=rows), first)


def test_samples_depend_on_no_order_padding_group_size_or_budget(plain, params):
    batch, features = make_batch(prompt_budget=S + 4)
    order = np.array([5, 0, 3])
    chosen = jax.tree.map(lambda x: x[order], batch)
    sampler = make_sampler(group_size=2, max_new_tokens=6)
    out = run(sampler, params, chosen, features[order], KEYS[order])
    np.testing.assert_array_equal(
        np.where(out.completion_mask, out.completions, PAD),
        np.where(plain[1].completion_mask, plain[1].completions, PAD)[order, :2, :6],
    )


def recomputed_logits(params, batch, features, out: Rollout) -> np.ndarray:
    """[P, G, R, V] of the training pass over the finished completions, forbidden ids at -inf."""

    @jax.jit
    def logits(params, batch, features, completions, mask):
        model = bind(CFG, params)
        h = completion_hidden(model, batch, features, completions, mask)
        return sampling_logits.forbid(model.logits(h), vision_token_ids(CFG))

    return np.asarray(logits(params, batch, features, out.completions, out.completion_mask))


@pytest.mark.parametrize(
    ("rows", "change"),
    [
        (1, dict(temperature=0.7)),
        (4, dict(temperature=1.3, top_k=20, top_p=0.8, min_p=0.02, concurrent_rows=1)),
        (8, dict(temperature=0.0, concurrent_rows=2, segment=50)),
    ],
    ids=["whole distribution", "truncated and refilled", "greedy and refilled"],
)
def test_log_probs_equal_those_of_the_training_pass(params, rows, change):
    batch, features = make_batch()
    sampler = make_sampler(**change)
    kept = keep_schedules(sampler)
    out = run(sampler, params, batch, features, rows=rows)
    assert (kept[0].step > 8) == (rows > 1)  # the ring did turn
    logits = recomputed_logits(params, batch, features, out)
    temperature = change["temperature"]
    scaled = logits / (temperature or 1.0)
    at = out.completions[..., None]
    policy = np.log(np.take_along_axis(softmax(scaled), at, -1)[..., 0])
    mask = out.completion_mask
    np.testing.assert_allclose(out.policy_logp[mask], policy[mask], atol=1e-5)
    if temperature == 0:
        np.testing.assert_array_equal(out.completions[mask], logits.argmax(-1)[mask])
        assert (out.sample_logp == 0).all()
        assert (out.completions == out.completions[:, :1]).all()
        return
    truncation = [change.get(k, off) for k, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))]
    kept = np.stack([reference_truncation(r, *truncation) for r in scaled.reshape(-1, V)])
    sampled = softmax(np.where(kept.reshape(scaled.shape), scaled, -np.inf))
    sampled = np.take_along_axis(sampled, at, -1)[..., 0][mask]
    np.testing.assert_allclose(out.sample_logp[mask], np.log(sampled), atol=1e-5)
    assert (np.log(sampled) > policy[mask] + 1e-3).any() == ("top_p" in change)


def keep_schedules(sampler) -> list[Schedule]:
    """The schedules of the rollouts to come."""
    kept, make = [], sampler.schedule
    sampler.schedule = lambda *sizes: kept.append(make(*sizes)) or kept[-1]
    return kept


@pytest.mark.parametrize(
    ("shape", "rows", "change"),
    [((1, 1, 1), 1, dict(segment=2)), ((1, 2, 1), 4, dict(segment=1, concurrent_rows=1))],
    ids=["all at once", "refilled on two shards"],
)
def test_samples_depend_on_no_width_or_window(plain, params, monkeypatch, shape, rows, change):
    monkeypatch.setattr(schedule, "MIN_WINDOW", 2)
    monkeypatch.setattr(schedule, "MIN_WIDTH", 2)
    sampler = make_sampler(shape, **change)
    kept = keep_schedules(sampler)
    assert_same(run(sampler, params, *make_batch(), rows=rows), plain[1])
    sizes = {
        tuple(map(int, re.findall(r"\d+", name))) for name in sampler._late if "decode" in name
    }
    widths, windows = ({size[i] for size in sizes} for i in (0, 1))
    assert len(widths) > 1 and len(windows) > 1, sizes
    assert any("move" in name for name in sampler._late)
    lengths = plain[1].completion_mask.sum(-1)
    assert kept[0].live_steps == (lengths - 1).sum()
    assert sampler.idle_share == 1 - kept[0].live_steps / kept[0].slot_steps


def test_a_family_shares_its_leader_s_first_round_and_each_draws_its_own_from_there(plain, params):
    # Tags whole, both in one, and merged with a neighbour; refilled, so that slots are anybody's.
    pieces = [b"<answer>"] * 12 + [b"7</answer>"] * 12 + [b"<answer>7</answer><"] * 4 + [b"x"] * 12
    mesh = make_mesh(devices=jax.devices()[:1])
    config = SamplingConfig(**BASE | dict(group_size=4, forks=2, concurrent_rows=1))
    sampler = Sampler(CFG, config, mesh, pieces)
    batch, features = make_batch()
    out = run(sampler, params, batch, features, rows=4)
    leaders, alone = (jax.tree.map(lambda x: x[:, ::2], one) for one in (out, plain[1]))
    assert_same(leaders, alone)
    mask, cut = out.completion_mask, sampler.automaton.cuts(out.completions, out.completion_mask)
    shared = np.arange(8) < cut[..., None]
    for x in (out.completions, out.sample_logp, out.policy_logp, mask):
        np.testing.assert_array_equal((x * shared)[:, 1::2], (x * shared)[:, ::2])
    parted = (out.completions[:, 1::2] != out.completions[:, ::2]).any(-1)
    goes_on = (cut < mask.sum(-1)).reshape(P, 2, 2).any(-1)
    assert not parted[~goes_on].any() and parted.sum() > 4 and not goes_on.all()
    logits = recomputed_logits(params, batch, features, out)
    policy = np.log(np.take_along_axis(softmax(logits), out.completions[..., None], -1)[..., 0])
    np.testing.assert_allclose(out.policy_logp[mask], policy[mask], atol=1e-5)
    keys = sampling_logits.sample_keys(sampling_logits.base_key(6, 0), jnp.asarray(KEYS), 4)
    keys = jnp.where(shared[..., None], keys[:, [0, 0, 2, 2], None], keys[:, :, None])
    token = jnp.broadcast_to(jnp.arange(8), mask.shape)
    drawn, _ = jax.jit(sampling_logits.draw)(sampling_logits.token_keys(keys, token), logits)
    np.testing.assert_array_equal(np.asarray(drawn)[mask], out.completions[mask])


def test_first_tokens_follow_the_model_s_probabilities(plain, params):
    batch, features = make_batch()
    sampler = make_sampler(group_size=1500, max_new_tokens=1)
    out = run(sampler, params, batch, features)
    # With room for one token, it is the one that more room would begin with.
    for name in ("completions", "sample_logp", "policy_logp"):
        longer = getattr(plain[1], name)[..., 0]
        np.testing.assert_allclose(
            getattr(out, name)[:, : BASE["group_size"], 0], longer, atol=1e-5
        )
    assert out.completion_mask.all()
    np.testing.assert_array_equal(out.finished, np.isin(out.completions[..., 0], EOS))
    logits = recomputed_logits(params, batch, features, jax.tree.map(lambda x: x[:, :1], out))
    for p in range(P):
        assert_frequencies(out.completions[p, :, 0], softmax(logits[p, 0, 0]))


def test_samples_end_at_limits_of_their_own_and_are_the_same_until_then(params):
    sampler = make_sampler((1, 2, 1), eos_ids=(), concurrent_rows=1)
    limits = 1 + np.arange(P * 3).reshape(P, 3) % 8
    whole = run(sampler, params, *make_batch(), rows=8)
    assert whole.completion_mask.all() and not whole.finished.any()
    out = run(sampler, params, *make_batch(), rows=8, limits_PG=limits)
    np.testing.assert_array_equal(out.completion_mask.sum(-1), limits)
    mask = np.arange(8) < limits[..., None]
    np.testing.assert_array_equal(out.completions, np.where(mask, whole.completions, PAD))
    for name in ("sample_logp", "policy_logp"):
        kept = np.where(mask, getattr(whole, name), 0)
        np.testing.assert_allclose(getattr(out, name), kept, atol=1e-5)
    with pytest.raises(ValueError, match="limits: 1 to 9, not 1 to 8"):
        run(sampler, params, *make_batch(), rows=8, limits_PG=limits + (limits == 8))


def test_filler_prompts_get_empty_samples(plain, params):
    out = run(plain[0], params, *make_batch(fillers=2))
    assert not out.completion_mask[-2:].any() and (out.completions[-2:] == PAD).all()
    assert out.finished[-2:].all()
    assert_same(jax.tree.map(lambda x: x[:-2], out), plain[1], slice(0, P - 2))


def test_text_only_prompts_need_no_features(plain, params):
    batch, features = make_batch()
    batch = batch.replace(vision_src=np.full_like(batch.vision_src, -1))
    expected = run(plain[0], params, batch, features, seed=28)
    # Four rows for each of two shards, one at a time: one shard is refilled while the other is not.
    sampler = make_sampler((1, 2, 1), group_size=1, concurrent_rows=1)
    on_mesh = to_global(batch, sampler.mesh)
    out = sampler.generate(for_sampling(params), on_mesh, None, KEYS, seed=28, step=0, rows=8)
    assert expected.completion_mask[:, 0].sum(-1).tolist() == [8, 8, 8, 8, 3, 8, 2, 8]
    first = jax.tree.map(lambda x: x[:, :1], expected)
    assert_same(jax.tree.map(np.asarray, out), first)


def test_greedy_equals_hugging_face_generate(tmp_path):
    pytest.importorskip("torch")
    from srpo_jax.model import hf
    from srpo_jax.model.config import load_config
    from tests import hf_reference as reference

    torch_model = reference.make_model("untied", seed=3)
    cfg = load_config(reference.save_model(torch_model, tmp_path))
    params = hf.load_params(tmp_path, cfg, shardings=None)
    image, wide = reference.noise_image(84, 56), reference.noise_image(200, 30, seed=1)
    budget, width = 24, 48
    inputs = [
        reference.make_inputs([pieces], tokens=width, patches=256, seed=seed)
        for seed, pieces in enumerate([[9], [2, image, 5], [3, wide, 1, image, 2]])
    ]

    def generate(eos: list[int]) -> list[list[int]]:
        out = []
        for one in inputs:
            length = int(one.segments.sum())
            sized = ("input_ids", "attention_mask", "mm_token_type_ids")
            found = torch_model.generate(
                **{k: v[:, :length] if k in sized else v for k, v in one.torch.items()}
                | {"use_cache": True},
                do_sample=False,
                max_new_tokens=budget,
                eos_token_id=eos,
                pad_token_id=131,
                suppress_tokens=list(vision_token_ids(cfg)),
            )
            out.append(found[0, length:].tolist())
        return out

    eos = [130, generate([130])[1][10]]  # a token that one prompt does reach
    expected = generate(eos)
    lengths = np.array([one.segments.sum() for one in inputs], np.int32)
    batch = Batch(
        tokens=np.concatenate([one.tokens for one in inputs]),
        segment_ids=np.concatenate([one.segments for one in inputs]),
        mrope=np.concatenate([one.mrope for one in inputs]),
        vision_src=np.concatenate([one.vision_src for one in inputs]),
        lengths=lengths,
        next_pos=np.array([one.mrope.max() + 1 for one in inputs], np.int32),
        loss_mask=np.zeros((3, width), np.float32),
        valid=np.ones(3, bool),
    )
    vision = jax.tree.map(lambda *x: np.concatenate(x), *[one.vision for one in inputs])
    features = jax.jit(lambda p, v: bind(cfg, p).encode_images(v))(params, vision)
    sampling = SamplingConfig(
        max_new_tokens=budget,
        group_size=2,
        temperature=0.0,
        eos_ids=tuple(eos),
        pad_id=131,
        forbidden_ids=vision_token_ids(cfg),
        concurrent_rows=2,
        segment=7,
    )
    sampler = Sampler(cfg, sampling, make_mesh(devices=jax.devices()[:1]))
    out = sampler.generate(for_sampling(params), batch, features, KEYS[:3], seed=0, step=0)
    for p, tokens in enumerate(expected):
        for sample in (0, 1):
            mask = np.asarray(out.completion_mask[p, sample])
            assert np.asarray(out.completions[p, sample])[mask].tolist() == tokens
    assert len({len(tokens) for tokens in expected}) > 1  # one ended, one was cut off


def test_programs_lower_from_shapes_and_decode_moves_no_cache_weights_or_logits(params):
    sampler = make_sampler((2, 2, 2), concurrent_rows=2, top_p=0.9)
    abstract = abstract_params(CFG, "decoder")
    specs = param_specs(abstract, sampler.mesh, "sample")
    abstract = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=specs[k]) for k, v in abstract.items()
    }
    args = sampler.abstract_args(abstract, prompts=32, prompt_tokens=S, rows=16, merged_tokens=N4)
    assert set(args) == {"prefill", "decode_segment"}
    with jax.set_mesh(sampler.mesh):
        assert sampler.prefill.lower(*args["prefill"])
        decode = sampler.decode_segment(args["decode_segment"][2][0].done.shape[1], 8)
        compiled = decode.lower(*args["decode_segment"]).compile()
    # Both sample caches are updated in place: layers, slots, columns, kv heads, width, per device.
    cache_bytes = 2 * 4 * (2 * (2 * 2 * 3) * 8 * 1 * 8)
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes
    text = compiled.as_text()
    collective = r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)"
    sizes = [np.prod([int(n) for n in m.split(",") if n]) for m in re.findall(collective, text)]
    # At most the residual stream of a shard's 2 rows x 2 prompts x 3 samples.
    assert sizes and max(sizes) <= 4 * 3 * CFG.text.hidden_size


def test_caches_have_the_compute_type_and_are_split_over_devices():
    mesh = make_mesh(2, 2, 2)
    cfg = ModelConfig(**{**vars(CFG), "dtype": "bfloat16"})
    sampler = Sampler(cfg, SamplingConfig(**BASE), mesh)
    args = sampler.abstract_args({}, prompts=8, prompt_tokens=S, rows=4, merged_tokens=None)
    (caches, rings) = args["decode_segment"][1].caches, args["decode_segment"][2][0].rings
    assert len(caches) == len(rings) == CFG.text.num_hidden_layers
    for keys, values in (*caches, *rings):
        assert keys.dtype == values.dtype == jnp.bfloat16
    cache, ring = caches[0][0], rings[0][0]
    assert cache.sharding.shard_shape(cache.shape) == (1, 2, 1, S, 8)
    assert ring.sharding.shard_shape(ring.shape) == (1, 2 * 3, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eos_ids=(999,)), "999.*vocabulary of 48"),
        (dict(forbidden_ids=(40,)), r"forbidden_ids: \[40\] are EOS"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(concurrent_rows=-1), "concurrent_rows"),
    ],
)
def test_settings_that_make_no_sense_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(**change)


def test_rows_that_do_not_divide_are_named(params):
    batch, _ = make_batch()
    sampler = make_sampler((1, 2, 1))
    with pytest.raises(ValueError, match="8 prompts in 3 rows.* 2 data shards"):
        sampler.generate(params, batch, None, KEYS, seed=0, step=0, rows=3)
