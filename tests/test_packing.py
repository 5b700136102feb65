"""SFT's conversations one behind the other: the same batches in fewer slots."""

import numpy as np
import pytest
from loader_helpers import (
    Numbers,
    assert_same_batches,
    budget_of,
    encode_with_images,
    ids_of,
    load,
    lockstep,
)

from srpo_jax.data.batching import Media, encode_arrays
from srpo_jax.data.packing import TOO_MANY, Packer, RowShape, cheapest, row_shapes
from srpo_jax.data.vision_arrays import VisionIds

# Records 0, 1, 2, 3 have 2, 18, 34 and 50 tokens, and as many windows of 64 patches.
IMAGES = {"token_budget": 256, "patch_budgets": (64, 256, 512), "pack": True}


def long(record):
    """10, 20, ... 100 tokens, by the record's number."""
    number = int(record.answer)
    return encode_arrays([number] * (10 + 10 * (number % 10)), VisionIds(-1, -2))


def test_rows_are_halved_and_a_sequence_is_cut_in_quarters():
    shapes = row_shapes(RowShape(4, 1000))
    assert [(one.places, one.tokens) for one in shapes] == [
        *((4, 1000), (2, 1000), (1, 1000), (1, 768), (1, 512), (1, 256)),
    ]
    assert row_shapes(RowShape(1, 52)) == [RowShape(1, 52)]  # programs for nothing


@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_update_learns_from_the_same_conversations_packed_or_not(count):
    settings = {"num_shards": 4, "rows_per_shard": 2, "global_batch_size": 8, "epochs": 2}
    settings["token_budget"] = 256
    alone = [sorted(ids_of(b)) for b in load(Numbers(36), long, **settings)]
    parts = lockstep(
        [
            load(Numbers(36), long, pack=True, process_index=p, process_count=count, **settings)
            for p in range(count)
        ]
    )
    assert {len(part) for part in parts} == {len(alone)} == {9}
    for step, names in enumerate(alone):
        batches = [part[step] for part in parts]
        assert sorted(sum(map(ids_of, batches), [])) == names
        shapes = {(b.arrays.tokens.shape, b.padding_share) for b in batches}
        assert len(shapes) == 1  # all processes run the same program
        for batch in batches:
            for record, place in zip(batch.records, batch.slots, strict=True):
                row = batch.arrays.tokens[place][batch.arrays.segment_ids[place] > 0]
                assert (row == int(record.answer)).sum() == 10 + 10 * (int(record.answer) % 10)


def test_conversations_of_a_sequence_have_segments_and_positions_of_their_own():
    batch = next(load(Numbers(8), pack=True, token_budget=10, shuffle=False))
    assert batch.arrays.tokens.shape == (2, 10)  # of four places two are enough
    assert batch.arrays.segment_ids[0].tolist() == [1] * 3 + [2] * 3 + [3] * 3 + [0]
    assert batch.arrays.mrope[0, 0, :9].tolist() == [0, 1, 2] * 3
    assert batch.slots.tolist() == [0, 0, 0, 1]


def test_padding_is_what_the_rows_in_use_have_left_over():
    settings = {"num_shards": 2, "rows_per_shard": 4, "global_batch_size": 8, "shuffle": False}
    # Four conversations of 100 tokens on each shard: two behind one another in 256.
    source = Numbers(16)
    encoder = lambda record: encode_arrays([1] * 100, VisionIds(-1, -2))  # noqa: E731
    plain = next(load(source, encoder, token_budget=512, **settings))
    assert plain.padding_share == pytest.approx(1 - 800 / (8 * 512))
    packed = next(load(source, encoder, token_budget=512, pack=True, **settings))
    assert packed.arrays.tokens.shape == (8, 512)  # a row of each shard
    assert packed.padding_share == pytest.approx(1 - 800 / (2 * 512))
    assert packed.arrays.valid.reshape(2, 4).tolist() == [[True, False, False, False]] * 2
    shorter = next(load(source, encoder, token_budget=1600, pack=True, **settings))
    assert shorter.arrays.tokens.shape == (8, 512)  # a quarter, up to a multiple of 128


