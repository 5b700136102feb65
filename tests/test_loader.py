"""Batches, budgets, sharding, exact resume, and bad records set aside."""

import itertools
import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
from data_helpers import make_hf_dir, noise_image, png, write_dots, write_jsonl

from srpo_jax.data.batching import Layout, Media, choose_layout, encode_arrays
from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.data.files import read_jsonl
from srpo_jax.data.images import load_image
from srpo_jax.data.loader import Loader, too_many
from srpo_jax.data.processing import Processor
from srpo_jax.data.quarantine import Quarantine
from srpo_jax.data.records import open_records, write_array_record
from srpo_jax.data.stream import LoaderConfig
from srpo_jax.data.vision_arrays import VisionIds
from srpo_jax.learn import lanes
from srpo_jax.structs import RunError

PAD = 9


@dataclass
class Numbers:
    """A source of ``count`` records; those in ``bad`` cannot be read."""

    count: int
    bad: tuple = ()
    sizes: tuple = ()  # of the sources that a mix draws of

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad:
            raise RecordError(f"n:{i}", f"bad {i}")
        return Record(f"r{i}", "q", str(i), origin=f"n:{i}")


def encode(record):
    """Three tokens, the second of which is the record's number."""
    return encode_arrays([1, int(record.answer), 2], VisionIds(-1, -2), origin=record.origin)


def encode_with_images(record):
    """As many 64-slot windows as the record's number says (0 to 3: number modulo 4)."""
    windows = int(record.answer) % 4
    tokens = [1, *[90] * 16 * windows, 2]
    return encode_arrays(
        tokens,
        VisionIds(90, 91),
        Media(
            pixel_values=np.full((64 * windows, 1176), int(record.answer), np.float32),
            image_grid_thw=[[1, 8, 8 * windows]] if windows else (),
        ),
        origin=record.origin,
    )


def _budget(loaded):
    """The patch budget that a batch was given."""
    return 0 if loaded.arrays.vision is None else loaded.arrays.vision.patches.shape[1]


def _loader(source, encoder=encode, **settings):
    base = {"global_batch_size": 4, "token_budget": 4, "seed": 3, "pad_id": PAD}
    base |= settings
    names = ("check_record", "gather", "quarantine_path", "say", "on_bad")
    others = {name: base.pop(name) for name in names if name in base}
    return Loader(source, encoder, LoaderConfig(**base), **others)


def _ids(batch):
    return [r.id for r in batch.records]


def _take(loader, count):
    return [next(loader) for _ in range(count)]


def _same(a, b):
    assert _ids(a) == _ids(b) and _budget(a) == _budget(b)
    for name in ("tokens", "segment_ids", "mrope", "vision_src", "lengths", "valid"):
        assert (getattr(a.arrays, name) == getattr(b.arrays, name)).all(), name
    if a.arrays.vision is not None:
        assert (a.arrays.vision.patches == b.arrays.vision.patches).all()


def test_batches_hold_their_records_in_order():
    batch = next(_loader(Numbers(20)))
    assert batch.arrays.tokens.shape == (4, 4) and batch.arrays.valid.all()
    assert batch.arrays.tokens[:, 1].tolist() == [int(r.answer) for r in batch.records]
    assert batch.arrays.tokens[:, 3].tolist() == [PAD] * 4
    assert batch.slots.tolist() == [0, 1, 2, 3]


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    loader = _loader(Numbers(20), epochs=2)
    batches = list(loader)
    first = sum(map(_ids, batches[:5]), [])
    second = sum(map(_ids, batches[5:]), [])
    every = sorted(f"r{i}" for i in range(20))
    assert sorted(first) == sorted(second) == every
    assert first != second and first != [f"r{i}" for i in range(20)]
    assert first == sum(map(_ids, _take(_loader(Numbers(20)), 5)), [])  # the seed decides
    assert first != sum(map(_ids, _take(_loader(Numbers(20), seed=4), 5)), [])


