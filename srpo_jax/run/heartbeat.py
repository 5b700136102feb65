"""When a process of a run dies or stalls, the others end soon, with one line that names it.

Every process writes its beat into the key-value store of jax's coordination service, from a thread
of its own. The first one, which holds the store, reads all beats and writes down who is missing;
the others read that, and watch the first one. (jax has a heartbeat too: it aborts in C++ with pages
of text that name nobody, so it is given more time than this one.)
"""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

LOST = 69  # exit code of a run that has lost a process (EX_UNAVAILABLE)
GRACE = 2.0  # seconds in which a process that fails as well says so itself
_ERROR = " has ended with an "  # error: ...
_BEATS, _WORD = "srpo/beat/", "srpo/word/"  # of all processes for the first; of it for the others


class Store(Protocol):
    """The key-value store; its calls fail or hang where the first process is gone."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


def end_run(text: str) -> NoReturn:
    """Say it and end this process at once: its main thread may wait in a collective for ever.

    With code 1 where it ends with another one's error, which running it again does not mend.
    """
    failed = _ERROR in text
    advice = "; run the same command again: it goes on from the last checkpoint"
    print(f"error: {text}{'' if failed else advice}", file=sys.stderr, flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1 if failed else LOST)


class Heartbeat:
    """Beats and watches, from two threads, until the process ends.

    A process that computes, compiles or waits beats on; one that was killed or stopped, or whose
    machine is gone, does not.
    """

    def __init__(
        self,
        store: Store,
        index: int,
        count: int,
        timeout: float,
        *,
        gone: threading.Event | None = None,
        end: Callable[[str], Any] = end_run,
    ):
        """``gone`` is set where the connection to the first process has broken (`relay`)."""
        self._store, self._index, self._end = store, index, end
        self._timeout, self._gone = timeout, gone or threading.Event()
        self.period = min(max(timeout / 20, 0.1), 5.0)
        self._limit = timeout
        # Seconds since the last beat was seen, while this process itself was awake.
        self._silent = dict.fromkeys(range(1, count) if index == 0 else [0], 0.0)
        self._said: dict[int, dict[str, Any]] = {i: {} for i in self._silent}
        self._ended: str | None = None  # of this process: "", or the error
        self._beats, self._verdict, self._writing = 0, "", threading.Lock()

    def start(self) -> None:
        """Begin."""
        for loop in (self._beat_on, self._look_on):
            threading.Thread(target=loop, daemon=True).start()

    # --- beating, where a call may hang ---

    def _beat_on(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # no answer: the first process is silent
                self.beat()
            time.sleep(self.period)

    def beat(self) -> None:
        """Write one, and read what the others have written."""
        with self._writing:
            self._beats += 1
            host, first = socket.gethostname(), self._index == 0
            text = json.dumps({"n": self._beats, "host": host, "ended": self._ended})
            key = f"{_WORD}beat" if first else f"{_BEATS}{self._index}"
            self._store.key_value_set(key, text, True)
            held = dict(self._store.key_value_dir_get(_BEATS if first else _WORD))
        for i, before in self._said.items():
            now = held.get(f"{_BEATS}{i}" if first else f"{_WORD}beat")
            # Of one that has ended, the time since then counts.
            if now and before.get("ended") is None and json.loads(now) != before:
                self._said[i], self._silent[i] = json.loads(now), 0.0
        self._verdict = self._verdict or held.get(f"{_WORD}lost", "")

    # --- watching, where nothing does ---

    def _look_on(self) -> None:
        before = time.monotonic()
        while self._ended is None:
            time.sleep(self.period)
            now = time.monotonic()
            # Of a longer time, as after SIGCONT, nothing is known.
            lost = self.look(min(now - before, 2 * self.period))
            before = now
            if lost:
                return self._close(lost)

    def look(self, passed: float) -> str:
        """After so many seconds more: which process is lost, and how; "" where none is."""
        for i, said in self._said.items():
            self._silent[i] += passed
            name = f"process {i} ({said.get('host', 'not heard of yet')})"
            ended = said.get("ended")
            if ended and self._silent[i] > GRACE:
                return f"{name}{_ERROR}{ended}"
            if ended is None and self._silent[i] > self._limit:
                quiet = f"{self._silent[i]:.0f} s (distributed.timeout={self._timeout:g})"
                return f"{name} has not been heard of for {quiet}"
            if ended is None and self._gone.is_set():
                return f"{name} is gone: it has closed its connections"
        return self._verdict

    def _close(self, lost: str) -> None:
        if self._index == 0:
            with contextlib.suppress(Exception):
                self._store.key_value_set(f"{_WORD}lost", lost, True)
            time.sleep(2 * self.period)  # until the others have read it
        else:
            self.leave(lost)
        self._end(lost)

    # --- of the main thread ---

    def suspect(self) -> None:
        """After an error of a collective: wait while it may be that a process is lost.

        Returns only where none is, as `end` does not.
        """
        self._limit = min(self._timeout, 4 * self.period)
        time.sleep(self._timeout + 4 * self.period)

    def leave(self, error: str = "", *, wait: bool = True) -> None:
        """This process ends: normally, or with an error, which the others end with then.

        The first one, which has the store, waits until they have ended or at least heard of it.
        """
        self._ended = error
        end = time.monotonic() + (2 * self.period + GRACE if wait and self._index == 0 else 0)
        told = threading.Event()

        def tell() -> None:
            while True:
                with contextlib.suppress(Exception):
                    self.beat()
                    told.set()
                time.sleep(0.1)

        threading.Thread(target=tell, daemon=True).start()
        told.wait(GRACE)
        while time.monotonic() < end and any(s.get("ended") is None for s in self._said.values()):
            time.sleep(0.1)

    def at_exit(self) -> None:
        """Leave, and stay out of the store: for `atexit`.

        A thread that comes back from C++ into a Python that is ending is ended there, which C++
        answers with an abort of the whole process, after all its work.
        """
        self.leave(wait=False)
        self._writing.acquire(timeout=GRACE)  # for good: the threads wait for it


# --- the connection to the first process -----------------------------------------------------


def relay(coordinator: str, gone: threading.Event) -> str:
    """An address of this machine that leads to ``coordinator``.

    jax ends the process, with a page, at the moment in which its connection to the first process
    breaks. This one stays open, and ``gone`` is set instead.
    """
    host, _, port = coordinator.rpartition(":")
    place = host.strip("[]"), int(port)
    server = socket.create_server(("127.0.0.1", 0), backlog=16)
    # Of gRPC, which would look for a proxy elsewhere.
    os.environ["no_grpc_proxy"] = ",".join(
        filter(None, ["127.0.0.1", os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")])
    )

    def serve() -> None:
        while True:
            inner, _ = server.accept()
            try:
                outer = socket.create_connection(place, timeout=30)
            except OSError:
                inner.close()  # gRPC tries again
                continue
            outer.settimeout(None)
            for one in (inner, outer):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for way in ([inner, outer, _shut], [outer, inner, broken]):
                threading.Thread(target=_pump, args=way, daemon=True).start()

    def broken(inner: socket.socket) -> None:
        for _ in range(10):  # a process that is being killed listens for a while
            time.sleep(0.5)
            try:
                socket.create_connection(place, timeout=10).close()
            except OSError:
                return gone.set()
        _shut(inner)  # it lives: gRPC connects again

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


def _pump(
    source: socket.socket, target: socket.socket, ended: Callable[[socket.socket], None]
) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    ended(target)


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
