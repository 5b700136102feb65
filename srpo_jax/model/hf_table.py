"""The one table between Hugging Face's Qwen2.5-VL tensors and our parameters."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from srpo_jax.model.config import ModelConfig
from srpo_jax.model.qwen2_5_vl import abstract_params

# The dtypes of weights that are read and written, by their safetensors names.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
TILE = 256  # side of the squares in which a weight is transposed; two of them fit into a cache
BLOCK_BYTES = 64 << 20  # what is held of a tensor on its way through the host

Index = tuple[slice, ...]  # a slice of a parameter
Progress = Callable[[str, int, int], None]  # what is just done, bytes done, bytes in all


class HFError(ValueError):
    """A Hugging Face directory does not hold the model that is asked of it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    ``axes`` is ``HF->ours`` for one layer: HF's dimensions are separated by commas, and a
    dimension may be a product of axes (row-major); ours has one letter per dimension, without
    the leading L of a stacked parameter. X, the last HF dimension of the patch embedding, is
    stored as [channels, frames, patch, patch].
    """

    path: str
    name: str  # in the released layout, with "{}" for the layer of a stacked parameter
    axes: str

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading layer axis."""
        return "{}" in self.name

    @property
    def groups(self) -> list[str]:
        """The axes in each of HF's dimensions."""
        return self.axes.split("->")[0].split(",")

    @property
    def ours(self) -> str:
        """The axes of our parameter, without L."""
        return self.axes.split("->")[1]

    def sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """Axis -> size, from the shape of our parameter."""
        return dict(zip(self.ours, shape[self.stacked :], strict=True))

    def hf_shape(self, shape: Sequence[int], cfg: ModelConfig) -> tuple[int, ...]:
        """The shape that HF stores for our parameter of ``shape``."""
        sizes = self.sizes(shape)
        dims = [math.prod(sizes[axis] for axis in group) for group in self.groups]
        if self.groups[-1] == "X":
            v = cfg.vision
            dims[-1:] = [v.patch_dim // (v.temporal_patch_size * v.patch_size**2)]
            dims += [v.temporal_patch_size, v.patch_size, v.patch_size]
        return tuple(dims)


_TEXT, _LAYER, _VISION, _BLOCK = "text/", "text/layers/", "vision/", "vision/blocks/"
TABLE = (
    Row(_TEXT + "embed/embedding", "model.embed_tokens.weight", "V,D->VD"),
    Row(_LAYER + "input_norm/scale", "model.layers.{}.input_layernorm.weight", "D->D"),
    Row(_LAYER + "attn/q/kernel", "model.layers.{}.self_attn.q_proj.weight", "HE,D->DHE"),
    Row(_LAYER + "attn/q/bias", "model.layers.{}.self_attn.q_proj.bias", "HE->HE"),
    Row(_LAYER + "attn/k/kernel", "model.layers.{}.self_attn.k_proj.weight", "KE,D->DKE"),
    Row(_LAYER + "attn/k/bias", "model.layers.{}.self_attn.k_proj.bias", "KE->KE"),
    Row(_LAYER + "attn/v/kernel", "model.layers.{}.self_attn.v_proj.weight", "KE,D->DKE"),
    Row(_LAYER + "attn/v/bias", "model.layers.{}.self_attn.v_proj.bias", "KE->KE"),
    Row(_LAYER + "attn/o/kernel", "model.layers.{}.self_attn.o_proj.weight", "D,HE->HED"),
    Row(_LAYER + "post_norm/scale", "model.layers.{}.post_attention_layernorm.weight", "D->D"),
    Row(_LAYER + "mlp/gate/kernel", "model.layers.{}.mlp.gate_proj.weight", "F,D->DF"),
    Row(_LAYER + "mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight", "F,D->DF"),
    Row(_LAYER + "mlp/down/kernel", "model.layers.{}.mlp.down_proj.weight", "D,F->FD"),
    Row(_TEXT + "norm/scale", "model.norm.weight", "D->D"),
    Row(_TEXT + "lm_head/kernel", "lm_head.weight", "V,D->DV"),
    Row(_VISION + "patch_embed/kernel", "visual.patch_embed.proj.weight", "D,X->XD"),
    Row(_BLOCK + "norm1/scale", "visual.blocks.{}.norm1.weight", "D->D"),
    Row(_BLOCK + "attn/qkv/kernel", "visual.blocks.{}.attn.qkv.weight", "3HE,D->D3HE"),
    Row(_BLOCK + "attn/qkv/bias", "visual.blocks.{}.attn.qkv.bias", "3HE->3HE"),
    Row(_BLOCK + "attn/proj/kernel", "visual.blocks.{}.attn.proj.weight", "D,HE->HED"),
    Row(_BLOCK + "attn/proj/bias", "visual.blocks.{}.attn.proj.bias", "D->D"),
    Row(_BLOCK + "norm2/scale", "visual.blocks.{}.norm2.weight", "D->D"),
    Row(_BLOCK + "mlp/gate/kernel", "visual.blocks.{}.mlp.gate_proj.weight", "F,D->DF"),
    Row(_BLOCK + "mlp/gate/bias", "visual.blocks.{}.mlp.gate_proj.bias", "F->F"),
    Row(_BLOCK + "mlp/up/kernel", "visual.blocks.{}.mlp.up_proj.weight", "F,D->DF"),
    Row(_BLOCK + "mlp/up/bias", "visual.blocks.{}.mlp.up_proj.bias", "F->F"),
    Row(_BLOCK + "mlp/down/kernel", "visual.blocks.{}.mlp.down_proj.weight", "D,F->FD"),
    Row(_BLOCK + "mlp/down/bias", "visual.blocks.{}.mlp.down_proj.bias", "D->D"),
    Row(_VISION + "merger/norm/scale", "visual.merger.ln_q.weight", "D->D"),
    Row(_VISION + "merger/fc1/kernel", "visual.merger.mlp.0.weight", "O,I->IO"),
    Row(_VISION + "merger/fc1/bias", "visual.merger.mlp.0.bias", "O->O"),
    Row(_VISION + "merger/fc2/kernel", "visual.merger.mlp.2.weight", "O,I->IO"),
    Row(_VISION + "merger/fc2/bias", "visual.merger.mlp.2.bias", "O->O"),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One HF tensor that a model of ours needs."""

    name: str
    row: Row
    layer: int
    shape: tuple[int, ...]


def hf_tensors(cfg: ModelConfig) -> list[Tensor]:
    """Every HF tensor of the model in the order of a file: layer after layer."""
    shapes = {path: leaf.shape for path, leaf in abstract_params(cfg).items()}
    rows = [row for row in TABLE if row.path in shapes]
    if len(rows) != len(shapes):
        unknown = sorted(shapes.keys() - {row.path for row in rows})
        raise HFError(f"parameters without a row in the table of hf_table.py: {', '.join(unknown)}")
    found = []
    for stacked, same in itertools.groupby(rows, lambda row: row.stacked):
        same = list(same)
        for layer in range(shapes[same[0].path][0] if stacked else 1):
            for row in same:
                shape = row.hf_shape(shapes[row.path], cfg)
                found.append(Tensor(row.name.format(layer), row, layer, shape))
    return found


def assign(out: np.ndarray, value: np.ndarray) -> None:
    """``out[...] = value``, cast where dtypes differ; square by square where memory order differs.

    Whole weights are transposed on their way: numpy alone would miss the cache at every element.
    """
    if out.dtype == value.dtype == DTYPES["BF16"]:
        out, value = out.view(np.uint16), value.view(np.uint16)  # raw bits copy faster
    last = out.ndim - 1
    near = min(range(out.ndim), key=lambda i: (value.shape[i] == 1, value.strides[i]), default=last)
    if near == last:
        out[...] = value
        return
    for i in range(0, out.shape[near], TILE):
        for j in range(0, out.shape[last], TILE):
            at = [slice(None)] * out.ndim
            at[near], at[last] = slice(i, i + TILE), slice(j, j + TILE)
            out[tuple(at)] = value[tuple(at)]
