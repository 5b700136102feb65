"""A small Qwen2.5-VL with drawn parameters, and batches for it, shared by the model's tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.data.vision_arrays import (
    VisionGeometry,
    VisionIds,
    mrope_positions,
    stack_rows,
    vision_arrays,
)
from srpo_jax.model.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.model.qwen2_5_vl import abstract_params, bind
from srpo_jax.structs import Batch

# Sizes that nothing divides by accident: 3 vision heads, 5 query heads on 1 key/value head.
CFG = ModelConfig(
    vision=VisionConfig(
        depth=4,
        hidden_size=24,
        intermediate_size=20,
        num_heads=3,
        out_hidden_size=40,
        patch_size=2,
        window_size=8,
        fullatt_block_indexes=(1, 3),
        tokens_per_second=2,
    ),
    text=TextConfig(
        vocab_size=120,
        hidden_size=40,
        intermediate_size=36,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=1,
        mrope_section=(1, 1, 2),
        rms_norm_eps=1e-6,
    ),
    image_token_id=110,
    video_token_id=111,
)
GEOMETRY = VisionGeometry(patch_size=2, window_size=8)  # windows of 4 x 4 patches
W = CFG.vision.window_slots


@functools.cache
def random_params(cfg, seed=0):
    """Parameters in which every bias and scale matters, drawn by numpy (jax compiles for long)."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, leaf in abstract_params(cfg).items():
        kind = path.rsplit("/", 1)[1]
        spread = {"kernel": 0.15, "bias": 0.3, "scale": 0.3, "embedding": 1.0}[kind]
        values = (kind == "scale") + spread * rng.standard_normal(leaf.shape)
        params[path] = jnp.asarray(values, leaf.dtype)
    return params


def replace(cfg, vision=None, text=None, **top):
    """``cfg`` with changed fields of its halves and of its top."""
    return dataclasses.replace(
        cfg,
        vision=dataclasses.replace(cfg.vision, **(vision or {})),
        text=dataclasses.replace(cfg.text, **(text or {})),
        **top,
    )


def make_images(seed, *grids):
    """VisionArrays of random pixels for the grids (frames, rows, columns) of one sequence."""
    pixels = np.random.default_rng(seed).standard_normal(
        (sum(t * h * w for t, h, w in grids), CFG.vision.patch_dim)
    )
    return vision_arrays(pixels.astype(np.float32), grids, GEOMETRY)


def make_rows(*rows, patches):
    """VisionInputs on device; each row is a list of VisionArrays."""
    return jax.tree.map(jnp.asarray, stack_rows(rows, patches, GEOMETRY))


@dataclasses.dataclass
class Sample:
    """One sequence: tokens with image placeholders, its positions and its images."""

    ids: np.ndarray
    mrope: np.ndarray
    next_pos: int
    images: object | None


def make_sample(seed, length, *grids):
    """``length`` random text tokens around the placeholders of the images, which come second."""
    ids = np.random.default_rng(seed + 100).integers(0, 100, length).tolist()
    for t, h, w in reversed(grids):
        ids[1:1] = [CFG.image_token_id] * (t * h * w // 4) + [1]
    known = VisionIds(CFG.image_token_id, CFG.video_token_id)
    mrope, next_pos = mrope_positions(ids, known, grids)
    return Sample(np.array(ids), mrope, next_pos, make_images(seed, *grids) if grids else None)


def make_batch(samples, length, per_row=1, patches=2 * W):
    """Samples right-padded to ``length`` with padding that would show if it were ever seen."""
    B = len(samples)
    batch = Batch(
        tokens=np.full((B, length), 99, np.int32),
        segment_ids=np.zeros((B, length), np.int32),
        mrope=np.full((B, 3, length), 7, np.int32),
        vision_src=np.full((B, length), -1, np.int32),
        lengths=np.array([len(s.ids) for s in samples], np.int32),
        next_pos=np.array([s.next_pos for s in samples], np.int32),
        loss_mask=np.zeros((B, length), np.float32),
        valid=np.ones(B, bool),
    )
    rows = [[] for _ in range(B // per_row)]
    for b, s in enumerate(samples):
        n, row = len(s.ids), rows[b // per_row]
        batch.tokens[b, :n], batch.segment_ids[b, :n], batch.mrope[b, :, :n] = s.ids, 1, s.mrope
        is_image = s.ids == CFG.image_token_id
        offset = sum(a.num_merged for a in row)
        batch.vision_src[b, :n] = np.where(is_image, offset + np.cumsum(is_image) - 1, -1)
        if s.images is not None:
            row.append(s.images)
    return jax.tree.map(jnp.asarray, batch.replace(vision=stack_rows(rows, patches, GEOMETRY)))


@functools.partial(jax.jit, static_argnums=0)
def encode(cfg, params, vision):
    """Images -> features in raster order."""
    return bind(cfg, params).encode_images(vision)


@functools.partial(jax.jit, static_argnums=0)
def text_hidden(cfg, params, batch, features=None):
    """Whole sequences -> hidden states."""
    args = (batch.tokens, batch.mrope, batch.segment_ids, batch.vision_src, features)
    return bind(cfg, params).hidden(*args)


def forward(cfg, params, batch):
    """Images and whole sequences -> hidden states."""
    return text_hidden(cfg, params, batch, encode(cfg, params, batch.vision))


def completion_hidden(model, batch, features, completions, mask):
    """[P, G, R, D] whose state j predicts completion token j: every sample with a prompt of its own
    through the whole model, padded to the budgets."""
    (P, S), (_, G, R) = batch.tokens.shape, completions.shape
    each = lambda x: jnp.repeat(jnp.asarray(x), G, axis=0)  # noqa: E731
    own = jnp.asarray(completions).reshape(P * G, R)
    positions = each(batch.next_pos)[:, None] + jnp.arange(R)[None]
    mrope = jnp.broadcast_to(positions[:, None], (P * G, 3, R))
    segments = jnp.where(jnp.asarray(mask).reshape(P * G, R), 1, -1)
    h_BTD = model.hidden(
        jnp.concatenate([each(batch.tokens), own], 1),
        jnp.concatenate([each(batch.mrope), mrope], 2),
        jnp.concatenate([each(batch.segment_ids), segments], 1),
        jnp.concatenate([each(batch.vision_src), jnp.full_like(own, -1)], 1),
        features,
    )
    last = each(batch.lengths)[:, None, None] - 1
    last = jnp.take_along_axis(h_BTD, last, axis=1)
    return jnp.concatenate([last, h_BTD[:, S:-1]], axis=1).reshape(P, G, R, -1)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)


def assert_same_gradients(loss, params, remat):
    """With recomputation as without, and there is recomputation."""
    jaxpr = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, remat))
    assert "remat" in jaxpr or "checkpoint" in jaxpr
    grads, plain = (jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in (remat, "none"))
    for path in params:
        close(grads[path], plain[path], 1e-5 * (1 + np.abs(plain[path]).max()))
