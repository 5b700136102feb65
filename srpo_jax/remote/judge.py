"""A language model as a judge: replies by schema, nonsense asked for again, all of them kept.

    judge = Judge(Endpoint("gpt-x"), "scores.judge.sqlite")
    results = judge.map(function, items)      # function(ask, item) is a coroutine
    ... await ask("score", {"prompt": ...}, ("score",), float)

Every reply is kept (``cache``), also the useless ones, so that a second run asks nothing.
A reply that does not hold what was asked for is nonsense: it is asked for again, ``TRIES`` times in
all, with other seeds and rising temperature; after that, and where the server refuses the request
or stays unavailable, there is no judgement, which the caller must count apart.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from srpo_jax.remote.cache import JudgeCache, request_key
from srpo_jax.remote.protocol import Endpoint, Fatal, Rejected, Reply, Request, Unavailable
from srpo_jax.remote.replies import BadReply, object_schema, reply_fields

if TYPE_CHECKING:
    from srpo_jax.remote.client import Client

Ask = Callable[..., Awaitable[dict[str, Any]]]  # `_Asking.ask`
TRIES = 4  # the first request and three more
WARMER = 0.3  # added to the temperature at each further try: at 0 a seed changes nothing
ALL_REFUSED = 8  # refusals before any reply that stop the run: the request's form is at fault
# The server has read such a request and will say the same again; other refusals may be cured by
# other settings and are not kept.
SETTLED = ("content_filter", "context_length_exceeded")
REFUSED = "refused by the server: "


class NoJudgement(Exception):
    """The judge gave nothing that can be used; its text says why, in words to be counted."""


@dataclass
class JudgeStats:
    """What one ``Judge`` asked since it was made; the fields are those of its summary."""

    calls: int = 0  # replies that were paid for
    cached: int = 0  # replies taken from the cache
    nonsense: Counter[str] = field(default_factory=Counter)  # replies that held no judgement
    refused: int = 0
    unavailable: int = 0  # requests to be asked again by a later run
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0  # of the calls


@dataclass(frozen=True)
class Judge:
    """One model that judges, with its cache."""

    endpoint: Endpoint  # the model, its server and their limits
    cache: str | os.PathLike  # the SQLite file, made where it is missing
    temperature: float | None = 0.0  # of the first try; None for models that take none
    schema: bool = True  # ask the server to hold replies to their JSON schema; not every one can
    max_tokens: int = 1024  # of one reply, thoughts included
    max_calls: int = 0  # kept in the cache, from which on nothing is asked; 0: any number
    advance: Callable[[int], Any] = lambda n: None  # called with 1 for every item done by ``map``
    stats: JudgeStats = field(default_factory=JudgeStats, init=False)

    def map(
        self, function: Callable[[Ask, Any], Awaitable[Any]], items: Iterable[Any]
    ) -> list[Any]:
        """``function(ask, item)`` of every item, in the order of the items, many at a time.

        Raises Fatal where no request can succeed, and what ``function`` raises; what has arrived
        by then is in the cache.
        """
        return asyncio.run(self._map(function, list(items)))

    async def _map(self, function: Callable, items: list) -> list[Any]:
        from srpo_jax.remote.client import Client  # seconds to import: only to ask something

        results: list[Any] = [None] * len(items)
        queue = iter(enumerate(items))

        async def work(ask: Ask) -> None:
            for i, item in queue:
                results[i] = await function(ask, item)
                self.advance(1)

        with JudgeCache(self.cache) as cache:
            async with Client(self.endpoint) as client:
                asking = _Asking(self, client, cache)
                # Twice as many as fit on the line: those that wait before a retry leave room.
                workers = min(2 * self.endpoint.concurrency, len(items))
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(workers):
                            group.create_task(work(asking.ask))
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from None
        return results

    def prompt(self, name: str, values: dict[str, Any]) -> str:
        """The text of a question: by itself what ``values`` hold under "prompt"."""
        del name
        return values["prompt"]

    def request(
        self, name: str, values: dict[str, Any], fields: Sequence[str], kind: type, trial: int
    ) -> Request:
        """The request of one try."""
        text = self.prompt(name, values)
        temperature = self.temperature
        if temperature is not None:
            temperature = round(min(temperature + WARMER * trial, 2.0), 3)
        schema = object_schema(fields, "string" if kind is str else "number")
        return Request(
            messages=[{"role": "user", "content": text}],
            max_tokens=self.max_tokens,
            temperature=temperature,
            seed=trial,
            schema=schema if self.schema else None,
            schema_name=name,
        )

    def summary(self) -> dict[str, Any]:
        """What a report says about the judge: model, calls, tokens, USD."""
        stats = vars(self.stats) | {"cost_usd": round(self.stats.cost_usd, 6)}
        return {"model": self.endpoint.model, **stats}


class _Asking:
    """The questions of one run: cache first, then the server."""

    def __init__(self, judge: Judge, client: "Client", cache: JudgeCache):
        self.judge, self.client, self.cache = judge, client, cache
        self.spent = len(cache) if judge.max_calls else 0
        self.in_flight: dict[str, asyncio.Future[Reply]] = {}

    async def ask(
        self,
        name: str,
        values: dict[str, Any],
        fields: Sequence[str],
        kind: type = str,
        check: Callable[[dict[str, Any]], Any] = lambda found: None,
    ) -> dict[str, Any]:
        """The fields of the judge's reply to a question; NoJudgement where none can be had.

        Args:
            name: of the question, for `Judge.prompt` and for the server.
            values: what goes into its text.
            fields: of the JSON object that the reply must be, nothing else in it.
            kind: of all fields, str or float.
            check: raises BadReply for fields that make no sense.
        """
        stats = self.judge.stats
        reason = ""
        for trial in range(TRIES):
            reply = await self._reply(self.judge.request(name, values, fields, kind, trial))
            try:
                if reply.finish_reason.startswith(REFUSED):
                    raise NoJudgement(reply.finish_reason)
                found = reply_fields(reply, fields, kind)
                check(found)
                return found
            except BadReply as error:
                reason = str(error)
                stats.nonsense[reason] += 1
        raise NoJudgement(f"{TRIES} replies of no use, the last: {reason}")

    async def _reply(self, request: Request) -> Reply:
        """The reply from the cache or the server; equal requests at the same time are one."""
        key = request_key(self.judge.endpoint.model, request)
        if (reply := self.cache.get(key)) is not None:
            self.judge.stats.cached += 1
            return reply
        if key in self.in_flight:
            return await asyncio.shield(self.in_flight[key])
        future = self.in_flight[key] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._send(key, request)
        except BaseException as error:
            future.set_exception(error)
            future.exception()  # nobody may be waiting for it
            raise
        finally:
            del self.in_flight[key]
        future.set_result(reply)
        return reply

    async def _send(self, key: str, request: Request) -> Reply:
        stats, model = self.judge.stats, self.judge.endpoint.model
        if self.judge.max_calls and self.spent >= self.judge.max_calls:
            raise NoJudgement(f"all of {self.judge.max_calls} calls are used up")
        self.spent += 1
        try:
            reply = await self.client.complete(request)
        except Unavailable as error:
            stats.unavailable += 1
            raise NoJudgement(f"unavailable: {error}") from None
        except Rejected as error:
            stats.refused += 1
            stats.cost_usd += error.cost
            if not stats.calls and not stats.cached and stats.refused >= ALL_REFUSED:
                raise Fatal(
                    f"the server refused each of the first {stats.refused} requests, the last "
                    f"with: {error}; does it lack structured output (--judge_schema off)?"
                ) from None
            if error.kind not in SETTLED:
                raise NoJudgement(f"{REFUSED}{error}") from None
            reply = Reply("", "", REFUSED + error.kind, "", 0, 0, error.cost, 0.0)
        else:
            stats.calls += 1
            stats.prompt_tokens += reply.prompt_tokens
            stats.completion_tokens += reply.completion_tokens
            stats.cost_usd += reply.cost
        self.cache.put(key, model, reply)
        return reply
