"""Benchmarks in the form in which they are published -> records, read lazily.

``path`` is a parquet file or a folder of them (as on the hub, images as bytes in the table), or the
repository's JSON or JSON Lines file, whose images are files. Every official field is kept: a
record's ``extra`` together with its own fields is what scoring needs (``scoring_row``).
"""

import glob
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.common import Benchmark, Form, Row, RowError, choices, first
from srpo_jax.data.buckets import expand, folder_of, located, read_bytes
from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Columns, Record, to_record
from srpo_jax.data.files import read_jsonl
from srpo_jax.data.readers import Parquet

_TAG = re.compile(r"<image[ _]?(\d*)>")
# What a row's other columns hold is known: none of them is an image or an option that went astray.
_COLUMNS = Columns(problem="problem", images="images", choices="choices")
_NUMBERED_IMAGES = tuple(f"image_{i}" for i in range(1, 10))


class Problems:
    """The records of one benchmark: ``len(problems)``, ``problems[i]``."""

    def __init__(self, form: Form, readers: "list[Parquet | _Json]", root: str):
        self._form, self._root = form, root
        self._places = [(reader, i) for reader in readers for i in range(len(reader))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        """Record ``index``; RecordError where the row cannot be asked."""
        reader, place = self._places[index]
        return _record(self._form, *reader.read(place), self._root)


def load(
    name: str,
    path: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    counts: Sequence[int] | None = None,
) -> Problems:
    """Open a benchmark.

    Args:
        name: a key of BENCHMARKS.
        path: a parquet file, a folder or glob of parquet files, or a .json or .jsonl file.
        image_root: the folder that image paths are relative to; by default the file's, or the one
            above it where the first image is there.
        counts: how many rows are accepted, () for any; by default the published numbers.

    Raises:
        ValueError naming the field that a wrong or older file lacks, or the count that is off.
    """
    readers = [_open(file) for file in _files(path)]
    total = sum(len(reader) for reader in readers)
    benchmark = BENCHMARKS[name]
    published = benchmark.counts
    accepted = tuple(published) if counts is None else tuple(counts)
    if accepted and total not in accepted:
        known = ", ".join(f"{count} ({split})" for count, split in published.items())
        raise ValueError(
            f"{path}: {total} rows, but {name} has {known}; counts=() takes any number"
        )
    for reader in readers:
        _check_columns(benchmark, reader)
    root = str(image_root) if image_root is not None else _image_root(benchmark.form, readers)
    return Problems(benchmark.form, readers, root)


def scoring_row(record: Record, response: str) -> Row:
    """A row as ``scoring.score`` takes it: the official fields, and the model's response."""
    own = {"id": record.id, "answer": record.answer, "choices": list(record.choices)}
    source = {"source": record.source} if record.source else {}
    # The official question is among the extra fields unless a record's own field took it.
    return {"question": record.question, **record.extra, **source, **own, "response": response}


# ---------------------------------------------------------------------------------------- files


def _files(path: str | os.PathLike) -> list[str]:
    """The files behind a path, sorted; ValueError where there are none."""
    text = os.fspath(path)
    pattern = os.path.join(glob.escape(text), "*.parquet") if located(text).is_dir() else text
    found = expand(pattern)
    if not found:
        raise ValueError(f"{path}: no such file, or no .parquet file in this folder")
    return found


def _open(path: str) -> "Parquet | _Json":
    if path.endswith(".parquet"):
        return Parquet(path)
    if path.endswith((".json", ".jsonl")):
        return _Json(path)
    raise ValueError(f"{path}: expected .parquet, .json or .jsonl")


class _Json:
    """Rows of a JSON list, a JSON object of rows by id, or JSON Lines."""

    def __init__(self, path: str):
        self.path = path
        self._rows = read_jsonl(path) if path.endswith(".jsonl") else self._read_json(path)
        if not isinstance(self._rows, list) or not all(isinstance(r, dict) for r in self._rows):
            raise ValueError(f"{path}: expected rows that are JSON objects")

    def __len__(self) -> int:
        return len(self._rows)

    @staticmethod
    def _read_json(path: str) -> Any:
        try:
            data = json.loads(read_bytes(path))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        if not isinstance(data, dict):
            return data
        return [{"pid": key, **row} if isinstance(row, dict) else row for key, row in data.items()]

    def columns(self) -> set[str]:
        return set().union(*self._rows)

    def read(self, index: int) -> tuple[Row, str]:
        return self._rows[index], f"{self.path}:{index + 1}"


def _check_columns(benchmark: Benchmark, reader: "Parquet | _Json") -> None:
    """ValueError naming the first required field that no row has."""
    columns = reader.columns()
    for names in (names.split("|") for names in benchmark.form.required.split()):
        if not columns.intersection(names):
            raise ValueError(
                f"{reader.path}: no field {' or '.join(map(repr, names))}, which {benchmark.name} "
                "has; this is another or an older file (its fields: "
                f"{', '.join(sorted(columns))})"
            )


def _image_root(form: Form, readers: "list[Parquet | _Json]") -> str:
    """The folder of the first file, or the one above it if the first image is there."""
    folder = located(folder_of(readers[0].path))
    if not len(readers[0]):
        return str(folder)
    images = _images(form, readers[0].read(0)[0])
    path = next((image for image in images.values() if isinstance(image, str)), "")
    above = path and not (folder / path).is_file() and (folder.parent / path).is_file()
    return str(folder.parent if above else folder)


# -------------------------------------------------------------------------------------- records


def _record(form: Form, row: Row, origin: str, root: str) -> Record:
    """One official row as a record; RecordError for what cannot be asked."""
    images = _images(form, row)
    question = next((row[key] for key in form.question if row.get(key)), form.default_question)
    if question is None:
        raise RecordError(origin, f"no {' or '.join(form.question)}")
    answer = first(row, *form.answer)
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    try:
        options = choices(row)
    except RowError as error:
        raise RecordError(origin, str(error)) from None
    question, options = _named(form.asked(row, str(question)), options, images)
    identifier = first(row, *form.id)
    if form.part is not None:
        identifier = f"{identifier}_{row.get(form.part)}"
    dropped = {*form.images, *_NUMBERED_IMAGES, "image", "images", "decoded_image", "choices"}
    fields = {key: value for key, value in row.items() if key not in dropped}
    listed = [images.get(number) for number in range(1, max(images, default=0) + 1)]
    fields |= {"problem": question, "images": listed, "answer": answer, "choices": options}
    if identifier is not None:
        fields["id"] = identifier
    return to_record(fields, origin=origin, root=root, columns=_COLUMNS)


def _images(form: Form, row: Row) -> dict[int, Any]:
    """The row's images by their number, from 1."""
    found = first(row, *form.images)
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if form.numbered and not listed:
        listed = [row.get(key) for key in _NUMBERED_IMAGES]
        return {i: image for i, image in enumerate(listed, 1) if image is not None}
    return dict(enumerate(listed, 1))


def _named(question: str, options: list[str], images: dict[int, Any]) -> tuple[str, list[str]]:
    """Question and options with a tag for each image, at the question's end where none had one.

    Without any tag they stay without, and the images will go first. Tags of images that the row has
    not become words.
    """
    left = dict(images)

    def known(match: re.Match) -> str:
        number = int(match[1]) if match[1] else min(left, default=0)
        if number not in images:
            return f"image {number}" if number else ""
        left.pop(number, None)
        return f"<image {number}>"

    question, *options = [_TAG.sub(known, text) for text in (question, *options)]
    if len(left) < len(images):
        question += "".join(f"\nimage {number}: <image {number}>" for number in left)
    return question, options
