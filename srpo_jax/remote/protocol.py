"""The OpenAI protocol as values: what is asked, what comes back, what an error means.

Pure functions and frozen dataclasses; ``client`` and ``batch`` share them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from srpo_jax.remote.limits import retry_after

MAX_ERROR_CHARS = 300
QUOTE = 24  # characters of a prompt that an error may not repeat
IMAGE_TOKENS = 1000  # of one image, for the limit per minute; vendors count 85 to 2,500

TRANSIENT = {408, 409, 425, 429}  # and everything from 500 on
REJECTED = {400, 413, 414, 422, 431, 451}
# Codes that say more than the status they come with. Those of the second kind refuse every request
# of the run: an option that the model does not know, an account without money.
REJECTED_CODES = {"content_filter", "content_policy_violation", "context_length_exceeded"}
FATAL_CODES = {
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "account_deactivated",
    "invalid_api_key",
    "model_not_found",
    "unsupported_parameter",
    "unsupported_value",
    "unknown_parameter",
}
REMEDIES = {  # of a fatal error, by kind
    "401": "check the key",
    "402": "top up the account, then run again",
    "403": "check what the key may do",
    "404": "check the model's name and the base URL",
    "405": "check the base URL",
    "model_not_found": "check the model's name",
    "insufficient_quota": "top up the account or raise its limit, then run again",
    "invalid_api_key": "check the key",
    "unsupported_parameter": "leave this option out or choose another model",
    "unknown_parameter": "leave this option out or choose another server",
    "unsupported_value": "leave this option out or choose another model",
}
VENDOR = "https://api.openai.com/v1"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


class Unavailable(RuntimeError):
    """Transient failures beyond ``max_retries``: the item can be tried again later."""


class Rejected(ValueError):
    """The server refuses this very request, or filters its answer: it is not worth a retry."""

    def __init__(self, message: str, kind: str = "rejected", cost: float = 0.0):
        super().__init__(message, kind, cost)
        self.message, self.kind, self.cost = message, kind, cost  # cost in USD, of a filtered reply

    def __str__(self) -> str:
        return self.message


class Fatal(RuntimeError):
    """Every request would fail (key, quota, model, address): the run must stop."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind a server and how hard it may be asked."""

    model: str
    base_url: str | None = None  # None: OPENAI_BASE_URL, else the vendor's own
    key_env: str = "OPENAI_API_KEY"  # NAME of the environment variable; "": no key is sent
    concurrency: int = 16  # requests in flight at most
    requests_per_minute: float = 0.0  # 0: unlimited
    tokens_per_minute: float = 0.0  # prompt and completion; 0: unlimited
    timeout: float = 120.0  # seconds for one request, from connecting to the last byte
    max_retries: int = 8  # of one request, after transient failures
    price_in: float = 0.0  # USD per million tokens
    price_out: float = 0.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"([A-Za-z_]\w{0,63})?", self.key_env, re.ASCII):
            raise ValueError("key_env is the NAME of an environment variable, not the key itself")
        if self.concurrency < 1 or self.max_retries < 0 or self.timeout <= 0:
            raise ValueError(
                f"concurrency {self.concurrency}, max_retries {self.max_retries}, timeout "
                f"{self.timeout}: must be at least 1, at least 0, more than 0"
            )
        for name in ("requests_per_minute", "tokens_per_minute", "price_in", "price_out"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: must not be negative")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """USD for one reply; cached prompt tokens at the full price."""
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6


@dataclass(frozen=True)
class Request:
    """One chat completion to ask for."""

    messages: Sequence[dict[str, Any]]  # OpenAI chat messages, images as data URLs
    max_tokens: int
    temperature: float | None = None
    seed: int | None = None
    schema: dict[str, Any] | None = None  # JSON schema that the server must hold the reply to
    schema_name: str = "reply"


@dataclass(frozen=True)
class Reply:
    """What the model said and what it cost."""

    text: str
    refusal: str
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cost: float  # USD
    seconds: float  # of the request that succeeded, without waits


@dataclass(frozen=True)
class Failure:
    """One HTTP request that brought no reply."""

    kind: str  # for the counts
    text: str
    action: str  # "retry", "reject", "stop"
    server: bool = False  # the server is to blame: counts for the breaker
    wait: float | None = None  # seconds that the server asked for
    cost: float = 0.0

    def error(self, where: str, tries: str = "") -> Fatal | Rejected | Unavailable:
        """The exception that says what to do with the item."""
        text = f"{where}: {self.text}"
        if self.action == "stop":
            return Fatal(text)
        if self.action == "reject":
            return Rejected(text, self.kind, self.cost)
        return Unavailable(text + tries)


def estimate_tokens(request: Request) -> int:
    """A rough count of prompt tokens: a quarter of the UTF-8 bytes, images at a flat rate."""
    size = images = 0
    for message in request.messages:
        texts = _texts(message)
        size += sum(len(_utf8(text)) for text in texts)
        if not isinstance(message.get("content") or "", str):
            images += len(message["content"]) - len(texts)
    return size // 4 + 4 * len(request.messages) + IMAGE_TOKENS * images


def request_body(endpoint: Endpoint, request: Request) -> dict[str, Any]:
    """The JSON body of a request; OpenAI's own server has renamed a field."""
    limit = "max_completion_tokens" if is_vendor(endpoint) else "max_tokens"
    out = {"model": endpoint.model, "messages": list(request.messages), limit: request.max_tokens}
    if request.temperature is not None:
        out["temperature"] = request.temperature
    if request.seed is not None:
        out["seed"] = request.seed
    if request.schema is not None:
        schema = {"name": request.schema_name, "strict": True, "schema": request.schema}
        out["response_format"] = {"type": "json_schema", "json_schema": schema}
    return out


def parse_reply(
    endpoint: Endpoint, request: Request | None, body: Any, seconds: float = 0.0
) -> Reply | Failure:
    """The decoded body of an answer; a ``Failure`` where it was filtered or is not the protocol's.

    A server that reports no usage gets an estimate, so that a budget still ends the run; of the
    prompt only where ``request`` is known.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        if isinstance(text, list):  # parts, as some servers send them
            text = "".join(part.get("text") or "" for part in text)
        if not isinstance(text, str | None) or not isinstance(refusal, str | None):
            raise TypeError
        usage = body.get("usage") or {}
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        finish, model = choice.get("finish_reason"), body.get("model")
    except (KeyError, IndexError, TypeError, AttributeError):
        text = "the body is JSON but not a chat completion"
        return Failure("not_json", text, "retry", server=True)
    text, refusal = (_utf8(part or "").decode() for part in (text, refusal))
    if not isinstance(prompt, int):
        prompt = estimate_tokens(request) if request else 0
    if not isinstance(completion, int):
        completion = len(text.encode()) // 4 + 1
    cost = endpoint.cost(prompt, completion)
    if finish == "content_filter":
        text = "the server's content filter stopped the answer"
        return Failure("content_filter", text, "reject", cost=cost)
    return Reply(
        text, refusal, str(finish or ""), str(model or ""), prompt, completion, cost, seconds
    )


def classify(status: int, body: Any) -> tuple[str, str, str]:
    """(kind, what the server says, action) of an HTTP error; action as in ``Failure``."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        error = {"message": error if isinstance(error, str) else ""}
    code = str(error.get("code") or error.get("type") or "")
    text = str(error.get("message") or error.get("detail") or "")
    if code in REJECTED_CODES:
        return "content_filter" if code.startswith("content") else code, text, "reject"
    if code in FATAL_CODES or (status == 400 and "api key" in text.lower()):
        return code if code in FATAL_CODES else "invalid_api_key", text, "stop"
    if status in TRANSIENT or status >= 500:
        return str(status), text, "retry"
    return str(status), text, "reject" if status in REJECTED else "stop"


def _utf8(text: str) -> bytes:
    """Lone surrogates become "?": JSON can hold them, but neither UTF-8 nor SQLite can."""
    return text.encode("utf-8", "replace")


def http_failure(
    endpoint: Endpoint,
    key: str,
    status: int,
    headers: Mapping[str, str],
    body: Any,
    request: Request | None = None,
) -> Failure:
    """What an error status means, in words that hold neither the key nor the prompt."""
    kind, text, action = classify(status, body)
    text = scrub(hide_prompt(text, request) if request else text, key)
    text = f"HTTP {status}" + (f": {text}" if text else "")
    if action == "stop":
        text += f"; {REMEDIES.get(kind, 'see what the server says')}"
        if kind in ("401", "403", "invalid_api_key") and key:
            text += f" (environment variable {endpoint.key_env})"
    wait = retry_after(headers) if action == "retry" else None
    return Failure(kind, text, action, status >= 500 or status == 408, wait)


def hide_prompt(text: str, request: Request) -> str:
    """``text`` without the pieces of ``QUOTE`` characters or more that it shares with the prompt.

    Servers quote what they refuse; a prompt may be private, and errors are logged and stored.
    """
    text = re.sub(r"[A-Za-z0-9+/=]{64,}", "[data]", text[:2000])
    prompts = [content for message in request.messages for content in _texts(message)]
    hidden = list(text)
    for i in range(len(text) - QUOTE + 1):
        if any(text[i : i + QUOTE] in prompt for prompt in prompts):
            hidden[i : i + QUOTE] = "\0" * QUOTE
    return re.sub("\0+", "...", "".join(hidden))


def _texts(message: dict[str, Any]) -> list[str]:
    """The texts of a chat message."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part.get("text") is not None]


def scrub(text: str, key: str = "") -> str:
    """One line of at most 300 characters without the key or anything that looks like one."""
    text = " ".join(text.split())
    if len(key) >= 4:
        text = text.replace(key, "[key]")
    text = re.sub(r"(?i)\b(sk|pk|rk|gsk|key)[-_][\w*.\-]{6,}", "[key]", text)
    text = re.sub(r"(?i)\bbearer\s+\S+", "[key]", text)
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 3] + "..."


def find_base_url(endpoint: Endpoint) -> str | None:
    """The server's base URL, also from OPENAI_BASE_URL; None for the vendor's own.

    Raises Fatal where it is no URL.
    """
    url = (endpoint.base_url or os.environ.get("OPENAI_BASE_URL") or "").strip()
    if not url:
        return None
    try:
        parts = urlsplit(url)
        # aiohttp refuses a user in the address beside a key in the header.
        good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
        good = good and parts.port != 0  # raises where it is no number
    except ValueError:
        good = False
    if not good:  # not shown: it may hold a password
        raise Fatal(
            f"{endpoint.model}: the base URL must look like http://host:8000/v1, without user and "
            "password"
        )
    return url


def server_place(endpoint: Endpoint) -> tuple[str, str, int]:
    """(scheme, host, port) of the server; nothing else of an address may be shown."""
    parts = urlsplit(find_base_url(endpoint) or VENDOR)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname or "", port


def is_vendor(endpoint: Endpoint) -> bool:
    """Whether the server is OpenAI's own."""
    url = find_base_url(endpoint)
    return url is None or urlsplit(url).hostname == urlsplit(VENDOR).hostname


def read_key(endpoint: Endpoint) -> str:
    """The key from the environment; "" for a server that needs none.

    Raises Fatal where it is missing, unless the server runs on this machine, or cannot be a key.
    """
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key:
        url = find_base_url(endpoint)
        if url and urlsplit(url).hostname in LOCAL_HOSTS:
            return ""
        raise Fatal(f"no key: set the environment variable {endpoint.key_env}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise Fatal(f"the environment variable {endpoint.key_env} holds no key: copy it anew")
    return key
