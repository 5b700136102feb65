"""Axis letters, and the frozen dataclasses that cross module borders.

Arrays carry their axes in their names: ``logits_BTV``, ``adv_PG``. The letters, fixed here:

    M rows              a row is what ONE data shard holds of ONE micro-batch
    N patch slots of a row, in window order (padded windows included); N/4 merged tokens
    P prompts, G samples of a prompt (the group), B = P*G or any batch of sequences
    S prompt tokens (budget), R completion tokens (budget), T text tokens of a sequence
    D width, F mlp width, H query heads, K key/value heads, E head width, V vocabulary, L layers

Rows: prompts and sequences are stored row after row, so ``P == M * prompts_per_row``, and every
leading axis is sharded over the mesh axes ``data`` x ``fsdp``. Indices inside a row are local to it
(``vision_src``, ``merge_src``), so that no gather crosses devices. Rows are shard-major: row
``shard * micro_batches + i`` is micro-batch ``i`` of that shard.
"""

from typing import Any

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = dict[str, Array]  # "text/layers/attn/q/kernel" -> array; see model/qwen2_5_vl.py


class RunError(RuntimeError):
    """A run cannot start or go on; the message names the key, the values and the remedy."""


# The five blocks of a response, in the order of the last axis of ``Verdict.block_tokens``.
BLOCKS = ("first_think", "first_answer", "reflection", "second_think", "second_answer")


@flax.struct.dataclass
class VisionInputs:
    """All images of each row, as the traced program sees them: budgets only, never ``grid_thw``.

    Windows have W = (window_size / patch_size)**2 slots; each window is padded to W on its own, so
    that windowed attention is a reshape to [N/W, W].
    """

    patches: Array  # [M, N, 1176] float32 normalised pixels, zeros in padding
    patch_hw: Array  # [M, N, 2] int32 row and column of the patch in its frame
    window_valid: Array  # [M, N/W, W] bool, False in padding
    frame_id: Array  # [M, N] int32 segment of each image frame inside the row, -1 in padding
    merge_src: Array  # [M, N/4] int32: raster merged token j stands at merge_src[j] in window order


@flax.struct.dataclass
class Batch:
    """Prompts (RL, evaluation) or whole conversations (SFT, log-probs), right-padded.

    ``segment_ids`` is 0 in padding; 1, 2, ... number the samples packed into one sequence (a prompt
    is always the single segment 1).
    """

    tokens: Array  # [B, T] int32
    segment_ids: Array  # [B, T] int32
    mrope: Array  # [B, 3, T] int32 temporal, height, width position
    vision_src: Array  # [B, T] int32 index into the row's merged tokens (raster order), or -1
    lengths: Array  # [B] int32 number of tokens that are not padding
    next_pos: Array  # [B] int32 position of the first token after the sequence, on all three axes
    loss_mask: Array  # [B, T] float32: weight of predicting tokens[:, t] (0 for t == 0); SFT
    valid: Array  # [B] bool, False for filler sequences of an incomplete batch
    vision: VisionInputs | None = None


@flax.struct.dataclass
class Rollout:
    """What the sampler returns; token ids go to the update untouched."""

    completions: Array  # [P, G, R] int32, pad id after the end
    completion_mask: Array  # [P, G, R] bool, True up to and including EOS
    finished: Array  # [P, G] bool, False where the budget R cut the sample off
    sample_logp: Array  # [P, G, R] float32 of the distribution really sampled from
    policy_logp: Array  # [P, G, R] float32 untruncated (no top-k/p/min-p), with temperature


@flax.struct.dataclass
class Verdict:
    """What grading found in each completion; the only thing that reaches the reward code."""

    first_correct: Array  # [P, G] bool, the first answer block equals the gold
    final_correct: Array  # [P, G] bool, the last answer block equals the gold
    has_first: Array  # [P, G] bool, at least one closed answer block
    has_second: Array  # [P, G] bool, the blocks that the second round needs (profile's rule)
    format_ok: Array  # [P, G] bool, the template holds (profile's rule)
    reflection_ok: Array  # [P, G] bool, I_ref's condition
    first_tokens: Array  # [P, G] int32 length of the first response (think 1 + answer 1), no tags
    total_tokens: Array  # [P, G] int32 whole completion with tags, without EOS
    block_tokens: Array  # [P, G, 5] int32 tokens of each block in BLOCKS, 0 where missing


@flax.struct.dataclass
class Experience:
    """What an update learns from: P prompts, their P * G completions, and what was found in them.

    On the host it holds this process's part as numpy arrays; the jitted steps take global arrays,
    all with the same sharding.
    """

    batch: Batch  # fillers have ``valid`` False; without pixels where features are given
    rollout: Rollout
    verdict: Verdict
    # [M, N/4, D] from ``encode_step``; None: images are encoded inside the loss, which is required
    # when the tower trains.
    features: Array | None = None
    # [P, G, R] from ``logp_step``; None: this is the only update of the rollout, and the policy
    # itself is the old one.
    old_logp: Array | None = None
    ref_logp: Array | None = None  # [P, G, R] of the reference; None when kl_coef is 0
    # [P] float32. A group of weight 0 is left out of the loss and of its normaliser, as if it were
    # not in the batch (dynamic sampling); other weights scale it. None: all 1.
    weight: Array | None = None


@flax.struct.dataclass
class TrainState:
    """Everything the jitted step owns. ``frozen`` parameters have no optimizer state."""

    step: Array  # [] int32 optimizer updates done (skipped ones not counted)
    params: Params
    frozen: Params
    opt_state: Any
    skipped: Array  # [] int32 updates left out because the gradient was not finite
