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
from pathlib import Path
from typing import Any

from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.common import Benchmark, Form, Row, RowError, choices, first
from srpo_jax.data.prompts import IMAGE_MARK
from srpo_jax.data.records import Parquet, Record, RecordError, to_record

_TAG = re.compile(r"<image[ _]?(\d*)>")
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
    pattern = os.path.join(glob.escape(text), "*.parquet") if os.path.isdir(text) else text
    found = [text] if os.path.isfile(text) else sorted(glob.glob(pattern))
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
        text = Path(path).read_text("utf-8")
        try:
            if path.endswith(".jsonl"):
                self._rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            else:
                data = json.loads(text)
                if isinstance(data, dict):
                    data = [
                        {"pid": key, **row} if isinstance(row, dict) else row
                        for key, row in data.items()
                    ]
                self._rows = data
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error.msg}, line {error.lineno})") from None
        if not isinstance(self._rows, list) or not all(isinstance(r, dict) for r in self._rows):
            raise ValueError(f"{path}: expected rows that are JSON objects")

    def __len__(self) -> int:
        return len(self._rows)

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
    folder = Path(readers[0].path).resolve().parent
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
    question, ordered = _placed(form.asked(row, str(question)), images)
    answer = first(row, *form.answer)
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    try:
        options = choices(row)
    except RowError as error:
        raise RecordError(origin, str(error)) from None
    identifier = first(row, *form.id)
    if form.part is not None:
        identifier = f"{identifier}_{row.get(form.part)}"
    dropped = {*form.images, *_NUMBERED_IMAGES, "image", "images", "decoded_image", "choices"}
    fields = {key: value for key, value in row.items() if key not in dropped}
    fields |= {"problem": question, "images": ordered, "answer": answer, "choices": options}
    if identifier is not None:
        fields["id"] = identifier
    return to_record(fields, origin=origin, root=root)


def _images(form: Form, row: Row) -> dict[int, Any]:
    """The row's images by their number, from 1."""
    found = first(row, *form.images)
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if form.numbered and not listed:
        listed = [row.get(key) for key in _NUMBERED_IMAGES]
        return {i: image for i, image in enumerate(listed, 1) if image is not None}
    return dict(enumerate(listed, 1))


def _placed(question: str, images: dict[int, Any]) -> tuple[str, list[Any]]:
    """The question with a mark for each image, and the images in the order of the marks.

    Tags such as <image 1>, <image1> and <image_1> become marks where they first stand; later and
    unknown ones become words. Images without a tag go first if none has one, else to the end.
    """
    left, ordered = dict(images), []

    def replace(match: re.Match) -> str:
        number = int(match[1]) if match[1] else min(left, default=0)
        if number in left:
            ordered.append(left.pop(number))
            return IMAGE_MARK
        return f"image {number}" if number else ""

    text = _TAG.sub(replace, question)
    if not ordered:
        return text, list(images.values())
    for number in left:
        text += f"\nimage {number}: {IMAGE_MARK}"
    return text, [*ordered, *left.values()]
