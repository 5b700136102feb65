"""One attention function with named implementations, and the decode step's own attention.

``attention`` is what training, scoring and prefill use: "xla" runs everywhere, "cudnn" on GPUs,
"splash" on TPUs. Padding has a segment of its own: it sees only itself.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec

from srpo_jax.model.layers import local_shape, partition_spec

# Logits that one device holds at a time: 256 MiB in float32, whatever the length.
CHUNK_LOGITS = 2**26
UNUSED_SEGMENT = np.iinfo(np.int32).min  # of what a kernel's padding adds; no caller uses it
LANES = 128  # splash attention wants lengths and head widths in multiples of this
# Finite, so that a row without any visible key gives a mean and not NaN.
MASKED = -0.7 * float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Who sees whom: query t sees key s iff their segments are equal and, if ``causal``,
    s <= t + q_offset."""

    q_segments_BT: jax.Array
    kv_segments_BS: jax.Array
    causal: bool = True
    q_offset: int = 0  # where the first query stands among the keys


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
        return _cudnn(q_BTHE, k_BSKE, v_BSKE, mask)
    if impl == "splash":
        return _splash(q_BTHE, k_BSKE, v_BSKE, mask)
    raise ValueError(f"attention: {impl!r} is not one of auto, xla, cudnn, splash")


def choose_impl(impl: str, q_BTHE: jax.Array) -> str:
    """Resolves "auto" for the platform that the program is traced for."""
    if impl != "auto":
        return impl
    platform = target_platform()
    if platform == "tpu":
        return "splash"
    if platform in ("gpu", "cuda") and _cudnn_refusal(q_BTHE) is None:
        return "cudnn"
    return "xla"


def target_platform() -> str:
    """Platform of the mesh's devices (also ahead of time), else of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


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
    ``own_kv`` are [Z, J, K, W, E], in any order. One float32 softmax over both, in two parts that
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
    q_ZCKME: jax.Array, kv_ZCKSE: tuple[jax.Array, jax.Array], visible_ZCS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A part of a softmax: float32 weighted values, not yet divided, with their maxima and sums."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("zckme,zckse->zckms", q_ZCKME, kv_ZCKSE[0]) * q_ZCKME.shape[-1] ** -0.5
    logits = jnp.where(visible_ZCS[:, :, None, None], logits, MASKED)
    peak = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - peak[..., None])
    out = product("zckms,zckse->zckme", weights.astype(q_ZCKME.dtype), kv_ZCKSE[1])
    return out, peak, jnp.sum(weights, axis=-1)


def _softmax(logits: jax.Array, visible: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(visible, logits, MASKED), axis=-1)


def _visible(
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    causal: bool,
    q_index_T: jax.Array,
) -> jax.Array:
    """[B, T, S] bool; ``q_index_T`` is the position of the queries among the keys."""
    visible = q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]
    if causal:
        kv_index_S = jnp.arange(kv_segments_BS.shape[1])
        visible &= (kv_index_S[None, :] <= q_index_T[:, None])[None]
    return visible


def _xla(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask: Mask) -> jax.Array:
    """Plain JAX; in chunks of queries, each recomputed in the backward pass, if T x S is big."""
    B, T, H, E = q_BTHE.shape
    S, K = k_BSKE.shape[1:3]

    def attend(q_BCHE: jax.Array, segments_BC: jax.Array, index_C: jax.Array) -> jax.Array:
        C = q_BCHE.shape[1]
        q_BCKNE = q_BCHE.reshape(B, C, K, H // K, E)
        logits = jnp.einsum(
            "btkne,bske->bknts", q_BCKNE, k_BSKE, preferred_element_type=jnp.float32
        )
        visible = _visible(segments_BC, mask.kv_segments_BS, mask.causal, index_C)
        weights = _softmax(logits * E**-0.5, visible[:, None, None]).astype(v_BSKE.dtype)
        return jnp.einsum("bknts,bske->btkne", weights, v_BSKE).reshape(B, C, H, E)

    index_T = jnp.arange(T) + mask.q_offset
    chunk = _chunk_size(T, S * math.prod(local_shape((B, H), "batch", "tensor")))
    if chunk >= T:
        return attend(q_BTHE, mask.q_segments_BT, index_T)
    chunks = -(-T // chunk)
    pad = chunks * chunk - T
    q = jnp.pad(q_BTHE, ((0, 0), (0, pad), (0, 0), (0, 0)))
    segments = jnp.pad(mask.q_segments_BT, ((0, 0), (0, pad)), mode="edge")
    split = lambda x: jnp.moveaxis(x.reshape(B, chunks, chunk, *x.shape[2:]), 1, 0)  # noqa: E731
    index = (jnp.arange(chunks * chunk) + mask.q_offset).reshape(chunks, chunk)
    out = jax.lax.map(
        jax.checkpoint(lambda args: attend(*args), prevent_cse=False),
        (split(q), split(segments), index),
    )
    return jnp.moveaxis(out, 0, 1).reshape(B, chunks * chunk, H, E)[:, :T]


def _chunk_size(T: int, logits_per_query: int) -> int:
    """Queries per chunk: all of them when short, else a power of two with bounded logits."""
    if T * logits_per_query <= CHUNK_LOGITS:
        return T
    return max(16, 2 ** int(math.log2(max(1, CHUNK_LOGITS // logits_per_query))))


def _cudnn_refusal(q_BTHE: jax.Array) -> str | None:
    """Why cuDNN's fused attention cannot take this query; None if it can."""
    if q_BTHE.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {q_BTHE.dtype}"
    if q_BTHE.shape[-1] % 8 or q_BTHE.shape[-1] > 128:
        return f"needs a head width that 8 divides and up to 128, not {q_BTHE.shape[-1]}"
    return None


