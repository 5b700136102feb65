"""Scores of prediction rows on a benchmark, in one of three modes, and their summary.

``official_rule`` is the benchmark's own rule. ``strict`` is this project's grader, the same for
every benchmark: the option's letter or text, else numbers and expressions, nothing at random.
``judge`` is a language model's extraction and judgement (``judge``), behind a server.
"""

import contextlib
import re
from collections.abc import Sequence
from typing import Any

from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.common import Benchmark, Row, Scored, choices, each, response, table
from srpo_jax.benchmarks.judge.client import Judge
from srpo_jax.benchmarks.judge.flows import judged
from srpo_jax.rewards.answers import Question, answer_problem, boxed, extract_answer
from srpo_jax.rewards.verifier import Verifier

MODES = ("official_rule", "strict")  # without a server
JUDGE = "judge"
REMARKS = ("no_answer", "drawn", "gold_problem", "no_judgement")  # of Scored; in some rows
NOTES = {  # key of a summary -> what a reader of the accuracy must know
    "no_answer_rows": "{} rows without an answer by rule, counted as wrong",
    "expected_if_drawn": (
        "the official code draws an option at random for those: {:.2f} % on average"
    ),
    "drawn_rows": "{} answers drawn at random with the official seed",
    "no_judgement_rows": "{} rows without a judgement, counted as wrong",
    "gold_problem_rows": "{} golds that cannot be graded, counted as wrong",
    "timeouts": "{} comparisons ended by timeouts, counted as wrong",
    "crashes": "{} comparisons ended by crashes, counted as wrong",
}
NO_TEXT = "the response holds no answer"

_ANNOUNCED = re.compile(r"\banswer\s*(?:is|:)[:\s]*", re.IGNORECASE)


def open_pool(
    benchmark: str, mode: str, workers: int, timeout: float
) -> contextlib.AbstractContextManager[Verifier | None]:
    """The worker processes for ``score``, ``timeout`` in seconds for one comparison; or None."""
    modules = () if mode == "strict" else BENCHMARKS[benchmark].worker_modules
    if mode == JUDGE or modules is None:
        return contextlib.nullcontext()
    return Verifier(workers, timeout, modules=modules)


def score(
    benchmark: str,
    rows: Sequence[Row],
    mode: str,
    pool: Verifier | None = None,
    judge: Judge | None = None,
) -> list[Row]:
    """The rows with ``extraction``, ``prediction``, ``correct``, ``mode``; REMARKS where they hold.

    Args:
        benchmark: a name of BENCHMARKS.
        rows: see ``common``.
        mode: of MODES, or JUDGE.
        pool: of ``open_pool``.
        judge: for JUDGE.

    Raises:
        ValueError: for a benchmark without an official rule.
        RowError: with the index of the row, where a field is missing.
    """
    one = BENCHMARKS[benchmark]
    if mode == "strict":
        scored = _strict(one, rows, pool)
    elif mode == JUDGE:
        assert judge is not None, "the mode needs a judge"
        scored = judged(one, rows, judge)
    elif one.official is None:
        raise ValueError(
            f"{benchmark} has no official rule, a language model judges it: use --mode strict or "
            "--mode judge"
        )
    else:
        scored = one.official(rows, pool)
    out = []
    for row, result in zip(rows, scored, strict=True):
        new = {key: value for key, value in row.items() if key not in REMARKS}
        new |= {key: getattr(result, key) for key in ("extraction", "prediction", "correct")}
        new |= {"mode": mode}
        out.append(new | {key: value for key in REMARKS if (value := getattr(result, key))})
    return out


# ---------------------------------------------------------------------------------------- strict


def strict_answer(row: Row) -> str | None:
    r"""The text that the strict grader reads: the row's final answer, None without one.

    The given extraction; else the last <answer> block, the last \boxed{}, what the last
    "answer is" or "Answer:" announces on its line, or the whole response.
    """
    if row.get("extraction") is not None:
        return str(row["extraction"])
    text = response(row)
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip() or None
    if boxed(text) is not None:
        return text
    announced = list(_ANNOUNCED.finditer(text))
    tail = text[announced[-1].end() :].strip() if announced else ""
    line = tail.split("\n")[0]
    if line.count("**") % 2:  # of "**Answer:** B"
        line = line.replace("**", "", 1)
    return line.strip() or text.strip() or None


