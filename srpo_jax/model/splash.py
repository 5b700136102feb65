"""Splash attention on TPUs (anywhere else it is interpreted, for tests)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec

from srpo_jax.model.layers import partition_spec, target_platform
from srpo_jax.model.masks import UNUSED_SEGMENT, LaneMask, Mask, pad_to

LANES = 128  # the kernel wants lengths and head widths in multiples of this
# Queries and keys that a step of the kernel holds: the more, the fewer of them are read again. The
# float32 logits of a step, [queries, COMPUTED keys], have to find room in the core's memory too.
LARGEST_BLOCK, COMPUTED = 1024, (512, 256, LANES)
SMALLEST_CAUSAL = 512  # below, steps are too short


def block_size(n: int, causal: bool) -> int:
    """Into blocks of how many a length of ``n`` is cut (and padded to a multiple of).

    Blocks above a diagonal are skipped as a whole: four a side leave 5/8 of the work, one all.
    """
    limit = min(LARGEST_BLOCK, max(SMALLEST_CAUSAL, n // 4)) if causal else LARGEST_BLOCK
    unit = LANES if n <= LANES else 2 * LANES
    return -(-n // (-(-n // limit) * unit)) * unit


def attend(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask: Mask) -> jax.Array:
    """Splash attention, on each device's own sequences and heads."""
    T, E = q_BTHE.shape[1], q_BTHE.shape[3]
    q_BTHE = q_BTHE * jnp.asarray(E**-0.5, q_BTHE.dtype)
    k_BSKE, v_BSKE = _repeat_kv_for_mesh(q_BTHE, k_BSKE, v_BSKE)
    blocks = [block_size(n, mask.causal) for n in (T, k_BSKE.shape[1])]
    padded = lambda x, block: pad_to(pad_to(x, block, (1,)), LANES, (3,))  # noqa: E731
    qkv = [padded(q_BTHE, blocks[0]), *(padded(x, blocks[1]) for x in (k_BSKE, v_BSKE))]
    segments = (mask.q_segments_BT, mask.kv_segments_BS)
    ids = [
        pad_to(x.astype(jnp.int32), block, (1,), UNUSED_SEGMENT)
        for x, block in zip(segments, blocks, strict=True)
    ]

    def local(q, k, v, q_segments, kv_segments):
        offset = mask.q_offset if mask.causal else None
        kernel = _kernel(q.shape[2], (q.shape[1], k.shape[1]), blocks, offset)
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


