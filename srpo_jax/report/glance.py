"""A run at a glance: what it is, how far it is, how its numbers moved, whether reflections help."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from srpo_jax.report.health import WINDOW
from srpo_jax.report.verdict import UNKNOWN, Verdict, of_rates, of_steps, qualified
from srpo_jax.run.resume import flat_config

Rows = Sequence[Mapping[str, Any]]
Config = Mapping[str, Any]

# Metric -> what a reader sees, how, and what it means.
NUMBERS: dict[str, tuple[str, str, str]] = {
    "reward/mean": ("reward", "{:.3g}", "of a sample, on average"),
    "accuracy/first": ("first answer right", "{:.1%}", "before the reflection"),
    "accuracy/final": ("final answer right", "{:.1%}", "after it"),
    "fix_rate": ("mended", "{:.1%}", "of wrong first answers"),
    "harm_rate": ("spoilt", "{:.1%}", "of right first answers"),
    "format_rate": ("template holds", "{:.1%}", "of samples"),
    "truncated_share": ("cut off", "{:.1%}", "at the budget"),
    "groups_without_signal": ("teach nothing", "{:.1%}", "of groups: equal rewards"),
    "completion_length/mean": ("length", "{:,.0f}", "tokens of a sample"),
    "loss": ("loss", "{:.3g}", ""),
    "grad_norm": ("gradient norm", "{:.3g}", "before clipping"),
    "tokens_per_second": ("tokens/s", "{:,.0f}", ""),
}
_STAGE_2_ONLY = "accuracy/final"  # where it is logged, the loss says nothing


def helped(rows: Rows, evaluations: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """By the first of ``evaluations`` (by name), else the last one while training, else training
    itself."""
    trained = [row for row in rows if row["split"] == "train"]
    for name, rates in evaluations.items():
        return qualified(of_rates(rates, name), trained)
    own = [row for row in rows if {"acc@1", "fix", "harm", "records"} <= row.keys()]
    if own:
        where = f"held out, at step {own[-1]['step']:,}"
        return qualified(of_rates(own[-1], where), trained)
    return qualified(of_steps(trained) or UNKNOWN, trained)


def doing(config: Config, origin: str) -> str:
    """What a run does, in a sentence without an end; "" where its configuration is not known."""
    flat = flat_config(dict(config))
    if "data.train" not in flat:
        return ""
    size, of = flat["data.global_batch_size"], f"of {flat['data.train']}"
    of += f", from {origin}" if origin else ""
    if "grpo" not in config:
        return f"Stage 1, supervised: {size:,} conversations a step {of}"
    each = f"{size:,} prompts x {flat['sampling.group_size']} samples a step"
    return f"Stage 2, reinforcement learning (reward.profile={flat['reward.profile']}): {each} {of}"


def progress(rows: Rows, steps: int) -> str:
    """How far a run is, of ``steps`` (0: not known), and when it will be done at its last pace."""
    known = [row for row in rows if row["split"] == "train"]
    if not known:
        return "no step yet"
    at = known[-1]["step"]
    told = f"step {at:,}" + (f" of {steps:,}" if steps else "")
    seconds = [row["time/step"] for row in known[-WINDOW:] if row.get("time/step")]
    if seconds:
        pace = float(np.median(seconds))
        told += f", {pace:.3g} s a step"
        if steps > at:
            told += f", {datetime.timedelta(seconds=round((steps - at) * pace))} to go"
    if written := known[-1].get("time"):
        when = datetime.datetime.fromtimestamp(written, datetime.UTC)
        told += f"; last row {when:%Y-%m-%d %H:%M} UTC"
    return told


def numbers(rows: Rows) -> Iterator[tuple[str, str, str, str]]:
    """(what, mean of the last steps, mean of the first ones, what it means) of NUMBERS."""
    known = [row for row in rows if row["split"] == "train"]
    two = any(_STAGE_2_ONLY in row for row in known)
    for name, (label, show, meaning) in NUMBERS.items():
        found = [row[name] for row in known if isinstance(row.get(name), int | float)]
        if not found or (two and name in ("loss", "grad_norm")):
            continue
        some = max(1, min(WINDOW, len(found) // 2))
        first, last = (show.format(float(np.mean(part))) for part in (found[:some], found[-some:]))
        yield label, last, first if len(found) > 1 else "", meaning
