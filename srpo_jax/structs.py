"""Axis letters, and the frozen dataclasses that cross module borders.

Arrays carry their axes in their names: ``logits_BTV``, ``adv_PG``. The letters, fixed here:

    M rows              a row is what ONE data shard holds of ONE micro-batch
    N patch slots of a row, in window order (padded windows included); N/4 merged tokens
    P prompts, G samples of a prompt (the group), B = P*G or any batch of sequences
    X blocks of packed completions, Y slots of a block: U of prompts and C lanes of T (``Lanes``)
    S prompt tokens (budget), R completion tokens (budget), T text tokens of a sequence
    D width, F mlp width, H query heads, K key/value heads, E head width, V vocabulary, L layers

Rows: prompts and sequences are stored row after row, so ``P == M * prompts_per_row``, and every
leading axis is sharded over the mesh axes ``data`` x ``fsdp``. Indices inside a row are local to it
(``vision_src``, ``merge_src``), so that no gather crosses devices. Rows are shard-major: row
``shard * micro_batches + i`` is micro-batch ``i`` of that shard.
"""

from typing import Any, Generic, TypeVar

import flax.struct
import jax
import numpy as np

from srpo_jax import RunError as RunError  # there, so that a configuration is read without jax

# What the fields of a struct are: numpy arrays on the host, jax arrays on devices and in traced
# functions; in a layout what stands for them (ShapeDtypeStruct, PartitionSpec, NamedSharding).
Leaf = TypeVar("Leaf", covariant=True)
Array = jax.Array | np.ndarray  # what functions take that work on either
Params = dict[str, jax.Array]  # "text/layers/attn/q/kernel" -> array; see model/qwen2_5_vl.py


class StepFailed(RunError):
    """A step cannot be done, through no fault of the state, which is that of the step before."""


class Stalled(StepFailed):
    """The data do not come: every process is told so at once, before the step, and can save."""


# The five blocks of a response, in the order of the last axis of ``Verdict.block_tokens``.
BLOCKS = ("first_think", "first_answer", "reflection", "second_think", "second_answer")


@flax.struct.dataclass
class VisionInputs(Generic[Leaf]):
    """All images of each row, as the traced program sees them: budgets only, never ``grid_thw``.

    Windows have W = (window_size / patch_size)**2 slots; each window is padded to W on its own, so
    that windowed attention is a reshape to [N/W, W].
    """

    patches: Leaf  # [M, N, 1176] float32 normalised pixels, zeros in padding
    patch_hw: Leaf  # [M, N, 2] int32 row and column of the patch in its frame
    window_valid: Leaf  # [M, N/W, W] bool, False in padding
    frame_id: Leaf  # [M, N] int32 segment of each image frame inside the row, -1 in padding
    merge_src: Leaf  # [M, N/4] int32: raster merged token j stands at merge_src[j] in window order


@flax.struct.dataclass
class Batch(Generic[Leaf]):
    """Prompts (RL, evaluation) or whole conversations (SFT, log-probs), right-padded.

    ``segment_ids`` is 0 in padding; 1, 2, ... number the samples packed into one sequence (a prompt
    is always the single segment 1).
    """

    tokens: Leaf  # [B, T] int32
    segment_ids: Leaf  # [B, T] int32
    mrope: Leaf  # [B, 3, T] int32 temporal, height, width position
    vision_src: Leaf  # [B, T] int32 index into the row's merged tokens (raster order), or -1
    lengths: Leaf  # [B] int32 number of tokens that are not padding
    next_pos: Leaf  # [B] int32 position of the first token after the sequence, on all three axes
    loss_mask: Leaf  # [B, T] float32: weight of predicting tokens[:, t] (0 for t == 0); SFT
    valid: Leaf  # [B] bool, False for filler sequences of an incomplete batch
    vision: VisionInputs[Leaf] | None = None


@flax.struct.dataclass
class Rollout(Generic[Leaf]):
    """What the sampler returns; token ids go to the update untouched."""

    completions: Leaf  # [P, G, R] int32, pad id after the end
    completion_mask: Leaf  # [P, G, R] bool, True up to and including EOS
    finished: Leaf  # [P, G] bool, False where the budget R cut the sample off
    sample_logp: Leaf  # [P, G, R] float32 of the distribution really sampled from
    policy_logp: Leaf  # [P, G, R] float32 untruncated (no top-k/p/min-p), with temperature


