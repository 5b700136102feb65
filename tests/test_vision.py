"""The vision tower against itself: frames apart, windows by reshape, scans, rotary positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    CFG,
    W,
    assert_same_gradients,
    close,
    encode,
    make_images,
    make_rows,
    random_params,
    replace,
)

from srpo_jax.model.attention import attention
from srpo_jax.model.layers import vision_rope
from srpo_jax.model.masks import Mask
from srpo_jax.model.qwen2_5_vl import bind
from srpo_jax.model.vision import full_block_pattern, window_attention


def test_pixels_of_other_frames_and_padding_never_change_a_frame():
    arrays = make_images(2, (1, 4, 6), (2, 6, 2))  # an image, a video of two frames
    vision = make_rows([arrays], [], patches=6 * W)
    before = encode(CFG, random_params(CFG), vision)
    compiled = encode._cache_size()
    noise = jax.random.normal(jax.random.key(1), vision.patches.shape)
    frames = np.asarray(vision.frame_id)
    frame_of_token = frames.reshape(2, -1, 4)[..., 0][0][np.asarray(vision.merge_src[0])]
    frame_of_token = frame_of_token[: arrays.num_merged]
    assert sorted(set(frame_of_token.tolist())) == [0, 1, 2]
    for frame in (-1, 0, 1, 2):
        patches = jnp.where((frames == frame)[..., None], noise, vision.patches)
        after = encode(CFG, random_params(CFG), vision.replace(patches=patches))
        changed = np.any(np.asarray(before != after), axis=-1)[0, : arrays.num_merged]
        np.testing.assert_array_equal(changed, frame_of_token == frame)
    assert encode._cache_size() == compiled, "other content must not compile anew"


def test_fully_padded_windows_give_finite_values_and_gradients():
    vision = make_rows([make_images(3, (1, 2, 2))], patches=3 * W)

    def loss(params):
        features = bind(CFG, params).encode_images(vision)
        return jnp.sum(features[:, :1]), features

    grads, features = jax.jit(jax.grad(loss, has_aux=True))(random_params(CFG))
    assert np.isfinite(features).all()
    assert all(np.isfinite(g).all() for g in grads.values())


def test_windows_by_reshape_equal_a_dense_window_mask():
    vision = make_rows(
        [make_images(12, (1, 6, 10), (1, 2, 2))], [make_images(13, (1, 4, 4))], patches=8 * W
    )
    q, k, v = jax.random.normal(jax.random.key(3), (3, 2, 8 * W, 3, 8))
    window_id = jnp.broadcast_to(jnp.arange(8 * W)[None] // W, (2, 8 * W))
    valid = vision.window_valid.reshape(2, 8 * W)
    segments = jnp.where(valid, window_id, -1)

    def by_reshape(q, k, v):
        out = jnp.where(valid[..., None, None], window_attention(q, k, v, vision), 0)
        return jnp.sum(jnp.sin(out)), out

    def by_mask(q, k, v):
        out = attention(q, k, v, Mask(segments, segments, causal=False), "xla")
        out = jnp.where(valid[..., None, None], out, 0)
        return jnp.sum(jnp.sin(out)), out

    grads = functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    results = [jax.jit(grads(f))(q, k, v) for f in (by_reshape, by_mask)]
    for ours, dense in zip(*map(jax.tree.leaves, results), strict=True):
        close(ours, dense, 2e-6)


def test_pattern_of_full_blocks_is_the_shortest_that_repeats():
    assert full_block_pattern(32, (7, 15, 23, 31)) == (False,) * 7 + (True,)
    assert full_block_pattern(4, (1, 3)) == (False, True)
    assert full_block_pattern(4, (0, 1, 3)) == (True, True, False, True)
    assert full_block_pattern(3, ()) == (False,)
    assert full_block_pattern(3, (0, 1, 2)) == (True,)


@pytest.mark.parametrize("full", [(1, 3), (0, 1, 3), ()])
def test_scanned_blocks_equal_a_loop_over_blocks(full):
    cfg = replace(CFG, vision=dict(fullatt_block_indexes=full))
    vision = make_rows([make_images(14, (1, 6, 10))], patches=7 * W)
    model = bind(cfg, random_params(cfg))
    _, blocks = jax.jit(lambda v: model.vision(v, keep_blocks=True))(vision)

    @jax.jit
    def loop(vision):
        rope = vision_rope(vision.patch_hw, cfg.vision.head_dim, cfg.vision.rope_theta)
        x, outputs = model.vision.patch_embed(vision.patches), []
        for i in range(cfg.vision.depth):
            block = jax.tree.map(lambda p, i=i: p[i], model.vision.blocks)
            x = block(x, rope, vision, i in full, "xla")
            outputs.append(x)
        return jnp.stack(outputs)

    assert blocks.shape == (4, 1, 7 * W, 24)
    close(blocks, loop(vision), 5e-6)


@pytest.mark.parametrize("full", [(1, 3), (0, 3)])
def test_recomputing_vision_groups_and_single_blocks_keeps_gradients(full):
    """Groups where the pattern repeats, single blocks where it does not."""
    cfg = replace(CFG, vision=dict(fullatt_block_indexes=full))
    vision = make_rows([make_images(14, (1, 4, 6))], patches=2 * W)
    params = {k: v for k, v in random_params(cfg).items() if k.startswith("vision/")}

    def loss(tower, policy):
        policy = dataclasses.replace(cfg, remat=policy)
        return jnp.sum(encode(policy, random_params(cfg) | tower, vision)[:, :6] ** 2)

    assert_same_gradients(loss, params, "block")


def test_vision_rope_turns_rows_then_columns():
    """Head width 8, theta 16: frequencies 1, 1/4 for rows and again for columns."""
    cos, sin = vision_rope(jnp.asarray([[3, 8]]), 8, 16.0)
    angles = np.array([3, 3 / 4, 8, 8 / 4] * 2)
    close(cos[0], np.cos(angles), 1e-6)
    close(sin[0], np.sin(angles), 1e-6)
