"""When a request may go out: pace per minute, backoff, Retry-After, circuit breaker.

Nothing here knows HTTP clients. Clock, sleep and random source come from the caller, so that tests
take no time; all of it runs in one event loop.
"""

import asyncio
import email.utils
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]

# A server that asks for more (a quota per day) is asked again after this many seconds.
MAX_RETRY_AFTER = 3600.0


class Pace:
    """Amounts spread evenly over time: at most ``per_minute`` in any minute; 0: unlimited.

    There are no bursts. Each caller reserves the next free moment and sleeps until it comes, so
    that callers go in the order in which they asked.
    """

    def __init__(self, per_minute: float, clock: Clock, sleep: Sleep):
        self.rate = per_minute / 60.0
        self._clock, self._sleep = clock, sleep
        self._free = float("-inf")  # the moment from which nothing is reserved

    async def wait(self, amount: float = 1.0) -> None:
        """Sleep until ``amount`` may be used."""
        if not self.rate:
            return
        now = self._clock()
        start = max(now, self._free)
        self._free = start + amount / self.rate
        if start > now:
            await self._sleep(start - now)

    def correct(self, amount: float) -> None:
        """Reserve ``amount`` more than was estimated (negative: give it back)."""
        if self.rate:
            self._free += amount / self.rate


def backoff(attempt: int, rng: random.Random, base: float = 0.5, cap: float = 60.0) -> float:
    """Seconds before try ``attempt`` + 1 (attempt from 1): uniform in (0, base * 2^(attempt - 1)).

    The jitter is full, so that requests which failed together do not come back together.
    """
    return rng.uniform(0.0, min(cap, base * 2.0 ** min(attempt - 1, 30)))


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that the server asks to wait, from ``retry-after-ms`` or ``retry-after``.

    ``now`` is the wall clock in seconds since 1970, for a header that holds a date. None where
    neither header is there or can be read; never below 0 or above ``MAX_RETRY_AFTER``.
    """
    milliseconds, text = headers.get("retry-after-ms"), headers.get("retry-after")
    seconds = _number(milliseconds)
    if seconds is not None:
        seconds /= 1000.0
    elif text is not None:
        seconds = _number(text)
        if seconds is None:
            seconds = _seconds_to(text, time.time() if now is None else now)
    if seconds is None or seconds != seconds:  # a NaN would never end
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _seconds_to(date: str, now: float) -> float | None:
    """Seconds from ``now`` to an HTTP date; None where it is not one."""
    try:
        moment = email.utils.parsedate_to_datetime(date)
        if moment.tzinfo is None:  # "-0000": UTC, says the RFC
            moment = moment.replace(tzinfo=UTC)
        return moment.timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return None


class Breaker:
    """Pauses everything when the server is down.

    ``failures`` server failures in a row, counted over all requests, open it. While it is open,
    ``enter`` blocks; after ``first_pause`` seconds the caller that waits longest goes out as a
    probe, alone. A probe that fails doubles the pause up to ``max_pause`` and another caller is the
    next probe; any success closes the breaker and lets all callers go.
    """

    def __init__(
        self,
        clock: Clock,
        sleep: Sleep,
        failures: int = 8,
        first_pause: float = 1.0,
        max_pause: float = 300.0,
    ):
        self.failures, self.first_pause, self.max_pause = failures, first_pause, max_pause
        self._clock, self._sleep = clock, sleep
        self._row = 0  # server failures in a row
        self._pause = 0.0  # seconds; 0 while closed
        self._probe_at = 0.0  # the moment of the next probe
        self._opened = 0.0
        self._paused = 0.0  # seconds of all pauses that have ended
        self._probing = False
        self._queue: deque[asyncio.Future] = deque()

    @property
    def open(self) -> bool:
        """Whether everything is paused."""
        return self._pause > 0

    @property
    def paused_seconds(self) -> float:
        """Seconds spent open so far."""
        return self._paused + (self._clock() - self._opened if self.open else 0.0)

    async def enter(self) -> bool:
        """Return at once while closed (False); else wait: False once closed, True for a probe.

        A probe must end with ``success``, ``failure`` or ``release``.
        """
        while self.open:
            if self._probing:
                if not await self._line_up():
                    continue
            self._probing = True
            try:
                wait = self._probe_at - self._clock()
                if self.open and wait > 0:
                    await self._sleep(wait)
            except BaseException:
                self.release()
                raise
            if self.open:
                return True
            self.release()  # a request sent before the pause came back well
        return False

    async def _line_up(self) -> bool:
        """Wait for one's turn to be the probe (True) or for the end of the pause (False)."""
        ticket = asyncio.get_running_loop().create_future()
        self._queue.append(ticket)
        try:
            return await ticket
        except BaseException:  # cancelled: hand on a turn that has just come
            if ticket in self._queue:
                self._queue.remove(ticket)
            elif not ticket.cancelled() and ticket.result():
                self.release()
            raise

    def success(self, probe: bool = False) -> None:
        """The server gave an answer."""
        self._row = 0
        if probe:
            self._probing = False
        if self.open:
            self._paused += self._clock() - self._opened
            self._pause = 0.0
        while self._queue:
            self._answer(False)

    def failure(self, probe: bool = False) -> None:
        """The server failed: 5xx, no answer in time, no connection, a broken body."""
        self._row += 1
        if probe:
            if self.open:
                self._pause = min(2 * self._pause, self.max_pause)
                self._probe_at = self._clock() + self._pause
            self.release()
        elif not self.open and self._row >= self.failures:
            self._opened = self._clock()
            self._pause = self.first_pause
            self._probe_at = self._opened + self._pause

    def release(self) -> None:
        """The probe gives its turn up: to the caller that waits longest, if any."""
        # The turn goes over by hand, for the one that gives it up may ask again before the next
        # caller runs, and the same request would be every probe.
        self._probing = self._answer(True)

    def _answer(self, turn: bool) -> bool:
        """Tell the first in the queue; False where nobody waits."""
        while self._queue:
            ticket = self._queue.popleft()
            if not ticket.done():
                ticket.set_result(turn)
                return True
        return False
