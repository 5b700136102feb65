"""Bad records: set aside, listed, told, and when there are too many of them."""

import json
import re

import numpy as np
import pytest
from data_helpers import make_hf_dir, noise_image, png, write_dots, write_jsonl
from loader_helpers import (
    Numbers,
    ids_of,
    load,
    lockstep,
)
from loader_helpers import encode as encode_three

from srpo_jax.data.batching import Budgets
from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.errors import RecordError
from srpo_jax.data.files import read_jsonl
from srpo_jax.data.images import load_image
from srpo_jax.data.loader import too_many
from srpo_jax.data.processing import Processor
from srpo_jax.data.quarantine import Quarantine
from srpo_jax.data.records import open_records
from srpo_jax.run.budgets import Reader
from srpo_jax.structs import RunError

# --- bad records ---


def test_bad_records_are_replaced_counted_and_listed(tmp_path):
    path = tmp_path / "out" / "quarantine.jsonl"
    loader = load(Numbers(20, bad=(3, 8)), quarantine_path=path, max_bad_share=0.2, epochs=3)
    batches = list(loader)
    assert len(batches) == 13 and all(b.arrays.valid.all() for b in batches)
    assert loader.bad == 6 and loader.seen == 60  # three passes
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["origin"] for line in lines) == ["n:3", "n:8"]  # each once
    assert lines[0].keys() == {"origin", "id", "reason"}
    state = loader.get_state()
    with open(path, "a") as file:
        file.write('{"origin": "n:')  # torn by a crash
    again = load(Numbers(20, bad=(3, 8, 9)), quarantine_path=path, max_bad_share=0.2, epochs=1)
    list(again)
    origins = []
    for line in path.read_text().splitlines():
        if line.endswith("}"):
            origins.append(json.loads(line)["origin"])
    assert sorted(origins) == ["n:3", "n:8", "n:9"]
    assert state["bad"] == 6


def test_a_text_that_no_budget_holds_is_never_tokenised(tmp_path):
    lines = [{"id": i, "problem": "x" * (200_000 if i == 1 else 9), "answer": 1} for i in range(3)]
    source = open_records(write_jsonl(tmp_path / "d.jsonl", lines))
    seen = []

    def encode(record):
        seen.append(record.id)
        return encode_three(record)

    loader = load(source, encode, epochs=1, global_batch_size=2, max_bad_share=1.0, token_budget=9)
    assert ids_of(next(loader)) and loader.bad == 1 and sorted(seen) == ["0", "2"]
    reader = Reader(encode, Budgets(9, 0))
    assert (
        "200000 characters, more than data.prompt_tokens=9 can hold" in reader.look(source, 1).bad
    )


def test_a_bad_record_is_listed_whatever_its_text_and_once(tmp_path):
    path = tmp_path / "q.jsonl"
    odd = RecordError("half \ud83d.jsonl:1", "line\u2028separator \udcff")
    for _ in range(2):  # the second run knows it
        Quarantine(path).add(odd, "id \ud83d")
    assert read_jsonl(path) == [{"origin": odd.origin, "id": "id \ud83d", "reason": odd.reason}]


def test_each_process_lists_its_own(tmp_path):
    for p in range(2):
        loader = load(
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
    assert len(list(load(source, epochs=1, max_bad_share=0.08))) == 225
    loader = load(source, epochs=1, max_bad_share=0.03, quarantine_path=tmp_path / "q.jsonl")
    with pytest.raises(
        RunError, match=r"of \d+ records are bad \(listed in .*q.jsonl\): more than data.max_bad_sh"
    ):
        list(loader)
    assert loader.seen >= 100  # a few bad records at the start are no reason to stop
    with pytest.raises(StopIteration):
        next(loader)
    with pytest.raises(RunError, match="1 of 100 records are bad: more than data.max_bad_share=0 "):
        list(load(Numbers(100, bad=(7,)), epochs=1, max_bad_share=0.0, drop_remainder=False))


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
        return lockstep(
            [load(source, process_index=p, process_count=2, **settings | more) for p in range(2)]
        )

    assert [len(part) for part in run(Numbers(240, bad=bad))] == [54, 54]
    first, second = run(Numbers(240, bad=bad), max_bad_share=0.001)
    assert str(first) == str(second) and re.search(r"\d of 1\d\d records are bad", str(first))


def test_processes_that_read_the_same_rows_count_their_bad_records_once():
    told = []
    settings = {"shuffle": False, "epochs": 1, "say": told.append, "max_bad_share": 0.001}
    source = Numbers(240, bad=tuple(range(1, 240, 20)))
    with pytest.raises(RunError) as alone:
        list(load(source, **settings))
    said, told[:] = [*told], []
    partners = lockstep([load(source, **settings) for _ in range(2)])  # one place, two processes
    assert [str(error) for error in partners] == [str(alone.value)] * 2
    assert told == [line for line in said for _ in range(2)]


def test_new_bad_records_are_told_once_a_batch(tmp_path):
    told, path = [], tmp_path / "q.jsonl"
    source = Numbers(12, bad=(1, 2, 9))
    settings = {"shuffle": False, "epochs": 2, "max_bad_share": 0.5, "quarantine_path": path}
    list(load(source, say=told.append, **settings))
    assert told == [
        f"2 more bad records, 2 of 6 so far (listed in {path}); the last: n:2: bad 2; fix or "
        "remove the record",
        f"1 more bad records, 3 of 11 so far (listed in {path}); the last: n:9: bad 9; fix or "
        "remove the record",
    ]
    again = []
    list(load(source, say=again.append, **settings))
    assert again == []


def test_a_run_stopped_by_bad_records_goes_on_with_a_larger_share_or_mended_records(tmp_path):
    rows = [{"problem": "q", "answer": str(i) if i % 5 else ""} for i in range(400)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    settings = {"shuffle": False, "epochs": 1, "max_bad_share": 0.02}

    def begun(**more):
        return load(open_records(path), **settings | more)

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
        next(load(Numbers(6, bad=tuple(range(6))), max_bad_share=share))


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

    loader = load(
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
    assert sorted(sum(map(ids_of, batches), [])) == sorted([f"g{i}" for i in range(12)] * 2)
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
    loader = load(
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
        next(load(Numbers(8), broken))
