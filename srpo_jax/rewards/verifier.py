"""The answer check in killable worker processes: a check that hangs twice is one wrong answer.

sympy can run for hours (``9^{9^{9^9}}``), exhaust memory, or crash the interpreter. Each worker is
a process of its own that runs one check at a time. The kernel ends it when the check has used up
its processor time, so that a loaded machine does not turn right answers into wrong ones; a fresh
worker then tries once more. Workers are started by command line rather than forked
or spawned by multiprocessing: they never import the caller's main module (and with it jax), and
they inherit none of its threads.
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from srpo_jax.rewards.answers import Question, decide

_ROOT = Path(__file__).resolve().parents[2]
_START_LIMIT_S = 120.0  # importing sympy on a loaded machine; not part of any check's time
_SLEEP_LIMIT_S = 60.0  # of a worker that computes nothing, besides twenty times a check's own time
_MAX_FAILED_STARTS = 3
_CACHE_SIZE = 200_000  # verdicts
_MEMORY_MB = 2048  # of one worker's own data, beyond which the check fails and not the machine
_READY, _YES, _NO = b"ready", b"1", b"0"
_EQUAL_MODULE = "srpo_jax.rewards.equality"
_EQUAL = f"{_EQUAL_MODULE}:equal"


class Verifier:
    """Checks answers against golds, in order, with a pool of worker processes and a cache.

    Usable as a context manager; safe to call from several threads, one at a time inside.
    ``timeouts`` and ``crashes`` count the checks that were scored wrong for either reason, and
    ``unread`` the answers that were because they could not be read to their end.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout: float = 5.0,
        *,
        modules: Sequence[str] = (),
    ):
        """Start ``workers`` processes (they come up in the background).

        ``timeout`` is in seconds of processor time, for one check, to the next whole second.
        ``modules`` are those whose functions ``verify_math`` will name: workers import them, and
        call their ``warm_up()``, before they take a check. ValueError for non-positive values.
        """
        if workers < 1 or timeout <= 0:
            raise ValueError(f"workers={workers} and timeout={timeout} must be positive")
        self.timeouts = 0
        self.crashes = 0
        self.unread = 0
        self._told: dict[str, int] = {}
        self._timeout = float(timeout)
        self._modules = tuple(modules)
        self._cache: dict[tuple, bool] = {}
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._closed = False
        self._workers = [self._start() for _ in range(workers)]

    def check(self, items: Sequence[tuple[Question, str | None]]) -> list[bool]:
        """Whether the text of each answer block answers its question, in the order of ``items``.

        Only what plain comparison cannot settle goes to the workers, each distinct pair once.
        """
        decisions = {
            (asked, answer): decide(asked.gold, answer, asked.choices, asked.tolerance)
            for asked, answer in dict.fromkeys(items)
        }
        found = {item: decision is True for item, decision in decisions.items()}
        open_pairs = {item: pair for item, pair in decisions.items() if isinstance(pair, tuple)}
        for tolerance in dict.fromkeys(asked.tolerance for asked, _ in open_pairs):
            own = {item: p for item, p in open_pairs.items() if item[0].tolerance == tolerance}
            verdicts = self.verify_math([*own.values()], **dataclasses.asdict(tolerance))
            found |= zip(own, verdicts, strict=True)
        self.unread += sum(decisions[item] is None for item in items)
        return [found[item] for item in items]

    def verify_math(
        self, pairs: Sequence[tuple[str, str]], *, function: str = _EQUAL, **options: Any
    ) -> list[bool]:
        """Whether (gold, prediction) strings are equal, in order; ``options`` as equality.equal.

        ``function`` ("package.module:name") is called instead, as name(gold, prediction,
        **options), for rules that must not run in this process either. False where
        the check fails, runs out of time or memory, or kills its worker, twice; that is not
        remembered. RuntimeError when workers cannot be started, or after close().
        """
        options = {"function": function, **options}
        extra = json.dumps(options, sort_keys=True)
        with self._lock:
            if self._closed:
                raise RuntimeError("this Verifier is closed")
            todo = [p for p in dict.fromkeys(pairs) if (*p, extra) not in self._cache]
            try:
                found = self._run([json.dumps([*pair, options]).encode() for pair in todo])
            except BaseException:  # interrupted: no worker may keep a request of this call
                for slot, worker in enumerate(self._workers):
                    if worker.task is not None:
                        self._replace(slot)
                raise
            if len(self._cache) + len(todo) > _CACHE_SIZE:
                self._cache.clear()
            fresh = {(*pair, extra): ok for pair, ok in zip(todo, found, strict=True)}
            known = {key: self._cache[key] for p in pairs if (key := (*p, extra)) in self._cache}
            self._cache |= {key: ok for key, ok in fresh.items() if ok is not None}
        return [bool((known | fresh)[(*pair, extra)]) for pair in pairs] if pairs else []

    def counts(self) -> dict[str, int]:
        """``grading/timeouts``, ``grading/crashes`` and ``grading/unread`` since the last call."""
        names = ("timeouts", "crashes", "unread")
        now = {f"grading/{name}": getattr(self, name) for name in names}
        told, self._told = self._told, now
        return {name: count - told.get(name, 0) for name, count in now.items()}

    def close(self) -> None:
        """Kill the workers; further checks raise."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
            self._workers = []

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __del__(self) -> None:
        # Workers also leave by themselves when their pipe closes; this reaps them.
        with contextlib.suppress(Exception):
            self.close()

    # ------------------------------------------------------------------------------------- pool

    def _start(self) -> "_Worker":
        return _Worker(self._timeout, self._modules)

    def _run(self, requests: list[bytes]) -> list[bool | None]:
        """Hand requests to idle workers until every one has its answer; None where it failed."""
        results: list[bool | None] = [None] * len(requests)
        waiting = deque(range(len(requests)))
        again: dict[int, int] = {}  # by the slot of a fresh worker: the check that failed there
        while waiting or again or any(worker.task is not None for worker in self._workers):
            for slot, worker in enumerate(self._workers):
                if worker.idle and (slot in again or waiting):
                    task = again[slot] if slot in again else waiting[0]
                    if not worker.send(task, requests[task], slot in again):
                        self._replace(slot)  # died between two checks: no check's fault
                    elif again.pop(slot, None) is None:
                        waiting.popleft()
            for slot in self._due():
                worker = self._workers[slot]
                task, message = worker.task, worker.receive()
                if message is None:
                    late = worker.ran_out()
                    if task is None:
                        self._failed_start(worker, late=late)
                    elif worker.retry:
                        self.timeouts += late
                        self.crashes += not late
                    else:
                        again[slot] = task
                    self._replace(slot)
                elif task is None:  # it is ready
                    self._failed_starts = 0
                else:
                    results[task] = message == _YES
        return results

    def _due(self) -> list[int]:
        """Wait for workers that start or check: the slots of those with news or out of time."""
        pending = {slot: worker for slot, worker in enumerate(self._workers) if not worker.idle}
        pause = max(0.0, min(w.deadline for w in pending.values()) - time.monotonic())
        readable = wait([w.connection for w in pending.values()], timeout=pause)
        now = time.monotonic()
        return [s for s, w in pending.items() if w.connection in readable or now >= w.deadline]

    def _failed_start(self, worker: "_Worker", *, late: bool) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            reason = "took too long" if late else worker.last_error()
            raise RuntimeError(f"answer-checking workers cannot start: {reason}")

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = self._start()


class _Worker:
    """One process: starting, then in turn idle and busy with the request ``task``."""

    def __init__(self, timeout: float, modules: tuple[str, ...]):
        self.task: int | None = None
        self.retry = self.idle = False
        self._timeout = timeout
        self.deadline = time.monotonic() + _START_LIMIT_S
        self.connection, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill)
        arguments = theirs.fileno(), timeout, modules
        program = f"from srpo_jax.rewards.verifier import serve; serve{arguments}"
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
        self.deadline = time.monotonic() + _SLEEP_LIMIT_S + 20 * self._timeout
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


def serve(fd: int, timeout: float, modules: Sequence[str]) -> None:
    """A worker's life: answer requests from the pipe ``fd`` until it closes."""
    connection = Connection(fd)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the run still wants its last
    # checks then. Workers end when the pipe closes, or by SIGKILL.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    for name in (_EQUAL_MODULE, *modules):  # imports and sympy's caches: before the clock runs
        getattr(importlib.import_module(name), "warm_up", lambda: None)()
    _limit_memory(_MEMORY_MB)
    connection.send_bytes(_READY)
    while True:
        try:
            gold, predicted, options = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        _limit_cpu(timeout)
        try:
            module, _, name = options.pop("function").partition(":")
            verdict = getattr(importlib.import_module(module), name)(gold, predicted, **options)
        except Exception:  # whatever sympy raises, MemoryError and RecursionError included
            verdict = False
        connection.send_bytes(_YES if verdict else _NO)


def _limit_memory(megabytes: int) -> None:
    """Bound the worker's heap. Not its address space: thread stacks and libraries reserve that."""
    _limit(resource.RLIMIT_DATA, megabytes * 2**20)


def _limit_cpu(seconds: float) -> None:
    """Let the kernel end a hung check, to the next whole second of processor time."""
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))
    _limit(resource.RLIMIT_CORE, 0)  # the signal would leave a core file


def _limit(kind: int, value: int) -> None:
    """Lower a limit of this process; without one where the system refuses."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (value, hard))
