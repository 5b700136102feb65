"""The fields of one row -> a ``Record``: which column is which, and what counts as missing."""

import ast
import base64
import binascii
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from srpo_jax.data.errors import RecordError, half_character, shown
from srpo_jax.data.images import ImageRef, is_image
from srpo_jax.data.prompts import place_images

Row = Mapping[str, Any]

# A record's fields, and the columns that each is read from.
_OWN = {
    "id": ("id",),
    "problem": ("problem", "question"),
    "answer": ("answer",),
    "images": ("images", "image"),
    "choices": ("choices",),
    "source": ("source",),
}
_READ = {column for columns in _OWN.values() for column in columns}

# What other data sets call them: lower case, without "_", "-" and spaces.
_IMAGE = "(?:decoded|raw)?(?:img|image|picture|pic|photo|figure|screenshot|diagram)"
_LOOKS_LIKE = {
    "images": _IMAGE + r"s?(?:path|file|filename|name|url|byte|data|base64|b64|list)?s?\d*",
    "videos": r"videos?(?:path|file|url|byte|data)?s?\d*",
    "choices": r"(?:multiple|answer)?(?:choice|option|candidate)s?(?:text|list|[a-j]|\d+)?",
    "problem": r"questions?(?:text)?|problem(?:text|statement)|query|instruction|prompt",
    "answer": r"(?:gold|correct|final|target|groundtruth|reference)?(?:answers?|solution|label)"
    r"|gold|groundtruth|target",
}


class ColumnError(RecordError):
    """A row whose content stands in columns that nobody reads."""


@dataclass(frozen=True)
class Columns:
    """Foreign names of a record's columns ("": none), read before its own ones.

    ``images`` and ``choices`` may be spread over several, with commas between them. A field's own
    name ("images=images") says that a column that only looks like it is to be left alone.
    """

    id: str = ""
    problem: str = ""
    question: str = ""
    answer: str = ""
    images: str = ""
    image: str = ""
    choices: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name, aliases in _OWN.items():
            given = [alias for alias in aliases if getattr(self, alias)]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} mean the same: give one of them")
            if given and "," in self.foreign(name) and name not in ("images", "choices"):
                raise ValueError(f"{given[0]}={self.foreign(name)}: takes one column")

    def foreign(self, name: str) -> str:
        """The foreign column of a field, "" without one."""
        return next(filter(None, (getattr(self, alias) for alias in _OWN[name])), "")

    @staticmethod
    def parse(pairs: Iterable[str]) -> "Columns":
        """Of ``images=img`` and the like; ValueError for what is no such pair."""
        known, found = [one.name for one in fields(Columns)], {}
        for pair in pairs:
            name, _, found[name] = pair.partition("=")
            if name not in known or not found[name]:
                raise ValueError(f"columns: {pair}: write FIELD=COLUMN, of {', '.join(known)}")
        return Columns(**found)


OWN = Columns()  # no foreign names


@dataclass(frozen=True)
class Record:
    """One problem. ``extra`` holds every further field, those of reflection SFT among them."""

    id: str
    question: str
    answer: str
    images: tuple[ImageRef, ...] = ()
    choices: tuple[str, ...] = ()
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    origin: str = ""  # "file:row", rows counted from 1


@dataclass(frozen=True)
class Contents:
    """What one row brings: how many images and choices, an id of its own, and what nobody reads."""

    images: int
    choices: int
    has_id: bool
    unread: tuple[str, ...]  # columns that look like content


# --- values ----------------------------------------------------------------------------------


def missing(value: Any) -> bool:
    """Whether a table means "nothing": None, NaN, blank text, an empty list, or these in a list.

    So does ``{"bytes": None, "path": None}``, which is how parquet writes that there is no image.
    """
    if isinstance(value, dict):
        return all(map(_blank, value.values()))
    if isinstance(value, list | tuple | np.ndarray):
        return all(missing(v) if isinstance(v, dict) else _blank(v) for v in value)
    return _blank(value)


def _blank(value: Any) -> bool:
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, float | np.floating):
        return bool(value != value)
    return value is None or (isinstance(value, bytes | list | dict) and not value)


