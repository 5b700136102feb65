"""Reward profiles: which template rules hold, which answers are checked, what is paid for them.

PAPER is equations 4-8 of SRPO (arXiv 2506.01713), whose printed constants differ from those in the
authors' two reward files. OPENRLHF and VERL_FIXED keep what those files do (the latter with its
chained comparisons mended), so that their numbers can be reproduced. GRPO is the control without
any reflection reward. Totals without f_len, where the format holds and the reflection counts:

    first -> final    paper   openrlhf   verl_fixed   grpo
    right -> right     1.50       1.25         .625    1.5
    wrong -> right     1.25       1.50         .75     1.5
    right -> wrong     1.00        .75         .125     .5
    wrong -> wrong      .75        .50         .25      .5

A profile of your own is one of these with parts replaced, for ``train_grpo.train(profile=...)``:

    dataclasses.replace(PAPER, name="mine", terms=my_terms)
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from srpo_jax.rewards.answers import boxed
from srpo_jax.rewards.template import (
    FIVE_BLOCKS,
    LOOSE_TAG,
    ONE_ROUND,
    TAG,
    Completion,
    FormatRule,
    ParsedResponse,
    TemplateRules,
    rounds_by_answers,
    rounds_by_pairs,
)
from srpo_jax.rewards.terms import RewardTerms, add_up, by_outcome, length_factor, right_answers
from srpo_jax.structs import Array, Verdict


class Answers(NamedTuple):
    """The texts that are checked, None where there is none, and whether they are of two rounds."""

    first: str | None
    final: str | None
    has_second: bool


@dataclasses.dataclass(frozen=True)
class Profile:
    """One reward design. Hashable and comparable: jitted functions take it as a static argument.

    ``terms(verdict, alpha)`` gives every reward term of a verdict of any leading shape,
    elementwise and under jit; a profile that pays both answers with one number has it in
    ``r_acc``. What a missing block would earn is 0, and malformed completions raise nothing.
    """

    name: str
    template: TemplateRules
    answers: Callable[[Completion, ParsedResponse], Answers]
    terms: Callable[[Verdict, float], RewardTerms]


# ------------------------------------------------------------------------------------- answers


def answer_blocks(completion: Completion, response: ParsedResponse) -> Answers:
    """The first and the last answer block; a lone one is both."""
    first, second = (response.spans[name] for name in ("first_answer", "second_answer"))
    if first is None:
        return Answers(None, None, response.has_second)
    final = completion.decode(second or first)
    return Answers(completion.decode(first), final, response.has_second)


def answer_boxes(completion: Completion, response: ParsedResponse) -> Answers:
    r"""The first and the last \boxed{}, in a block or not; a lone one is both, and both rounds."""
    text = completion.decode()
    final = boxed(text)
    return Answers(boxed(text, first=True), final, final is not None)


# --------------------------------------------------------------------------------------- terms


def paper_terms(verdict: Verdict, alpha: float) -> RewardTerms:
    """Equations 4-8: the first answer, what the reflection did to it, and its length."""
    first, _ = right_answers(verdict)
    second = verdict.has_first & verdict.has_second
    effect = by_outcome(verdict, both=0.25, fixed=0.5, harmed=-0.25)
    return add_up(
        alpha,
        r_format=jnp.where(verdict.format_ok & verdict.has_first, 0.5, 0.0),
        r_acc=jnp.where(first, 0.5, 0.0),
        i_eff=jnp.where(second, effect, 0.0),
        i_ref=jnp.where(second & verdict.reflection_ok, 0.25, 0.0),
        f_len=jnp.where(second, _f_len(verdict), 0.0),
    )


def openrlhf_terms(verdict: Verdict, alpha: float) -> RewardTerms:
    """One number for both answers; without two thinks and two answers the sample gets nothing."""
    outcome = by_outcome(verdict, both=0.75, fixed=1.0, harmed=0.25)
    return add_up(
        alpha,
        r_format=jnp.where(verdict.format_ok & verdict.has_second, 0.5, 0.0),
        r_acc=jnp.where(verdict.has_second, outcome, 0.0),
        f_len=jnp.where(verdict.has_second, _f_len(verdict), 0.0),
    )


def verl_terms(verdict: Verdict, alpha: float) -> RewardTerms:
    """Half of (accuracy + format), and f_len, which is 0 where blocks are missing."""
    return add_up(
        alpha,
        r_format=jnp.where(verdict.format_ok, 0.25, 0.0),
        r_acc=0.5 * by_outcome(verdict, both=0.75, fixed=1.0, harmed=-0.25),
        f_len=_f_len(verdict),
    )


def grpo_terms(verdict: Verdict, alpha: float) -> RewardTerms:
    """The format and the final answer."""
    _, final = right_answers(verdict)
    return add_up(
        alpha,
        r_format=jnp.where(verdict.format_ok, 0.5, 0.0),
        r_acc=jnp.where(final, 1.0, 0.0),
    )


def _f_len(verdict: Verdict) -> Array:
    return length_factor(verdict.total_tokens, verdict.first_tokens)


# ------------------------------------------------------------------------------------ profiles

PAPER = Profile(
    name="paper",
    template=TemplateRules(TAG, innermost=True, rounds=rounds_by_answers, format_ok=FormatRule()),
    answers=answer_blocks,
    terms=paper_terms,
)
OPENRLHF = Profile(
    name="openrlhf",
    template=TemplateRules(
        TAG,
        innermost=False,
        rounds=rounds_by_pairs,
        format_ok=FormatRule(text_before=True, white_space_fills=True),
    ),
    answers=answer_blocks,
    terms=openrlhf_terms,
)
VERL_FIXED = Profile(
    name="verl_fixed",
    template=TemplateRules(
        LOOSE_TAG,  # the file deletes white space around < > / before it looks for tags,
        innermost=False,
        rounds=rounds_by_pairs,
        format_ok=FormatRule(text_before=True),  # so that a blank block is an empty one
    ),
    answers=answer_boxes,
    terms=verl_terms,
)
GRPO = Profile(
    name="grpo",
    template=dataclasses.replace(
        PAPER.template, format_ok=FormatRule(orders=(FIVE_BLOCKS, ONE_ROUND))
    ),
    answers=answer_blocks,
    terms=grpo_terms,
)
PROFILES = (PAPER, OPENRLHF, VERL_FIXED, GRPO)


def profile_named(name: str) -> Profile:
    """The profile of PROFILES that a configuration or a command line names; ValueError if none."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    names = ", ".join(profile.name for profile in PROFILES)
    raise ValueError(f"unknown reward profile {name!r}: choose one of {names}")
