"""Real runs as processes that start at once: forked off a server that has imported everything.

A run is the program as a user starts it (its command line, its exit codes) on the tiny model of
tests/train_helpers.py; compiled programs are shared by all of them through a cache. In its process
a `Fault` may be caused at the entry of a phase.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import struct
import sys
import threading
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

import train_helpers as helpers
from simulated import xla_flags

from srpo_jax import evaluate, train_grpo, train_sft
from srpo_jax.run import checkpoint, command, metrics, rollout, session
from srpo_jax.run.metrics import read_rows
from tools import build_reflection_data, convert_hf
from tools.lib import cli

TESTS = Path(__file__).resolve().parents[1]
RECIPES = Path(__file__).with_name("recipes.py")
# What is started: by the name of a recipe, or of a tool.
PROGRAMS = {
    **dict.fromkeys(("srpo", "resample", "lora"), lambda: command.main(train_grpo.train)),
    "sft": lambda: command.main(train_sft.train),
    "evaluation": lambda: command.main(evaluate.evaluate),
    "build": lambda: cli.run(build_reflection_data.main, build_reflection_data.make_parser()),
    "export": lambda: cli.run(convert_hf.main, convert_hf.make_parser()),
}


# --- in the run ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    """``act`` happens when the run enters ``phase`` for the ``nth`` time."""

    phase: str  # of `PLACES`, or one that is timed: data, sample, grade, logp, update, write
    act: str  # of `ACTS`
    nth: int = 1


PLACES = {
    "weights": (session, "load_found"),
    "restore": (session.Session, "_restore"),
    "save": (checkpoint.Checkpoints, "save"),
    "evaluation": (evaluate.Evaluator, "__call__"),
    "note": (checkpoint.Checkpoints, "note"),
    "export": (session, "export"),
    "batch": (evaluate.RowLog, "append"),
    "conclusion": (evaluate, "conclude"),
    "row": (metrics.MetricWriter, "_write"),
}


def _fill_disk() -> None:
    """No file takes another byte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def _make_read_only() -> None:
    """Nothing under the working directory can be made, grown or removed."""
    for path in (Path.cwd(), *Path.cwd().rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)


ACTS = {
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "full": _fill_disk,
    "read-only": _make_read_only,
}


def _cause(fault: Fault) -> None:
    count = itertools.count(1)

    def entered(phase: str) -> None:
        if phase == fault.phase and next(count) == fault.nth:
            ACTS[fault.act]()

    if fault.phase in PLACES:
        owner, name = PLACES[fault.phase]
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            entered(fault.phase)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)
        return
    timed = metrics.Timers.__call__

    def timing(self, phase, behind=None):
        entered(phase)
        return timed(self, phase, behind)

    metrics.Timers.__call__ = timing


def _give_up_override() -> None:
    """Root writes where nobody may: held to permissions like a user, it does not."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    ctypes.CDLL(None).capset(header, nothing)


def _live(kind: str, folder: Path, arguments: list[str], fault: Fault | None, out: Connection):
    """The life of a run's process."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(out.fileno(), stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  (the server's may have been a file)
    out.close()
    os.chdir(folder)
    _give_up_override()
    rollout.grade = helpers.fake_grade
    helpers.compile_once()
    if fault is not None:
        _cause(fault)
    sys.argv = [kind, *arguments]
    PROGRAMS[kind]()


# --- outside of it -------------------------------------------------------------------------------


class Run:
    """A run that goes on in a process of its own."""

    def __init__(self, kind: str, workdir: Path, *more: str, fault=None):
        workdir.mkdir(parents=True, exist_ok=True)
        arguments = list(more)
        if kind not in ("build", "export"):
            arguments = [f"--config={RECIPES}:{kind}", f"--workdir={workdir}", *more]
        theirs, ours = multiprocessing.Pipe(duplex=False)[::-1]
        self._said: list[bytes] = []
        context = multiprocessing.get_context("forkserver")
        args = (kind, workdir, arguments, fault, theirs)
        self.process = context.Process(target=_live, args=args)
        self._began, self.took = time.monotonic(), 0.0  # seconds, when it has ended
        self.process.start()
        theirs.close()
        self._listener = threading.Thread(target=self._listen, args=[ours], daemon=True)
        self._listener.start()

    def _listen(self, ours: Connection) -> None:
        with contextlib.closing(ours):
            while part := os.read(ours.fileno(), 1 << 16):
                self._said.append(part)

    @property
    def said(self) -> str:
        """What it has written so far."""
        return b"".join(self._said).decode(errors="replace")

    def ended_within(self, seconds: float) -> bool:
        """Whether it ends in that time."""
        self.process.join(seconds)
        self.took = time.monotonic() - self._began
        return self.process.exitcode is not None

    def kill(self) -> None:
        """SIGKILL; the next start must not meet it alive."""
        self.process.kill()
        self.process.join()

    def end(self, seconds: float = 600) -> int:
        """The exit code; killed where it takes longer."""
        ended = self.ended_within(seconds)
        if not ended:
            self.kill()
        self._listener.join(10)
        assert ended, f"still there after {seconds} s:\n{self.said[-3000:]}"
        return self.process.exitcode


def start_server(world: Path) -> None:
    """Have the server of all runs: imports are paid for once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fault_runs"])
    here = [str(TESTS.parent), str(TESTS), str(TESTS / "faults")]
    changes = {
        "FAULTS_WORLD": str(world / "world.json"),
        "PYTHONPATH": os.pathsep.join(here),
        "XLA_FLAGS": xla_flags(),
        "REFLECTION_WORLD": str(world / "said.json"),
        "OPENAI_API_KEY": "none",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ |= changes
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# --- what a run has left behind ------------------------------------------------------------------

TIMES = ("time/", "hidden/", "tokens_per_second", "mfu", "run", "seconds", "grading/")


def left_behind(workdir: Path) -> dict[str, object]:
    """All that must not depend on how often a run was killed, by name.

    Of checkpoints their checksums: of every array, of the host's state, of the text.
    """
    found: dict[str, object] = {}
    if (workdir / "checkpoints").is_dir():
        newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
        meta = checkpoint.read_meta(workdir)
        assert meta["step"] == newest
        found["newest"] = newest
        found |= {f"checkpoint {name}": value for name, value in meta["checksums"].items()}
    if (workdir / "metrics.jsonl").is_file():
        for row in read_rows(workdir / "metrics.jsonl"):
            found[f"row {row['split']} {row['step']}"] = _without_times(row)
    for name in ("samples.jsonl", "summary.json"):
        if (workdir / name).is_file():
            rows = map(json.loads, (workdir / name).read_text().splitlines())
            found[name] = [_without_times(row) for row in rows]
    for path in sorted(workdir.rglob("*")):
        within = path.relative_to(workdir)
        if path.is_file() and within.parts[0] in ("rollouts", "hf", "data"):
            if not path.name.startswith("card."):
                found[str(within)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _without_times(row: dict) -> dict:
    return {k: v for k, v in row.items() if not k.startswith(TIMES) and k != "time"}


def litter(workdir: Path) -> list[str]:
    """What no run that has ended may leave."""
    return sorted(
        str(path.relative_to(workdir))
        for path in workdir.rglob("*")
        if path.name == ".lock" or path.name.endswith(".tmp") or "-tmp" in path.name
    )


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of what differs, or is in one only."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
