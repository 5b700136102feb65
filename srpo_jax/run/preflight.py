"""Cheap looks before a run, and at its first update: would what it learns from be sound?

Each returns one line, and raises RunError with the remedy where the run could not be meant. (That
image tokens and image features are as many is looked at with the first records: `budgets.Reader`.)
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from srpo_jax.data.errors import RecordError
from srpo_jax.data.records import RecordSource
from srpo_jax.learn import grpo
from srpo_jax.run import processes
from srpo_jax.run.sections import GrpoSettings
from srpo_jax.sampling.sampler import SamplingConfig
from srpo_jax.structs import BLOCKS, RunError, Verdict

ANSWERS = 256  # first records whose gold answers are looked at
# Nats a token, on average over a rollout, by which the sampler's log-probs may differ from the
# update's: other kernels round otherwise. A wrong mask, position or temperature costs more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
GO_ON = "--config.preflight=False goes on all the same"


def before_training(
    settings: GrpoSettings, cfg: grpo.GrpoConfig, source: RecordSource, tokenizer: Any
) -> None:
    """What can be looked at on the host, said line by line."""
    rounds, cap = 2 if settings.data.prompt == "srpo" else 1, settings.sampling.max_new_tokens
    count = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
    for line in (check_answers(source, count, cap, rounds), check_reward(cfg)):
        processes.say(f"preflight: {line}", "preflight")


def check_answers(source: RecordSource, count: Callable[[str], int], cap: int, rounds: int) -> str:
    """Do gold answers, ``rounds`` times and without a word beside them, fit into ``cap`` tokens?

    ``count`` gives the tokens of a text. RunError where most do not.
    """
    needed = {}
    for index in range(min(len(source), ANSWERS)):
        try:
            record = source[index]
        except RecordError:  # set aside by the loader, with its reason
            continue
        needed[record.origin] = rounds * count(record.answer)
    long = [origin for origin, tokens in needed.items() if tokens > cap]
    most = max(needed.values(), default=0)
    told = f"gold answers take up to {most} of sampling.max_new_tokens={cap}"
    if not long:
        return f"{told} ({len(needed)} records)"
    told = f"{len(long)} of {len(needed)} {told}, and can only be wrong; first {long[0]}"
    if 2 * len(long) > len(needed):
        raise RunError(f"{told}: raise --config.sampling.max_new_tokens; {GO_ON}")
    return told


def check_reward(cfg: grpo.GrpoConfig) -> str:
    """Groups of equal samples, all right or all wrong, give no gradient, and right ones earn
    no less.

    RunError where that does not hold, or a term is not a number.
    """
    shape = (2, 4 * cfg.forks)
    yes, right = np.ones(shape, bool), np.repeat([[True], [False]], shape[1], axis=1)
    # Lengths that the budget allows, for terms that have a price by the token.
    tokens = np.full(shape, min(100, max(1, (cfg.length_cap or 200) // 2)), np.int32)
    verdict = Verdict(
        **dict.fromkeys(("has_first", "has_second", "format_ok"), yes),
        **dict.fromkeys(("reflection_ok", "reflection_new"), yes),
        **dict.fromkeys(("first_correct", "final_correct"), right),
        **dict.fromkeys(("first_tokens", "first_end"), tokens),
        stated=np.where(right, 1, -1).astype(np.int32),
        total_tokens=2 * tokens,
        block_tokens=np.full((*shape, len(BLOCKS)), 40, np.int32),
        own=np.zeros((*shape, len(cfg.own)), np.float32) if cfg.own else None,
    )
    terms = grpo.reward_terms(cfg, verdict)
    name = f"reward.profile={cfg.profile.name}"
    for term, values in terms.parts.items():
        values = np.asarray(values)
        if not np.isfinite(values).all():
            odd = values[~np.isfinite(values)][0]
            raise RunError(f"{name}: term {term} is {odd} for a plain sample; mend it; {GO_ON}")
    advantages = grpo.credited(cfg, terms, verdict, counted_PG=yes)  # pyright: ignore[reportArgumentType]
    if any(np.asarray(one).any() for one in advantages):  # NaN as well
        raise RunError(
            f"{name}: a group of equal samples has an advantage other than 0: is grpo.adv_eps="
            f"{cfg.adv_eps} above 0, and does each term depend on the sample alone? {GO_ON}"
        )
    good, bad = np.asarray(terms.total)[:, 0]
    if (good < bad or good == bad == 0) and not cfg.own:  # whose worth is not known
        raise RunError(
            f"{name}: right answers earn {good:.3g}, wrong ones {bad:.3g}; mend the terms or their "
            f"weights; {GO_ON}"
        )
    return f"right answers earn {good:.3g}, wrong ones {bad:.3g}; groups of equals teach nothing"


def truncation_note(settings: GrpoSettings) -> str | None:
    """What to say where samples are drawn from fewer tokens than the update reckons with."""
    sampling, plain = settings.sampling, SamplingConfig(max_new_tokens=1)
    names = [n for n in ("top_k", "top_p", "min_p") if getattr(sampling, n) != getattr(plain, n)]
    if not names or settings.grpo.tis_cap:
        return None
    used = ", ".join(f"sampling.{name}={getattr(sampling, name)}" for name in names)
    return (
        f"note: {used} draws from a part of the distribution that the update takes for the whole: "
        "its gradient is biased; set --config.grpo.tis_cap=2.0 to weigh samples, or switch it off"
    )


def check_sampler(metrics: Mapping[str, Any], dtype: str, *, engine: bool = False) -> str:
    """Does the update reckon with the distribution that was sampled from, by an ``engine``?

    ``metrics`` are those of a rollout's first update; RunError beyond TOLERANCE.
    """
    mean, most = (float(metrics[f"sampler/logp_diff_{name}"]) for name in ("mean", "max"))
    told = f"sampler and update differ by {mean:.2g} nats a token, at most {most:.2g}"
    if mean <= TOLERANCE[dtype]:
        return told
    remedy = f"compare with --config.model.attention=xla or --config.model.dtype=float32; {GO_ON}"
    if engine:
        remedy = (
            "the engine has other weights (does it read sampling.engine.folder?) or tells other "
            "log-probs (vLLM: --logprobs-mode processed_logprobs)"
        )
    raise RunError(
        f"{told}; more than {TOLERANCE[dtype]:g} on average is no rounding of {dtype}: {remedy}"
    )
