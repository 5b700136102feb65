"""One attention function with named implementations, and the decode step's own attention.

``attention`` is what whole sequences use: "xla" runs everywhere, "cudnn" on GPUs, "splash" on TPUs;
``lane_attention`` is the same for the packed blocks of an RL update. Padding has a segment of its
own: it sees only itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

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
    """Who sees whom: query t sees key s iff their segments (or, if given, their own ids) are equal
    and, if ``causal``, s <= t + q_offset."""

    q_segments_BT: jax.Array
    kv_segments_BS: jax.Array
    causal: bool = True
    q_offset: int = 0  # where the first query stands among the keys
    own_BT_BS: tuple[jax.Array, jax.Array] | None = None  # a second pair of ids


@dataclasses.dataclass(frozen=True)
class LaneMask:
    """What the Y = U + C * T slots of a packed block hold: U of prompts, then C lanes of
    completions. Padding is -1 in all three."""

    prompt_XU: jax.Array  # the prompt that a slot of the region belongs to
    sample_XCT: jax.Array  # the completion that a slot of a lane belongs to
    lane_prompt_XCT: jax.Array  # and that completion's prompt


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


def lane_attention(
    q_XYHE: jax.Array, k_XYKE: jax.Array, v_XYKE: jax.Array, mask: LaneMask, impl: str = "auto"
) -> jax.Array:
    """Attention of packed blocks -> [X, Y, H, E]: every token sees, causally, its own sequence.

    That of a prompt is the prompt; that of a completion its prompt, and itself in its lane.
    """
    impl = choose_impl(impl, q_XYHE)
    U = mask.prompt_XU.shape[1]
    region, lanes = [
        [x[:, part] for x in (q_XYHE, k_XYKE, v_XYKE)] for part in (slice(0, U), slice(U, None))
    ]
    q, *kv = region
    prompts = attention(q, kv[0], kv[1], Mask(mask.prompt_XU, mask.prompt_XU), impl)
    if impl == "splash":
        out = _splash_lanes(lanes, region[1:], mask)
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
    own, lane_prompt = (x.reshape(X * C, T) for x in (mask.sample_XCT, mask.lane_prompt_XCT))
    # Keys of the region have no own id, those of a lane no segment: neither is found by the other.
    none_BU, none_BT = (jnp.full((X * C, n), UNUSED_SEGMENT, jnp.int32) for n in (U, T))
    both = Mask(
        lane_prompt,
        jnp.concatenate([_repeat(mask.prompt_XU, C), none_BT], axis=1),
        q_offset=U,
        own_BT_BS=(own, jnp.concatenate([none_BU, own], axis=1)),
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


def _ids(mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Of queries [B, T, I] and keys [B, S, I]: segments and, if there are any, own ids."""
    pairs = [(mask.q_segments_BT, mask.kv_segments_BS)]
    pairs += [] if mask.own_BT_BS is None else [mask.own_BT_BS]
    q, kv = (jnp.stack(ids, axis=-1) for ids in zip(*pairs, strict=True))
    return q, kv


def _visible(
    q_ids_BTI: jax.Array, kv_ids_BSI: jax.Array, causal: bool, q_index_T: jax.Array
) -> jax.Array:
    """[B, T, S] bool; ``q_index_T`` is the position of the queries among the keys."""
    visible = (q_ids_BTI[:, :, None] == kv_ids_BSI[:, None]).any(-1)
    if causal:
        kv_index_S = jnp.arange(kv_ids_BSI.shape[1])
        visible &= (kv_index_S[None, :] <= q_index_T[:, None])[None]
    return visible


def _xla(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask: Mask) -> jax.Array:
    """Plain JAX; in chunks of queries, each recomputed in the backward pass, if T x S is big."""
    B, T, H, E = q_BTHE.shape
    S, K = k_BSKE.shape[1:3]
    q_ids_BTI, kv_ids_BSI = _ids(mask)

    def attend(q_BCHE: jax.Array, ids_BCI: jax.Array, index_C: jax.Array) -> jax.Array:
        C = q_BCHE.shape[1]
        q_BCKNE = q_BCHE.reshape(B, C, K, H // K, E)
        logits = jnp.einsum(
            "btkne,bske->bknts", q_BCKNE, k_BSKE, preferred_element_type=jnp.float32
        )
        visible = _visible(ids_BCI, kv_ids_BSI, mask.causal, index_C)
        weights = _softmax(logits * E**-0.5, visible[:, None, None]).astype(v_BSKE.dtype)
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
    q_ids, kv_ids = _ids(mask)
    q_ids = jnp.pad(q_ids, ((0, 0), (0, T % 2), (0, 0)), mode="edge")
    kv_ids = _pad_to(kv_ids.astype(jnp.int32), 2, (1,), UNUSED_SEGMENT)
    index = jnp.arange(q.shape[1]) + mask.q_offset
    visible = _visible(q_ids, kv_ids, mask.causal, index)
    out = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation="cudnn")
    return out[:, :T]


