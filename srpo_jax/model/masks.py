"""Who sees whom in an attention, told by segments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

UNUSED_SEGMENT = np.iinfo(np.int32).min  # of what a kernel's padding adds; no caller uses it
# A logit: finite, so that a row without any visible key gives a mean and not NaN.
MASKED = -0.7 * float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Who sees whom: query t sees key s iff their segments (or a pair of their own ids) are equal
    and, if ``causal``, s <= t + q_offset.

    ``single``: queries are the keys, and each row is ONE segment with its padding behind it. What
    stands in padding means nothing then; kernels leave it out by the row's length."""

    q_segments_BT: jax.Array
    kv_segments_BS: jax.Array
    causal: bool = True
    q_offset: int = 0  # where the first query stands among the keys
    own_BT_BS: tuple[tuple[jax.Array, jax.Array], ...] = ()  # further pairs of ids
    single: bool = False


@dataclasses.dataclass(frozen=True)
class LaneMask:
    """What the Y = U + C * T slots of a packed block hold: U of prompts, then C lanes of
    completions. Padding is -1 in all three."""

    prompt_XU: jax.Array  # the prompt that a slot of the region belongs to
    sample_XCT: jax.Array  # the completion that a slot of a lane belongs to
    lane_prompt_XCT: jax.Array  # and that completion's prompt
    single: bool = False  # a block has one prompt
    # The entry of ``sample_XCT``, earlier in the lane, of what the slot goes on from; -1: nothing.
    trunk_XCT: jax.Array | None = None


def mask_ids(mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Of queries [B, T, I] and keys [B, S, I]: segments and, if there are any, own ids."""
    pairs = [(mask.q_segments_BT, mask.kv_segments_BS), *mask.own_BT_BS]
    q, kv = (jnp.stack(ids, axis=-1) for ids in zip(*pairs, strict=True))
    return q, kv


def visible(
    q_ids_BTI: jax.Array, kv_ids_BSI: jax.Array, causal: bool, q_index_T: jax.Array
) -> jax.Array:
    """[B, T, S] bool; ``q_index_T`` is the position of the queries among the keys."""
    visible = (q_ids_BTI[:, :, None] == kv_ids_BSI[:, None]).any(-1)
    if causal:
        kv_index_S = jnp.arange(kv_ids_BSI.shape[1])
        visible &= (kv_index_S[None, :] <= q_index_T[:, None])[None]
    return visible


def pad_to(x: jax.Array, multiple: int, axes: tuple[int, ...], value: int = 0) -> jax.Array:
    """Pads ``axes`` at their end to a multiple of ``multiple``."""
    pads = [(0, -n % multiple if i in axes else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, pads, constant_values=value)
