"""Do the reflections help? One sentence with its interval, from an evaluation or from training."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Rates = Mapping[str, Any]

STEPS = 25  # last ones of a training that are looked at
FEWEST = 10  # of them
STATED, CHANCE = 0.2, 0.05  # share of reflections with a verdict; detection less false alarms
_Z, _T = 1.96, 2.26  # two-sided 95 %: normal; Student's, of FEWEST steps (of more it is cautious)


@dataclass(frozen=True)
class Verdict:
    """A word, the sentence behind it, and the kind of badge that the word is."""

    word: str
    text: str
    kind: str  # "good", "bad", "mixed", or "" where nothing is known


UNKNOWN = Verdict(
    "Not known yet",
    "No evaluation was made while training (eval.file), and fewer than "
    f"{FEWEST} steps have sampled answers",
    "",
)


def of_rates(rates: Rates, where: str) -> Verdict:
    """Of an evaluation's rates, under its benchmark's rule where there is one; ``where`` names it.

    The interval is the bootstrapped one where there is one, else that of a difference of paired
    shares (Agresti and Min 2005, over problems).
    """
    rates = {**rates, **(rates.get("benchmark") or {})}
    first, fix, harm = rates["acc@1"], rates["fix"], rates["harm"]
    bounds = rates.get("interval", {}).get("net_gain")
    if bounds is None:
        n = rates["records"]
        bounds = paired(n * (1 - first) * fix, n * first * harm, n)
    net = rates.get("net_gain", (1 - first) * fix - first * harm)
    found = _told(f"On {rates['records']:,.0f} problems ({where})", net, bounds, fix, harm)
    points = (rates.get("stop") or {}).get("points") or {}
    if not {"first", "final"} <= points.keys():
        return found
    stopped, whole = (points[name]["tokens"] for name in ("first", "final"))
    cost = f". What follows the first answer takes {whole - stopped:.1f} of {whole:.1f} tokens"
    return dataclasses.replace(found, text=found.text + cost)


def of_steps(rows: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """Of the last STEPS rows of training; None where there are fewer than FEWEST with answers.

    Steps are of different problems, so that their spread gives the interval; samples of one
    problem are not independent.
    """
    known = [row for row in rows if isinstance(row.get("accuracy/net"), int | float)][-STEPS:]
    if len(known) < FEWEST:
        return None
    net = np.array([row["accuracy/net"] for row in known])
    error = _T * net.std(ddof=1) / math.sqrt(len(net))
    fix, harm = (
        sum(row.get(f"{name}/count", 0) for row in known)
        / max(sum(row.get(f"{name}/of", 0) for row in known), 1)
        for name in ("fix", "harm")
    )
    where = f"On the training problems of steps {known[0]['step']:,} to {known[-1]['step']:,}"
    mean = float(net.mean())
    return _told(where, mean, (mean - error, mean + error), fix, harm)


def qualified(found: Verdict, rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """``found``, with what it does not mean where the last training steps show reflections that
    call right and wrong first answers wrong equally often."""
    known = [row for row in rows if isinstance(row.get("detection_margin"), int | float)][-STEPS:]
    mean = lambda name: float(np.mean([row.get(name) or 0.0 for row in known]))  # noqa: E731
    if found.kind != "good" or not known:
        return found
    if not knows_nothing(mean("stated_share"), mean("detection_margin")):
        return found
    doubt = (
        ". But its reflections say of right and wrong first answers the same: what helps is the "
        "second try"
    )
    return Verdict("Yes, as a second try", found.text + doubt, "mixed")


def knows_nothing(stated: float, margin: float) -> bool:
    """Whether verdicts are stated, and worth no more than chance, at these means of
    ``stated_share`` and ``detection_margin``."""
    return stated > STATED and abs(margin) < CHANCE


def paired(fixed: float, harmed: float, n: float) -> tuple[float, float]:
    """A 95 % interval of (fixed - harmed) / n: half a case is added to each cell."""
    fixed, harmed, n = fixed + 0.5, harmed + 0.5, n + 2
    middle = (fixed - harmed) / n
    error = _Z * math.sqrt(max(fixed + harmed - (fixed - harmed) ** 2 / n, 0)) / n
    return middle - error, middle + error


def _told(where: str, net: float, bounds: Sequence[float], fix: float, harm: float) -> Verdict:
    low, high = bounds
    word, kind = "Not clear", "mixed"
    if low > 0:
        word, kind = "Yes", "good"
    elif high < 0:
        word, kind = "No, they harm", "bad"
    elif not (fix or harm):
        word = "No, they change nothing"
    often = "more" if net >= 0 else "less"
    text = (
        f"{where} the final answer is right {100 * abs(net):.1f} points {often} often than the "
        f"first one (95 % interval {100 * low:.1f} to {100 * high:.1f}); {100 * fix:.1f} % of "
        f"wrong first answers were made right, {100 * harm:.1f} % of right ones wrong"
    )
    return Verdict(word, text, kind)