def test_evaluation_gives_every_record_once_in_order_and_fills_up():
    settings = {"shuffle": False, "epochs": 1, "drop_remainder": False}
    batches = list(_loader(Numbers(10, bad=(3,)), max_bad_share=0.2, **settings))
    assert [_ids(b) for b in batches] == [
        ["r0", "r1", "r2", "r4"],
        ["r5", "r6", "r7", "r8"],
        ["r9"],
    ]
    assert batches[2].arrays.valid.tolist() == [True, False, False, False]
    assert batches[2].arrays.tokens.shape == (4, 4)


def test_training_drops_an_incomplete_last_batch():
    assert len(list(_loader(Numbers(10), epochs=1))) == 2
    loader = _loader(Numbers(3), epochs=1)
    assert list(loader) == [] and list(loader) == []


# --- processes ---


def _lockstep(loaders):
    """Run the loaders of several processes together, as their ``gather`` demands."""
    import threading

    barrier, told, out = threading.Barrier(len(loaders)), {}, {}

    def gather_for(index):
        def gather(own):
            told[index] = own
            barrier.wait(20)
            everyone = [told[i] for i in range(len(loaders))]
            barrier.wait(20)
            return everyone

        return gather

    def run(index, loader):
        loader._everyone = gather_for(index)
        try:
            out[index] = list(loader)
        except RunError as error:
            out[index] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(loaders)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    return [out[i] for i in range(len(loaders))]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_partition_the_data_and_the_global_batch_stays_the_same(count):
    alone = [_ids(b) for b in _loader(Numbers(24), num_shards=4, epochs=2)]
    parts = [
        list(_loader(Numbers(24), num_shards=4, epochs=2, process_index=p, process_count=count))
        for p in range(count)
    ]
    assert {len(p) for p in parts} == {12}
    for step in range(12):
        together = [name for part in parts for name in _ids(part[step])]
        assert sorted(together) == sorted(alone[step])
        assert len(parts[0][step].arrays.tokens) == 4 // count


def test_processes_end_together_in_evaluation():
    settings = {"shuffle": False, "epochs": 1, "drop_remainder": False, "num_shards": 2}
    # 9 records over two processes; three of process 1's are bad, so that it ends two batches early.
    source = Numbers(9, bad=(1, 3, 5))
    first, second = _lockstep(
        [
            _loader(source, process_index=p, process_count=2, max_bad_share=0.9, **settings)
            for p in range(2)
        ]
    )
    assert [_ids(b) for b in first] == [["r0", "r2"], ["r4", "r6"], ["r8"]]
    assert [_ids(b) for b in second] == [["r7"], [], []]
    assert not second[1].arrays.valid.any() and second[1].arrays.tokens.shape == (2, 4)


def test_processes_use_the_same_patch_budget():
    settings = {"shuffle": False, "epochs": 1, "num_shards": 2, "global_batch_size": 2}
    budgets = {"patch_budgets": (64, 128, 192), "token_budget": 64}
    first, second = _lockstep(
        [
            _loader(Numbers(8), encode_with_images, process_index=p, process_count=2,
                    **settings, **budgets)
            for p in range(2)
        ]
    )  # fmt: skip
    # Records 0 1 | 2 3 | 4 5 | 6 7 need 0 1 | 2 3 | ... windows.
    assert [_budget(b) for b in first] == [64, 192, 64, 192]
    assert [_budget(b) for b in second] == [64, 192, 64, 192]
    assert first[1].arrays.vision.patches.shape == (1, 192, 1176)


