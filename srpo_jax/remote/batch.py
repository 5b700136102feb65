"""The vendor's batch endpoint: many requests as one file, done within a day at half the price.

    async with BatchClient(endpoint) as client:
        batch = await client.submit(requests, key="reflect-7")
        while not (await client.poll(batch)).done:
            await asyncio.sleep(60)
        async for custom_id, result in client.collect(batch):
            ...

Made for runs that are killed: a batch carries a ``key`` that the caller wrote down before, and
``submit`` and ``find`` look for it at the vendor's, so that no batch is paid for twice. Transient
failures are waited out for ``patience`` seconds, since a batch goes on without its client.
"""

import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

import httpx2
import openai

from srpo_jax.remote.client import CONNECTION_ERRORS, connect, connection_failure
from srpo_jax.remote.limits import Clock, Sleep, backoff
from srpo_jax.remote.protocol import (
    Endpoint,
    Failure,
    Fatal,
    Rejected,
    Reply,
    Request,
    Unavailable,
    classify,
    http_failure,
    is_vendor,
    parse_reply,
    read_key,
    request_body,
    scrub,
)

CHAT = "/v1/chat/completions"
MAX_REQUESTS = 50_000  # of one batch, by the vendor's rules
MAX_BYTES = 200 * 10**6
FINAL = ("completed", "expired", "cancelled", "failed")
MIN_SPEED = 100_000  # bytes per second: a slower upload is given up and tried again
DOWNLOAD_SECONDS = 3600.0  # for all of it; between two pieces the endpoint's time limit holds


class _NotTheProtocol(Exception):
    """A body that is not what the protocol promises: a transient failure."""


@dataclass(frozen=True)
class BatchStatus:
    """How far a batch is; ``error`` says why one failed as a whole."""

    status: str  # the vendor's word
    total: int
    completed: int
    failed: int
    error: str = ""

    @property
    def done(self) -> bool:
        """Whether nothing more will come: it can be collected."""
        return self.status in FINAL


def request_bytes(endpoint: Endpoint, request: Request) -> int:
    """About how many bytes a request takes of the ``MAX_BYTES`` of a batch."""
    return len(_line(endpoint, "", request, is_vendor(endpoint)))


