"""Replies that must be one JSON object: its schema, and its fields from what a model wrote."""

import json
import re
from collections.abc import Sequence
from typing import Any

from srpo_jax.remote.protocol import Reply

_FENCE = re.compile(r"\s*```(?:json)?\s*(\{.*\})\s*```\s*", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


class BadReply(ValueError):
    """A reply that arrived and cannot be used; its text is the reason, in words to be counted."""


def object_schema(names: Sequence[str], kind: str = "string") -> dict:
    """The JSON schema of an object with exactly these fields."""
    return {
        "type": "object",
        "properties": {name: {"type": kind} for name in names},
        "required": list(names),
        "additionalProperties": False,
    }


def reply_fields(reply: Reply, names: Sequence[str], kind: type = str) -> dict[str, Any]:
    """The fields of a structured reply; BadReply where it is not what the schema says.

    A code fence around the object, and a thought before it, are forgiven: servers without
    structured output produce both.
    """
    if reply.refusal:
        raise BadReply("refusal")
    if reply.finish_reason == "length":
        raise BadReply("cut off at the token limit")
    if reply.finish_reason == "content_filter":
        raise BadReply("content filter")
    text = _THOUGHT.sub("", reply.text, count=1).strip()
    if not text:
        raise BadReply("empty reply")
    fenced = _FENCE.fullmatch(text)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise BadReply("not JSON") from None
    if not isinstance(found, dict) or set(found) != set(names):
        raise BadReply("outside the schema")
    for name in names:
        value = found[name]
        if isinstance(value, bool) or not isinstance(value, kind | int if kind is float else kind):
            raise BadReply("outside the schema")
        if kind is str and not value.strip():
            raise BadReply(f"empty {name}")
    return {n: found[n].strip() if kind is str else kind(found[n]) for n in names}