def _text(value: Any, name: str, origin: str) -> str:
    """A string, or a number as a string; RecordError for anything else."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise RecordError(origin, f"{name} is not UTF-8 text") from None
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return str(value)
    raise RecordError(origin, f"{name} must be text, not {type(value).__name__}")


def text_of_list(text: str) -> list[Any] | None:
    """The list that a text is the JSON or Python form of, None where it is none."""
    text = text.strip()
    if not (text.startswith(("[", "(")) and text.endswith(("]", ")"))):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return list(found) if isinstance(found, list | tuple) else None
    return None


def _as_list(value: Any) -> list[Any]:
    """A list, or what a table keeps in its place: its text, or its only item."""
    if isinstance(value, str):
        found = text_of_list(value)
        return [value] if found is None else found
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def _find(row: Row, columns: Columns, origin: str, name: str) -> Any:
    """What the row holds for a field, None where that is missing.

    RecordError where two columns of one meaning hold different things.
    """
    foreign = columns.foreign(name)
    parts = foreign.split(",")
    value = row.get(foreign) if len(parts) == 1 else [row.get(part) for part in parts]
    if foreign and not missing(value):
        return value
    found = {column: row[column] for column in _OWN[name] if not missing(row.get(column))}
    values = [*found.values()]
    if len(values) > 1 and _as_list(values[0]) != _as_list(values[1]):
        first, second = found
        raise RecordError(
            origin,
            f"{first} and {second} hold different things ({shown(values[0], 30)}, "
            f"{shown(values[1], 30)})",
            f"keep one, or choose with {_mapping(first, first)}",
        )
    return values[0] if values else None


# --- columns that nobody reads -----------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _looks_like(column: str) -> str | None:
    """The field that a column's name looks like, None for one that is read or looks like none."""
    plain = re.sub(r"[\s_-]", "", column.lower())
    kinds = (kind for kind, names in _LOOKS_LIKE.items() if re.fullmatch(names, plain))
    return None if column in _READ else next(kinds, None)


def _mapping(name: str, column: str) -> str:
    return f"--config.data.columns.{name}={column} (of a tool: --columns {name}={column})"


def _unread(row: Row, columns: Columns) -> dict[str, list[str]]:
    """Columns that hold something and look like a field, by that field, unless they are mapped."""
    mapped = {part for one in fields(columns) for part in getattr(columns, one.name).split(",")}
    found: dict[str, list[str]] = {}
    for column, value in row.items():
        kind = _looks_like(column)
        if kind and column not in mapped and not missing(value):
            found.setdefault(kind, []).append(column)
    return found


def _check_unread(row: Row, columns: Columns, origin: str, has: Mapping[str, Any]) -> None:
    """ColumnError where images, videos or choices would be lost without a word."""
    unread = _unread(row, columns)
    for name in ("images", "choices"):
        own = columns.foreign(name) in _OWN[name]
        if unread.get(name) and has[name] is None and not own:
            one, several = unread[name][0], sorted(unread[name], key=lambda n: (len(n), n))
            stems = {re.sub(r"(\d+|[a-j])$", "", column) for column in several}
            column = ",".join(several) if len(stems) == 1 else one  # image_1, image_2; option_a
            raise ColumnError(
                origin,
                f"no {name}, but a column {shown(one)} that looks like them",
                f"pass {_mapping(name, column)}; to do without it, {name}={name}",
            )
    if "videos" in unread and not columns.foreign("images"):
        raise ColumnError(
            origin,
            f"a column {shown(unread['videos'][0])}: videos cannot be read",
            f"remove it, or pass {_mapping('images', 'images')} to do without it",
        )


def contents(row: Row, record: Record, columns: Columns) -> Contents:
    """What the row of a record brings."""
    unread = sum(_unread(row, columns).values(), [])
    has_id = _find(row, columns, record.origin, "id") is not None
    return Contents(len(record.images), len(record.choices), has_id, tuple(unread))


# --- images and choices --------------------------------------------------------------------------


def image_ref(value: Any, origin: str, root: str) -> ImageRef:
    """A path, bytes, a ``data:`` URI, or a dict of bytes and path -> ImageRef.

    In JSON, bytes are base64 text. RecordError for anything else.
    """
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path") or ""
        if isinstance(data, str) and data:
            data = _from_base64(data.partition(",")[2] if data[:5] == "data:" else data, origin)
        if data:
            return ImageRef(origin, _text(path, "image path", origin), root, data)
        value = path
    if isinstance(value, bytes) and value:
        return ImageRef(origin, data=value)
    if not isinstance(value, str) or not value.strip():
        raise RecordError(origin, "an image is neither a path nor bytes")
    if value[:5] == "data:":
        head, _, text = value.partition(",")
        if not head.endswith(";base64"):
            raise RecordError(origin, f"image {shown(value)} is not base64", "write ;base64,...")
        return ImageRef(origin, data=_from_base64(text, origin))
    if _is_base64_image(value):
        raise RecordError(
            origin,
            f"an image is base64 text where a path belongs: {shown(value, 30)}",
            'write {"bytes": "..."} or "data:image/png;base64,..."',
        )
    return ImageRef(origin, value, root)


