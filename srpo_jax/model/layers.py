"""Small layers of both halves of the model, rotary embeddings, and sharding constraints."""

import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from srpo_jax.model.config import Lora, ModelConfig

BATCH_AXES = ("data", "fsdp")
WAITING = "stream"  # the name of what waits in host memory
Rope = tuple[jax.Array, jax.Array]  # cosine and sine, [..., E]
Args = ParamSpec("Args")
Out = TypeVar("Out")


def partition_spec(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec | None:
    """Where the dims of ``shape`` lie on the current mesh; None without a mesh of automatic axes.

    ``axes`` holds "batch" (over data x fsdp), "tensor" or None for each dim. A dim that the mesh
    does not divide is left whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return None
    return PartitionSpec(*(_mesh_axes(mesh, *dim) for dim in zip(shape, axes, strict=True)))


def local_shape(shape: tuple[int, ...], *axes: str | None) -> tuple[int, ...]:
    """What one device holds of ``shape``; ``axes`` as in ``partition_spec``."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return shape
    names = (_mesh_axes(mesh, *dim) or () for dim in zip(shape, axes, strict=True))
    parts = (math.prod(mesh.shape[n] for n in dim) for dim in names)
    return tuple(size // count for size, count in zip(shape, parts, strict=True))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the layout of ``x`` on the mesh of ``jax.set_mesh``; without one, ``x`` itself.

    One axis per dim: "batch", "tensor" or None, see ``partition_spec``.
    """
    spec = partition_spec(x.shape, axes)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def take_in_rows(values: jax.Array, index: jax.Array, rows: int) -> jax.Array:
    """Entries of each row's own values, by an index that counts inside the row: no device asks
    another one.

    Args:
        values: [rows * K, ...].
        index: int32 [rows * J, ...]; what lies outside of [0, K) is clipped.
    """
    in_rows = (x.reshape(rows, -1, *x.shape[1:]) for x in (values, index))
    take = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))
    return take(*in_rows).reshape(*index.shape, *values.shape[1:])


def target_platform() -> str:
    """Platform of the mesh's devices (also ahead of time), else of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def remat(body: Callable[Args, Out], policy: str) -> Callable[Args, Out]:
    """Recomputes ``body`` in the backward pass: "none" never, "dots" all but matrix products,
    "offload" all, from a first argument that waits in the host's memory.

    Raises ValueError for "offload" on a CPU, whose memory is the host's.
    """
    if policy == "none":
        return body
    keep = None
    if policy == "dots":
        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    elif policy == "offload":
        if target_platform() == "cpu":
            raise ValueError("model.remat=offload needs a TPU or a GPU; set block, dots or none")
        body = _with_first_named(body)
        keep = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[WAITING],
            offload_src="device",
            offload_dst="pinned_host",
        )
    # prevent_cse is needless inside a scan and would cost a barrier around every layer.
    return jax.checkpoint(body, prevent_cse=False, policy=keep)


def _with_first_named(body: Callable[..., Out]) -> Callable[..., Out]:
    return lambda x, *rest: body(checkpoint_name(x, WAITING), *rest)


class Linear(nnx.Module):
    """``y = x @ kernel + bias`` over the last dims of ``x``; ``kernel`` is [*inputs, *outputs].

    `adapt` gives it an adapter: ``lora_a`` [*inputs, rank] and ``lora_b`` [rank, *outputs];
    `shorten` a kernel in 8 bits and its ``kernel_scale`` [*outputs].
    """

    kernel_scale: nnx.Param | None = None
    lora_a: nnx.Param | None = None
    lora_b: nnx.Param | None = None

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        cfg: ModelConfig,
        *,
        bias: bool,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(_normal(rngs, (*inputs, *outputs), cfg))
        self.bias = nnx.Param(jnp.zeros(outputs, cfg.param_dtype)) if bias else None
        self.num_inputs = len(inputs)
        self.dtype = cfg.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        y = jnp.tensordot(x.astype(self.dtype), kernel, axes=self.num_inputs)
        if self.kernel_scale is not None:
            y = (y * _from_the_right(self.kernel_scale[...], y.ndim)).astype(self.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            a, b = (p[...].astype(self.dtype) for p in (self.lora_a, self.lora_b))
            low = jnp.tensordot(x.astype(self.dtype), a, axes=self.num_inputs)
            y += self.lora_scale * jnp.tensordot(low, b, axes=1)
        if self.bias is None:
            return y
        return y + _from_the_right(self.bias[...].astype(self.dtype), y.ndim)

    def adapt(self, lora: Lora, stacked: bool) -> None:
        """Adds an adapter that changes nothing yet; ``stacked``: one for each of its layers.

        In float32, as PEFT holds them beside shorter weights: they are few, their updates small.
        """
        lead, shape = self.kernel.shape[:stacked], self.kernel.shape[stacked:]
        inputs, outputs = shape[: self.num_inputs], shape[self.num_inputs :]
        self.lora_a = nnx.Param(jnp.zeros((*lead, *inputs, lora.rank), jnp.float32))
        self.lora_b = nnx.Param(jnp.zeros((*lead, lora.rank, *outputs), jnp.float32))
        self.lora_scale = lora.scale

    def shorten(self, stacked: bool) -> None:
        """Makes room for a kernel in 8 bits and float32 scales; ``stacked``: of all its layers."""
        shape = self.kernel.shape
        outputs = shape[stacked + self.num_inputs :]
        self.kernel = nnx.Param(jnp.zeros(shape, jnp.int8))
        self.kernel_scale = nnx.Param(jnp.zeros((*shape[:stacked], *outputs), jnp.float32))


class Embed(nnx.Module):
    """Token embedding table [V, D]."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        shape = (cfg.text.vocab_size, cfg.text.hidden_size)
        self.embedding = nnx.Param(_normal(rngs, shape, cfg))
        self.dtype = cfg.dtype

    def __call__(self, tokens: jax.Array, divided: bool = False) -> jax.Array:
        """[...] -> [..., D]. ``divided``: the table's width lies over fsdp, as in training.

        Each device then looks all tokens of its fsdp group up in its part of the width, and the
        caller's constraint exchanges width for batch. Without the hint XLA gathers the whole
        batch of activations on every device.
        """
        rest = (None,) * (tokens.ndim - 1)
        if divided:
            tokens = shard(tokens, "data", *rest)
        # "clip": jnp.take's default writes NaN for ids outside the table at the price of a select.
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip").astype(self.dtype)
        return shard(x, "data", *rest, "fsdp") if divided else x


class RMSNorm(nnx.Module):
    """Root-mean-square norm with float32 statistics, as HF's ``Qwen2_5_VLRMSNorm``."""

    def __init__(self, width: int, eps: float, cfg: ModelConfig):
        self.scale = nnx.Param(jnp.ones((width,), cfg.param_dtype))
        self.eps = eps
        self.dtype = cfg.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x.astype(self.dtype) * _from_the_right(self.scale[...].astype(self.dtype), x.ndim)


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))``; with biases in the vision tower, without in the decoder."""

    def __init__(self, width: int, mlp: int, cfg: ModelConfig, *, bias: bool, rngs: nnx.Rngs):
        self.gate = Linear((width,), (mlp,), cfg, bias=bias, rngs=rngs)
        self.up = Linear((width,), (mlp,), cfg, bias=bias, rngs=rngs)
        self.down = Linear((mlp,), (width,), cfg, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(shard(x, "batch", *(None,) * (x.ndim - 2), "tensor"))


def vision_rope(patch_hw: jax.Array, head_dim: int, theta: float) -> Rope:
    """Cosine and sine [..., E], float32, of patch rows and columns [..., 2].

    Rows turn the first quarter of the head, columns the second, and both repeat in the other half
    (HF ``Qwen2_5_VLVisionRotaryEmbedding``).
    """
    freqs = _inverse_frequencies(head_dim // 2, theta)
    angles = _angles(patch_hw, freqs)  # [..., 2, E/4]
    angles = angles.reshape(*patch_hw.shape[:-1], head_dim // 2)
    return _cos_sin(angles)


def text_mrope(
    mrope_B3T: jax.Array, head_dim: int, theta: float, sections: tuple[int, ...], dtype: str
) -> Rope:
    """Cosine and sine [B, T, E] in ``dtype`` (computed in float32) of multimodal positions.

    Part i of ``sections`` of the half head takes its position from axis i mod 3: temporal, height,
    width (HF ``Qwen2_5_VLRotaryEmbedding``).
    """
    freqs = _inverse_frequencies(head_dim, theta)
    parts, start = [], 0
    for i, size in enumerate(sections):
        parts.append(_angles(mrope_B3T[:, i % 3], freqs[start : start + size]))
        start += size
    cos, sin = _cos_sin(jnp.concatenate(parts, axis=-1))
    return cos.astype(dtype), sin.astype(dtype)


def rotate(x_BTHE: jax.Array, cos_BTE: jax.Array, sin_BTE: jax.Array) -> jax.Array:
    """Rotary embedding in the dtype of ``cos``; the result has the dtype of ``x``."""
    cos, sin = cos_BTE[..., None, :], sin_BTE[..., None, :]
    x = x_BTHE.astype(cos.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + turned * sin).astype(x_BTHE.dtype)


def _mesh_axes(mesh: AbstractMesh, size: int, axis: str | None) -> tuple[str, ...] | None:
    """Mesh axes over which a dim of ``size`` lies; None where it stays whole."""
    wanted = BATCH_AXES if axis == "batch" else (axis,)
    names = tuple(n for n in wanted if n is not None and n in mesh.axis_names)
    parts = math.prod(mesh.shape[n] for n in names)
    return names if parts > 1 and size % parts == 0 else None


def _from_the_right(x: jax.Array, ndim: int) -> jax.Array:
    """``x`` over the last of ``ndim`` dimensions."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], cfg: ModelConfig) -> jax.Array:
    values = jax.random.normal(rngs.params(), shape, jnp.float32)
    return (cfg.text.initializer_range * values).astype(cfg.param_dtype)


def _inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    # On the host: an accelerator's float32 power is a few ulp off, and positions multiply that.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)


def _angles(positions: jax.Array, freqs: np.ndarray) -> jax.Array:
    freqs = freqs.reshape((1,) * positions.ndim + freqs.shape)
    return positions[..., None].astype(jnp.float32) * freqs


def _cos_sin(angles: jax.Array) -> Rope:
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)
