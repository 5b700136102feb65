"""From logits to one sampled token: forbidding, truncation, and a draw keyed per sample.

Nothing here sorts the vocabulary. Top-k and top-p look for their threshold by bisection over the
bit patterns of the probabilities (30 passes of a masked sum), which shards over a split vocabulary
and costs nothing when the switch is off. The draw inverts the cumulative distribution in two levels
(chunk of the vocabulary, then token in the chunk), so that a token needs two uniform numbers and
not one per vocabulary entry.
"""

import jax
import jax.numpy as jnp
import numpy as np

MAX_CHUNKS = 512
ONE_BITS = 0x3F800000  # float32 1.0 as an integer
PRNG = "threefry2x32"  # fixed, so that samples do not depend on the platform's default generator


def sample_keys(base: jax.Array, prompt_keys_P: jax.Array, group_size: int) -> jax.Array:
    """Key data [P, G, 2] uint32 of every sample: fold_in(fold_in(base, prompt key), sample).

    Args:
        base: key data [2] uint32 of ``fold_in(key(seed), step)``, see ``base_key``.
        prompt_keys_P: [P] uint32, one stable number per prompt.
        group_size: G, samples per prompt; sample g is the same whatever G is.
    """
    per_prompt = jax.vmap(_fold_in, in_axes=(None, 0))(base, prompt_keys_P)
    each_sample = jax.vmap(_fold_in, in_axes=(None, 0))
    return jax.vmap(each_sample, in_axes=(0, None))(per_prompt, jnp.arange(group_size))


def base_key(seed: int, step: int) -> np.ndarray:
    """Key data [2] uint32 of ``fold_in(key(seed), step)``, on the host."""
    key = jax.random.fold_in(jax.random.key(seed, impl=PRNG), step)
    return np.asarray(jax.random.key_data(key))


def forbid(logits_BV: jax.Array, forbidden_ids: tuple[int, ...]) -> jax.Array:
    """Logits [..., V] with -inf at ``forbidden_ids``."""
    if not forbidden_ids:
        return logits_BV
    # A few writes: a mask over the whole vocabulary would cost as much as the draw itself on CPU.
    return logits_BV.at[..., np.array(forbidden_ids)].set(-jnp.inf)


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The most probable token [...] int32, the first of equal ones.

    In two levels, as argmax over a whole vocabulary is some thirty times slower on CPU than max.
    """
    logits_BCW = _by_chunk(logits_BV, -jnp.inf)
    chunk_B = jnp.argmax(jnp.max(logits_BCW, axis=-1), axis=-1).astype(jnp.int32)
    token_B = jnp.argmax(_take_chunk(logits_BCW, chunk_B), axis=-1).astype(jnp.int32)
    return chunk_B * logits_BCW.shape[-1] + token_B


def truncate(logits_BV: jax.Array, *, top_k: int, top_p: float, min_p: float) -> jax.Array:
    """Logits [..., V] with -inf outside the kept tokens; the switches apply in this order.

    top_k keeps the k most probable tokens (0: off); top_p the smallest set of most probable tokens
    whose share of what is left reaches top_p (1: off), at least one; min_p those at least min_p
    times as probable as the best (0: off). Tokens of equal probability at a threshold are all kept.
    Same rules and order as HF's TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper, except
    that top-p there drops some of several equal tokens.
    """
    if not 0 < top_k < logits_BV.shape[-1] and top_p >= 1.0 and min_p <= 0.0:
        return logits_BV
    weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))  # best token: 1
    if 0 < top_k < logits_BV.shape[-1]:
        ones_BV = jnp.ones_like(weight_BV)
        weight_BV = _keep_until(weight_BV, ones_BV, jnp.full(weight_BV.shape[:-1], float(top_k)))
    if top_p < 1.0:
        target = top_p * jnp.sum(weight_BV, axis=-1)
        weight_BV = _keep_until(weight_BV, weight_BV, target)
    if min_p > 0.0:
        weight_BV = jnp.where(weight_BV >= min_p, weight_BV, 0.0)
    return jnp.where(weight_BV > 0.0, logits_BV, -jnp.inf)


def _keep_until(weight_BV: jax.Array, measure_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Zero the weights below the greatest threshold at which the kept measure reaches the target.

    Non-negative floats are ordered as their bit patterns are, so the search is over integers; the
    weights lie in [0, 1] and the best is exactly 1, so that at least one token is always kept.
    """
    bits_BV = jax.lax.bitcast_convert_type(weight_BV, jnp.int32)

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds  # low is reached (or nothing is), high + 1 is not
        middle_B = low_B + (high_B - low_B + 1) // 2
        kept_BV = bits_BV >= middle_B[..., None]
        reached_B = jnp.sum(jnp.where(kept_BV, measure_BV, 0.0), axis=-1) >= target_B
        return jnp.where(reached_B, middle_B, low_B), jnp.where(reached_B, high_B, middle_B - 1)

    low_B = jnp.zeros(target_B.shape, jnp.int32)
    low_B, _ = jax.lax.fori_loop(0, 31, halve, (low_B, jnp.full_like(low_B, ONE_BITS)))
    return jnp.where(bits_BV >= low_B[..., None], weight_BV, 0.0)


