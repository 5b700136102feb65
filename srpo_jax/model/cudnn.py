"""cuDNN's fused attention on NVIDIA GPUs.

A row that is one segment is told by its length: nothing of size T x S exists, and tiles beyond the
length or the diagonal are skipped. Any other mask has to be a bias. The kernel skips what is above
a diagonal that begins in the first column; of any other, as that of a lane behind its prompts, it
skips nothing: there the queries are cut up, so that most of what they do not see is not there.

cuDNN's packed layout is not used: jax has no public name for it and compiles it on a GPU that is
there only, and several completions cannot share the keys of their prompt in it.
"""

import jax
import jax.numpy as jnp

from srpo_jax.model.layers import shard
from srpo_jax.model.masks import UNUSED_SEGMENT, Mask, mask_ids, pad_to, visible

PARTS = 4  # of the queries: 5/8 of a lane's square is left
SHORTEST_PART = 256  # queries; two tiles of the kernel
# Keys in multiples of its tiles: of a last tile that is half empty its backward pass makes NaN
# where all logits are low, which some heads of Qwen2.5 have (pytorch issue 196678).
TILE = 128


def refusal(q_BTHE: jax.Array) -> str | None:
    """Why this kernel cannot take the query; None if it can."""
    if q_BTHE.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {q_BTHE.dtype}"
    if q_BTHE.shape[-1] % 8 or q_BTHE.shape[-1] > 128:
        return f"needs a head width that 8 divides and up to 128, not {q_BTHE.shape[-1]}"
    return None


def attend(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, mask: Mask) -> jax.Array:
    """Attention; the logits never exist. Raises ValueError for what the kernel cannot take."""
    if why := refusal(q_BTHE):
        raise ValueError(f"attention=cudnn {why}; set dtype or attention=xla")
    attend = _by_length if mask.single else _by_bias
    return attend(q_BTHE, k_BSKE, v_BSKE, mask)


def _by_length(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """Of rows that are one segment each."""
    real_BT = mask.q_segments_BT == mask.q_segments_BT[:, :1]
    lengths_B = shard(real_BT.sum(1, dtype=jnp.int32), "batch")
    # What the kernel writes beyond a length, forward and backward, is nobody's business.
    clean = lambda x: jnp.where(real_BT[..., None, None], x, 0)  # noqa: E731
    out = jax.nn.dot_product_attention(
        *map(clean, (q, k, v)),
        is_causal=mask.causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
    return clean(out)


def _by_bias(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """Of any mask, as [B, 1, t, s] for each part of the queries and the keys that it may see."""
    T = q.shape[1]
    q_ids, kv_ids = mask_ids(mask)
    # A key of padding is seen by nobody; a query of padding (lengths must be even) repeats the last
    # segment, so that it sees something.
    q, k, v = pad_to(q, 2, (1,)), pad_to(k, TILE, (1,)), pad_to(v, TILE, (1,))
    q_ids = jnp.pad(q_ids, ((0, 0), (0, T % 2), (0, 0)), mode="edge")
    kv_ids = pad_to(kv_ids.astype(jnp.int32), TILE, (1,), UNUSED_SEGMENT)
    parts = []
    for start, stop, end in query_parts(q.shape[1], k.shape[1], mask):
        queries, keys = slice(start, stop), slice(0, end)
        index = jnp.arange(start, stop) + mask.q_offset
        seen = visible(q_ids[:, queries], kv_ids[:, keys], mask.causal, index)
        part = jax.nn.dot_product_attention(
            *(q[:, queries], k[:, keys], v[:, keys]),
            mask=seen[:, None],
            is_causal=mask.causal and not mask.q_offset,
            implementation="cudnn",
        )
        parts.append(part)
    return jnp.concatenate(parts, axis=1)[:, :T]


def query_parts(T: int, S: int, mask: Mask) -> list[tuple[int, int, int]]:
    """(first query, end of the queries, end of the keys) of each kernel call."""
    if not mask.causal or not mask.q_offset:
        return [(0, T, S)]
    good = lambda n: T % (2 * n) == 0 and T // n >= SHORTEST_PART  # noqa: E731
    size = T // next((n for n in (PARTS, 2) if good(n)), 1)
    stops = range(size, T + 1, size)
    return [(n - size, n, min(S, -(-(n + mask.q_offset) // TILE) * TILE)) for n in stops]
