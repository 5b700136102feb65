"""What a benchmark is, and what the rules share: fields of a prediction row, the result of scoring.

A row is a JSON object with the benchmark's own fields and the model's ``response``. Where a row
already has an ``extraction`` (made by a language model, as MathVista does), rules start from it.
"""

import contextlib
import itertools
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from srpo_jax.data.errors import shown
from srpo_jax.data.fields import text_of_list
from srpo_jax.rewards.verifier import Verifier

Row = dict[str, Any]
Groups = dict[str, list[str]]  # table -> the groups of that table that a row belongs to

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EMPTY = "the response is empty"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Scored:
    """The outcome of one row."""

    extraction: str | None  # what the rule took from the response, None for nothing
    prediction: Any  # what is compared with the gold; None for no answer
    correct: bool
    no_answer: str | None = None  # why there is no answer by rule; such a row counts as wrong
    drawn: bool = False  # the official rule drew at random, with its own seed
    gold_problem: str | None = None  # why strict grading cannot read the gold
    no_judgement: str | None = None  # why a judge gave none; such a row counts as wrong


class RowError(ValueError):
    """A row that cannot be scored, with the field that is missing or wrong."""

    index: int | None = None  # of the row among those given


def each(function: Callable[[Row], _T], rows: Sequence[Row]) -> list[_T]:
    """``function`` of every row; a RowError that comes out of it knows the index of its row."""
    out = []
    for index, row in enumerate(rows):
        try:
            out.append(function(row))
        except RowError as error:
            error.index = index
            raise
    return out


@contextlib.contextmanager
def naming_rows(places: Sequence[str]) -> Iterator[None]:
    """Turns a RowError into a ValueError that starts with its row's place ("file:line")."""
    try:
        yield
    except RowError as error:
        where = "" if error.index is None else f"{places[error.index]}: "
        raise ValueError(f"{where}{error}") from None


# ---------------------------------------------------------------------------------- fields of a row


def response(row: Row) -> str:
    """The model's response; "" where the model gave none (null, or an error object)."""
    value = row.get("response")
    return value if isinstance(value, str) else ""


def extraction_or(extract: Callable[[str], _T], row: Row) -> str | _T:
    """The extraction that the row brings, else what ``extract`` takes from its response."""
    given = row.get("extraction")
    return extract(response(row)) if given is None else str(given)


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
    value = first(row, "choices", "options")
    if isinstance(value, str):
        text, value = value, text_of_list(value) if value.strip() else []
        if value is None:
            raise RowError(f"'options' is not the text of a list: {shown(text)}")
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise RowError(f"'choices' must be a list, found {shown(value)}")
    return [str(option) for option in value]


def needed_choices(row: Row) -> list[str]:
    """The options; RowError where there are none."""
    if not (found := choices(row)):
        raise RowError("no 'choices' (or 'options'); a multiple-choice question needs them")
    return found


def first(row: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of some fields that the row has."""
    return next((row[name] for name in names if row.get(name) is not None), default)


def field(row: Row, *names: str) -> Any:
    """The first of some fields that the row has, at its top or under ``metadata``; else None."""
    found, metadata = first(row, *names), row.get("metadata")
    return first(metadata, *names) if found is None and isinstance(metadata, dict) else found


def grouping(*fields: str, **templates: str) -> Callable[[Row], Groups]:
    """A ``groups`` function: a table for each field and for each template, "{subject}-{level}".

    A row that lacks a field of a template ("a|b": either of two) is in no group of that table, one
    whose field is a list in several.
    """
    tables = {name: f"{{{name}}}" for name in fields} | templates

    def groups(row: Row) -> Groups:
        found: Groups = {}
        for table, template in tables.items():
            names = re.findall("{(.+?)}", template)
            values = [field(row, *name.split("|")) for name in names]
            if all(value is not None for value in values):
                lists = [v if isinstance(v, (list, tuple)) else [v] for v in values]
                filled = (dict(zip(names, v, strict=True)) for v in itertools.product(*lists))
                found[table] = list(dict.fromkeys(map(template.format_map, filled)))
        return found

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


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; all but the first column are set to the right."""

    def line(cells: Iterable[Any]) -> str:
        texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([line(head), rule, *map(line, rows)])


# -------------------------------------------------------------------------------------- a benchmark

Rule = Callable[[Sequence[Row], Verifier | None], list[Scored]]  # with workers where it needs them
Ask = Callable[..., Awaitable[dict[str, Any]]]  # a prompt's name, its values, the reply's fields
Flow = Callable[[Row, list[str], Ask], Awaitable[Scored]]  # a row, its golds, the judge


def by_row(rule: Callable[[Row], Scored]) -> Rule:
    """A rule that looks at each row by itself."""
    return lambda rows, pool=None: each(rule, rows)


def has_something_to_judge(row: Row) -> bool:
    """Whether the row brings an extraction or a response."""
    return row.get("extraction") is not None or bool(response(row).strip())


@dataclass(frozen=True)
class Form:
    """How published rows look: which fields hold what, in order of preference."""

    required: str  # fields that some row must have; "a|b": either of two names
    question: tuple[str, ...] = ("question",)
    images: tuple[str, ...] = ("decoded_image", "image")  # the first that is there
    numbered: bool = False  # image_1, image_2, ... beside those
    id: tuple[str, ...] = ("id",)
    part: str | None = None  # tells rows of one problem apart: appended to the id
    answer: tuple[str, ...] = ("answer",)
    default_question: str | None = None
    asked: Callable[[Row, str], str] = lambda row, question: question  # what a model is asked


@dataclass(frozen=True)
class Place:
    """Where a set stands on the hub: repository, split, configurations (None: the only one)."""

    repo: str
    split: str
    configs: tuple[str | None, ...] = (None,)


@dataclass(frozen=True)
class Measures:
    """What a benchmark reports beside accuracies."""

    entries: Callable[[Sequence[Row]], dict[str, Any]]  # of the summary, from scored rows
    page: Callable[[dict[str, Any]], list[str]]  # the summary's lines of Markdown for them
    line: Callable[[dict[str, Any]], str | None]  # the same in short


@dataclass(frozen=True)
class Benchmark:
    """Everything that loading, scoring, judging and downloading know of one benchmark."""

    name: str
    counts: dict[int, str]  # published numbers of problems -> what has so many
    form: Form
    places: dict[str, Place]  # by split; the first is the default
    groups: Callable[[Row], Groups]  # the official tables' groups that a row belongs to
    official: Rule | None  # None: only a language model decides
    worker_modules: tuple[str, ...] | None = None  # of the rule's workers; None: no workers
    golds: Callable[[Row], list[str]] = lambda row: [gold(row)]  # any of which is right
    draws: str | None = None  # why a row has no answer where official code draws without a seed
    order: Callable[[str], Any] = str  # sorts the groups of a table
    best_first: bool = False  # tables list the best group first instead
    measures: Measures | None = None
    judge: Flow | None = None  # None: one generic extraction and one generic match
    # RowError for what the judge's flow needs beside question and gold, before anything is asked.
    check: Callable[[Row], Any] = lambda row: None
    shows_question: Callable[[Row], bool] = has_something_to_judge  # to the judge
