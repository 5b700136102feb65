"""We-Math's rule (We-Math/We-Math, evaluation/): the first letter after the last "Answer".

Beside accuracies by number of steps it reports whether a model that fails a problem of several
steps knows their single steps: insufficient knowledge, inadequate generalization, complete mastery
and rote memorization, strict and loose, and a score of these.
"""

import re
from collections.abc import Sequence

from srpo_jax.benchmarks.common import (
    Row,
    Scored,
    each,
    given_extraction,
    gold,
    grouping,
    response,
)

NAME = "wemath"
COUNTS = {1740: "testmini"}
NO_LETTER = "no option letter stands after the last 'Answer'"

groups = grouping("key")

_PUNCTUATION = re.compile(r"[><:.]")


def official(rows: list[Row], pool=None) -> list[Scored]:
    """The official outcome of each row."""
    return each(_official, rows)


def _official(row: Row) -> Scored:
    letter = given_extraction(row)
    if letter is None:
        letter = extract(response(row))
    reason = NO_LETTER if letter is None else None
    return Scored(letter, letter, letter == gold(row), reason)


def extract(text: str) -> str | None:
    """The letter A-H that starts what follows the last "Answer", None for anything else."""
    tail = _PUNCTUATION.sub("", text.split("Answer")[-1].strip()).strip()
    return tail[0] if tail and tail[0] in "ABCDEFGH" else None


def four_dimensions(rows: Sequence[Row], correct: Sequence[bool]) -> dict | None:
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
    for name, rote, mastered in (
        ("strict", any, all),
        ("loose", all, any),
    ):
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
