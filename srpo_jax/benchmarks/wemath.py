"""We-Math's rule (We-Math/We-Math, evaluation/): the first letter after the last "Answer".

Beside accuracies by number of steps it reports whether a model that fails a problem of several
steps knows their single steps: insufficient knowledge, inadequate generalization, complete mastery
and rote memorization, strict and loose, and a score of these.
"""

import re
from collections.abc import Sequence
from typing import Any

from srpo_jax.benchmarks import common

NO_LETTER = "no option letter stands after the last 'Answer'"

_PUNCTUATION = re.compile(r"[><:.]")


def official(row: common.Row) -> common.Scored:
    """The official outcome."""
    letter = common.extraction_or(extract, row)
    reason = NO_LETTER if letter is None else None
    return common.Scored(letter, letter, letter == common.gold(row), reason)


def extract(text: str) -> str | None:
    """The letter A-H that starts what follows the last "Answer", None for anything else."""
    tail = _PUNCTUATION.sub("", text.split("Answer")[-1].strip()).strip()
    return tail[0] if tail and tail[0] in "ABCDEFGH" else None


def four_dimensions(rows: Sequence[common.Row], correct: Sequence[bool]) -> dict | None:
    """The four-dimensional metrics over problems of two and three steps, in percent and counts.

    Rows need ``ID`` (of the problem) and ``key`` ("2steps_1", "2steps_multi", ...); None where no
    problem is whole. A missing step is neither right nor wrong, as in the official tables.
    """
    verdicts: dict[tuple[str, str], dict[str, bool]] = {}
    for row, right in zip(rows, correct, strict=True):
        steps, _, part = str(row.get("key", "")).partition("_")
        verdicts.setdefault((steps, str(row.get("ID"))), {})[part] = right
    problems = [
        (parts.get("multi"), [parts.get(str(i)) for i in range(1, int(steps[0]) + 1)])
        for (steps, _), parts in verdicts.items()
        if steps in ("2steps", "3steps") and "1" in parts
    ]
    if not problems:
        return None
    total = len(problems)
    solved = [steps for multi, steps in problems if multi is True]
    failed = [steps for multi, steps in problems if multi is False]
    general = sum(all(step is True for step in steps) for steps in failed)
    knowledge = sum(any(step is False for step in steps) for steps in failed)
    out = {
        "problems": total,
        "InsufficientKnowledge": _share(knowledge, total),
        "InadequateGeneralization": _share(general, total),
    }
    for name, rote, mastered in (("strict", any, all), ("loose", all, any)):
        memorised = sum(rote(step is False for step in steps) for steps in solved)
        complete = sum(mastered(step is True for step in steps) for steps in solved)
        score = total - 0.5 * general - memorised - knowledge
        out[name] = {
            "score": round(100 * score / total, 2),
            "CompleteMastery": _share(complete, total),
            "RoteMemorization": _share(memorised, complete + memorised),
        }
    return out


def _share(count: int, of: int) -> dict:
    return {"count": count, "percent": round(100 * count / of, 2) if of else 0.0}


def _entries(scored: Sequence[common.Row]) -> dict[str, Any]:
    return {"four_dimensions": four_dimensions(scored, [row["correct"] for row in scored])}


def _page(summary: dict[str, Any]) -> list[str]:
    metrics = summary["four_dimensions"]
    if not metrics:
        return []
    both = [metrics | metrics[side] for side in ("strict", "loose")]
    rows = [("score", *(f"{side['score']:.2f}" for side in both))]
    for name in (
        "InsufficientKnowledge", "InadequateGeneralization", "CompleteMastery", "RoteMemorization",
    ):  # fmt: skip
        shares = (f"{side[name]['percent']:.2f} ({side[name]['count']})" for side in both)
        rows.append((name, *shares))
    return ["", "## four dimensions", "", common.table(("measure", "strict", "loose"), rows)]


def _line(summary: dict[str, Any]) -> str | None:
    if not summary["four_dimensions"]:
        return None
    strict, loose = (summary["four_dimensions"][side]["score"] for side in ("strict", "loose"))
    return f"score over problems of several steps: strict {strict:.2f} %, loose {loose:.2f} %"


BENCHMARK = common.Benchmark(
    name="wemath",
    counts={1740: "testmini"},
    form=common.Form(
        "ID key question option|options answer image_path|image",
        images=("image_path", "image"),
        id=("ID",),
        part="key",
        # One text of all options, which prompts do not append as they do a list.
        asked=lambda row, question: (
            f"{question}\n{row['option']}" if row.get("option") else question
        ),
    ),
    places={"testmini": common.Place("We-Math/We-Math", "testmini")},
    groups=common.grouping("key"),
    official=common.by_row(official),
    measures=common.Measures(_entries, _page, _line),
)
