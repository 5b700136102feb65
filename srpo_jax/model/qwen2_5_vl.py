"""Qwen2.5-VL: parameters as a flat dict, and the passes that training and sampling make.

Parameters live outside, flat: ``{"text/layers/attn/q/kernel": array}``, layers stacked on a leading
axis. Sampling takes the part "decoder", which has an array for every layer:
``{"text/layers/3/attn/q/kernel": array}``, see ``for_sampling``. ``bind`` makes a module of them;
it is cheap and meant to be called inside ``jax.jit``.
"""

import fnmatch
import functools
import math
import re
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.model.attention import Sight
from srpo_jax.model.config import Lora, ModelConfig
from srpo_jax.model.layers import Linear, shard, take_in_rows
from srpo_jax.model.lora import LORA_A, LORA_B, in_8_bits, scale_of
from srpo_jax.model.masks import LaneMask, Mask
from srpo_jax.model.text import Cache, TextModel
from srpo_jax.model.vision import VisionModel
from srpo_jax.structs import Batch, Lanes, Params, VisionInputs

PROMPT_SEGMENT = 1  # a prompt is always the single segment 1, its padding 0
LAYERS = "text/layers/"
STACKS = (LAYERS, "vision/blocks/")  # whose arrays have a leading axis of layers
ADAPTABLE = re.compile("text/layers/|vision/blocks/|vision/merger/")
Part = Literal["all", "decoder", "tower"]


