"""A process that dies or stalls is named by the others, which end: rules and the connection.

Real runs are in tests/faults/test_processes.py.
"""

import json
import socket
import threading
import time
import types

import pytest

from srpo_jax.run import processes
from srpo_jax.run.heartbeat import Heartbeat, relay


class Store(dict):
    """The coordination service's key-value store; ``broken``: its calls fail."""

    broken = False

    def key_value_set(self, key, value, allow_overwrite=False):
        if self.broken:
            raise RuntimeError("UNAVAILABLE")
        assert allow_overwrite or key not in self
        self[key] = value

    def key_value_dir_get(self, key):
        if self.broken:
            raise RuntimeError("UNAVAILABLE")
        return [pair for pair in self.items() if pair[0].startswith(key)]


def three(timeout: float = 10.0) -> tuple[Store, list[Heartbeat]]:
    store = Store()
    return store, [Heartbeat(store, i, 3, timeout, end=lambda text: None) for i in range(3)]


def seconds(beats: list[Heartbeat], count: int, awake=(0, 1, 2)) -> list[str]:
    """What each says after so many seconds in which those that are ``awake`` beat and look."""
    said = [""] * len(beats)
    for _ in range(count):
        for i in awake:
            beats[i].beat()
        for i in awake:
            said[i] = said[i] or beats[i].look(1.0)
    return said


def test_processes_that_beat_lose_nobody_however_long_a_step_takes():
    _, beats = three()
    assert seconds(beats, 100) == ["", "", ""]


def test_the_first_process_names_who_is_silent_for_longer_than_the_limit():
    _, beats = three()
    seconds(beats, 3)
    assert seconds(beats, 9, awake=(0, 2)) == ["", "", ""]
    said = seconds(beats, 3, awake=(0, 2))[0]
    host = socket.gethostname()
    assert said == f"process 1 ({host}) has not been heard of for 11 s (distributed.timeout=10)"


def test_what_the_first_process_says_reaches_the_others(monkeypatch):
    store, beats = three()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    beats[0]._close("process 1 is lost")
    assert seconds(beats, 1, awake=(2,))[2] == "process 1 is lost"
    # One that had been stopped and goes on hears it as well.
    assert seconds(beats, 1, awake=(1,))[1] == "process 1 is lost"


def test_the_others_name_the_first_process_by_its_silence_or_its_closed_connection():
    store, beats = three()
    seconds(beats, 3)
    store.broken = True
    for _ in range(11):
        with pytest.raises(RuntimeError):
            beats[1].beat()
        said = beats[1].look(1.0)
    assert "process 0" in said and "not been heard of" in said
    beats[2]._gone.set()
    assert beats[2].look(0.1).endswith("is gone: it has closed its connections")


def test_one_that_ends_with_an_error_is_quoted_and_one_that_ends_well_is_not_missed():
    _, beats = three()
    seconds(beats, 2)
    beats[1]._ended, beats[2]._ended = "", "error: no such file"
    seconds(beats, 1)
    assert seconds(beats, 1, awake=(0,))[0] == ""  # it may say itself what happened
    assert seconds(beats, 3, awake=(0,))[0].endswith(") has ended with an error: no such file")
    _, beats = three()
    seconds(beats, 2)
    beats[1]._ended = ""
    seconds(beats, 1)
    assert seconds(beats, 100, awake=(0, 2)) == ["", "", ""]


def test_the_first_process_leaves_once_the_others_have_ended():
    store, beats = three(timeout=0.2)
    for one in beats[1:]:
        one.leave("error: alike on all")
    begun = time.monotonic()
    beats[0].leave("error: alike on all")
    assert json.loads(store["srpo/word/beat"])["ended"] == "error: alike on all"
    assert time.monotonic() - begun < 2  # of more than these, if it had not heard of them


def test_no_thread_is_in_the_store_when_python_ends(monkeypatch):
    store, at_exit, calls = Store(), [], []
    monkeypatch.setattr(processes, "_heartbeat", None)
    monkeypatch.setattr(processes.distributed.global_state, "client", store)
    monkeypatch.setattr(processes.atexit, "register", at_exit.append)
    processes._start_heartbeat(1, 2, 0.2, threading.Event())
    (end,) = at_exit
    end()
    assert json.loads(store["srpo/beat/1"])["ended"] == ""
    store.key_value_set = lambda *_: calls.append(1)
    time.sleep(0.5)  # of beats each 0.1 s
    assert not calls


def test_only_errors_of_a_broken_connection_are_waited_for(monkeypatch):
    asked = []
    monkeypatch.setattr(
        processes, "_heartbeat", types.SimpleNamespace(suspect=lambda: asked.append(1))
    )
    processes.name_the_lost("error: data.train=x.jsonl: no such file")
    assert not asked
    processes.name_the_lost("error: UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    assert len(asked) == 1


def test_the_way_to_the_first_process_carries_bytes_and_tells_of_its_end_without_closing():
    gone = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as first:
        address = relay(f"localhost:{first.getsockname()[1]}", gone)
        host, port = address.split(":")
        inner = socket.create_connection((host, int(port)), timeout=10)
        outer, _ = first.accept()
        inner.sendall(b"ping")
        assert outer.recv(10) == b"ping"
        outer.sendall(b"pong")
        assert inner.recv(10) == b"pong" and not gone.is_set()
    outer.close()
    assert gone.wait(10)
    inner.settimeout(0.2)
    with pytest.raises(TimeoutError):  # still open: jax does not see it
        inner.recv(10)
    inner.close()
