"""Batches, budgets, sharding, exact resume, and bad records set aside."""

import itertools
import json

import numpy as np
import pytest
from data_helpers import make_hf_dir, noise_image, png, write_jsonl
from loader_helpers import (
    PAD,
    Numbers,
    assert_same_batches,
    budget_of,
    encode,
    encode_with_images,
    ids_of,
    load,
    lockstep,
    take,
)

from srpo_jax.data.batching import Layout, choose_layout
from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.fields import Record
from srpo_jax.data.processing import Processor
from srpo_jax.data.records import open_records, write_array_record
from srpo_jax.structs import RunError


def test_batches_hold_their_records_in_order():
    batch = next(load(Numbers(20)))
    assert batch.arrays.tokens.shape == (4, 4) and batch.arrays.valid.all()
    assert batch.arrays.tokens[:, 1].tolist() == [int(r.answer) for r in batch.records]
    assert batch.arrays.tokens[:, 3].tolist() == [PAD] * 4
    assert batch.slots.tolist() == [0, 1, 2, 3]


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    loader = load(Numbers(20), epochs=2)
    batches = list(loader)
    first = sum(map(ids_of, batches[:5]), [])
    second = sum(map(ids_of, batches[5:]), [])
    every = sorted(f"r{i}" for i in range(20))
    assert sorted(first) == sorted(second) == every
    assert first != second and first != [f"r{i}" for i in range(20)]
    assert first == sum(map(ids_of, take(load(Numbers(20)), 5)), [])  # the seed decides
    assert first != sum(map(ids_of, take(load(Numbers(20), seed=4), 5)), [])


def test_evaluation_gives_every_record_once_in_order_and_fills_up():
    settings = {"shuffle": False, "epochs": 1, "drop_remainder": False}
    batches = list(load(Numbers(10, bad=(3,)), max_bad_share=0.2, **settings))
    assert [ids_of(b) for b in batches] == [
        ["r0", "r1", "r2", "r4"],
        ["r5", "r6", "r7", "r8"],
        ["r9"],
    ]
    assert batches[2].arrays.valid.tolist() == [True, False, False, False]
    assert batches[2].arrays.tokens.shape == (4, 4)


def test_training_drops_an_incomplete_last_batch():
    assert len(list(load(Numbers(10), epochs=1))) == 2
    loader = load(Numbers(3), epochs=1)
    assert list(loader) == [] and list(loader) == []


# --- processes ---


@pytest.mark.parametrize("count", [2, 4])
def test_processes_partition_the_data_and_the_global_batch_stays_the_same(count):
    alone = [ids_of(b) for b in load(Numbers(24), num_shards=4, epochs=2)]
    parts = [
        list(load(Numbers(24), num_shards=4, epochs=2, process_index=p, process_count=count))
        for p in range(count)
    ]
    assert {len(p) for p in parts} == {12}
    for step in range(12):
        together = [name for part in parts for name in ids_of(part[step])]
        assert sorted(together) == sorted(alone[step])
        assert len(parts[0][step].arrays.tokens) == 4 // count


def test_processes_end_together_in_evaluation():
    settings = {"shuffle": False, "epochs": 1, "drop_remainder": False, "num_shards": 2}
    # 9 records over two processes; three of process 1's are bad, so that it ends two batches early.
    source = Numbers(9, bad=(1, 3, 5))
    first, second = lockstep(
        [
            load(source, process_index=p, process_count=2, max_bad_share=0.9, **settings)
            for p in range(2)
        ]
    )
    assert [ids_of(b) for b in first] == [["r0", "r2"], ["r4", "r6"], ["r8"]]
    assert [ids_of(b) for b in second] == [["r7"], [], []]
    assert not second[1].arrays.valid.any() and second[1].arrays.tokens.shape == (2, 4)


