"""A part of a decode step's softmax on NVIDIA GPUs, as one kernel (Pallas, through Triton).

Plain JAX writes the scores of all keys to memory and reads them again three times, and copies the
window of a ring out of it. Here a program holds the queries of one prompt (or slot) and key/value
head, goes over its keys where they lie, and writes what a softmax in parts needs. Few queries meet
many keys: the keys are divided among several programs, so that the GPU is full.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from srpo_jax.model.layers import partition_spec, target_platform
from srpo_jax.model.masks import MASKED

BLOCK = 64  # keys at a time
LEAST_ROWS = 16  # of a product of the tensor cores
MOST_ROWS = 128
PROGRAMS = 256  # about two for each multiprocessor

Part = tuple[jax.Array, jax.Array, jax.Array]


def refusal(q_ZCKME: jax.Array) -> str | None:
    """Why this kernel cannot take the queries; None if it can."""
    *_, M, E = q_ZCKME.shape
    if q_ZCKME.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {q_ZCKME.dtype}"
    if E & (E - 1) or not 16 <= E <= 256:
        return f"needs a head width that is a power of 2 from 16 to 256, not {E}"
    return f"takes at most {MOST_ROWS} queries of a key, not {M}" if M > MOST_ROWS else None


def part(q_ZCKME: jax.Array, kv_ZCKRE: tuple[jax.Array, jax.Array], visible_ZCS: jax.Array) -> Part:
    """The softmax over the first S of the R keys -> float32 weighted values [Z, C, K, M, E], not
    yet divided, with their maxima and sums [Z, C, K, M]."""
    args = (q_ZCKME, *kv_ZCKRE, visible_ZCS.astype(jnp.int32))
    specs = [partition_spec(x.shape, ("batch", None, "tensor", None, None)) for x in args[:3]]
    if specs[0] is None:
        return _on_device(*args)
    seen, result = PartitionSpec(specs[0][0]), PartitionSpec(*specs[0][:3])
    local = jax.shard_map(
        _on_device, in_specs=(*specs, seen), out_specs=(specs[0], result, result), check_vma=False
    )
    return local(*args)


def _on_device(
    q_ZCKME: jax.Array, keys_ZCKRE: jax.Array, values_ZCKRE: jax.Array, visible_ZCS: jax.Array
) -> Part:
    Z, C, K, M, E = q_ZCKME.shape
    B, S = Z * C, visible_ZCS.shape[-1]
    rows = max(LEAST_ROWS, 1 << (M - 1).bit_length())
    q = jnp.pad(q_ZCKME, ((0, 0),) * 3 + ((0, rows - M), (0, 0))).reshape(B, K, rows, E)
    keys, values = (x.reshape(B, K, *x.shape[3:]) for x in (keys_ZCKRE, values_ZCKRE))
    blocks = -(-S // BLOCK)
    each = -(-blocks // min(blocks, -(-PROGRAMS // (B * K))))  # blocks of a program
    splits = -(-blocks // each)

    whole = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, k, n: (b, k, 0, 0))  # noqa: E731
    own = pl.BlockSpec((None, None, None, rows), lambda b, k, n: (b, k, n, 0))
    result = jax.ShapeDtypeStruct((B, K, splits, rows), jnp.float32)
    out, peak, total = pl.pallas_call(
        functools.partial(_kernel, each=each, scale=E**-0.5),
        grid=(B, K, splits),
        in_specs=[
            whole(rows, E),
            whole(*keys.shape[2:]),
            whole(*values.shape[2:]),
            pl.BlockSpec((None, S), lambda b, k, n: (b, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, rows, E), lambda b, k, n: (b, k, n, 0, 0)),
            own,
            own,
        ],
        out_shape=[jax.ShapeDtypeStruct((*result.shape, E), jnp.float32), result, result],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=target_platform() not in ("gpu", "cuda"),
        name=f"decode_part_{S}",
    )(q, keys, values, visible_ZCS.reshape(B, S))
    found = _joined(out, peak, total)
    return tuple(x[:, :, :M].reshape(Z, C, K, M, *x.shape[3:]) for x in found)  # pyright: ignore


def _kernel(*refs: Any, each: int, scale: float) -> None:
    """Queries [M, E] over ``each`` blocks of keys and values [R, E]; seen [S] says which count."""
    q_ref, k_ref, v_ref, seen_ref, out_ref, peak_ref, total_ref = refs
    S, (M, E) = seen_ref.shape[0], q_ref.shape
    q, first = q_ref[...], pl.program_id(2) * each

    def body(i: jax.Array, carry: Part) -> Part:
        out, peak, total = carry
        start = (first + i) * BLOCK
        index = start + jnp.arange(BLOCK)
        inside, keys = index < S, pl.ds(start, BLOCK)
        load = functools.partial(triton.load, mask=inside[:, None], other=0.0)
        seen = triton.load(seen_ref.at[keys], mask=inside, other=0)
        logits = triton.dot(q, load(k_ref.at[keys, :]).T) * scale
        logits = jnp.where((seen != 0)[None], logits, MASKED)
        highest = jnp.maximum(peak, logits.max(axis=1))
        weights, share = jnp.exp(logits - highest[:, None]), jnp.exp(peak - highest)
        more = triton.dot(weights.astype(q.dtype), load(v_ref.at[keys, :]))
        return out * share[:, None] + more, highest, total * share + weights.sum(axis=1)

    nothing = jnp.zeros((M, E), jnp.float32), jnp.full((M,), -jnp.inf), jnp.zeros((M,))
    out_ref[...], peak_ref[...], total_ref[...] = jax.lax.fori_loop(0, each, body, nothing)


def _joined(out_BKNME: jax.Array, peak_BKNM: jax.Array, total_BKNM: jax.Array) -> Part:
    """Of N sets of keys together."""
    peak = peak_BKNM.max(2)
    share = jnp.exp(peak_BKNM - peak[:, :, None])
    return (out_BKNME * share[..., None]).sum(2), peak, (total_BKNM * share).sum(2)