def attend_lanes(lanes: list[jax.Array], region_kv: list[jax.Array], mask: LaneMask) -> jax.Array:
    """[X, C * T, H, E]: one splash call over the keys of the region, one over each lane's own, and
    one over the first rounds in them that others go on from."""
    X, C, T = mask.sample_XCT.shape
    E = lanes[0].shape[3]
    q = lanes[0] * jnp.asarray(E**-0.5, lanes[0].dtype)
    region = _repeat_kv_for_mesh(q, region_kv[0], region_kv[1])
    own = _repeat_kv_for_mesh(q, lanes[1], lanes[2])

    block, region_block = block_size(T, True), block_size(mask.prompt_XU.shape[1], False)
    slots = T + -T % block  # of a padded lane; for the region's keys it may be one block
    region_blocks = (slots if slots <= LARGEST_BLOCK else block, region_block)

    def padded(x: jax.Array, value: int = 0) -> jax.Array:
        """Each lane by itself; they then lie one behind the other again."""
        x = pad_to(x.reshape(X, C, T, *x.shape[2:]), block, (2,), value)
        return x.reshape(X, -1, *x.shape[3:])

    by_head = [*map(padded, (q, *own)), *(pad_to(x, region_block, (1,)) for x in region)]
    by_head = [pad_to(x, LANES, (3,)) for x in by_head]
    trunks = [] if mask.trunk_XCT is None else [mask.trunk_XCT]
    ids = [
        pad_to(mask.prompt_XU, region_block, (1,), UNUSED_SEGMENT),
        *(
            padded(x.reshape(X, -1), UNUSED_SEGMENT)
            for x in (mask.lane_prompt_XCT, mask.sample_XCT, *trunks)
        ),
    ]

    # eight: queries, two sets of keys and values, and who belongs together
    def local(q, k, v, region_k, region_v, prompt, lane_prompt, *seen):
        cut = lambda x: x.reshape(-1, x.shape[1] // C, *x.shape[2:])  # noqa: E731
        lane_kernel = _kernel(q.shape[2], (slots, slots), (block, block), 0, join=True)
        lengths = (q.shape[1], region_k.shape[1])
        region_kernel = _kernel(q.shape[2], lengths, region_blocks, None, join=True)
        kernels = (region_kernel, *[lane_kernel] * len(seen))
        segments = [splash.SegmentIds(cut(x), cut(seen[0])) for x in seen]
        segments = (splash.SegmentIds(lane_prompt, prompt), *segments)
        own_kv = tuple(_by_head(cut(x)) for x in (k, v))
        kvs = ((_by_head(region_k), _by_head(region_v)), *[own_kv] * len(seen))
        return _by_head(_joined_splash(kernels, C, _by_head(q), kvs, segments))

    out = _on_own_part(local, by_head, ids)
    return out.reshape(X, C, -1, *out.shape[2:])[:, :, :T, :, :E].reshape(X, C * T, -1, E)


Kernels = tuple[splash.SplashAttentionKernel, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _joined_splash(
    kernels: Kernels, lanes: int, q_XHTE: jax.Array, kvs: Any, ids: Any
) -> jax.Array:
    """One softmax over several sets of keys: those of the region, then (queries cut into ``lanes``)
    sets of those in the query's own lane. The kernels give away their log-sum-exp, but no gradient
    of it: all therefore stand under one rule, whose backward pass gives each the joint result."""
    return _joined_forward(kernels, lanes, q_XHTE, kvs, ids)[0]


def _joined_forward(kernels, lanes, q, kvs, ids):
    out, (total,) = jax.vmap(kernels[0])(q, *kvs[0], ids[0])
    parts, cut_q = [(out, total)], _cut(q, lanes)
    for kernel, kv, own in zip(kernels[1:], kvs[1:], ids[1:], strict=True):
        out, (sums,) = jax.vmap(kernel)(cut_q, *kv, own)
        parts.append((_uncut(out, lanes), _uncut(sums, lanes)))
        total = jnp.logaddexp(total, parts[-1][1])
    # A set of which a query sees nothing has a log-sum-exp so low that it weighs nothing.
    shares = (jnp.exp(sums - total)[..., None] * out for out, sums in parts)
    out = functools.reduce(jnp.add, shares).astype(q.dtype)
    return out, (kernels, q, kvs, ids, out, total)


def _joined_backward(lanes, residuals, d_out):
    kernels, q, kvs, ids, out, total = residuals
    dq, *dkv = _splash_backward(kernels[0], q, kvs[0], ids[0], (out, total, d_out))
    whole, cut_q, dkvs = [_cut(x, lanes) for x in (out, total, d_out)], _cut(q, lanes), [tuple(dkv)]
    for kernel, kv, own in zip(kernels[1:], kvs[1:], ids[1:], strict=True):
        more, *dkv = _splash_backward(kernel, cut_q, kv, own, whole)
        dq += _uncut(more, lanes)
        dkvs.append(tuple(dkv))
    return None, dq, tuple(dkvs), None


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


def _kernel(
    heads: int,
    lengths: tuple[int, int],
    blocks: Sequence[int],
    offset: int | None,
    join: bool = False,
) -> splash.SplashAttentionKernel:
    """The kernel for these lengths, and blocks, of queries and keys; its block mask is computed on
    the host at trace time.

    Causal with the first query at ``offset``, unless that is None. ``join``: it gives its
    log-sum-exp too.
    """
    if offset is not None:
        block_mask = splash_mask.CausalMask(lengths, offset=offset)
    else:
        block_mask = splash_mask.FullMask(lengths)
    block_q, block_kv = blocks
    computed = next(n for n in COMPUTED if block_kv % n == 0)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=computed,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=computed,
        use_fused_bwd_kernel=True,  # five products instead of seven
    )
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([block_mask] * heads),
        block_sizes=sizes,
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
