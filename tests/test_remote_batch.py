"""``remote.batch`` against the test server: killed runs, faults, every kind of result."""

import asyncio
import json

import pytest

from srpo_jax.remote import batch as batch_module
from srpo_jax.remote.batch import BatchClient, BatchStatus
from srpo_jax.remote.client import Endpoint, Fatal, Rejected, Reply, Request, Unavailable
from tests.openai_server import HTTPError, Server

KEY = "sk-test-0123456789abcdef"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


class Time:
    """A clock that only its own ``sleep`` moves."""

    def __init__(self):
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def asks(*names: str) -> dict[str, Request]:
    return {name: Request([{"role": "user", "content": name}], 50) for name in names}


def echo(body: dict) -> str:
    return body["messages"][-1]["content"].upper()


def run(server, main, patience=1e9, **options):
    """``main(client, clock)`` with a client whose waits take no time."""

    async def start():
        time = Time()
        endpoint = Endpoint("m", server.base_url, **{"timeout": 5.0} | options)
        waits = {"clock": time.clock, "sleep": time.sleep}
        async with BatchClient(endpoint, patience=patience, **waits) as client:
            return await main(client, time.clock)

    return asyncio.run(start())


async def everything(client, requests, key="k"):
    """Submit, poll until done and collect."""
    name = await client.submit(requests, key)
    while not (status := await client.poll(name)).done:
        pass
    return status, [pair async for pair in client.collect(name)]


def test_a_batch_goes_all_the_way():
    with Server(echo, polls=2) as server:

        async def main(client, clock):
            name = await client.submit(asks("a", "b"), "run-1")
            states = [await client.poll(name) for _ in range(3)]
            return states, [pair async for pair in client.collect(name)]

        states, pairs = run(server, main, price_in=2.0, price_out=10.0)
    assert states[:2] == [BatchStatus("in_progress", 0)] * 2
    assert states[2] == BatchStatus("completed", 2)
    assert [state.done for state in states] == [False, False, True]
    assert [(name, reply.text) for name, reply in pairs] == [("a", "A"), ("b", "B")]
    assert all(
        reply.cost == pytest.approx((2 * reply.prompt_tokens + 10 * reply.completion_tokens) / 1e6)
        for _, reply in pairs
    )
    assert all(reply.cost > 0 for _, reply in pairs)