def _splash(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask: Mask) -> jax.Array:
    """TPU splash attention, on each device's own sequences and heads; interpreted elsewhere."""
    T, E = q_BTHE.shape[1], q_BTHE.shape[3]
    q_BTHE = q_BTHE * jnp.asarray(E**-0.5, q_BTHE.dtype)
    k_BSKE, v_BSKE = _repeat_kv_for_mesh(q_BTHE, k_BSKE, v_BSKE)
    qkv = [_pad_to(x, LANES, (1, 3)) for x in (q_BTHE, k_BSKE, v_BSKE)]
    ids = [
        _pad_to(s.astype(jnp.int32), LANES, (1,), UNUSED_SEGMENT)
        for s in (mask.q_segments_BT, mask.kv_segments_BS)
    ]

    def local(q, k, v, q_segments, kv_segments):
        offset = mask.q_offset if mask.causal else None
        kernel = _splash_kernel(q.shape[2], q.shape[1], k.shape[1], offset)
        segments = splash.SegmentIds(q_segments, kv_segments)
        # The kernel's own type says that it might return its log-sum-exp too.
        out: Any = jax.vmap(kernel)(_by_head(q), _by_head(k), _by_head(v), segments)
        return _by_head(out)

    return _on_own_part(local, qkv, ids)[:, :T, :, :E]


def _by_head(x: jax.Array) -> jax.Array:
    """[B, T, H, E] <-> [B, H, T, E]."""
    return jnp.swapaxes(x, 1, 2)


def _on_own_part(
    fn: Callable[..., jax.Array], by_head: list[jax.Array], ids: list[jax.Array]
) -> jax.Array:
    """``fn(*by_head, *ids)`` on each device's own sequences and heads; the result is like the
    first of ``by_head``."""
    axes = ("batch", None, "tensor", None)
    out = partition_spec(by_head[0].shape, axes)
    if out is None:
        return fn(*by_head, *ids)
    specs = [partition_spec(x.shape, axes) for x in by_head]
    specs += [PartitionSpec(out[0], None)] * len(ids)
    mapped = jax.shard_map(fn, in_specs=tuple(specs), out_specs=out, check_vma=False)
    return mapped(*by_head, *ids)


