"""Requests to a server of the tests, in no time between tries."""

import asyncio

from srpo_jax.remote.client import Client, Endpoint, Request
from tests.openai_server import Server


class Sleeps(list):
    """A ``sleep`` that takes no time and remembers what it was asked for."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)
        await asyncio.sleep(0)


def ask(text: str = "What is 6 times 7?", **options) -> Request:
    return Request([{"role": "user", "content": text}], **{"max_tokens": 50} | options)


def ask_of(tokens: int, **options) -> Request:
    """A request of so many prompt tokens, as they are estimated."""
    return ask("x" * 4 * (tokens - 4), **options)


def echo(body: dict) -> str:
    return body["messages"][-1]["content"]


def run(server: Server, *requests: Request, sleep=None, **options):
    """(results or errors of the requests, the client's counts of errors)."""

    async def main():
        endpoint = Endpoint("m", server.base_url, **{"timeout": 5.0} | options)
        async with Client(endpoint, sleep=Sleeps() if sleep is None else sleep) as client:
            todo = [client.complete(request) for request in requests or [ask()]]
            return await asyncio.gather(*todo, return_exceptions=True), client.errors

    return asyncio.run(main())
