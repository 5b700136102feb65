"""What the benchmarks' rules share: the fields of a prediction row, and the result of scoring one.

A row is a JSON object with the benchmark's own fields and the model's ``response``. Where a row
already has an ``extraction`` (made by a language model, as MathVista does), rules start from it.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Groups = dict[str, list[str]]  # table -> the groups of that table that a row belongs to

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Scored:
    """The outcome of one row."""

    extraction: str | None  # what the rule took from the response, None for nothing
    prediction: Any  # what is compared with the gold; None for no answer
    correct: bool
    no_answer: str | None = None  # why there is no answer by rule; such a row counts as wrong
    drawn: bool = False  # the official rule drew at random, with its own seed
    no_judgement: str | None = None  # why a judge gave none; such a row counts as wrong


class RowError(ValueError):
    """A row that cannot be scored, with the field that is missing or wrong."""

    index: int | None = None  # of the row among those given


def each(function: Callable[[Row], Any], rows: Sequence[Row]) -> list:
    """``function`` of every row; a RowError that comes out of it knows the index of its row."""
    out = []
    for index, row in enumerate(rows):
        try:
            out.append(function(row))
        except RowError as error:
            error.index = index
            raise
    return out


def response(row: Row) -> str:
    """The model's response; "" where the model gave none (null, or an error object)."""
    value = row.get("response")
    return value if isinstance(value, str) else ""


def given_extraction(row: Row) -> Any:
    """The extraction that the row brings, None without one."""
    return row.get("extraction")


def gold(row: Row) -> str:
    """The gold answer as text; RowError without one."""
    value = row.get("answer")
    if value is None:
        raise RowError("no 'answer' (the gold); rows of a test set without golds cannot be scored")
    return str(value)


def choices(row: Row) -> list[str]:
    """The options: a list under ``choices`` or ``options``, or the text of one (as on the hub).

    RowError where it is neither.
    """
    value = row.get("choices")
    if value is None:
        value = row.get("options")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.strip() else []
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RowError(f"'options' is not the text of a list: {value!r:.60}") from None
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise RowError(f"'choices' must be a list, found {value!r:.60}")
    return [str(option) for option in value]


def field(row: Row, *names: str) -> Any:
    """The first of some fields that the row has, at its top or under ``metadata``; else None."""
    metadata = row.get("metadata")
    for place in (row, metadata if isinstance(metadata, dict) else {}):
        for name in names:
            if place.get(name) is not None:
                return place[name]
    return None


def grouping(*fields: str | tuple[str, ...]) -> Callable[[Row], Groups]:
    """A ``groups`` function with one table for each field (or first name of a tuple of names)."""

    def groups(row: Row) -> Groups:
        tables: Groups = {}
        for names in fields:
            names = (names,) if isinstance(names, str) else names
            value = field(row, *names)
            if value is not None:
                values = value if isinstance(value, (list, tuple)) else [value]
                tables[names[0]] = [str(v) for v in dict.fromkeys(values)]
        return tables

    return groups


def is_number(text: str) -> bool:
    """Whether Python reads the text as a float."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def option_text(letter: str, options: Sequence[str]) -> str | None:
    """The option of a letter, None where there is no such option."""
    index = LETTERS.find(letter.upper()) if len(letter) == 1 else -1
    return options[index] if 0 <= index < len(options) else None


def braced_contents(text: str, opening: str) -> tuple[list[str], bool]:
    r"""The contents of every ``opening``...} with balanced braces, and whether all were closed.

    ``opening`` ends with its brace. Contents are found from left to right without overlap; an
    unclosed one takes the rest of the text and is left out.
    """
    contents, position = [], 0
    while (start := text.find(opening, position)) >= 0:
        start += len(opening)
        end = _closing_brace(text, start)
        if end is None:
            return contents, False
        contents.append(text[start:end])
        position = end + 1
    return contents, True


def _closing_brace(text: str, start: int) -> int | None:
    """The place of the brace that closes one opened before ``start``."""
    depth, position = 1, start
    while True:
        closing = text.find("}", position)
        if closing < 0:
            return None
        depth += text.count("{", position, closing) - 1
        if depth == 0:
            return closing
        position = closing + 1
