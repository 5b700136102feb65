"""Pace, backoff, Retry-After and the circuit breaker, in virtual time."""

import asyncio
import random

import pytest

from srpo_jax.remote import limits
from srpo_jax.remote.limits import MAX_RETRY_AFTER, Breaker, Pace, backoff, retry_after


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        select = self._selector.select

        def jump(timeout):
            if timeout is None:
                raise AssertionError("every task waits and no timer runs")
            self.now += timeout
            return select(0)

        self._selector.select = jump

    def time(self) -> float:
        return self.now


def run(main):
    """Run ``main(clock)`` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main(runner.get_loop().time))


# ---- pace


def test_callers_go_out_evenly_and_in_order():
    async def main(clock):
        pace, log = Pace(60, clock, asyncio.sleep), []

        async def caller(name):
            await pace.wait()
            log.append((name, clock()))

        await asyncio.gather(*(caller(name) for name in range(4)))
        return log

    assert run(main) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_no_minute_holds_more_than_the_limit():
    async def main(clock):
        pace, times, rng = Pace(30, clock, asyncio.sleep), [], random.Random(0)

        async def caller(delay):
            await asyncio.sleep(delay)
            await pace.wait()
            times.append(clock())

        await asyncio.gather(*(caller(rng.choice([0, 50, 55, 59, 200])) for _ in range(120)))
        return sorted(times)

    times = run(main)
    assert max(sum(t <= other < t + 59.999 for other in times) for t in times) == 30
    assert times[-1] < 200 + 120 * 2


def test_a_large_amount_waits_for_its_share_of_time():
    async def main(clock):
        pace = Pace(600, clock, asyncio.sleep)
        await pace.wait(100)
        await pace.wait(1)
        return clock()

    assert run(main) == pytest.approx(10.0)


def test_a_correction_moves_the_next_free_moment():
    async def main(clock):
        pace = Pace(600, clock, asyncio.sleep)
        await pace.wait(100)
        pace.correct(-70)
        pace.correct(20)
        await pace.wait()
        return clock()

    assert run(main) == pytest.approx(5.0)


def test_no_limit_never_sleeps():
    async def main(clock):
        pace = Pace(0, clock, asyncio.sleep)
        for _ in range(1000):
            await pace.wait(1e9)
        return clock()

    assert run(main) == 0.0


# ---- backoff and Retry-After


@pytest.mark.parametrize("attempt, limit", [(1, 0.5), (2, 1.0), (4, 4.0), (8, 60.0), (2000, 60.0)])
def test_backoff_is_spread_over_the_whole_range(attempt, limit):
    random.seed(0)
    waits = [backoff(attempt) for _ in range(2000)]
    assert min(waits) < 0.02 * limit
    assert max(waits) > 0.98 * limit
    assert max(waits) <= limit
    assert sum(waits) / 2000 == pytest.approx(limit / 2, rel=0.05)


NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, 30.0),
        ({"retry-after": "Tue, 14 Nov 2023 23:13:50 +0100"}, 30.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:50 -0000"}, 30.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "86400"}, MAX_RETRY_AFTER),
        ({"retry-after": "inf"}, MAX_RETRY_AFTER),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({"retry-after": "99 Foo 2023 99:99:99 GMT"}, None),
        ({"retry-after": ""}, None),
    ],
)
def test_retry_after_is_read_in_every_form(monkeypatch, headers, seconds):
    monkeypatch.setattr("time.time", lambda: NOW)
    assert retry_after(headers) == seconds


# ---- breaker


@pytest.fixture(autouse=True)
def three_failures(monkeypatch):
    monkeypatch.setattr(limits, "FAILURES", 3)


def opened(clock):
    breaker = Breaker(clock, asyncio.sleep)
    for _ in range(3):
        breaker.failure()
    return breaker


def test_only_failures_in_a_row_open_the_breaker():
    async def main(clock):
        breaker = Breaker(clock, asyncio.sleep)
        states = []
        for failed in (1, 1, 0, 1, 1, 1):
            breaker.failure() if failed else breaker.success()
            states.append(breaker.open)
        return states

    assert run(main) == [False, False, False, False, False, True]


def test_probes_go_alone_with_growing_pauses_until_one_succeeds(monkeypatch):
    monkeypatch.setattr(limits, "MAX_PAUSE", 5.0)

    async def main(clock):
        breaker, log, inside = opened(clock), [], 0

        async def caller(name):
            nonlocal inside
            while await breaker.enter():
                inside += 1
                log.append((name, clock(), inside))
                await asyncio.sleep(0.5)  # the request
                inside -= 1
                if clock() > 20:
                    breaker.success(probe=True)
                    return
                breaker.failure(probe=True)
            log.append((name, clock(), "free"))

        await asyncio.gather(*(caller(name) for name in "abc"))
        return log, breaker.open

    log, still_open = run(main)
    probes = [(name, at, inside) for name, at, inside in log if inside != "free"]
    assert [at for _, at, _ in probes] == [1.0, 3.5, 8.0, 13.5, 19.0, 24.5]
    assert [name for name, _, _ in probes] == list("abcabc")
    assert {inside for _, _, inside in probes} == {1}
    assert log[6:] == [("a", 25.0, "free"), ("b", 25.0, "free")]
    assert not still_open


def test_a_late_success_ends_the_pause_for_all_in_the_queue(monkeypatch):
    monkeypatch.setattr(limits, "FIRST_PAUSE", 100.0)

    async def main(clock):
        breaker, log = opened(clock), []

        async def caller(name):
            log.append((name, await breaker.enter(), clock()))

        async def late():
            await asyncio.sleep(2.0)
            breaker.success()

        await asyncio.gather(caller("a"), caller("b"), caller("c"), late())
        return log

    log = run(main)
    assert log[:2] == [("b", False, 2.0), ("c", False, 2.0)]
    assert log[2][1] is False


def test_late_failures_do_not_lengthen_the_pause():
    async def main(clock):
        breaker = opened(clock)
        await asyncio.sleep(0.5)
        for _ in range(20):
            breaker.failure()
        return await breaker.enter(), clock()

    assert run(main) == (True, 1.0)


@pytest.mark.parametrize("victim", ["sleeping probe", "waiting in line", "probe in flight"])
def test_a_cancelled_caller_leaves_the_turn_to_the_next(victim):
    async def main(clock):
        breaker, log = opened(clock), []

        async def caller(name):
            probe = await breaker.enter()
            log.append((name, probe))
            try:
                await asyncio.sleep(1.0)
            except asyncio.CancelledError:
                breaker.release()
                raise
            breaker.success(probe)

        tasks = [asyncio.create_task(caller(name)) for name in "abc"]
        await asyncio.sleep(1.5 if victim == "probe in flight" else 0.5)
        tasks["waiting in line" == victim].cancel()
        await asyncio.wait(tasks)
        return log, breaker.open

    log, still_open = run(main)
    expected = {
        "sleeping probe": [("b", True), ("c", False)],
        "waiting in line": [("a", True), ("c", False)],
        "probe in flight": [("a", True), ("b", True), ("c", False)],
    }
    assert log == expected[victim]
    assert not still_open


def test_a_turn_that_comes_as_its_caller_is_cancelled_is_handed_on():
    async def main(clock):
        breaker = opened(clock)
        first = asyncio.create_task(breaker.enter())
        second = asyncio.create_task(breaker.enter())
        third = asyncio.create_task(breaker.enter())
        await first
        breaker.failure(probe=True)  # the turn is the second's
        second.cancel()
        await asyncio.wait([second, third])
        return second.cancelled(), third.result()

    assert run(main) == (True, True)
