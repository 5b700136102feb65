"""One encoded sample, and batches of them: rows, fixed budgets, padding, fillers and packing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.data.vision_arrays import (
    Grids,
    VisionArrays,
    VisionGeometry,
    VisionIds,
    mrope_positions,
    stack_rows,
    vision_arrays,
)
from srpo_jax.structs import BLOCKS, Batch

_LONGEST = 128  # characters of one token: in Qwen's vocabulary that many spaces


class Sized(Protocol):
    """What placing a sample needs to know."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_slots(self) -> int: ...


@dataclass(frozen=True)
class Encoded:
    """One prompt or conversation, unpadded: T tokens, n patch slots, j merged tokens, I images."""

    token_ids: np.ndarray  # [T] int32
    mrope: np.ndarray  # [3, T] int32
    next_pos: int  # position of the next token on all three axes
    vision_src: np.ndarray  # [T] int32, index into this sequence's merged tokens or -1
    loss_mask: np.ndarray  # [T] float32
    grid: np.ndarray  # [I, 3] int64, image grids and then video grids
    vision: VisionArrays
    origin: str = ""  # "file:row" for error messages

    @property
    def num_tokens(self) -> int:
        """T, image placeholders included."""
        return self.token_ids.shape[0]

    @property
    def num_slots(self) -> int:
        """n, what the sequence takes of its row's patch budget."""
        return self.vision.num_slots


@dataclass(frozen=True)
class Budgets:
    """What one sequence may take, and the key that raises it."""

    tokens: int
    patches: int  # slots of a row
    token_key: str = "data.prompt_tokens"

    def fault_of_text(self, record: Record) -> RecordError | None:
        """Before anything is encoded: why the record's texts cannot fit, or None.

        Tokenising megabytes takes minutes and gigabytes.
        """
        texts = [record.question, record.answer, *record.choices, *map(record.extra.get, BLOCKS)]
        longest, most = max(len(t) for t in texts if isinstance(t, str)), self.tokens * _LONGEST
        if longest <= most:
            return None
        return RecordError(
            record.origin,
            f"a text of {longest} characters, more than {self.token_key}={self.tokens} can hold",
            "shorten it",
        )

    def fault(self, encoded: Encoded, origin: str) -> RecordError | None:
        """Why the sequence of the record at ``origin`` does not fit, or None."""
        for taken, unit, key, budget in (
            (encoded.num_tokens, "tokens", self.token_key, self.tokens),
            (encoded.num_slots, "image patches", "data.patch_budgets", self.patches),
        ):
            if taken > budget:
                remedy = "raise it, or lower max_pixels" if encoded.num_slots else "raise it"
                return RecordError(origin, f"{taken} {unit} exceed {key}={budget}", remedy)
        return None


@dataclass(frozen=True)
class Media:
    """The images and videos of one sequence; names and shapes are those of HF's processor."""

    pixel_values: np.ndarray | None = None  # [sum(t*h*w), patch_dim]
    image_grid_thw: Grids = ()
    pixel_values_videos: np.ndarray | None = None
    video_grid_thw: Grids = ()
    second_per_grid_ts: Sequence[float] | np.ndarray | None = None


def encode_arrays(
    token_ids: Sequence[int] | np.ndarray,
    ids: VisionIds,
    media: Media | None = None,
    *,
    loss_mask: np.ndarray | None = None,
    origin: str = "",
) -> Encoded:
    """What HF's processor returns for ONE sequence (no padding) -> Encoded.

    The row's merged tokens are those of all images, then those of all videos. ``loss_mask``
    defaults to ones, except for the first token. Raises ValueError when placeholders, grids and
    pixel rows do not fit together.
    """
    token_ids = np.asarray(token_ids, np.int32).reshape(-1)
    media = media or Media()
    image_grid = np.asarray(media.image_grid_thw, np.int64).reshape(-1, 3)
    video_grid = np.asarray(media.video_grid_thw, np.int64).reshape(-1, 3)
    positions, next_pos = mrope_positions(
        token_ids, ids, image_grid, video_grid, media.second_per_grid_ts
    )
    grid = np.concatenate([image_grid, video_grid])
    given = (media.pixel_values, media.pixel_values_videos)
    pixels = [np.asarray(p) for p in given if p is not None]
    empty = np.zeros((0, ids.geometry.patch_dim), np.float32)
    vision = vision_arrays(np.concatenate(pixels) if pixels else empty, grid, ids.geometry)
    vision_src = np.full(len(token_ids), -1, np.int32)
    is_image, is_video = token_ids == ids.image_token_id, token_ids == ids.video_token_id
    images = int(is_image.sum())
    vision_src[is_image] = np.arange(images)
    vision_src[is_video] = np.arange(images, images + int(is_video.sum()))
    if loss_mask is None:
        loss_mask = np.ones(len(token_ids), np.float32)
    loss_mask = np.asarray(loss_mask, np.float32).copy()
    loss_mask[:1] = 0  # nothing predicts the first token
    return Encoded(token_ids, positions, next_pos, vision_src, loss_mask, grid, vision, origin)


