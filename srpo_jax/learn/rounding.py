"""Numbers in fewer bits, right in the mean: parameters in bfloat16, moments in 8 bits.

An update at a learning rate of 1e-6 is far below the distance between two bfloat16 numbers, and a
moment's change in a step below that between two of 8 bits: rounding to the nearest would lose
nearly all of them. Stochastic rounding (Gupta et al., arXiv 1502.02551) goes up with the
probability of the part that is cut off.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

BLOCK = 96  # entries of a moment that share a scale, at most, where halving gets there
SMALLEST = 4096  # entries of an array that is worth it
STEPS = 10  # of a second moment's code, to halve it: 256 of them reach down to 2e-8
TOP = 127  # of a first moment's code
SIGNED = {"mu": True, "nu": False}  # moments by their name in optax's states


Scales = dict[str, jax.Array]  # by the place of a moment in an optimizer's state


class Blocks(NamedTuple):
    """A moment in 8 bits, in blocks along its last axis (Dettmers et al., arXiv 2110.02861).

    Entries of a first moment are ``scale * (c / TOP)**3``, those of a second one ``scale *
    2**(-c / STEPS)``: small ones keep their digits beside the block's largest, and a second moment
    never becomes 0 beside a first one that is not.
    """

    code: jax.Array  # int8, or uint8 of a second moment; of the moment's shape
    scale: jax.Array  # float32 [..., blocks], the largest magnitude in each block


def in_blocks(state: Any, key: jax.Array, scales: Scales | None = None) -> Any:
    """An optax state with its large moments as `Blocks`; ``key`` decides the rounding. ``scales``:
    where they are known, of `scales_of`."""

    def stored(keys: tuple, leaf: jax.Array) -> Any:
        names = (k.name for k in keys if isinstance(k, GetAttrKey))
        signed = next((SIGNED[name] for name in names if name in SIGNED), None)
        if signed is None or leaf.size < SMALLEST:
            return leaf
        name = jax.tree_util.keystr(keys)
        scale = jnp.max(jnp.abs(_cut(leaf)), axis=-1) if scales is None else scales[name]
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return Blocks(_code(leaf, scale, own, signed), scale)

    return jax.tree_util.tree_map_with_path(stored, state)


def from_blocks(state: Any) -> Any:
    """The state as optax computes with it."""
    return jax.tree.map(lambda x: _values(x) if _is_blocks(x) else x, state, is_leaf=_is_blocks)


def scales_of(state: Any) -> Scales:
    """The scales of what `in_blocks` made."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_blocks)
    return {jax.tree_util.keystr(keys): x.scale for keys, x in leaves if _is_blocks(x)}


def _is_blocks(x: Any) -> bool:
    return isinstance(x, Blocks)


def _code(x: jax.Array, scale: jax.Array, key: jax.Array, signed: bool) -> jax.Array:
    cut = _cut(x)
    share = jnp.abs(cut) / jnp.where(scale > 0, scale, 1.0)[..., None]
    if signed:  # up from c**3 to (c + 1)**3
        low = jnp.floor(TOP * jnp.cbrt(share))
        up = (TOP**3 * share - low**3) / (3 * low * (low + 1) + 1)
    else:  # from 2**-c down to 2**-(c + 1), in STEPS
        place = jnp.clip(-STEPS * jnp.log2(share), 0.0, 255.0)
        low = jnp.floor(place)
        up = (1 - jnp.exp2((low - place) / STEPS)) / (1 - 2 ** (-1 / STEPS))
    drawn = (_cut(hashed_bits(key, x.shape)) >> 8).astype(jnp.float32) * 2.0**-24
    code = low + (drawn < up)
    if signed:
        code = (jnp.sign(cut) * jnp.minimum(code, TOP)).astype(jnp.int8)
    else:
        code = jnp.minimum(code, 255).astype(jnp.uint8)
    return code.reshape(x.shape)


def _values(x: Blocks) -> jax.Array:
    code = _cut(x.code).astype(jnp.float32)
    signed = x.code.dtype == jnp.int8
    share = (code / TOP) ** 3 if signed else jnp.exp2(-code / STEPS)
    return (share * x.scale[..., None]).reshape(x.code.shape)


def _cut(x: jax.Array) -> jax.Array:
    """[..., N] -> [..., blocks, N / blocks]: halved until at most `BLOCK` are left, or an odd
    number. As many blocks as there are powers of two in it: no shard's border lies inside of one.
    """
    size = x.shape[-1]
    while size > BLOCK and size % 2 == 0:
        size //= 2
    return x.reshape(*x.shape[:-1], -1, size)


def rounded_sum(param: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
    """``param + update`` in bfloat16: 16 random bits are added to a float32's lower half, which is
    then cut off."""
    total = jax.lax.bitcast_convert_type(param.astype(jnp.float32) + update, jnp.uint32)
    upper = (total + (hashed_bits(key, param.shape) >> 16)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """32 bits for each place of ``shape``, of key and place alone: alike on any devices.

    A hash of the indices (lowbias32 of C. Wellons), since it melts into what uses it where
    jax.random's kernels would hold four numbers for each entry.
    """
    bits = jax.random.bits(key, (), jnp.uint32)
    for axis in range(len(shape)):
        bits = bits + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
        bits = bits ^ (bits >> 16)
    return bits