def _from_base64(text: str, origin: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RecordError(origin, "image bytes are not base64", "encode them anew") from None


def _is_base64_image(text: str) -> bool:
    """Whether the text, decoded, starts as an image file does, or is too long for a path."""
    if len(text) > 4096:
        return True
    try:
        return len(text) > 64 and is_image(base64.b64decode(text[:24], validate=True))
    except (binascii.Error, ValueError):
        return False


def _choices(value: Any, origin: str) -> list[str]:
    """The options as texts; RecordError where the value is no list of texts, or the text of one."""
    if value is None:
        return []
    listed = _as_list(value)
    if len(listed) == 1 and isinstance(listed[0], str):  # a list whose only item is a list's text
        listed = _as_list(listed[0])
    if isinstance(value, str) and len(listed) < 2 and text_of_list(value) != []:
        raise RecordError(
            origin,
            f"choices are one text, not a list: {shown(value)}",
            'write ["first", "second"], or leave choices out',
        )
    while listed and missing(listed[-1]):  # tables pad the shorter lists
        listed.pop()
    for number, choice in enumerate(listed, 1):
        if missing(choice):
            raise RecordError(origin, f"choice {number} of {len(listed)} is empty")
    return [_text(choice, "a choice", origin) for choice in listed]


# --- the record ----------------------------------------------------------------------------------


def to_record(
    row: dict[str, Any],
    *,
    origin: str,
    root: str = "",
    require_answer: bool = True,
    columns: Columns = OWN,
) -> Record:
    """One row -> Record; RecordError for what cannot be trained or evaluated on.

    ``problem`` and ``question`` mean the same, so do ``images`` and ``image``; each image is a path
    inside ``root``, bytes, {"bytes", "path"} or a ``data:`` URI. Numbers become text, images come
    in the order in which question and choices name them (``place_images``).
    """
    half = half_character(row)
    if half is not None:
        raise RecordError(origin, f"half a surrogate pair in {shown(half)}", "write it as UTF-8")
    found = {name: _find(row, columns, origin, name) for name in _OWN}
    _check_unread(row, columns, origin, found)
    question, answer, name = found["problem"], found["answer"], found["id"]
    if question is None:
        raise _no_field(row, columns, origin, "problem")
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    answer = "" if answer is None else _text(answer, "answer", origin).strip()
    if require_answer and not answer:
        raise _no_field(row, columns, origin, "answer")
    listed = [] if found["images"] is None else _as_list(found["images"])
    numbered = {n: image for n, image in enumerate(listed, 1) if not missing(image)}
    question, given = _text(question, "question", origin), _choices(found["choices"], origin)
    try:
        question, choices, images = place_images(question, given, numbered)
    except ValueError as error:
        raise RecordError(origin, str(error)) from None
    if answer in given:  # the text of an option, which may have got another image number
        answer = choices[given.index(answer)]
    return Record(
        id=os.path.basename(origin) if name is None else _text(name, "id", origin),
        question=question,
        answer=answer,
        images=tuple(image_ref(image, origin, root) for image in images),
        choices=tuple(choices),
        source="" if found["source"] is None else _text(found["source"], "source", origin),
        extra={key: value for key, value in row.items() if key not in _READ},
        origin=origin,
    )


def _no_field(row: Row, columns: Columns, origin: str, name: str) -> RecordError:
    """The error for a row without a question or an answer, with the column that may hold it."""
    near = _unread(row, columns).get(name)
    remedy = f"pass {_mapping(name, near[0])}" if near else "fix or remove the record"
    if any(column in row for column in _OWN[name]):
        reason = "empty question" if name == "problem" else f"empty {name}"
    else:
        reason = f"no {' or '.join(_OWN[name])} among {shown(sorted(row))}"
    return RecordError(origin, reason, remedy)
