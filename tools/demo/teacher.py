"""A teacher for dot tiles behind the chat protocol: a program that reads the picture's own plan.

It never sees the gold answer: it knows which tiles a picture was drawn from, reads them with an
occasional slip, and writes the review in the words of the demo. For trying ``gold_blind`` without
a model, a key or a network.
"""

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from srpo_jax.data.files import read_jsonl
from tools.demo import tiles

SLIPS = 0.1  # share of the replies whose second tile is misread
_ANSWER = re.compile(r"The solver's answer:\s*(-?\d+)")


def pixel_key(png: bytes) -> str:
    """The same for one picture however its PNG was compressed."""
    with Image.open(io.BytesIO(png)) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def known_pictures(records: Path, problems: list[tiles.Problem]) -> dict[str, tiles.Problem]:
    """Pixels -> problem of a JSONL file drawn from ``problems``."""
    found = {}
    for row, problem in zip(read_jsonl(records), problems, strict=True):
        png = (records.parent / row["images"][0]).read_bytes()
        found[pixel_key(png)] = problem
    return found


def review(body: dict, pictures: dict[str, tiles.Problem]) -> dict[str, str]:
    """The reflection fields for one request."""
    parts = body["messages"][-1]["content"]
    url = next(p["image_url"]["url"] for p in parts if p["type"] == "image_url")
    text = next(p["text"] for p in parts if p["type"] == "text")
    problem = pictures[pixel_key(base64.b64decode(url.partition(",")[2]))]
    a, b = problem.counts
    rng = np.random.default_rng(body.get("seed", 0))
    if rng.random() < SLIPS:
        b = b - 1 if b > 1 else b + 1
    result = tiles.combine(problem.op, a, b)
    said = _ANSWER.search(text)
    agrees = said is not None and int(said[1]) == result
    large, small = (a, b) if problem.op == "sum" else (max(a, b), min(a, b))
    one, two = problem.asked
    return {
        "reflection": f"{one}={a} {two}={b} {'yes' if agrees else 'no'}",
        "second_think": f"{large}{'+' if problem.op == 'sum' else '-'}{small}={result}",
        "second_answer": str(result),
    }


@contextmanager
def serve(pictures: dict[str, tiles.Problem]) -> Iterator[str]:
    """The teacher on a free port of this machine; yields its base URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            message = {"role": "assistant", "content": json.dumps(review(body, pictures))}
            reply = {
                "id": "tiles", "object": "chat.completion", "created": 0, "model": "program",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            }  # fmt: skip
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
