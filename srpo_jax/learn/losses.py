"""The weights with which tokens stand in a loss, and sums over them, as functions of arrays.

The loss of an update is ONE weighted sum over tokens, ``sum(weights_BT * x_BT)``. ``token_weights``
computes the weights from the masks of the WHOLE update batch, so that the sum over micro-batches,
devices and processes is the loss itself: no mean of means, no division by accumulation steps.
Everything here is float32 whatever the model computes in.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Aggregation = Literal["sequence", "token", "constant"]


def token_weights(
    length_B: jax.Array,
    weight_B: jax.Array,
    *,
    mode: Aggregation = "sequence",
    length_cap: int | None = None,
) -> jax.Array:
    """[B] weight of each token of a sequence, such that ``sum(weights * x)`` over all tokens is the
    aggregated loss.

    Pass the lengths of the whole update batch and slice the RESULT into micro-batches.
        sequence  w_b / (len_b * sum(w))       mean over each sequence, then over sequences (GRPO)
        token     w_b / sum(w * len)           mean over all tokens (DAPO)
        constant  w_b / (length_cap * sum(w))  no length bias (Dr. GRPO); ``length_cap`` is the
                                               configured limit, never the width of the batch
    ``w_b`` is ``weight_B``: 0 leaves a sequence out as if it were not in the batch. Sequences of
    length 0 are left out too. With nothing left all weights are 0 (no NaN).
    """
    length_B = length_B.astype(jnp.float32)
    weight_B = jnp.where(length_B > 0, weight_B.astype(jnp.float32), 0.0)
    if mode == "sequence":
        per_token_B = weight_B / jnp.maximum(length_B, 1.0)
        denominator = weight_B.sum()
    elif mode == "token":
        per_token_B, denominator = weight_B, jnp.sum(weight_B * length_B)
    elif mode == "constant":
        if not length_cap:
            raise ValueError("aggregation 'constant' needs length_cap, the completion token limit")
        per_token_B, denominator = weight_B, length_cap * weight_B.sum()
    else:
        raise ValueError(f"aggregation must be sequence, token or constant, not {mode!r}")
    return per_token_B / jnp.where(denominator > 0, denominator, 1.0)


def aggregate(x_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """``sum(weights * x)`` over tokens, float32; values at weight 0 are ignored, even NaN."""
    # Both branches of a `where` are differentiated: replace x first, so that no NaN gets through.
    x_BT = jnp.where(weights_BT != 0, x_BT.astype(jnp.float32), 0.0)
    return jnp.sum(x_BT * weights_BT)


def sft_weights(loss_mask_BT: jax.Array, valid_B: jax.Array) -> jax.Array:
    """Weights of the SFT cross-entropy: mean over the loss tokens of the WHOLE update batch.

    Entry t weighs the prediction of token t + 1 by the hidden state at t: ``Batch.loss_mask``
    shifted left by one (SRPO equation 1, as a token mean).
    """
    mask_BT = loss_mask_BT.astype(jnp.float32) * valid_B.astype(jnp.float32)[:, None]
    shifted = jnp.pad(mask_BT[:, 1:], ((0, 0), (0, 1)))
    total = shifted.sum()
    return shifted / jnp.where(total > 0, total, 1.0)


def weighted_first(weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Order in which each row's positions that have a weight stand before those that have none.

    Returns [B, T] int32 indices and ``count`` for `head`: the most such positions of any
    row. Of a conversation only the assistant's tokens have a weight, and a budget is mostly
    padding.
    """
    idle_BT = weights_BT == 0
    order_BT = jnp.argsort(idle_BT, axis=1, stable=True)
    return order_BT, (~idle_BT).sum(1, dtype=jnp.int32).max()


def sft_loss(logp_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Cross-entropy ``-sum(weights * logp)`` with the weights of ``sft_weights``, in nats."""
    return -aggregate(logp_BT, weights_BT)
