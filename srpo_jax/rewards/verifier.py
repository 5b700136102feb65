"""The answer check in killable worker processes: a hung or crashing check is one wrong answer.

math-verify can run for hours (``9^{9^{9^9}}``), exhaust memory, or crash the interpreter, and its
own time limit rests on SIGALRM, which needs the main thread and leaves C code running. Here each
worker is a process of its own that runs one check at a time on its main thread, without alarms, and
is killed and replaced when the time is over. Workers are started by command line rather than forked
or spawned by multiprocessing: they never import the caller's main module (and with it jax), and
they inherit none of its threads.
"""

import contextlib
import importlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from srpo_jax.rewards.answers import decide

_ROOT = Path(__file__).resolve().parents[2]
_START_LIMIT_S = 120.0  # importing sympy on a loaded machine; not part of any check's time
_MAX_FAILED_STARTS = 3
_READY, _YES, _NO = b"ready", b"1", b"0"

Item = tuple[str, str | None, Sequence[str]]  # gold, the answer block's text, choices


class Verifier:
    """Checks answers against golds, in order, with a pool of worker processes and a cache.

    Usable as a context manager; safe to call from several threads, one at a time inside.
    ``timeouts`` and ``crashes`` count the checks that were scored wrong for either reason.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout: float = 5.0,
        *,
        memory_limit_mb: int = 2048,
        cache_size: int = 200_000,
        modules: Sequence[str] = (),
    ):
        """Start ``workers`` processes (they come up in the background).

        ``timeout`` is in seconds, for one check; ``memory_limit_mb`` holds for one worker's own
        data, beyond which the check fails rather than the machine. ``modules`` are those whose
        functions ``verify_math`` will name: workers import them, and call their ``warm_up()``,
        before they take a check. ValueError for non-positive values.
        """
        if workers < 1 or timeout <= 0 or memory_limit_mb < 1:
            raise ValueError(
                f"workers={workers}, timeout={timeout} and memory_limit_mb="
                f"{memory_limit_mb} must be positive"
            )
        self.timeouts = 0
        self.crashes = 0
        self._timeout = float(timeout)
        self._memory_limit_mb = int(memory_limit_mb)
        self._modules = tuple(modules)
        self._cache: dict[tuple, bool] = {}
        self._cache_size = cache_size
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._closed = False
        self._workers = [self._start() for _ in range(workers)]

    def check(self, items: Sequence[Item]) -> list[bool]:
        """Whether each answer gives its gold, in the order of ``items`` (gold, answer, choices).

        Only what plain comparison cannot settle goes to the workers, each distinct pair once.
        """
        keys = [(gold, answer, tuple(choices)) for gold, answer, choices in items]
        decisions = {key: decide(*key) for key in dict.fromkeys(keys)}
        pairs = list({d for d in decisions.values() if not isinstance(d, bool)})
        verdicts = dict(zip(pairs, self.verify_math(pairs), strict=True))
        return [d if isinstance(d, bool) else verdicts[d] for d in map(decisions.__getitem__, keys)]

    def verify_math(
        self, pairs: Sequence[tuple[str, str]], *, function: str | None = None, **options: Any
    ) -> list[bool]:
        """math-verify's verdict on (gold, prediction) strings, in order; ``options`` as math_equal.

        ``function`` ("package.module:name") is called instead of math_equal, as name(gold,
        prediction, **options), for rules that must not run in this process either. False where
        the check fails, runs out of time or memory, or kills its worker. RuntimeError when workers
        cannot be started, or after close().
        """
        if function is not None:
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
            if len(self._cache) + len(todo) > self._cache_size:
                self._cache.clear()
            fresh = {(*pair, extra): ok for pair, ok in zip(todo, found, strict=True)}
            known = {key: self._cache[key] for p in pairs if (key := (*p, extra)) in self._cache}
            self._cache.update(fresh)
        return [(known | fresh)[(*pair, extra)] for pair in pairs] if pairs else []

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
        return _Worker(self._timeout, self._memory_limit_mb, self._modules)

    def _run(self, requests: list[bytes]) -> list[bool]:
        """Hand requests to idle workers until every one has its answer."""
        results = [False] * len(requests)
        waiting = deque(range(len(requests)))
        running = 0
        while waiting or running:
            for slot, worker in enumerate(self._workers):
                if waiting and worker.idle:
                    if worker.send(waiting[0], requests[waiting[0]]):
                        waiting.popleft()
                        running += 1
                    else:  # died between two checks: no check's fault
                        self._replace(slot)
            # A worker that is not idle is starting or checking; both have a deadline.
            pending = [w for w in self._workers if not w.idle]
            pause = max(0.0, min(w.deadline for w in pending) - time.monotonic())
            readable = set(wait([w.connection for w in pending], timeout=pause))
            for slot, worker in enumerate(self._workers):
                if worker.idle:
                    continue
                late = time.monotonic() >= worker.deadline
                if worker.connection not in readable and not late:
                    continue
                task = worker.task
                message = worker.receive() if worker.connection in readable else None
                if message is None:
                    self._count_loss(worker, late=worker.connection not in readable)
                    self._replace(slot)
                elif task is None:  # it is ready
                    self._failed_starts = 0
                else:
                    results[task] = message == _YES
                running -= task is not None
        return results

    def _count_loss(self, worker: "_Worker", *, late: bool) -> None:
        """Book a worker that ended or overran: as its check's fault, or as a failed start."""
        if worker.task is not None:
            self.timeouts += late
            self.crashes += not late
            return
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            reason = "took too long" if late else worker.last_error()
            raise RuntimeError(f"answer-checking workers cannot start: {reason}")

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = self._start()


