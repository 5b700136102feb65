"""Qwen2.5-VL: parameters as a flat dict, and the passes that training and sampling make.

Parameters live outside, flat: ``{"text/layers/attn/q/kernel": array}``, layers stacked on a leading
axis. Sampling takes the part "decoder", which has an array for every layer:
``{"text/layers/3/attn/q/kernel": array}``, see ``for_sampling``. ``bind`` makes a module of them;
it is cheap and meant to be called inside ``jax.jit``.
"""

import functools
import re
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.model.attention import Sight
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.layers import shard
from srpo_jax.model.text import Cache, TextModel
from srpo_jax.model.vision import VisionModel
from srpo_jax.structs import Batch, Params, VisionInputs

PROMPT_SEGMENT = 1  # a prompt is always the single segment 1, its padding 0
LAYERS = "text/layers/"
Part = Literal["all", "decoder", "tower"]
COMPLETION_PADDING = -1  # apart from the prompt's padding, so that neither sees the other


class Qwen2_5_VL(nnx.Module):
    """Vision tower and decoder, or one of them (``Part``). Make one with ``bind``."""

    def __init__(self, cfg: ModelConfig, part: Part = "all", *, rngs: nnx.Rngs):
        if part != "decoder":
            self.vision = VisionModel(cfg, rngs=rngs)
        if part != "tower":
            self.text = TextModel(cfg, stacked=part == "all", rngs=rngs)
        self.cfg = cfg

    def encode_images(self, vision: VisionInputs[jax.Array]) -> jax.Array:
        """Images of M rows -> features [M, N/4, D], merged tokens in raster order.

        Slots of padding hold finite values without meaning.
        """
        features_MND, _ = self.vision(vision)
        return features_MND

    def hidden(
        self,
        tokens_BT: jax.Array,
        mrope_B3T: jax.Array,
        segment_ids_BT: jax.Array,
        vision_src_BT: jax.Array | None = None,
        features_MND: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states [B, T, D], norm applied; ``h[:, t]`` predicts token t + 1.

        Tokens attend causally by index inside their segment. ``features_MND`` None: text only.
        """
        x = self.embed(tokens_BT, vision_src_BT, features_MND, divided=True)
        x, _ = self.text.run(x, mrope_B3T, segment_ids_BT, lambda x, k, v: None)
        return self.text.norm(x)

    def prefill(
        self,
        tokens_PS: jax.Array,
        mrope_P3S: jax.Array,
        segment_ids_PS: jax.Array,
        vision_src_PS: jax.Array | None = None,
        features_MND: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Of the part "decoder" -> (hidden state [P, D] at each prompt's last token, each layer's
        keys and values [P, K, S, E])."""
        x = self.embed(tokens_PS, vision_src_PS, features_MND)
        x, caches = self.text.run_prefill(x, mrope_P3S, segment_ids_PS)
        return self.text.norm(_last_token(x, segment_ids_PS)), caches

    def completion_hidden(
        self,
        batch: Batch[jax.Array],
        features_MND: jax.Array | None,
        completions_PGR: jax.Array,
        completion_mask_PGR: jax.Array,
    ) -> jax.Array:
        """Hidden states [P, G, R, D] where ``h[..., j, :]`` predicts ``completions[..., j]``.

        ``batch`` holds the P prompts. Each layer runs a prompt once and lets its G completions
        attend to it: exact, at (S + G R) instead of G (S + R) tokens. Completion token j stands at
        position ``next_pos + j`` on all three axes.
        """
        P, G, R = completions_PGR.shape
        prompt = self.embed(batch.tokens, batch.vision_src, features_MND, divided=True)
        completions_BR = completions_PGR.reshape(P * G, R)
        segments = jnp.where(completion_mask_PGR, PROMPT_SEGMENT, COMPLETION_PADDING)
        positions_PR = batch.next_pos[:, None] + jnp.arange(R, dtype=jnp.int32)[None]
        mrope = jnp.broadcast_to(positions_PR[:, None, None, :], (P, G, 3, R))
        own = self.embed(completions_BR, divided=True)
        x_PSD, y_BRD = self.text.run_shared_prompt(
            (prompt, batch.mrope, batch.segment_ids),
            (own, mrope.reshape(P * G, 3, R), segments.reshape(P * G, R)),
            G,
        )
        D = x_PSD.shape[-1]
        last_PGD = jnp.broadcast_to(_last_token(x_PSD, batch.segment_ids)[:, None], (P, G, D))
        y_PGRD = y_BRD.reshape(P, G, R, D)
        # The prompt's last token predicts completion 0, completion j - 1 predicts j.
        h_PGRD = jnp.concatenate([last_PGD[:, :, None], y_PGRD[:, :, :-1]], axis=2)
        return self.text.norm(shard(h_PGRD, "batch", None, None, None))

    def decode(
        self,
        tokens_ZJ: jax.Array,
        positions_ZJ: jax.Array,
        prompt_caches: tuple[Cache, ...],
        rings: tuple[Cache, ...],
        column: jax.Array,
        sight: Sight,
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Of the part "decoder": one step of every slot -> (hidden states [Z, J, D], rings with it
        written).

        ``prompt_caches`` are [Z, C, K, S, E] of each layer, ``rings`` [Z, J, K, R, E], of which the
        first W <= R columns are read (those of ``sight``). The token is written at ``column``, the
        same for all samples. Keys are rotated before they are stored, so the order of columns means
        nothing.
        """
        x, rings = self.text.run_decode(
            self.embed(tokens_ZJ), positions_ZJ, prompt_caches, rings, column, sight
        )
        return self.text.norm(x), rings

    def embed(
        self,
        tokens_BT: jax.Array,
        vision_src_BT: jax.Array | None = None,
        features_MND: jax.Array | None = None,
        divided: bool = False,
    ) -> jax.Array:
        """Token embeddings [B, T, D], image tokens replaced by their row's features.

        ``divided``: the embedding table lies as in training (see `layers.Embed`).
        """
        x_BTD = shard(self.text.embed(tokens_BT, divided), "batch", None, None)
        if features_MND is not None:
            if vision_src_BT is None:
                raise ValueError("features_MND without vision_src_BT: their places are not known")
            x_BTD = _place_features(x_BTD, vision_src_BT, features_MND)
        return shard(x_BTD, "batch", None, None)

    def logits(self, h_D: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., V]."""
        head = self.head_kernel().astype(self.cfg.dtype)
        return jnp.einsum("...d,dv->...v", h_D, head, preferred_element_type=jnp.float32)

    def head_kernel(self) -> jax.Array:
        """The output projection [D, V]; the transposed embedding when tied."""
        if self.cfg.tie_word_embeddings:
            return self.text.embed.embedding[...].T
        return self.text.lm_head.kernel[...]


def abstract_params(cfg: ModelConfig, part: Part = "all") -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every parameter, without making any."""
    _, paths, state = _structure(cfg, part)
    return dict(zip(paths, jax.tree.leaves(state), strict=True))


def for_sampling(params: Params) -> Params:
    """All parameters to those of "decoder": an array for every layer. These stay as they are."""
    out = {}
    for path, x in params.items():
        if re.match(rf"{LAYERS}\D", path):
            name = path.removeprefix(LAYERS)
            out |= {f"{LAYERS}{i}/{name}": x[i] for i in range(x.shape[0])}
        elif path.startswith("text/"):
            out[path] = x
    return out


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Random parameters as HF draws them: normal(0.02), zero biases, unit norms. Jittable."""
    _, paths, _ = _structure(cfg, "all")
    _, state = nnx.split(Qwen2_5_VL(cfg, rngs=nnx.Rngs(key)))
    return dict(zip(paths, jax.tree.leaves(state), strict=True))


def bind(cfg: ModelConfig, params: Params, part: Part = "all") -> Qwen2_5_VL:
    """The model over ``params``. Raises ValueError naming missing and superfluous paths."""
    graphdef, paths, state = _structure(cfg, part)
    if set(paths) != set(params):
        missing, extra = sorted(set(paths) - set(params)), sorted(set(params) - set(paths))
        raise ValueError(
            f"parameters do not fit the model: {len(missing)} missing {missing[:6]}, "
            f"{len(extra)} superfluous {extra[:6]}"
        )
    leaves = [params[path] for path in paths]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))


