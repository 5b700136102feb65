"""Log-probs of tokens, and the weights with which they stand in a loss, as functions of arrays.

The loss of an update is ONE weighted sum over tokens, ``sum(weights_BT * x_BT)``. ``token_weights``
computes the weights from the masks of the WHOLE update batch, so that the sum over micro-batches,
devices and processes is the loss itself: no mean of means, no division by accumulation steps.
Everything here is float32 whatever the model computes in.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Aggregation = Literal["sequence", "token", "constant"]

# Logit of a forbidden token. Finite, because 0 * (-inf) is NaN where a forbidden id stands in a
# masked position; exp(-1e30 - max) is exactly 0 all the same.
FORBIDDEN_LOGIT = -1e30


def token_logps(
    h_BTD: jax.Array,
    targets_BT: jax.Array,
    head_DV: jax.Array,
    *,
    temperature: float = 1.0,
    forbidden_ids: tuple[int, ...] = (),
    chunk: int = 128,
    count: jax.Array | None = None,
    entropy_grad: bool = False,
    cast_DV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # nine: three arrays, and switches that are each off by default
    """Log-probability of each target and entropy of each position, without a [B, T, V] array.

    A scan over chunks of the time axis (the batch axis may be sharded, the time axis is not) whose
    body is rematerialised: forward and backward hold [B, chunk, V] float32 logits at a time.

    Args:
        h_BTD: final hidden states; position t predicts ``targets_BT[:, t]``.
        targets_BT: int token ids.
        head_DV: output embedding. The products take it in the dtype of ``h_BTD``; its gradient is
            summed over the chunks in its own.
        temperature: logits are divided by it, as the sampler does.
        forbidden_ids: tokens that the sampler cannot draw; their probability is 0.
        chunk: positions per chunk; chunks are evened out, the last one is padded.
        count: int32 scalar: nothing is wanted of the positions from here on. Chunks beyond it are
            left out, forward and backward; their results are 0.
        entropy_grad: let gradients flow through the entropy (needed for an entropy bonus only).
        cast_DV: the head in the dtype of ``h_BTD``, where the caller has it; nothing else of
            ``head_DV`` is then read than where its gradient goes.

    Returns:
        logp_BT, entropy_BT: float32, in nats. A forbidden target gets about -1e30, which is finite.
    """
    b, t, d = h_BTD.shape
    wanted = t if count is None else count
    n = -(-t // max(1, min(chunk, t)))
    c = -(-t // n)
    pad = n * c - t
    h_NBCD = jnp.pad(h_BTD, ((0, 0), (0, pad), (0, 0))).reshape(b, n, c, d).swapaxes(0, 1)
    targets_NBC = jnp.pad(targets_BT, ((0, 0), (0, pad))).reshape(b, n, c).swapaxes(0, 1)

    # Cast once: inside the scan the whole head would be read, cast and written for every chunk.
    if cast_DV is None:
        cast_DV = head_DV.astype(h_BTD.dtype)
    cast_DV = jax.lax.stop_gradient(cast_DV)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def compute(h_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        head = _with_gradient_to(cast_DV, head_DV)
        logits = _chunk_logits(h_BCD, head, temperature, forbidden_ids)
        logp, entropy = _logp_and_entropy(logits, targets_BC)
        return logp, entropy if entropy_grad else jax.lax.stop_gradient(entropy)

    def leave_out(h_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        nothing_BC = (targets_BC * 0).astype(jnp.float32)  # divided over devices as results are
        return nothing_BC, nothing_BC

    # The outer one keeps the scan from stacking what the choice saves: the head, once per chunk.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def choose(start: jax.Array, *x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.cond(start < wanted, compute, leave_out, *x)

    def body(start, x):
        return start + c, compute(*x) if count is None else choose(start, *x)

    _, (logp_NBC, entropy_NBC) = jax.lax.scan(body, jnp.int32(0), (h_NBCD, targets_NBC))
    join = lambda x: x.swapaxes(0, 1).reshape(b, n * c)[:, :t]  # noqa: E731
    return join(logp_NBC), join(entropy_NBC)


@jax.custom_vjp
def _with_gradient_to(cast: jax.Array, x: jax.Array) -> jax.Array:
    """``cast``, which is ``x`` in another dtype; its gradient goes to ``x``, in ``x``'s own."""
    return cast


_with_gradient_to.defvjp(
    lambda cast, x: (cast, x[:0]),  # of x only the dtype
    lambda x, gradient: (None, gradient.astype(x.dtype)),
)


def _chunk_logits(
    h_BCD: jax.Array, head_DV: jax.Array, temperature: float, forbidden_ids: tuple[int, ...]
) -> jax.Array:
    """float32 logits [B, C, V] of one chunk, divided by the temperature, forbidden ids cut out."""
    logits = jnp.einsum("bcd,dv->bcv", h_BCD, head_DV, preferred_element_type=jnp.float32)
    if temperature != 1.0:
        logits = logits / temperature
    if forbidden_ids:
        forbidden_V = np.zeros(head_DV.shape[1], bool)
        forbidden_V[list(forbidden_ids)] = True
        logits = jnp.where(forbidden_V[None, None, :], FORBIDDEN_LOGIT, logits)
    return logits


def _logp_and_entropy(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-softmax at the targets, and ``H = logsumexp(z) - sum(p z)``; z is shifted by its max."""
    shifted = logits_BCV - jax.lax.stop_gradient(logits_BCV.max(-1, keepdims=True))
    exp = jnp.exp(shifted)
    total = exp.sum(-1)
    # A masked sum, not a gather: with the vocabulary sharded, a gather would collect all logits.
    ids = jax.lax.broadcasted_iota(targets_BC.dtype, shifted.shape, 2)
    picked = jnp.sum(jnp.where(ids == targets_BC[..., None], shifted, 0.0), -1)
    log_total = jnp.log(total)
    return picked - log_total, log_total - jnp.sum(exp * shifted, -1) / total


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

    Returns [B, T] int32 indices and ``count`` for ``token_logps``: the most such positions of any
    row. Of a conversation only the assistant's tokens have a weight, and a budget is mostly
    padding.
    """
    idle_BT = weights_BT == 0
    order_BT = jnp.argsort(idle_BT, axis=1, stable=True)
    return order_BT, (~idle_BT).sum(1, dtype=jnp.int32).max()


def sft_loss(logp_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Cross-entropy ``-sum(weights * logp)`` with the weights of ``sft_weights``, in nats."""
    return -aggregate(logp_BT, weights_BT)
