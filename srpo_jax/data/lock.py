"""One program at a time writes into a folder.

The file ``.lock`` in it names the holder and its last sign of life, which the holder renews. That
works on disks, on shared storage and on buckets, where the operating system's locks do not reach.
"""

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from srpo_jax.data.files import AnyPath, on_bucket, remove_left_over, write_text

BEAT = 15.0  # seconds between two signs of life
PATIENCE = 60.0  # without one, after which a holder on another machine counts as gone
FORGOTTEN = 3600.0  # of this age by the clock: gone, without waiting for one

_held: set[str] = set()  # tokens of this process


@contextlib.contextmanager
def hold(folder: AnyPath, say: Callable[[str], None] = print) -> Iterator[None]:
    """The folder, made where it is missing, to this program alone.

    A holder that is gone is replaced, with a line to ``say``: at once where its process has ended
    on this machine, else after `PATIENCE` seconds without a sign of life. RuntimeError, naming the
    holder, where there is one.
    """
    path = epath.Path(folder) / ".lock"
    own = _describe_self()
    made = not path.parent.exists()
    _await_end(path, say)
    _write(path, own)
    # Of two that came at the same moment the later one holds it.
    time.sleep(2.0 if on_bucket(folder) else 0.02)
    if (found := _read(path)).get("token") != own["token"]:
        raise RuntimeError(_in_use(path, found))
    _held.add(own["token"])
    remove_left_over(folder)
    end = threading.Event()
    beat = threading.Thread(target=_keep_alive, args=(path, own, end), daemon=True)
    beat.start()
    try:
        yield
    finally:
        end.set()
        beat.join()
        _held.discard(own["token"])
        if _read(path).get("token") == own["token"]:
            with contextlib.suppress(OSError):  # on a disk gone read-only: what went wrong is told
                path.unlink(missing_ok=True)
        if made and not on_bucket(folder):
            with contextlib.suppress(OSError):  # it stays where there is something in it
                os.rmdir(folder)


def _await_end(path: epath.Path, say: Callable[[str], None]) -> None:
    """Return when nobody holds the folder (any more); RuntimeError where somebody does."""
    found = _read(path)
    if not found:
        return
    if found["machine"] == _machine():
        if _is_alive(found):
            raise RuntimeError(_in_use(path, found))
    elif time.time() - found["beat"] < FORGOTTEN:
        say(f"{path.parent}: {_who(found)} had it; waiting {PATIENCE:.0f} s for a sign of life")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(min(2.0, PATIENCE / 10))
            now = _read(path)
            if not now:
                return
            if now != found:
                raise RuntimeError(_in_use(path, now))
    say(f"{path.parent}: taken over from {_who(found)}, which is gone")


def _keep_alive(path: epath.Path, own: dict[str, Any], end: threading.Event) -> None:
    while not end.wait(BEAT):
        with contextlib.suppress(OSError):  # the next sign of life may come through
            found = _read(path)
            if found and found["token"] != own["token"]:
                print(f"error: {_in_use(path, found)}", file=sys.stderr, flush=True)
                os._exit(1)  # at once: two that write here spoil both
            _write(path, own)


def _in_use(path: epath.Path, found: dict[str, Any]) -> str:
    return (
        f"{path.parent} is in use by {_who(found)}: wait for it, stop it, or use another folder "
        f"(if it is certainly gone, delete {path})"
    )


def _who(found: dict[str, Any]) -> str:
    if not found:
        return "another program"
    since = datetime.datetime.fromtimestamp(found["since"]).isoformat(" ", "minutes")
    return f"process {found['pid']} on {found['host']} since {since} ({found['command']})"


def _describe_self() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "since": time.time(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])[:80],
    }


def _machine() -> str:
    """Where a process number means the same process: a host, and of it a container."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(found: dict[str, Any]) -> bool:
    if found["pid"] == os.getpid():
        return found["token"] in _held
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return found["born"] == _born(found["pid"])  # else its number was given to another process


def _born(pid: int) -> str | None:
    """When a process began, in ticks of the machine; "" for one that ended, None if unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if state == "Z" else fields[18]


def _write(path: epath.Path, own: dict[str, Any]) -> None:
    write_text(path, json.dumps(own | {"beat": time.time()}) + "\n")


def _read(path: epath.Path) -> dict[str, Any]:
    """What the file holds; nothing where it is not there, or is none of ours."""
    try:
        found = json.loads(path.read_text())
        return found if {"token", "machine", "beat"} <= found.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}
