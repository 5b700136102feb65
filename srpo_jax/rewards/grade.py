"""Completions -> ``Verdict``: spans from the tokens, answers from the spans, checks in the pool."""

from collections.abc import Sequence

import numpy as np

from srpo_jax.rewards.answers import boxed, extract_answer
from srpo_jax.rewards.template import Completion, ParsedResponse, TokenText, parse_response
from srpo_jax.rewards.verifier import Verifier
from srpo_jax.structs import BLOCKS, Verdict


def grade(
    completions_PGR: np.ndarray,
    completion_mask_PGR: np.ndarray,
    *,
    token_text: TokenText,
    golds: Sequence[str],
    choices: Sequence[Sequence[str]] | None = None,
    verifier: Verifier,
    profile: str = "paper",
    eos_ids: Sequence[int] = (),
) -> tuple[Verdict, list[dict]]:
    """Grade the G completions of each of P prompts against the prompt's gold answer.

    Args:
      completions_PGR: int token ids; ``completion_mask_PGR`` bool, True up to and including EOS.
      golds, choices: one per prompt; no choices means an open question.
      profile: whose template rules hold (template.PROFILES).
      eos_ids: ids that end a completion and belong to no block.
    Returns:
      The Verdict as numpy arrays [P, G] (block_tokens [P, G, 5]), and for each sample, prompt after
      prompt, a dict of ``text``, ``spans`` (half-open token ranges by block name, None for a
      missing block), ``first_answer`` and ``final_answer`` (extracted, None without one).
    Raises:
      ValueError where golds or choices do not match the prompts.
    """
    prompts, group = completions_PGR.shape[:2]
    if len(golds) != prompts or (choices is not None and len(choices) != prompts):
        raise ValueError(
            f"{prompts} prompts, but {len(golds)} golds and "
            f"{'no' if choices is None else len(choices)} lists of choices"
        )
    sequences = [
        completions_PGR[p, g][np.asarray(completion_mask_PGR[p, g], bool)]
        for p in range(prompts)
        for g in range(group)
    ]
    per_sample = [p for p in range(prompts) for _ in range(group)]
    verdict, details = grade_sequences(
        sequences,
        token_text=token_text,
        golds=[str(golds[p]) for p in per_sample],
        choices=[tuple(choices[p]) if choices else () for p in per_sample],
        verifier=verifier,
        profile=profile,
        eos_ids=eos_ids,
    )
    shaped = {
        name: getattr(verdict, name).reshape(prompts, group, *getattr(verdict, name).shape[1:])
        for name in Verdict.__dataclass_fields__
    }
    return Verdict(**shaped), details


def grade_sequences(
    sequences: Sequence[Sequence[int]],
    *,
    token_text: TokenText,
    golds: Sequence[str],
    choices: Sequence[Sequence[str]],
    verifier: Verifier,
    profile: str = "paper",
    eos_ids: Sequence[int] = (),
) -> tuple[Verdict, list[dict]]:
    """As ``grade`` for B completions of any lengths with a gold and choices each: arrays [B]."""
    completions = [token_text.completion(ids, eos_ids) for ids in sequences]
    parsed = [parse_response(completion, profile) for completion in completions]
    answers = [
        _answers(completion, response, profile)
        for completion, response in zip(completions, parsed, strict=True)
    ]
    # One batch for the pool, which checks equal answers of a group once.
    items = [
        (gold, answer, options)
        for gold, options, pair in zip(golds, choices, answers, strict=True)
        for answer in pair
    ]
    correct_B2 = np.array(verifier.check(items), bool).reshape(len(parsed), 2)
    # verl's answers are boxes, which need no blocks; a lone box is both answers.
    boxes = profile == "verl_fixed"

    def column(name: str, dtype) -> np.ndarray:
        return np.array([getattr(response, name) for response in parsed], dtype)

    has_answer = np.array([first is not None for first, _ in answers], bool)
    verdict = Verdict(
        first_correct=correct_B2[:, 0],
        final_correct=correct_B2[:, 1],
        has_first=has_answer if boxes else column("has_first", bool),
        has_second=has_answer if boxes else column("has_second", bool),
        format_ok=column("format_ok", bool),
        reflection_ok=column("reflection_ok", bool),
        first_tokens=column("first_tokens", np.int32),
        total_tokens=column("total_tokens", np.int32),
        block_tokens=column("block_tokens", np.int32).reshape(len(parsed), len(BLOCKS)),
    )
    return verdict, [
        _details(completion, response, pair)
        for completion, response, pair in zip(completions, parsed, answers, strict=True)
    ]


def _answers(
    completion: Completion, response: ParsedResponse, profile: str
) -> tuple[str | None, str | None]:
    """The texts to be checked as first and as final answer, None where there is none."""
    if profile == "verl_fixed":
        text = completion.decode()
        return boxed(text, first=True), boxed(text)
    if response.first_answer is None:
        return None, None
    return completion.decode(response.first_answer), completion.decode(response.final_answer)


def _details(
    completion: Completion, response: ParsedResponse, answers: tuple[str | None, str | None]
) -> dict:
    """One sample's text, token spans and extracted answers, for rollout files and reports."""
    first, final = (None if text is None else extract_answer(text) for text in answers)
    return {
        "text": completion.decode(),
        "spans": {
            name: completion.token_span(span) if span is not None else None
            for name, span in response.spans.items()
        },
        "first_answer": first,
        "final_answer": final,
    }
