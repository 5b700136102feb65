"""Reward profiles: which template rules hold, which answers are checked, what is paid for them.

PAPER is equations 4-8 of SRPO (arXiv 2506.01713), whose printed constants differ from those in the
authors' two reward files. OPENRLHF and VERL_FIXED keep what those files do (the latter with its
chained comparisons mended), so that their numbers can be reproduced. GRPO is the control without
any reflection reward; BALANCED mends what the paper's pays for (``balanced_terms``). Totals without
f_len, where the format holds and the reflection counts:

    first -> final    paper   openrlhf   verl_fixed   grpo   balanced
    right -> right     1.50       1.25         .625    1.5       1.75
    wrong -> right     1.25       1.50         .75     1.5       1.25
    right -> wrong     1.00        .75         .125     .5       1.00
    wrong -> wrong      .75        .50         .25      .5        .75

A profile of your own is one of these with parts replaced, for ``train_grpo.train(profile=...)``:

    dataclasses.replace(PAPER, name="mine", terms=my_terms)
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from srpo_jax.rewards.answers import boxed
from srpo_jax.rewards.stated import Words
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
from srpo_jax.rewards.terms import (
    ALPHA,
    RewardTerms,
    add_up,
    by_outcome,
    excess_factor,
    length_factor,
    right_answers,
)
from srpo_jax.structs import Array, Verdict

Parts = dict[str, Array]  # reward terms by name


class Answers(NamedTuple):
    """The texts that are checked, None where there is none, and whether they are of two rounds."""

    first: str | None
    final: str | None
    has_second: bool


@dataclasses.dataclass(frozen=True)
class Profile:
    """One reward design. Hashable and comparable: jitted functions take it as a static argument.

    ``terms(verdict)`` gives the reward terms of a verdict of any leading shape by their names,
    elementwise and under jit; a profile that pays both answers with one number has it in
    ``r_acc``. What a missing block would earn is 0, and malformed completions raise nothing.
    """

    name: str
    template: TemplateRules
    answers: Callable[[Completion, ParsedResponse], Answers]
    terms: Callable[[Verdict], Parts]
    # With credit by segments: the terms that pay the first round; (): all, where none is its own.
    first_terms: tuple[str, ...] = ()
    words: Words = Words()  # with which a reflection states its verdict on the first answer

    def rewards(self, verdict: Verdict, alpha: float = ALPHA) -> RewardTerms:
        """The terms, and their sum with ``alpha`` as the weight of f_len."""
        return add_up(self.terms(verdict), {"f_len": alpha})


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


def paper_terms(verdict: Verdict) -> Parts:
    """Equations 4-8: the first answer, what the reflection did to it, and its length."""
    first, _ = right_answers(verdict)
    second = verdict.has_first & verdict.has_second
    effect = by_outcome(verdict, both=0.25, fixed=0.5, harmed=-0.25)
    return {
        "r_format": jnp.where(verdict.format_ok & verdict.has_first, 0.5, 0.0),
        "r_acc": jnp.where(first, 0.5, 0.0),
        "i_eff": jnp.where(second, effect, 0.0),
        "i_ref": jnp.where(second & verdict.reflection_ok, 0.25, 0.0),
        "f_len": jnp.where(second, _f_len(verdict), 0.0),
    }


def openrlhf_terms(verdict: Verdict) -> Parts:
    """One number for both answers; without two thinks and two answers the sample gets nothing."""
    outcome = by_outcome(verdict, both=0.75, fixed=1.0, harmed=0.25)
    return {
        "r_format": jnp.where(verdict.format_ok & verdict.has_second, 0.5, 0.0),
        "r_acc": jnp.where(verdict.has_second, outcome, 0.0),
        "f_len": jnp.where(verdict.has_second, _f_len(verdict), 0.0),
    }


def verl_terms(verdict: Verdict) -> Parts:
    """Half of (accuracy + format), and f_len, which is 0 where blocks are missing."""
    return {
        "r_format": jnp.where(verdict.format_ok, 0.25, 0.0),
        "r_acc": 0.5 * by_outcome(verdict, both=0.75, fixed=1.0, harmed=-0.25),
        "f_len": _f_len(verdict),
    }


def grpo_terms(verdict: Verdict) -> Parts:
    """The format and the final answer."""
    _, final = right_answers(verdict)
    return {
        "r_format": jnp.where(verdict.format_ok, 0.5, 0.0),
        "r_acc": jnp.where(final, 1.0, 0.0),
    }


def balanced_terms(verdict: Verdict) -> Parts:
    """The paper's terms without the ways in which they pay for what nobody wants.

    - i_eff: a right final answer is worth the same 0.5 whether it was kept or mended (with the
      paper's 0.25 and 0.5 a second round would rather find a wrong first answer); to lose a right
      one costs 0.25, so that it ends below what its first answer and a second round that changes
      nothing are worth (0.5 - 0.25 < 0.5 + 0).
    - i_ref: 0.25, as in the paper, but not for a reflection of fewer than ``MIN_REFLECTION`` tokens
      or for one that says the first thought over again.
    - f_len: of the reflection and the second round alone, tags left out, against the length of the
      first round; shorter is never worse, and it is paid only where the final answer is right, so
      that no length can be won by giving up.
    """
    first, final = right_answers(verdict)
    second = verdict.has_first & verdict.has_second
    effect = by_outcome(verdict, both=0.5, fixed=0.5, harmed=-0.25)
    blocks = verdict.block_tokens[..., 2:]
    reflected = verdict.reflection_ok & verdict.reflection_new & (blocks[..., 0] >= MIN_REFLECTION)
    length = excess_factor(blocks.sum(-1), verdict.first_tokens)
    return {
        "r_format": jnp.where(verdict.format_ok & verdict.has_first, 0.5, 0.0),
        "r_acc": jnp.where(first, 0.5, 0.0),
        "i_eff": jnp.where(second, effect, 0.0),
        "i_ref": jnp.where(second & reflected, 0.25, 0.0),
        "f_len": jnp.where(second & final, length, 0.0),
    }


def no_terms(_: Verdict) -> Parts:
    """Nothing: terms of one's own pay alone."""
    return {}


MIN_REFLECTION = 4  # tokens: fewer cannot name a step and judge it


def _f_len(verdict: Verdict) -> Array:
    return length_factor(verdict.total_tokens, verdict.first_tokens)


# ------------------------------------------------------------------------------------ profiles

PAPER = Profile(
    name="paper",
    template=TemplateRules(TAG, innermost=True, rounds=rounds_by_answers, format_ok=FormatRule()),
    answers=answer_blocks,
    terms=paper_terms,
    first_terms=("r_acc",),
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
BALANCED = dataclasses.replace(PAPER, name="balanced", terms=balanced_terms)
PROFILES = (PAPER, OPENRLHF, VERL_FIXED, GRPO, BALANCED)


def asked_by(prompt: str, profile: Profile) -> Profile:
    """``profile``, under whose format one round is as right as five blocks where the prompt is
    "adaptive" (the first answer is then the final one, too)."""
    rule = profile.template.format_ok
    if prompt != "adaptive" or not isinstance(rule, FormatRule):
        return profile
    either = dataclasses.replace(rule, orders=(FIVE_BLOCKS, ONE_ROUND))
    return dataclasses.replace(
        profile, template=dataclasses.replace(profile.template, format_ok=either)
    )


def profile_named(name: str) -> Profile:
    """The profile of PROFILES that a configuration or a command line names; ValueError if none."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    names = ", ".join(profile.name for profile in PROFILES)
    raise ValueError(f"unknown reward profile {name!r}: choose one of {names}")
