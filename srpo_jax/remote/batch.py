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
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from openai.types import Batch, FileObject

from srpo_jax.remote.client import ERRORS, Connection
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
    parse_reply,
    request_body,
    scrub,
)

CHAT = "/v1/chat/completions"
MAX_REQUESTS = 50_000  # of one batch, by the vendor's rules
MAX_BYTES = 200 * 10**6
FINAL = ("completed", "expired", "cancelled", "failed")
MIN_SPEED = 100_000  # bytes per second: a slower upload is given up and tried again
DOWNLOAD_SECONDS = 3600.0  # for all of it; between two pieces the endpoint's time limit holds


@dataclass(frozen=True)
class BatchStatus:
    """How far a batch is; ``error`` says why one failed as a whole."""

    status: str  # the vendor's word
    completed: int
    error: str = ""

    @property
    def done(self) -> bool:
        """Whether nothing more will come: it can be collected."""
        return self.status in FINAL


def request_line(endpoint: Endpoint, name: str, request: Request) -> bytes:
    """One line of a batch's input file, of which MAX_BYTES bytes make a batch."""
    body = request_body(endpoint, request)
    row = {"custom_id": name, "method": "POST", "url": CHAT, "body": body}
    return json.dumps(row).encode() + b"\n"


class BatchClient(Connection):
    """Batches at one endpoint.

    ``clock`` and ``sleep`` replace ``time.monotonic`` and ``asyncio.sleep`` in tests. Every method
    raises Unavailable when the server does not answer for ``patience`` seconds, and Fatal where no
    request can succeed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        patience: float = 6 * 3600.0,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ):
        super().__init__(endpoint)
        self.patience, self._clock, self._sleep = patience, clock, sleep

    async def submit(self, requests: Mapping[str, Request], key: str) -> str:
        """The id of the batch with this ``key``, which is made unless it is there already.

        ``requests`` maps an id of the caller's to each request. Raises ValueError where they are
        none or more than the vendor takes.
        """
        if found := await self.find(key):
            return found
        with tempfile.TemporaryFile() as file:
            file.writelines(request_line(self.endpoint, *pair) for pair in requests.items())
            size = file.tell()
            if not 0 < len(requests) <= MAX_REQUESTS or size > MAX_BYTES:
                raise ValueError(
                    f"a batch of {len(requests)} requests and {size} bytes: the vendor takes 1 to "
                    f"{MAX_REQUESTS} requests and at most {MAX_BYTES} bytes; make smaller batches"
                )
            limit = self.endpoint.timeout + size / MIN_SPEED
            uploaded = await self._call(lambda: self._upload(file, limit), limit)
        tried = False

        async def create() -> Batch:
            """Create the batch; after a failure look whether it was created all the same."""
            nonlocal tried
            if tried and (found := await self._search(key)):
                return found
            tried = True
            return await self.openai.batches.create(
                input_file_id=uploaded.id,
                endpoint=CHAT,
                completion_window="24h",
                metadata={"key": key},
            )

        return (await self._call(create)).id

    async def find(self, key: str) -> str | None:
        """The id of the newest batch that was submitted with ``key``; None where there is none."""
        found = await self._call(lambda: self._search(key))
        return found and found.id

    async def poll(self, batch_id: str) -> BatchStatus:
        """Where a batch stands now."""
        batch = await self._call(lambda: self.openai.batches.retrieve(batch_id))
        if not batch.status:
            raise Unavailable("the server's batch endpoint answers without 'status'")
        errors = (batch.errors and batch.errors.data) or []
        # The vendor's words about lines of the file may quote them: only the code is kept.
        codes = ", ".join(sorted({str(error.code or "unknown") for error in errors}))
        completed = batch.request_counts and batch.request_counts.completed
        return BatchStatus(batch.status, completed or 0, scrub(codes, self._key))

    async def collect(
        self, batch_id: str
    ) -> AsyncIterator[tuple[str, Reply | Rejected | Unavailable]]:
        """(id, result) of every request that the batch has settled, each once.

        Requests that expired or met a transient failure come as Unavailable; some may be missing
        altogether, which means the same. Where some met what every request would (no quota), Fatal
        is raised after all others were given. Raises ValueError while the batch is not done.
        """
        batch = await self._call(lambda: self.openai.batches.retrieve(batch_id))
        if batch.status not in FINAL:
            raise ValueError(f"batch {batch_id} is {batch.status}: poll until it is done")
        seen: set[str] = set()
        fatal = None
        for output in filter(None, (batch.output_file_id, batch.error_file_id)):
            with tempfile.TemporaryFile() as file:
                await self._call(partial(self._download, output, file), DOWNLOAD_SECONDS)
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

    async def _search(self, key: str) -> Batch | None:
        async for batch in self.openai.batches.list(limit=100):
            if (batch.metadata or {}).get("key") == key:
                return batch
        return None

    async def _upload(self, file: IO[bytes], limit: float) -> FileObject:
        file.seek(0)
        content = ("batch.jsonl", file, "application/jsonl")
        return await self.openai.files.create(file=content, purpose="batch", timeout=limit)

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
            raise ValueError(f"{name}: not JSON Lines")

    async def _call(self, send: Callable[[], Awaitable[Any]], limit: float = 0.0) -> Any:
        """``send`` until it succeeds within ``limit`` seconds (0: the endpoint's time limit).

        Raises Unavailable, Rejected or Fatal.
        """
        start, attempt = self._clock(), 0
        while True:
            attempt += 1
            try:
                async with asyncio.timeout(limit or self.endpoint.timeout):
                    found = await send()
                if found is None or found.id:
                    return found
                raise Unavailable("the server's batch endpoint answers without 'id'")
            # The official client hands on text, or JSON of another shape, without these fields.
            except (*ERRORS, AttributeError) as error:
                failure = self.failure(error)
            error = failure.error(f"batch at {self.endpoint.model}", f" (after {attempt} tries)")
            if not isinstance(error, Unavailable) or self._clock() - start > self.patience:
                raise error
            with self.waits():
                await self._sleep((failure.wait or 0.0) + backoff(attempt))

    def _result(self, line: bytes) -> tuple[str | None, Reply | Rejected | Unavailable | Fatal]:
        """(custom id, result) of one line of an output or error file; (None, ...) if unreadable."""
        name = None
        try:
            row = json.loads(line)
            name = row["custom_id"]
            error, response = row.get("error"), row.get("response")
            if response is None:
                code = scrub(str((error or {}).get("code") or "no response"), self._key)
                found = Failure("expired", code, "retry")
            elif response["status_code"] == 200:
                found = parse_reply(self.endpoint, None, response["body"])
            else:
                # The server's words may quote the prompt, which is not at hand to be cut out.
                status = response["status_code"]
                kind, _, _ = classify(status, response["body"])
                said = {"code": kind, "message": "" if kind == str(status) else kind}
                found = http_failure(self.endpoint, self._key, status, {}, {"error": said})
        except (ValueError, KeyError, TypeError, AttributeError):
            found = Failure("not_json", "a line that is not the protocol's", "retry")
        return name, found if isinstance(found, Reply) else found.error(self.endpoint.model)
