"""Advantages: rewards of a group's samples against a baseline, and what they are divided by.

All functions take rewards [P, G] (G samples of P prompts) and give float32 of that shape. A sample
whose reward equals its baseline's rewards gets exactly 0, and so does one that is alone.
"""

from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp

AdvantageKind = Literal["group", "centred", "rloo", "batch_std"]
Credit = Literal["whole", "segments"]


def advantages(
    reward_PG: jax.Array,
    kind: AdvantageKind = "group",
    *,
    eps: float = 1e-6,
    counted_PG: jax.Array | None = None,
    alike_PG: jax.Array | None = None,
) -> jax.Array:
    """``r - baseline``, the mean reward of the group, scaled as ``kind`` says.

        group      / (std + eps), the group's unbiased standard deviation: GRPO (DeepSeekMath, arXiv
                   2402.03300 section 4.1.2; SRPO equation 3)
        centred    as it is: Dr. GRPO (arXiv 2503.20783)
        rloo       * n / (n - 1): the mean of the other samples is the baseline (arXiv 2402.14740)
        batch_std  / (std + eps) of all centred rewards of the update: REINFORCE++ with a group
                   baseline (arXiv 2501.03262)

    A small ``eps`` makes a group that differs by 1e-3 in a minor term count as much as one that
    differs by 1.

    Args:
        counted_PG: which samples ``batch_std`` looks at; None: all.
        alike_PG: only samples of the group with an equal entry stand in a sample's baseline (a
            baseline may depend on whatever came before the tokens that it serves). None: all do.
    """
    reward_PG = reward_PG.astype(jnp.float32)
    if alike_PG is None:
        alike_PG = jnp.zeros(reward_PG.shape, jnp.int32)
    alike_PGG = alike_PG[:, :, None] == alike_PG[:, None, :]
    n_PG = alike_PGG.sum(-1).astype(jnp.float32)
    baseline_PG = jnp.sum(jnp.where(alike_PGG, reward_PG[:, None, :], 0.0), -1) / n_PG
    # The rounded mean of equal numbers need not be that number: compare instead of trusting it.
    highest, lowest = (
        pick(jnp.where(alike_PGG, reward_PG[:, None, :], far), -1)
        for pick, far in ((jnp.max, -jnp.inf), (jnp.min, jnp.inf))
    )
    centred_PG = jnp.where(highest > lowest, reward_PG - baseline_PG, 0.0)
    if kind == "centred":
        return centred_PG
    if kind == "rloo":
        return centred_PG * n_PG / jnp.maximum(n_PG - 1.0, 1.0)
    if kind == "group":
        var_P1 = jnp.square(centred_PG).sum(1, keepdims=True) / max(1, reward_PG.shape[1] - 1)
        return centred_PG / (jnp.sqrt(var_P1) + eps)
    if kind == "batch_std":
        return over_batch_std(centred_PG, eps, counted_PG)
    raise ValueError(f"advantage must be group, centred, rloo or batch_std, not {kind!r}")


def families(x_PG: jax.Array, forks: int) -> jax.Array:
    """[P, n, M]: the G samples as n families of M = ``forks``, one after the other."""
    return x_PG.reshape(len(x_PG), -1, forks)


def over_batch_std(centred_PG: jax.Array, eps: float, counted_PG: jax.Array | None) -> jax.Array:
    """Centred values over their standard deviation in the whole update."""
    counted = jnp.ones(centred_PG.shape, bool) if counted_PG is None else counted_PG
    squares = jnp.sum(jnp.where(counted, jnp.square(centred_PG), 0.0))
    var = squares / jnp.maximum(counted.sum() - 1.0, 1.0)
    return centred_PG / (jnp.sqrt(var) + eps)


def of_terms(
    terms: Iterable[tuple[float, jax.Array]],
    *,
    eps: float = 1e-6,
    counted_PG: jax.Array | None = None,
    alike_PG: jax.Array | None = None,
) -> jax.Array:
    """Each (weight, reward term) normalised in its group, added up, and normalised over the batch.

    GDPO (arXiv 2601.05242). A term of small weight stays small in a group that is tied in all
    others, where the normalised sum of the terms would make it as large as any.
    """
    parts = (
        weight * advantages(term_PG, "group", eps=eps, alike_PG=alike_PG)
        for weight, term_PG in terms
    )
    return over_batch_std(sum(parts, jnp.float32(0)), eps, counted_PG)


def has_signal(reward_PG: jax.Array) -> jax.Array:
    """Whether the rewards of each group differ at all, [P] bool."""
    return reward_PG.max(1) > reward_PG.min(1)
