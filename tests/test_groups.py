"""Which groups teach something, and groups that wait for a later update."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import train_helpers as helpers

from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.loader import LoadedBatch
from srpo_jax.data.processing import Processor
from srpo_jax.data.records import open_records
from srpo_jax.run import checkpoint
from srpo_jax.run.feed import prompt_keys
from srpo_jax.run.pool import Pool, informative
from srpo_jax.structs import Rollout, Verdict

G, R = 4, 6
PLACES = np.ones(4, bool)  # two rows of two prompts
FINAL = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0]], bool)


def verdict(final_PG: np.ndarray) -> Verdict:
    numbers = np.arange(final_PG.size, dtype=np.int32).reshape(final_PG.shape)
    same = dict.fromkeys(("first_correct", "has_first", "has_second", "format_ok"), ~final_PG)
    return Verdict(
        final_correct=final_PG,
        reflection_ok=final_PG,
        first_tokens=numbers,
        total_tokens=numbers + 1,
        block_tokens=np.zeros((*final_PG.shape, 5), np.int32),
        **same,
    )


def test_groups_outside_of_the_band_of_final_correctness_get_weight_0():
    assert informative(verdict(FINAL), 0.1, 0.9).tolist() == [0, 0, 1, 1, 1]
    assert informative(verdict(FINAL), 0.3, 0.7).tolist() == [0, 0, 0, 0, 1]
    assert informative(verdict(FINAL), 0.25, 1.0).tolist() == [1, 0, 1, 1, 1]  # bounds included
    assert informative(verdict(FINAL), 0.0, 1.0).tolist() == [1] * 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    paths = helpers.world(folder)
    processor = Processor(paths["hf_dir"], min_pixels=3136, max_pixels=3136)
    return SimpleNamespace(
        records=open_records(paths["train"]),
        processor=processor,
        encode=PromptEncoder(processor),
        folder=Path(folder),
    )


def fill(pool: Pool, world, first: int, step: int) -> None:
    """Records first to first + 4 with the verdicts FINAL; tokens hold the record's number."""
    P = len(FINAL)
    tokens = np.broadcast_to(np.arange(first, first + P)[:, None, None], (P, G, R)).astype(np.int32)
    rollout = Rollout(
        completions=tokens,
        completion_mask=np.ones((P, G, R), bool),
        finished=np.ones((P, G), bool),
        sample_logp=-tokens.astype(np.float32),
        policy_logp=-tokens.astype(np.float32),
    )
    one = SimpleNamespace(
        sampled=SimpleNamespace(
            records=[world.records[first + i] for i in range(P)], slots=np.arange(P)
        ),
        graded=SimpleNamespace(verdict=verdict(FINAL), rollout=rollout),
        weight=informative(verdict(FINAL), 0.1, 0.9),
    )
    pool.add(one, step)


def new_pool(world, per_row: int = 2, budgets=(64, 128)) -> Pool:
    data = SimpleNamespace(prompts_per_row=per_row, prompt_tokens=64, patch_budgets=budgets)
    return Pool(world.encode, world.processor, data)


def test_pool_gives_the_oldest_groups_with_their_own_prompts_and_keeps_the_rest(world):
    pool = new_pool(world)
    fill(pool, world, 0, step=5)  # keeps records 2, 3, 4
    fill(pool, world, 10, step=6)  # keeps records 12, 13, 14
    update, carried = pool.take(6, PLACES)
    assert update.batch.valid.all() and update.weight.tolist() == [1] * 4
    assert update.rollout.completions[:, 0, 0].tolist() == [2, 3, 4, 12]
    assert carried.tolist() == [True, True, True, False]
    assert update.verdict.final_correct.tolist() == [*FINAL[2:5].tolist(), FINAL[2].tolist()]
    assert update.batch.vision.patches.shape[:2] == (2, 128)  # two pictures of 16 patches a row
    for p, number in enumerate((2, 3, 4, 12)):
        wanted = world.encode(world.records[number])
        got = update.batch.tokens[p, : update.batch.lengths[p]]
        np.testing.assert_array_equal(got, wanted.token_ids)
    assert [group.record.id for group in pool.groups] == ["train-13", "train-14"]

    rest, _ = pool.take(7, PLACES)
    assert rest.batch.valid.tolist() == [True, True, False, False]
    assert rest.weight.tolist() == [1, 1, 0, 0]
    assert rest.rollout.completion_mask[2:].sum() == 0 and not pool.groups
    empty, _ = pool.take(8, PLACES)
    assert not empty.weight.any() and empty.rollout.completions.shape == (4, G, R)


def test_group_that_does_not_fit_a_rows_patches_waits(world):
    pool = new_pool(world, budgets=(64,))  # one picture a row
    fill(pool, world, 0, step=0)
    update, _ = pool.take(0, PLACES)
    assert update.batch.valid.tolist() == [True, False, True, False]
    assert [group.record.id for group in pool.groups] == ["train-4"]


def test_pool_survives_the_checkpoint(world):
    pool, again = (new_pool(world, per_row=3, budgets=(256,)) for _ in range(2))
    fill(pool, world, 0, step=3)
    values, arrays = checkpoint.unpack_host(checkpoint.pack_host(*_wrapped(pool)))
    again.load(values["pending"], arrays)
    assert [g.step for g in again.groups] == [3, 3, 3]
    one, other = (p.take(4, np.ones(3, bool)) for p in (pool, again))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)
    empty = new_pool(world)
    empty.load(*new_pool(world).state())
    assert empty.groups == []


def _wrapped(pool: Pool):
    values, arrays = pool.state()
    return {"pending": values}, arrays


def test_image_bytes_and_odd_fields_of_a_record_go_through_the_checkpoint(world):
    pool, again = new_pool(world), new_pool(world)
    fill(pool, world, 0, step=0)
    data = Path(world.folder / "train_images" / "2.png").read_bytes()
    old = pool.groups[0]
    image = dataclasses.replace(old.record.images[0], data=data, path="")
    extra = {"kept": [1], "odd": np.zeros(2)}
    record = dataclasses.replace(old.record, images=(image,), extra=extra)
    pool.groups[0] = dataclasses.replace(old, record=record)
    values, arrays = checkpoint.unpack_host(checkpoint.pack_host(*_wrapped(pool)))
    again.load(values["pending"], arrays)
    got = again.groups[0].record
    assert got.images[0].data == data and got.extra == {"kept": [1]}
    assert json.dumps(got.answer) == json.dumps(record.answer)


def test_a_prompt_drawn_again_samples_with_another_key_and_neighbours_change_none():
    def keys(ids, passes):
        batch = SimpleNamespace(tokens=np.zeros((4, 1)))
        records = [SimpleNamespace(id=name) for name in ids]
        return prompt_keys(LoadedBatch(batch, records, np.arange(len(ids)), np.array(passes)))

    first = keys(["a", "b", "a"], [0, 0, 0])
    assert len({*first.tolist()}) == 4 and first[3] == 0  # the last one is filler
    assert keys(["b", "c"], [0, 0])[0] == first[1]
    later = keys(["a", "b", "a"], [1, 1, 1])
    assert not {*first[:3].tolist()} & {*later[:3].tolist()}
