"""Scores of prediction rows on a benchmark, in one of three modes, and their summary.

``official_rule`` is the benchmark's own rule. ``strict`` is this project's grader, the same for
every benchmark: the option's letter or text, else numbers and math-verify, nothing at random.
``judge`` is a language model's extraction and judgement (``judge``), behind a server.
"""

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from srpo_jax.benchmarks import (
    emma,
    mathverse,
    mathvision,
    mathvista,
    mmk12,
    mmmu,
    mmmu_pro,
    olympiadbench,
    wemath,
)
from srpo_jax.benchmarks.common import (
    Row,
    RowError,
    Scored,
    choices,
    each,
    given_extraction,
    gold,
    response,
)
from srpo_jax.rewards.answers import answer_problem, boxed, extract_answer
from srpo_jax.rewards.verifier import Verifier

if TYPE_CHECKING:
    from srpo_jax.benchmarks.judge.client import Judge

BENCHMARKS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        mathvista, mathvision, mathverse, mmmu_pro, mmmu, emma, olympiadbench, wemath, mmk12,
    )
}  # fmt: skip
MODES = ("official_rule", "strict")  # without a server
JUDGE = "judge"
REMARKS = ("no_answer", "drawn", "gold_problem", "no_judgement")  # fields of some scored rows
NO_TEXT = "the response holds no answer"

_ANNOUNCED = re.compile(r"\banswer\s*(?:is|:)[:\s]*", re.IGNORECASE)


def worker_modules(benchmark: str, mode: str) -> tuple[str, ...] | None:
    """What the workers of a pool must import; None where the scoring needs no pool."""
    if mode == "strict":
        return ()
    if mode == JUDGE:
        return None
    return getattr(BENCHMARKS[benchmark], "WORKER_MODULES", None)


def score(
    benchmark: str,
    rows: Sequence[Row],
    mode: str,
    pool: Verifier | None = None,
    judge: "Judge | None" = None,
    advance: Callable[[int], Any] = lambda n: None,
) -> list[Row]:
    """The rows with ``extraction``, ``prediction``, ``correct`` and ``mode``.

    Where there is no answer by rule, ``no_answer`` says why; ``drawn`` marks an answer that the
    official rule draws at random with its seed, ``gold_problem`` a gold that cannot be graded,
    ``no_judgement`` says why the judge gave none.

    Args:
        benchmark: a name of BENCHMARKS.
        rows: see ``common``.
        mode: of MODES, or JUDGE.
        pool: where ``worker_modules`` is not None.
        judge: for JUDGE.
        advance: called with 1 for every row that the judge is done with.

    Raises:
        ValueError for a benchmark without an official rule; RowError, with the index of the row,
        where a field is missing.
    """
    module = BENCHMARKS[benchmark]
    if mode == "strict":
        scored = _strict(module, rows, pool)
    elif mode == JUDGE:
        from srpo_jax.benchmarks.judge.flows import judged  # its client takes seconds to import

        scored = judged(module, rows, judge, advance)
    elif module.official is None:
        raise ValueError(module.NO_RULE)
    else:
        scored = module.official(list(rows), pool)
    out = []
    for row, result in zip(rows, scored, strict=True):
        new = {key: value for key, value in row.items() if key not in REMARKS}
        new |= {
            "extraction": result.extraction,
            "prediction": result.prediction,
            "correct": result.correct,
            "mode": mode,
        }
        if result.no_answer is not None:
            new["no_answer"] = result.no_answer
        if result.drawn:
            new["drawn"] = True
        if result.no_judgement is not None:
            new["no_judgement"] = result.no_judgement
        if mode == "strict" and (problem := _gold_problem(module, row)):
            new["gold_problem"] = problem
        out.append(new)
    return out


# ---------------------------------------------------------------------------------------- strict


def strict_answer(row: Row) -> str | None:
    r"""The text that the strict grader reads: the row's final answer, None without one.

    The given extraction; else the last <answer> block, the last \boxed{}, what the last
    "answer is" or "Answer:" announces on its line, or the whole response.
    """
    given = given_extraction(row)
    if given is not None:
        return str(given)
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


def _golds(module: ModuleType, row: Row) -> list[str]:
    return module.golds(row) if hasattr(module, "golds") else [gold(row)]


def _gold_problem(module: ModuleType, row: Row) -> str | None:
    problems = [answer_problem(answer, choices(row)) for answer in _golds(module, row)]
    return problems[0] if problems and all(problems) else None


def _strict(module: ModuleType, rows: Sequence[Row], pool: Verifier) -> list[Scored]:
    answers = each(strict_answer, rows)
    golds = each(lambda row: _golds(module, row), rows)
    options = each(choices, rows)
    items = [
        (target, answer, wanted)
        for targets, answer, wanted in zip(golds, answers, options, strict=True)
        for target in targets
    ]
    verdicts = iter(pool.check(items))
    scored = []
    for targets, answer in zip(golds, answers, strict=True):
        right = any([next(verdicts) for _ in targets])
        text = extract_answer(answer) if answer is not None else ""
        reason = None if text else NO_TEXT
        scored.append(Scored(text or None, text or None, right, reason))
    return scored


