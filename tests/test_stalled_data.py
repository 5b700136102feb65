"""Data that do not come: they are waited for in the open, asked for once more, and given up."""

import threading

import pytest
from loader_helpers import Numbers, assert_same_batches, load, lockstep, take
from loader_helpers import encode as encode_number

from srpo_jax.data import workers
from srpo_jax.data.workers import Supply
from srpo_jax.structs import Stalled


@pytest.fixture(autouse=True)
def gate(monkeypatch):
    """What hangs until the test is over."""
    monkeypatch.setattr(workers, "_LOOK", 0.01)
    monkeypatch.setattr(workers, "TELL", 0.05)
    hanging = threading.Event()
    yield hanging
    hanging.set()


def drawn(gate, hangs: int, timeout: float) -> tuple[Supply, list[str]]:
    """Positions 3 to 8, of which the fifth hangs so many times; and what is told."""
    said, left = [], [True] * hangs

    def begin(position):
        for at in range(position, 9):
            if at == 5 and left:
                left.pop()
                gate.wait()
            yield at, 0

    name = "record {}".format
    return Supply(begin, 3, workers=0, timeout=timeout, name=name, say=said.append), said


def test_a_record_that_does_not_come_is_asked_for_once_more_and_nothing_changes(gate):
    items, said = drawn(gate, hangs=1, timeout=0.3)
    assert list(items) == [*range(3, 9)]
    assert said[0] == (
        "waiting for record 5 for 0.05 s, from a thread of data.workers=0; data.timeout=0.3 s"
    )
    assert said[1].startswith("waiting for record 5 for 0.1 s")  # and with twice the time between
    assert "record 5 did not come within data.timeout=0.3 s" in said[-1]
    items.close()


def test_one_that_does_not_come_again_ends_the_run_with_its_name_and_the_remedy(gate):
    items, _ = drawn(gate, hangs=2, timeout=0.2)
    assert [next(items), next(items)] == [3, 4]
    with pytest.raises(
        Stalled, match="^record 5 did not come within data.timeout=0.2 s, twice.*or raise data.time"
    ):
        next(items)


def test_without_a_time_limit_it_is_waited_for_and_told(gate):
    items, said = drawn(gate, hangs=1, timeout=0.0)
    threading.Timer(0.3, gate.set).start()
    assert list(items) == [*range(3, 9)] and said
    items.close()


def test_processes_stop_together_where_the_data_of_one_do_not_come(gate):
    def encode(record):
        if record.answer == "9":
            gate.wait()
        return encode_number(record)

    config = {"shuffle": False, "num_shards": 2, "process_count": 2, "timeout": 0.2}
    ends = lockstep([load(Numbers(32), encode, process_index=i, **config) for i in range(2)])
    assert [type(end) for end in ends] == [Stalled, Stalled]
    assert sorted(str(end).partition(" ")[0] for end in ends) == ["another", "record"]


def test_batches_are_the_same_where_a_record_came_late(gate):
    hang = [True]

    def encode(record):
        if record.answer == "9" and hang:
            hang.pop()
            gate.wait()
        return encode_number(record)

    late, others = load(Numbers(32), encode, timeout=0.3), load(Numbers(32), encode_number)
    for one, other in zip(take(late, 10), take(others, 10), strict=True):
        assert_same_batches(one, other)
    for loader in (late, others):
        loader.close()
