"""Whether a reply becomes training data; reasons are short phrases, so that they can be counted."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from srpo_jax.data.fields import Record
from srpo_jax.data.prompts import CONTROL_TOKENS, paper_sft_response, plain_response, srpo_response
from srpo_jax.reflection import check
from srpo_jax.reflection.settings import Settings


def target_problem(think: str, answer: str) -> str | None:
    """Why a first round cannot stand in a training target; None where it can."""
    return _unfit([think, answer], partial(plain_response, think, answer))


def _unfit(texts: Sequence[str], build: Callable[[], str]) -> str | None:
    """Why texts cannot stand in the response that ``build`` makes; None where they can."""
    if any(token in text for text in texts for token in CONTROL_TOKENS):
        return "control token in the text"
    try:
        build()
    except ValueError:
        return "not the template"
    return None


def reply_problem(
    record: Record,
    first: dict[str, Any],
    reply: dict[str, Any],
    right: bool,
    settings: Settings,
    count_tokens: Callable[[str], int],
) -> str | None:
    """Why a reply is rejected; None where it is accepted.

    Args:
      first: the attempt {"think", "answer", "correct"}.
      reply: {"reflection", "second_think"?, "second_answer"?}.
      right: the second answer was graded right.
    """
    reflection, attempt = reply["reflection"], (first["think"], first["answer"])
    texts = [reply[name] for name in ("reflection", "second_think") if reply.get(name)]
    if not right:
        return "second answer wrong"
    if settings.target == "paper":
        build = partial(paper_sft_response, *attempt, reflection, record.answer)
    else:
        second = reply["second_think"], reply["second_answer"]
        build = partial(srpo_response, *attempt, reflection, *second)
    if problem := _unfit(texts, build):
        return problem
    if len(reflection.split()) < settings.min_reflection_words and len(reflection) < 12:
        return "reflection too short"
    if count_tokens(reflection) > settings.max_reflection_tokens:
        return "reflection too long"
    if count_tokens(reply.get("second_think", "")) > settings.max_think_tokens:
        return "second think too long"
    if not settings.any_language:
        if not all(check.same_language(record.question, text) for text in texts):
            return "another language"
    # Who has not seen the gold can state it, but not leak it.
    if settings.mode == "gold_given" and check.leaks(
        reflection, record.answer, record.choices, first["answer"], first["correct"]
    ):
        return "leaked gold"
    return None