def test_a_failing_process_stops_the_others():
    settings = {"shuffle": False, "epochs": 1, "num_shards": 2, "global_batch_size": 2}

    def broken(record):
        if record.id == "r7":
            raise RunError("the disk is gone")
        return encode(record)

    first, second = _lockstep(
        [_loader(Numbers(40), broken, process_index=p, process_count=2, **settings) for p in (0, 1)]
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
        shape = (layout.per_row, 1, 1, 1, layout.rows, updates, layout.sharing)
        budgets = lanes.Budgets(*shape)
        for update in range(updates):  # all of its sequences stand in its micro-batches
            rows = places_SMB[:, budgets.rows_of(update)]
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
    alone = [_ids(b) for b in _loader(Numbers(24), **settings)]
    parts = [
        list(_loader(Numbers(24), **settings, num_shards=6, process_index=p, process_count=count))
        for p in range(count)
    ]
    assert {len(part) for part in parts} == {18}
    for step, names in enumerate(alone):
        batches = [part[step] for part in parts]
        assert sorted(sum(map(_ids, batches), [])) == sorted(names)
        assert [len(b.arrays.tokens) for b in batches] == [6 // count] * count
        for batch in batches:
            assert batch.slots.tolist() == np.flatnonzero(batch.arrays.valid).tolist()
            tokens = batch.arrays.tokens[batch.slots, 1].tolist()
            assert tokens == [int(record.answer) for record in batch.records]
            assert batch.passes.tolist() == [step * 4 // 24] * len(batch.records)
    if count == 1:
        assert [_ids(b) for b in parts[0]] == alone


def test_a_place_among_fillers_is_found_again():
    settings = {"num_shards": 6, "process_index": 1, "process_count": 3, "epochs": 2}
    loader = _loader(Numbers(24), **settings)
    _take(loader, 4)
    again = _loader(Numbers(24), **settings)
    again.set_state(loader.get_state())
    for a, b in zip(loader, again, strict=True):
        _same(a, b)


def test_a_process_without_a_sequence_keeps_step_and_packing_leaves_fillers_out():
    settings = {"num_shards": 4, "global_batch_size": 2, "epochs": 1}
    parts = _lockstep(
        [_loader(Numbers(8), process_index=p, process_count=4, **settings) for p in range(4)]
    )
    assert [len(part) for part in parts] == [4] * 4
    assert [sum(map(_ids, part), []) == [] for part in parts] == [False, False, True, True]
    packed = next(_loader(Numbers(40), num_shards=3, pack=True, token_budget=10, shuffle=False,
                          global_batch_size=2))  # fmt: skip
    assert packed.arrays.valid.tolist() == [True, True, False] and len(packed.records) == 6


# --- budgets ---


def test_the_smallest_budget_that_fits_is_used():
    settings = {"shuffle": False, "epochs": 1, "global_batch_size": 1, "token_budget": 64}
    loader = _loader(Numbers(8), encode_with_images, patch_budgets=(192, 64), **settings)
    assert [_budget(b) for b in loader] == [64, 64, 192, 192] * 2


def test_rows_are_balanced_when_that_saves_a_budget():
    # Windows 3 2 1 0 in rows of two: in order 5 and 1, balanced 3 and 3.
    settings = {"shuffle": False, "epochs": 1, "num_shards": 2, "token_budget": 64}

    class Backwards(Numbers):
        def __getitem__(self, i):
            return super().__getitem__(self.count - 1 - i)

    small = next(_loader(Backwards(4), encode_with_images, patch_budgets=(192, 320), **settings))
    assert _budget(small) == 192 and _ids(small) == ["r3", "r0", "r2", "r1"]
    large = next(_loader(Backwards(4), encode_with_images, patch_budgets=(320,), **settings))
    assert _budget(large) == 320 and _ids(large) == ["r3", "r2", "r1", "r0"]
    for batch in (small, large):
        for b, record in enumerate(batch.records):
            src = batch.arrays.vision_src[b][batch.arrays.vision_src[b] >= 0]
            slots = batch.arrays.vision.merge_src[b // 2][src]
            pixels = batch.arrays.vision.patches[b // 2].reshape(-1, 4, 1176)[slots]
            assert (pixels == int(record.answer)).all()


def test_images_that_find_no_room_wait_for_the_next_batch():
    settings = {"shuffle": False, "epochs": 1, "drop_remainder": False, "token_budget": 64}
    loader = _loader(
        Numbers(16), encode_with_images, patch_budgets=(320,), global_batch_size=4, **settings
    )
    batches = list(loader)
    everything = sum(map(_ids, batches), [])
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

    loader = _loader(Large(200), encode_with_images, patch_budgets=(192,), token_budget=64)
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
            _loader(Numbers(4), **settings)
    with pytest.raises(RunError, match="no records"):
        _loader(Numbers(0))


def test_packing_fills_sequences_and_loses_nothing():
    settings = {"shuffle": False, "epochs": 1, "drop_remainder": False, "pack": True}
    loader = _loader(Numbers(40), global_batch_size=2, token_budget=10, **settings)
    batches = list(loader)
    assert sum(map(_ids, batches), []) == [f"r{i}" for i in range(40)]
    assert [len(b.records) for b in batches] == [6] * 6 + [4]
    assert batches[0].arrays.segment_ids[0].tolist() == [1] * 3 + [2] * 3 + [3] * 3 + [0]
    assert batches[0].slots.tolist() == [0, 0, 0, 1, 1, 1]
    assert batches[6].arrays.valid.tolist() == [True, True]


# --- resuming ---


RESUME = {
    "plain": ({}, encode),
    "images": ({"patch_budgets": (64, 320), "token_budget": 64}, encode_with_images),
    "pack": ({"pack": True, "token_budget": 10}, encode),
    "mix": ({"mix": (0.5, 0.5)}, encode),
}


@pytest.mark.parametrize("kind", RESUME)
def test_resume_is_exact_at_every_batch(kind):
    settings, encoder = RESUME[kind]
    settings = {**settings, "max_bad_share": 0.5}
    source = Numbers(13, bad=(2, 7), sizes=(10, 3))
    full = _loader(source, encoder, **settings)
    batches, states = [], [full.get_state()]
    for _ in range(9):
        batches.append(next(full))
        states.append(json.loads(json.dumps(full.get_state())))
    if kind == "images":
        assert any(s["waiting"] for s in states)  # deferred records are part of the place
    for cut in (0, 1, 4, 8):
        again = _loader(source, encoder, **settings)
        _take(again, 2)  # whatever it did before
        again.set_state(states[cut])
        for expected in batches[cut:]:
            _same(next(again), expected)
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
    plain = _loader(source, encoder, **settings)
    before = _take(plain, 2)
    state = plain.get_state()
    middle, after_state, end = _take(plain, 2), plain.get_state(), _take(plain, 1)
    workers = _loader(source, encoder, workers=2, **settings)
    workers.set_state(state)
    for batch in middle:
        got = next(workers)
        _same(got, batch)  # with the image files: a group that waits is encoded again
        assert [r.images for r in got.records] == [r.images for r in batch.records]
        assert got.records[0].images[0].data
    assert workers.get_state() == after_state and workers.bad
    workers.close()
    again = _loader(source, encoder, **settings)
    again.set_state(after_state)
    _same(next(again), end[0])
    _same(next(_loader(source, encoder, **settings)), before[0])


def test_workers_refuse_too_little_shared_memory(monkeypatch):
    usage = type("Usage", (), {"free": 64 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    settings = {"workers": 4, "patch_budgets": (4096,), "token_budget": 64}
    with pytest.raises(RunError, match="4 workers need 367 MiB in /dev/shm"):
        next(_loader(Numbers(8), encode_with_images, **settings))


def test_a_mix_draws_each_source_by_its_weight_and_goes_through_all_of_it():
    loader = _loader(Numbers(1000, sizes=(960, 40)), mix=(0.75, 0.25), global_batch_size=64)
    drawn = [[int(r.answer) for r in batch.records] for batch in _take(loader, 20)]
    assert all(sum(i < 960 for i in batch) == 48 for batch in drawn)  # the share of each batch
    large = [i for batch in drawn for i in batch if i < 960]
    assert sorted(large) == list(range(960))  # once before any comes again
    small = [i for batch in drawn for i in batch if i >= 960]
    assert sorted(small) == sorted([*range(960, 1000)] * 8)
    assert small[:40] != small[40:80] and small[:40] != sorted(small[:40])


def test_an_epoch_of_a_mix_is_as_many_draws_as_there_are_records():
    settings = {"mix": (0.5, 0.5), "epochs": 2, "global_batch_size": 10}
    assert len(list(_loader(Numbers(100, sizes=(90, 10)), **settings))) == 20


@pytest.mark.parametrize("count", [2, 4])
def test_the_batches_of_a_mix_do_not_depend_on_the_number_of_processes(count):
    source = Numbers(50, sizes=(40, 10))
    settings = {"num_shards": 4, "mix": (0.5, 0.5), "global_batch_size": 32}
    alone = [_ids(batch) for batch in _take(_loader(source, **settings), 6)]
    parts = [
        _take(_loader(source, process_index=p, process_count=count, **settings), 6)
        for p in range(count)
    ]
    for step in range(6):
        together = [name for part in parts for name in _ids(part[step])]
        assert sorted(together) == sorted(alone[step])
    # Every process reads of both sources, though they take turns.
    for part in parts:
        numbers = [int(r.answer) for batch in part for r in batch.records]
        assert 0.3 < sum(i < 40 for i in numbers) / len(numbers) < 0.7


def test_a_mix_needs_a_weight_for_each_source():
    with pytest.raises(RunError, match=r"data.mix=\(0.5, 0.5\): 2 weights for 3 sources of rec"):
        _loader(Numbers(9, sizes=(3, 3, 3)), mix=(0.5, 0.5))


def test_a_place_in_other_data_is_refused(tmp_path):
    state = _loader(Numbers(8)).get_state()
    for loader, name in (
        (_loader(Numbers(9)), "records was 8 and is 9"),
        (_loader(Numbers(8), seed=4), "seed was 3 and is 4"),
        (_loader(Numbers(8), shuffle=False), "shuffle"),
        (_loader(Numbers(8), num_shards=2, process_count=2), "process_count"),
        (_loader(Numbers(8, sizes=(4, 4)), mix=(1, 3)), r"mix was \[\] and is \[\[1, 3\], \[4"),
    ):
        with pytest.raises(ValueError, match=name):
            loader.set_state(state)
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "q", "answer": 1}] * 3)
    state = _loader(open_records(path)).get_state()
    write_jsonl(path, [{"problem": "q", "answer": 12}] * 3)
    with pytest.raises(ValueError, match="the saved place in the data does not fit: data was"):
        _loader(open_records(path)).set_state(state)


# --- bad records ---


def test_bad_records_are_replaced_counted_and_listed(tmp_path):
    path = tmp_path / "out" / "quarantine.jsonl"
    loader = _loader(Numbers(20, bad=(3, 8)), quarantine_path=path, max_bad_share=0.2, epochs=3)
    batches = list(loader)
    assert len(batches) == 13 and all(b.arrays.valid.all() for b in batches)
    assert loader.bad == 6 and loader.seen == 60  # three passes
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["origin"] for line in lines) == ["n:3", "n:8"]  # each once
    assert lines[0].keys() == {"origin", "id", "reason"}
    state = loader.get_state()
    with open(path, "a") as file:
        file.write('{"origin": "n:')  # torn by a crash
    again = _loader(Numbers(20, bad=(3, 8, 9)), quarantine_path=path, max_bad_share=0.2, epochs=1)
    list(again)
    origins = []
    for line in path.read_text().splitlines():
        if line.endswith("}"):
            origins.append(json.loads(line)["origin"])
    assert sorted(origins) == ["n:3", "n:8", "n:9"]
    assert state["bad"] == 6


def test_a_bad_record_is_listed_whatever_its_text_and_once(tmp_path):
    path = tmp_path / "q.jsonl"
    odd = RecordError("half \ud83d.jsonl:1", "line\u2028separator \udcff")
    for _ in range(2):  # the second run knows it
        Quarantine(path).add(odd, "id \ud83d")
    assert read_jsonl(path) == [{"origin": odd.origin, "id": "id \ud83d", "reason": odd.reason}]


def test_each_process_lists_its_own(tmp_path):
    for p in range(2):
        loader = _loader(
            Numbers(40, bad=(0, 1)),
            shuffle=False,
            epochs=1,
            num_shards=2,
            process_index=p,
            process_count=2,
            max_bad_share=0.5,
            quarantine_path=tmp_path / "q.jsonl",
        )
        list(loader)
    assert json.loads((tmp_path / "q.0.jsonl").read_text())["origin"] == "n:0"
    assert json.loads((tmp_path / "q.1.jsonl").read_text())["origin"] == "n:1"


def test_too_many_bad_records_stop_the_run(tmp_path):
    source = Numbers(1000, bad=tuple(range(0, 1000, 10)))
    assert len(list(_loader(source, epochs=1, max_bad_share=0.08))) == 225
    loader = _loader(source, epochs=1, max_bad_share=0.03, quarantine_path=tmp_path / "q.jsonl")
    with pytest.raises(
        RunError, match=r"of \d+ records are bad \(listed in .*q.jsonl\): more than data.max_bad_sh"
    ):
        list(loader)
    assert loader.seen >= 100  # a few bad records at the start are no reason to stop
    with pytest.raises(StopIteration):
        next(loader)
    with pytest.raises(RunError, match="1 of 100 records are bad: more than data.max_bad_share=0 "):
        list(_loader(Numbers(100, bad=(7,)), epochs=1, max_bad_share=0.0, drop_remainder=False))


def stopped_at(rng, share: float, processes: int, batch: int = 128, batches: int = 500) -> int:
    """The batch after which a run over records with this share of bad ones stops, or 0."""
    bad = rng.binomial(batch * processes, share, batches).cumsum()
    for i, count in enumerate(bad, start=1):
        if too_many(int(count), i * batch * processes, 0.01):
            return i
    return 0


@pytest.mark.parametrize("processes", [1, 8])
def test_bad_records_stop_a_run_beyond_chance_however_often_they_are_counted(
    processes,
):
    rng = np.random.default_rng(processes)
    for healthy in (0.005, 0.009, 0.01):
        assert not any(stopped_at(rng, healthy, processes) for _ in range(40)), healthy
    stops = [stopped_at(rng, 0.02, processes) for _ in range(40)]
    assert all(stops) and np.mean(stops) * processes < 40  # some thousand records
    assert not too_many(3, 100, 0.01) and too_many(12, 100, 0.01)
    assert not too_many(0, 100, 0.0) and too_many(1, 100, 0.0) and not too_many(50, 50, 1.0)


def test_processes_add_up_their_bad_records_and_stop_together():
    settings = {"shuffle": False, "epochs": 1, "num_shards": 2, "max_bad_share": 0.05}
    bad = tuple(range(1, 240, 20))  # all on process 1: 10 % of its records, 5 % of all

    def run(source, **more):
        return _lockstep(
            [_loader(source, process_index=p, process_count=2, **settings | more) for p in range(2)]
        )

    assert [len(part) for part in run(Numbers(240, bad=bad))] == [54, 54]
    first, second = run(Numbers(240, bad=bad), max_bad_share=0.001)
    assert str(first) == str(second) and re.search(r"\d of 1\d\d records are bad", str(first))


def test_new_bad_records_are_told_once_a_batch(tmp_path):
    told, path = [], tmp_path / "q.jsonl"
    source = Numbers(12, bad=(1, 2, 9))
    settings = {"shuffle": False, "epochs": 2, "max_bad_share": 0.5, "quarantine_path": path}
    list(_loader(source, say=told.append, **settings))
    assert told == [
        f"2 more bad records, 2 of 6 so far (listed in {path}); the last: n:2: bad 2; fix or "
        "remove the record",
        f"1 more bad records, 3 of 11 so far (listed in {path}); the last: n:9: bad 9; fix or "
        "remove the record",
    ]
    again = []
    list(_loader(source, say=again.append, **settings))
    assert again == []


def test_a_run_stopped_by_bad_records_goes_on_with_a_larger_share_or_mended_records(tmp_path):
    rows = [{"problem": "q", "answer": str(i) if i % 5 else ""} for i in range(400)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    settings = {"shuffle": False, "epochs": 1, "max_bad_share": 0.02}

    def begun(**more):
        return _loader(open_records(path), **settings | more)

    loader = begun()
    states = [loader.get_state()]
    with pytest.raises(RunError, match="goes on from the last checkpoint"):
        for _ in loader:
            states.append(loader.get_state())
    place, restarted = states[-1], begun()
    restarted.set_state(place)
    with pytest.raises(RunError, match="records are bad"):  # nothing has changed
        list(restarted)
    larger = begun(max_bad_share=0.5)
    larger.set_state(place)
    assert len(list(larger)) > 50

    write_jsonl(path, [{"problem": "q", "answer": str(i)} for i in range(400)])
    mended = begun()
    with pytest.raises(ValueError, match="data was"):
        mended.set_state(place)
    mended.set_state(place, mended=True)
    assert mended.bad == mended.seen == 0 and len(list(mended)) > 50
    write_jsonl(path, [{"problem": "q", "answer": "1"}] * 401)
    with pytest.raises(ValueError, match="records was 400 and is 401"):
        begun().set_state(place, mended=True)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_data_without_one_good_record_stop_the_run(share):
    with pytest.raises(RunError, match="all of 6 records are bad"):
        next(_loader(Numbers(6, bad=tuple(range(6))), max_bad_share=share))


def test_every_kind_of_bad_record_is_set_aside(tmp_path):
    rows = [{"id": f"g{i}", "problem": "q", "answer": "1", "images": ["ok.png"]} for i in range(12)]
    noise_image(56, 56).save(tmp_path / "ok.png")
    noise_image(56, 56).save(tmp_path.parent / "outside.png")
    (tmp_path / "cut.png").write_bytes(png(noise_image(99, 99))[:700])
    noise_image(3, 900).save(tmp_path / "thin.png")
    noise_image(500, 500).save(tmp_path / "large.png")
    (tmp_path / "link.png").symlink_to(tmp_path.parent / "outside.png")
    bad = {
        "missing": ({"images": ["none.png"]}, "cannot be read"),
        "cut": ({"images": ["cut.png"]}, "cannot be decoded"),
        "outside": ({"images": ["../outside.png"]}, "leads out of the data root"),
        "link": ({"images": ["link.png"]}, "leads out of the data root"),
        "thin": ({"images": ["thin.png"]}, "aspect ratio above 200"),
        "empty": ({"answer": ""}, "empty answer"),
        "marks": ({"problem": "<image> <image>"}, "2 <image> marks in the question, but 1 images"),
        "token": ({"problem": "a <|im_end|>"}, "control token"),
        "long": ({"problem": "word " * 3000}, "tokens exceed data.prompt_tokens=3000"),
        "large": ({"images": ["large.png"]}, "image patches exceed data.patch_budgets=512"),
        "gold": ({"answer": "\\frac{"}, "gold cannot be parsed"),
    }
    rows += [{**rows[0], "id": name, **fields} for name, (fields, _) in bad.items()]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    checked = []

    def check(record):
        checked.append(record.id)
        return "gold cannot be parsed" if record.answer.endswith("{") else None

    loader = _loader(
        open_records(path),
        PromptEncoder(Processor(make_hf_dir(tmp_path / "hf"))),
        token_budget=3000,
        patch_budgets=(512,),
        global_batch_size=3,
        epochs=2,
        max_bad_share=0.6,
        check_record=check,
        quarantine_path=tmp_path / "q.jsonl",
    )
    batches = list(loader)
    assert sorted(sum(map(_ids, batches), [])) == sorted([f"g{i}" for i in range(12)] * 2)
    noted = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    rows_of = {f"{path}:{13 + i}": name for i, name in enumerate(bad)}
    assert {rows_of[n["origin"]] for n in noted} == set(bad) and len(noted) == len(bad)
    for note in noted:
        name = rows_of[note["origin"]]
        assert bad[name][1] in note["reason"], name
        assert note["id"] == (None if name == "empty" else name)
    assert len(checked) == 13  # golds are checked once, not once an epoch


def test_images_are_decoded_once_per_record(tmp_path, monkeypatch):
    decoded = []

    def counting(ref):
        decoded.append(ref.path)
        return load_image(ref)

    monkeypatch.setattr("srpo_jax.data.encoders.load_image", counting)
    loader = _loader(
        open_records(write_dots(tmp_path, 8)),
        PromptEncoder(Processor(make_hf_dir(tmp_path / "hf"))),
        token_budget=2048,
        patch_budgets=(1024,),
        epochs=1,
    )
    assert len(list(loader)) == 2
    assert sorted(decoded) == sorted(f"images/{i}.png" for i in range(8))


def test_programming_errors_are_not_swallowed():
    def broken(record):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        next(_loader(Numbers(8), broken))
