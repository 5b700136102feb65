"""What reward designs are made of (profiles.py): a reward's terms, and how they come about.

Everything is elementwise over verdicts of any leading shape and runs under ``jax.jit``.
"""

import flax.struct
import jax
import jax.numpy as jnp

from srpo_jax.structs import Array, Verdict

ALPHA = 0.1  # weight of f_len


@flax.struct.dataclass
class RewardTerms:
    """The terms of a reward, each float32 of the verdict's shape; made by ``add_up``."""

    r_format: jax.Array
    r_acc: jax.Array
    i_eff: jax.Array
    i_ref: jax.Array
    f_len: jax.Array  # in [0, 1], not yet multiplied by alpha
    total: jax.Array


def add_up(
    alpha: float,
    *,
    r_format: Array | float = 0.0,
    r_acc: Array | float = 0.0,
    i_eff: Array | float = 0.0,
    i_ref: Array | float = 0.0,
    f_len: Array | float = 0.0,
) -> RewardTerms:
    """``total = r_format + r_acc + i_eff + i_ref + alpha * f_len``; what is not given is 0."""
    terms = (jnp.asarray(x, jnp.float32) for x in (r_format, r_acc, i_eff, i_ref, f_len))
    r_format, r_acc, i_eff, i_ref, f_len = jnp.broadcast_arrays(*terms)
    total = r_format + r_acc + i_eff + i_ref + jnp.float32(alpha) * f_len
    return RewardTerms(r_format, r_acc, i_eff, i_ref, f_len, total)


def right_answers(verdict: Verdict) -> tuple[jax.Array, jax.Array]:
    """Whether the first and the final answer are right; without an answer neither is."""
    return verdict.first_correct & verdict.has_first, verdict.final_correct & verdict.has_first


def by_outcome(verdict: Verdict, *, both: float, fixed: float, harmed: float) -> jax.Array:
    """A float32 by (first answer, final answer): right-right, wrong-right, right-wrong, else 0."""
    first, final = right_answers(verdict)
    kept = jnp.where(first, jnp.float32(both), jnp.float32(fixed))
    lost = jnp.where(first, jnp.float32(harmed), jnp.float32(0.0))
    return jnp.where(final, kept, lost)


def length_factor(total_tokens: Array, first_tokens: Array) -> jax.Array:
    """f_len of equation 8: exp(-((L - 2k) / (0.5k))^2), k the first response's tokens; 0 for k = 0.

    1 at L = 2k, e^-1 at 1.5k and 2.5k: too short costs as much as too long.
    """
    length = jnp.asarray(total_tokens, jnp.float32)
    first = jnp.asarray(first_tokens, jnp.float32)
    base = jnp.maximum(first, 1.0)  # keeps the unused branch finite
    factor = jnp.exp(-jnp.square((length - 2.0 * base) / (0.5 * base)))
    return jnp.where(first > 0, factor, 0.0)