def _strict(benchmark: Benchmark, rows: Sequence[Row], pool: Verifier | None) -> list[Scored]:
    assert pool is not None, "strict comparisons need workers"
    answers, golds = each(strict_answer, rows), each(benchmark.golds, rows)
    options = each(choices, rows)
    items = [
        (Question(target, tuple(wanted)), answer)
        for targets, answer, wanted in zip(golds, answers, options, strict=True)
        for target in targets
    ]
    verdicts = iter(pool.check(items))
    scored = []
    for targets, answer, wanted in zip(golds, answers, options, strict=True):
        right = any([next(verdicts) for _ in targets])
        text = (extract_answer(answer) if answer is not None else "") or None
        problems = [answer_problem(target, wanted) for target in targets]
        problem = problems[0] if problems and all(problems) else None
        reason = None if text else NO_TEXT
        scored.append(Scored(text, text, right, reason, gold_problem=problem))
    return scored


# --------------------------------------------------------------------------------------- summary


def accuracies(
    benchmark: str, mode: str, scored: Sequence[Row], *, unread: int = 0
) -> dict[str, Any]:
    """Counts and accuracies (percent) over all rows and over the groups of the official tables.

    ``unread`` further ones could not even be read: wrong in the whole, but in no group, since
    nobody knows theirs. A row without an answer counts as wrong. Where the official rule would draw
    one, ``expected_if_drawn`` is the accuracy that this gives on average.
    """
    one = BENCHMARKS[benchmark]
    summary: dict[str, Any] = {"benchmark": benchmark, "mode": mode}
    summary |= _counts(scored, unread)
    summary["complete"] = one.counts.get(len(scored) + unread)
    summary |= {"unread_rows": unread} if unread else {}
    for key in REMARKS:
        summary[f"{key}_rows"] = sum(key in row for row in scored)
    drawn = [row for row in scored if one.draws and row.get("no_answer") == one.draws]
    if drawn:
        right = summary["correct"] + sum(1 / len(choices(row)) for row in drawn)
        summary["expected_if_drawn"] = round(100 * right / (len(scored) + unread), 2)
    summary["tables"] = _tables(one, scored)
    return summary | (one.measures.entries(scored) if one.measures else {})


def _tables(benchmark: Benchmark, scored: Sequence[Row]) -> dict[str, dict[str, dict]]:
    members: dict[str, dict[str, list[Row]]] = {}
    for row in scored:
        for name, groups in benchmark.groups(row).items():
            for group in groups:
                members.setdefault(name, {}).setdefault(group, []).append(row)
    tables = {}
    for name, groups in members.items():
        counts = {group: _counts(groups[group]) for group in sorted(groups, key=benchmark.order)}
        if benchmark.best_first:
            counts = dict(sorted(counts.items(), key=lambda item: -item[1]["accuracy"]))
        tables[name] = counts
    return tables


def _counts(rows: Sequence[Row], unread: int = 0) -> dict[str, float]:
    correct, total = sum(bool(row["correct"]) for row in rows), len(rows) + unread
    accuracy = round(100 * correct / total, 2) if total else 0.0
    return {"correct": correct, "total": total, "accuracy": accuracy}


def markdown(summary: dict[str, Any]) -> str:
    """The summary as a page of tables."""
    lines = [
        f"# {summary['benchmark']}, {summary['mode']}",
        "",
        f"{summary['correct']} of {summary['total']} right: {summary['accuracy']:.2f} %"
        + ("" if summary["complete"] else " (not the full benchmark)"),
        "",
    ]
    lines += [f"- {note}" for note in notes(summary)]
    for name, groups in summary["tables"].items():
        rows = [(g, c["correct"], c["total"], f"{c['accuracy']:.2f}") for g, c in groups.items()]
        lines += ["", f"## {name}", "", table(("group", "right", "of", "%"), rows)]
    if measures := BENCHMARKS[summary["benchmark"]].measures:
        lines += measures.page(summary)
    return "\n".join(lines) + "\n"


def notes(summary: dict[str, Any]) -> list[str]:
    """Those of NOTES that hold, one line each."""
    return [text.format(summary[key]) for key, text in NOTES.items() if summary.get(key)]
