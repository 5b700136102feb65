"""The model against Hugging Face's: numbers, hidden states, gradients, positions; and bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install -r requirements-test.txt")

import hf_reference as ref  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: E402

from srpo_jax.data.vision_arrays import VisionIds, mrope_positions  # noqa: E402
from srpo_jax.model import hf, sharding  # noqa: E402
from srpo_jax.model.config import load_config  # noqa: E402
from srpo_jax.model.layers import rotate, vision_rope  # noqa: E402
from srpo_jax.model.masks import Mask  # noqa: E402
from srpo_jax.model.qwen2_5_vl import bind  # noqa: E402

BOUND = 1e-4
TOKENS, PATCHES = 192, 1280  # budgets that hold every case, so that each model compiles once

CASES = {
    "text only": [[50], [21]],
    "one image": [[7, ref.noise_image(200, 140), 20], [30]],
    "several images": [
        [3, ref.noise_image(28, 28), 2, ref.noise_image(250, 130), 11],
        [ref.noise_image(84, 56), 5, ref.noise_image(112, 112), ref.noise_image(60, 300), 9],
    ],
    "aspect 100 to 1": [[4, ref.noise_image(1000, 10), 6], [2, ref.noise_image(14, 1400), 8]],
    "video": [
        [5, ref.Video((3, 4, 6)), 4, ref.noise_image(90, 60), 3],
        [2, ref.Video((2, 10, 6), seconds=1.5), 1, ref.Video((4, 2, 2), seconds=0.3), 6],
    ],
}


@pytest.fixture(scope="module", params=list(ref.CONFIGS))
def loaded(request, tmp_path_factory):
    """(torch model, our config, our parameters, our forward): odd head counts, shared key heads."""
    model = ref.make_model(request.param)
    folder = ref.save_model(model, tmp_path_factory.mktemp("hf") / request.param)
    cfg = load_config(folder, attention="xla")
    return model, cfg, hf.load_params(folder, cfg), make_forward(cfg)


def make_forward(cfg):
    """-> jitted: parameters, text and images -> logits, after every layer, after every block."""

    def forward(params, text, vision):
        ours = bind(cfg, params)
        features, blocks = ours.vision(vision, keep_blocks=True)
        tokens, mrope, segments, vision_src = text
        x = ours.embed(tokens, vision_src, features)
        x, layers = ours.text.run(x, mrope, Mask(segments, segments), lambda x, k, v: x)
        return ours.logits(ours.text.norm(x)), layers, blocks

    return jax.jit(forward)


def text_of(inputs):
    return inputs.tokens, inputs.mrope, inputs.segments, inputs.vision_src


def difference(ours, theirs):
    """Largest absolute difference; the numbers compared must be large enough to mean something."""
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.1
    return np.abs(np.asarray(ours) - theirs).max()


def rms(x):
    """Root mean square."""
    return np.sqrt(np.mean(np.square(x)))


def log_probs(logits, tokens):
    """[B, T-1] log-probability of each next token."""
    logp = torch.log_softmax(torch.tensor(np.asarray(logits)), dim=-1)
    return torch.gather(logp[:, :-1], 2, torch.tensor(tokens[:, 1:, None]).long())[..., 0].numpy()


@pytest.mark.parametrize("case", list(CASES))
def test_logits_and_log_probs_equal_hf(loaded, case):
    model, _, params, forward = loaded
    inputs = ref.make_inputs(CASES[case], tokens=TOKENS, patches=PATCHES)
    theirs = ref.run_reference(model, inputs)
    logits, _, _ = forward(params, text_of(inputs), inputs.vision)
    real = inputs.segments > 0
    assert difference(np.asarray(logits)[real], theirs.logits[real]) <= BOUND
    both = real[:, 1:] & real[:, :-1]
    ours_logp = log_probs(logits, inputs.tokens)[both]
    assert difference(ours_logp, log_probs(theirs.logits, inputs.tokens)[both]) <= BOUND


@pytest.mark.parametrize("case", list(CASES))
def test_hidden_states_equal_hf_after_every_block_and_layer(loaded, case):
    model, _, params, forward = loaded
    inputs = ref.make_inputs(CASES[case], tokens=TOKENS, patches=PATCHES)
    theirs = ref.run_reference(model, inputs)
    _, layers, blocks = (np.asarray(x) for x in forward(params, text_of(inputs), inputs.vision))
    found = {}
    filled = inputs.vision.frame_id >= 0
    for kind, states in theirs.blocks.items():
        chosen = np.zeros_like(filled)
        for m, is_image in enumerate(inputs.image_slots):
            chosen[m, : len(is_image)] = is_image == (kind == "image")
        for i, state in enumerate(states):
            found[f"vision block {i} ({kind})"] = difference(blocks[i][chosen & filled], state)
    real = inputs.segments > 0
    for i, state in enumerate(theirs.layers):
        found[f"decoder layer {i}"] = difference(layers[i][real], state[real])
    assert len(theirs.layers) == len(layers)
    assert len(found) == len(layers) + len(blocks) * len(theirs.blocks)
    first = next((f"{name}: {value:.3g}" for name, value in found.items() if value > BOUND), None)
    assert first is None, f"first state that differs from HF by more than {BOUND} is after {first}"


def test_all_sequences_in_one_row_give_the_same(loaded):
    model, _, params, forward = loaded
    inputs = ref.make_inputs(CASES["several images"], tokens=TOKENS, patches=2560, rows=1)
    assert inputs.vision.patches.shape[0] == 1
    theirs = ref.run_reference(model, inputs)
    logits, _, _ = forward(params, text_of(inputs), inputs.vision)
    real = inputs.segments > 0
    assert difference(np.asarray(logits)[real], theirs.logits[real]) <= BOUND


def test_sharded_over_eight_devices_gives_the_same(loaded, tmp_path):
    model, cfg, params, _ = loaded
    mesh = sharding.make_mesh(2, 2, 2)
    specs = sharding.param_specs(params, mesh)
    placed = jax.tree.map(jax.device_put, params, specs)
    inputs = ref.make_inputs(CASES["one image"] * 2, tokens=80, patches=256)
    theirs = ref.run_reference(model, inputs)

    @jax.jit
    def forward(params, text, vision):
        ours = bind(cfg, params)
        return ours.logits(ours.hidden(*text, ours.encode_images(vision)))

    with jax.set_mesh(mesh):
        text, vision = sharding.to_global((text_of(inputs), inputs.vision), mesh)
        logits = forward(placed, text, vision)
    real = inputs.segments > 0
    assert difference(np.asarray(logits)[real], theirs.logits[real]) <= BOUND


def test_gradients_equal_torch_autograd(loaded, tmp_path):
    """Of a scalar loss over every token, with respect to every parameter, through the table."""
    model, cfg, params, _ = loaded
    case = [*CASES["several images"][:1], [5, ref.Video((2, 4, 6)), ref.noise_image(56, 84), 12]]
    inputs = ref.make_inputs(case, tokens=96, patches=768)
    real = inputs.segments > 0
    weights = np.random.default_rng(5).uniform(-1, 1, inputs.tokens[:, 1:].shape)
    weights = (weights * (real[:, 1:] & real[:, :-1])).astype(np.float32)

    model.zero_grad()
    logp = torch.log_softmax(model(**inputs.torch).logits[:, :-1], dim=-1)
    chosen = torch.gather(logp, 2, inputs.torch["input_ids"][:, 1:, None])[..., 0]
    (chosen * torch.tensor(weights)).sum().backward()
    grads = {name: p.grad.contiguous() for name, p in model.named_parameters()}
    save_file(grads, tmp_path / "model.safetensors")
    theirs = hf.load_params(tmp_path, cfg)

    @jax.jit
    @jax.grad
    def ours(params):
        net = bind(cfg, params)
        h = net.hidden(*text_of(inputs), net.encode_images(inputs.vision))
        logp = jax.nn.log_softmax(net.logits(h)[:, :-1])
        chosen = jnp.take_along_axis(logp, inputs.tokens[:, 1:, None], axis=2)[..., 0]
        return jnp.sum(chosen * weights)

    found = ours(params)
    assert found.keys() == theirs.keys()
    worst = {}
    for path in theirs:
        want, have = np.asarray(theirs[path]), np.asarray(found[path])
        assert np.abs(want).max() > 1e-3, f"{path}: nothing to compare"
        worst[path] = np.abs(have - want).max() / np.abs(want).max()
    path = max(worst, key=worst.get)
    assert worst[path] <= 1e-3, f"{path}: relative difference {worst[path]:.3g}"


@pytest.fixture(scope="module")
def halved(loaded, tmp_path_factory):
    """The same in bfloat16, read from the same files: (torch model, config, parameters, forward).

    Not ``model.bfloat16()``: that would halve the rotary frequencies too, which loading does not.
    """
    model, cfg = loaded[:2]
    folder = ref.save_model(model, tmp_path_factory.mktemp("hf"))
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    cfg = dataclasses.replace(cfg, dtype="bfloat16", param_dtype="bfloat16")
    return half, cfg, hf.load_params(folder, cfg, dtype="bfloat16"), make_forward(cfg)


@pytest.mark.parametrize("loaded", ["untied"], indirect=True)
@pytest.mark.parametrize("case", ["text only", "several images"])
def test_bfloat16_errs_as_hf_does_in_bfloat16(loaded, halved, case):
    """Rounding cannot be told from a fault entry by entry, but its size is known from HF itself.

    ``own`` is how far HF in bfloat16 is from HF in float32. We may be as far from float32, and,
    two independent roundings, sqrt(2) as far from HF in bfloat16; 15 % on top for chance (seen: 3 %
    more than ``own``, and less than it).
    """
    half, _, params, forward = halved
    inputs = ref.make_inputs(CASES[case], tokens=TOKENS, patches=PATCHES)
    exact, theirs = ref.run_reference(loaded[0], inputs), ref.run_reference(half, inputs)
    logits, layers, _ = forward(params, text_of(inputs), inputs.vision)
    real = inputs.segments > 0
    states = {"logits": (logits, theirs.logits, exact.logits)}
    for i, state in enumerate(zip(layers, theirs.layers, exact.layers, strict=True)):
        states[f"layer {i}"] = state
    for name, state in states.items():
        ours, rounded, true = (np.asarray(x, np.float32)[real] for x in state)
        own = rms(rounded - true)
        assert 1e-3 < own / rms(true) < 0.1, name
        assert rms(ours - true) <= 1.15 * own, name
        assert rms(ours - rounded) <= 1.15 * np.sqrt(2) * own, name


def in_jax(x):
    """A bfloat16 tensor, the same bits."""
    return jnp.asarray(x.float().numpy(), "bfloat16")


def moved(ours, theirs):
    """The share of entries that are not the same number."""
    return float(jnp.mean(ours != in_jax(theirs)))


@pytest.mark.parametrize("loaded", ["untied"], indirect=True)
def test_bfloat16_positions_turn_queries_to_hfs_bits(halved):
    """Tables in the dtype that HF casts them to: bfloat16 in the decoder, float32 in the tower."""
    half, cfg, params, _ = halved
    inputs = ref.make_inputs(CASES["several images"], tokens=TOKENS, patches=PATCHES)
    text = half.config.text_config
    x = torch.randn(2, TOKENS, text.num_attention_heads, cfg.text.head_dim).bfloat16()
    tables = half.model.language_model.rotary_emb(x, torch.tensor(inputs.mrope).permute(1, 0, 2))
    wanted, _ = modeling_qwen2_5_vl.apply_rotary_pos_emb(x, x, *tables, unsqueeze_dim=2)
    rope = bind(cfg, params).text.rope(jnp.asarray(inputs.mrope))
    assert {table.dtype for table in rope} == {jnp.dtype("bfloat16")}
    # A cosine that is an ulp off may round the other way; tables left in float32 move 5 % of all.
    assert moved(rotate(in_jax(x), *rope), wanted) < 1e-3

    rows_columns = np.stack(np.divmod(np.arange(TOKENS, dtype=np.int32), 12), axis=-1)
    x = torch.randn(TOKENS, cfg.vision.num_heads, cfg.vision.head_dim).bfloat16()
    tables = half.model.visual.rotary_pos_emb(x, torch.tensor(rows_columns))
    wanted, _ = modeling_qwen2_5_vl.apply_rotary_pos_emb_vision(x, x, *tables)
    rope = vision_rope(jnp.asarray(rows_columns), cfg.vision.head_dim, cfg.vision.rope_theta)
    assert moved(rotate(in_jax(x), *rope), wanted) < 1e-3


def test_transformers_loads_what_we_write_and_we_read_both_its_layouts(loaded, tmp_path):
    model, cfg, params, _ = loaded
    ref.save_model(model, tmp_path / "in")
    hf.save_hf(params, cfg, tmp_path / "out", tmp_path / "in", max_shard_bytes=100_000)
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted, found = model.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    model.save_pretrained(tmp_path / "nested", save_original_format=False)
    with safe_open(tmp_path / "nested" / "model.safetensors", framework="np") as file:
        assert "model.language_model.norm.weight" in file.keys()
    nested = hf.load_params(tmp_path / "nested", cfg)
    assert all(np.array_equal(nested[path], params[path]) for path in params)


def test_positions_equal_get_rope_index(loaded):
    """Random sequences of words, images and videos, batched with padding."""
    model = loaded[0]
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids, images, videos, seconds = [], [], [], []
        for _ in range(rng.integers(1, 6)):
            ids += rng.integers(0, ref.TEXT_IDS, rng.integers(1, 9)).tolist()
            kind = rng.integers(0, 3)
            if kind == 0:
                continue
            frames = 1 if kind == 1 else int(rng.integers(1, 5))
            grid = (frames, *(2 * rng.integers(1, 30, 2)).tolist())
            pad = ref.IMAGE if kind == 1 else ref.VIDEO
            ids += [ref.START, *[pad] * (int(np.prod(grid)) // 4), ref.END]
            (images if kind == 1 else videos).append(grid)
            if kind == 2:
                seconds.append(float(np.float32(rng.choice([0.3, 0.5, 1.0, 1.7]))))
        if not images and not videos:
            continue
        found, after = mrope_positions(
            ids,
            VisionIds(
                ref.IMAGE,
                ref.VIDEO,
                tokens_per_second=model.config.vision_config.tokens_per_second,
            ),
            images,
            videos,
            seconds,
        )
        ids_T = torch.tensor([ids])
        wanted, delta = model.model.get_rope_index(
            ids_T,
            ((ids_T == ref.IMAGE) * 1 + (ids_T == ref.VIDEO) * 2).int(),
            image_grid_thw=torch.tensor(images) if images else None,
            video_grid_thw=torch.tensor(videos) if videos else None,
            second_per_grid_ts=torch.tensor(seconds) if seconds else None,
        )
        assert np.array_equal(found, wanted[:, 0].numpy())
        # HF continues at (number of tokens + delta) on all three axes.
        assert after == len(ids) + int(delta[0, 0])


@pytest.mark.parametrize(
    "size", [(28, 28), (300, 200), (1000, 10), (10, 1000), (1, 199), (999, 640)]
)
def test_an_image_takes_as_many_tokens_as_hf_gives_features(loaded, size):
    model = loaded[0]
    inputs = ref.make_inputs([[3, ref.noise_image(*size), 2]], tokens=1024, patches=5120)
    with torch.no_grad():
        features = model.model.get_image_features(
            inputs.torch["pixel_values"], inputs.torch["image_grid_thw"], return_dict=True
        ).pooler_output
    assert (inputs.tokens == ref.IMAGE).sum() == len(features[0]) == (inputs.vision_src >= 0).sum()
