"""What several samples, an early stop, or another model change: pure functions on evaluated rows.

A row is one completion as ``samples.jsonl`` holds it. Rows of one problem share their ``origin``.
Rates are shares of 1, lengths are in tokens.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from srpo_jax.data.errors import shown
from srpo_jax.report.rates import interval
from srpo_jax.rewards.answers import MAX_ANSWER_CHARS, choice_indices, extract_answer, plain_text
from srpo_jax.rewards.quantities import parse_quantity, same_quantity

Row = dict[str, Any]
Vote = tuple[str, Any]  # what is read in an answer, and the reading

CONFIDENT = 0.9  # fixed beforehand: a threshold chosen on the rows it is judged on flatters itself
CURVE_QUANTILES = tuple(i / 10 for i in range(11))
BOOTSTRAP = 10_000
_SHOWN = 3  # problems named in an error


def accounts(rows: Sequence[Row]) -> dict[str, Any]:
    """What rows tell beyond rates: "pass@k" and "maj@k" by k (as text), and "stop" (`stop_curve`).

    k: powers of two up to the samples of each problem, and all of them; without several samples
    there are neither, and no "stop" where rows do not tell of their first answer's end.
    """
    most = min(Counter(row["origin"] for row in rows).values())
    found: dict[str, Any] = {}
    if all({"tokens_to_first", "first_confidence"} <= row.keys() for row in rows):
        found["stop"] = stop_curve(rows)
    if most > 1:
        ks = sorted({2**i for i in range(most.bit_length())} | {most})
        found["pass@k"] = {str(k): share for k, share in pass_at_k(rows, ks).items()}
        found["maj@k"] = {str(k): share for k, share in majority_at_k(rows, ks).items()}
    return found


# ------------------------------------------------------------------------------ several samples


def pass_at_k(rows: Sequence[Row], ks: Sequence[int]) -> dict[int, float]:
    """The chance that one of k samples has a right final answer, by k, averaged over problems.

    Without bias from the n >= k samples of a problem, c of them right: 1 - C(n-c, k) / C(n, k)
    (Chen et al. 2021, "Evaluating Large Language Models Trained on Code").

    Raises:
        ValueError where there are no rows, or a problem has fewer than k samples.
    """
    problems = _problems(rows, ks)
    return {
        k: float(np.mean([_pass([row["final_correct"] for row in own], k) for own in problems]))
        for k in ks
    }


def _pass(correct: Sequence[bool], k: int) -> float:
    n, right = len(correct), sum(map(bool, correct))
    return float(1 - Fraction(math.comb(n - right, k), math.comb(n, k)))


def majority_at_k(rows: Sequence[Row], ks: Sequence[int]) -> dict[int, float]:
    """The share of problems whose most frequent final answer in the first k samples is right.

    Answers that the grader reads as the same option or number vote together, others where their
    text is the same. Of equally frequent answers the one that came first wins. A sample without an
    answer does not vote; a problem without votes is wrong.

    Args:
        rows: with ``final_answer``, and ``choices`` where the problem has options.
        ks: numbers of samples, counted in the order of ``sample``; too many raise as `pass_at_k`.
    """
    problems = _problems(rows, ks)
    return {k: float(np.mean([_majority(own[:k]) for own in problems])) for k in ks}


def _majority(rows: Sequence[Row]) -> bool:
    camps: list[tuple[Vote, list[Row]]] = []  # each with what its first row answers
    for row in rows:
        if (vote := _vote(row)) is None:
            continue
        own = next((own for other, own in camps if _same(other, vote)), [])
        if not own:
            camps.append((vote, own))
        own.append(row)
    most = max((own for _, own in camps), key=len, default=None)
    return bool(most and most[0]["final_correct"])


def _vote(row: Row) -> Vote | None:
    """What a sample votes for: an option, a quantity or a text; None without an answer."""
    answer = row["final_answer"]
    if answer is None or not answer.strip():
        return None
    if len(answer) > MAX_ANSWER_CHARS:  # as the grader, which does not read it
        return "text", answer
    text = plain_text(extract_answer(answer))
    choices = tuple(row.get("choices") or ())
    if choices or not re.fullmatch("[a-z]", text):  # x and e are variables
        options = choice_indices(text, choices)
        if options is not None:
            return "option", options
    quantity = parse_quantity(text)
    if quantity is not None:
        return "quantity", quantity
    words = re.search("[A-Za-z]{3}", text) and "\\" not in text
    return "text", "".join((text.casefold() if words else text).split())


def _same(a: Vote, b: Vote) -> bool:
    if a[0] == b[0] == "quantity":
        return same_quantity(a[1], b[1])
    return a == b


def _problems(rows: Sequence[Row], ks: Sequence[int]) -> list[list[Row]]:
    """The rows of each problem in the order of their samples, at least max(ks) of them."""
    if not rows:
        raise ValueError("no rows to account for")
    if any(k < 1 for k in ks):
        raise ValueError(f"k must be at least 1, found {min(ks)}")
    problems: dict[str, dict[int, Row]] = {}
    for row in rows:
        own = problems.setdefault(row["origin"], {})
        if row["sample"] in own:
            raise ValueError(f"{row['origin']}: sample {row['sample']} is there twice")
        own[row["sample"]] = row
    for origin, own in problems.items():
        if len(own) < max(ks, default=1):
            raise ValueError(f"{origin}: {len(own)} samples are too few for k = {max(ks)}")
    return [[own[sample] for sample in sorted(own)] for own in problems.values()]


# ---------------------------------------------------------------------------------- early stops


def stop_curve(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy against tokens when completions stop after a first answer that is confident enough.

    Confidence is the mean probability of the tokens of the first answer block. A completion that
    stops has its first answer's verdict and its tokens so far, any other its final answer's and
    all of its tokens. Without a first answer, or without a confidence, it goes on to its end.

    Args:
        rows: with ``first_correct``, ``final_correct``, ``tokens`` (of the whole completion),
            ``tokens_to_first`` (up to and with the first answer's closing tag; None without one)
            and ``first_confidence`` (None where it is not known).

    Returns:
        ``points``: "first" (stop after every first answer), "confident" (at the threshold
        CONFIDENT, which is no choice made on these rows) and "final" (never stop); ``curve``: the
        same at the quantiles of the confidences seen, a description of the trade-off and not an
        offer to pick its best point. Each has accuracy, tokens (mean) and stopped (share), those
        at a threshold also ``threshold``, those of the curve ``quantile``.

    Raises:
        ValueError where there are no rows.
    """
    if not rows:
        raise ValueError("no rows to account for")
    ends = np.array([row["tokens_to_first"] is not None for row in rows])
    confidence = np.array([row["first_confidence"] for row in rows], float)  # NaN for None
    known = confidence[ends & np.isfinite(confidence)]
    thresholds = np.quantile(known, CURVE_QUANTILES).tolist() if len(known) else []

    def at(threshold: float) -> dict[str, float]:
        return {"threshold": threshold} | _stopped(rows, ends & (confidence >= threshold))

    return {
        "points": {
            "first": _stopped(rows, ends),
            "confident": at(CONFIDENT),
            "final": _stopped(rows, np.zeros(len(rows), bool)),
        },
        "curve": [
            {"quantile": quantile} | at(threshold)
            for quantile, threshold in zip(CURVE_QUANTILES, thresholds, strict=False)
        ],
        "without_confidence": len(rows) - len(known),
    }


