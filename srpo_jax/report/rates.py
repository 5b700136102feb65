"""From evaluated rows to rates, with bootstrap intervals where they are wanted."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from srpo_jax.structs import BLOCKS

Row = dict[str, Any]

# Rate -> (counted, of): sums over samples whose ratio it is.
RATES = {
    "acc@1": ("first", "samples"),
    "acc@2": ("final", "samples"),
    "fix": ("fixed", "wrong_first"),
    "harm": ("harmed", "first"),
    "net_gain": ("gain", "samples"),
    "reflected": ("reflected", "samples"),
    "acc@2/reflected": ("reflected_final", "reflected"),
    "acc@2/one_round": ("one_round_final", "one_round"),
    "format_rate": ("format", "samples"),
    "truncated": ("truncated", "samples"),
    "tokens": ("tokens", "samples"),
    **{f"tokens/{block}": (block, "samples") for block in BLOCKS},
}


def rates(rows: Sequence[Row], *, bootstrap: int = 0, seed: int = 0) -> dict[str, Any]:
    """Rates over all samples.

    fix is the share of wrong first answers whose final answer is right, harm that of right first
    answers whose final answer is wrong, net_gain is acc@2 - acc@1. reflected is the share of
    samples with a reflection; acc@2/reflected is of those, acc@2/one_round of those that end after
    their first answer. A rate of nothing is 0. "unasked" of the records did not fit or could not
    be read; they are among the wrong ones.

    Args:
        rows: of an evaluation, one for each completion.
        bootstrap: resamples of the RECORDS (samples of one problem are not independent) for the
            95 % intervals under "interval"; 0: none.
        seed: of the resampling.
    """
    origins = {origin: i for i, origin in enumerate(dict.fromkeys(row["origin"] for row in rows))}
    sums = {name: np.zeros(len(origins)) for pair in RATES.values() for name in pair}
    for row in rows:
        first, final, i = row["first_correct"], row["final_correct"], origins[row["origin"]]
        tokens = dict(zip(BLOCKS, row["block_tokens"], strict=True))
        reflected = tokens["reflection"] > 0
        one_round = tokens["first_answer"] > 0 and not tokens["second_answer"]
        counted = {
            "samples": 1,
            "first": first,
            "final": final,
            "wrong_first": not first,
            "fixed": final and not first,
            "harmed": first and not final,
            "gain": int(final) - int(first),
            "format": row["format_ok"],
            "reflected": reflected,
            "reflected_final": reflected and final,
            "one_round": one_round,
            "one_round_final": one_round and final,
            "truncated": row["truncated"],
            "tokens": row["tokens"],
            **tokens,
        }
        for name, value in counted.items():
            sums[name][i] += value
    counted, of = (np.stack([sums[pair[i]] for pair in RATES.values()], 1) for i in (0, 1))
    means = counted.sum(0) / np.maximum(of.sum(0), 1)
    found: dict[str, Any] = {"records": len(origins), "samples": len(rows)}
    found["unasked"] = len({row["origin"] for row in rows if "reason" in row})
    found |= dict(zip(RATES, means.tolist(), strict=True))
    if bootstrap and origins:
        ends = interval(counted, of, resamples=bootstrap, seed=seed).T.round(6)
        found["interval"] = dict(zip(RATES, ends.tolist(), strict=True))
    return found


def interval(
    counted: np.ndarray,
    of: np.ndarray,
    *,
    resamples: int,
    seed: int,
    times: np.ndarray | None = None,
    empty: float = 0.0,
) -> np.ndarray:
    """The 2.5 % and 97.5 % points, [2, M], of sum(counted) / sum(of) over resampled problems.

    Args:
        counted, of: [P, M], what each problem adds to the sums of each measure.
        resamples: how many.
        seed: of the resampling.
        times: [P], how many problems each row stands for; one without it.
        empty: the ratio of a resample whose ``of`` is 0; NaN leaves such a resample out.
    """
    times = np.ones(len(counted), int) if times is None else times
    rng, n = np.random.default_rng(seed), int(times.sum())
    ratios = np.full((resamples, counted.shape[1]), empty)
    for start in range(0, resamples, 100):  # not at once: problems times resamples may be large
        draws = rng.multinomial(n, times / n, min(100, resamples - start)).astype(float)
        number = draws @ of
        part = ratios[start : start + len(draws)]
        np.divide(draws @ counted, number, out=part, where=number > 0)
    ratios[:, np.isnan(ratios).all(0)] = 0.0
    return np.nanpercentile(ratios, (2.5, 97.5), axis=0)
