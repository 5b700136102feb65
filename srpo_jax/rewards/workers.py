"""Killable worker processes that call functions: a call that hangs or crashes costs itself alone.

sympy can run for hours (``9^{9^{9^9}}``), exhaust memory, or crash the interpreter, and so can a
reward function of one's own. Each worker is a process of its own that runs one call at a time. The
kernel ends it when the call has used up its processor time, so that a loaded machine does not turn
right answers into wrong ones; a fresh worker then tries once more. Workers are started by command
line rather than forked or spawned by multiprocessing: they never import the caller's main module
(and with it jax), and they inherit none of its threads.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, Literal

_ROOT = Path(__file__).resolve().parents[2]
_START_LIMIT_S = 120.0  # importing sympy on a loaded machine; not part of any call's time
_MAX_FAILED_STARTS = 3
_READY = b"ready"


@dataclass(frozen=True)
class Limits:
    """What one call may use."""

    wall: float  # seconds of the clock
    cpu: float | None = None  # seconds of processor time, to the next whole one; None: any
    memory_mb: int | None = None  # of the worker's own data; None: any


@dataclass(frozen=True)
class Call:
    """``function(*args, **options)``, the function as "package.module:name" or "file.py:name"."""

    function: str
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a call: its value as JSON has it, or why there is none.

    ``late``: it was not done when the time for all calls together was over.
    """

    value: Any = None
    failure: Literal["", "raised", "timeout", "crash", "late"] = ""


