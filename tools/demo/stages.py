"""Runs the demo's stages as the commands that a user would type, with their progress.

Each stage is a process of its own; stages that run at the same time get one CPU core each, since
a model this small gains little from a second core. A stage that was stopped goes on where it stood
when the same command runs again.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srpo_jax.data.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
REPORT_SECONDS = 10.0  # between two lines of progress
SHOWN = {  # of a training row, where it has them
    "loss": "loss",
    "reward/mean": "reward",
    "accuracy/first": "first",
    "accuracy/final": "final",
}


@dataclass(frozen=True, eq=False)  # hashable although its overrides are not
class Stage:
    """One command. ``done`` is the file or directory that exists once it has succeeded."""

    name: str
    module: str
    config: str
    workdir: Path
    done: Path
    steps: int = 0  # of training; 0: an evaluation
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """What follows ``python``."""
        return [
            "-m",
            self.module,
            f"--config={self.config}",
            f"--workdir={self.workdir}",
            *(f"--config.{key}={value}" for key, value in self.overrides.items()),
        ]

    @property
    def log(self) -> Path:
        """Where the command's own output goes."""
        return self.workdir.with_name(f"{self.workdir.name}.log")


class Clock:
    """Seconds since the start, and lines that begin with them."""

    def __init__(self):
        self.start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        """One line of progress."""
        minutes, seconds = divmod(int(self.seconds()), 60)
        print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)


def run_stages(stages: Sequence[Stage], clock: Clock) -> None:
    """Run stages at the same time, one core each where there are several of both.

    Stages that are done are left out. RuntimeError, with the end of its log, when one fails; the
    others are then stopped (and saved), as on Ctrl-C.
    """
    todo = [stage for stage in stages if not stage.done.exists()]
    for stage in stages:
        clock.say(f"{stage.name}: " + ("started" if stage in todo else "done before"))
    cores = cores_here()
    shared = len(todo) > 1 and len(cores) >= len(todo)
    running: dict[Stage, subprocess.Popen] = {}
    try:
        for i, stage in enumerate(todo):
            share = cores[i :: len(todo)] if shared else cores
            running[stage] = launch(stage.arguments, stage.log, share)
        _watch(running, clock)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
        for process in running.values():
            process.wait()


def _shown(arguments: Sequence[str]) -> str:
    """The command as one may type it, paths relative to the checkout."""
    words = (word.replace(f"{ROOT}{os.sep}", "") for word in arguments)
    return "python " + " ".join(shlex.quote(word) for word in words)


def cores_here() -> list[int]:
    """The CPU cores this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def launch(arguments: Sequence[str], log: Path, cores: list[int]) -> subprocess.Popen:
    """``python ARGUMENTS`` on these cores (none: on all), its output at the end of ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as out:
        print(f"$ {_shown(arguments)}", file=out, flush=True)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    if cores:
        # Set before the interpreter has started a thread, so that all its threads inherit it.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(process.pid, cores)
    return process


def _watch(running: dict[Stage, subprocess.Popen], clock: Clock) -> None:
    """Wait for all stages, with a line of progress now and then."""
    last, told = time.monotonic(), ""
    begun = {stage: time.monotonic() for stage in running}
    open_stages = dict(running)
    while open_stages:
        time.sleep(0.2)
        for stage, process in list(open_stages.items()):
            if process.poll() is None:
                continue
            del open_stages[stage]
            if process.returncode or not stage.done.exists():
                raise RuntimeError(
                    f"{stage.name} failed (exit code {process.returncode}), see {stage.log}: "
                    + tail(stage.log)
                )
            clock.say(f"{stage.name}: done in {time.monotonic() - begun[stage]:.0f} s")
        if open_stages and time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            line = " | ".join(_progress(stage) for stage in open_stages)
            if line != told:
                clock.say(line)
            told = line


def tail(log: Path, lines: int = 12) -> str:
    """The last lines, each on one of its own."""
    return "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _progress(stage: Stage) -> str:
    """The last row of a training run, or the last line of an evaluation."""
    if not stage.steps:
        lines = [x for x in stage.log.read_text(errors="replace").splitlines() if "records" in x]
        return f"{stage.name}: {lines[-1][:60] if lines else 'starting'}"
    rows = list(_train_rows(stage.workdir / "metrics.jsonl"))
    if not rows:
        return f"{stage.name}: starting (imports and compilation)"
    row, back = rows[-1], rows[-20:][0]
    text = f"{stage.name} {row['step']}/{stage.steps}"
    shown = SHOWN if "reward/mean" not in row else {k: v for k, v in SHOWN.items() if k != "loss"}
    for key, word in shown.items():
        values = [r[key] for r in rows[-10:] if isinstance(r.get(key), float)]
        if values:  # one step of this demo is small: the mean of the last ten is steadier
            text += f"  {word} {sum(values) / len(values):.3f}"
    if row["step"] > back["step"]:
        pace = (row["time"] - back["time"]) / (row["step"] - back["step"])
        left = pace * (stage.steps - row["step"])
        text += f"  {pace:.2f} s/step, {left:.0f} s left"
    return text


def _train_rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for row in read_jsonl(path, skip_broken=True)[-200:]:
        if row.get("split") == "train":
            yield row
