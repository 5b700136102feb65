"""When a request may go out: pace per minute, backoff, Retry-After, circuit breaker.

Nothing here knows HTTP clients. Clock and sleep come from the caller, so that tests take no time;
all of it runs in one event loop.
"""

import asyncio
import contextlib
import email.utils
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]

# A server that asks for more (a quota per day) is asked again after this many seconds.
MAX_RETRY_AFTER = 3600.0
MAX_BACKOFF = 60.0
FAILURES = 8  # of the server, in a row, that open the breaker
FIRST_PAUSE, MAX_PAUSE = 1.0, 300.0  # seconds before a probe


class Pace:
    """Amounts spread evenly over time: at most ``per_minute`` in any minute; 0: unlimited.

    There are no bursts. Each caller reserves the next free moment and sleeps until it comes, so
    that callers go in the order in which they asked.
    """

    def __init__(self, per_minute: float, clock: Clock, sleep: Sleep):
        self._rate = per_minute / 60.0
        self._clock, self._sleep = clock, sleep
        self._free = float("-inf")  # the moment from which nothing is reserved

    async def wait(self, amount: float = 1.0) -> None:
        """Sleep until ``amount`` may be used."""
        if not self._rate:
            return
        now = self._clock()
        start = max(now, self._free)
        self._free = start + amount / self._rate
        if start > now:
            await self._sleep(start - now)

    def correct(self, amount: float) -> None:
        """Reserve ``amount`` more than was estimated (negative: give it back)."""
        if self._rate:
            self._free += amount / self._rate


def backoff(attempt: int) -> float:
    """Seconds before try ``attempt`` + 1 (attempt from 1): uniform in (0, 0.5 * 2^(attempt - 1)).

    The jitter is full, so that requests which failed together do not come back together.
    """
    return random.uniform(0.0, min(MAX_BACKOFF, 0.5 * 2.0 ** min(attempt - 1, 30)))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, from ``retry-after-ms`` or ``retry-after``.

    None where neither header is there or can be read; never below 0 or above ``MAX_RETRY_AFTER``.
    """
    readers: tuple[tuple[str, Callable[[str], float]], ...] = (
        ("retry-after-ms", lambda text: float(text) / 1000.0),
        ("retry-after", float),
        ("retry-after", _seconds_to),
    )
    for name, read in readers:
        with contextlib.suppress(KeyError, ValueError, OverflowError):
            seconds = read(headers[name])
            # A NaN would never end.
            return None if math.isnan(seconds) else min(max(seconds, 0.0), MAX_RETRY_AFTER)
    return None


def _seconds_to(date: str) -> float:
    """Seconds until an HTTP date; ValueError where it is none."""
    moment = email.utils.parsedate_tz(date)
    if moment is None:
        raise ValueError(date)
    return email.utils.mktime_tz(moment) - time.time()


class Breaker:
    """Pauses everything when the server is down.

    ``FAILURES`` server failures in a row, counted over all requests, open it. While it is open,
    ``enter`` blocks; after ``FIRST_PAUSE`` seconds the caller that waits longest goes out as a
    probe, alone. A probe that fails doubles the pause up to ``MAX_PAUSE`` and another caller is the
    next probe; any success closes the breaker and lets all callers go.
    """

    def __init__(self, clock: Clock, sleep: Sleep):
        self._clock, self._sleep = clock, sleep
        self._row = 0  # server failures in a row
        self._pause = 0.0  # seconds; 0 while closed
        self._probe_at = 0.0  # the moment of the next probe
        self._probing = False
        self._queue: deque[asyncio.Future[bool]] = deque()

    @property
    def open(self) -> bool:
        """Whether everything is paused."""
        return self._pause > 0

    async def enter(self) -> bool:
        """Return at once while closed (False); else wait: False once closed, True for a probe.

        A probe must end with ``success``, ``failure`` or ``release``.
        """
        while self.open:
            if self._probing and not await self._line_up():
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
        self._row, self._pause = 0, 0.0
        self._probing = self._probing and not probe
        while self._answer(False):
            pass

    def failure(self, probe: bool = False) -> None:
        """The server failed: 5xx, no answer in time, no connection, a broken body."""
        self._row += 1
        if probe:
            if self.open:
                self._pause_for(min(2 * self._pause, MAX_PAUSE))
            self.release()
        elif not self.open and self._row >= FAILURES:
            self._pause_for(FIRST_PAUSE)

    def _pause_for(self, seconds: float) -> None:
        self._pause, self._probe_at = seconds, self._clock() + seconds

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
