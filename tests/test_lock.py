"""One program at a time in a folder; who is gone is replaced."""

import json
import os
import subprocess
import sys
import threading
import time

import bucket_helpers
import pytest

from srpo_jax.data import lock


def leave(folder, **changes) -> None:
    """The lock of another program, as it would lie there."""
    folder.mkdir(exist_ok=True)
    found = lock._describe_self() | {"token": "other", "beat": time.time()} | changes
    (folder / ".lock").write_text(json.dumps(found))


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_folder_is_held_by_one_and_free_again_afterwards(tmp_path):
    folder = tmp_path / "run"
    with lock.hold(folder):
        with pytest.raises(RuntimeError, match=f"run is in use by process {os.getpid()} on .*wait"):
            with lock.hold(folder):
                pass
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with pytest.raises(KeyError), lock.hold(tmp_path / "fresh"):
        raise KeyError
    assert not (tmp_path / "fresh").exists()  # it was made, and nothing came into it


def test_who_holds_a_folder_clears_up_behind_those_before(tmp_path):
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / ".000001.jsonl.7.tmp").touch()
    with lock.hold(tmp_path):
        assert [*(tmp_path / "rollouts").iterdir()] == []


def test_who_ended_on_this_machine_is_replaced_at_once(tmp_path):
    said = []
    leave(tmp_path, pid=dead_pid())
    with lock.hold(tmp_path, said.append):
        pass
    leave(tmp_path, pid=os.getppid(), born="1")  # its number went to another process
    with lock.hold(tmp_path, said.append):
        pass
    assert len(said) == 2 and all("which is gone" in line for line in said)
    leave(tmp_path, pid=os.getppid(), born=lock._born(os.getppid()))
    with pytest.raises(RuntimeError, match=f"in use by process {os.getppid()}"):
        with lock.hold(tmp_path):
            pass


def test_of_another_machine_a_sign_of_life_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    said = []
    leave(tmp_path, machine="elsewhere", host="elsewhere")
    with lock.hold(tmp_path, said.append):
        pass
    assert "waiting 0 s for a sign of life" in said[0] and "taken over from" in said[1]
    leave(tmp_path, machine="elsewhere", host="elsewhere")
    alive = lambda: leave(tmp_path, machine="elsewhere", host="elsewhere")  # noqa: E731
    threading.Timer(0.1, alive).start()
    with pytest.raises(RuntimeError, match="on elsewhere since"):
        with lock.hold(tmp_path, said.append):
            pass
    leave(tmp_path, machine="elsewhere", beat=time.time() - 2 * lock.FORGOTTEN)
    with lock.hold(tmp_path, said.append):
        pass
    assert len(said) == 4  # of the last one nothing was awaited


def test_who_lost_the_folder_stops_at_once(tmp_path, monkeypatch, capsys):
    ended = threading.Event()

    def leave_program(code: int) -> None:
        ended.set()
        raise OSError  # as far as a thread can go

    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock.os, "_exit", leave_program)
    with lock.hold(tmp_path):
        before = json.loads((tmp_path / ".lock").read_text())["beat"]
        time.sleep(0.2)
        assert json.loads((tmp_path / ".lock").read_text())["beat"] > before
        for _ in range(100):  # a sign of life may just be on its way
            leave(tmp_path)
            if ended.wait(0.1):
                break
    assert "is in use by" in capsys.readouterr().err
    assert json.loads((tmp_path / ".lock").read_text())["token"] == "other"


def test_a_folder_on_a_bucket_is_held_too(tmp_path, monkeypatch):
    bucket = bucket_helpers.mount(monkeypatch, tmp_path)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    with lock.hold(f"{bucket}/run"), pytest.raises(RuntimeError, match="gs://bucket/run is in use"):
        with lock.hold(f"{bucket}/run"):
            pass
    assert not (tmp_path / "bucket" / "run" / ".lock").exists()
