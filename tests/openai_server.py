"""A small OpenAI-compatible HTTP server with faults on demand, for tests of ``srpo_jax.remote``.

    with Server(lambda body: "42", faults={"429": 0.1, "cut": 0.05}) as server:
        ... server.base_url ... server.answered ... server.kinds ...

    python tests/openai_server.py --answer tests.my_world:answer --port_file port.txt

Chat completions, files and batches over real sockets. It runs in a thread of its own, or as a
program that outlives its clients and tells its counts at ``GET /stats``. ``answer(body)`` gets the
decoded request and returns the text of the reply, or a dict of message fields (``refusal``,
``content``, ...; ``finish_reason`` and ``usage`` go where they belong; ``raw`` is the whole body),
or raises ``HTTPError``.

``faults`` maps a kind to its probability for each HTTP request, or is a list: the kinds of the
first requests in turn ("ok": none). Kinds: "429", "429_retry_after", "timeout" (no answer for
``hang`` seconds), "cut" (half of the body, then the socket closes), "not_json", "reset" (the socket
closes before any byte), "drip" (a byte each 50 ms) and any other HTTP status of 400 to 599 as text.
"""

import argparse
import asyncio
import hashlib
import importlib
import json
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests"}
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


class HTTPError(Exception):
    """Raised by ``answer`` to refuse a request with an HTTP status."""

    def __init__(self, status: int, message: str = "refused", code: str | None = None):
        super().__init__(status, message, code)
        self.status, self.message, self.code = status, message, code


def error_body(status: int, message: str, code: str | None = None) -> dict:
    """The protocol's error object."""
    code = code or CODES.get(status)
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