def trade_off(stop: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(mean tokens, accuracy) of a `stop_curve`, from its lowest threshold to never stopping."""
    points = (*stop["curve"], stop["points"]["final"])
    return [(point["tokens"], point["accuracy"]) for point in points]


def accuracy_at(points: Sequence[Sequence[float]], tokens: float) -> float | None:
    """Accuracy at so many mean tokens, drawn between two points of a `trade_off`. None below the
    shortest, which is to stop after every first answer; beyond the longest its accuracy."""
    ordered = sorted(map(tuple, points))
    if tokens < ordered[0][0] - 0.01:
        return None
    return float(np.interp(tokens, [p[0] for p in ordered], [p[1] for p in ordered]))


def _stopped(rows: Sequence[Row], stop: np.ndarray) -> dict[str, float]:
    """Accuracy and mean tokens where the marked completions stop after their first answer."""
    stopping = list(zip(rows, stop.tolist(), strict=True))
    correct = [bool(row["first_correct" if stops else "final_correct"]) for row, stops in stopping]
    tokens = [row["tokens_to_first" if stops else "tokens"] for row, stops in stopping]
    return {
        "accuracy": float(np.mean(correct)),
        "tokens": float(np.mean(tokens)),
        "stopped": float(stop.mean()),
    }


# ----------------------------------------------------------------------------------- two models


def paired(
    base_rows: Sequence[Row],
    new_rows: Sequence[Row],
    key: str = "final_correct",
    *,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
) -> dict[str, Any]:
    """Whether a model differs from another on the same problems.

    Problems are matched by ``id`` where ids and origins correspond one to one on both sides, else
    by ``origin`` (which holds the path of the data). A problem's value is the mean over its
    samples.

    Args:
        base_rows, new_rows: of the two models.
        key: a verdict of the rows.
        bootstrap: resamples of the problems for the 95 % interval.
        seed: of the resampling.

    Returns:
        problems; base, new and difference (means); low and high (of the difference); better and
        worse (numbers of problems); p: two-sided, of so uneven a split of the problems that
        changed, if each were as likely to go either way. This is McNemar's exact test for one
        sample a problem, else the sign test; ``test`` says which.

    Raises:
        ValueError naming what differs where the problems are not the same, or a row lacks ``key``.
    """
    name = _matching_name(base_rows, new_rows)
    base, new = _means(base_rows, key, name), _means(new_rows, key, name)
    _check_same(base_rows, new_rows, name)
    change = [new[p] - base[p] for p in base]
    values, counts = np.unique(np.array([float(c) for c in change]), return_counts=True)
    # Resampling problems is drawing how often each value of the difference occurs.
    low, high = interval(
        values[:, None], np.ones((len(values), 1)), times=counts, resamples=bootstrap, seed=seed
    )[:, 0].tolist()
    better, worse = sum(c > 0 for c in change), sum(c < 0 for c in change)
    single = len(base_rows) == len(new_rows) == len(base)
    return {
        "key": key,
        "problems": len(base),
        "base": float(sum(base.values()) / len(base)),
        "new": float(sum(new.values()) / len(base)),
        "difference": float(sum(change) / len(change)),
        "low": low,
        "high": high,
        "better": better,
        "worse": worse,
        "p": _binomial_p(better, worse),
        "test": "McNemar, exact" if single else "sign test, exact",
    }


def _matching_name(*sides: Sequence[Row]) -> str:
    """The field that tells problems apart."""
    if not all(sides):
        raise ValueError("no rows to compare")
    name = "id"
    for rows in sides:
        pairs = {(row.get("id"), row.get("origin", row.get("id"))) for row in rows}
        ids, origins = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
        if None in origins:
            raise ValueError("a row has neither 'id' nor 'origin'")
        if None in ids or not len(ids) == len(origins) == len(pairs):
            name = "origin"
    if name == "origin" and any("origin" not in row for rows in sides for row in rows):
        raise ValueError("ids do not tell problems apart, and a row has no 'origin'")
    return name


def _check_same(base_rows: Sequence[Row], new_rows: Sequence[Row], name: str) -> None:
    """ValueError naming what two sets of rows do not share: problems, or the gold of one."""
    base = {row[name]: row.get("gold") for row in base_rows}
    new = {row[name]: row.get("gold") for row in new_rows}
    texts = []
    for side, own, other in (("base", base, new), ("new", new, base)):
        if missing := [problem for problem in own if problem not in other]:
            some = ", ".join(map(str, missing[:_SHOWN])) + (", ..." * (len(missing) > _SHOWN))
            texts.append(f"{len(missing)} only in the {side} rows ({some})")
    if texts:
        raise ValueError(f"different problems, by {name}: " + "; ".join(texts))
    for problem, gold in base.items():
        if gold != new[problem]:
            raise ValueError(
                f"different golds of {problem}: {shown(gold)} and {shown(new[problem])}"
            )


def _means(rows: Sequence[Row], key: str, name: str) -> dict[Any, Fraction]:
    """The mean of a verdict over the samples of each problem, exactly: equal means must be ties."""
    values: dict[Any, list[bool]] = {}
    for row in rows:
        if key not in row:
            raise ValueError(f"a row of {row.get(name)} has no {key!r}")
        values.setdefault(row[name], []).append(bool(row[key]))
    return {problem: Fraction(sum(own), len(own)) for problem, own in values.items()}


def _binomial_p(better: int, worse: int) -> float:
    """The chance of a split at least as uneven as this, of fair coins; 1 where nothing changed."""
    n = better + worse
    term = tail = 1  # C(n, 0)
    for i in range(1, min(better, worse) + 1):
        term = term * (n - i + 1) // i
        tail += term
    return min(1.0, float(Fraction(2 * tail, 2**n)))
