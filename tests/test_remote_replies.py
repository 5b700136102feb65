"""What a structured reply must hold, and what is forgiven."""

import pytest

from srpo_jax.remote.protocol import Reply
from srpo_jax.remote.replies import BadReply, reply_fields


def reply(text: str, **more) -> Reply:
    fields = dict(refusal="", finish_reason="stop", model="m", prompt_tokens=1)
    return Reply(
        text=text, **{**fields, "completion_tokens": 1, "cost": 0.0, "seconds": 0.0, **more}
    )


@pytest.mark.parametrize(
    ("text", "more", "reason"),
    [
        ('{"reflection": "r"', {}, "not JSON"),
        ("[" * 100_000, {}, "not JSON"),
        ("[1]", {}, "outside the schema"),
        ('{"other": "r"}', {}, "outside the schema"),
        ('{"reflection": "r", "more": 1}', {}, "outside the schema"),
        ('{"reflection": 3}', {}, "outside the schema"),
        ('{"reflection": true}', {}, "outside the schema"),
        ('{"reflection": "  "}', {}, "empty reflection"),
        ("", {}, "empty reply"),
        (" \n", {}, "empty reply"),
        ('{"reflection": "r"}', {"finish_reason": "length"}, "cut off at the token limit"),
        ("", {"refusal": "no"}, "refusal"),
    ],
)
def test_a_reply_outside_the_schema_says_why(text, more, reason):
    with pytest.raises(BadReply, match=f"^{reason}$"):
        reply_fields(reply(text, **more), ["reflection"])


@pytest.mark.parametrize(
    "text",
    [
        '{"reflection": "r"}',
        '```json\n{"reflection": "r"}\n```',
        '<think>hm { "x" }</think>\n{"reflection": " r "}',
    ],
)
def test_a_fence_or_a_thought_around_the_object_is_forgiven(text):
    assert reply_fields(reply(text), ["reflection"]) == {"reflection": "r"}


def test_a_score_is_a_number():
    assert reply_fields(reply('{"score": 4}'), ["score"], float) == {"score": 4.0}
    with pytest.raises(BadReply, match="outside the schema"):
        reply_fields(reply('{"score": true}'), ["score"], float)
