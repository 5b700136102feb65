"""Image grids -> the fixed-shape arrays of ``structs.VisionInputs``; all on the host, in numpy.

``grid_thw`` never enters a traced program: this module turns it into indices and positions. The
pixel rows come from Hugging Face's image processor in its own order, merge blocks in raster order
with the merge_size**2 patches of a block beside each other, and leave in WINDOW order: the blocks
of one window together, every window padded to W slots.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from srpo_jax.structs import VisionInputs

Grids = Sequence[Sequence[int]] | np.ndarray  # [images, 3] patches: frames, rows, columns


@dataclass(frozen=True)
class VisionGeometry:
    """The sizes that decide the layout; the defaults are those of every released Qwen2.5-VL."""

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112  # pixels
    channels: int = 3

    def __post_init__(self) -> None:
        unit = self.patch_size * self.merge_size
        if self.window_size % unit:
            raise ValueError(
                f"vision_config.window_size={self.window_size} is not a multiple of "
                f"patch_size * spatial_merge_size = {unit}"
            )

    @property
    def window_blocks(self) -> int:
        """Merged tokens along one side of a window."""
        return self.window_size // (self.patch_size * self.merge_size)

    @property
    def merge_unit(self) -> int:
        """Patches that become one merged token."""
        return self.merge_size**2

    @property
    def window_slots(self) -> int:
        """W, the patch slots of one window."""
        return self.window_blocks**2 * self.merge_unit

    @property
    def patch_dim(self) -> int:
        """Numbers in one row of ``pixel_values``."""
        return self.channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class VisionIds:
    """What places images and videos in a text: their tokens, the time scale, the sizes."""

    image_token_id: int
    video_token_id: int
    tokens_per_second: float = 2  # vision_config.tokens_per_second
    geometry: VisionGeometry = field(default_factory=VisionGeometry)


@dataclass(frozen=True)
class VisionArrays:
    """The images of one sequence in window order; n is a multiple of W, j counts merged tokens."""

    patches: np.ndarray  # [n, patch_dim] float32, zeros in padding
    patch_hw: np.ndarray  # [n, 2] int32
    window_valid: np.ndarray  # [n/W, W] bool
    frame_id: np.ndarray  # [n] int32, 0, 1, ... per frame, -1 in padding
    merge_src: np.ndarray  # [j] int32, only real merged tokens (no padding)

    @property
    def num_slots(self) -> int:
        """Patch slots, window padding included: what counts against the patch budget."""
        return self.patches.shape[0]

    @property
    def num_merged(self) -> int:
        """Merged tokens, that is placeholder tokens in the text."""
        return self.merge_src.shape[0]


def check_grid(grid_thw: Grids, merge_size: int) -> np.ndarray:
    """``grid_thw`` as int64 [images, 3]; ValueError for sides that merging cannot divide."""
    grid_I3 = np.asarray(grid_thw, np.int64).reshape(-1, 3)
    if (grid_I3 < 1).any() or (grid_I3[:, 1:] % merge_size).any():
        raise ValueError(
            f"grid_thw {grid_I3.tolist()}: every entry must be positive, and height and width "
            f"multiples of the merge size {merge_size}"
        )
    return grid_I3


def _one_grid(
    t: int, h: int, w: int, geometry: VisionGeometry
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Slot (in merged tokens), patch rows and columns, and frame of one image or video; its slots
    with padding."""
    merge, side = geometry.merge_size, geometry.window_blocks
    rows, cols = h // merge, w // merge
    y, x = np.divmod(np.arange(rows * cols), cols)
    # HF adds an empty window row or column when the side is already aligned and later drops the
    # duplicate boundary; rounding up gives the windows that remain.
    windows_x = -(-cols // side)
    windows = -(-rows // side) * windows_x
    window = (y // side) * windows_x + x // side
    order = np.argsort(window, kind="stable")  # raster order within a window
    counts = np.bincount(window, minlength=windows)
    rank = np.arange(rows * cols) - np.repeat(np.cumsum(counts) - counts, counts)
    slot = np.empty(rows * cols, np.int64)
    slot[order] = window[order] * side**2 + rank
    inner_y, inner_x = np.divmod(np.arange(merge**2), merge)
    hw = np.stack(
        [(y[:, None] * merge + inner_y).ravel(), (x[:, None] * merge + inner_x).ravel()], axis=-1
    )
    slots = (np.arange(t)[:, None] * (windows * side**2) + slot).ravel()
    return slots, np.tile(hw, (t, 1)), np.repeat(np.arange(t), h * w), t * windows * side**2


def vision_arrays(
    pixel_values: np.ndarray,
    grid_thw: Grids,
    geometry: VisionGeometry | None = None,
) -> VisionArrays:
    """Pixel rows of all images (or videos) of one sequence -> window-ordered, padded arrays.

    Args:
        pixel_values: [sum(t*h*w), patch_dim] as the HF image processor returns it.
        grid_thw: [images, 3] patches of each image: frames, rows, columns.
        geometry: sizes of the vision tower; the released ones by default.

    The order equals HF's ``get_vision_window_index``: merged token ``window_index[i]`` is the i-th
    valid one here. Raises ValueError when rows and grids do not fit together.
    """
    geometry = geometry or VisionGeometry()
    grid_I3 = check_grid(grid_thw, geometry.merge_size)
    unit, num_patches = geometry.merge_unit, int(grid_I3.prod(-1).sum())
    if pixel_values.shape != (num_patches, geometry.patch_dim):
        raise ValueError(
            f"pixel_values {pixel_values.shape} do not match grid_thw {grid_I3.tolist()}: "
            f"expected {(num_patches, geometry.patch_dim)}"
        )
    slots, hw, frames, total, num_frames = [], [], [], 0, 0
    for t, h, w in grid_I3.tolist():
        slots_j, hw_n2, frame_n, length = _one_grid(t, h, w, geometry)
        slots.append(slots_j + total)
        hw.append(hw_n2)
        frames.append(frame_n + num_frames)
        total += length
        num_frames += t
    merge_src = np.concatenate(slots) if slots else np.zeros(0, np.int64)
    where = (merge_src[:, None] * unit + np.arange(unit)).ravel()
    patches = np.zeros((total * unit, geometry.patch_dim), np.float32)
    patch_hw = np.zeros((total * unit, 2), np.int32)
    frame_id = np.full(total * unit, -1, np.int32)
    if slots:
        patches[where] = pixel_values
        patch_hw[where] = np.concatenate(hw)
        frame_id[where] = np.concatenate(frames)
    valid = (frame_id >= 0).reshape(-1, geometry.window_slots)
    return VisionArrays(patches, patch_hw, valid, frame_id, merge_src.astype(np.int32))


def stack_rows(
    rows: Sequence[Sequence[VisionArrays]], patches: int, geometry: VisionGeometry | None = None
) -> VisionInputs[np.ndarray]:
    """The images of each row, one after another and padded to ``patches`` slots -> VisionInputs.

    ``rows[m]`` holds the arrays of the sequences of row m, in the order in which ``vision_src``
    counts their merged tokens. ValueError when a row exceeds the budget.
    """
    geometry = geometry or VisionGeometry()
    slots, unit = geometry.window_slots, geometry.merge_unit
    if patches < slots or patches % slots:
        raise ValueError(f"patch budget {patches} is not a positive multiple of the window {slots}")
    count = len(rows)
    out = VisionInputs(
        patches=np.zeros((count, patches, geometry.patch_dim), np.float32),
        patch_hw=np.zeros((count, patches, 2), np.int32),
        window_valid=np.zeros((count, patches // slots, slots), bool),
        frame_id=np.full((count, patches), -1, np.int32),
        merge_src=np.zeros((count, patches // unit), np.int32),
    )
    for m, row in enumerate(rows):
        start, merged, frames = 0, 0, 0
        for arrays in row:
            stop = start + arrays.num_slots
            if stop > patches:
                needed = sum(a.num_slots for a in row)
                raise ValueError(f"row {m} needs {needed} patch slots, the budget is {patches}")
            out.patches[m, start:stop] = arrays.patches
            out.patch_hw[m, start:stop] = arrays.patch_hw
            out.window_valid[m, start // slots : stop // slots] = arrays.window_valid
            valid = arrays.frame_id >= 0
            out.frame_id[m, start:stop] = np.where(valid, arrays.frame_id + frames, -1)
            end = merged + arrays.num_merged
            out.merge_src[m, merged:end] = arrays.merge_src + start // unit
            start, merged = stop, end
            frames += int(arrays.frame_id.max(initial=-1)) + 1
    return out


def _vision_positions(start: int, grid: np.ndarray, merge: int, interval: float) -> np.ndarray:
    """[3, merged tokens] positions of one image or video that begins at ``start``."""
    t, h, w = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    # HF multiplies in float32 and then truncates to whole positions.
    frames = (np.arange(t, dtype=np.float32) * np.float32(interval)).astype(np.int64)
    axes = np.meshgrid(frames, np.arange(h), np.arange(w), indexing="ij")
    return np.stack(axes).reshape(3, -1) + start


def mrope_positions(
    token_ids: Sequence[int] | np.ndarray,
    ids: VisionIds,
    image_grid_thw: Grids = (),
    video_grid_thw: Grids = (),
    second_per_grid_ts: Sequence[float] | np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Multimodal rotary positions of one unpadded sequence, exactly HF's ``get_rope_index`` (5.23;
    5.17 still cut ``second_per_grid_ts`` to whole seconds).

    Args:
        token_ids: [T], with one placeholder token per merged vision token.
        image_grid_thw, video_grid_thw: [images, 3] and [videos, 3] in the order of the text.
        second_per_grid_ts: seconds between temporal patches of each video (1 when None).

    Returns:
        positions [3, T] int32 (temporal, height, width) and the position of the next token on all
        three axes, max + 1. ValueError when a run of placeholders and its grid differ in length.
    """
    ids_T, merge_size = np.asarray(token_ids, np.int64), ids.geometry.merge_size
    is_image, is_video = ids_T == ids.image_token_id, ids_T == ids.video_token_id
    kind_T = np.where(is_image, 1, np.where(is_video, 2, 0))
    if not kind_T.any() and not len(image_grid_thw) and not len(video_grid_thw):
        plain = np.broadcast_to(np.arange(len(ids_T), dtype=np.int32), (3, len(ids_T)))
        return plain.copy(), len(ids_T)
    images, videos = check_grid(image_grid_thw, merge_size), check_grid(video_grid_thw, merge_size)
    seconds = [1.0] * len(videos) if second_per_grid_ts is None else list(second_per_grid_ts)
    if len(seconds) != len(videos):
        raise ValueError(f"{len(videos)} videos but {len(seconds)} second_per_grid_ts")
    scales = np.float32(ids.tokens_per_second) * np.array(seconds, np.float32)
    grids = {1: [(g, 1.0) for g in images], 2: list(zip(videos, scales.tolist(), strict=True))}
    edges = [0, *(np.flatnonzero(np.diff(kind_T)) + 1).tolist(), len(ids_T)]
    pieces, position, used = [], 0, {1: 0, 2: 0}
    for start, stop in itertools.pairwise(edges):
        kind, length = int(kind_T[start]), stop - start
        if kind == 0:
            pieces.append(np.broadcast_to(np.arange(length), (3, length)) + position)
            position += length
            continue
        if used[kind] == len(grids[kind]):
            raise ValueError(f"placeholder run at token {start} has no grid: too few images given")
        grid, interval = grids[kind][used[kind]]
        used[kind] += 1
        if int(grid.prod()) // merge_size**2 != length:
            raise ValueError(
                f"placeholder run at token {start} is {length} long, its grid "
                f"{grid.tolist()} needs {int(grid.prod()) // merge_size**2}"
            )
        pieces.append(_vision_positions(position, grid, merge_size, interval))
        # Text resumes after the larger SPATIAL side, even when a long video reaches further on
        # the temporal axis (so does HF).
        position += int(max(grid[1], grid[2])) // merge_size
    for kind, name in ((1, "image"), (2, "video")):
        if used[kind] != len(grids[kind]):
            raise ValueError(f"{len(grids[kind])} {name} grids, but {used[kind]} in the text")
    positions = np.concatenate(pieces, axis=1)
    return positions.astype(np.int32), int(positions.max()) + 1
