"""What reward designs are made of (profiles.py): a reward's terms, and how they come about.

Everything is elementwise over verdicts of any leading shape and runs under ``jax.jit``.
"""

import functools
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from srpo_jax.structs import Array, Verdict

ALPHA = 0.1  # weight of f_len


TERMS = ("r_format", "r_acc", "i_eff", "i_ref", "f_len")  # of every profile, 0 where it has none


@flax.struct.dataclass
class RewardTerms:
    """The terms of a reward by name, not yet weighted, and what they are worth together; each
    float32 of the verdict's shape. Made by ``add_up``."""

    parts: dict[str, jax.Array]
    total: jax.Array


def add_up(parts: Mapping[str, Array], weights: Mapping[str, float]) -> RewardTerms:
    """``total = sum(weight * part)``, where a weight that is not given is 1.

    TERMS that are not among the parts are 0. ValueError for a weight of no term.
    """
    shape = jnp.broadcast_shapes(*(jnp.shape(part) for part in parts.values()))
    parts = {name: jnp.zeros(shape) for name in TERMS} | dict(parts)
    if unknown := sorted(set(weights) - set(parts)):
        raise ValueError(f"weights of {unknown}, but the terms are {sorted(parts)}")
    parts = {k: jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for k, x in parts.items()}
    weighted = (x * jnp.float32(weights.get(name, 1.0)) for name, x in parts.items())
    return RewardTerms(parts, functools.reduce(jnp.add, weighted))


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


def excess_factor(tokens: Array, budget: Array) -> jax.Array:
    """1 up to the budget, exp(-((L - k) / (0.5k))^2) beyond it; 0 for a budget of 0."""
    length, budget = (jnp.asarray(x, jnp.float32) for x in (tokens, budget))
    base = jnp.maximum(budget, 1.0)
    factor = jnp.exp(-jnp.square(jnp.maximum(length - base, 0.0) / (0.5 * base)))
    return jnp.where(budget > 0, factor, 0.0)


def stated_rightly(verdict: Verdict) -> jax.Array:
    """1 where the reflection states whether the first answer is right, and is right about that, -1
    where it is wrong about it, 0 where it states nothing (RefGRPO, arXiv 2606.14211)."""
    truth = jnp.where(right_answers(verdict)[0], 1, -1)
    return jnp.where(verdict.has_first, truth * verdict.stated, 0).astype(jnp.float32)


def price(verdict: Verdict) -> jax.Array:
    """Minus the tokens of a response whose final answer is right, 0 of any other.

    So the price orders right responses among themselves, and brevity never pays for an error.
    """
    tokens = jnp.asarray(verdict.total_tokens, jnp.float32)
    return jnp.where(right_answers(verdict)[1], -tokens, 0.0)


def overlong(tokens: Array, cap: int, buffer: int) -> jax.Array:
    """Soft penalty of the last ``buffer`` tokens before the cap: from 0 down to -1 (DAPO, arXiv
    2503.14476, equation 13)."""
    over = jnp.asarray(tokens, jnp.float32) - (cap - buffer)
    return -jnp.clip(over / buffer, 0.0, 1.0)
