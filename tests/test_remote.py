"""``remote.client`` against a real server: retries, errors, limits, and what never shows."""

import asyncio
import json
import logging
import subprocess
import sys
import time
import traceback
import urllib.request
from pathlib import Path

import pytest
from remote_helpers import Sleeps, ask, ask_of, echo, run

from srpo_jax.remote.client import (
    Client,
    Endpoint,
    Fatal,
    Rejected,
    Reply,
    Request,
    Unavailable,
    check_reachable,
)
from srpo_jax.remote.protocol import (
    IMAGE_TOKENS,
    Failure,
    estimate_tokens,
    hide_prompt,
    is_vendor,
    parse_reply,
    request_body,
    scrub,
)
from tests.openai_server import HTTPError, Server, error_body

KEY = "sk-test-0123456789abcdef"
SECRET = "the butler did it with the candlestick in the library"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


# ---- what is sent and what comes back


def test_a_reply_has_text_tokens_and_cost():
    with Server(lambda body: "42") as server:
        (reply,), errors = run(server, ask("x" * 400), price_in=2.0, price_out=10.0)
    assert (reply.text, reply.refusal, reply.finish_reason, reply.model) == ("42", "", "stop", "m")
    assert reply.prompt_tokens > 100
    assert reply.completion_tokens == 1
    assert reply.cost == pytest.approx((2.0 * reply.prompt_tokens + 10.0) / 1e6)
    assert 0 < reply.seconds < 5
    assert server.requests == 1
    assert not errors


def test_the_server_gets_what_was_asked_for_and_nothing_else():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Größe \ud83d?"}, image]}]
    with Server(lambda body: "42") as server:
        server.keep = True
        run(server, Request(messages, 50, 0.0, 7, schema, "verdict"), ask())
    assert server.bodies[0] == {
        "model": "m",
        "messages": messages,
        "max_tokens": 50,
        "temperature": 0.0,
        "seed": 7,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "strict": True, "schema": schema},
        },
    }
    assert set(server.bodies[1]) == {"model", "messages", "max_tokens"}


def test_the_vendors_own_server_gets_the_new_name_of_the_token_limit(monkeypatch):
    body = request_body(Endpoint("m"), ask())
    assert body["max_completion_tokens"] == 50
    assert "max_tokens" not in body
    assert is_vendor(Endpoint("m"))
    assert is_vendor(Endpoint("m", "https://api.openai.com/v1"))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert not is_vendor(Endpoint("m"))


def test_a_refusal_is_a_reply():
    with Server(lambda body: {"refusal": "I cannot help", "content": None}) as server:
        (reply,), _ = run(server)
    assert (reply.text, reply.refusal) == ("", "I cannot help")