def test_processes_use_the_same_patch_budget():
    settings = {"shuffle": False, "epochs": 1, "num_shards": 2, "global_batch_size": 2}
    budgets = {"patch_budgets": (64, 128, 192), "token_budget": 64}
    first, second = lockstep(
        [
            load(Numbers(8), encode_with_images, process_index=p, process_count=2,
                    **settings, **budgets)
            for p in range(2)
        ]
    )  # fmt: skip
    # Records 0 1 | 2 3 | 4 5 | 6 7 need 0 1 | 2 3 | ... windows.
    assert [budget_of(b) for b in first] == [64, 192, 64, 192]
    assert [budget_of(b) for b in second] == [64, 192, 64, 192]
    assert first[1].arrays.vision.patches.shape == (1, 192, 1176)


def test_a_failing_process_stops_the_others():
    settings = {"shuffle": False, "epochs": 1, "num_shards": 2, "global_batch_size": 2}

    def broken(record):
        if record.id == "r7":
            raise RunError("the disk is gone")
        return encode(record)

    first, second = lockstep(
        [load(Numbers(40), broken, process_index=p, process_count=2, **settings) for p in (0, 1)]
    )
    assert isinstance(first, RunError) and "another process" in str(first)
    assert isinstance(second, RunError) and "the disk is gone" in str(second)


# --- fillers ---


def test_rows_are_chosen_from_the_number_of_shards_and_updates_keep_their_sequences():
    for sequences, updates, most, shards, count in itertools.product(
        (6, 16, 64, 128), (1, 2, 8), (1, 2, 4), (1, 3, 8, 16, 24, 32, 128), (1, 2, 3, 8)
    ):
        if sequences % updates or shards % count:
            continue
        layout = choose_layout(sequences, shards, most, updates)
        parts = [layout.places(i, count) for i in range(count)]
        places_SMB = np.concatenate(parts).reshape(shards, layout.rows, layout.per_row)
        assert layout.per_row <= most and places_SMB.size == layout.size
        for update in range(updates):  # all of its sequences stand in its micro-batches
            rows = places_SMB[:, layout.rows_of(update)]
            assert (rows == update).sum() == (places_SMB == update).sum() == sequences // updates
        taken = [int((part >= 0).sum()) for part in parts]
        assert sum(taken) == sequences and max(taken) - min(taken) <= 1
        each, rest = divmod(sequences, shards * most)
        if not rest and each % updates == 0:  # nothing is left over: no fillers
            assert (layout.rows, layout.per_row, layout.sharing) == (each, most, 1)
            assert layout.size == sequences