@functools.cache
def _structure(cfg: ModelConfig, part: Part) -> tuple[nnx.GraphDef, tuple[str, ...], nnx.State]:
    """Graph definition, parameter paths in the state's own order, abstract state."""
    graphdef, state = jax.eval_shape(lambda: nnx.split(Qwen2_5_VL(cfg, part, rngs=nnx.Rngs(0))))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    return graphdef, tuple(_path_name(path) for path in paths), state


def _path_name(path: tuple) -> str:
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    return "/".join(name for name in names if name != "value")


def _place_features(
    x_BTD: jax.Array, vision_src_BT: jax.Array, features_MND: jax.Array
) -> jax.Array:
    """Gathers row by row: sequences lie row after row, and ``vision_src`` counts inside a row."""
    B, T, D = x_BTD.shape
    M = features_MND.shape[0]
    if B % M:
        raise ValueError(f"{B} sequences cannot lie in {M} rows of images: {M} must divide {B}")
    source_MX = vision_src_BT.reshape(M, B // M * T)
    gathered = jax.vmap(lambda row, source: row[source])(features_MND, jnp.maximum(source_MX, 0))
    gathered = gathered.reshape(B, T, D).astype(x_BTD.dtype)
    return jnp.where((vision_src_BT >= 0)[..., None], gathered, x_BTD)


def _last_token(x_BTD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """[B, D] at the last token that is not padding (padding stands on the right)."""
    last_B = jnp.maximum(jnp.sum(segment_ids_BT != 0, axis=1) - 1, 0)
    return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
