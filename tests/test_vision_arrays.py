"""Window order, padding, frames and rotary positions, against Hugging Face and by hand."""

import inspect

import numpy as np
import pytest

from srpo_jax.data.vision_arrays import (
    VisionGeometry,
    VisionIds,
    mrope_positions,
    stack_rows,
    vision_arrays,
)

IMAGE, VIDEO = 90, 91
IDS = VisionIds(IMAGE, VIDEO)
SMALL = VisionGeometry(patch_size=2, merge_size=2, temporal_patch_size=1, window_size=8, channels=1)


def _numbered(grid, geometry=SMALL):
    """Pixel rows that hold their own index."""
    count = int(np.prod(grid, axis=-1).sum())
    return np.repeat(np.arange(count, dtype=np.float32)[:, None], geometry.patch_dim, axis=1)


def _hf_model(tokens_per_second=2):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "vocab_size": 100,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": 16,
            "tokens_per_second": tokens_per_second,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    with torch.device("meta"):
        return Qwen2_5_VLModel(config)


def _hf_windows(grid, geometry):
    torch = pytest.importorskip("torch")
    try:
        from transformers.vision_utils import get_vision_window_index
    except ImportError:  # before 5.20 it was a method of the tower
        pytest.skip("this transformers has no vision_utils")
    index, bounds = get_vision_window_index(
        torch.tensor(grid), geometry.merge_size, geometry.window_size, geometry.patch_size
    )
    return index.numpy(), bounds.numpy()


def test_two_by_three_blocks_by_hand():
    # 2 x 3 merge blocks, windows of 2 x 2 blocks: window 0 holds blocks 0 1 3 4, window 1 holds
    # 2 5 and is padded by two blocks.
    arrays = vision_arrays(_numbered([[1, 4, 6]]), [[1, 4, 6]], SMALL)
    assert arrays.merge_src.tolist() == [0, 1, 4, 2, 3, 5]
    blocks = arrays.patches[:, 0].reshape(-1, 4)[:, 0] // 4
    assert blocks.tolist() == [0, 1, 3, 4, 2, 5, 0, 0]
    assert arrays.window_valid.tolist() == [[True] * 16, [True] * 8 + [False] * 8]
    assert arrays.frame_id.tolist() == [0] * 24 + [-1] * 8
    # Block 4 is row 1, column 1: its four patches are rows 2-3 and columns 2-3.
    assert arrays.patch_hw[12:16].tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    assert not arrays.patches[24:].any() and not arrays.patch_hw[24:].any()


@pytest.mark.parametrize(
    "grid",
    [
        [[1, 8, 8]],  # aligned: HF adds an empty window row and column
        [[1, 16, 24]],
        [[1, 2, 2]],
        [[1, 2, 58]],
        [[1, 10, 6], [1, 8, 18], [1, 34, 22]],
        [[3, 10, 12]],  # video: windows of each frame
        [[1, 8, 10], [2, 6, 8], [4, 8, 8]],
    ],
)
def test_window_order_equals_hf(grid):
    geometry = VisionGeometry()
    index, bounds = _hf_windows(grid, geometry)
    arrays = vision_arrays(np.zeros((np.prod(grid, -1).sum(), 1176), np.float32), grid, geometry)
    assert len(arrays.window_valid) == len(bounds) - 1
    assert (arrays.window_valid.sum(1) == np.diff(bounds)).all()
    # The i-th valid merged slot holds raster token index[i].
    assert np.argsort(arrays.merge_src).tolist() == index.tolist()


def test_rotary_positions_and_frames_equal_hf():
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("transformers.vision_utils")
    grid = [[1, 8, 10], [2, 6, 4]]
    arrays = vision_arrays(_numbered(grid, VisionGeometry()), grid)
    where = (arrays.merge_src[:, None] * 4 + np.arange(4)).ravel()
    expected = utils.get_vision_position_ids(torch.tensor(grid), 2).numpy()
    assert (arrays.patch_hw[where] == expected).all()
    bounds = utils.get_vision_cu_seqlens(torch.tensor(grid)).numpy()
    frames = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    assert (arrays.frame_id[where] == frames).all()
    assert (arrays.patches[where, 0] == np.arange(len(where))).all()
    assert arrays.window_valid.ravel().sum() == len(where)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of the merge size 2"):
        vision_arrays(_numbered([[1, 3, 4]]), [[1, 3, 4]], SMALL)
    with pytest.raises(ValueError, match="do not match grid_thw"):
        vision_arrays(_numbered([[1, 4, 4]]), [[1, 4, 6]], SMALL)
    with pytest.raises(ValueError, match="window_size=100"):
        VisionGeometry(window_size=100)