def test_rows_keep_to_their_patches_and_take_the_smallest_budget():
    settings = {"shuffle": False, "global_batch_size": 8, "rows_per_shard": 8}
    batch = next(load(Numbers(8), encode_with_images, **settings, **IMAGES))
    # 2 * (0 + 1 + 2 + 3) windows in rows of at most 8: 2 rows of 128 tokens, 6 windows each.
    windows = (batch.arrays.vision.frame_id.reshape(8, -1, 64) >= 0).any(-1).sum(-1)
    assert windows.sum() == 12 and windows.max() <= budget_of(batch) // 64
    assert batch.arrays.tokens.shape[1] * batch.arrays.valid.sum() < 2 * 256
    for place, record in zip(batch.slots, batch.records, strict=True):
        src = batch.arrays.vision_src[place]
        slots = batch.arrays.vision.merge_src[place][src[src >= 0]]
        pixels = batch.arrays.vision.patches[place].reshape(-1, 4, 1176)[slots]
        assert int(record.answer) in pixels or int(record.answer) % 4 == 0


def test_what_cannot_be_packed_stands_as_it_came():
    def uneven(record):
        return encode_arrays([1] * (6 + int(record.answer) % 5), VisionIds(-1, -2))

    settings = {"token_budget": 11, "global_batch_size": 4, "epochs": 2}
    for plain, packed in zip(
        load(Numbers(12), uneven, **settings),
        load(Numbers(12), uneven, pack=True, **settings),
        strict=True,
    ):
        assert_same_batches(plain, packed)
        assert (plain.slots == packed.slots).all()
        assert plain.padding_share == packed.padding_share > 0


def test_the_largest_conversations_are_placed_first():
    samples = [encode_arrays([1] * n, VisionIds(-1, -2)) for n in (40, 50, 88, 78)]
    (way,) = Packer(shards=1, rows=4, patches=0).ways(samples, RowShape(1, 128))
    assert way is not None and way.rows == 2 and way.groups[:2] == [[0, 2], [1, 3]]


def test_processes_take_the_rows_that_the_neediest_of_them_needs():
    def uneven(record):  # process 1 has the long ones, with four windows each
        long = int(record.answer) % 2
        ids = [1] * (20 + 116 * long) + [90] * 64 * long
        media = Media(np.zeros((256, 1176), np.float32), [[1, 16, 16]]) if long else None
        return encode_arrays(ids, VisionIds(90, 91), media)

    settings = {"num_shards": 2, "rows_per_shard": 4, "global_batch_size": 8, "shuffle": False}
    settings |= {"token_budget": 512, "patch_budgets": (64, 512), "epochs": 1, "pack": True}
    for (batch,) in lockstep(
        [load(Numbers(8), uneven, process_index=p, process_count=2, **settings) for p in range(2)]
    ):
        assert batch.arrays.tokens.shape == (4, 512) and budget_of(batch) == 512
        assert batch.padding_share == pytest.approx(1 - 4 * (20 + 200) / (2 * 2 * 512))


def test_what_fitted_one_after_the_other_is_never_refused_by_a_better_order():
    def windows(n):
        return encode_with_images(Numbers(9)[n])

    # 3, 2, 2 and 3, 2, 2 windows in two rows of 7 each; by size: 3, 3 and 2, 2, 2 and one left.
    samples = [windows(n) for n in (3, 2, 2, 3, 2, 2)]
    packer = Packer(shards=1, rows=2, patches=7 * 64)
    first, *others = packer.ways(samples, RowShape(3, 50))
    assert first is not None and first.groups == [[0], [1], [2], [3], [4], [5]]
    assert first.patches == 7 * 64 and first.rows == 2 and not any(others)


def test_the_cheapest_way_is_the_one_that_all_processes_can_go():
    samples = [long(Numbers(11)[n]) for n in (7, 8, 9, 10)]  # 80, 90, 100 and 10 tokens
    ways = [*Packer(shards=1, rows=4, patches=0).ways(samples, RowShape(1, 512))]
    assert [(way.rows, way.shape.tokens) for way in ways if way] == [
        *((1, 512), (1, 384), (2, 256), (3, 128)),
    ]
    assert cheapest(ways, [1, 1, 2, 3])[0] == 1  # as many slots as in the last, in fewer rows
    assert cheapest(ways, [1, 2, 2, 3])[0] == 3  # another process needs more rows
    assert cheapest([*ways[:3], None], [1, TOO_MANY, TOO_MANY, TOO_MANY])[0] == 0
