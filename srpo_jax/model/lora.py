"""What stands beside the weights of a run that trains low-rank adapters, and what they add up to.

A weight may have an adapter, and may be held in 8 bits with a scale for each output: absolute
maxima over the inputs, rounded to the nearest (LLM.int8's weights, arXiv 2208.07339, without its
outliers, which are the activations').
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from srpo_jax.model.config import Lora
from srpo_jax.structs import Params

# In the place of "kernel" in the path of the layer's weight.
LORA_A, LORA_B, KERNEL_SCALE = "lora_a", "lora_b", "kernel_scale"
MOST = 127  # of a code


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return path.endswith((f"/{LORA_A}", f"/{LORA_B}"))


def is_scale(path: str) -> bool:
    """Whether a parameter is the scale of a weight in 8 bits."""
    return path.endswith(f"/{KERNEL_SCALE}")


def adapters_of(path: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter of the weight at ``path``, {} where it has none."""
    return _beside(path, params, LORA_A, LORA_B)


def scale_of(path: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The scale of the weight at ``path``, {} where it is not in 8 bits."""
    return _beside(path, params, KERNEL_SCALE)


def _beside(path: str, params: Mapping[str, Any], *names: str) -> dict[str, Any]:
    layer, _, name = path.rpartition("/")
    wanted = [f"{layer}/{one}" for one in names] if name == "kernel" else []
    return {path: params[path] for path in wanted if path in params}


def merge(params: Params, lora: Lora | None, dtype: str) -> Params:
    """Weights alone: scales applied and adapters added in float32; then cast.

    Takes stacks of layers and single ones. Jittable.
    """
    out = {}
    for path, x in params.items():
        if is_adapter(path) or is_scale(path):
            continue
        for scale in scale_of(path, params).values():
            x = x.astype(jnp.float32) * over_outputs(path, scale, x.ndim)
        if both := adapters_of(path, params):
            assert lora, "adapters come with a model that has them"
            product = lambda a, b: jnp.tensordot(a, b, axes=1, precision="highest")  # noqa: E731
            a, b = both.values()
            stacked = a.ndim + b.ndim - 2 - x.ndim
            delta = (jax.vmap(product) if stacked else product)(a, b)
            x = x.astype(jnp.float32) + lora.scale * delta
        out[path] = x.astype(dtype)
    return out


def in_8_bits(path: str, kernel: Any, scale_ndim: int) -> tuple[jax.Array, jax.Array]:
    """A weight -> (its codes, int8; its scale, float32 of ``scale_ndim`` dimensions). Jittable."""
    lead, kernel = _lead(path), jnp.asarray(kernel, jnp.float32)
    inputs = tuple(range(lead, lead + kernel.ndim - scale_ndim))
    scale = jnp.max(jnp.abs(kernel), axis=inputs) / MOST
    whole = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(kernel / over_outputs(path, whole, kernel.ndim)).astype(jnp.int8), scale


def over_outputs(path: str, scale: Any, ndim: int) -> Any:
    """The scale of a weight of ``ndim`` dimensions, with dimensions of 1 for its inputs."""
    lead = _lead(path)
    return scale.reshape(*scale.shape[:lead], *(1,) * (ndim - scale.ndim), *scale.shape[lead:])


def _lead(path: str) -> int:
    """1 where the first dimension is that of the layers."""
    return int(re.match(r"text/layers/\D", path) is not None)
