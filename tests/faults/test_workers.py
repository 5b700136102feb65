"""Workers that are killed, stopped or that balloon; data that change; two programs at once."""

import multiprocessing
import os
import signal
import threading

import pytest
from fault_runs import Run
from loader_helpers import Numbers, assert_same_batches, encode, load, take

from srpo_jax.data import workers
from srpo_jax.data.errors import RecordError
from srpo_jax.data.files import JsonlLog
from srpo_jax.data.records import open_records
from srpo_jax.rewards.workers import Call, Limits, Outcome, Workers
from srpo_jax.structs import Stalled

CALLS = """
import os, time

def double(x):
    return 2 * x

def balloon(x):
    return len(bytearray(x << 20))

def freeze(x, where):
    if not os.path.exists(where):  # once
        open(where, "w").close()
        os.kill(os.getpid(), 19)  # SIGSTOP
    return x
"""


def test_a_data_worker_that_is_stopped_delays_batches_and_one_that_is_killed_ends_the_run():
    # Grain looks for dead workers every two seconds.
    loader, others = load(Numbers(64), encode, workers=2), load(Numbers(64), encode)
    assert_same_batches(next(loader), next(others))
    first, *_ = (child.pid for child in multiprocessing.active_children())
    os.kill(first, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (first, signal.SIGCONT)).start()
    for one, other in zip(take(loader, 6), take(others, 6), strict=True):
        assert_same_batches(one, other)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(Stalled, match="was ended from outside.*lower data.workers"):
        take(loader, 60)
    loader.close()


@pytest.mark.slow
def test_a_data_worker_that_stays_stopped_is_replaced_at_the_very_record(capsys, monkeypatch):
    start = workers.Supply._start

    def start_in_peace(self):
        self._timeout = 600.0  # of new workers, which a busy machine starts slowly
        start(self)

    monkeypatch.setattr(workers.Supply, "_start", start_in_peace)
    monkeypatch.setattr(workers, "TELL", 1.0)
    loader, others = load(Numbers(64), encode, workers=2), load(Numbers(64), encode)
    assert_same_batches(next(loader), next(others))
    first, *_ = (child.pid for child in multiprocessing.active_children())
    os.kill(first, signal.SIGSTOP)
    loader._iterator._timeout = 2.0
    for one, other in zip(take(loader, 12), take(others, 12), strict=True):
        assert_same_batches(one, other)
    said = capsys.readouterr().err
    assert f"for 1 s, from data worker {first} (stopped); data.timeout=2 s" in said
    assert f"did not come within data.timeout=2 s from data worker {first} (stopped): " in said
    loader.close()
    assert not multiprocessing.active_children()


def test_a_call_that_balloons_or_freezes_costs_itself_alone(tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    place = f"{tmp_path}/calls.py"
    calls = [
        Call(f"{place}:double", (1,)),
        Call(f"{place}:balloon", (4096,)),  # MiB
        Call(f"{place}:freeze", (3, str(tmp_path / "frozen"))),
        Call(f"{place}:double", (2,)),
    ]
    pool = Workers(2, Limits(wall=3.0, memory_mb=512))
    try:
        assert pool.run(calls) == [
            *(Outcome(2), Outcome(failure="crash")),
            *(Outcome(3), Outcome(4)),  # of the frozen one in a fresh worker
        ]
        assert pool.run(calls[:1]) == [Outcome(2)]
    finally:
        pool.close()


def test_records_that_change_under_a_run_are_told_apart_from_those_that_were_there(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [f'{{"problem": "{"How many? " * i}", "answer": "{i}"}}\n' for i in range(1, 9)]
    path.write_text("".join(rows))
    records = open_records(path)
    before = [records[i] for i in range(8)]
    for text in ("".join(rows)[:300], "".join(reversed(rows)), "x" * 4000, ""):
        path.write_text(text)
        for i, known in enumerate(before):
            try:
                assert records[i] == known
            except RecordError as error:
                assert f"{path}:{i + 1}: not valid JSON" in str(error)
    path.unlink()
    with pytest.raises(OSError, match="No such file.*train.jsonl"):
        records[0]


def test_a_damaged_row_of_an_evaluation_is_named_by_its_line(tmp_path):
    log = JsonlLog(tmp_path / "samples.jsonl", {"seed": 0})
    for n in range(3):
        log.append(n, [{"n": n}])
    log.close()
    whole = log.partial.read_bytes()
    for at, line in ((2, 1), (whole.index(b'"id": 1') + 1, 3)):
        log.partial.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        with pytest.raises(ValueError, match=rf"samples.jsonl.partial:{line}: is damaged; delete"):
            JsonlLog(tmp_path / "samples.jsonl", {"seed": 0})


@pytest.mark.slow
def test_of_programs_started_at_once_in_one_folder_one_goes_on(world, tmp_path):
    runs = [Run("evaluation", tmp_path / "run") for _ in range(3)]
    codes = [run.end() for run in runs]
    said = [run.said.splitlines()[-1] for run in runs]
    refused = [line for line in said if "is in use by process" in line]
    assert sorted(codes) == [0, 1, 1] and len(refused) == 2, said
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 6 * 2
