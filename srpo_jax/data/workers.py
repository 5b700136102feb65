"""Processes and threads that read and encode records, and how long a record is waited for.

Grain waits for ever for a worker that is stopped, or that hangs on a network disk which is gone.
``Supply`` waits for a stated time, starts new workers at the very record that did not come (the
stream has random access: nothing changes by it), and gives up where that does not help.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from srpo_jax.structs import Stalled

TELL = 15.0  # seconds of waiting after which it is told, and again when they have doubled
_LOOK = 0.25  # seconds between two looks
_CLOSE = 30.0  # seconds that workers may take to end; Grain kills them after 25
_END = object()
_SIGNALS = {signal.SIGINT, signal.SIGTERM}  # a scheduler sends them to the whole process group
_STATES = {"T": " (stopped)", "D": " (waiting for a disk)"}  # of a process, as Linux has them

# ``begin(position)``: items from there on, each with its worker's process id (0: a thread's).
Begin = Callable[[int], Iterator[tuple[Any, int]]]


def as_worker(_index: int, _count: int) -> None:
    """A worker's first act: the run goes on to its checkpoint after a signal, and needs its data;
    but with the process that started it the worker ends, however that went."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)


class _Pull:
    """An iterator that a thread of its own draws from: waiting for it can be given up."""

    def __init__(self, begin: Callable[[], Iterator[Any]]):
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._draw, args=[begin], daemon=True)
        self._thread.start()

    def _draw(self, begin: Callable[[], Iterator[Any]]) -> None:
        # Processes that are started here take the mask over: they are deaf to signals while they
        # import. (Starting this tracker would let the signals in again.)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        with contextlib.ExitStack() as stack:
            try:
                items = begin()
                # An empty stream's has none.
                stack.callback(getattr(items, "close", lambda: None))
                while self._asked.get():
                    self._answers.put((next(items, _END), None))
            except Exception as error:
                self._answers.put((None, error))

    def ask(self) -> None:
        """For the next item."""
        self._asked.put(True)

    def answer(self, seconds: float) -> Any:
        """What was asked for; queue.Empty where it does not come so soon, its error raised."""
        item, error = self._answers.get(timeout=seconds)
        if error is not None:
            raise error
        return item

    def close(self, seconds: float) -> None:
        """Let go of the iterator; wait so long for that."""
        self._asked.put(False)
        self._thread.join(seconds)


class Supply:
    """The items from ``position`` on. Stalled where workers were killed, or a record does not come
    within ``timeout`` seconds (0: for ever) of two sets of them.

    Args:
        workers: processes that take turns, item by item; 0: threads.
        name: of the record at a position; must not read it.
        say: told of each long wait.
    """

    # One parameter for each thing that a wait depends on.
    def __init__(
        self,
        begin: Begin,
        position: int,
        *,
        workers: int,
        timeout: float,
        name: Callable[[int], str],
        say: Callable[[str], None] | None = None,
    ):
        self._begin, self._position = begin, position
        self._workers, self._timeout, self._name = workers, timeout, name
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._start()

    def _start(self) -> None:
        self._first, self._pids = self._position, dict[int, int]()  # of worker 0, 1, ...
        self._others = {child.pid for child in multiprocessing.active_children()}
        self._pull = _Pull(functools.partial(self._begin, self._position))

    def __iter__(self) -> "Supply":
        return self

    def __next__(self) -> Any:
        try:
            found = self._wait()
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):  # Grain's words
                raise
            raise Stalled(
                "a process of data.workers was ended from outside, for want of memory perhaps: "
                "lower data.workers, or 0 for threads"
            ) from error
        if found is _END:
            raise StopIteration
        item, self._pids[self._worker()] = found
        self._position += 1
        return item

    def _wait(self) -> Any:
        tell, again = TELL, False
        self._pull.ask()
        for looks in itertools.count(1):  # a time in which this process itself is stopped is none
            with contextlib.suppress(queue.Empty):
                return self._pull.answer(_LOOK)
            waited, late = looks * _LOOK, f"data.timeout={self._timeout:g} s"
            if self._timeout and waited >= self._timeout * (1 + again):
                late = f"{self._name(self._position)} did not come within {late}"
                who = self._who()
                self._give_up()
                if again:
                    raise Stalled(
                        f"{late}, twice, the last time from {who}: see to its disk or bucket, or "
                        "raise data.timeout"
                    )
                self._say(f"{late} from {who}: asking another one")
                again = True
                self._start()
                self._pull.ask()
            elif waited >= tell:
                what = self._name(self._position)
                self._say(f"waiting for {what} for {waited:g} s, from {self._who()}; {late}")
                tell *= 2

    def _worker(self) -> int:
        """The number of the worker whose turn it is."""
        return (self._position - self._first) % max(self._workers, 1)

    def _who(self) -> str:
        """That worker in words."""
        if not self._workers:
            return "a thread of data.workers=0"
        pid = self._pids.get(self._worker())
        return f"data worker {pid}{_state(pid)}" if pid else "a data worker that has just begun"

    def _give_up(self) -> None:
        """Kill the workers; what one of them may have left half-written is not read."""
        for child in multiprocessing.active_children():
            if child.pid not in self._others:
                child.kill()
        self._pull.close(0.0)

    def close(self) -> None:
        """Stop threads and worker processes."""
        self._pull.close(_CLOSE)

    def __del__(self) -> None:
        self._pull.close(0.0)


def _state(pid: int) -> str:
    """Why a process may not get on, where the system tells."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return _STATES.get(told[0], "")
