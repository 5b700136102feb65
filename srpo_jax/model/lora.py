"""Low-rank adapters beside the weights that they change: their names, and what they add up to."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from srpo_jax.model.config import Lora
from srpo_jax.structs import Params

LORA_A, LORA_B = "lora_a", "lora_b"  # in the place of "kernel" in the path of the layer's weight


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return path.endswith((f"/{LORA_A}", f"/{LORA_B}"))


def adapters_of(path: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter of the weight at ``path``, {} where it has none."""
    layer, _, name = path.rpartition("/")
    both = (f"{layer}/{LORA_A}", f"{layer}/{LORA_B}") if name == "kernel" else ()
    return {path: params[path] for path in both if path in params}


def merge(params: Params, lora: Lora | None, dtype: str) -> Params:
    """Parameters without adapters, whose part is added to the weights in float32; then cast.

    Takes stacks of layers and single ones. Jittable.
    """
    out = {}
    for path, x in params.items():
        if is_adapter(path):
            continue
        if both := adapters_of(path, params):
            assert lora, "adapters come with a model that has them"
            product = lambda a, b: jnp.tensordot(a, b, axes=1, precision="highest")  # noqa: E731
            a, b = both.values()
            stacked = a.ndim + b.ndim - 2 - x.ndim
            delta = (jax.vmap(product) if stacked else product)(a, b)
            x = x.astype(jnp.float32) + lora.scale * delta
        out[path] = x.astype(dtype)
    return out
