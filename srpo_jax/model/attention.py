"""One attention function with named implementations, and the decode step's own attention.

``attention`` is what whole sequences use: "xla" runs everywhere, "cudnn" on GPUs, "splash" on TPUs;
``lane_attention`` is the same for the packed blocks of an RL update. Padding has a segment of its
own: it sees only itself.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from srpo_jax.model import cudnn, decode_kernel, splash
from srpo_jax.model.layers import local_shape, target_platform
from srpo_jax.model.masks import (
    MASKED,
    UNUSED_SEGMENT,
    LaneMask,
    Mask,
    mask_ids,
    visible,
)

# Logits that one device holds at a time: 256 MiB in float32, whatever the length.
CHUNK_LOGITS = 2**26


def attention(
    q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask: Mask, impl: str = "auto"
) -> jax.Array:
    """Grouped-query attention -> [B, T, H, E] in the dtype of ``q``; softmax in float32.

    Query head h uses key/value head h // (H / K). Raises ValueError where ``impl`` cannot run.
    """
    impl = choose_impl(impl, q_BTHE)
    if impl == "xla":
        return _xla(q_BTHE, k_BSKE, v_BSKE, mask)
    if impl == "cudnn":
        return cudnn.attend(q_BTHE, k_BSKE, v_BSKE, mask)
    if impl == "splash":
        return splash.attend(q_BTHE, k_BSKE, v_BSKE, mask)
    raise ValueError(f"attention: {impl!r} is not one of auto, xla, cudnn, splash")


def lane_attention(
    q_XYHE: jax.Array, k_XYKE: jax.Array, v_XYKE: jax.Array, mask: LaneMask, impl: str = "auto"
) -> jax.Array:
    """Attention of packed blocks -> [X, Y, H, E]: every token sees, causally, its own sequence.

    That of a prompt is the prompt; that of a completion its prompt, and itself in its lane (with
    the first round that it goes on from, where that stands by itself).
    """
    impl = choose_impl(impl, q_XYHE)
    U = mask.prompt_XU.shape[1]
    region, lanes = [
        [x[:, part] for x in (q_XYHE, k_XYKE, v_XYKE)] for part in (slice(0, U), slice(U, None))
    ]
    q, *kv = region
    own = Mask(mask.prompt_XU, mask.prompt_XU, single=mask.single)
    prompts = attention(q, kv[0], kv[1], own, impl)
    if impl == "splash":
        out = splash.attend_lanes(lanes, region[1:], mask)
    else:
        out = _lanes_with_prompts(lanes, region[1:], mask, impl)
    return jnp.concatenate([prompts, out], axis=1)


def _lanes_with_prompts(
    lanes: list[jax.Array], region_kv: list[jax.Array], mask: LaneMask, impl: str
) -> jax.Array:
    """[X, C * T, H, E]: every lane with the keys and values of its region before its own."""
    X, C, T = mask.sample_XCT.shape
    U = mask.prompt_XU.shape[1]
    q, k, v = (x.reshape(X * C, T, *x.shape[2:]) for x in lanes)
    k, v = (
        jnp.concatenate([_repeat(shared, C), own], axis=1)
        for shared, own in zip(region_kv, (k, v), strict=True)
    )
    by_lane = lambda x: x.reshape(X * C, T)  # noqa: E731
    own, lane_prompt = by_lane(mask.sample_XCT), by_lane(mask.lane_prompt_XCT)
    # Keys of the region have no own id, those of a lane no segment: neither is found by the other.
    none_BU, none_BT = (jnp.full((X * C, n), UNUSED_SEGMENT, jnp.int32) for n in (U, T))
    own_kv = jnp.concatenate([none_BU, own], axis=1)
    seen = [own] if mask.trunk_XCT is None else [own, by_lane(mask.trunk_XCT)]
    both = Mask(
        lane_prompt,
        jnp.concatenate([_repeat(mask.prompt_XU, C), none_BT], axis=1),
        q_offset=U,
        own_BT_BS=tuple((ids, own_kv) for ids in seen),
    )
    out = attention(q, k, v, both, impl)
    return out.reshape(X, C * T, *out.shape[2:])


def _repeat(x: jax.Array, times: int) -> jax.Array:
    """[X, ...] -> [X * times, ...]: each entry ``times`` times, one after the other."""
    x = jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:]))
    return x.reshape(-1, *x.shape[2:])


def choose_impl(impl: str, q_BTHE: jax.Array) -> str:
    """Resolves "auto" for the platform that the program is traced for."""
    if impl != "auto":
        return impl
    platform = target_platform()
    if platform == "tpu":
        return "splash"
    if platform in ("gpu", "cuda") and cudnn.refusal(q_BTHE) is None:
        return "cudnn"
    return "xla"


@flax.struct.dataclass
class Sight:
    """What the fed token of each slot sees; Z data shards, J slots, C prompts of G samples each.

    A slot holds any sample of any prompt of its shard. Keys of a prompt are read once for its
    group: queries go from slots to places (prompt, sample) and results back.
    """

    prompt_ZCS: jax.Array  # bool: tokens of the prompts
    own_ZJW: jax.Array  # bool: columns of the slot's ring, the one now written included
    slot_ZCG: jax.Array  # int32: the slot of each place; any where it has none
    place_ZJ: jax.Array  # int32: c * G + g of each slot; any where it holds no sample


def decode_attention(
    q_ZJHE: jax.Array,
    prompt_kv: tuple[jax.Array, jax.Array],
    own_kv: tuple[jax.Array, jax.Array],
    sight: Sight,
) -> jax.Array:
    """One new token of each slot -> [Z, J, H, E].

    ``prompt_kv`` are [Z, C, K, S, E] and serve all samples of a prompt without being repeated;
    ``own_kv`` are rings [Z, J, K, R, E], of which the first W columns are read,
    in any order. One float32 softmax over both, in two parts that
    are joined by their maxima and sums, so that no array holds the scores of both.

    Heads stand before positions, as the batched products want them: in the other order XLA
    transposes the whole cache at every call.
    """
    Z, J, H, E = q_ZJHE.shape
    K = own_kv[0].shape[2]
    q = q_ZJHE.reshape(Z, J, K, H // K, E)
    C, G = sight.slot_ZCG.shape[1:]
    of_place = _take(q, sight.slot_ZCG).swapaxes(2, 3).reshape(Z, C, K, -1, E)  # rows: g, n
    shared = _part(of_place, prompt_kv, sight.prompt_ZCS)
    shared = [x.reshape(Z, C, K, G, H // K, *x.shape[4:]).swapaxes(2, 3) for x in shared]
    out, peak, total = (_take(x.reshape(Z, C * G, *x.shape[3:]), sight.place_ZJ) for x in shared)
    own_out, own_peak, own_total = _part(q, own_kv, sight.own_ZJW)
    highest = jnp.maximum(peak, own_peak)
    share, own_share = jnp.exp(peak - highest), jnp.exp(own_peak - highest)
    out = out * share[..., None] + own_out * own_share[..., None]
    out /= (total * share + own_total * own_share)[..., None]
    return out.astype(q.dtype).reshape(Z, J, H, E)


def _take(x_ZX: jax.Array, index_Z: jax.Array) -> jax.Array:
    """Entries of each shard's own part."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="clip"))(x_ZX, index_Z)


