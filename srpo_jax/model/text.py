"""The decoder: grouped-query attention, SwiGLU and multimodal rotary positions.

Layers are stacked on a leading axis and scanned. Each layer has one way to make queries, keys and
values and one way to finish; the passes (whole sequences, prompts with their cache, rows packed
with prompts and completions, one decode step) differ only in what the queries attend to.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.model.attention import (
    LaneMask,
    Mask,
    attention,
    decode_attention,
    lane_attention,
)
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

Cache = tuple[jax.Array, jax.Array]  # keys and values with the layers leading
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
    """Embedding, stacked decoder layers, final norm and, unless tied, the output head."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        text = cfg.text
        self.embed = Embed(cfg, rngs=rngs)
        keys = jax.random.split(rngs.params(), text.num_hidden_layers)
        self.layers = jax.vmap(lambda key: DecoderLayer(cfg, rngs=nnx.Rngs(key)))(keys)
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

    def run_decode(
        self,
        x_PGD: jax.Array,
        positions_PG: jax.Array,
        prompt_cache: Cache,
        prompt_visible_PS: jax.Array,
        sample_cache: Cache,
        column: jax.Array,
        own_visible_PGR: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """One token of each sample -> (residual stream [P, G, D], sample cache with it written)."""
        P, G, _ = x_PGD.shape
        rope = self.rope(jnp.broadcast_to(positions_PG[:, None, :], (P, 3, G)))

        def body(carry: tuple[jax.Array, Cache], xs: tuple[DecoderLayer, jax.Array, Cache]):
            # The sample cache rides in the carry: XLA then updates one column in place, while a
            # scanned-over cache would be copied layer by layer.
            x, cache = carry
            layer, index, prompt_kv = xs
            q, k, v = layer.qkv(x, rope)

            def write(ring: jax.Array, new: jax.Array) -> jax.Array:
                new = new[None, :, :, :, None].astype(ring.dtype)
                return jax.lax.dynamic_update_slice(ring, new, (index, 0, 0, 0, column, 0))

            def read(ring: jax.Array) -> jax.Array:
                return jax.lax.dynamic_index_in_dim(ring, index, keepdims=False)

            cache = (write(cache[0], k), write(cache[1], v))
            own_kv = (read(cache[0]), read(cache[1]))
            out = decode_attention(q, prompt_kv, own_kv, prompt_visible_PS, own_visible_PGR)
            return (layer.finish(x, out), cache), None

        xs = (self.layers, jnp.arange(self.cfg.text.num_hidden_layers), prompt_cache)
        (x, cache), _ = jax.lax.scan(body, (x_PGD, sample_cache), xs)
        return x, cache
