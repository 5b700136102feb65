"""What happens to a run from outside: signals to all of its processes, kills, disks that fail."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(code: str, **options) -> subprocess.Popen:
    """A Python program in a process group of its own, its output a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


SAVING = """
import shutil, time
import jax.numpy as jnp
from srpo_jax.run.checkpoint import Checkpoints
from srpo_jax.run.command import _fail
from srpo_jax.structs import TrainState
zero = jnp.int32(0)
state = TrainState(zero, {"w/kernel": jnp.ones(3)}, {}, jnp.ones(3), zero)
saver = Checkpoints(FOLDER)
saver.save(1, state, config={})
saver.check()
saver.wait()
shutil.rmtree(FOLDER + "/checkpoints")
open(FOLDER + "/checkpoints", "w").close()
saver.save(2, state, config={})
try:
    for _ in range(100):  # between the steps that follow
        time.sleep(0.1)
        saver.check()
except Exception as error:
    _fail(error)
"""


def test_a_save_that_fails_is_told_by_the_next_step_and_the_program_ends_at_once(tmp_path):
    environment = os.environ | {"XLA_FLAGS": ""}  # one device
    run = start(SAVING.replace("FOLDER", repr(str(tmp_path))), env=environment, stderr=-1)
    try:
        _, said = run.communicate(timeout=60)  # Orbax's threads would wait for 300 s
    finally:
        run.kill()
    assert run.returncode == 1
    assert re.search(
        r"error: \S+/checkpoints: a checkpoint could not be written: .*directory", said
    )


LOADING = """
import multiprocessing, signal, sys, time
from loader_helpers import Numbers, encode, load
if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    loader = load(Numbers(64), encode, workers=2)
    print("begins", flush=True)
    next(loader)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.readline()
    for _ in range(8):
        next(loader)
    print("went on", flush=True)
    time.sleep(60)
"""


def test_data_workers_outlive_signals_to_the_process_group_but_not_the_run():
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = start(LOADING, env=environment, stdin=subprocess.PIPE)
    try:
        assert run.stdout.readline() == "begins\n"
        for _ in range(40):  # while they start, too
            time.sleep(0.05)
            os.killpg(run.pid, signal.SIGTERM)
        pids = [*map(int, run.stdout.readline().split())]
        assert len(pids) == 2
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(run.pid, number)
        run.stdin.write("\n")
        run.stdin.flush()
        assert run.stdout.readline() == "went on\n" and all(map(is_running, pids))
    finally:
        run.kill()
        run.wait()  # its pipe may stay open
    assert wait_until(lambda: not any(map(is_running, pids))), "workers outlive the run"