class Workers:
    """A pool of worker processes. Usable from several threads, one at a time inside."""

    def __init__(self, count: int, limits: Limits, preload: Sequence[str] = ()):
        """Start ``count`` processes (they come up in the background).

        Workers load ``preload``, modules or files, and call their ``warm_up()`` before they take a
        call.
        """
        self._limits, self._preload = limits, tuple(preload)
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._closed = False
        self._workers = [self._start() for _ in range(count)]

    def run(self, calls: Sequence[Call], seconds: float = math.inf) -> list[Outcome]:
        """The outcome of each call, in order; whatever is left after ``seconds`` is ``late``.

        A call that runs out of time or memory, or ends its worker, is tried once more in a fresh
        one. RuntimeError when workers cannot be started, or after close().
        """
        end = time.monotonic() + seconds
        with self._lock:
            if self._closed:
                raise RuntimeError("these workers are closed")
            try:
                requests = [pickle.dumps((one.function, one.args, one.options)) for one in calls]
                return self._run(requests, end)
            finally:  # interrupted or late: no worker may keep a request of this run
                for slot, worker in enumerate(self._workers):
                    if worker.task is not None:
                        self._replace(slot)

    def close(self) -> None:
        """Kill the workers; further calls raise."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
            self._workers = []

    def __del__(self) -> None:
        # Workers also leave by themselves when their pipe closes; this reaps them.
        with contextlib.suppress(Exception):
            self.close()

    def _start(self) -> "_Worker":
        return _Worker(self._limits, self._preload)

    def _run(self, requests: list[bytes], end: float) -> list[Outcome]:
        """Hand requests to idle workers until every one has its outcome."""
        results = [Outcome(failure="late")] * len(requests)
        waiting = deque(range(len(requests)))
        again: dict[int, int] = {}  # by the slot of a fresh worker: the call that failed there
        while waiting or again or any(worker.task is not None for worker in self._workers):
            for slot, worker in enumerate(self._workers):
                if worker.idle and (slot in again or waiting):
                    task = again[slot] if slot in again else waiting[0]
                    if not worker.send(task, requests[task], slot in again):
                        self._replace(slot)  # died between two calls: no call's fault
                    elif again.pop(slot, None) is None:
                        waiting.popleft()
            due = self._due(end)
            if not due and time.monotonic() >= end:
                break
            for slot in due:
                worker = self._workers[slot]
                task, message = worker.task, worker.receive()
                if message is None:
                    late = worker.ran_out()
                    if task is None:
                        self._failed_start(worker, late=late)
                    elif worker.retry:
                        results[task] = Outcome(failure="timeout" if late else "crash")
                    else:
                        again[slot] = task
                    self._replace(slot)
                elif task is None:  # it is ready
                    self._failed_starts = 0
                else:
                    results[task] = Outcome(*json.loads(message))
        return results

    def _due(self, end: float) -> list[int]:
        """Wait for workers that start or work: the slots of those with news or out of time."""
        pending = {slot: worker for slot, worker in enumerate(self._workers) if not worker.idle}
        deadline = min([end, *(worker.deadline for worker in pending.values())])
        pause = max(0.0, deadline - time.monotonic())
        readable = wait([w.connection for w in pending.values()], timeout=pause)
        now = time.monotonic()
        return [s for s, w in pending.items() if w.connection in readable or now >= w.deadline]

    def _failed_start(self, worker: "_Worker", *, late: bool) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            reason = "took too long" if late else worker.last_error()
            raise RuntimeError(f"worker processes cannot start: {reason}")

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = self._start()


class _Worker:
    """One process: starting, then in turn idle and busy with the request ``task``."""

    def __init__(self, limits: Limits, preload: tuple[str, ...]):
        self.task: int | None = None
        self.retry = self.idle = False
        self._wall = limits.wall
        self.deadline = time.monotonic() + _START_LIMIT_S
        self.connection, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill)
        arguments = theirs.fileno(), preload, limits.cpu, limits.memory_mb
        program = f"from srpo_jax.rewards.workers import serve; serve{arguments}"
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        # One thread each: the pool is the parallelism.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                env=os.environ | threads | {"PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
            )

    def send(self, task: int, request: bytes, retry: bool = False) -> bool:
        """Give an idle worker its next request; False if the process is gone."""
        try:
            self.connection.send_bytes(request)
        except OSError:
            return False
        self.task, self.retry, self.idle = task, retry, False
        self.deadline = time.monotonic() + self._wall
        return True

    def receive(self) -> bytes | None:
        """The worker's message, after which it is idle; None where it ended or says nothing yet."""
        try:
            if not self.connection.poll():
                return None
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            return None
        self.task, self.idle = None, True
        return message

    def ran_out(self) -> bool:
        """Whether a process that gave no message used up its time, of the clock or processor."""
        if time.monotonic() >= self.deadline:
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        return self.process.returncode == -signal.SIGXCPU

    def last_error(self) -> str:
        """The last line that the process wrote to stderr."""
        self.process.wait(timeout=5)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self.process.returncode}"

    def kill(self) -> None:
        """End the process at once, whatever it does, and reap it."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self._errors.close()


# ------------------------------------------------------------------------------ worker's side


def serve(fd: int, preload: Sequence[str], cpu: float | None, memory_mb: int | None) -> None:
    """A worker's life: answer requests from the pipe ``fd`` until it closes."""
    connection = Connection(fd)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the run still wants its last
    # calls then. Workers end when the pipe closes, or by SIGKILL.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    for place in preload:  # imports and sympy's caches: before the clock runs
        with contextlib.suppress(Exception):  # the call says what is wrong with it
            getattr(load(place), "warm_up", lambda: None)()
    if memory_mb is not None:
        _limit_memory(memory_mb)
    connection.send_bytes(_READY)
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        if cpu is not None:
            _limit_cpu(cpu)
        connection.send_bytes(json.dumps(_answer(*pickle.loads(request))).encode())


def _answer(function: str, args: Sequence[Any], options: dict[str, Any]) -> tuple[Any, str]:
    """The fields of the outcome. Out of memory, the worker ends: the next call gets a fresh one."""
    try:
        return find_function(function)(*args, **options), ""
    except MemoryError:
        raise
    except Exception:  # whatever sympy raises, RecursionError included
        return None, "raised"


def find_function(place: str) -> Callable[..., Any]:
    """The function at "package.module:name" or "file.py:name"; AttributeError where it is none."""
    module, _, name = place.rpartition(":")
    return getattr(load(module), name)


@functools.cache
def load(place: str) -> Any:
    """A module by its name, or a file as a module; what stands beside the file can be imported."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def _limit_memory(megabytes: int) -> None:
    """Bound the worker's heap. Not its address space: thread stacks and libraries reserve that."""
    _limit(resource.RLIMIT_DATA, megabytes * 2**20)


def _limit_cpu(seconds: float) -> None:
    """Let the kernel end a hung call, to the next whole second of processor time."""
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))
    _limit(resource.RLIMIT_CORE, 0)  # the signal would leave a core file


def _limit(kind: int, value: int) -> None:
    """Lower a limit of this process; without one where the system refuses."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (value, hard))