def _blank(count: int, tokens: int, pad_id: int) -> dict[str, np.ndarray]:
    """Arrays of ``count`` filler sequences: one visible pad token each, so that no row of
    attention is empty, and valid False."""
    arrays = {
        "tokens": np.full((count, tokens), pad_id, np.int32),
        "segment_ids": np.zeros((count, tokens), np.int32),
        "mrope": np.zeros((count, 3, tokens), np.int32),
        "vision_src": np.full((count, tokens), -1, np.int32),
        "lengths": np.ones(count, np.int32),
        "next_pos": np.ones(count, np.int32),
        "loss_mask": np.zeros((count, tokens), np.float32),
        "valid": np.zeros(count, bool),
    }
    arrays["segment_ids"][:, :1] = 1
    return arrays


def collate_packed(
    sequences: Sequence[Sequence[Encoded]],
    *,
    rows: int,
    tokens: int,
    patches: int = 0,
    pad_id: int = 0,
    geometry: VisionGeometry | None = None,
) -> Batch[np.ndarray]:
    """Groups of encoded samples, each group one sequence of the batch -> Batch of numpy arrays.

    Args:
        sequences: B groups, row after row; an empty group is a filler sequence. The samples of a
            group stand one after another with segment ids 1, 2, ...; positions restart at each.
        rows: M; B must be a multiple of it.
        tokens: T, the token budget of a sequence.
        patches: N, the patch budget of a row (0: no vision arrays at all).

    RecordError, naming the record, when a budget is exceeded.
    """
    if not sequences or len(sequences) % rows:
        raise ValueError(f"{len(sequences)} sequences do not divide into {rows} rows")
    per_row = len(sequences) // rows
    arrays = _blank(len(sequences), tokens, pad_id)
    vision_rows: list[list[VisionArrays]] = [[] for _ in range(rows)]
    for b, samples in enumerate(sequences):
        start, row = 0, vision_rows[b // per_row]
        for segment, sample in enumerate(samples, start=1):
            stop, merged = start + sample.num_tokens, sum(v.num_merged for v in row)
            row.append(sample.vision)
            slots = sum(v.num_slots for v in row)
            for kind, taken, unit, budget in (
                ("token", stop, "tokens", tokens),
                ("patch", slots, "image patches in its row", patches),
            ):
                if taken > budget:
                    raise RecordError(
                        sample.origin,
                        f"{taken} {unit} exceed the budget of {budget}",
                        f"raise the {kind} budget or lower max_pixels",
                    )
            part = (b, slice(start, stop))
            arrays["tokens"][part] = sample.token_ids
            arrays["segment_ids"][part] = segment
            arrays["mrope"][b, :, start:stop] = sample.mrope
            shifted = np.where(sample.vision_src >= 0, sample.vision_src + merged, -1)
            arrays["vision_src"][part] = shifted
            arrays["loss_mask"][part] = sample.loss_mask
            arrays["lengths"][b], arrays["next_pos"][b] = stop, sample.next_pos
            arrays["valid"][b] = True
            start = stop
    vision = stack_rows(vision_rows, patches, geometry) if patches else None
    return Batch(**arrays, vision=vision)


def collate(
    encoded: Sequence[Encoded],
    *,
    rows: int,
    tokens: int,
    patches: int = 0,
    per_row: int | None = None,
    pad_id: int = 0,
    geometry: VisionGeometry | None = None,
) -> Batch[np.ndarray]:
    """Encoded samples, one a sequence -> Batch; fillers (valid False) where the list is short.

    Sequence b is ``encoded[b]``; row m holds sequences m*per_row to (m+1)*per_row - 1
    (``per_row`` by default as many as the list needs). Other arguments as ``collate_packed``.
    """
    per_row = per_row or max(1, -(-len(encoded) // rows))
    if len(encoded) > rows * per_row:
        raise ValueError(f"{len(encoded)} samples for {rows} rows of {per_row} sequences")
    groups = [[sample] for sample in encoded] + [[]] * (rows * per_row - len(encoded))
    return collate_packed(
        groups, rows=rows, tokens=tokens, patches=patches, pad_id=pad_id, geometry=geometry
    )


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a training batch stand on the data shards.

    Each shard has ``rows`` rows (micro-batches) of ``per_row`` places. The rows are divided into
    ``updates / sharing`` equal chunks; one chunk holds the sequences of ``sharing`` updates, so
    many in every update. A place without a sequence is a filler.
    """

    sequences: int  # of a batch, over all shards
    shards: int = 1
    rows: int = 1  # of a shard
    updates: int = 1  # that a batch is used for, one part of it in each
    sharing: int = 1  # updates whose sequences stand in the same rows

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1 or self.sequences % self.updates:
            raise ValueError(f"{self}: all above 0, sequences a multiple of updates")
        if self.updates % self.sharing or self.rows % (self.updates // self.sharing):
            raise ValueError(f"{self}: rows do not divide into updates / sharing chunks")

    @property
    def per_row(self) -> int:
        """Places of a row."""
        return -(-self.sequences // (self.shards * self.rows))

    @property
    def size(self) -> int:
        """P, the places of all shards."""
        return self.shards * self.rows * self.per_row

    def rows_of(self, update: int) -> np.ndarray:
        """Which rows of its shard an update takes."""
        size = self.rows * self.sharing // self.updates
        return update // self.sharing * size + np.arange(size)

    def places(self, index: int = 0, count: int = 1) -> np.ndarray:
        """The update that uses each place of process ``index`` of ``count``, int32; -1: filler.

        Sequence t of a batch belongs to process t % count. In a chunk they take the first place of
        every row before the second of any, and a row of every shard before another.
        """
        chunks, shards = self.updates // self.sharing, self.shards // count
        shape = (chunks, self.per_row, self.rows // chunks, shards)
        used = np.full((chunks, shards * self.rows // chunks * self.per_row), -1, np.int32)
        updates_T = np.arange(self.sequences) // (self.sequences // self.updates)
        for chunk, sequences in enumerate(np.split(np.arange(self.sequences), chunks)):
            own = updates_T[sequences[sequences % count == index]]
            used[chunk, : len(own)] = own
        return used.reshape(shape).transpose(3, 0, 2, 1).reshape(-1)


def choose_layout(sequences: int, shards: int, most: int, updates: int = 1) -> Layout:
    """The layout with the fewest rows, at most ``most`` places each, and then the fewest fillers.

    Updates of fewer sequences than there are shards share rows, where their number divides: each
    takes the shards that hold its own. ValueError where updates cannot be equal.
    """
    each = sequences // updates
    divisors = [n for n in range(1, updates + 1) if updates % n == 0]
    sharing = max([n for n in divisors if n * each <= shards], default=1)
    rows = -(-each * sharing // (shards * most)) * (updates // sharing)
    return Layout(sequences, shards, rows, updates, sharing)


class FirstFit:
    """Places samples into B = rows * per_row sequences: first fit on the tokens of a sequence AND
    the patches of its row. Without ``pack`` a sequence takes one sample; those that are False in
    ``usable_B`` (default: none) take nothing."""

    def __init__(
        self,
        *,
        rows: int,
        per_row: int,
        tokens: int,
        patches: int,
        pack: bool = True,
        usable_B: np.ndarray | None = None,
    ):
        self.per_row, self.pack = per_row, pack
        self.room_B = np.full(rows * per_row, tokens)
        if usable_B is not None:
            self.room_B[~usable_B] = 0
        self.room_M = np.full(rows, patches)
        self.count_B = np.zeros(rows * per_row, np.int64)

    def place(self, sample: Sized) -> int:
        """The sequence that takes the sample, or -1 where none has room."""
        fits_M = self.room_M >= sample.num_slots
        fits_B = (self.room_B >= sample.num_tokens) & np.repeat(fits_M, self.per_row)
        if not self.pack:
            fits_B &= self.count_B == 0
        if not fits_B.any():
            return -1
        b = int(fits_B.argmax())
        self.room_B[b] -= sample.num_tokens
        self.room_M[b // self.per_row] -= sample.num_slots
        self.count_B[b] += 1
        return b