class BatchClient:
    """Batches at one endpoint; an async context manager.

    ``clock``, ``sleep`` and ``rng`` as in ``Client``. Every method raises Unavailable when the
    server does not answer for ``patience`` seconds, and Fatal where no request can succeed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        patience: float = 6 * 3600.0,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        rng: random.Random | None = None,
    ):
        """Raises Fatal where the key is missing or the base URL is none."""
        self.endpoint, self.patience = endpoint, patience
        self._clock, self._sleep = clock, sleep
        self._rng = rng or random.Random()
        self._key = read_key(endpoint)
        self.openai = connect(endpoint, self._key)

    async def __aenter__(self) -> "BatchClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.openai.close()

    async def submit(
        self, requests: Mapping[str, Request] | Iterable[tuple[str, Request]], key: str
    ) -> str:
        """The id of the batch with this ``key``, which is made unless it is there already.

        ``requests`` maps an id of the caller's to each request; pairs may come from a generator,
        for they are written to a temporary file one by one. Raises ValueError where they are none
        or more than the vendor takes.
        """
        if found := await self.find(key):
            return found
        if isinstance(requests, Mapping):
            pairs = cast("Mapping[str, Request]", requests).items()  # not a mapping OF pairs
        else:
            pairs = requests
        with tempfile.TemporaryFile() as file:
            self._write(file, pairs)
            limit = self.endpoint.timeout + file.tell() / MIN_SPEED
            uploaded = await self._json(lambda: self._upload(file, limit), limit)
        body = {
            "input_file_id": _text(uploaded, "id"),
            "endpoint": CHAT,
            "completion_window": "24h",
            "metadata": {"key": key},
        }
        return await self._create(body, key)

    async def find(self, key: str) -> str | None:
        """The id of the newest batch that was submitted with ``key``; None where there is none."""
        path = "/batches?limit=100"
        while True:
            page = await self._json(lambda path=path: self._get(path))
            rows = page.get("data") or []
            for row in rows:
                if (row.get("metadata") or {}).get("key") == key:
                    return _text(row, "id")
            if not rows or not page.get("has_more"):
                return None
            path = f"/batches?limit=100&after={_text(rows[-1], 'id')}"

    async def poll(self, batch_id: str) -> BatchStatus:
        """Where a batch stands now."""
        batch = await self._json(lambda: self._get(f"/batches/{batch_id}"))
        counts = batch.get("request_counts") or {}
        errors = (batch.get("errors") or {}).get("data") or []
        # The vendor's words about lines of the file may quote them: only the code is kept.
        codes = sorted({str(error.get("code") or "unknown") for error in errors})
        return BatchStatus(
            _text(batch, "status"),
            total=int(counts.get("total") or 0),
            completed=int(counts.get("completed") or 0),
            failed=int(counts.get("failed") or 0),
            error=scrub(", ".join(codes), self._key),
        )

    async def cancel(self, batch_id: str) -> None:
        """Ask the vendor to stop a batch; what is done by then can be collected, and is paid."""
        path = f"/batches/{batch_id}/cancel"
        await self._json(lambda: self.openai.post(path, cast_to=httpx2.Response))

    async def collect(
        self, batch_id: str
    ) -> AsyncIterator[tuple[str, Reply | Rejected | Unavailable]]:
        """(id, result) of every request that the batch has settled, each once.

        Requests that expired or met a transient failure come as Unavailable; some may be missing
        altogether, which means the same. Where some met what every request would (no quota), Fatal
        is raised after all others were given. Raises ValueError while the batch is not done.
        """
        batch = await self._json(lambda: self._get(f"/batches/{batch_id}"))
        if batch.get("status") not in FINAL:
            raise ValueError(f"batch {batch_id} is {batch.get('status')}: poll until it is done")
        seen: set[str] = set()
        fatal = None
        for field in ("output_file_id", "error_file_id"):
            if not batch.get(field):
                continue
            with tempfile.TemporaryFile() as file:
                await self._call(
                    lambda name=batch[field], file=file: self._download(name, file),
                    DOWNLOAD_SECONDS,
                )
                file.seek(0)
                for line in file:
                    name, result = self._result(line)
                    if isinstance(result, Fatal):
                        fatal = result
                    elif name is not None and name not in seen:
                        seen.add(name)
                        yield name, result
        if fatal is not None:
            raise fatal

    def _write(self, file: IO[bytes], pairs: Iterable[tuple[str, Request]]) -> None:
        vendor, count = is_vendor(self.endpoint), 0
        for count, (name, request) in enumerate(pairs, 1):  # noqa: B007
            file.write(_line(self.endpoint, name, request, vendor))
        size = file.tell()
        if not 0 < count <= MAX_REQUESTS or size > MAX_BYTES:
            raise ValueError(
                f"a batch of {count} requests and {size} bytes: the vendor takes 1 to "
                f"{MAX_REQUESTS} requests and at most {MAX_BYTES} bytes; make smaller batches"
            )

    async def _create(self, body: dict, key: str) -> str:
        """Create the batch; after a failure look whether it was created all the same."""
        asked = False

        async def create() -> httpx2.Response | str:
            nonlocal asked
            if asked and (found := await self.find(key)):
                return found
            asked = True
            return await self.openai.post("/batches", cast_to=httpx2.Response, body=body)

        made = await self._json(create)
        return made if isinstance(made, str) else _text(made, "id")

    async def _upload(self, file: IO[bytes], limit: float) -> httpx2.Response:
        file.seek(0)
        raw = await self.openai.files.with_raw_response.create(
            file=("batch.jsonl", file, "application/jsonl"),
            purpose="batch",
            timeout=limit,
        )
        return raw.http_response

    async def _download(self, name: str, file: IO[bytes]) -> None:
        """The content of a vendor's file, from its start."""
        file.seek(0)
        file.truncate()
        async with self.openai.files.with_streaming_response.content(name) as response:
            async for chunk in response.iter_bytes():
                file.write(chunk)
        # A gateway's error page in place of answers that were paid for must not pass for them.
        file.seek(0)
        if not all(line.startswith(b"{") for line in file):
            raise _NotTheProtocol

    async def _get(self, path: str) -> httpx2.Response:
        return await self.openai.get(path, cast_to=httpx2.Response)

    async def _json(
        self, send: Callable[[], Awaitable[httpx2.Response | str]], limit: float = 0.0
    ) -> Any:
        """The decoded body of a response; a body that is no JSON object is a transient failure."""

        async def decoded() -> Any:
            response = await send()
            if isinstance(response, str):
                return response
            try:
                body = json.loads(response.content)
            except (ValueError, RecursionError):
                raise _NotTheProtocol from None
            if not isinstance(body, dict):
                raise _NotTheProtocol
            return body

        return await self._call(decoded, limit)

    async def _call(self, send: Callable[[], Awaitable[Any]], limit: float = 0.0) -> Any:
        """``send`` until it succeeds within ``limit`` seconds (0: the endpoint's time limit).

        Raises Unavailable, Rejected or Fatal.
        """
        start, attempt = self._clock(), 0
        while True:
            attempt += 1
            try:
                async with asyncio.timeout(limit or self.endpoint.timeout):
                    return await send()
            except openai.APIStatusError as error:
                failure = self._failure(error)
            except CONNECTION_ERRORS as error:
                failure = connection_failure(error)
            except _NotTheProtocol:
                failure = Failure("not_json", "the body is not the protocol's", "retry")
            text = f"batch at {self.endpoint.model}: {failure.text}"
            if failure.action == "stop":
                raise Fatal(text)
            if failure.action == "reject":
                raise Rejected(text, failure.kind)
            if self._clock() - start > self.patience:
                raise Unavailable(f"{text} (after {attempt} tries)")
            await self._sleep((failure.wait or 0.0) + backoff(attempt, self._rng))

    def _failure(self, error: openai.APIStatusError) -> Failure:
        try:
            body = json.loads(error.response.content)
        except (ValueError, httpx2.StreamError):
            body = None
        return http_failure(
            self.endpoint, self._key, error.status_code, error.response.headers, body
        )

    def _result(self, line: bytes) -> tuple[str | None, Reply | Rejected | Unavailable | Fatal]:
        """(custom id, result) of one line of an output or error file; (None, ...) if unreadable."""
        name = None
        try:
            row = json.loads(line)
            name = row["custom_id"]
            error, response = row.get("error"), row.get("response")
            if response is None:
                code = scrub(str((error or {}).get("code") or "no response"), self._key)
                return name, Unavailable(f"{self.endpoint.model}: {code}")
            status, body = response["status_code"], response["body"]
            if status == 200:
                reply = parse_reply(self.endpoint, None, body)
                if reply.finish_reason == "content_filter":
                    text = f"{self.endpoint.model}: the content filter stopped the answer"
                    return name, Rejected(text, "content_filter", reply.cost)
                return name, reply
            return name, self._refusal(status, body)
        except (ValueError, KeyError, TypeError, AttributeError):
            return name, Unavailable(f"{self.endpoint.model}: a line that is not the protocol's")

    def _refusal(self, status: int, body: Any) -> Rejected | Unavailable | Fatal:
        """What the HTTP error of one request means, without the server's words about it.

        Those may quote the prompt, which is not at hand here to be cut out.
        """
        kind, _, action = classify(status, body)
        text = f"{self.endpoint.model}: HTTP {status}" + (
            f" ({kind})" if kind != str(status) else ""
        )
        if action == "stop":
            body = {"error": {"code": kind}}
            return Fatal(http_failure(self.endpoint, self._key, status, {}, body).text)
        return Rejected(text, kind) if action == "reject" else Unavailable(text)


def _line(endpoint: Endpoint, name: str, request: Request, vendor: bool) -> bytes:
    """One line of a batch's input file."""
    body = request_body(endpoint, request, vendor)
    row = {"custom_id": name, "method": "POST", "url": CHAT, "body": body}
    return json.dumps(row).encode() + b"\n"


def _text(row: Mapping[str, Any], name: str) -> str:
    """A field that the protocol promises; Unavailable where the server leaves it out."""
    if not isinstance(row.get(name), str):
        raise Unavailable(f"the server's batch endpoint answers without {name!r}")
    return row[name]
