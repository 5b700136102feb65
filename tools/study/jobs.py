"""Jobs that wait for one another, several at a time, each on cores of its own."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.demo.stages import Clock, cores_here, launch, tail

GRACE = 40.0  # seconds for a command to save and end


Run = Callable[[Sequence[str], Path], None]  # ``python ARGUMENTS``, its output into a log


class Stopped(Exception):
    """The time is over; what was begun goes on with the next start."""


class Worker:
    """Runs commands, one after another, on its cores."""

    def __init__(self, cores: list[int], stop: threading.Event):
        self.cores, self._stop = cores, stop

    def __call__(self, arguments: Sequence[str], log: Path) -> None:
        """``python ARGUMENTS``; RuntimeError with the end of the log where it fails, Stopped where
        the time is over (the command is told, and saves)."""
        if self._stop.is_set():
            raise Stopped
        process = launch(arguments, log, self.cores)
        try:
            while process.poll() is None:
                if self._stop.wait(0.2):
                    raise Stopped
        finally:
            if process.poll() is None:
                process.terminate()
                deadline = time.monotonic() + GRACE
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                process.kill()
                process.wait()
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}, see {log}: {tail(log)}")


@dataclass(frozen=True)
class Job:
    """Work that leaves the file ``done``; it waits for the jobs whose files it ``needs``."""

    name: str
    done: Path
    work: Callable[[Run], None]
    needs: tuple[Path, ...] = ()


def run_jobs(jobs: Sequence[Job], workers: int, seconds: float, clock: Clock) -> list[str]:
    """Run what is not done yet, the first that can be run first; what failed, a line each.

    After ``seconds`` no job is begun and those that run are stopped. A job whose needs failed is
    left out.
    """
    stop, lock, failures = threading.Event(), threading.Condition(), []
    todo = [job for job in jobs if not job.done.exists()]
    running: set[Path] = set()
    cores = cores_here()
    shared = len(cores) >= workers

    def next_job() -> Job | None:
        with lock:
            while todo and not stop.is_set():
                ready = (job for job in todo if all(path.exists() for path in job.needs))
                if job := next(ready, None):
                    todo.remove(job)
                    running.add(job.done)
                    return job
                if not running:
                    return None  # what is left waits for what has failed
                lock.wait(1.0)
            return None

    def serve(own: list[int]) -> None:
        worker = Worker(own, stop)
        while job := next_job():
            begun = clock.seconds()
            clock.say(f"{job.name}: started")
            try:
                job.work(worker)
                clock.say(f"{job.name}: done in {clock.seconds() - begun:.0f} s")
            except Stopped:
                clock.say(f"{job.name}: stopped")
            except Exception as error:
                failures.append(f"{job.name}: {error}")
                clock.say(f"{job.name}: failed: {error}")
            with lock:
                running.discard(job.done)
                lock.notify_all()

    shares = [cores[i::workers] if shared else cores for i in range(workers)]
    threads = [threading.Thread(target=serve, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            if clock.seconds() > seconds:
                stop.set()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return failures