def _part(
    q_ZCKME: jax.Array, kv_ZCKRE: tuple[jax.Array, jax.Array], visible_ZCS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A part of a softmax, over the first keys, as many as ``visible_ZCS`` tells of: float32
    weighted values, not yet divided, with their maxima and sums."""
    if target_platform() in ("gpu", "cuda") and decode_kernel.refusal(q_ZCKME) is None:
        return decode_kernel.part(q_ZCKME, kv_ZCKRE, visible_ZCS)
    keys, values = (x[..., : visible_ZCS.shape[-1], :] for x in kv_ZCKRE)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("zckme,zckse->zckms", q_ZCKME, keys) * q_ZCKME.shape[-1] ** -0.5
    logits = jnp.where(visible_ZCS[:, :, None, None], logits, MASKED)
    peak = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - peak[..., None])
    out = product("zckms,zckse->zckme", weights.astype(q_ZCKME.dtype), values)
    return out, peak, jnp.sum(weights, axis=-1)


def _softmax(logits: jax.Array, visible: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(visible, logits, MASKED), axis=-1)


def _xla(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask: Mask) -> jax.Array:
    """Plain JAX; in chunks of queries, each recomputed in the backward pass, if T x S is big."""
    B, T, H, E = q_BTHE.shape
    S, K = k_BSKE.shape[1:3]
    q_ids_BTI, kv_ids_BSI = mask_ids(mask)

    def attend(q_BCHE: jax.Array, ids_BCI: jax.Array, index_C: jax.Array) -> jax.Array:
        C = q_BCHE.shape[1]
        q_BCKNE = q_BCHE.reshape(B, C, K, H // K, E)
        logits = jnp.einsum(
            "btkne,bske->bknts", q_BCKNE, k_BSKE, preferred_element_type=jnp.float32
        )
        seen = visible(ids_BCI, kv_ids_BSI, mask.causal, index_C)
        weights = _softmax(logits * E**-0.5, seen[:, None, None]).astype(v_BSKE.dtype)
        return jnp.einsum("bknts,bske->btkne", weights, v_BSKE).reshape(B, C, H, E)

    index_T = jnp.arange(T) + mask.q_offset
    chunk = _chunk_size(T, S * math.prod(local_shape((B, H), "batch", "tensor")))
    if chunk >= T:
        return attend(q_BTHE, q_ids_BTI, index_T)
    chunks = -(-T // chunk)
    pad = chunks * chunk - T
    q = jnp.pad(q_BTHE, ((0, 0), (0, pad), (0, 0), (0, 0)))
    ids = jnp.pad(q_ids_BTI, ((0, 0), (0, pad), (0, 0)), mode="edge")
    split = lambda x: jnp.moveaxis(x.reshape(B, chunks, chunk, *x.shape[2:]), 1, 0)  # noqa: E731
    index = (jnp.arange(chunks * chunk) + mask.q_offset).reshape(chunks, chunk)
    out = jax.lax.map(
        jax.checkpoint(lambda args: attend(*args), prevent_cse=False),
        (split(q), split(ids), index),
    )
    return jnp.moveaxis(out, 0, 1).reshape(B, chunks * chunk, H, E)[:, :T]


def _chunk_size(T: int, logits_per_query: int) -> int:
    """Queries per chunk: all of them when short, else a power of two with bounded logits."""
    if T * logits_per_query <= CHUNK_LOGITS:
        return T
    return max(16, 2 ** int(math.log2(max(1, CHUNK_LOGITS // logits_per_query))))
