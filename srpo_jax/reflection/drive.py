"""Sends a stage's requests and commits every reply when it arrives."""

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from srpo_jax.data.errors import RecordError
from srpo_jax.reflection.settings import Settings
from srpo_jax.reflection.store import Result, Store
from srpo_jax.remote.client import Client, Connection
from srpo_jax.remote.protocol import Endpoint, Rejected, Reply, Request, Unavailable

PASSES = 3  # over requests that the server could not answer
REPORT_SECONDS = 10.0
UNREADABLE = "unreadable record"


@dataclass(frozen=True)
class Task:
    """One request to be made: for which item and try, and how it is built (images and all)."""

    item: int
    trial: int
    build: Callable[[], Request]


# A reply -> why it is not usable ("" where it is), and what is kept of it.
Handle = Callable[[Reply], tuple[str, dict[str, Any]]]


class Incomplete(RuntimeError):
    """A stage that stopped before its end; everything that arrived is kept."""


class Progress:
    """Counts of one stage in this command, said aloud every ten seconds."""

    def __init__(self, label: str, total: int, spent: float, say: Callable[[str], None]):
        self.label, self.total, self.say = label, total, say
        self.spent_before, self.cost, self.tokens = spent, 0.0, 0
        self.done = self.good = 0
        self.dearest = 0.0  # USD of one reply
        self.errors: Counter[str] = Counter()
        self.start = self.last = time.monotonic()

    @property
    def spent(self) -> float:
        """USD so far, of earlier commands too."""
        return self.spent_before + self.cost

    def add(self, *results: Result) -> None:
        """Count stored results."""
        self.done += len(results)
        for result in results:
            self.good += result.ok
            self.cost += result.cost
            self.dearest = max(self.dearest, result.cost)
            self.tokens += result.prompt_tokens + result.completion_tokens

    def line(self) -> str:
        """Items, pace, usable share, tokens, cost so far and forecast, errors by kind."""
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        parts = [f"{self.label} {self.done}/{self.total}", f"{rate:.1f}/s"]
        if self.done:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
            parts.append(f"usable {self.good / self.done:.1%}")
        parts.append(f"{self.tokens:,} tokens")
        if self.cost:
            forecast = self.spent_before + self.cost / self.done * self.total
            parts.append(f"${self.spent:.2f} of about ${forecast:.2f}")
        if self.errors:
            parts.append(", ".join(f"{kind} {n}" for kind, n in sorted(self.errors.items())))
        return "  ".join(parts)

    def tick(self, force: bool = False) -> None:
        """Say the line if it is time."""
        now = time.monotonic()
        if force or now - self.last >= REPORT_SECONDS:
            self.last = now
            self.say(self.line())


def duration(seconds: float) -> str:
    """Seconds as 3h12m, 4m07s or 9s."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    )


class Driver:
    """Runs the requests of one stage against one endpoint within the limits of ``settings``."""

    def __init__(
        self,
        store: Store,
        stage: str,
        endpoint: Endpoint,
        settings: Settings,
        say: Callable[[str], None],
    ):
        self.store, self.stage, self.endpoint, self.settings = store, stage, endpoint, settings
        self.say = say
        self._stop = ""

    def run(self, tasks: Iterable[Task], total: int, handle: Handle) -> None:
        """Send the requests of all tasks; Incomplete where some are left. Raises Fatal."""
        self._handle = handle
        self._progress = Progress(self.stage, total, self.store.cost(), self.say)
        try:
            left = asyncio.run(self._send(tasks))
        except asyncio.CancelledError:  # a signal; everything that arrived is stored
            left = 0
        self._progress.tick(force=True)
        if self._stop:
            raise Incomplete(
                f"{self.stage} stopped: {self._stop}; the same command goes on with it"
            )
        if left:
            raise Incomplete(
                f"{self.stage}: {left} requests could not be answered by {self.endpoint.model} "
                f"({dict(self._progress.errors)}); the same command tries them again"
            )

    async def _send(self, tasks: Iterable[Task]) -> int:
        """Send every task; returns how many could not be answered."""
        async with Client(self.endpoint) as client:
            with self._signals(client):
                left = await self._pass(client, iter(tasks))
                for _ in range(PASSES - 1):
                    if left and not self._stop:  # the server had time to recover
                        left = await self._pass(client, iter(left))
        return len(left)

    async def _pass(self, client: Client, tasks: Iterator[Task]) -> list[Task]:
        """Send every task once; returns those the server could not answer."""
        retry: list[Task] = []
        flying = 0

        async def work() -> None:
            nonlocal flying
            # A plain iterator serves all workers: they share one thread.
            while not self._limit(flying) and (task := next(tasks, None)):
                flying += 1
                try:
                    # Images are decoded and encoded beside the event loop.
                    request = await asyncio.to_thread(task.build)
                    self._store(task, await client.complete(request))
                except (RecordError, Rejected) as error:
                    self._store(task, error)
                except Unavailable:
                    retry.append(task)
                finally:
                    flying -= 1

        ticker = asyncio.create_task(self._tick(client))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.endpoint.concurrency):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one line is enough: the others say the same
        finally:
            ticker.cancel()
            self._count_errors(client)
        return retry

    def _store(self, task: Task, found: Reply | Rejected | RecordError) -> None:
        """Commit what a reply holds, or why there is none."""
        if isinstance(found, Reply):
            reason, data = self._handle(found)
            data = {"model": found.model, **data}
            costs = found.prompt_tokens, found.completion_tokens, found.cost
        else:
            refused = isinstance(found, Rejected)
            reason = "refused by the server" if refused else UNREADABLE
            data = {"error": str(found)}
            costs = 0, 0, found.cost if refused else 0.0
        result = Result(task.item, self.stage, reason, data, task.trial, *costs)
        self.store.put(result)
        self._progress.add(result)

    def _limit(self, flying: int) -> bool:
        """Whether nothing more may be sent while ``flying`` requests are under way; notes why."""
        settings = self.settings
        if not self._stop and settings.budget_usd:
            # What is under way may cost as much as the dearest reply so far.
            if self._progress.spent + flying * self._progress.dearest >= settings.budget_usd:
                self._stop = f"the budget of ${settings.budget_usd:g} is used up"
        if not self._stop and settings.max_items:
            if self._progress.done + flying >= settings.max_items:
                self._stop = f"--max_items={settings.max_items} is reached"
        return bool(self._stop)

    async def _tick(self, client: Client) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._count_errors(client)
            self._progress.tick()

    def _count_errors(self, client: Client) -> None:
        """Bring the stored counts of errors up to the client's."""
        for kind, number in (client.errors - self._progress.errors).items():
            self.store.count_error(self.stage, kind, number)
        self._progress.errors = client.errors.copy()

    @contextlib.contextmanager
    def _signals(self, client: Connection) -> Iterator[None]:
        """SIGINT and SIGTERM: send nothing more and wait for what is in flight; twice: at once.

        What only waits to be sent again is dropped the first time.
        """
        loop, caught = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

        def stop(name: str) -> None:
            if self._stop == name:
                for task in asyncio.all_tasks(loop):
                    task.cancel()
            self._stop = name
            client.drop_waiting()
            self.say(f"{name}: waiting for the requests in flight; once more to drop them")

        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: no handlers
            for number in caught:
                loop.add_signal_handler(number, stop, signal.Signals(number).name)
        try:
            yield
        finally:
            for number in caught:
                with contextlib.suppress(ValueError, RuntimeError):
                    loop.remove_signal_handler(number)