@pytest.mark.parametrize(
    "message, text",
    [
        ({"content": None}, ""),
        ({"content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}, "42"),
        ({"content": "a\ud83db"}, "a?b"),  # a lone surrogate, which SQLite could not store
        ({}, ""),
    ],
)
def test_odd_contents_become_plain_text(message, text):
    body = {"choices": [{"message": message, "finish_reason": None}], "usage": None}
    reply = parse_reply(Endpoint("m", price_in=1.0), ask(), body)
    assert reply.text == text
    assert reply.finish_reason == ""
    assert reply.prompt_tokens == estimate_tokens(ask())  # a budget must end the run all the same
    assert reply.cost > 0


@pytest.mark.parametrize(
    "body",
    [
        *(None, [], "text", {}, {"choices": []}, {"choices": None}, {"choices": [{}]}),
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": [{"message": {"content": [{"text": 3}]}}]},
        {"choices": [{"message": {"content": "x"}}], "usage": "none"},
    ],
)
def test_json_that_is_no_completion_is_told_apart(body):
    found = parse_reply(Endpoint("m"), ask(), body)
    assert isinstance(found, Failure)
    assert (found.action, found.server) == ("retry", True)
    assert "not a chat completion" in found.text


def test_tokens_are_estimated_from_bytes_and_images():
    parts = [{"type": "text", "text": "é" * 200}, {"type": "image_url", "image_url": {"url": "x"}}]
    request = Request([{"role": "user", "content": parts}, {"role": "system", "content": ""}], 9)
    assert estimate_tokens(request) == 100 + 8 + IMAGE_TOKENS
    assert estimate_tokens(ask_of(950)) == 950


# ---- transient failures


@pytest.mark.parametrize(
    "kind, counted",
    [
        *((s, s) for s in ("408", "409", "425", "429", "500", "502", "503", "529")),
        ("429_retry_after", "429"),
        ("cut", "cut"),
        ("not_json", "not_json"),
        ("reset", "connection"),
        ("timeout", "timeout"),
    ],
)
def test_a_transient_failure_is_tried_again(kind, counted):
    with Server(echo, faults=["ok", kind, kind]) as server:
        sleeps = Sleeps()
        first, _ = run(server)
        limit = 0.3 if kind == "timeout" else 5.0
        results, errors = run(server, ask("again"), sleep=sleeps, timeout=limit)
    assert results[0].text == "again"
    assert server.requests == 4
    assert errors == {counted: 2}
    assert len(sleeps) == 2
    assert server.repeats == 0


def test_a_server_that_is_not_there_at_the_start_is_fatal_and_named():
    with Server(echo) as server:
        pass
    with pytest.raises(Fatal, match=rf"m: no server at http://127.0.0.1:{server.port} .*refused"):
        run(server)
    with pytest.raises(Fatal, match="no server at https://nowhere.invalid:443"):
        check_reachable(Endpoint("m", "https://nowhere.invalid/v1?key=hunter2", key_env=""))


def test_a_server_behind_a_proxy_is_left_to_the_proxy(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    check_reachable(Endpoint("m", "https://nowhere.invalid/v1"))


def test_a_server_that_went_away_is_unavailable_after_retries():
    server = Server(echo).__enter__()

    async def main():
        endpoint = Endpoint("m", server.base_url, max_retries=2)
        async with Client(endpoint, sleep=Sleeps()) as client:
            assert (await client.complete(ask("here"))).text == "here"
            await asyncio.to_thread(server.__exit__)
            with pytest.raises(Unavailable, match="no connection"):
                await client.complete(ask())
            return client.errors

    assert asyncio.run(main()) == {"connection": 3}


@pytest.mark.parametrize("kind", ["timeout", "drip"])
def test_the_time_limit_holds_for_the_whole_request(kind):
    with Server(echo, faults={kind: 1.0}) as server:
        start = time.monotonic()
        (error,), errors = run(server, timeout=0.2, max_retries=1)
        assert time.monotonic() - start < 3
    assert isinstance(error, Unavailable)
    assert errors == {"timeout": 2}


def test_retry_after_is_waited_for_with_jitter_on_top():
    with Server(echo, faults=["429_retry_after"] * 2, retry_after="7") as server:
        sleeps = Sleeps()
        run(server, sleep=sleeps)
    assert 7.0 < sleeps[0] < 7.5
    assert 7.0 < sleeps[1] < 8.0
    assert sleeps[0] != sleeps[1]


def test_max_retries_bounds_the_tries_of_one_request():
    with Server(echo, faults={"429": 1.0}) as server:
        (error,), errors = run(server, max_retries=3)
    assert isinstance(error, Unavailable)
    assert server.requests == 4
    assert "after 4 tries" in str(error)


def test_an_error_in_a_body_with_status_200_counts_as_that_error():
    answers = [error_body(200, "upstream") | {"error": {"code": 429}}, {"error": "down"}]
    with Server(lambda body: {"raw": answers.pop(0)} if answers else "42") as server:
        (reply,), errors = run(server)
    assert reply.text == "42"
    assert errors == {"429": 1, "502": 1}


def test_every_request_is_answered_once_in_a_storm_of_faults():
    kinds = ("429", "429_retry_after", "500", "503", "cut", "not_json", "reset")
    faults = dict.fromkeys(kinds, 0.05) | {"timeout": 0.01}
    with Server(echo, faults, seed=3) as server:
        requests = [ask(f"item {i}") for i in range(200)]
        # Long enough that a busy machine does not make an answer late, and its request a repeat.
        results, errors = run(server, *requests, timeout=1.0, max_retries=20)
    assert [reply.text for reply in results] == [f"item {i}" for i in range(200)]
    assert server.requests == 200 + sum(errors.values())
    assert set(errors) == {"429", "500", "503", "timeout", "cut", "not_json", "connection"}
    assert server.repeats == 0
    assert len(server.answered) == 200


# ---- refusals of one request, and of all


@pytest.mark.parametrize("status", [400, 413, 414, 422, 431, 451])
def test_a_refused_request_is_not_sent_again(status):
    with Server(echo, faults=[str(status)]) as server:
        (error,), errors = run(server)
    assert isinstance(error, Rejected)
    assert error.kind == str(status)
    assert server.requests == 1
    assert str(error) == f"m: HTTP {status}: injected {status}"


def test_a_filtered_answer_is_rejected_with_its_cost():
    with Server(lambda body: {"content": "", "finish_reason": "content_filter"}) as server:
        (error,), errors = run(server, price_in=1.0)
    assert isinstance(error, Rejected)
    assert error.kind == "content_filter"
    assert error.cost > 0
    assert errors == {"content_filter": 1}
    assert server.requests == 1


@pytest.mark.parametrize(
    "status, code, remedy",
    [
        (401, None, "check the key (environment variable OPENAI_API_KEY)"),
        (402, None, "top up the account"),
        (403, None, "what the key may do"),
        (404, None, "check the model's name"),
        (405, None, "check the base URL"),
        (418, None, "see what the server says"),
        (429, "insufficient_quota", "top up the account"),
        (400, "billing_hard_limit_reached", "see what the server says"),
        (400, "unsupported_parameter", "leave this option out"),
    ],
)
def test_what_every_request_would_meet_is_fatal_with_a_remedy(status, code, remedy):
    def answer(body):
        raise HTTPError(status, "no", code)

    with Server(answer) as server:
        (error,), _ = run(server)
    assert isinstance(error, Fatal)
    assert remedy in str(error)
    assert "\n" not in str(error)
    assert server.requests == 1


@pytest.mark.parametrize("code", ["content_filter", "context_length_exceeded"])
def test_a_code_about_one_prompt_rejects_it_whatever_the_status(code):
    def answer(body):
        raise HTTPError(403, "no", code)

    with Server(answer) as server:
        (error,), _ = run(server)
    assert isinstance(error, Rejected)
    assert error.kind == code


def test_a_missing_key_is_fatal_except_on_this_machine(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(Fatal, match="set the environment variable OPENAI_API_KEY"):
        Client(Endpoint("m"))
    with pytest.raises(Fatal, match="set the environment variable TEACHER"):
        Client(Endpoint("m", "https://example.com/v1", key_env="TEACHER"))
    Client(Endpoint("m", "https://example.com/v1", key_env=""))
    with Server(echo) as server:
        (reply,), _ = run(server)
    assert isinstance(reply, Reply)


@pytest.mark.parametrize(
    "url",
    [
        "hunter2:8000/v1",
        "http://hunter2:port/v1",
        "http://hunter2:99999",
        "ftp://hunter2/v1",
        "http://[hunter2",
        "http://u:hunter2@host/v1",
        "http:",
    ],
)
def test_a_base_url_that_is_none_is_fatal_and_not_shown(url):
    with pytest.raises(Fatal, match="must look like http") as caught:
        Client(Endpoint("m", url))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"concurrency": 0}, {"max_retries": -1}, {"timeout": 0}, {"requests_per_minute": -1}],
)
def test_an_endpoint_refuses_numbers_that_cannot_be(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Endpoint("m", **options)


# ---- what never shows


def test_a_key_given_as_the_name_of_its_variable_is_not_shown():
    with pytest.raises(ValueError, match="not the key itself") as caught:
        Endpoint("m", key_env=KEY)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("bad", ["sk-tést-0123456789", "sk-test 0123456789"])
def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch, bad):
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    with pytest.raises(Fatal, match="OPENAI_API_KEY holds no key") as caught:
        Client(Endpoint("m"))
    assert bad not in str(caught.value)


@pytest.mark.parametrize("value", [KEY, "plain0123key"])
@pytest.mark.parametrize("fault", ["401", "400", "500", "cut", "timeout", "reset", "not_json"])
def test_neither_key_nor_prompt_stands_in_errors_logs_or_counts(monkeypatch, caplog, fault, value):
    def answer(body):
        raise HTTPError(400, f"bad prompt {SECRET!r} of {value}")

    monkeypatch.setenv("OPENAI_API_KEY", value)
    for name in ("openai", "httpx", "httpx2"):  # as OPENAI_LOG=debug sets them
        logging.getLogger(name).setLevel(logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    faults = [] if fault in ("400", "401") else [fault]
    wanted = "sk-another-one" if fault == "401" else None
    with Server(answer, faults=faults, key=wanted) as server:
        (error,), errors = run(server, ask(SECRET), max_retries=0, timeout=0.2)
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(errors) + caplog.text
    assert isinstance(error, (Unavailable, Rejected, Fatal))
    assert value not in shown
    assert "candlestick" not in shown
    assert not [r for r in caplog.records if r.name.startswith(("openai", "http"))]
    assert error.__context__ is None  # its request would hold the key
    assert value not in repr(Client(Endpoint("m")))


def test_the_key_reaches_the_server_without_the_line_end_of_its_file(monkeypatch):
    monkeypatch.setenv("OTHER_KEY", KEY + "\n")
    with Server(echo, key=KEY) as server:
        (reply,), _ = run(server, key_env="OTHER_KEY")
    assert isinstance(reply, Reply)


def test_error_texts_are_one_short_line():
    text = scrub("first\nsecond sk-proj-abc***xyz Bearer abcdefgh " + "long " * 100)
    assert text.startswith("first second [key] [key] long")
    assert len(text) == 300
    assert "\n" not in text


def test_quotes_of_the_prompt_are_cut_out_of_error_texts():
    request = ask(f"Who? {SECRET}. Why?")
    data = "A" * 5000
    text = hide_prompt(f"invalid input: '{SECRET}' at 3, image {data}", request)
    assert text == "invalid input: '...' at 3, image [data]"
    assert hide_prompt("Who? is short", request) == "Who? is short"


# ---- the test server as a program


def test_the_server_outlives_a_client_that_is_killed_in_mid_request(tmp_path):
    port_file = tmp_path / "port"
    command = [sys.executable, "tests/openai_server.py", "--port_file", port_file, "--delay", "0.3"]
    with subprocess.Popen(command, cwd=ROOT) as program:
        try:
            while not port_file.exists():
                time.sleep(0.01)
            url = f"http://127.0.0.1:{port_file.read_text()}"
            client = (
                "import asyncio; from srpo_jax.remote.client import *\n"
                f"c = Client(Endpoint('m', '{url}/v1'))\n"
                "ask = lambda i: c.complete(Request([{'role': 'user', 'content': str(i)}], 9))\n"
                "async def main(): await asyncio.gather(*map(ask, range(8)))\n"
                "asyncio.run(main())\n"
            )
            with subprocess.Popen([sys.executable, "-c", client], cwd=ROOT) as killed:
                while (stats := read_stats(url))["seen"] < 8:
                    time.sleep(0.01)
                killed.kill()
            assert stats["max_pending"] == 8
            body = json.dumps({"model": "m", "messages": []}).encode()
            with urllib.request.urlopen(url + "/v1/chat/completions", body) as reply:
                assert json.load(reply)["choices"][0]["message"]["content"] == "OK"
            assert read_stats(url)["answered"] == 9  # a killed client pays all the same
        finally:
            program.terminate()


def read_stats(url: str) -> dict:
    with urllib.request.urlopen(url + "/stats") as reply:
        return json.load(reply)
