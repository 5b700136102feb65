"""What a run's metric rows warn of, and what helps: the ways in which such runs go wrong."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from srpo_jax.report.verdict import knows_nothing
from srpo_jax.run.guard import SandbagWatch

Rows = Sequence[Mapping[str, Any]]

WINDOW = 25  # steps at either end whose means are compared
LATEST = "over the last {} steps"


@dataclass(frozen=True)
class Finding:
    """One thing to look at."""

    title: str
    found: str  # the numbers that say so
    remedy: str
    rollouts: str = ""  # what the page's form of rollouts is to look for, as a query


class Course:
    """Means of a metric over the first and over the last WINDOW steps that have it."""

    def __init__(self, rows: Rows):
        self._rows = [row for row in rows if row["split"] == "train"]

    def values(self, name: str) -> np.ndarray:
        """All finite values in the order of steps."""
        found = [row.get(name) for row in self._rows]
        return np.array([x for x in found if isinstance(x, int | float)], np.float64)

    def first(self, name: str) -> float:
        """NaN, which no bound is below or above, where no row has the metric."""
        return _mean(self.values(name)[:WINDOW])

    def last(self, name: str) -> float:
        """As ``first``."""
        return _mean(self.values(name)[-WINDOW:])

    def total(self, name: str) -> float:
        """The sum over the last WINDOW steps."""
        return float(self.values(name)[-WINDOW:].sum())

    def look(self, watch: SandbagWatch) -> None:
        """Show the watch each step."""
        for row in self._rows:
            watch.look(row["step"], {n: x for n, x in row.items() if x is not None})


def findings(rows: Rows) -> list[Finding]:
    """Of the rows of `srpo_jax.run.metrics.read_rows`; what a run does not log warns of nothing."""
    course = Course(rows)
    return [one for check in CHECKS for one in check(course)]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _sandbagging(course: Course) -> Iterator[Finding]:
    told: list[str] = []
    course.look(SandbagWatch(told.append))
    for text in told[-1:]:
        found, _, remedy = text.partition(": is it wrong on purpose, to be mended? ")
        yield Finding("Wrong first on purpose?", found, remedy, "change=1&order=last")


def _collapse(course: Course) -> Iterator[Finding]:
    name = "block_tokens/reflection"
    before, now = course.first(name), course.last(name)
    if now < 0.4 * before:
        yield Finding(
            "The reflection shrinks",
            f"{name} fell from {before:.3g} to {now:.3g} tokens",
            "Read some rollouts of the last steps. Does the reflection still say anything? Lower "
            "reward.alpha, the weight of the length term, or raise grpo.kl_coef.",
            "order=last",
        )


def _empty_verdict(course: Course) -> Iterator[Finding]:
    margin, said = course.last("detection_margin"), course.last("stated_share")
    if knows_nothing(said, margin):
        yield Finding(
            "The reflection does not know right from wrong",
            f"detection_margin is {margin:.3f}, with a verdict in {_percent(said)} of reflections",
            "It calls right and wrong first answers wrong equally often. reward.verdict, 0.25 for "
            "a start, pays for a true verdict (with grpo.credit=segments, else also for first "
            "answers that are surely wrong); in stage 1's data about half of the first attempts "
            "should be wrong.",
        )


def _no_verdict(course: Course) -> Iterator[Finding]:
    said, tokens = course.last("stated_share"), course.last("block_tokens/reflection")
    if said < 0.1 and tokens >= 1:
        yield Finding(
            "Few reflections state a verdict",
            f"in {_percent(said)} of them stands one of the words that are looked for",
            "So detection and false alarms say nothing. Read some reflections, and name the words "
            "that call an answer right or wrong there in reward.right_words and wrong_words.",
            "order=last",
        )


def _harm(course: Course) -> Iterator[Finding]:
    fixed, harmed = course.total("fix/count"), course.total("harm/count")
    if harmed > fixed:
        yield Finding(
            "Reflection harms more than it mends",
            f"{harmed:,.0f} right answers made wrong, {fixed:,.0f} wrong ones made right, "
            + LATEST.format(min(WINDOW, len(course.values("harm/count")))),
            "Filter rollouts by 'right to wrong'. Does the reflection talk the policy out of them? "
            "reward.profile=balanced pays for keeping as for mending.",
            "change=2&order=last",
        )


def _truncation(course: Course) -> Iterator[Finding]:
    share = course.last("truncated_share")
    if share > 0.05:
        yield Finding(
            "Samples are cut off",
            f"{_percent(share)} of samples reach the budget",
            "Raise sampling.max_new_tokens, or let cut off samples teach less: "
            "grpo.mask_truncated, reward.overlong with reward.overlong_buffer.",
        )


def _no_signal(course: Course) -> Iterator[Finding]:
    share, kept = course.last("groups_without_signal"), course.last("filter/kept_share")
    if share > 0.6:
        yield Finding(
            "Most groups teach nothing",
            f"in {_percent(share)} of groups all samples earn the same",
            "Are the problems too easy or too hard (accuracy/final)? Raise sampling.group_size, "
            "or take other problems; filter.resample fills the batch with groups that teach.",
        )
    elif kept < 0.25:
        yield Finding(
            "The filter leaves little",
            f"{_percent(kept)} of groups lie between filter.low and filter.high",
            "Set filter.resample, widen filter.low and filter.high, or take other problems.",
        )


def _repeats(course: Course) -> Iterator[Finding]:
    repeated, copies = course.last("repeat_share"), course.last("duplicate_share")
    if repeated > 0.3 and repeated > 1.5 * course.first("repeat_share"):
        yield Finding(
            "Samples repeat themselves",
            f"a run of {_percent(repeated)} of a sample's tokens stands in it twice",
            "Read the longest samples. Check the end-of-text token of the chat template, lower "
            "optim.lr or raise grpo.kl_coef.",
            "order=last",
        )
    if copies > 0.5:
        yield Finding(
            "Samples of a group are copies",
            f"{_percent(copies)} of samples equal another one of their group",
            "Raise sampling.temperature, add grpo.entropy_coef, or go on from an earlier step.",
        )


def _entropy(course: Course) -> Iterator[Finding]:
    before, now = course.first("entropy"), course.last("entropy")
    if now < 0.2 * before:
        yield Finding(
            "The entropy collapses",
            f"from {before:.3g} to {now:.3g}",
            "The policy stops trying. Raise grpo.clip_high or grpo.entropy_coef, lower optim.lr.",
        )


def _grading(course: Course) -> Iterator[Finding]:
    failed = sum(course.total(f"grading/{name}") for name in ("timeouts", "crashes"))
    samples = course.total("samples")
    if failed > 0.01 * samples > 0:
        yield Finding(
            "Answers are not graded",
            f"{failed:,.0f} checks ran out of time or crashed in {samples:,.0f} samples",
            "Raise grading.timeout and grading.workers; docs/grading.md says what is read.",
        )
    without = course.total("reward/failed")
    if without > 0:
        yield Finding(
            "Groups without a reward",
            f"{without:,.0f} groups, " + LATEST.format(WINDOW),
            "Their rollouts say why (no reward); docs/rewards.md.",
        )


def _skipped(course: Course) -> Iterator[Finding]:
    skipped = course.values("skipped")
    if len(skipped) and skipped[-1] > 0:
        yield Finding(
            "Updates were left out",
            f"{skipped[-1]:,.0f} updates were not finite",
            "Look at grad_norm and loss before them; lower optim.lr.",
        )


CHECKS: tuple[Callable[[Course], Iterator[Finding]], ...] = (
    _sandbagging,
    _harm,
    _collapse,
    _empty_verdict,
    _no_verdict,
    _truncation,
    _no_signal,
    _repeats,
    _entropy,
    _grading,
    _skipped,
)