# --------------------------------------------------------------------------------------- summary


def summarise(benchmark: str, mode: str, scored: Sequence[Row]) -> dict[str, Any]:
    """Counts and accuracies (percent) over all rows and over the groups of the official tables.

    A row without an answer counts as wrong. Where the official rule would draw one,
    ``expected_if_drawn`` is the accuracy that this gives on average.
    """
    module = BENCHMARKS[benchmark]
    summary: dict[str, Any] = {"benchmark": benchmark, "mode": mode}
    summary |= _counts(scored)
    summary["complete"] = module.COUNTS.get(len(scored))
    for key in REMARKS:
        summary[f"{key}_rows"] = sum(key in row for row in scored)
    chances = sum(
        1 / len(choices(row))
        for row in scored
        if getattr(module, "DRAWS", None) and row.get("no_answer") == module.DRAWS
    )
    if chances:
        right = summary["correct"] + chances
        summary["expected_if_drawn"] = round(100 * right / len(scored), 2)
    summary["tables"] = _tables(module, scored)
    if module is wemath:
        correct = [row["correct"] for row in scored]
        summary["four_dimensions"] = wemath.four_dimensions(scored, correct)
    return summary


def _tables(module: ModuleType, scored: Sequence[Row]) -> dict[str, dict[str, dict]]:
    members: dict[str, dict[str, list[Row]]] = {}
    for row in scored:
        for table, groups in module.groups(row).items():
            for group in groups:
                members.setdefault(table, {}).setdefault(group, []).append(row)
    order = getattr(module, "order", str)
    tables = {
        table: {group: _counts(members[table][group]) for group in sorted(groups, key=order)}
        for table, groups in members.items()
    }
    if module is mathvista:  # its tables list the best first
        tables = {
            table: dict(sorted(groups.items(), key=lambda g: -g[1]["accuracy"]))
            for table, groups in tables.items()
        }
    return tables


def _counts(rows: Sequence[Row]) -> dict[str, float]:
    correct = sum(bool(row["correct"]) for row in rows)
    accuracy = round(100 * correct / len(rows), 2) if rows else 0.0
    return {"correct": correct, "total": len(rows), "accuracy": accuracy}


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
    for table, groups in summary["tables"].items():
        lines += ["", f"## {table}", "", "| group | right | of | % |", "|---|---:|---:|---:|"]
        lines += [
            f"| {group.replace('|', '/')} | {c['correct']} | {c['total']} | {c['accuracy']:.2f} |"
            for group, c in groups.items()
        ]
    if summary.get("four_dimensions"):
        lines += ["", "## four dimensions", "", "| measure | strict | loose |", "|---|---:|---:|"]
        lines += _dimension_lines(summary["four_dimensions"])
    return "\n".join(lines) + "\n"


def _dimension_lines(metrics: dict[str, Any]) -> list[str]:
    both = metrics["strict"], metrics["loose"]
    lines = ["| score | " + " | ".join(f"{side['score']:.2f}" for side in both) + " |"]
    for name in ("InsufficientKnowledge", "InadequateGeneralization"):
        share = f"{metrics[name]['percent']:.2f} ({metrics[name]['count']})"
        lines.append(f"| {name} | {share} | {share} |")
    for name in ("CompleteMastery", "RoteMemorization"):
        shares = [f"{side[name]['percent']:.2f} ({side[name]['count']})" for side in both]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return lines


def notes(summary: dict[str, Any]) -> list[str]:
    """What a reader of the accuracy must know, one line each."""
    out = []
    if summary["no_answer_rows"]:
        out.append(f"{summary['no_answer_rows']} rows without an answer by rule, counted as wrong")
    if "expected_if_drawn" in summary:
        out.append(
            "the official code draws an option at random for those: "
            f"{summary['expected_if_drawn']:.2f} % on average"
        )
    if summary["drawn_rows"]:
        out.append(f"{summary['drawn_rows']} answers drawn at random with the official seed")
    if summary["no_judgement_rows"]:
        out.append(f"{summary['no_judgement_rows']} rows without a judgement, counted as wrong")
    if summary["gold_problem_rows"]:
        out.append(f"{summary['gold_problem_rows']} golds that cannot be graded, counted as wrong")
    for key in ("timeouts", "crashes"):
        if summary.get(key):
            out.append(f"{summary[key]} comparisons ended by {key}, counted as wrong")
    return out


__all__ = [
    "BENCHMARKS", "JUDGE", "MODES", "RowError", "markdown", "notes", "score", "strict_answer",
    "summarise", "worker_modules",
]  # fmt: skip