def _by_chunk(values_BV: jax.Array, padding: float) -> jax.Array:
    """[..., V] -> [..., chunks, tokens of a chunk]; no padding for Qwen's vocabularies.

    A power of two of chunks, so that a vocabulary split over devices stays where it is.
    """
    vocabulary, chunks = values_BV.shape[-1], 1
    while chunks < MAX_CHUNKS and vocabulary % (2 * chunks) == 0:
        chunks *= 2
    if chunks * chunks * 16 < vocabulary:  # too few of them: pad
        chunks = 2 ** (vocabulary.bit_length() // 2)
    width = -(-vocabulary // chunks)
    missing = [(0, 0)] * (values_BV.ndim - 1) + [(0, chunks * width - vocabulary)]
    padded_BV = jnp.pad(values_BV, missing, constant_values=padding)
    return padded_BV.reshape(*values_BV.shape[:-1], chunks, width)


def _take_chunk(values_BCW: jax.Array, chunk_B: jax.Array) -> jax.Array:
    """The chosen chunk [..., W] of each row."""
    return jnp.take_along_axis(values_BCW, chunk_B[..., None, None], axis=-2)[..., 0, :]


def draw(keys: jax.Array, logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token from each softmax(logits [..., V]) with its own key data [..., 2].

    Two-level inversion of the cumulative distribution. A token of probability 0 is never returned,
    whatever the rounding of the sums.

    Returns: token [...] int32 and its log-probability [...] float32.
    """
    max_B = jnp.max(logits_BV, axis=-1)
    weight_BCW = _by_chunk(jnp.exp(logits_BV - max_B[..., None]), 0.0)
    weight_BC = jnp.sum(weight_BCW, axis=-1)

    def uniforms(key_data: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.wrap_key_data(key_data, impl=PRNG), (2,))

    uniform_B2 = jax.vmap(uniforms)(keys.reshape(-1, keys.shape[-1]))
    uniform_B2 = uniform_B2.reshape(*keys.shape[:-1], 2)
    chunk_B = _invert(weight_BC, uniform_B2[..., 0])
    within_B = _invert(_take_chunk(weight_BCW, chunk_B), uniform_B2[..., 1])
    token_B = chunk_B * weight_BCW.shape[-1] + within_B
    log_total_B = max_B + jnp.log(jnp.sum(weight_BC, axis=-1))
    return token_B, _pick(logits_BV, token_B) - log_total_B


def _invert(weight_BC: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index whose cumulative weight exceeds uniform * total, among positive weights."""
    sums_BC = jnp.cumsum(weight_BC, axis=-1)
    point_B = uniform_B * sums_BC[..., -1]
    hit_BC = (sums_BC > point_B[..., None]) & (weight_BC > 0)
    # Parallel prefix sums may round so that no entry qualifies: then the most probable one.
    first_B = jnp.where(
        jnp.any(hit_BC, axis=-1), jnp.argmax(hit_BC, axis=-1), jnp.argmax(weight_BC, axis=-1)
    )
    return first_B.astype(jnp.int32)


def token_keys(keys: jax.Array, token: jax.Array) -> jax.Array:
    """Key data of token number ``token`` [...] of the samples with key data [..., 2]."""
    flat = jax.vmap(_fold_in)(keys.reshape(-1, keys.shape[-1]), token.reshape(-1))
    return flat.reshape(keys.shape)


def _fold_in(key_data: jax.Array, number: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl=PRNG), number)
    return jax.random.key_data(key)


def sample(
    logits_BV: jax.Array,
    keys: jax.Array,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    forbidden_ids: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sample one token per row of float32 logits [..., V] with its key data [..., 2].

    Returns (token int32, sample_logp, policy_logp), each [...]. ``policy_logp`` is the token's
    log-probability under softmax(logits / temperature) without the forbidden ids; ``sample_logp``
    the same after truncation, that is of the distribution really drawn from. At temperature 0 the
    token is the most probable one: ``sample_logp`` is 0 (a certain choice) and ``policy_logp`` is
    taken at temperature 1.
    """
    logits_BV = forbid(logits_BV.astype(jnp.float32), forbidden_ids)
    if temperature == 0.0:
        token_B = greedy(logits_BV)
        policy_B = _logp(logits_BV, token_B)
        return token_B, jnp.zeros_like(policy_B), policy_B
    logits_BV = logits_BV / temperature
    kept_BV = truncate(logits_BV, top_k=top_k, top_p=top_p, min_p=min_p)
    token_B, sample_B = draw(keys, kept_BV)
    return token_B, sample_B, sample_B if kept_BV is logits_BV else _logp(logits_BV, token_B)


def _pick(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BV, token_B[..., None], axis=-1)[..., 0]


def _logp(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """log softmax(logits)[token], without a [..., V] array of log-probabilities."""
    return _pick(logits_BV, token_B) - jax.nn.logsumexp(logits_BV, axis=-1)
