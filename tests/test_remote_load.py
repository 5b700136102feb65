"""A client under load: its limits, outages and the breaker, what is cancelled and dropped."""

import asyncio

import pytest
from remote_helpers import Sleeps, ask, ask_of, echo, run

from srpo_jax.remote import limits
from srpo_jax.remote.client import Client, Endpoint, Reply, Unavailable
from tests.openai_server import HTTPError, Server


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def test_no_more_requests_are_in_flight_than_allowed():
    with Server(echo, delay=0.02) as server:
        results, errors = run(server, *[ask(str(i)) for i in range(20)], concurrency=3)
    assert [reply.text for reply in results] == [str(i) for i in range(20)]
    assert server.max_pending == 3


def test_requests_and_tokens_per_minute_are_kept():
    with Server(echo) as server:
        sleeps = Sleeps()
        run(server, *[ask(str(i)) for i in range(4)], sleep=sleeps, requests_per_minute=60)
        assert [round(seconds) for seconds in sleeps] == [1, 2, 3]
        sleeps = Sleeps()
        run(server, *[ask_of(950)] * 3, sleep=sleeps, tokens_per_minute=60_000)
        assert [round(seconds) for seconds in sleeps] == [1, 2]


def test_tokens_that_were_not_used_are_given_back():
    usage = {"prompt_tokens": 100, "completion_tokens": 0}
    sleeps = Sleeps()
    with Server(lambda body: {"content": "", "usage": usage}) as server:
        requests = [ask_of(900, max_tokens=100)] * 2
        run(server, *requests, sleep=sleeps, tokens_per_minute=600, concurrency=1)
    assert len(sleeps) == 1
    assert 9 < sleeps[0] <= 10  # 100 tokens at 10 a second, not 1,000


def test_an_outage_pauses_all_and_uses_up_no_retries(monkeypatch):
    monkeypatch.setattr(limits, "FAILURES", 1)

    with Server(echo, faults={"503": 1.0}) as server:
        pauses = []

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(0)
            if seconds > 0.9:  # backoff stays below here: only the breaker sleeps so long
                pauses.append(seconds)
                if len(pauses) == 12:
                    server.faults = None

        requests = [ask(str(i)) for i in range(6)]
        results, errors = run(server, *requests, sleep=sleep, max_retries=4)
    assert [reply.text for reply in results] == [str(i) for i in range(6)]
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300], abs=0.1)
    # What was in flight when the breaker opened, then one probe for each pause but the last.
    assert errors["503"] == 6 + 11


def test_failed_probes_do_not_count_as_tries(monkeypatch):
    monkeypatch.setattr(limits, "FAILURES", 1)

    with Server(echo, faults=["503"] * 4) as server:
        (reply,), _ = run(server, max_retries=3)  # one try, three probes
    assert isinstance(reply, Reply)


def test_requests_that_wait_for_their_pace_when_the_breaker_opens_wait_on(monkeypatch):
    monkeypatch.setattr(limits, "FAILURES", 1)

    sent = []

    async def sleep(seconds: float) -> None:
        if seconds > 5:  # the pace: 10 seconds for each request
            await asyncio.sleep(0.2)
        elif seconds > 0.9:  # the breaker's first pause
            await asyncio.sleep(0.5)
            sent.append(server.requests)
            server.faults = None

    with Server(echo, faults={"503": 1.0}) as server:
        requests = [ask(str(i)) for i in range(4)]
        results, _ = run(server, *requests, sleep=sleep, requests_per_minute=6)
    assert [reply.text for reply in results] == list("0123")
    assert sent == [1]


def test_a_cancelled_probe_leaves_its_turn_to_another_request(monkeypatch):
    monkeypatch.setattr(limits, "FAILURES", 1)

    async def main(server):
        endpoint = Endpoint("m", server.base_url)
        async with Client(endpoint, sleep=Sleeps()) as client:
            probe = asyncio.create_task(client.complete(ask("probe")))
            while not server.kinds["timeout"]:
                await asyncio.sleep(0.005)
            other = asyncio.create_task(client.complete(ask("other")))
            await asyncio.sleep(0.01)
            probe.cancel()
            return await asyncio.wait_for(other, 5)

    with Server(echo, faults=["503", "timeout"]) as server:
        reply = asyncio.run(main(server))
    assert reply.text == "other"


def test_a_request_that_breaks_the_server_does_not_probe_for_ever(monkeypatch):
    monkeypatch.setattr(limits, "FAILURES", 3)

    def answer(body):
        if echo(body) == "poison":
            raise HTTPError(500)
        return "42"

    with Server(answer) as server:
        results, _ = run(server, ask("poison"), ask("good"), concurrency=1)
    assert isinstance(results[0], Unavailable)
    assert results[1].text == "42"


def test_a_cancelled_request_leaves_its_place_to_others():
    async def main(server):
        async with Client(Endpoint("m", server.base_url, concurrency=1)) as client:
            first = asyncio.create_task(client.complete(ask("first")))
            while not server.pending:
                await asyncio.sleep(0.005)
            first.cancel()
            await asyncio.wait([first])
            server.delay = 0
            return await client.complete(ask("second"))

    with Server(echo, delay=60) as server:
        reply = asyncio.run(main(server))
    assert reply.text == "second"


def test_what_waits_is_dropped_and_what_is_sent_goes_on():
    def answer(body):
        if echo(body) == "fail":
            raise HTTPError(429)
        return "42"

    async def main(server):
        endpoint = Endpoint("m", server.base_url)
        async with Client(endpoint, sleep=lambda seconds: asyncio.sleep(3600)) as client:
            tasks = [asyncio.create_task(client.complete(ask("fail"))) for _ in range(3)]
            while client.errors["429"] < 3:
                await asyncio.sleep(0.005)
            tasks += [asyncio.create_task(client.complete(ask(text))) for text in ("fail", "good")]
            while server.pending < 2:
                await asyncio.sleep(0.005)
            client.drop_waiting()
            return await asyncio.gather(*tasks, return_exceptions=True)

    with Server(answer, delay=0.1) as server:
        *dropped, reply = asyncio.run(main(server))
    assert all(isinstance(error, asyncio.CancelledError) for error in dropped)
    assert reply.text == "42"