def _cudnn(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask: Mask) -> jax.Array:
    """cuDNN's fused attention with a mask [B, 1, T, S]; the logits never exist."""
    refusal = _cudnn_refusal(q_BTHE)
    if refusal:
        raise ValueError(f"attention=cudnn {refusal}; set dtype or attention=xla")
    T = q_BTHE.shape[1]
    # Its backward pass wants even lengths. A key of padding is seen by nobody; a query of padding
    # repeats the last segment, so that it sees something.
    q, k, v = (_pad_to(x, 2, (1,)) for x in (q_BTHE, k_BSKE, v_BSKE))
    q_segments = jnp.pad(mask.q_segments_BT, ((0, 0), (0, T % 2)), mode="edge")
    kv_segments = _pad_to(mask.kv_segments_BS.astype(jnp.int32), 2, (1,), UNUSED_SEGMENT)
    index = jnp.arange(q.shape[1]) + mask.q_offset
    visible = _visible(q_segments, kv_segments, mask.causal, index)
    out = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation="cudnn")
    return out[:, :T]


def _splash(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask: Mask) -> jax.Array:
    """TPU splash attention, on each device's own sequences and heads; interpreted elsewhere."""
    T, E = q_BTHE.shape[1], q_BTHE.shape[3]
    q_BTHE = q_BTHE * jnp.asarray(E**-0.5, q_BTHE.dtype)
    k_BSKE, v_BSKE = _repeat_kv_for_mesh(q_BTHE, k_BSKE, v_BSKE)
    q, k, v = (_pad_to(x, LANES, (1, 3)) for x in (q_BTHE, k_BSKE, v_BSKE))
    q_segments, kv_segments = (
        _pad_to(s.astype(jnp.int32), LANES, (1,), UNUSED_SEGMENT)
        for s in (mask.q_segments_BT, mask.kv_segments_BS)
    )

    def local(q, k, v, q_segments, kv_segments):
        kernel = _splash_kernel(q.shape[2], q.shape[1], k.shape[1], mask)
        by_head = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        ids = splash.SegmentIds(q_segments, kv_segments)
        return by_head(jax.vmap(kernel)(by_head(q), by_head(k), by_head(v), ids))

    q_spec = partition_spec(q.shape, ("batch", None, "tensor", None))
    if q_spec is not None:
        kv_spec = partition_spec(k.shape, ("batch", None, "tensor", None))
        batch_spec = PartitionSpec(q_spec[0], None)
        local = jax.shard_map(
            local,
            in_specs=(q_spec, kv_spec, kv_spec, batch_spec, batch_spec),
            out_specs=q_spec,
            check_vma=False,
        )
    return local(q, k, v, q_segments, kv_segments)[:, :T, :, :E]


def _splash_kernel(heads: int, T: int, S: int, mask: Mask) -> splash.SplashAttentionKernel:
    """The kernel for these lengths; its block mask is computed on the host at trace time."""
    if mask.causal:
        block_mask = splash_mask.CausalMask((T, S), offset=mask.q_offset)
    else:
        block_mask = splash_mask.FullMask((T, S))
    block_q, block_kv = (next(b for b in (512, 256, LANES) if n % b == 0) for n in (T, S))
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([block_mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        interpret=target_platform() != "tpu",
    )


def _repeat_kv_for_mesh(
    q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Repeats key/value heads just enough for each tensor shard of query heads to hold its own."""
    mesh = jax.sharding.get_abstract_mesh()
    H, K = q_BTHE.shape[2], k_BSKE.shape[2]
    tensor = mesh.shape.get("tensor", 1) if not mesh.empty else 1
    if H % tensor or K % tensor == 0:
        return k_BSKE, v_BSKE
    times = next(n for n in range(1, H // K + 1) if (K * n) % tensor == 0 and H % (K * n) == 0)
    return jnp.repeat(k_BSKE, times, axis=2), jnp.repeat(v_BSKE, times, axis=2)


def _pad_to(x: jax.Array, multiple: int, axes: tuple[int, ...], value: int = 0) -> jax.Array:
    """Pads ``axes`` at their end to a multiple of ``multiple``."""
    pads = [(0, -n % multiple if i in axes else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, pads, constant_values=value)
