"""MathVista's rule (lupantech/MathVista, evaluation/): normalise an extraction, compare as text.

The official extraction is a language model's, except where the response is itself an option, an
integer or a float, or says 'The answer is "...".' (the official quick rule). A row without a given
extraction for which none of these holds has no answer by rule. What is extracted becomes an option
(by letter, else the nearest by edit distance), an integer, a rounded float, or text.
"""

import contextlib
import re
from typing import Any

from rapidfuzz.distance import Levenshtein

from srpo_jax.benchmarks import common
from srpo_jax.benchmarks.judge.flows import NO_ANSWER, extracted, question, shown

NEEDS_MODEL = "the official extraction of this response is a language model's"

_QUICK = re.compile(r'The answer is "(.*)"\.')
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")


def official(row: common.Row) -> common.Scored:
    """The official outcome: extraction, normalised prediction and verdict."""
    _check_types(row)
    return _compared(row, extract(row), NEEDS_MODEL)


async def judged(row: common.Row, golds: list[str], ask: common.Ask) -> common.Scored:
    """The official way: the model extracts where no shortcut does, the rule compares."""
    extraction = extract(row, quick=False)
    if extraction is None:
        query = row.get("query")
        values = {
            "question": question(row) if query is None else str(query),
            "kind": str(row["answer_type"]),
            "response": shown(row),
        }
        extraction = await extracted(ask, "mathvista_extract", values)
    return _compared(row, extraction, NO_ANSWER)


def _check_types(row: common.Row) -> None:
    if "question_type" not in row or "answer_type" not in row:
        raise common.RowError("no 'question_type' or no 'answer_type'; MathVista's rule needs both")


def _check(row: common.Row) -> None:
    """Whatever the rule will need, whatever the model extracts."""
    _check_types(row)
    normalise(row, "1")


def _compared(row: common.Row, extraction: Any, no_answer: str) -> common.Scored:
    if extraction is None:
        return common.Scored(None, None, False, no_answer)
    prediction = normalise(row, extraction)
    return common.Scored(str(extraction), prediction, prediction == common.gold(row))


def extract(row: common.Row, quick: bool = True) -> Any:
    """The given extraction, else one by the official shortcuts; None where they need the model.

    ``quick``: also by the pattern of the official --quick_extract, which is off by default there.
    """
    if row.get("extraction") is not None:
        return row["extraction"]
    text = common.response(row)
    if text == "":
        return ""
    if row["question_type"] == "multi_choice" and text in common.choices(row):
        return text
    convert = {"integer": int, "float": float}.get(row["answer_type"])
    if convert is not None:
        with contextlib.suppress(ValueError):
            return str(convert(text))
    quoted = _QUICK.search(text) if quick else None
    return quoted[1] if quoted else None


def normalise(row: common.Row, extraction: Any) -> str | None:
    """The extraction in the form of the gold; None where a number was asked for and none given."""
    if row["question_type"] == "multi_choice":
        return _option(str(extraction).strip(), common.choices(row))
    kind = row["answer_type"]
    if kind == "float" and row.get("precision") is None:
        raise common.RowError("no 'precision' for a float answer")
    precision = int(float(row["precision"])) if kind == "float" else None  # a float on the hub
    try:
        if kind == "integer":
            return str(int(float(extraction)))
        if kind == "float":
            return str(round(float(extraction), precision))
    except (TypeError, ValueError, OverflowError):
        return None
    return str(extraction) if kind == "list" else extraction


def _option(text: str, options: list[str]) -> str:
    """The option that a text names: "(B)" or "B", else the nearest one, the first of several."""
    if not options:
        raise common.RowError("no 'choices' for a multi_choice question")
    bracketed = _BRACKETED.search(text)
    if bracketed:
        text = bracketed[1].upper()
    if len(text) == 1 and text in common.LETTERS[: len(options)]:
        return options[common.LETTERS.index(text)]
    return min(options, key=lambda option: Levenshtein.distance(text, option))


BENCHMARK = common.Benchmark(
    name="mathvista",
    counts={1000: "testmini"},
    form=common.Form(
        "pid|id question image|decoded_image choices answer question_type answer_type precision",
        question=("query", "question"),
        id=("pid", "id"),
        # The query ends with the options, which prompts append themselves.
        asked=lambda row, question: question.split("\nChoices:")[0],
    ),
    places={"testmini": common.Place("AI4Math/MathVista", "testmini")},
    groups=common.grouping(
        "question_type", "answer_type", "language", "source", "category", "task", "context",
        "grade", "skills",
    ),
    official=common.by_row(official),
    best_first=True,
    judge=judged,
    check=_check,
    shows_question=lambda row: extract(row, quick=False) is None,
)  # fmt: skip