class _Worker:
    """One process: starting, then in turn idle and busy with the request ``task``."""

    def __init__(self, timeout: float, memory_limit_mb: int, modules: tuple[str, ...] = ()):
        self.task: int | None = None
        self.idle = False
        self._timeout = timeout
        self.deadline = time.monotonic() + _START_LIMIT_S
        self.connection, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill)
        arguments = f"{theirs.fileno()}, {timeout}, {memory_limit_mb}, {modules!r}"
        program = f"from srpo_jax.rewards.verifier import serve; serve({arguments})"
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

    def send(self, task: int, request: bytes) -> bool:
        """Give an idle worker its next request; False if the process is gone."""
        try:
            self.connection.send_bytes(request)
        except OSError:
            return False
        self.task, self.idle = task, False
        self.deadline = time.monotonic() + self._timeout
        return True

    def receive(self) -> bytes | None:
        """The worker's message, after which it is idle; None if the process ended."""
        try:
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            return None
        self.task, self.idle = None, True
        return message

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


def math_equal(
    gold: str,
    predicted: str,
    *,
    match_types: Sequence[str] = ("latex", "expr"),
    float_rounding: int = 6,
    strict: bool = True,
    allow_set_relation_comp: bool = False,
) -> bool:
    """math-verify on two texts, gold first, with its own alarms off; may run without end.

    ``match_types`` of "latex", "expr" and "string" say what is extracted from the prediction and
    the gold; the other options are those of ``math_verify.verify``.
    """
    import math_verify as mv  # heavy, and needed in the workers only

    kinds = {
        "latex": mv.LatexExtractionConfig,
        "expr": mv.ExprExtractionConfig,
        "string": mv.StringExtractionConfig,
    }
    targets = [kinds[name]() for name in match_types]

    def parse(text: str) -> list[Any]:
        # No number of seconds turns the alarm off, only what the library's annotation lacks.
        return mv.parse(text, targets, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    gold_parsed = parse(gold)
    if not gold_parsed:
        return False
    return bool(
        mv.verify(
            gold_parsed,
            parse(predicted),
            float_rounding=float_rounding,
            strict=strict,
            allow_set_relation_comp=allow_set_relation_comp,
            timeout_seconds=None,
        )
    )


def serve(fd: int, timeout: float, memory_limit_mb: int, modules: Sequence[str] = ()) -> None:
    """A worker's life: answer requests from the pipe ``fd`` until it closes."""
    connection = Connection(fd)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the run still wants its last
    # checks then. Workers end when the pipe closes, or by SIGKILL.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)  # math-verify warns that its alarms are off
    for pair in ((r"$\frac{1}{2}$", "$0.5$"), (r"$2\sqrt{3}$", r"$\sqrt{12}$")):
        math_equal(*pair)  # imports, the parser's tables, sympy's caches: before the clock runs
    for name in modules:
        getattr(importlib.import_module(name), "warm_up", lambda: None)()
    _limit_memory(memory_limit_mb)
    connection.send_bytes(_READY)
    while True:
        try:
            gold, predicted, options = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        _limit_cpu(3 * timeout + 5)
        try:
            verdict = _named(options.pop("function", None))(gold, predicted, **options)
        except Exception:  # whatever sympy raises, MemoryError and RecursionError included
            verdict = False
        connection.send_bytes(_YES if verdict else _NO)


def _named(function: str | None) -> Callable[..., bool]:
    """The function of a request; math_equal where it names none."""
    if function is None:
        return math_equal
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _limit_memory(megabytes: int) -> None:
    """Bound the worker's heap. Not its address space: thread stacks and libraries reserve that."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (megabytes * 2**20, hard))


def _limit_cpu(seconds: float) -> None:
    """Let the kernel end a hung check even if the parent that should kill it is gone."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