def test_the_file_holds_each_request_as_a_line():
    with Server(echo) as server:
        requests = asks("a")
        requests["b"] = Request([{"role": "user", "content": "é"}], 9, 0.5, 3, {"type": "object"})
        run(server, lambda client, clock: client.submit(requests, "run-1"))
    rows = [json.loads(line) for line in server.files["file-0"].splitlines()]
    assert [row["custom_id"] for row in rows] == ["a", "b"]
    assert {(row["method"], row["url"]) for row in rows} == {("POST", "/v1/chat/completions")}
    assert rows[0]["body"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 50,
    }
    assert rows[1]["body"]["seed"] == 3
    assert rows[1]["body"]["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert server.batches["batch_0"]["metadata"] == {"key": "run-1"}


# ---- killed runs


def test_a_batch_that_a_killed_run_made_is_found_and_not_made_again():
    with Server(echo) as server:
        first = run(server, lambda client, clock: client.submit(asks("a"), "run-1"))
        other = run(server, lambda client, clock: client.submit(asks("b"), "run-2"))
        assert run(server, lambda client, clock: client.find("run-1")) == first
        assert run(server, lambda client, clock: client.submit(asks("a"), "run-1")) == first
        assert run(server, lambda client, clock: client.find("run-3")) is None
    assert first != other
    assert len(server.batches) == 2


def test_a_batch_is_found_on_a_later_page():
    with Server(echo) as server:
        first = run(server, lambda client, clock: client.submit(asks("a"), "old"))
        for number in range(250):
            row = server.batches[first] | {"id": f"x{number}", "metadata": None}
            server.batches[row["id"]] = row
        assert run(server, lambda client, clock: client.find("old")) == first
        assert run(server, lambda client, clock: client.find("none")) is None


def test_a_batch_whose_confirmation_was_lost_is_not_made_twice():
    with Server(echo) as server:
        make = server._new_batch

        def make_and_lose(request):
            make(request)
            raise HTTPError(504, "gateway timeout")

        server._new_batch = make_and_lose
        name = run(server, lambda client, clock: client.submit(asks("a"), "run-1"))
    assert list(server.batches) == [name]


# ---- faults


@pytest.mark.parametrize("kind", ["429_retry_after", "503", "cut", "not_json", "reset", "timeout"])
@pytest.mark.parametrize("step", range(6))
def test_every_step_survives_a_transient_failure(kind, step):
    # list, upload, create, poll, look up, download
    with Server(echo, faults=[*["ok"] * step, kind], polls=0) as server:
        limit = 0.3 if kind == "timeout" else 5.0
        status, pairs = run(
            server, lambda client, clock: everything(client, asks("a", "b")), timeout=limit
        )
    assert server.kinds[kind] == 1
    assert status.status == "completed"
    assert [reply.text for _, reply in pairs] == ["A", "B"]
    assert len(server.batches) == 1


def test_an_outage_is_waited_out_and_then_given_up():
    async def main(client, clock):
        with pytest.raises(Unavailable, match="HTTP 503"):
            await client.poll("batch_0")
        return clock()

    with Server(echo, faults={"503": 1.0}) as server:
        waited = run(server, main, patience=3600.0)
    assert 3600 < waited < 3700
    assert 100 < server.requests < 200


def test_what_every_request_would_meet_stops_the_run():
    with Server(echo, key="sk-another") as server:
        with pytest.raises(Fatal, match="check the key") as caught:
            run(server, lambda client, clock: client.submit(asks("a"), "k"))
    assert KEY not in str(caught.value)
    assert server.requests == 1


def test_a_batch_that_is_refused_is_not_sent_again():
    with Server(echo, faults=["ok", "ok", "400"]) as server:
        with pytest.raises(Rejected, match="HTTP 400"):
            run(server, lambda client, clock: client.submit(asks("a"), "k"))
    assert server.requests == 3


def test_a_failed_batch_says_why_without_quoting_its_lines():
    with Server(echo) as server:
        name = run(server, lambda client, clock: client.submit(asks("a"), "k"))
        errors = [{"code": "token_limit_exceeded", "message": "line 'a' is long", "line": 1}]
        server.batches[name] |= {"status": "failed", "errors": {"data": errors}}
        status = run(server, lambda client, clock: client.poll(name))
    assert status == BatchStatus("failed", 0, "token_limit_exceeded")
    assert status.done


def test_a_batch_that_goes_on_cannot_be_collected():
    async def main(client, clock):
        name = await client.submit(asks("a"), "k")
        return [pair async for pair in client.collect(name)]

    with Server(echo) as server, pytest.raises(ValueError, match="poll until it is done"):
        run(server, main)


# ---- results


def picky(body: dict):
    """Answers by the name of the request."""
    match body["messages"][-1]["content"]:
        case "refused":
            raise HTTPError(400, "bad image in 'refused by me'")
        case "busy":
            raise HTTPError(500)
        case "filtered":
            return {"content": "", "finish_reason": "content_filter"}
        case "odd":
            return {"raw": {"choices": []}}
        case "poor":
            raise HTTPError(429, "pay", "insufficient_quota")
        case "refusal":
            return {"refusal": "no", "content": None}
    return "fine"


def test_every_kind_of_result_is_told_apart():
    names = ("good", "refused", "busy", "filtered", "odd", "refusal", "late", "later")
    with Server(picky, unfinished=2) as server:
        status, pairs = run(
            server, lambda client, clock: everything(client, asks(*names)), price_in=1.0
        )
    results = dict(pairs)
    assert status.status == "expired"
    assert len(pairs) == len(names)
    assert set(results) == set(names)
    assert results["good"].text == "fine"
    assert results["refusal"].refusal == "no"
    kinds = {name: type(result) for name, result in results.items()}
    assert kinds == {
        "good": Reply,
        "refusal": Reply,
        "refused": Rejected,
        "filtered": Rejected,
        "busy": Unavailable,
        "odd": Unavailable,
        "late": Unavailable,
        "later": Unavailable,
    }
    assert results["filtered"].kind == "content_filter"
    assert results["filtered"].cost > 0
    assert str(results["refused"]) == "m: HTTP 400"  # the server's words may quote the prompt
    assert str(results["late"]) == "m: batch_expired"


def test_good_results_come_before_the_error_that_ends_the_run():
    got = []

    async def main(client, clock):
        name = await client.submit(asks("good", "poor", "refused"), "k")
        while not (await client.poll(name)).done:
            pass
        async for pair in client.collect(name):
            got.append(pair[0])

    with Server(picky) as server, pytest.raises(Fatal, match="top up the account"):
        run(server, main)
    assert got == ["good", "refused"]


def test_lines_that_cannot_be_read_and_repeated_ids_are_passed_over():
    async def main(client, clock):
        name = await client.submit(asks("a", "b"), "k")
        while not (await client.poll(name)).done:
            pass
        output = server.batches[name]["output_file_id"]
        lines = server.files[output].splitlines(keepends=True)
        server.files[output] = lines[0] + b'{"custom_id"\n{}\n' + lines[0] + lines[1]
        return [pair async for pair in client.collect(name)]

    with Server(echo) as server:
        pairs = run(server, main)
    assert [(name, reply.text) for name, reply in pairs] == [("a", "A"), ("b", "B")]


# ---- sizes


@pytest.mark.parametrize("limit, value", [("MAX_REQUESTS", 2), ("MAX_BYTES", 300)])
def test_more_than_the_vendor_takes_is_refused_before_anything_is_sent(monkeypatch, limit, value):
    monkeypatch.setattr(batch_module, limit, value)
    with Server(echo) as server, pytest.raises(ValueError, match="make smaller batches"):
        run(server, lambda client, clock: client.submit(asks("a", "b", "c"), "k"))
    assert not server.files


def test_an_empty_batch_is_refused():
    with Server(echo) as server, pytest.raises(ValueError, match="a batch of 0 requests"):
        run(server, lambda client, clock: client.submit({}, "k"))
