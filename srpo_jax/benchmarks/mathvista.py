"""MathVista's rule (lupantech/MathVista, evaluation/): normalise an extraction, compare as text.

The official extraction is a language model's, except where the response is itself an option, an
integer or a float, or says 'The answer is "...".' (the official quick rule). A row without a given
extraction for which none of these holds has no answer by rule. What is extracted becomes an option
(by letter, else the nearest by edit distance), an integer, a rounded float, or text.
"""

import re

from rapidfuzz.distance import Levenshtein

from srpo_jax.benchmarks.common import (
    LETTERS,
    Row,
    RowError,
    Scored,
    choices,
    each,
    given_extraction,
    gold,
    grouping,
    response,
)

NAME = "mathvista"
COUNTS = {1000: "testmini"}
NEEDS_MODEL = "the official extraction of this response is a language model's"

groups = grouping(
    "question_type", "answer_type", "language", "source", "category", "task", "context", "grade",
    "skills",
)  # fmt: skip

_QUICK = re.compile(r'The answer is "(.*)"\.')
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")


def official(rows: list[Row], pool=None) -> list[Scored]:
    """The official outcome of each row: extraction, normalised prediction and verdict."""
    return each(_official, rows)


def _official(row: Row) -> Scored:
    if "question_type" not in row or "answer_type" not in row:
        raise RowError("no 'question_type' or no 'answer_type'; MathVista's rule needs both")
    extraction = given_extraction(row)
    if extraction is None:
        extraction = extract(row)
    if extraction is None:
        return Scored(None, None, False, NEEDS_MODEL)
    prediction = normalise(row, extraction)
    return Scored(str(extraction), prediction, prediction == gold(row))


def extract(row: Row, quick: bool = True) -> str | None:
    """The answer of a response by the official shortcuts; None where they need the model.

    ``quick``: also by the pattern of the official --quick_extract, which is off by default there.
    """
    text = response(row)
    if text == "":
        return ""
    if row["question_type"] == "multi_choice" and text in choices(row):
        return text
    convert = {"integer": int, "float": float}.get(row["answer_type"])
    if convert is not None:
        try:
            return str(convert(text))
        except ValueError:
            pass
    quoted = _QUICK.search(text) if quick else None
    return quoted[1] if quoted else None


def normalise(row: Row, extraction: object) -> str | None:
    """The extraction in the form of the gold; None where a number was asked for and none given."""
    if row["question_type"] == "multi_choice":
        return _option(str(extraction).strip(), choices(row))
    kind = row["answer_type"]
    precision = _precision(row) if kind == "float" else None
    try:
        if kind == "integer":
            return str(int(float(extraction)))
        if kind == "float":
            return str(round(float(extraction), precision))
    except (TypeError, ValueError, OverflowError):
        return None
    return str(extraction) if kind == "list" else extraction


def _precision(row: Row) -> int:
    """Decimals to round to; the hub's copy holds them as floats."""
    precision = row.get("precision")
    if precision is None:
        raise RowError("no 'precision' for a float answer")
    return int(float(precision))


def _option(text: str, options: list[str]) -> str:
    """The option that a text names: "(B)" or "B", else the nearest one, the first of several."""
    if not options:
        raise RowError("no 'choices' for a multi_choice question")
    bracketed = _BRACKETED.search(text)
    if bracketed:
        text = bracketed[1].upper()
    if len(text) == 1 and text in LETTERS[: len(options)]:
        return options[LETTERS.index(text)]
    return min(options, key=lambda option: Levenshtein.distance(text, option))
