"""The decoder: grouped-query attention, SwiGLU and multimodal rotary positions.

Training stacks the layers on a leading axis and scans them; sampling loops over layers whose arrays
are their own. Each layer has one way to make queries, keys and values and one way to finish; the
passes (whole sequences, rows packed with prompts and completions, prompts with their cache, one
decode step) differ only in what the queries attend to.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.model.attention import Sight, attention, decode_attention, lane_attention
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.layers import (
    Embed,
    Linear,
    RMSNorm,
    Rope,
    SwiGLU,
    remat,
    rotate,
    shard,
    text_mrope,
)
from srpo_jax.model.masks import LaneMask, Mask

Cache = tuple[jax.Array, jax.Array]  # keys and values of one layer
Kept = TypeVar("Kept")


class Attention(nnx.Module):
    """Projections of one layer's attention; q, k and v have biases, o has none."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        text = cfg.text
        D, E = text.hidden_size, text.head_dim
        H, K = text.num_attention_heads, text.num_key_value_heads
        self.q = Linear((D,), (H, E), cfg, bias=True, rngs=rngs)
        self.k = Linear((D,), (K, E), cfg, bias=True, rngs=rngs)
        self.v = Linear((D,), (K, E), cfg, bias=True, rngs=rngs)
        self.o = Linear((H, E), (D,), cfg, bias=False, rngs=rngs)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and mlp with residuals."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        D, eps = cfg.text.hidden_size, cfg.text.rms_norm_eps
        self.input_norm = RMSNorm(D, eps, cfg)
        self.attn = Attention(cfg, rngs=rngs)
        self.post_norm = RMSNorm(D, eps, cfg)
        self.mlp = SwiGLU(D, cfg.text.intermediate_size, cfg, bias=False, rngs=rngs)

    def qkv(self, x_BTD: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, H, E] and keys [B, T, K, E], and values [B, T, K, E]."""
        x = self.input_norm(x_BTD)
        q, k, v = (
            shard(proj(x), "batch", None, "tensor", None)
            for proj in (self.attn.q, self.attn.k, self.attn.v)
        )
        return rotate(q, *rope), rotate(k, *rope), v

    def finish(self, x_BTD: jax.Array, out_BTHE: jax.Array) -> jax.Array:
        """Adds the attention's output and the mlp to the residual stream."""
        x = x_BTD + self.attn.o(shard(out_BTHE, "batch", None, "tensor", None))
        x = shard(x, "batch", None, None)
        return shard(x + self.mlp(self.post_norm(x)), "batch", None, None)


class TextModel(nnx.Module):
    """Embedding, decoder layers, final norm and, unless tied, the output head.

    ``layers`` are stacked for training; ``stacked`` False makes them a list, for sampling.
    """

    def __init__(self, cfg: ModelConfig, *, stacked: bool, rngs: nnx.Rngs):
        text = cfg.text
        self.embed = Embed(cfg, rngs=rngs)
        keys = jax.random.split(rngs.params(), text.num_hidden_layers)
        make = lambda key: DecoderLayer(cfg, rngs=nnx.Rngs(key))  # noqa: E731
        self.layers: Any = (
            jax.vmap(make)(keys) if stacked else nnx.List([make(key) for key in keys])
        )
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(
                (text.hidden_size,), (text.vocab_size,), cfg, bias=False, rngs=rngs
            )
        self.cfg = cfg

    def rope(self, mrope_B3T: jax.Array) -> Rope:
        """Cosine and sine of the positions."""
        text = self.cfg.text
        return text_mrope(
            mrope_B3T, text.head_dim, text.rope_theta, text.mrope_section, self.cfg.dtype
        )

    def run(
        self,
        x_BTD: jax.Array,
        mrope_B3T: jax.Array,
        mask: Mask | LaneMask,
        keep: Callable[[jax.Array, jax.Array, jax.Array], Kept],
    ) -> tuple[jax.Array, Kept]:
        """All layers -> (residual stream [B, T, D], what ``keep`` returned).

        A layer's matrices meet all tokens at once, so that they are collected once for a pass.
        ``keep(x_BTD, k_BTKE, v_BTKE)`` sees each layer's result and its keys and values; what it
        returns is stacked on a leading axis L.
        """
        rope, impl = self.rope(mrope_B3T), self.cfg.attention

        def body(x: jax.Array, layer: DecoderLayer) -> tuple[jax.Array, Kept]:
            q, k, v = layer.qkv(x, rope)
            if isinstance(mask, LaneMask):
                out = lane_attention(q, k, v, mask, impl)
            else:
                out = attention(q, k, v, mask, impl)
            x = layer.finish(x, out)
            return x, keep(x, k, v)

        return jax.lax.scan(remat(body, self.cfg.remat), x_BTD, self.layers)

    def run_prefill(
        self, x_PSD: jax.Array, mrope_P3S: jax.Array, segment_ids_PS: jax.Array
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Prompts, in the layout "sample" -> (residual stream, each layer's cache [P, K, S, E])."""
        rope = self.rope(mrope_P3S)
        mask = Mask(segment_ids_PS, segment_ids_PS, single=True)
        x, caches = x_PSD, []
        for layer in self.layers:
            q, k, v = layer.qkv(x, rope)
            x = layer.finish(x, attention(q, k, v, mask, self.cfg.attention))
            caches.append((k.swapaxes(1, 2), v.swapaxes(1, 2)))
        return x, tuple(caches)

    def run_decode(
        self,
        x_ZJD: jax.Array,
        positions_ZJ: jax.Array,
        prompt_caches: tuple[Cache, ...],
        rings: tuple[Cache, ...],
        column: jax.Array,
        sight: Sight,
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """One token of each slot, in the layout "sample" -> (residual stream, the rings with it
        written at ``column``).

        A loop over layers whose weights and caches are arrays of their own: slices of stacked
        arrays would be copied before every product.
        """
        Z, J, _ = x_ZJD.shape
        rope = self.rope(jnp.broadcast_to(positions_ZJ[:, None, :], (Z, 3, J)))

        def write(ring_ZJKRE: jax.Array, new_ZJKE: jax.Array) -> jax.Array:
            new = new_ZJKE[:, :, :, None].astype(ring_ZJKRE.dtype)
            return jax.lax.dynamic_update_slice(ring_ZJKRE, new, (0, 0, 0, column, 0))

        x, written = x_ZJD, []
        for layer, prompt_kv, (keys, values) in zip(self.layers, prompt_caches, rings, strict=True):
            q, k, v = layer.qkv(x, rope)
            ring = (write(keys, k), write(values, v))
            x = layer.finish(x, decode_attention(q, prompt_kv, ring, sight))
            written.append(ring)
        return x, tuple(written)
