"""Which groups teach something, and groups that wait for a later update."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import jax
import numpy as np
import pytest
import train_helpers as helpers
from etils import epath

from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.loader import LoadedBatch
from srpo_jax.data.processing import Processor
from srpo_jax.data.records import open_records
from srpo_jax.model.sharding import make_mesh
from srpo_jax.run import host_state, processes
from srpo_jax.run.feed import prompt_keys
from srpo_jax.run.lesson import Lesson, row_of
from srpo_jax.run.pool import Group, Pool, informative, moves
from srpo_jax.run.rollout import write_rollouts
from srpo_jax.run.sections import FilterOn
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
        reflection_new=final_PG,
        stated=numbers,
        first_end=numbers,
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


def test_the_band_may_be_that_of_first_answers_of_either_or_of_the_authors_composite():
    yes, no = np.ones(8, bool), np.zeros(8, bool)
    one, five = np.arange(8) < 1, np.arange(8) < 5
    # (first, final) of groups of 8.
    groups = ((yes, yes), (no, yes), (~five, yes), (one, one), (no, one), (one, no), (no, no))
    first, final = (np.stack(column) for column in zip(*groups, strict=True))
    both = np.ones_like(first)
    graded = verdict(final).replace(first_correct=first, has_first=both, has_second=both)
    found = {on: informative(graded, 0.1, 0.9, on).tolist() for on in get_args(FilterOn)}
    assert found == {
        "final": [0, 0, 0, 1, 1, 0, 0],
        "first": [0, 0, 1, 1, 0, 1, 0],
        "either": [0, 0, 1, 1, 1, 1, 0],
        # Means .75, 1, .906, .094, .125, .031, 0.
        "composite": [1, 0, 0, 0, 1, 0, 0],
    }


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


def fill(pool: Pool, world, first: int, step: int, own: np.ndarray | None = None) -> None:
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
        graded=SimpleNamespace(verdict=verdict(FINAL).replace(own=own), rollout=rollout),
        weight=informative(verdict(FINAL), 0.1, 0.9),
    )
    pool.add(one, step)


def new_pool(world, per_row: int = 2, budgets=(64, 128), max_age: int = 1) -> Pool:
    data = SimpleNamespace(prompts_per_row=per_row, prompt_tokens=64, patch_budgets=budgets)
    return Pool(world.encode, world.processor, data, max_age)


def names(pool: Pool) -> list[str]:
    return [group.record.id.removeprefix("train-") for group in pool.groups]


def test_pool_gives_the_oldest_groups_with_their_own_prompts_and_keeps_the_rest(world):
    pool = new_pool(world)
    fill(pool, world, 0, step=5)  # keeps records 2, 3, 4
    fill(pool, world, 10, step=6)  # keeps records 12, 13, 14
    update, age = pool.take(6, PLACES)
    assert update.batch.valid.all() and update.weight.tolist() == [1] * 4
    assert update.rollout.completions[:, 0, 0].tolist() == [2, 3, 4, 12]
    assert age.tolist() == [1, 1, 1, 0]
    assert update.verdict.final_correct.tolist() == [*FINAL[2:5].tolist(), FINAL[2].tolist()]
    assert update.batch.vision.patches.shape[:2] == (2, 128)  # two pictures of 16 patches a row
    for p, number in enumerate((2, 3, 4, 12)):
        wanted = world.encode(world.records[number])
        got = update.batch.tokens[p, : update.batch.lengths[p]]
        np.testing.assert_array_equal(got, wanted.token_ids)
    assert names(pool) == ["13", "14"]

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
    assert names(pool) == ["4"]


def test_pool_survives_the_checkpoint(world):
    pool, again = (new_pool(world, per_row=3, budgets=(256,)) for _ in range(2))
    fill(pool, world, 0, step=3)
    again.load([host_state.unpack_host(host_state.pack_host(*pool.state()))])
    assert [g.step for g in again.groups] == [3, 3, 3]
    one, other = (p.take(4, np.ones(3, bool)) for p in (pool, again))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)
    empty = new_pool(world)
    empty.load([new_pool(world).state()])
    assert empty.groups == []


def test_groups_that_wait_are_dealt_out_to_another_number_of_processes(world):
    held = [new_pool(world), new_pool(world)]
    for step, pool in enumerate(held):
        fill(pool, world, 3 * step, step=step)
    states = [pool.state() for pool in held]
    ids = [[group.record.id for group in pool.groups] for pool in held]
    for count in (1, 2, 3):
        taken = []
        for index in range(count):
            pool = new_pool(world)
            pool.load(states, (index, count))
            taken.append([group.record.id for group in pool.groups])
        assert sorted(sum(taken, [])) == sorted(sum(ids, [])), count  # each of them once
        assert taken == ids or count != 2  # as many as before: each has its own
        assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_groups_wait_with_their_own_terms_and_without_them_are_left_out(world):
    pool, again = new_pool(world), new_pool(world)
    own = np.arange(len(FINAL) * G * 2, dtype=np.float32).reshape(-1, G, 2)
    fill(pool, world, 0, step=3, own=own)
    state = host_state.unpack_host(host_state.pack_host(*pool.state()))
    again.load([state], own_terms=2)
    update, _ = again.take(4, PLACES)
    np.testing.assert_array_equal(update.verdict.own[:3], own[2:5])
    for number in (0, 1):
        again.load([state], own_terms=number)
        assert again.groups == []


def test_groups_older_than_the_limit_are_dropped_and_counted(world):
    for limit, left in ((0, []), (1, ["12", "13", "14"]), (3, ["2", "3", "4", "12", "13", "14"])):
        pool = new_pool(world, max_age=limit)
        fill(pool, world, 0, step=4)
        fill(pool, world, 10, step=6)
        assert pool.drop_old(7) == 6 - len(left) and names(pool) == left


def together(monkeypatch, pools: list[Pool]) -> None:
    """`even_out` of all pools at once, each as a process with rows of its own."""
    barrier, here = threading.Barrier(len(pools)), threading.local()
    held: list = [None] * len(pools)

    def gather(own):
        held[here.place] = own
        barrier.wait(timeout=10)
        everyone = list(held)
        barrier.wait(timeout=10)
        return everyone

    for name in ("gather", "gather_bytes"):
        monkeypatch.setattr(processes, name, gather)
    monkeypatch.setattr(processes, "data_place", lambda _: (here.place, len(pools)))
    monkeypatch.setattr(processes, "once", lambda everyone, _: everyone)

    def run(place: int) -> None:
        here.place = place
        pools[place].even_out(None, 2)

    with ThreadPoolExecutor(len(pools)) as threads:
        list(threads.map(run, range(len(pools))))


def test_processes_with_many_groups_give_their_newest_to_those_with_few(world, monkeypatch):
    rich, poor, middle = pools = [new_pool(world) for _ in range(3)]
    fill(rich, world, 0, step=5)
    fill(rich, world, 10, step=6)
    fill(middle, world, 20, step=6)
    given = jax.tree.map(np.copy, rich.groups[3].samples)
    together(monkeypatch, pools)
    assert names(rich) == ["2", "3", "4"] and names(poor) == ["12", "13", "14"]
    assert names(middle) == ["22", "23", "24"]
    assert [group.step for group in poor.groups] == [6, 6, 6]
    for x, y in zip(jax.tree.leaves(poor.groups[0].samples), jax.tree.leaves(given), strict=True):
        np.testing.assert_array_equal(x, y)
    assert poor.groups[0].record.id == "train-12" and poor.groups[0].record.images
    update, age = poor.take(6, np.ones(2, bool))  # what came is used as one's own is
    assert update.rollout.completions[:, 0, 0].tolist() == [12, 13] and not age.any()

    fill(rich, world, 10, step=5)
    fill(poor, world, 20, step=6)
    together(monkeypatch, pools)
    assert [len(pool.groups) for pool in pools] == [5, 4, 4]
    assert [group.step for group in middle.groups] == [5, 6, 6, 6]  # the old one is used first


@pytest.mark.parametrize("places", [1, 64])
def test_groups_that_wait_are_fewer_than_a_batch_and_one_step_old(places):
    """500 steps of one to three groups a process; some have harder problems than others."""
    rng = np.random.default_rng(0)
    luck, room = rng.uniform(0.2, 0.9, places), rng.integers(1, 4, places).tolist()
    pools = [Pool(None, None, None, 1) for _ in range(places)]
    waiting = []
    for step in range(500):
        assert sum(pool.drop_old(step) for pool in pools) == 0
        while sum(len(pool.groups) for pool in pools) < sum(room):
            for pool, count in zip(pools, rng.binomial(room, luck), strict=True):
                pool.groups += [Group(None, step, None)] * count
        for giver, taker in moves(
            [(len(pool.groups), n) for pool, n in zip(pools, room, strict=True)]
        ):
            pools[taker].groups.append(pools[giver].groups.pop())
        for pool, n in zip(pools, room, strict=True):
            pool.groups.sort(key=lambda group: group.step)
            assert len(pool.groups) >= n and step - pool.groups[0].step <= 1
            pool.groups = pool.groups[n:]
        waiting.append(sum(len(pool.groups) for pool in pools))
    assert 0 < max(waiting) < sum(room)


def test_as_few_groups_move_as_can_and_each_place_gets_its_share():
    assert moves([(3, 1), (0, 1), (2, 1)]) == [(0, 1)]
    assert moves([(2, 4), (2, 4), (1, 4)]) == moves([(7, 4)]) == moves([(0, 2), (0, 2)]) == []
    assert moves([(5, 2), (0, 2), (0, 2), (0, 2)]) == [(0, 1), (0, 2), (0, 3)]
    assert moves([(4, 1), (2, 3), (0, 0)]) == [(0, 1), (0, 1)]


def test_sampling_goes_on_while_all_together_are_short(monkeypatch):
    pool = Pool(None, None, None, 1)
    pool.groups = [Group(None, 0, None)] * 3
    monkeypatch.setattr(processes, "once", lambda held, _: held)
    for others, short in ((-1, False), (-2, True), (1, False)):
        monkeypatch.setattr(processes, "gather", lambda own, others=others: [own, others])
        assert pool.short(None, 2) == short


def test_image_bytes_and_odd_fields_of_a_record_go_through_the_checkpoint(world):
    pool, again = new_pool(world), new_pool(world)
    fill(pool, world, 0, step=0)
    data = Path(world.folder / "train_images" / "2.png").read_bytes()
    old = pool.groups[0]
    image = dataclasses.replace(old.record.images[0], data=data, path="")
    extra = {"kept": [1], "odd": np.zeros(2)}
    record = dataclasses.replace(old.record, images=(image,), extra=extra)
    pool.groups[0] = dataclasses.replace(old, record=record)
    again.load([host_state.unpack_host(host_state.pack_host(*pool.state()))])
    got = again.groups[0].record
    assert got.images[0].data == data and got.extra == {"kept": [1]}
    assert json.dumps(got.answer) == json.dumps(record.answer)


def test_a_row_tells_how_old_groups_were_and_weighs_updates_by_what_trained():
    scores = {"fix/count": 1.0, "fix/of": 2.0, "harm/count": 0.0, "harm/of": 2.0, "tokens": 90.0}
    scores |= {"accuracy/first": 0.25, "accuracy/final": 0.75, "detection/count": 3.0}
    scores |= {"detection/of": 4.0, "false_alarm/count": 1.0, "false_alarm/of": 4.0}
    one = SimpleNamespace(
        scores=(None, None, scores | {"samples": 4.0}),
        weight=np.array([1, 0, 1, 1, 0], np.float32),
        sampled=SimpleNamespace(slots=np.arange(4), idle_share=0.25),
        graded=SimpleNamespace(failures={1: "a time-out"}),
    )
    local = SimpleNamespace(weight=np.array([1, 1, 1, 0], np.float32))
    lesson = Lesson(None, local, [one], np.array([1, 0, 1, 0]), dropped=3)
    parts = SimpleNamespace(mesh=make_mesh(), verifier=SimpleNamespace(counts=dict))
    updates = [
        {"loss": 1.0, "tokens": 500.0, "trained_tokens": 10.0, "skipped": 0.0},
        {"loss": 2.0, "tokens": 100.0, "trained_tokens": 30.0, "skipped": 1.0},
    ]
    counts = {"repeats/count": 1, "repeats/of": 4}
    row, said = row_of(lesson, updates, [[None], [None]], counts, parts, pending=2)
    assert row["loss"] == 1.75 and row["trained_tokens"] == 40 and row["tokens"] == 90
    assert row["skipped"] == 1 and row["updates"] == 2 and row["filter/rounds"] == 1
    assert row["filter/age_mean"] == pytest.approx(2 / 3) and row["filter/age_max"] == 1
    assert row["filter/dropped_groups"] == 3 and row["filter/pending_groups"] == 2
    assert row["filter/kept_share"] == 3 / 4 and row["fix_rate"] == 0.5
    assert row["sampling/idle_share"] == 0.25
    assert row["accuracy/net"] == row["detection_margin"] == 0.5 and row["repeat_share"] == 0.25
    assert row["reward/failed"] == 1 and said == "a time-out"


def test_a_prompt_drawn_again_samples_with_another_key_and_neighbours_change_none():
    def keys(ids, passes):
        batch = SimpleNamespace(tokens=np.zeros((4, 1)))
        records = [SimpleNamespace(id=name) for name in ids]
        return prompt_keys(LoadedBatch(batch, records, np.arange(len(ids)), np.array(passes), 0.0))

    first = keys(["a", "b", "a"], [0, 0, 0])
    assert len({*first.tolist()}) == 4 and first[3] == 0  # the last one is filler
    assert keys(["b", "c"], [0, 0])[0] == first[1]
    later = keys(["a", "b", "a"], [1, 1, 1])
    assert not {*first[:3].tolist()} & {*later[:3].tolist()}


def test_files_of_a_step_that_other_processes_wrote_before_give_way(tmp_path):
    for name in ("000003.0.jsonl", "000003.1.jsonl", "000002.1.jsonl"):
        (tmp_path / name).write_text("{}\n")
    write_rollouts(epath.Path(tmp_path), [], 3, make_mesh())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002.1.jsonl", "000003.jsonl"]