def test_few_sequences_on_many_shards_share_rows_among_updates():
    assert choose_layout(128, 32, 1, 8) == Layout(128, 32, rows=4, updates=8, sharing=2)
    assert choose_layout(128, 128, 2, 8) == Layout(128, 128, rows=1, updates=8, sharing=8)
    assert choose_layout(16, 24, 1).size == 24


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fillers_change_neither_the_batches_nor_their_order(count):
    settings = {"global_batch_size": 4, "epochs": 3}  # on six shards
    alone = [ids_of(b) for b in load(Numbers(24), **settings)]
    parts = [
        list(load(Numbers(24), **settings, num_shards=6, process_index=p, process_count=count))
        for p in range(count)
    ]
    assert {len(part) for part in parts} == {18}
    for step, names in enumerate(alone):
        batches = [part[step] for part in parts]
        assert sorted(sum(map(ids_of, batches), [])) == sorted(names)
        assert [len(b.arrays.tokens) for b in batches] == [6 // count] * count
        for batch in batches:
            assert batch.slots.tolist() == np.flatnonzero(batch.arrays.valid).tolist()
            tokens = batch.arrays.tokens[batch.slots, 1].tolist()
            assert tokens == [int(record.answer) for record in batch.records]
            assert batch.passes.tolist() == [step * 4 // 24] * len(batch.records)
    if count == 1:
        assert [ids_of(b) for b in parts[0]] == alone


def test_a_place_among_fillers_is_found_again():
    settings = {"num_shards": 6, "process_index": 1, "process_count": 3, "epochs": 2}
    loader = load(Numbers(24), **settings)
    take(loader, 4)
    again = load(Numbers(24), **settings)
    again.set_state(loader.get_state())
    for a, b in zip(loader, again, strict=True):
        assert_same_batches(a, b)


def test_a_process_without_a_sequence_keeps_step():
    settings = {"num_shards": 4, "global_batch_size": 2, "epochs": 1}
    parts = lockstep(
        [load(Numbers(8), process_index=p, process_count=4, **settings) for p in range(4)]
    )
    assert [len(part) for part in parts] == [4] * 4
    assert [sum(map(ids_of, part), []) == [] for part in parts] == [False, False, True, True]


# --- budgets ---


def test_the_smallest_budget_that_fits_is_used():
    settings = {"shuffle": False, "epochs": 1, "global_batch_size": 1, "token_budget": 64}
    loader = load(Numbers(8), encode_with_images, patch_budgets=(192, 64), **settings)
    assert [budget_of(b) for b in loader] == [64, 64, 192, 192] * 2


def test_rows_are_balanced_when_that_saves_a_budget():
    # Windows 3 2 1 0 in rows of two: in order 5 and 1, balanced 3 and 3.
    settings = {"shuffle": False, "epochs": 1, "num_shards": 2, "token_budget": 64}

    class Backwards(Numbers):
        def __getitem__(self, i):
            return super().__getitem__(self.count - 1 - i)

    small = next(load(Backwards(4), encode_with_images, patch_budgets=(192, 320), **settings))
    assert budget_of(small) == 192 and ids_of(small) == ["r3", "r0", "r2", "r1"]
    large = next(load(Backwards(4), encode_with_images, patch_budgets=(320,), **settings))
    assert budget_of(large) == 320 and ids_of(large) == ["r3", "r2", "r1", "r0"]
    for batch in (small, large):
        for b, record in enumerate(batch.records):
            src = batch.arrays.vision_src[b][batch.arrays.vision_src[b] >= 0]
            slots = batch.arrays.vision.merge_src[b // 2][src]
            pixels = batch.arrays.vision.patches[b // 2].reshape(-1, 4, 1176)[slots]
            assert (pixels == int(record.answer)).all()


def test_images_that_find_no_room_wait_for_the_next_batch():
    settings = {"shuffle": False, "epochs": 1, "drop_remainder": False, "token_budget": 64}
    loader = load(
        Numbers(16), encode_with_images, patch_budgets=(320,), global_batch_size=4, **settings
    )
    batches = list(loader)
    everything = sum(map(ids_of, batches), [])
    assert sorted(everything) == sorted(f"r{i}" for i in range(16))
    assert loader.bad == 0 and len(batches) >= 5
    for batch in batches:
        assert sum(int(r.answer) % 4 for r in batch.records) <= 5
        assert batch.arrays.valid.tolist() == [True] * len(batch.records) + [False] * (
            4 - len(batch.records)
        )


def test_a_budget_that_can_never_hold_a_row_stops_the_run():
    class Large(Numbers):
        def __getitem__(self, i):
            return Record(f"r{i}", "q", "3", origin=f"n:{i}")

    loader = load(Large(200), encode_with_images, patch_budgets=(192,), token_budget=64)
    with pytest.raises(RunError, match="4 prompts a row need more than 192 patches"):
        next(loader)


def test_settings_that_do_not_divide_are_refused():
    for settings, text in (
        ({"num_shards": 1, "process_count": 2}, "num_shards=1 is not a multiple of the 2 proc"),
        ({"patch_budgets": (100,)}, "positive multiples of 64"),
        ({"token_budget": 0}, "must be above 0"),
        ({"global_batch_size": 0}, "all above 0"),
        ({"updates": 3}, "sequences a multiple of updates"),
        ({"updates": 2}, "rows do not divide"),
    ):
        with pytest.raises(ValueError, match=text):
            load(Numbers(4), **settings)
    with pytest.raises(RunError, match="no records"):
        load(Numbers(0))


# --- resuming ---


RESUME = {
    "plain": ({}, encode),
    "images": ({"patch_budgets": (64, 320), "token_budget": 64}, encode_with_images),
    "pack": ({"pack": True, "patch_budgets": (64, 320), "token_budget": 64}, encode_with_images),
    "mix": ({"mix": (0.5, 0.5)}, encode),
}


@pytest.mark.parametrize("kind", RESUME)
def test_resume_is_exact_at_every_batch(kind):
    settings, encoder = RESUME[kind]
    settings = {**settings, "max_bad_share": 0.5}
    source = Numbers(13, bad=(2, 7), sizes=(10, 3))
    full = load(source, encoder, **settings)
    batches, states = [], [full.get_state()]
    for _ in range(9):
        batches.append(next(full))
        states.append(json.loads(json.dumps(full.get_state())))
    if kind == "images":
        assert any(s["waiting"] for s in states)  # deferred records are part of the place
    for cut in (0, 1, 4, 8):
        again = load(source, encoder, **settings)
        take(again, 2)  # whatever it did before
        again.set_state(states[cut])
        for expected in batches[cut:]:
            assert_same_batches(next(again), expected)
        assert (again.seen, again.bad) == (full.seen, full.bad)
        assert again.get_state() == states[-1]


def test_workers_give_the_same_batches_and_places(tmp_path):
    rows = []
    for i in range(9):
        image = {"bytes": png(noise_image(*((56, 56), (84, 56), (140, 112))[i % 3], seed=i))}
        rows.append({"id": f"r{i}", "problem": f"sum {i}?", "answer": i, "image": image})
    write_array_record(
        tmp_path / "d.array_record", [*rows[:4], {"problem": "no answer"}, *rows[4:]]
    )
    source = open_records(tmp_path / "d.array_record")
    encoder = PromptEncoder(Processor(make_hf_dir(tmp_path / "hf")))
    settings = {
        "token_budget": 2048,
        "patch_budgets": (512, 1024),
        "num_shards": 2,
        "max_bad_share": 0.5,
    }
    plain = load(source, encoder, **settings)
    before = take(plain, 2)
    state = plain.get_state()
    middle, after_state, end = take(plain, 2), plain.get_state(), take(plain, 1)
    workers = load(source, encoder, workers=2, **settings)
    workers.set_state(state)
    for batch in middle:
        got = next(workers)
        assert_same_batches(got, batch)  # with the image files: a group that waits is encoded again
        assert [r.images for r in got.records] == [r.images for r in batch.records]
        assert got.records[0].images[0].data
    assert workers.get_state() == after_state and workers.bad
    workers.close()
    again = load(source, encoder, **settings)
    again.set_state(after_state)
    assert_same_batches(next(again), end[0])
    assert_same_batches(next(load(source, encoder, **settings)), before[0])


def test_workers_refuse_too_little_shared_memory(monkeypatch):
    usage = type("Usage", (), {"free": 64 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    settings = {"workers": 4, "patch_budgets": (4096,), "token_budget": 64}
    with pytest.raises(RunError, match="4 workers need 367 MiB in /dev/shm"):
        next(load(Numbers(8), encode_with_images, **settings))


def test_a_mix_draws_each_source_by_its_weight_and_goes_through_all_of_it():
    loader = load(Numbers(1000, sizes=(960, 40)), mix=(0.75, 0.25), global_batch_size=64)
    drawn = [[int(r.answer) for r in batch.records] for batch in take(loader, 20)]
    assert all(sum(i < 960 for i in batch) == 48 for batch in drawn)  # the share of each batch
    large = [i for batch in drawn for i in batch if i < 960]
    assert sorted(large) == list(range(960))  # once before any comes again
    small = [i for batch in drawn for i in batch if i >= 960]
    assert sorted(small) == sorted([*range(960, 1000)] * 8)
    assert small[:40] != small[40:80] and small[:40] != sorted(small[:40])


def test_an_epoch_of_a_mix_is_as_many_draws_as_there_are_records():
    settings = {"mix": (0.5, 0.5), "epochs": 2, "global_batch_size": 10}
    assert len(list(load(Numbers(100, sizes=(90, 10)), **settings))) == 20


@pytest.mark.parametrize("count", [2, 4])
def test_the_batches_of_a_mix_do_not_depend_on_the_number_of_processes(count):
    source = Numbers(50, sizes=(40, 10))
    settings = {"num_shards": 4, "mix": (0.5, 0.5), "global_batch_size": 32}
    alone = [ids_of(batch) for batch in take(load(source, **settings), 6)]
    parts = [
        take(load(source, process_index=p, process_count=count, **settings), 6)
        for p in range(count)
    ]
    for step in range(6):
        together = [name for part in parts for name in ids_of(part[step])]
        assert sorted(together) == sorted(alone[step])
    # Every process reads of both sources, though they take turns.
    for part in parts:
        numbers = [int(r.answer) for batch in part for r in batch.records]
        assert 0.3 < sum(i < 40 for i in numbers) / len(numbers) < 0.7


def go_on(source, encoder, states, count, steps, rows=1, **settings):
    """Batches and places of ``count`` processes that go on from ``states``, in step."""
    loaders = []
    for index in range(count):
        settings |= {"process_index": index, "process_count": count, "num_shards": count}
        settings["rows_per_shard"] = max(1, rows // count)
        loaders.append(load(source, encoder, max_bad_share=0.9, **settings))
        if states:
            loaders[-1].set_state(*states)
    batches = [[next(loader) for loader in loaders] for _ in range(steps)]
    return batches, json.loads(json.dumps([loader.get_state() for loader in loaders]))


@pytest.mark.parametrize("counts", [(2, 1, 2), (1, 4, 3), (8, 4, 2, 8)])
def test_another_number_of_processes_goes_on_with_the_same_batches(counts):
    source, settings = Numbers(50), {"global_batch_size": 8}
    straight, _ = go_on(source, encode, [], 1, 3 * len(counts), **settings)
    got, states = [], []
    for count in counts:
        batches, states = go_on(source, encode, states, count, 3, **settings)
        got += batches
    ids = [[sorted(sum(map(ids_of, parts), [])) for parts in run] for run in (straight, got)]
    assert ids[0] == ids[1]
    assert sum(state["seen"] for state in states) == 24 * len(counts)


@pytest.mark.parametrize("counts", [(2, 1, 2), (4, 2, 1, 2)])
def test_with_bad_and_waiting_records_nothing_comes_twice_and_nothing_is_lost(counts):
    """Where processes are at different places: some read further, some hold records back."""
    source = Numbers(500, bad=tuple(range(0, 500, 7)))
    settings = {"global_batch_size": 12, "rows": 4}
    settings |= {"patch_budgets": (64, 320), "token_budget": 64}
    seen, states, uneven = [], [], False
    for count in counts:
        batches, states = go_on(source, encode_with_images, states, count, 5, **settings)
        seen += [name for parts in batches for part in parts for name in ids_of(part)]
        uneven |= any(state["waiting"] or state["ahead"] for state in states)
    assert uneven and len(seen) == len(set(seen)) == 60 * len(counts)
    total = sum(state["seen"] for state in states)
    assert sum(state["bad"] for state in states) == total - len(seen) - sum(
        len(state["waiting"]) for state in states
    )
    # What was read or left out is the beginning of the stream, but for what one read ahead.
    order = sum(map(ids_of, take(load(source, encode, max_bad_share=0.9), 100)), [])
    held = 40 * max(counts)
    assert set(order[: len(seen) - held]) <= set(seen) <= set(order[: len(seen) + held])


def test_a_mix_needs_a_weight_for_each_source():
    with pytest.raises(RunError, match=r"data.mix=\(0.5, 0.5\): 2 weights for 3 sources of rec"):
        load(Numbers(9, sizes=(3, 3, 3)), mix=(0.5, 0.5))


def test_a_place_in_other_data_is_refused(tmp_path):
    state = load(Numbers(8)).get_state()
    for loader, name in (
        (load(Numbers(9)), "records was 8 and is 9"),
        (load(Numbers(8), seed=4), "seed was 3 and is 4"),
        (load(Numbers(8), shuffle=False), "shuffle"),
        (load(Numbers(8, sizes=(4, 4)), mix=(1, 3)), r"mix was \[\] and is \[\[1, 3\], \[4"),
    ):
        with pytest.raises(ValueError, match=name):
            loader.set_state(state)
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "q", "answer": 1}] * 3)
    state = load(open_records(path)).get_state()
    write_jsonl(path, [{"problem": "q", "answer": 12}] * 3)
    with pytest.raises(ValueError, match="the saved place in the data does not fit: data was"):
        load(open_records(path)).set_state(state)