class Qwen2_5_VL(nnx.Module):
    """Vision tower and decoder, or one of them (``Part``). Make one with ``bind``."""

    def __init__(self, cfg: ModelConfig, part: Part = "all", *, rngs: nnx.Rngs):
        if part != "decoder":
            self.vision = VisionModel(cfg, rngs=rngs)
        if part != "tower":
            self.text = TextModel(cfg, stacked=part == "all", rngs=rngs)
        self.cfg = cfg
        if cfg.lora and part == "all":
            self._adapt(cfg.lora)

    def _adapt(self, lora: Lora) -> None:
        """Gives adapters to the linear layers that ``lora.targets`` name; ValueError for others."""
        layers = {
            "/".join(map(str, path)): layer
            for path, layer in nnx.iter_modules(self)
            if isinstance(layer, Linear)
        }
        layers = {name: layers[name] for name in sorted(layers) if ADAPTABLE.match(name)}
        for pattern in lora.targets:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
                raise ValueError(
                    f"lora.targets: {pattern!r} matches no layer; there are {', '.join(layers)}"
                )
        for name, layer in layers.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in lora.targets):
                layer.adapt(lora, stacked=name.startswith(STACKS))
            if lora.base_dtype and name.startswith(LAYERS):
                layer.shorten(stacked=True)

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
        single: bool = False,
    ) -> jax.Array:
        """Final hidden states [B, T, D], norm applied; ``h[:, t]`` predicts token t + 1.

        Tokens attend causally by index inside their segment. ``features_MND`` None: text only.
        ``single``: a sequence is one segment with its padding behind it, which is cheaper on GPUs.
        """
        x = self.embed(tokens_BT, vision_src_BT, features_MND, divided=True)
        mask = Mask(segment_ids_BT, segment_ids_BT, single=single)
        x, _ = self.text.run(x, mrope_B3T, mask, lambda x, k, v: None)
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

    def lane_stream(
        self,
        batch: Batch[jax.Array],
        features_MND: jax.Array | None,
        completions_PGR: jax.Array,
        lanes: Lanes[jax.Array],
    ) -> jax.Array:
        """Prompts and completions of one micro-batch, packed -> residual stream [X, Y, D].

        ``batch`` holds the P prompts of the M rows that take part. Exact, at a cost that follows
        the tokens. Completion token j stands at position ``next_pos + j`` on all three axes;
        ``predicting_slots`` tells where its prediction is, which ``text.norm`` completes.
        """
        (P, S), (_, G, R), M = batch.tokens.shape, completions_PGR.shape, lanes.row.shape[0]
        X, U = lanes.prompt.shape
        sample_XT, at_XT = (x.reshape(X, -1) for x in (lanes.sample, lanes.sample_at))
        in_prompts, in_samples = lanes.prompt * S + lanes.prompt_at, sample_XT * R + at_XT
        tokens_XY = jnp.concatenate(
            [
                take_in_rows(batch.tokens.reshape(-1), in_prompts, M),
                take_in_rows(completions_PGR.reshape(-1), in_samples, M),
            ],
            axis=1,
        )
        mrope_XU3 = take_in_rows(batch.mrope.swapaxes(1, 2).reshape(P * S, 3), in_prompts, M)
        positions_XT = take_in_rows(batch.next_pos, sample_XT // G, M) + at_XT
        own_XT3 = jnp.broadcast_to(positions_XT[..., None], (*positions_XT.shape, 3))
        mrope_X3Y = jnp.concatenate([mrope_XU3, own_XT3], axis=1).swapaxes(1, 2)
        x_XYD = self.embed(tokens_XY, divided=True)
        if features_MND is not None:
            source_XU = take_in_rows(batch.vision_src.reshape(-1), in_prompts, M)
            source_XU = jnp.where(lanes.prompt >= 0, source_XU, -1)
            region_XUD = _place_features(x_XYD[:, :U], source_XU, features_MND)
            x_XYD = jnp.concatenate([region_XUD, x_XYD[:, U:]], axis=1)
        single = P // M == X // M  # a row has as many blocks as prompts
        own = lanes.sample if lanes.run is None else lanes.run
        mask = LaneMask(lanes.prompt, own, lanes.sample // G, single, lanes.trunk)
        x_XYD = shard(x_XYD, "batch", None, None)
        return self.text.run(x_XYD, mrope_X3Y, mask, lambda x, k, v: None)[0]

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
    _, paths, _ = _structure(cfg.base, "all")
    _, state = nnx.split(Qwen2_5_VL(cfg.base, rngs=nnx.Rngs(key)))
    params = dict(zip(paths, jax.tree.leaves(state), strict=True))
    return shortened(params, cfg) | init_adapters(cfg, key)


def shortened(params: Params, cfg: ModelConfig) -> Params:
    """Weights, all or some, as they stand beside the adapters of ``cfg``: those in 8 bits that it
    holds so. Jittable."""
    shapes, out = abstract_params(cfg), dict(params)
    for path, x in params.items():
        for beside, leaf in scale_of(path, shapes).items():
            out[path], out[beside] = in_8_bits(path, x, len(leaf.shape))
    return out


def init_adapters(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh adapters, which change nothing: A as PEFT draws it, uniform within 1 / sqrt(inputs)
    (Kaiming with a = sqrt(5)), B zero. {} where ``cfg`` has none. Jittable."""
    params = {}
    for path, leaf in abstract_params(cfg).items():
        if path.endswith(f"/{LORA_A}"):
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            bound = math.prod(leaf.shape[path.startswith(STACKS) : -1]) ** -0.5
            params[path] = jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)
        elif path.endswith(f"/{LORA_B}"):
            params[path] = jnp.zeros(leaf.shape, leaf.dtype)
    return params


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


def predicting_slots(lanes: Lanes[jax.Array], prompts_per_row: int, group: int) -> jax.Array:
    """[X, C * T] slots of the block's stream whose states predict the tokens of its lanes.

    The prompt's last token predicts completion token 0, token j - 1 predicts j. A first round that
    stands once has its last token predict several.
    """
    (X, U), (_, C, T) = lanes.prompt.shape, lanes.sample.shape
    is_prompt_XPU = lanes.prompt[:, None] == jnp.arange(prompts_per_row)[None, :, None]
    last_XP = jnp.max(jnp.where(is_prompt_XPU, jnp.arange(U)[None, None], 0), axis=-1)
    prompt_XT = jnp.maximum(lanes.sample.reshape(X, C * T) // group, 0)
    of_prompt_XT = jnp.take_along_axis(last_XP, prompt_XT, axis=1)
    first_XT = lanes.sample_at.reshape(X, C * T) == 0
    source_XT = U - 1 + jnp.arange(C * T)[None]
    if lanes.run is not None and lanes.trunk is not None:
        begins = lanes.run != jnp.roll(lanes.run, 1, axis=2)
        trunk_XCT = (U + jnp.arange(C) * T)[None, :, None] + lanes.trunk
        goes_on = (begins & (lanes.trunk >= 0)).reshape(X, C * T)
        source_XT = jnp.where(goes_on, trunk_XCT.reshape(X, C * T), source_XT)
    return jnp.where(first_XT, of_prompt_XT, source_XT)


def _place_features(
    x_BTD: jax.Array, vision_src_BT: jax.Array, features_MND: jax.Array
) -> jax.Array:
    """Sequences lie row after row, and ``vision_src`` counts inside a row."""
    B, M = x_BTD.shape[0], features_MND.shape[0]
    if B % M:
        raise ValueError(f"{B} sequences cannot lie in {M} rows of images: {M} must divide {B}")
    features_ND = features_MND.reshape(-1, features_MND.shape[-1])
    gathered = take_in_rows(features_ND, vision_src_BT, M).astype(x_BTD.dtype)
    return jnp.where((vision_src_BT >= 0)[..., None], gathered, x_BTD)


def _last_token(x_BTD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """[B, D] at the last token that is not padding (padding stands on the right)."""
    last_B = jnp.maximum(jnp.sum(segment_ids_BT != 0, axis=1) - 1, 0)
    return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
