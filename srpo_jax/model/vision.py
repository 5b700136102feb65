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
from srpo_jax.model.layers import Linear, RMSNorm, SwiGLU, remat, rotate, shard, vision_rope
from srpo_jax.structs import VisionInputs


class VisionAttention(nnx.Module):
    """Joint query, key and value projection [D, 3, H, E] and output projection, with biases."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        vision, linear = cfg.vision, _linear_args(cfg)
        D, H, E = vision.hidden_size, vision.num_heads, vision.head_dim
        self.qkv = Linear((D,), (3, H, E), bias=True, rngs=rngs, **linear)
        self.proj = Linear((H, E), (D,), bias=True, rngs=rngs, **linear)


class VisionBlock(nnx.Module):
    """Pre-norm attention, windowed or per frame, and mlp with residuals."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        D = cfg.vision.hidden_size
        self.norm1 = _norm(cfg)
        self.attn = VisionAttention(cfg, rngs=rngs)
        self.norm2 = _norm(cfg)
        self.mlp = SwiGLU(
            D, cfg.vision.intermediate_size, bias=True, rngs=rngs, **_linear_args(cfg)
        )

    def __call__(self, x_MND, rope, vision: VisionInputs, full: bool, impl: str) -> jax.Array:
        qkv = shard(self.attn.qkv(self.norm1(x_MND)), "batch", None, None, "tensor", None)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = rotate(q, *rope), rotate(k, *rope)  # float32, as in HF
        if full:
            out = frame_attention(q, k, v, vision, impl)
        else:
            out = window_attention(q, k, v, vision)
        out = shard(out, "batch", None, "tensor", None)
        x = shard(x_MND + self.attn.proj(out), "batch", None, None)
        return shard(x + self.mlp(self.norm2(x)), "batch", None, None)


class PatchMerger(nnx.Module):
    """Joins each 2x2 of patches: norm, two layers with exact GELU -> [M, N/4, out_hidden]."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        width = cfg.vision.hidden_size * cfg.vision.merge_unit
        self.norm = _norm(cfg)
        self.fc1 = Linear((width,), (width,), bias=True, rngs=rngs, **_linear_args(cfg))
        self.fc2 = Linear(
            (width,), (cfg.vision.out_hidden_size,), bias=True, rngs=rngs, **_linear_args(cfg)
        )

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
            (vision.patch_dim,), (vision.hidden_size,), bias=False, rngs=rngs, **_linear_args(cfg)
        )
        keys = jax.random.split(rngs.params(), vision.depth)
        self.blocks = jax.vmap(lambda key: VisionBlock(cfg, rngs=nnx.Rngs(key)))(keys)
        self.merger = PatchMerger(cfg, rngs=rngs)
        self.cfg = cfg

    def __call__(
        self, vision: VisionInputs, keep_blocks: bool = False
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
        self, x_MND, rope, vision: VisionInputs, keep: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Scans over the shortest repeating group of windowed and full blocks."""
        pattern = full_block_pattern(self.cfg.vision.depth, self.cfg.vision.fullatt_block_indexes)
        size, policy = len(pattern), self.cfg.remat
        single = size == self.cfg.vision.depth
        groups = jax.tree.map(lambda p: p.reshape(-1, size, *p.shape[1:]), self.blocks)

        def run_group(x, group):
            outputs, start = [], 0
            for full, run in itertools.groupby(pattern):
                stop = start + len(list(run))
                blocks = jax.tree.map(lambda p, a=start, b=stop: p[a:b], group)

                def run_block(x, block, full=full):
                    x = block(x, rope, vision, full, self.cfg.attention)
                    return x, x if keep else None

                # A pattern that never repeats is one group: recompute it block by block instead.
                x, out = jax.lax.scan(remat(run_block, policy if single else "none"), x, blocks)
                outputs.append(out)
                start = stop
            return x, jnp.concatenate(outputs) if keep else None

        body = run_group if single else remat(run_group, policy)
        x, blocks = jax.lax.scan(body, x_MND, groups)
        return x, blocks.reshape(-1, *x_MND.shape) if keep else None


def window_attention(q_MNHE, k_MNHE, v_MNHE, vision: VisionInputs) -> jax.Array:
    """Attention inside each window: [M, N, ...] -> [M * N/W, W, ...]; padding sees only padding.

    Always plain dense attention: W is 64, below the block of any fused kernel.
    """
    M, windows, W = vision.window_valid.shape
    segments = vision.window_valid.reshape(M * windows, W).astype(jnp.int32)
    q, k, v = (x.reshape(M * windows, W, *x.shape[2:]) for x in (q_MNHE, k_MNHE, v_MNHE))
    out = attention(
        q, k, v, q_segments_BT=segments, kv_segments_BS=segments, causal=False, impl="xla"
    )
    return out.reshape(q_MNHE.shape)


def frame_attention(q_MNHE, k_MNHE, v_MNHE, vision: VisionInputs, impl: str) -> jax.Array:
    """Attention inside each image frame of the row."""
    frames = vision.frame_id
    return attention(
        q_MNHE,
        k_MNHE,
        v_MNHE,
        q_segments_BT=frames,
        kv_segments_BS=frames,
        causal=False,
        impl=impl,
    )


def full_block_pattern(depth: int, full_indexes: tuple[int, ...]) -> tuple[bool, ...]:
    """The shortest pattern of full (True) and windowed blocks whose repetition gives all blocks."""
    full = tuple(i in full_indexes for i in range(depth))
    for size in range(1, depth + 1):
        if depth % size == 0 and full == full[:size] * (depth // size):
            return full[:size]
    return full


def _norm(cfg: ModelConfig) -> RMSNorm:
    vision = cfg.vision
    return RMSNorm(
        vision.hidden_size, eps=vision.rms_norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype
    )


def _linear_args(cfg: ModelConfig) -> dict:
    return dict(std=cfg.text.initializer_range, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
