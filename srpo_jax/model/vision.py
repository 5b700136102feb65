"""The vision tower over window-ordered, padded patches; see ``VisionInputs`` for the layout.

Windowed blocks attend inside each window of W slots by a reshape; full blocks attend per image
frame, over segments. Patches stay in window order from the first block to the merger.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.model.attention import attention
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.layers import (
    Linear,
    RMSNorm,
    Rope,
    SwiGLU,
    remat,
    rotate,
    shard,
    vision_rope,
)
from srpo_jax.model.masks import Mask
from srpo_jax.structs import VisionInputs


class VisionAttention(nnx.Module):
    """Joint query, key and value projection [D, 3, H, E] and output projection, with biases."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        vision = cfg.vision
        D, H, E = vision.hidden_size, vision.num_heads, vision.head_dim
        self.qkv = Linear((D,), (3, H, E), cfg, bias=True, rngs=rngs)
        self.proj = Linear((H, E), (D,), cfg, bias=True, rngs=rngs)


class VisionBlock(nnx.Module):
    """Pre-norm attention, windowed or per frame, and mlp with residuals."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        D, eps = cfg.vision.hidden_size, cfg.vision.rms_norm_eps
        self.norm1 = RMSNorm(D, eps, cfg)
        self.attn = VisionAttention(cfg, rngs=rngs)
        self.norm2 = RMSNorm(D, eps, cfg)
        self.mlp = SwiGLU(D, cfg.vision.intermediate_size, cfg, bias=True, rngs=rngs)

    def __call__(
        self, x_MND: jax.Array, rope: Rope, vision: VisionInputs[jax.Array], full: bool, impl: str
    ) -> jax.Array:
        """The patches' next hidden states; ``full``: attention per frame, else per window."""
        qkv = shard(self.attn.qkv(self.norm1(x_MND)), "batch", None, None, "tensor", None)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = rotate(q, *rope), rotate(k, *rope)  # float32, as in HF
        if full:
            frames = Mask(vision.frame_id, vision.frame_id, causal=False)
            out = attention(q, k, v, frames, impl)
        else:
            out = window_attention(q, k, v, vision)
        out = shard(out, "batch", None, "tensor", None)
        x = shard(x_MND + self.attn.proj(out), "batch", None, None)
        return shard(x + self.mlp(self.norm2(x)), "batch", None, None)


class PatchMerger(nnx.Module):
    """Joins each 2x2 of patches: norm, two layers with exact GELU -> [M, N/4, out_hidden]."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        width = cfg.vision.hidden_size * cfg.vision.merge_unit
        self.norm = RMSNorm(cfg.vision.hidden_size, cfg.vision.rms_norm_eps, cfg)
        self.fc1 = Linear((width,), (width,), cfg, bias=True, rngs=rngs)
        self.fc2 = Linear((width,), (cfg.vision.out_hidden_size,), cfg, bias=True, rngs=rngs)

    def __call__(self, x_MND: jax.Array) -> jax.Array:
        M, N, D = x_MND.shape
        width = self.fc1.kernel.shape[0]
        x = self.norm(x_MND).reshape(M, N * D // width, width)
        x = jax.nn.gelu(self.fc1(x), approximate=False)
        return self.fc2(shard(x, "batch", None, "tensor"))


class VisionModel(nnx.Module):
    """Patch embedding, stacked blocks, merger."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        vision = cfg.vision
        self.patch_embed = Linear(
            (vision.patch_dim,), (vision.hidden_size,), cfg, bias=False, rngs=rngs
        )
        keys = jax.random.split(rngs.params(), vision.depth)
        self.blocks = jax.vmap(lambda key: VisionBlock(cfg, rngs=nnx.Rngs(key)))(keys)
        self.merger = PatchMerger(cfg, rngs=rngs)
        self.cfg = cfg

    def __call__(
        self, vision: VisionInputs[jax.Array], keep_blocks: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """-> merged tokens in raster order [M, N/4, out_hidden], each block's output [L, M, N, D].

        The second is None unless ``keep_blocks``.
        """
        config = self.cfg.vision
        rope = vision_rope(vision.patch_hw, config.head_dim, config.rope_theta)
        x = shard(self.patch_embed(vision.patches), "batch", None, None)
        x, blocks_LMND = self._run_blocks(x, rope, vision, keep_blocks)
        merged = shard(self.merger(x), "batch", None, None)  # whole rows: the gather stays local
        raster = jax.vmap(lambda row, source: row[source])(merged, vision.merge_src)
        return shard(raster, "batch", None, None), blocks_LMND

    def _run_blocks(
        self, x_MND: jax.Array, rope: Rope, vision: VisionInputs[jax.Array], keep: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Scans over the shortest repeating group of windowed and full blocks."""
        pattern = full_block_pattern(self.cfg.vision.depth, self.cfg.vision.fullatt_block_indexes)
        size, policy = len(pattern), self.cfg.remat
        single = size == self.cfg.vision.depth
        groups = jax.tree.map(lambda p: p.reshape(-1, size, *p.shape[1:]), self.blocks)

        def run_group(x: jax.Array, group: VisionBlock) -> tuple[jax.Array, jax.Array | None]:
            outputs, start = [], 0
            for full, run in itertools.groupby(pattern):
                stop = start + len(list(run))
                blocks = jax.tree.map(lambda p, a=start, b=stop: p[a:b], group)

                def run_block(x: jax.Array, block: VisionBlock, full: bool = full):
                    x = block(x, rope, vision, full, self.cfg.attention)
                    return x, x if keep else None

                # A pattern that never repeats is one group: recompute it block by block instead.
                x, out = jax.lax.scan(remat(run_block, policy if single else "none"), x, blocks)
                outputs.append(out)
                start = stop
            return x, jnp.concatenate(outputs) if keep else None

        body = run_group if single else remat(run_group, policy)
        x, blocks = jax.lax.scan(body, x_MND, groups)
        return x, None if blocks is None else blocks.reshape(-1, *x_MND.shape)


def window_attention(
    q_MNHE: jax.Array, k_MNHE: jax.Array, v_MNHE: jax.Array, vision: VisionInputs[jax.Array]
) -> jax.Array:
    """Attention inside each window: [M, N, ...] -> [M * N/W, W, ...]; padding sees only padding.

    Always plain dense attention: W is 64, below the block of any fused kernel.
    """
    M, windows, W = vision.window_valid.shape
    segments = vision.window_valid.reshape(M * windows, W).astype(jnp.int32)
    q, k, v = (x.reshape(M * windows, W, *x.shape[2:]) for x in (q_MNHE, k_MNHE, v_MNHE))
    return attention(q, k, v, Mask(segments, segments, causal=False), "xla").reshape(q_MNHE.shape)


def full_block_pattern(depth: int, full_indexes: tuple[int, ...]) -> tuple[bool, ...]:
    """The shortest pattern of full (True) and windowed blocks whose repetition gives all blocks."""
    full = tuple(i in full_indexes for i in range(depth))
    return next(full[:n] for n in range(1, depth + 1) if full == full[:n] * (depth // n))