def test_rows_keep_indices_local_and_pad_to_the_budget():
    a = vision_arrays(_numbered([[1, 4, 6]]), [[1, 4, 6]], SMALL)
    b = vision_arrays(_numbered([[2, 4, 4]]) + 100, [[2, 4, 4]], SMALL)
    rows = stack_rows([[a, b], [b]], 96, SMALL)
    assert rows.patches.shape == (2, 96, SMALL.patch_dim)
    assert rows.merge_src[0].tolist() == [0, 1, 4, 2, 3, 5, *range(8, 16), *[0] * 10]
    assert rows.merge_src[1].tolist() == [*range(8), *[0] * 16]
    assert rows.frame_id[0].tolist() == [0] * 24 + [-1] * 8 + [1] * 16 + [2] * 16 + [-1] * 32
    assert rows.frame_id[1].tolist() == [0] * 16 + [1] * 16 + [-1] * 64
    assert (rows.patches[0, 32:64, 0] == np.arange(100, 132)).all()
    assert rows.window_valid.sum((1, 2)).tolist() == [56, 32]
    with pytest.raises(ValueError, match="row 0 needs 64 patch slots, the budget is 48"):
        stack_rows([[a, b]], 48, SMALL)
    with pytest.raises(ValueError, match="not a positive multiple of the window 16"):
        stack_rows([[a]], 40, SMALL)


def test_positions_of_text_image_text_by_hand():
    ids = [1, 2, *[IMAGE] * 6, 3]  # a grid of 4 x 6 patches: 2 x 3 merged tokens
    positions, next_pos = mrope_positions(ids, IDS, [[1, 4, 6]])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert next_pos == 6
    positions, next_pos = mrope_positions([1, 2, 3], IDS)
    assert positions.tolist() == [[0, 1, 2]] * 3 and next_pos == 3


@pytest.mark.parametrize("seconds", [None, [1.0, 3.0], [1.0, 0.5], [0.37, 12.9]])
@pytest.mark.parametrize("tokens_per_second", [2, 4, 25])
def test_positions_equal_hf(seconds, tokens_per_second):
    torch = pytest.importorskip("torch")
    images, videos = [[1, 8, 12], [1, 30, 4]], [[3, 4, 8], [5, 6, 6]]
    ids = [1, *[VIDEO] * 24, 2, 3, *[IMAGE] * 24, 4, *[IMAGE] * 30, 5, 6, *[VIDEO] * 45, 7, 8, 9]
    known = VisionIds(IMAGE, VIDEO, tokens_per_second=tokens_per_second)
    ours, next_pos = mrope_positions(ids, known, images, videos, seconds)
    tokens = torch.tensor([ids])
    kinds = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    model = _hf_model(tokens_per_second)
    if seconds and "int(next(second_per_grid_ts))" in inspect.getsource(model.get_rope_index):
        if any(s != int(s) for s in seconds):
            pytest.skip("this transformers cuts seconds per grid to whole ones; ours follows 5.23")
    theirs, delta = model.get_rope_index(
        tokens,
        mm_token_type_ids=kinds,
        image_grid_thw=torch.tensor(images),
        video_grid_thw=torch.tensor(videos),
        second_per_grid_ts=None if seconds is None else torch.tensor(seconds),
    )
    assert (ours == theirs[:, 0].numpy()).all()
    assert next_pos == len(ids) + int(delta)


def test_placeholders_without_a_fitting_grid_are_refused():
    with pytest.raises(ValueError, match="is 5 long, its grid"):
        mrope_positions([1, *[IMAGE] * 5, 2], IDS, [[1, 4, 6]])
    with pytest.raises(ValueError, match="too few images"):
        mrope_positions([1, *[IMAGE] * 6, 2, *[IMAGE] * 6], IDS, [[1, 4, 6]])
    with pytest.raises(ValueError, match="2 image grids, but 1 in the text"):
        mrope_positions([1, *[IMAGE] * 6], IDS, [[1, 4, 6], [1, 4, 6]])
    with pytest.raises(ValueError, match="1 videos but 2 second_per_grid_ts"):
        mrope_positions([*[VIDEO] * 6], IDS, (), [[1, 4, 6]], [1, 2])
