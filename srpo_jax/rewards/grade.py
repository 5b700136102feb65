"""Completions -> ``Verdict``: spans from the tokens, answers from the spans, checks in the pool."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from srpo_jax.rewards.answers import Question, extract_answer
from srpo_jax.rewards.profiles import PAPER, Answers, Profile
from srpo_jax.rewards.stated import stated
from srpo_jax.rewards.template import Completion, ParsedResponse, TokenText, parse_response
from srpo_jax.rewards.verifier import Verifier
from srpo_jax.structs import BLOCKS, Verdict


def grade(
    completions_PGR: np.ndarray,
    completion_mask_PGR: np.ndarray,
    questions: Sequence[Question],
    *,
    token_text: TokenText,
    verifier: Verifier,
    profile: Profile = PAPER,
) -> tuple[Verdict, list[dict[str, Any]]]:
    """Grade the G completions of each of P prompts against the prompt's question.

    Args:
      completions_PGR: int token ids; ``completion_mask_PGR`` bool, True up to and including EOS.
      questions: one per prompt.
      profile: whose template rules hold, and which answers count.
    Returns:
      The Verdict as numpy arrays [P, G] (block_tokens [P, G, 5]), and for each sample, prompt after
      prompt, a dict of ``text``, ``spans`` (half-open token ranges by block name, None for a
      missing block), ``blocks`` (their texts), ``first_answer`` and ``final_answer`` (extracted,
      None without one), and ``graded``: False where the verifier's time was over before.
    Raises:
      ValueError where questions do not match the prompts.
    """
    prompts, group, length = completions_PGR.shape
    if len(questions) != prompts:
        raise ValueError(f"{prompts} prompts, but {len(questions)} questions")
    samples = completions_PGR.reshape(-1, length)
    masks = np.asarray(completion_mask_PGR, bool).reshape(-1, length)
    verdict, details = grade_sequences(
        [tokens[mask] for tokens, mask in zip(samples, masks, strict=True)],
        [question for question in questions for _ in range(group)],
        token_text=token_text,
        verifier=verifier,
        profile=profile,
    )
    held = {name: x for name, x in vars(verdict).items() if x is not None}
    shaped = {name: x.reshape(prompts, group, *x.shape[1:]) for name, x in held.items()}
    return Verdict(**shaped), details


def grade_sequences(
    sequences: Sequence[Sequence[int] | np.ndarray],
    questions: Sequence[Question],
    *,
    token_text: TokenText,
    verifier: Verifier,
    profile: Profile = PAPER,
) -> tuple[Verdict, list[dict[str, Any]]]:
    """As ``grade`` for B completions of any lengths with a question each: arrays [B]."""
    completions = [token_text.completion(ids) for ids in sequences]
    parsed = [parse_response(completion, profile.template) for completion in completions]
    answers = [profile.answers(*pair) for pair in zip(completions, parsed, strict=True)]
    # One batch for the pool, which checks equal answers of a group once.
    items = [
        (question, answer)
        for question, pair in zip(questions, answers, strict=True)
        for answer in (pair.first, pair.final)
    ]
    found = verifier.check(items)
    correct_B2 = np.array(found, bool).reshape(len(parsed), 2)
    graded = [None not in found[at : at + 2] for at in range(0, len(found), 2)]

    def column(name: str, dtype) -> np.ndarray:
        return np.array([getattr(response, name) for response in parsed], dtype)

    verdict = Verdict(
        first_correct=correct_B2[:, 0],
        final_correct=correct_B2[:, 1],
        has_first=np.array([found.first is not None for found in answers], bool),
        has_second=np.array([found.has_second for found in answers], bool),
        format_ok=column("format_ok", bool),
        reflection_ok=column("reflection_ok", bool),
        reflection_new=column("reflection_new", bool),
        stated=np.array(
            [_stated(*pair, profile) for pair in zip(completions, parsed, strict=True)], np.int32
        ),
        first_tokens=column("first_tokens", np.int32),
        first_end=column("first_end", np.int32),
        total_tokens=column("total_tokens", np.int32),
        block_tokens=column("block_tokens", np.int32).reshape(len(parsed), len(BLOCKS)),
    )
    samples = zip(completions, parsed, answers, graded, strict=True)
    return verdict, [_details(*sample) for sample in samples]


def _stated(completion: Completion, response: ParsedResponse, profile: Profile) -> int:
    span = response.spans["reflection"]
    return 0 if span is None else stated(completion.decode(span), profile.words)


def _details(
    completion: Completion, response: ParsedResponse, answers: Answers, graded: bool
) -> dict[str, Any]:
    """One sample's texts, token spans and extracted answers, for rollout files and reports."""
    return {
        "graded": graded,
        "text": completion.decode(),
        "spans": {
            name: completion.token_span(span) if span is not None else None
            for name, span in response.spans.items()
        },
        "blocks": {
            name: None if span is None else completion.decode(span)
            for name, span in response.spans.items()
        },
        "first_answer": None if answers.first is None else extract_answer(answers.first),
        "final_answer": None if answers.final is None else extract_answer(answers.final),
    }
