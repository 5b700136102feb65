"""Sends a stage's requests and commits every reply when it arrives."""

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from srpo_jax.data.images import RecordError
from srpo_jax.reflection.settings import Settings
from srpo_jax.reflection.store import Result, Store
from srpo_jax.remote.client import Client
from srpo_jax.remote.protocol import Endpoint, Rejected, Reply, Request, Unavailable

PASSES = 3  # over requests that the server could not answer
REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Task:
    """One request to be made: for which item and try, and how it is built (images and all)."""

    item: int
    trial: int
    build: Callable[[], Request]


Handle = Callable[[Task, Reply], Result]


@dataclass
class Outcome:
    """How a stage's requests went: replies stored, tasks left open, and why it stopped early."""

    replies: int = 0
    left: int = 0
    stopped: str = ""
    errors: Counter = field(default_factory=Counter)


class Progress:
    """Counts of one stage in this command, said aloud every ten seconds."""

    def __init__(self, label: str, total: int, spent: float, say: Callable[[str], None]):
        self.label, self.total, self.say = label, total, say
        self.spent_before, self.cost, self.tokens = spent, 0.0, 0
        self.done = self.good = 0
        self.dearest = 0.0  # USD of one reply
        self.errors: Counter = Counter()
        self.start = self.last = time.monotonic()

    def add(self, result: Result) -> None:
        """Count one stored result."""
        self.done += 1
        self.good += result.ok
        self.cost += result.cost
        self.dearest = max(self.dearest, result.cost)
        self.tokens += result.prompt_tokens + result.completion_tokens

    def line(self) -> str:
        """Items, pace, usable share, tokens, cost so far and forecast, errors by kind."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / seconds
        left = (self.total - self.done) / rate if rate else float("inf")
        parts = [f"{self.label} {self.done}/{self.total}", f"{rate:.1f}/s"]
        if self.done:
            parts.append(f"{duration(left)} left")
            parts.append(f"usable {self.good / self.done:.1%}")
        parts.append(f"{self.tokens:,} tokens")
        if self.cost:
            forecast = self.spent_before + self.cost / self.done * self.total
            parts.append(f"${self.spent_before + self.cost:.2f} of about ${forecast:.2f}")
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
    if seconds == float("inf"):
        return "?"
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

    def run(self, tasks: Iterable[Task], total: int, handle: Handle) -> Outcome:
        """Send the requests of all tasks; see ``Outcome``. Fatal errors are raised."""
        self._spent = self.store.cost()
        self._progress = Progress(self.stage, total, self._spent, self.say)
        return asyncio.run(self._send(tasks, handle))

    async def _send(self, tasks: Iterable[Task], handle: Handle) -> Outcome:
        outcome, retry = Outcome(), []
        with self._signals():
            async with Client(self.endpoint) as client:
                for turn in range(PASSES):
                    retry = await self._pass(client, iter(tasks), handle, outcome)
                    if not retry or self._stop or turn == PASSES - 1:
                        break
                    tasks = retry  # after everything else: the server had time to recover
        outcome.left, outcome.stopped = len(retry), self._stop
        outcome.errors = Counter(self._progress.errors)
        self._progress.tick(force=True)
        return outcome

    async def _pass(
        self, client: Client, tasks: Iterator[Task], handle: Handle, outcome: Outcome
    ) -> list[Task]:
        """Send every task once; returns those the server could not answer."""
        retry: list[Task] = []

        flying = 0

        async def work() -> None:
            nonlocal flying
            # A plain iterator serves all workers: they share one thread.
            while not self._limit(flying, outcome) and (task := next(tasks, None)):
                flying += 1
                try:
                    self._store(await self._answer(client, task, handle), outcome)
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

    async def _answer(self, client: Client, task: Task, handle: Handle) -> Result:
        """The result of one task: what its reply holds, or why there can be none."""
        try:
            # Images are decoded and encoded beside the event loop.
            request = await asyncio.to_thread(task.build)
        except RecordError as error:
            return self._unreadable(task, error)
        try:
            reply = await client.complete(request)
        except Rejected as error:
            return self._refused(task, error)
        return handle(task, reply)

    def _unreadable(self, task: Task, error: RecordError) -> Result:
        data = {"error": str(error)}
        return Result(task.item, self.stage, False, "unreadable record", data, task.trial)

    def _refused(self, task: Task, error: Rejected) -> Result:
        data = {"error": str(error)}
        reason = "refused by the server"
        return Result(task.item, self.stage, False, reason, data, task.trial, cost=error.cost)

    def _store(self, result: Result, outcome: Outcome) -> None:
        self.store.put(result)
        self._progress.add(result)
        outcome.replies += 1

    def _limit(self, flying: int, outcome: Outcome) -> bool:
        """Whether nothing more may be sent while ``flying`` requests are under way; notes why."""
        settings = self.settings
        if not self._stop and settings.budget_usd:
            # What is under way may cost as much as the dearest reply so far.
            expected = self._spent + self._progress.cost + flying * self._progress.dearest
            if expected >= settings.budget_usd:
                self._stop = f"the budget of ${settings.budget_usd:g} is used up"
        if not self._stop and settings.max_items:
            if outcome.replies + flying >= settings.max_items:
                self._stop = f"--max_items={settings.max_items} is reached"
        return bool(self._stop)

    async def _tick(self, client: Client) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._count_errors(client)
            self._progress.tick()

    def _count_errors(self, client: Client) -> None:
        """Bring the stored counts of errors up to the client's."""
        for kind, number in client.errors.items():
            new = number - self._progress.errors[kind]
            if new:
                self.store.count_error(self.stage, kind, new)
                self._progress.errors[kind] = number

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM: send nothing more and wait for what is in flight; twice: at once."""
        loop, caught = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

        def stop(name: str) -> None:
            if self._stop == name:
                for task in asyncio.all_tasks(loop):
                    task.cancel()
            self._stop = name
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
