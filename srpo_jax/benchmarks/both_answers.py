"""Completions of our models under a benchmark's rules: both answers, one after the other.

A response in the template says where its answers are, so the rule's own extraction is not needed:
each answer block's content is handed over as the extraction, an option as its letter. A response
without an answer block goes to the rule as it is.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.common import LETTERS, Row, naming_rows
from srpo_jax.benchmarks.judge.client import Judge
from srpo_jax.benchmarks.load import scoring_row
from srpo_jax.data.fields import Record
from srpo_jax.data.records import RecordSource
from srpo_jax.rewards.answers import choice_indices, extract_answer
from srpo_jax.rewards.verifier import Verifier

ROUNDS = {"first": ("first_answer",), "final": ("second_answer", "first_answer")}


def answer_row(record: Record, row: Mapping[str, Any], which: str) -> Row:
    """One completion's first or final answer as a row for ``scoring.score``.

    Args:
        record: the problem, of ``load.load``.
        row: of ``evaluate``: ``response`` and ``blocks`` (texts by name, None where missing).
        which: a key of ROUNDS.
    """
    found = next((row["blocks"][n] for n in ROUNDS[which] if row["blocks"][n] is not None), None)
    if found is None:
        return scoring_row(record, row["response"])
    out = scoring_row(record, found)
    said = extract_answer(found)
    if record.choices:
        chosen = choice_indices(said, record.choices)
        if chosen is not None and len(chosen) == 1:
            said = LETTERS[next(iter(chosen))]
    return out | {"extraction": said}


def score_rows(
    name: str,
    source: RecordSource,
    rows: Sequence[Row],
    mode: str,
    pool: Verifier | None = None,
    judge: Judge | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """Both answers of every completion, scored.

    Args:
        name: of the benchmark.
        source: its records, of ``load.load``.
        rows: of ``evaluate``.
        mode: of ``scoring.MODES``, or ``scoring.JUDGE``.
        pool: of ``scoring.open_pool``.
        judge: for the mode JUDGE.

    Returns:
        ``rows``, those of problems that cannot be read as the last,
        with ``first_correct`` and ``final_correct`` of this mode, ``extraction`` and
        ``prediction`` of the final answer, ``no_answer`` and ``categories`` (groups by table)
        where there are any; and {"first", "final"}: the summaries of ``scoring.accuracies``.

    Raises:
        ValueError naming the problem that is not in ``source``, or whose row lacks a field.
    """
    records = _by_origin(source)
    # A problem that cannot even be read has no fields to score by: it is wrong, in no group.
    unread = [row for row in rows if "reason" in row and row["origin"] not in records]
    problems = len({row["origin"] for row in rows})
    rows = [row for row in rows if "reason" not in row or row["origin"] in records]
    lost = next((row["origin"] for row in rows if row["origin"] not in records), None)
    if lost is not None:
        raise ValueError(f"{lost}: this row's problem is not among the benchmark's; another file?")
    scored: dict[str, list[Row]] = {}
    with naming_rows([row["origin"] for row in rows]):
        for which in ROUNDS:
            answers = [answer_row(records[row["origin"]], row, which) for row in rows]
            found = scoring.score(name, answers, mode, pool, judge)
            scored[which] = [_if_asked(row, one) for row, one in zip(rows, found, strict=True)]
    benchmark = BENCHMARKS[name]
    out = []
    for row, first, final in zip(rows, scored["first"], scored["final"], strict=True):
        new = dict(row, benchmark=name, mode=mode, categories=benchmark.groups(final))
        new |= {"first_correct": bool(first["correct"]), "final_correct": bool(final["correct"])}
        shown = ("extraction", "prediction", "no_answer", "no_judgement")
        out.append(new | {key: final[key] for key in shown if key in final})
    out += [
        dict(row, benchmark=name, mode=mode, categories={}, no_answer=row["reason"])
        for row in unread
    ]
    summaries = {
        which: scoring.accuracies(name, mode, found, unread=len(unread))
        for which, found in scored.items()
    }
    for summary in summaries.values():  # several samples of a problem are one problem
        summary["complete"] = benchmark.counts.get(problems)
    return out, summaries


def _if_asked(row: Mapping[str, Any], scored: Row) -> Row:
    """The score; that of a problem that was never asked is wrong, whatever a rule reads in ""."""
    if "reason" not in row:
        return scored
    empty = dict.fromkeys(("extraction", "prediction"))
    return scored | empty | {"correct": False, "no_answer": row["reason"]}


def _by_origin(source: RecordSource) -> dict[str, Record]:
    """The readable records, without their images; those that cannot be read have no rows."""
    found = {}
    for index in range(len(source)):
        with contextlib.suppress(ValueError):
            record = source[index]
            found[record.origin] = dataclasses.replace(record, images=())
    return found