def _splash_lanes(lanes: list[jax.Array], region_kv: list[jax.Array], mask: LaneMask) -> jax.Array:
    """[X, C * T, H, E]: one splash call over the keys of the region, one over each lane's own."""
    X, C, T = mask.sample_XCT.shape
    E = lanes[0].shape[3]
    q = lanes[0] * jnp.asarray(E**-0.5, lanes[0].dtype)
    region = _repeat_kv_for_mesh(q, region_kv[0], region_kv[1])
    own = _repeat_kv_for_mesh(q, lanes[1], lanes[2])

    def padded(x: jax.Array, axes: tuple[int, ...], value: int = 0) -> jax.Array:
        """Each lane by itself; they then lie one behind the other again."""
        x = _pad_to(x.reshape(X, C, T, *x.shape[2:]), LANES, axes, value)
        return x.reshape(X, -1, *x.shape[3:])

    by_head = [
        *(padded(x, (2, 4)) for x in (q, *own)),
        *(_pad_to(x, LANES, (1, 3)) for x in region),
    ]
    ids = [
        *(
            padded(x.reshape(X, -1), (2,), UNUSED_SEGMENT)
            for x in (mask.lane_prompt_XCT, mask.sample_XCT)
        ),
        _pad_to(mask.prompt_XU, LANES, (1,), UNUSED_SEGMENT),
    ]

    # eight: queries, two sets of keys and values, and who belongs together
    def local(q, k, v, region_k, region_v, lane_prompt, sample, prompt):
        cut = lambda x: x.reshape(-1, x.shape[1] // C, *x.shape[2:])  # noqa: E731
        lane_kernel = _splash_kernel(q.shape[2], q.shape[1] // C, q.shape[1] // C, 0, join=True)
        region_kernel = _splash_kernel(q.shape[2], q.shape[1], region_k.shape[1], None, join=True)
        segments = (
            splash.SegmentIds(lane_prompt, prompt),
            splash.SegmentIds(cut(sample), cut(sample)),
        )
        kvs = ((_by_head(region_k), _by_head(region_v)), tuple(_by_head(cut(x)) for x in (k, v)))
        return _by_head(_joined_splash((region_kernel, lane_kernel), C, _by_head(q), kvs, segments))

    out = _on_own_part(local, by_head, ids)
    return out.reshape(X, C, -1, *out.shape[2:])[:, :, :T, :, :E].reshape(X, C * T, -1, E)


Kernels = tuple[splash.SplashAttentionKernel, splash.SplashAttentionKernel]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _joined_splash(
    kernels: Kernels, lanes: int, q_XHTE: jax.Array, kvs: Any, ids: Any
) -> jax.Array:
    """One softmax over two sets of keys: those of the region, and (queries cut into ``lanes``)
    those of the query's own lane. The kernels give away their log-sum-exp, but no gradient of it:
    both therefore stand under one rule, whose backward pass gives each kernel the joint result."""
    return _joined_forward(kernels, lanes, q_XHTE, kvs, ids)[0]


def _joined_forward(kernels, lanes, q, kvs, ids):
    out_1, (sum_1,) = jax.vmap(kernels[0])(q, *kvs[0], ids[0])
    out_2, (sum_2,) = jax.vmap(kernels[1])(_cut(q, lanes), *kvs[1], ids[1])
    out_2, sum_2 = _uncut(out_2, lanes), _uncut(sum_2, lanes)
    total = jnp.logaddexp(sum_1, sum_2)
    out = jnp.exp(sum_1 - total)[..., None] * out_1 + jnp.exp(sum_2 - total)[..., None] * out_2
    out = out.astype(q.dtype)
    return out, (kernels, q, kvs, ids, out, total)


def _joined_backward(lanes, residuals, d_out):
    kernels, q, kvs, ids, out, total = residuals
    dq_1, *dkv_1 = _splash_backward(kernels[0], q, kvs[0], ids[0], (out, total, d_out))
    whole = [_cut(x, lanes) for x in (out, total, d_out)]
    dq_2, *dkv_2 = _splash_backward(kernels[1], _cut(q, lanes), kvs[1], ids[1], whole)
    return None, dq_1 + _uncut(dq_2, lanes), (tuple(dkv_1), tuple(dkv_2)), None


_joined_splash.defvjp(_joined_forward, _joined_backward)


def _cut(x_XHT: jax.Array, lanes: int) -> jax.Array:
    """[X, H, C * T, ...] -> [X * C, H, T, ...]."""
    x = x_XHT.reshape(*x_XHT.shape[:2], lanes, -1, *x_XHT.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])


def _uncut(x_BHT: jax.Array, lanes: int) -> jax.Array:
    """[X * C, H, T, ...] -> [X, H, C * T, ...]."""
    x = jnp.moveaxis(x_BHT.reshape(-1, lanes, *x_BHT.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _splash_backward(kernel: Any, q: Any, kv: Any, ids: Any, joint: Any) -> Any:
    """(dq, dk, dv) of one kernel from the result, log-sum-exp and cotangent of all keys together.

    The kernel's own backward pass, which jax has no public name for.
    """
    options = dict(kernel.kwargs)

    def backward(q, k, v, ids, out, total, d_out):
        held = (q, k, v, ids, None, out, total, kernel.dq_mask_info, kernel.dkv_mask_info)
        return splash._splash_attention_bwd(**options, res=held, do=d_out)[3:6]

    (k, v), (out, total, d_out) = kv, joint
    return jax.vmap(backward)(q, k, v, ids, out, total, d_out)


def _splash_kernel(
    heads: int, T: int, S: int, offset: int | None, join: bool = False
) -> splash.SplashAttentionKernel:
    """The kernel for these lengths; its block mask is computed on the host at trace time.

    Causal with the first query at ``offset``, unless that is None. ``join``: it gives its
    log-sum-exp too.
    """
    if offset is not None:
        block_mask = splash_mask.CausalMask((T, S), offset=offset)
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
        save_residuals=join,
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
