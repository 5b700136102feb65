"""Verdict arrays -> every reward term, on device.

Profiles: ``paper`` is equations 4-8 of SRPO (arXiv 2506.01713), whose printed constants differ
from those in the authors' two reward files, kept here as ``openrlhf`` and ``verl_fixed`` (the
latter with its chained comparisons mended); ``grpo`` is the control without any reflection reward.
Totals without f_len, where the format holds and the reflection counts:

    first -> final    paper   openrlhf   verl_fixed   grpo
    right -> right     1.50       1.25         .625    1.5
    wrong -> right     1.25       1.50         .75     1.5
    right -> wrong     1.00        .75         .125     .5
    wrong -> wrong      .75        .50         .25      .5
"""

import flax.struct
import jax.numpy as jnp

from srpo_jax.structs import Array, Verdict

PROFILES = ("paper", "openrlhf", "verl_fixed", "grpo")
ALPHA = 0.1  # weight of f_len


@flax.struct.dataclass
class RewardTerms:
    """The terms of a reward, each float32 of the verdict's shape.

    ``total == r_format + r_acc + i_eff + i_ref + alpha * f_len`` in every profile; a profile that
    pays both answers with one number has it in ``r_acc``.
    """

    r_format: Array
    r_acc: Array
    i_eff: Array
    i_ref: Array
    f_len: Array  # in [0, 1], not yet multiplied by alpha
    total: Array


def length_factor(total_tokens: Array, first_tokens: Array) -> Array:
    """f_len of equation 8: exp(-((L - 2k) / (0.5k))^2), k the first response's tokens; 0 for k = 0.

    1 at L = 2k, e^-1 at 1.5k and 2.5k: too short costs as much as too long.
    """
    length = jnp.asarray(total_tokens, jnp.float32)
    first = jnp.asarray(first_tokens, jnp.float32)
    base = jnp.maximum(first, 1.0)  # keeps the unused branch finite
    factor = jnp.exp(-jnp.square((length - 2.0 * base) / (0.5 * base)))
    return jnp.where(first > 0, factor, 0.0)


def compute_rewards(
    verdict: Verdict, profile: str = "paper", *, alpha: float = ALPHA
) -> RewardTerms:
    """Every reward term of a verdict of any leading shape, elementwise; ``profile`` is static.

    What a missing block would earn is 0; nothing raises on malformed completions. ValueError for
    an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    has_first = jnp.asarray(verdict.has_first, bool)
    has_second = jnp.asarray(verdict.has_second, bool)
    first = jnp.asarray(verdict.first_correct, bool) & has_first
    final = jnp.asarray(verdict.final_correct, bool) & has_first
    format_ok = jnp.asarray(verdict.format_ok, bool)
    zero = jnp.zeros(first.shape, jnp.float32)
    f_len = length_factor(verdict.total_tokens, verdict.first_tokens)
    i_eff = i_ref = zero

    if profile == "paper":
        r_format = jnp.where(format_ok & has_first, 0.5, zero)
        r_acc = jnp.where(first, 0.5, zero)
        second = has_first & has_second
        effect = _by_outcome(first, final, both=0.25, fixed=0.5, harmed=-0.25)
        i_eff = jnp.where(second, effect, zero)
        i_ref = jnp.where(second & jnp.asarray(verdict.reflection_ok, bool), 0.25, zero)
        f_len = jnp.where(second, f_len, zero)
    elif profile == "openrlhf":
        # Without two closed thinks and two closed answers the authors' code zeroes the sample.
        r_format = jnp.where(format_ok & has_second, 0.5, zero)
        outcome = _by_outcome(first, final, both=0.75, fixed=1.0, harmed=0.25)
        r_acc = jnp.where(has_second, outcome, zero)
        f_len = jnp.where(has_second, f_len, zero)
    elif profile == "verl_fixed":
        # Half of (accuracy table + format 0.5); first_tokens is 0 where blocks are missing.
        r_format = jnp.where(format_ok, 0.25, zero)
        r_acc = 0.5 * _by_outcome(first, final, both=0.75, fixed=1.0, harmed=-0.25)
    else:
        r_format = jnp.where(format_ok, 0.5, zero)
        r_acc = jnp.where(final, 1.0, zero)
        f_len = zero

    total = r_format + r_acc + i_eff + i_ref + jnp.float32(alpha) * f_len
    return RewardTerms(r_format, r_acc, i_eff, i_ref, f_len, total)


def _by_outcome(first: Array, final: Array, *, both: float, fixed: float, harmed: float) -> Array:
    """A float32 by (first answer, final answer): right-right, wrong-right, right-wrong, else 0."""
    kept = jnp.where(first, jnp.float32(both), jnp.float32(fixed))
    lost = jnp.where(first, jnp.float32(harmed), jnp.float32(0.0))
    return jnp.where(final, kept, lost)
