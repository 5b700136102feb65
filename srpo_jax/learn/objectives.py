"""What is minimised for each token: policy-gradient losses, KL to the reference, corrections.

Everything is float32 and of one shape, tokens of any number of samples together; ``Samples`` says
which token belongs to which, where an objective needs to know.
"""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

KlKind = Literal["k1", "k2", "k3", "k3+"]
ObjectiveKind = Literal["clip", "gspo", "cispo", "sapo"]
Level = Literal["token", "sequence"]

# Log-ratios are clamped to +-20 before exp: e**20 is far outside any clip range, and a token whose
# probability collapsed must not turn the loss into inf or NaN.
MAX_LOG_RATIO = 20.0


@flax.struct.dataclass
class Samples:
    """Which sample each token [M, Y] belongs to, counted in its row, and whether it counts."""

    of_token: jax.Array
    counted: jax.Array
    number: int = flax.struct.field(pytree_node=False)  # of samples in a row

    def sum(self, x: jax.Array) -> jax.Array:
        """At each token the sum over the counted tokens of its sample."""

        def in_row(x_Y: jax.Array, sample_Y: jax.Array) -> jax.Array:
            return jnp.zeros(self.number, x_Y.dtype).at[sample_Y].add(x_Y, mode="drop")[sample_Y]

        return jax.vmap(in_row)(jnp.where(self.counted, x, 0.0), self.of_token)

    def mean(self, x: jax.Array) -> jax.Array:
        """At each token the mean over the counted tokens of its sample."""
        return self.sum(x) / jnp.maximum(self.sum(jnp.ones_like(x)), 1.0)


def ratio_of(logp: jax.Array, old_logp: jax.Array) -> jax.Array:
    """``exp(logp - old_logp)``, the log-ratio clamped."""
    return jnp.exp(jnp.clip(logp - old_logp, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def sequence_ratio(logp: jax.Array, old_logp: jax.Array, samples: Samples) -> jax.Array:
    """At each token the geometric mean of its sample's ratios (GSPO, arXiv 2507.18071, eq. 7)."""
    d = jnp.clip(logp - old_logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.exp(samples.mean(d))


def clipped_loss(
    ratio: jax.Array,
    advantage: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy-gradient loss per token, and what to log about it.

    ``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)`` (PPO, arXiv 1707.06347 equation 7;
    SRPO equation 2; separate bounds as in DAPO, arXiv 2503.14476). ``dual_clip=c`` bounds the
    objective below by ``c A`` where A < 0 (arXiv 1912.09729), so that a huge ratio cannot dominate.

    Returns:
        loss like ``ratio``; bool arrays ``clip_low``, ``clip_high`` and ``clip_dual``, true where
        that bound holds back the gradient.
    """
    objective = jnp.minimum(
        ratio * advantage, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage
    )
    dual = jnp.zeros_like(objective, bool)
    if dual_clip is not None:
        dual = (advantage < 0) & (ratio > dual_clip)
        objective = jnp.where(dual, dual_clip * advantage, objective)
    return -objective, {
        "clip_low": (advantage < 0) & (ratio < 1.0 - clip_low),
        "clip_high": (advantage > 0) & (ratio > 1.0 + clip_high),
        "clip_dual": dual,
    }


def cispo_loss(
    ratio: jax.Array, logp: jax.Array, advantage: jax.Array, clip_high: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """``-min(rho, 1 + clip_high) A logp``, no gradient through the ratio: every token learns, with
    a bounded weight (CISPO, MiniMax-M1, arXiv 2506.13585 equation 4, without a lower bound)."""
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, 1.0 + clip_high))
    return -weight * advantage * logp, {"clip_high": ratio > 1.0 + clip_high}


def sapo_loss(
    ratio: jax.Array, advantage: jax.Array, *, positive: float = 1.0, negative: float = 1.05
) -> jax.Array:
    """``-(4 / t) sigmoid(t (rho - 1)) A`` with temperature t by the sign of A: a soft trust region,
    whose gradient at a ratio of 1 is that of ``-rho A`` (SAPO, arXiv 2511.20347)."""
    t = jnp.where(advantage > 0, positive, negative)
    return -jax.nn.sigmoid(t * (ratio - 1.0)) * 4.0 / t * advantage


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, kind: KlKind = "k3") -> jax.Array:
    """Per-token estimate of KL(policy || reference) from samples of the policy (Schulman, 2020).

    With ``d = ref_logp - logp`` clamped to +-20 (no gradient beyond):
        k1  = -d             unbiased, may be negative; its GRADIENT has expectation 0 in a loss
        k2  = d**2 / 2       biased; its gradient is that of the KL
        k3  = exp(d) - 1 - d unbiased, never negative (GRPO's choice)
        k3+ the value of k3 with the gradient of k2
    Each is 0 where policy and reference agree, and adding it to the loss pulls the policy towards
    the reference.
    """
    d = jnp.clip(ref_logp - logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * jnp.square(d)
    if kind == "k3":
        return jnp.expm1(d) - d
    if kind == "k3+":
        k2 = 0.5 * jnp.square(d)
        return k2 + jax.lax.stop_gradient(jnp.expm1(d) - d - k2)
    raise ValueError(f"kl kind must be k1, k2, k3 or k3+, not {kind!r}")


MAX_PERCEPTION = 10.0  # nats: what is maximised needs a bound, this is that of PAPO's code


def perception_kl(logp: jax.Array, masked_logp: jax.Array) -> jax.Array:
    """Per-token k3 estimate of KL(policy || the same policy with masked images), to be raised
    (PAPO, arXiv 2507.06448); from 10 nats on without a gradient."""
    return jnp.minimum(kl_estimate(logp, masked_logp, "k3"), MAX_PERCEPTION)


def importance_weight(
    old_logp: jax.Array,
    sample_logp: jax.Array,
    *,
    cap: float,
    floor: float | None = None,
    samples: Samples | None = None,
) -> jax.Array:
    """``pi_trainer / pi_sampler`` at each token, bounded, no gradient.

    Corrects for a sampler whose probabilities differ from the trainer's (other kernels, other
    precision, top-p); the cap bounds the variance.

    Args:
        cap: larger weights are cut down to it (TIS) or, with a ``floor``, become 0.
        floor: smaller weights become 0, too: what the two disagree on is left out (IcePop).
        samples: where given, the ratio is that of the whole sample.
    """
    d = old_logp - sample_logp
    if samples is not None:
        d = samples.sum(d)
    weight = jnp.exp(jnp.clip(d, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    if floor is None:
        weight = jnp.minimum(weight, cap)
    else:
        weight = jnp.where((weight >= floor) & (weight <= cap), weight, 0.0)
    return jax.lax.stop_gradient(weight)