class Server:
    """The server in a thread; counters are read when it is quiet, ``faults`` may be changed."""

    def __init__(
        self,
        answer: Callable[[dict], str | dict],
        faults: Mapping[str, float] | Sequence[str] | None = None,
        seed: int = 0,
        *,
        delay: float = 0.0,  # seconds before each answer of the chat endpoint
        hang: float = 3600.0,  # seconds that a "timeout" keeps the socket open
        retry_after: str = "0.05",  # the header of "429_retry_after", as it is sent
        key: str | None = None,  # when set, any other key gets 401
        polls: int = 1,  # times a batch is looked at before it is done
        unfinished: int = 0,  # the last lines of each batch, which expire
        port: int = 0,
        controls: Mapping[str, Callable[[dict], object]] | None = None,  # of other paths
    ):
        self.controls = controls or {}
        self.answer, self.faults, self.delay, self.hang = answer, faults, delay, hang
        self.retry_after, self.key, self.polls, self.unfinished = (
            retry_after,
            key,
            polls,
            unfinished,
        )
        self.port = port
        self.requests = 0  # HTTP requests of every kind
        self.kinds: Counter[str] = Counter()  # "ok" or the kind of fault, and HTTP statuses
        self.seen: Counter[str] = Counter()  # hash of each chat body that arrived
        self.answered: Counter[str] = Counter()  # hash of each chat body that got a whole answer
        self.pending = self.max_pending = 0  # chat requests that wait for their answer
        self.bodies: list[dict] = []  # chat bodies, where ``keep`` is set
        self.keep = False
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.max_open_batches = 0
        self._random = random.Random(seed)
        self._transports: set[asyncio.Transport] = set()

    @property
    def base_url(self) -> str:
        """What a client takes as its base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def repeats(self) -> int:
        """Answers beyond the first to the same body: what a client paid for twice."""
        return sum(n - 1 for n in self.answered.values())

    def stats(self) -> dict:
        """The counts as JSON."""
        return {
            "requests": self.requests,
            "kinds": dict(self.kinds),
            "seen": len(self.seen),
            "answered": sum(self.answered.values()),
            "repeats": self.repeats,
            "max_pending": self.max_pending,
        }

    async def listen(self) -> None:
        """Open the port; ``port`` then holds its number."""
        loop = asyncio.get_running_loop()
        # A client that is killed leaves a full backlog behind: room for its successor too.
        server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self.port, backlog=1024
        )
        self.port = server.sockets[0].getsockname()[1]
        self._server = server

    def __enter__(self) -> "Server":
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self.listen())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._close)
        self._thread.join()
        self._loop.close()

    def _close(self) -> None:
        self._server.close()
        for transport in list(self._transports):
            transport.abort()
        self._loop.call_soon(self._loop.stop)

    def draw(self) -> str:
        """The fault of the next request, or "ok"."""
        if not self.faults:
            return "ok"
        if not isinstance(self.faults, Mapping):
            return self.faults[self.requests - 1] if self.requests <= len(self.faults) else "ok"
        point = self._random.random()
        for kind, chance in self.faults.items():
            point -= chance
            if point < 0:
                return kind
        return "ok"

    def route(self, method: str, path: str, headers: str, body: bytes) -> tuple[int, bytes]:
        """(status, body) of a request without a fault."""
        path, _, query = path.partition("?")
        if path == "/stats":
            return 200, json.dumps(self.stats()).encode()
        if self.key is not None:
            given = _header(headers, "authorization").removeprefix("Bearer ")
            if given != self.key:
                return _error(401, f"Incorrect API key provided: {given}.")
        try:
            if path == "/v1/chat/completions":
                return 200, self.completion(body)
            if path in self.controls:
                return 200, json.dumps(self.controls[path](json.loads(body))).encode()
            return self._other(method, path.split("/")[2:], query, headers, body)
        except HTTPError as error:
            return _error(error.status, error.message, error.code)
        except KeyError as error:
            return _error(404, f"no such thing: {error}")

    def completion(self, body: bytes) -> bytes:
        """The reply to one chat body."""
        request = json.loads(body)
        if self.keep:
            self.bodies.append(request)
        message = self.answer(request)
        message = {"content": message} if isinstance(message, str) else dict(message)
        if "raw" in message:
            return json.dumps(message["raw"]).encode()
        finish = message.pop("finish_reason", "stop")
        words = len(message.get("content") or "") // 4 + 1
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": words}
        usage["total_tokens"] = sum(usage.values())
        usage = message.pop("usage", usage)
        reply = {
            "id": f"chatcmpl-{self.requests}",
            "object": "chat.completion",
            "created": 1,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": None, "refusal": None} | message,
                    "finish_reason": finish,
                    "logprobs": None,
                }
            ],
            "usage": usage,
        }
        return json.dumps(reply).encode()

    # ---- files and batches

    def _other(
        self, method: str, parts: list[str], query: str, headers: str, body: bytes
    ) -> tuple[int, bytes]:
        match method, *parts:
            case "POST", "files":
                out = self._new_file(_multipart_file(headers, body))
            case "GET", "files", name:
                out = {"id": name, "object": "file", "bytes": len(self.files[name])}
            case "GET", "files", name, "content":
                return 200, self.files[name]
            case "POST", "batches":
                out = self._new_batch(json.loads(body))
            case "GET", "batches":
                out = self._list(dict(p.split("=") for p in query.split("&") if p))
            case "GET", "batches", name:
                out = self._advance(self.batches[name])
            case _:
                raise HTTPError(404, f"no such path: {method} {'/'.join(parts)}")
        return 200, json.dumps(out).encode()

    def _new_file(self, data: bytes) -> dict:
        name = f"file-{len(self.files)}"
        self.files[name] = data
        return {"id": name, "object": "file", "bytes": len(data), "purpose": "batch"}

    def _new_batch(self, request: dict) -> dict:
        lines = self.files[request["input_file_id"]].splitlines()
        batch = {
            "id": f"batch_{len(self.batches)}",
            "object": "batch",
            "status": "validating",
            "endpoint": request["endpoint"],
            "completion_window": request["completion_window"],
            "created_at": len(self.batches),
            "input_file_id": request["input_file_id"],
            "output_file_id": None,
            "error_file_id": None,
            "metadata": request.get("metadata"),
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "looks": 0,
        }
        self.batches[batch["id"]] = batch
        still_open = [row for row in self.batches.values() if row["output_file_id"] is None]
        self.max_open_batches = max(self.max_open_batches, len(still_open))
        return batch

    def _list(self, query: dict) -> dict:
        rows = list(self.batches.values())[::-1]  # newest first, as the protocol has it
        if "after" in query:
            rows = rows[[row["id"] for row in rows].index(query["after"]) + 1 :]
        limit = int(query.get("limit", 20))
        page = rows[:limit]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        return {"object": "list", "data": page, "has_more": len(rows) > limit} | ends

    def _advance(self, batch: dict) -> dict:
        if batch["status"] not in ("validating", "in_progress"):
            return batch
        batch["looks"] += 1
        batch["status"] = "in_progress"
        if batch["looks"] > self.polls:
            self._finish(batch)
        return batch

    def _finish(self, batch: dict) -> None:
        good, bad = [], []
        lines = self.files[batch["input_file_id"]].splitlines()
        for number, line in enumerate(lines):
            row = json.loads(line)
            out = {"id": f"batch_req_{number}", "custom_id": row["custom_id"], "error": None}
            if number >= len(lines) - self.unfinished:
                out["response"] = None
                out["error"] = {"code": "batch_expired", "message": "not done in time"}
                bad.append(out)
                continue
            body = json.dumps(row["body"]).encode()
            status, data = self.route(
                "POST", row["url"], f"\r\nAuthorization: Bearer {self.key}", body
            )
            content = json.loads(data)
            out["response"] = {"status_code": status, "request_id": "r", "body": content}
            (good if status == 200 else bad).append(out)
        for rows, field in ((good, "output_file_id"), (bad, "error_file_id")):
            if rows:
                text = "".join(json.dumps(row) + "\n" for row in rows)
                batch[field] = self._new_file(text.encode())["id"]
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        batch["status"] = "expired" if self.unfinished else "completed"


def _error(status: int, message: str, code: str | None = None) -> tuple[int, bytes]:
    return status, json.dumps(error_body(status, message, code)).encode()


def _header(headers: str, name: str) -> str:
    """The value of a header, or "" where it is missing."""
    start = headers.lower().find(f"\r\n{name}:")
    return headers[start + 3 + len(name) :].partition("\r\n")[0].strip() if start >= 0 else ""


def _multipart_file(headers: str, body: bytes) -> bytes:
    """The part named "file" of a multipart form."""
    boundary = _header(headers, "content-type").partition("boundary=")[2].strip('"').encode()
    for part in body.split(b"--" + boundary):
        head, _, data = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return data.removesuffix(b"\r\n")
    raise HTTPError(400, "no file in the form")


class _Connection(asyncio.Protocol):
    """One socket: requests are answered in turn."""

    def __init__(self, server: Server):
        self.server = server
        self.data = bytearray()
        self.head: tuple[str, str, str] | None = None  # method, path, headers
        self.length = 0
        self.waiting = False  # a chat request is counted in ``pending``

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.server._transports.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server._transports.discard(self.transport)
        self._done()

    def _done(self) -> None:
        if self.waiting:
            self.waiting = False
            self.server.pending -= 1

    def data_received(self, data: bytes) -> None:
        self.data += data
        while True:
            if self.head is None:
                end = self.data.find(b"\r\n\r\n")
                if end < 0:
                    return
                head = self.data[:end].decode("latin-1")
                first, mark, rest = head.partition("\r\n")
                method, path, _ = first.split(" ")
                self.head = method, path, mark + rest
                del self.data[: end + 4]
                self.length = int(_header(mark + rest, "content-length") or 0)
                self.chunked = _header(mark + rest, "transfer-encoding") == "chunked"
            body = self._body()
            if body is None:
                return
            head, self.head = self.head, None
            self._handle(*head, body)

    def _body(self) -> bytes | None:
        """The whole body, removed from the buffer, or None while it is not there yet."""
        if not self.chunked:
            if len(self.data) < self.length:
                return None
            body = bytes(self.data[: self.length])
            del self.data[: self.length]
            return body
        out, position = bytearray(), 0
        while True:
            end = self.data.find(b"\r\n", position)
            if end < 0:
                return None
            size = int(self.data[position:end], 16)
            if len(self.data) < end + 4 + size:
                return None
            out += self.data[end + 2 : end + 2 + size]
            position = end + 4 + size
            if size == 0:
                del self.data[:position]
                return bytes(out)

    def _handle(self, method: str, path: str, headers: str, body: bytes) -> None:
        server = self.server
        if path == "/stats":
            return self._send(*server.route(method, path, headers, body))
        server.requests += 1
        kind = server.draw()
        server.kinds[kind] += 1
        chat = path == "/v1/chat/completions"
        if chat:
            name = hashlib.blake2b(body, digest_size=8).hexdigest()
            server.seen[name] += 1
            self.waiting = True
            server.pending += 1
            server.max_pending = max(server.max_pending, server.pending)
        if kind == "timeout":
            asyncio.get_running_loop().call_later(server.hang, self.transport.abort)
            return
        if kind in ("ok", "cut", "drip"):
            status, data = server.route(method, path, headers, body)
            if chat and kind == "ok" and status == 200:
                server.answered[name] += 1
        elif kind == "not_json":
            status, data = 200, b"<html>bad gateway</html>"
        elif kind == "reset":
            return self.transport.abort()
        else:
            status = int(kind[:3])
            data = _error(status, f"injected {kind}")[1]
        if chat and server.delay:
            asyncio.get_running_loop().call_later(server.delay, self._send, status, data, kind)
        else:
            self._send(status, data, kind)

    def _send(self, status: int, data: bytes, kind: str = "ok") -> None:
        self._done()
        if self.transport.is_closing():
            return
        extra = f"retry-after: {self.server.retry_after}\r\n" if kind == "429_retry_after" else ""
        head = (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n{extra}\r\n"
        ).encode()
        if kind == "cut":
            self.transport.write(head + data[: len(data) // 2])
            self.transport.close()
        elif kind == "drip":
            self._drip(head + data)
        else:
            self.transport.write(head + data)

    def _drip(self, data: bytes) -> None:
        if data and not self.transport.is_closing():
            self.transport.write(data[:1])
            asyncio.get_running_loop().call_later(0.05, self._drip, data[1:])


def main() -> None:
    """Serve until killed; the port number is written when the server listens."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--answer", default="", help="module:function; default: echo OK")
    arguments.add_argument("--port_file", required=True)
    arguments.add_argument("--faults", default="{}", help="JSON")
    for name, default in (("delay", 0.0), ("hang", 3600.0), ("seed", 0), ("port", 0), ("polls", 1)):
        arguments.add_argument(f"--{name}", type=type(default), default=default)
    arguments.add_argument("--retry_after", default="0.05")
    args = vars(arguments.parse_args())
    module, _, function = args.pop("answer").partition(":")
    answer = getattr(importlib.import_module(module), function) if module else lambda body: "OK"
    port_file, faults = args.pop("port_file"), json.loads(args.pop("faults"))
    server = Server(answer, faults, **args)

    async def serve() -> None:
        await server.listen()
        Path(port_file + ".tmp").write_text(str(server.port))
        os.replace(port_file + ".tmp", port_file)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
