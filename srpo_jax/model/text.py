"""The decoder: grouped-query attention, SwiGLU and multimodal rotary positions.

Layers are stacked on a leading axis and scanned. Each layer has one way to make queries, keys and
values and one way to finish; the four passes (full, prompt with cache, shared prompt and
completions, one decode step) differ only in what the queries attend to.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.model.attention import attention, decode_attention
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.layers import Embed, Linear, RMSNorm, SwiGLU, remat, rotate, shard, text_mrope

Rope = tuple[jax.Array, jax.Array]  # cosine and sine, [B, T, E]
Cache = tuple[jax.Array, jax.Array]  # keys and values with the layers leading


class Attention(nnx.Module):
    """Projections of one layer's attention; q, k and v have biases, o has none."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        text, linear = cfg.text, _linear_args(cfg)
        D, E = text.hidden_size, text.head_dim
        H, K = text.num_attention_heads, text.num_key_value_heads
        self.q = Linear((D,), (H, E), bias=True, rngs=rngs, **linear)
        self.k = Linear((D,), (K, E), bias=True, rngs=rngs, **linear)
        self.v = Linear((D,), (K, E), bias=True, rngs=rngs, **linear)
        self.o = Linear((H, E), (D,), bias=False, rngs=rngs, **linear)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and mlp with residuals."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        text = cfg.text
        norm = dict(eps=text.rms_norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        self.input_norm = RMSNorm(text.hidden_size, **norm)
        self.attn = Attention(cfg, rngs=rngs)
        self.post_norm = RMSNorm(text.hidden_size, **norm)
        self.mlp = SwiGLU(
            text.hidden_size, text.intermediate_size, bias=False, rngs=rngs, **_linear_args(cfg)
        )

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
        text, linear = cfg.text, _linear_args(cfg)
        self.embed = Embed(text.vocab_size, text.hidden_size, rngs=rngs, **linear)
        keys = jax.random.split(rngs.params(), text.num_hidden_layers)
        self.layers = jax.vmap(lambda key: DecoderLayer(cfg, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(
            text.hidden_size, eps=text.rms_norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype
        )
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(
                (text.hidden_size,), (text.vocab_size,), bias=False, rngs=rngs, **linear
            )
        self.cfg = cfg

    def rope(self, mrope_B3T: jax.Array) -> Rope:
        """Cosine and sine of the positions."""
        text = self.cfg.text
        return text_mrope(
            mrope_B3T, text.head_dim, text.rope_theta, text.mrope_section, self.cfg.dtype
        )

    def run(
        self, x_BTD: jax.Array, mrope_B3T: jax.Array, segment_ids_BT: jax.Array, keep: str = ""
    ) -> tuple[jax.Array, Cache | jax.Array | None]:
        """All layers over whole sequences -> (residual stream [B, T, D], what ``keep`` asks for).

        ``keep``: "" nothing, "cache" keys and values [L, B, K, T, E], "layers" the residual stream
        after each layer [L, B, T, D].
        """
        rope = self.rope(mrope_B3T)

        def body(x, layer):
            q, k, v = layer.qkv(x, rope)
            x = layer.finish(x, self._attend(q, k, v, segment_ids_BT, segment_ids_BT))
            return x, {"": None, "cache": (k.swapaxes(1, 2), v.swapaxes(1, 2)), "layers": x}[keep]

        return jax.lax.scan(remat(body, self.cfg.remat), x_BTD, self.layers)

    def run_shared_prompt(
        self,
        prompt: tuple[jax.Array, jax.Array, jax.Array],
        completion: tuple[jax.Array, jax.Array, jax.Array],
        group: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Prompts once and their completions -> residual streams ([P, S, D], [P*G, R, D]).

        Both arguments are (embeddings, mrope, segment ids); a completion sees the prompt tokens of
        its own segment and, causally, itself.
        """
        x_PSD, mrope_P3S, prompt_segments_PS = prompt
        y_BRD, mrope_B3R, own_segments_BR = completion
        prompt_rope, own_rope = self.rope(mrope_P3S), self.rope(mrope_B3R)
        S = x_PSD.shape[1]
        segments = jnp.concatenate([_repeat(prompt_segments_PS, group), own_segments_BR], axis=1)

        def body(carry, layer):
            x, y = carry
            q, k, v = layer.qkv(x, prompt_rope)
            x = layer.finish(x, self._attend(q, k, v, prompt_segments_PS, prompt_segments_PS))
            q, own_k, own_v = layer.qkv(y, own_rope)
            k, v = (
                jnp.concatenate([_repeat(shared, group), own], axis=1)
                for shared, own in ((k, own_k), (v, own_v))
            )
            y = layer.finish(y, self._attend(q, k, v, own_segments_BR, segments, q_offset=S))
            return (x, y), None

        streams, _ = jax.lax.scan(remat(body, self.cfg.remat), (x_PSD, y_BRD), self.layers)
        return streams

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

        def body(carry, xs):
            # The sample cache rides in the carry: XLA then updates one column in place, while a
            # scanned-over cache would be copied layer by layer.
            x, cache = carry
            layer, index, *prompt_kv = xs
            q, k, v = layer.qkv(x, rope)
            start = (index, 0, 0, 0, column, 0)
            cache = tuple(
                jax.lax.dynamic_update_slice(c, new[None, :, :, :, None].astype(c.dtype), start)
                for c, new in zip(cache, (k, v), strict=True)
            )
            own_kv = tuple(jax.lax.dynamic_index_in_dim(c, index, keepdims=False) for c in cache)
            out = decode_attention(q, prompt_kv, own_kv, prompt_visible_PS, own_visible_PGR)
            return (layer.finish(x, out), cache), None

        xs = (self.layers, jnp.arange(self.cfg.text.num_hidden_layers), *prompt_cache)
        (x, cache), _ = jax.lax.scan(body, (x_PGD, tuple(sample_cache)), xs)
        return x, cache

    def _attend(self, q, k, v, q_segments, kv_segments, q_offset: int = 0) -> jax.Array:
        return attention(
            q,
            k,
            v,
            q_segments_BT=q_segments,
            kv_segments_BS=kv_segments,
            causal=True,
            q_offset=q_offset,
            impl=self.cfg.attention,
        )


def _repeat(x: jax.Array, group: int) -> jax.Array:
    """[P, ...] -> [P*G, ...]: each prompt's entry once per sample, prompt-major."""
    x = jnp.broadcast_to(x[:, None], (x.shape[0], group, *x.shape[1:]))
    return x.reshape(-1, *x.shape[2:])


def _linear_args(cfg: ModelConfig) -> dict:
    return dict(std=cfg.text.initializer_range, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