@flax.struct.dataclass
class Verdict(Generic[Leaf]):
    """What grading found in each completion; the only thing that reaches the reward code."""

    first_correct: Leaf  # [P, G] bool, the first answer block equals the gold
    final_correct: Leaf  # [P, G] bool, the last answer block equals the gold
    has_first: Leaf  # [P, G] bool, at least one closed answer block
    has_second: Leaf  # [P, G] bool, the blocks that the second round needs (profile's rule)
    format_ok: Leaf  # [P, G] bool, the template holds (profile's rule)
    reflection_ok: Leaf  # [P, G] bool, I_ref's condition
    reflection_new: Leaf  # [P, G] bool, a reflection that says more than the first thought
    stated: Leaf  # [P, G] int32, what the reflection says of the first answer: right 1, wrong -1
    first_tokens: Leaf  # [P, G] int32 length of the first response (think 1 + answer 1), no tags
    first_end: Leaf  # [P, G] int32 tokens to the end of the first answer block; without one: all
    total_tokens: Leaf  # [P, G] int32 whole completion with tags, without EOS
    block_tokens: Leaf  # [P, G, 5] int32 tokens of each block in BLOCKS, 0 where missing
    # [P, G, N] float32: reward terms of one's own, in the order of ``GrpoConfig.own``. None: none.
    own: Leaf | None = None


@flax.struct.dataclass
class Experience(Generic[Leaf]):
    """What an update learns from: P prompts, their P * G completions, and what was found in them.

    On the host it holds this process's part as numpy arrays; the jitted steps take global arrays,
    all with the same sharding.
    """

    batch: Batch[Leaf]  # fillers have ``valid`` False; without pixels where features are given
    rollout: Rollout[Leaf]
    verdict: Verdict[Leaf]
    # [M, N/4, D] from ``encode_step``; None: images are encoded inside the loss, which is required
    # when the tower trains.
    features: Leaf | None = None
    # [P, G, R] from ``logp_step``, of all but the first update's rows (there the policy itself is
    # the old one); None: this is the only update of the rollout.
    old_logp: Leaf | None = None
    ref_logp: Leaf | None = None  # [P, G, R] of the reference; None when kl_coef is 0
    # Images with masked patches, for ``perception_coef``: their features [M, N/4, D] or, where
    # ``features`` is None, their patches [M, N, 1176]. None: there are no images, or no such pass.
    masked: Leaf | None = None
    # [P] float32 coefficient of the KL, where it is adapted; None: as configured.
    kl_coef: Leaf | None = None
    # [P] bool: sampled by an older policy, whose log-probs are those at sampling. None: none is.
    carried: Leaf | None = None
    # [P] int32: which update of the rollout takes the prompt, -1: none. None: there is one update.
    update: Leaf | None = None
    # [P] float32. A group of weight 0 is left out of the loss and of its normaliser, as if it were
    # not in the batch (dynamic sampling); other weights scale it. None: all 1.
    weight: Leaf | None = None


@flax.struct.dataclass
class Lanes(Generic[Leaf]):
    """Where the prompts and completions of one micro-batch lie in the passes of the update.

    A row is cut into equal blocks. A block is a region of U slots, its prompts one behind the
    other, and C lanes of T slots, each with several completions of these prompts one behind the
    other. Made by ``learn/lanes.py``.
    """

    row: Leaf  # [M] int32: which row of its data shard (M of them) takes part
    prompt: Leaf  # [X, U] int32: the slot's prompt, counted in its row; -1 in padding
    prompt_at: Leaf  # [X, U] int32: which token of that prompt
    sample: Leaf  # [X, C, T] int32: the slot's completion, prompt * G + g in its row; -1 in padding
    sample_at: Leaf  # [X, C, T] int32: which token of that completion
    # [M, Q] int32: the Q prompts that stand on each shard, counted over the rows of all shards that
    # take part; ``prompt`` and ``sample`` then count among them. None: its own row's.
    pick: Leaf | None = None
    # [X, C, T] int32, where a first round stands once for its family (as its first sample's, before
    # what each sample adds): the last slot, counted in the lane, of the run of tokens that a slot
    # is in; and of the first round that this run goes on from, or -1. None: completions are whole.
    run: Leaf | None = None
    trunk: Leaf | None = None


@flax.struct.dataclass
class TrainState(Generic[Leaf]):
    """Everything the jitted step owns. ``frozen`` parameters have no optimizer state."""

    step: Leaf  # [] int32 optimizer updates done (skipped ones not counted)
    params: dict[str, Leaf]
    frozen: dict[str, Leaf]
    opt_state: Any
    skipped: Leaf  # [] int32 updates left out because they were not finite
