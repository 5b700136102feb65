"""The output head: log-probs of tokens, and losses over them, in chunks; no [B, T, V] array exists.

``token_logps`` gives the log-probs. ``token_loss`` goes on to a loss that is a sum over tokens, and
makes its gradient in the same pass: once a chunk's log-probs are known, so is what each of them
weighs in the loss, and the chunk's logits serve forward and backward pass. Three matrix products a
chunk instead of four. Everything that is not a product of matrices is float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from srpo_jax.model.layers import BATCH_AXES, shard
from srpo_jax.model.qwen2_5_vl import Qwen2_5_VL

# Logit of a forbidden token. Finite, because 0 * (-inf) is NaN where a forbidden id stands in a
# masked position; exp(-1e30 - max) is exactly 0 all the same.
FORBIDDEN_LOGIT = -1e30


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """How logits become probabilities, and how many exist at a time."""

    chunk: int = 128  # positions of a row; chunks are evened out, the last one is padded
    temperature: float = 1.0  # logits are divided by it, as the sampler does
    forbidden_ids: tuple[int, ...] = ()  # what the sampler cannot draw: of probability 0
    entropy_grad: bool = False  # the entropy has a gradient (needed for an entropy bonus only)


class TokenLoss(NamedTuple):
    """A loss that is a sum over tokens, so that chunks of them add up to it.

    ``of_tokens(logp_BC, entropy_BC, tokens) -> (loss, aux)``, for ``tokens`` of any tree of arrays
    [B, C]; of zeros alone both must be those of no token. ``combine`` joins aux that are stacked
    on a leading axis.
    """

    of_tokens: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    combine: Callable[[Any], Any]
    head: HeadConfig


def token_logps(
    h_BTD: jax.Array,
    targets_BT: jax.Array,
    head_DV: jax.Array,
    cfg: HeadConfig,
    *,
    count: jax.Array | None = None,
    cast_DV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of each position.

    A scan over chunks of the time axis (the batch axis may be sharded, the time axis is not) whose
    body is rematerialised: forward and backward hold [B, chunk, V] float32 logits at a time.

    Args:
        h_BTD: final hidden states; position t predicts ``targets_BT[:, t]``.
        targets_BT: int token ids.
        head_DV: output embedding. The products take it in the dtype of ``h_BTD``; its gradient is
            summed over the chunks in its own.
        count: int32 scalar: nothing is wanted of the positions from here on. Chunks beyond it are
            left out, forward and backward; their results are 0.
        cast_DV: the head in the dtype of ``h_BTD``, where the caller has it; nothing else of
            ``head_DV`` is then read than where its gradient goes.

    Returns:
        logp_BT, entropy_BT: float32, in nats. A forbidden target gets about -1e30, which is finite.
    """
    t = h_BTD.shape[1]
    wanted = t if count is None else count
    c = _even(t, cfg.chunk)
    h_NBCD, targets_NBC = (jnp.moveaxis(_split(x, c), 1, 0) for x in (h_BTD, targets_BT))
    # Cast once: inside the scan the whole head would be read, cast and written for every chunk.
    if cast_DV is None:
        cast_DV = head_DV.astype(h_BTD.dtype)
    cast_DV = jax.lax.stop_gradient(cast_DV)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def compute(h_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _chunk_logits(h_BCD, _with_gradient_to(cast_DV, head_DV), cfg)
        logp, entropy, *_ = _logp_and_entropy(logits, targets_BC)
        return logp, entropy if cfg.entropy_grad else jax.lax.stop_gradient(entropy)

    def leave_out(h_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        nothing_BC = (targets_BC * 0).astype(jnp.float32)  # divided over devices as results are
        return nothing_BC, nothing_BC

    # The outer one keeps the scan from stacking what the choice saves: the head, once per chunk.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def choose(start: jax.Array, *x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.cond(start < wanted, compute, leave_out, *x)

    def body(start, x):
        return start + c, compute(*x) if count is None else choose(start, *x)

    _, found = jax.lax.scan(body, jnp.int32(0), (h_NBCD, targets_NBC))
    logp_BT, entropy_BT = (jnp.moveaxis(x, 0, 1).reshape(len(x[0]), -1)[:, :t] for x in found)
    return logp_BT, entropy_BT


def token_loss(
    h_BTD: jax.Array,
    targets_BT: jax.Array,
    head_DV: jax.Array,
    tokens: Any,
    loss: TokenLoss,
    *,
    count: jax.Array,
    cast_DV: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """``loss`` over the first ``count`` positions of each row -> (loss, aux).

    Arguments as those of ``token_logps``; ``tokens`` is a tree of arrays [B, T] for
    ``loss.of_tokens``. Has a gradient by ``h_BTD`` and ``head_DV``, which is made in the forward
    pass; products of the gradient take its logits in the dtype of ``h_BTD``.
    """
    cast_DV = head_DV.astype(h_BTD.dtype) if cast_DV is None else cast_DV
    run = functools.partial(_run_chunks, loss, size=head_DV.shape)

    @jax.custom_vjp
    def whole(h_BTD, head_DV, cast_DV, rest, count):
        return run((h_BTD, *rest), cast_DV, count, with_gradient=False)[0]

    def forward(h_BTD, head_DV, cast_DV, rest, count):
        out, grads = run((h_BTD, *rest), cast_DV, count, with_gradient=True)
        return out, (grads, h_BTD[:0], head_DV[:0])

    def backward(saved, cotangents):
        grads, *like = saved
        scaled = [(g * cotangents[0]).astype(x.dtype) for g, x in zip(grads, like, strict=True)]
        return *scaled, None, None, None

    whole.defvjp(forward, backward)
    cast_DV = jax.lax.stop_gradient(cast_DV)
    return whole(h_BTD, head_DV, cast_DV, (targets_BT, tokens), count)


def _run_chunks(
    loss: TokenLoss,
    inputs: tuple[jax.Array, jax.Array, Any],
    cast_DV: jax.Array,
    count: jax.Array,
    *,
    size: tuple[int, ...],
    with_gradient: bool,
) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, jax.Array] | None]:
    """(loss, aux), and the gradients by hidden states and head, where they are asked for.

    ``inputs``: hidden states, targets and tokens.
    """
    h_BTD, targets_BT, tokens = inputs
    B, T, _ = h_BTD.shape
    c = _even(T, loss.head.chunk)
    inputs = jax.tree.map(lambda x: _split(x, c), inputs)
    vary = functools.partial(_vary_as, targets_BT)
    none_B1 = jnp.zeros((B, 1), jnp.float32)
    nothing = loss.of_tokens(none_B1, none_B1, jax.tree.map(lambda x: x[:, :1] * 0, tokens))
    grads = (jnp.zeros_like(inputs[0]), jnp.zeros(size, jnp.float32)) if with_gradient else None

    def body(i: jax.Array, carry: Any) -> Any:
        (total, aux), grads = carry
        h_BCD, targets_BC, tokens = jax.tree.map(lambda x: x[:, i], inputs)
        logits = _chunk_logits(h_BCD, cast_DV, loss.head)
        logp, entropy, logp_BCV = _logp_and_entropy(logits, targets_BC)
        of_these = lambda logp, entropy: loss.of_tokens(logp, entropy, tokens)  # noqa: E731
        more, back, aux_more = jax.vjp(of_these, logp, entropy, has_aux=True)
        if grads is not None:
            dlogp, dentropy = back(jnp.ones_like(more))
            slopes = (dlogp, dentropy, entropy)
            dlogits = _logit_gradient(slopes, logp_BCV, targets_BC, loss.head).astype(h_BCD.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            dh_BCD = product("bcv,dv->bcd", dlogits, cast_DV).astype(h_BCD.dtype)
            grads = (
                grads[0].at[:, i].set(dh_BCD),
                grads[1] + product("bcd,bcv->dv", h_BCD, dlogits),
            )
        joined = jax.tree.map(lambda *pair: jnp.stack(pair), aux, aux_more)
        return vary(((total + more, loss.combine(joined)), grads))

    chunks = jnp.clip((count + c - 1) // c, 0, inputs[0].shape[1])
    out, grads = jax.lax.fori_loop(0, chunks, body, vary((nothing, grads)))
    if grads is not None:
        grads = (grads[0].reshape(B, -1, h_BTD.shape[2])[:, :T], grads[1])
    return out, grads


def _even(t: int, chunk: int) -> int:
    """Positions in each of as few chunks as ``chunk`` allows."""
    return -(-t // -(-t // max(1, min(chunk, t))))


def _split(x_BT: jax.Array, c: int) -> jax.Array:
    """[B, T, ...] -> [B, N, c, ...], padded at the end."""
    b, t, *rest = x_BT.shape
    padded = jnp.pad(x_BT, ((0, 0), (0, -t % c), *[(0, 0)] * len(rest)))
    return padded.reshape(b, -1, c, *rest)


def _vary_as(like: jax.Array, tree: Any) -> Any:
    """``tree`` as values that may differ between devices where the integers ``like`` may (inside
    shard_map, where a loop's values must be of one kind)."""
    zero = (like * 0).sum()
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


@jax.custom_vjp
def _with_gradient_to(cast: jax.Array, x: jax.Array) -> jax.Array:
    """``cast``, which is ``x`` in another dtype; its gradient goes to ``x``, in ``x``'s own."""
    return cast


_with_gradient_to.defvjp(
    lambda cast, x: (cast, x[:0]),  # of x only the dtype
    lambda x, gradient: (None, gradient.astype(x.dtype)),
)


def _forbidden(cfg: HeadConfig, size: int) -> np.ndarray:
    """[1, 1, V] bool."""
    forbidden = np.zeros((1, 1, size), bool)
    forbidden[..., list(cfg.forbidden_ids)] = True
    return forbidden


def _chunk_logits(h_BCD: jax.Array, head_DV: jax.Array, cfg: HeadConfig) -> jax.Array:
    """float32 logits [B, C, V] of one chunk, divided by the temperature, forbidden ids cut out."""
    logits = jnp.einsum("bcd,dv->bcv", h_BCD, head_DV, preferred_element_type=jnp.float32)
    if cfg.temperature != 1.0:
        logits = logits / cfg.temperature
    if cfg.forbidden_ids:
        logits = jnp.where(_forbidden(cfg, head_DV.shape[1]), FORBIDDEN_LOGIT, logits)
    return logits


def _is_target(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    # Compared, not gathered: with the vocabulary sharded, a gather would collect all logits.
    ids = jax.lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, 2)
    return ids == targets_BC[..., None]


def _logp_and_entropy(
    logits_BCV: jax.Array, targets_BC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-softmax at the targets, ``H = logsumexp(z) - sum(p z)`` with z shifted by its maximum,
    and the log-softmax."""
    shifted = logits_BCV - jax.lax.stop_gradient(logits_BCV.max(-1, keepdims=True))
    exp = jnp.exp(shifted)
    total = exp.sum(-1)
    picked = jnp.sum(jnp.where(_is_target(shifted, targets_BC), shifted, 0.0), -1)
    log_total = jnp.log(total)
    # The choice changes no number; XLA's CPU backend hands a bare sum of products to a kernel that
    # takes five times as long as all else here.
    weighted = jnp.where(exp > 0, exp * shifted, 0.0)
    entropy = log_total - jnp.sum(weighted, -1) / total
    return picked - log_total, entropy, shifted - log_total[..., None]


def _logit_gradient(
    slopes_BC: tuple[jax.Array, jax.Array, jax.Array],
    logp_BCV: jax.Array,
    targets_BC: jax.Array,
    cfg: HeadConfig,
) -> jax.Array:
    """[B, C, V] by the undivided logits: ``dlogp (1[target] - p) - dentropy p (log p + H)``.

    ``slopes_BC``: dlogp, dentropy and H.
    """
    dlogp, dentropy, entropy = (x[..., None] for x in slopes_BC)
    p = jnp.exp(logp_BCV)
    out = dlogp * (_is_target(logp_BCV, targets_BC) - p)
    if cfg.entropy_grad:
        out -= dentropy * p * (logp_BCV + entropy)
    if cfg.forbidden_ids:  # a forbidden target must not learn
        out = jnp.where(_forbidden(cfg, out.shape[-1]), 0.0, out)
    return out / cfg.temperature if cfg.temperature != 1.0 else out


# --- by data shards ---------------------------------------------------------------------------


def model_token_logps(
    model: Qwen2_5_VL, h_BTD: jax.Array, targets_BT: jax.Array, cfg: HeadConfig, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``token_logps`` under the model's head, each data shard by itself."""

    def local(h, head, cast, targets, count):
        return token_logps(h, targets, head, cfg, count=count, cast_DV=cast)

    return _by_shards(model, local, h_BTD, targets_BT, count)


def model_token_loss(
    model: Qwen2_5_VL,
    h_BTD: jax.Array,
    targets_BT: jax.Array,
    tokens: Any,
    loss: TokenLoss,
    count: jax.Array,
) -> tuple[jax.Array, Any]:
    """``token_loss`` under the model's head, each data shard by itself."""

    def local(h, head, cast, of_tokens, count):
        targets, tokens = of_tokens
        out = token_loss(h, targets, head, tokens, loss, count=count, cast_DV=cast)
        return jax.tree.map(lambda x: x[None], out)

    total_M, aux_M = _by_shards(model, local, h_BTD, (targets_BT, tokens), count)
    return total_M.sum(0), loss.combine(aux_M)


def _by_shards(
    model: Qwen2_5_VL, local: Callable[..., Any], h_BTD: jax.Array, rest: Any, count: jax.Array
) -> Any:
    """``local(h, head, cast, rest, count)`` of each data shard's own rows, results side by side.

    Left to the compiler, the gradient of the head would be summed over all devices once per chunk.
    Here the head is collected over fsdp once, in the dtype of the products, each shard adds up its
    own chunks, and one sum over devices follows, of which each takes its own part. The vocabulary
    stays divided over ``tensor``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of size 1 divide nothing, and the partitioner knows no manual ones beside others.
    axes = tuple(axis for axis in BATCH_AXES if not mesh.empty and mesh.shape[axis] > 1)
    if not axes:
        head_DV = shard(model.head_kernel(), None, "tensor")
        return local(h_BTD, head_DV, head_DV.astype(h_BTD.dtype), rest, count)
    divided = "fsdp" if "fsdp" in axes and h_BTD.shape[-1] % mesh.shape["fsdp"] == 0 else None
    head_DV = shard(model.head_kernel(), divided, "tensor")

    # ``count`` is the same on all devices: with a divided vocabulary each chunk is a collective.
    def collected(h, rest, head, count):
        # "varying" from here on: otherwise the sum over devices moves into the scan again.
        varying = axes if divided is None else tuple(axis for axis in axes if axis != divided)
        head = jax.lax.pcast(head, varying, to="varying")
        cast = head.astype(h.dtype)
        if divided:
            head, cast = (jax.lax.all_gather(x, divided, axis=0, tiled=True) for x in (head, cast))
        return local(h, head, cast, rest, count)

    batch = PartitionSpec(axes)
    return jax.shard_map(
        collected,
        in_specs=(batch, batch, PartitionSpec(divided), PartitionSpec()),
        out_specs=batch,
        axis_names=set(axes),
    )(h_BTD, rest, head_DV, count)
