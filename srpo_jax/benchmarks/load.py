"""Benchmarks in the form in which they are published -> records, read lazily.

``path`` is a parquet file or a folder of them (as on the hub, images as bytes in the table), or the
repository's JSON or JSON Lines file, whose images are files. Every official field is kept: a
record's ``extra`` together with its own fields is what scoring needs (``scoring_row``).
"""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srpo_jax.benchmarks import common
from srpo_jax.benchmarks.scoring import BENCHMARKS
from srpo_jax.data.prompts import IMAGE_MARK
from srpo_jax.data.records import Record, RecordError, to_record

Row = dict[str, Any]

READ_IMAGE = "Answer the multiple-choice question that the image shows."  # MMMU-Pro's vision rows
_TAG = re.compile(r"<image[ _]?(\d*)>")
_NUMBERED_IMAGES = tuple(f"image_{i}" for i in range(1, 10))


@dataclass(frozen=True)
class Form:
    """Which fields hold what, in order of preference where there are several names."""

    required: tuple[tuple[str, ...], ...]
    question: tuple[str, ...] = ("question",)
    images: tuple[str, ...] = ("decoded_image", "image")  # the first that is there
    numbered: bool = False  # image_1, image_2, ... beside those
    id: tuple[str, ...] = ("id",)
    answer: tuple[str, ...] = ("answer",)
    default_question: str | None = None


def _need(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names.split("|")) for names in text.split())


FORMS = {
    "mathvista": Form(
        _need("pid|id question image|decoded_image choices answer question_type answer_type "
              "precision"),
        question=("query", "question"), id=("pid", "id"),
    ),
    "mathvision": Form(
        _need("id question image|decoded_image options|choices answer level subject")
    ),
    "mathverse": Form(
        _need("sample_index|id problem_version question image answer question_type"),
        question=("query_cot", "query_wo", "question"), id=("sample_index", "id"),
    ),
    "mmmu_pro": Form(
        _need("id options answer subject"), images=("image",), numbered=True,
        default_question=READ_IMAGE,
    ),
    "mmmu": Form(_need("id question options answer question_type"), images=(), numbered=True),
    "emma": Form(
        _need("pid|id question options answer subject type"), images=(), numbered=True,
        id=("pid", "id"),
    ),
    "olympiadbench": Form(
        _need("id question final_answer answer_type"), images=("images",), numbered=True,
        answer=("final_answer",),
    ),
    "wemath": Form(
        _need("ID key question option|options answer image_path|image"),
        images=("image_path", "image"), id=("ID",),
    ),
    "mmk12": Form(_need("question answer image|images"), images=("image", "images")),
}  # fmt: skip


class Benchmark(Sequence[Record]):
    """The records of one benchmark."""

    def __init__(self, name: str, readers: list["_Table | _Json"], root: str):
        self.name = name
        self._places = [(reader, i) for reader in readers for i in range(len(reader))]
        self._root = root

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        reader, place = self._places[index]
        row = reader.read(place)
        return _record(self.name, row, f"{reader.path}:{place + 1}", self._root)


def load(
    name: str,
    path: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    counts: Sequence[int] | None = None,
) -> Benchmark:
    """Open a benchmark.

    Args:
        name: a key of FORMS.
        path: a parquet file, a folder or glob of parquet files, or a .json or .jsonl file.
        image_root: the folder that image paths are relative to; by default the file's, or the one
            above it where the first image is there.
        counts: how many rows are accepted, () for any; by default the published numbers.

    Raises:
        ValueError naming the field that a wrong or older file lacks, or the count that is off.
    """
    readers = [_open(file) for file in _files(path)]
    total = sum(len(reader) for reader in readers)
    published = BENCHMARKS[name].COUNTS
    accepted = tuple(published) if counts is None else tuple(counts)
    if accepted and total not in accepted:
        known = ", ".join(f"{count} ({split})" for count, split in published.items())
        raise ValueError(
            f"{path}: {total} rows, but {name} has {known}; counts=() takes any number"
        )
    for reader in readers:
        _check_fields(name, reader)
    root = str(image_root) if image_root is not None else _image_root(name, readers)
    return Benchmark(name, readers, root)


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
    if os.path.isdir(text):
        found = sorted(glob.glob(os.path.join(glob.escape(text), "*.parquet")))
    elif os.path.isfile(text):
        found = [text]
    else:
        found = sorted(glob.glob(text))
    if not found:
        raise ValueError(f"{path}: no such file, or no .parquet file in this folder")
    return found


def _open(path: str) -> "_Table | _Json":
    if path.endswith(".parquet"):
        return _Table(path)
    if path.endswith((".json", ".jsonl")):
        return _Json(path)
    raise ValueError(f"{path}: expected .parquet, .json or .jsonl")


class _Table:
    """Rows of a parquet file; the row group read last is kept."""

    def __init__(self, path: str):
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except Exception as error:  # pyarrow's own error classes
            raise ValueError(f"{path}: not a parquet file ({error})") from None
        groups = range(self._file.metadata.num_row_groups)
        self._groups = [
            (group, i)
            for group in groups
            for i in range(self._file.metadata.row_group(group).num_rows)
        ]
        self._last: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return len(self._groups)

    def fields(self) -> set[str]:
        return set(self._file.schema_arrow.names)

    def read(self, index: int) -> Row:
        group, place = self._groups[index]
        if self._last[0] != group:
            self._last = (group, self._file.read_row_group(group, use_threads=False))
        return self._last[1].slice(place, 1).to_pylist()[0]


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
                self._rows = list(_by_id(data)) if isinstance(data, dict) else data
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error.msg}, line {error.lineno})") from None
        if not isinstance(self._rows, list) or not all(isinstance(r, dict) for r in self._rows):
            raise ValueError(f"{path}: expected rows that are JSON objects")

    def __len__(self) -> int:
        return len(self._rows)

    def fields(self) -> set[str]:
        return set().union(*self._rows) if self._rows else set()

    def read(self, index: int) -> Row:
        return self._rows[index]


def _by_id(data: dict[str, Any]) -> Iterator[Row]:
    for key, row in data.items():
        yield {"pid": key, **row} if isinstance(row, dict) else row


def _check_fields(name: str, reader: "_Table | _Json") -> None:
    """ValueError naming the first required field that no row has."""
    fields = reader.fields()
    for names in FORMS[name].required:
        if not fields & set(names):
            raise ValueError(
                f"{reader.path}: no field {' or '.join(map(repr, names))}, which {name} has; this "
                f"is another or an older file (its fields: {', '.join(sorted(fields))})"
            )


def _image_root(name: str, readers: list["_Table | _Json"]) -> str:
    """The folder of the first file, or the one above it if the first image is there."""
    folder = Path(readers[0].path).resolve().parent
    if not len(readers[0]):
        return str(folder)
    images = _images(FORMS[name], readers[0].read(0))
    path = next((image for image in images.values() if isinstance(image, str)), None)
    above = path and not (folder / path).is_file() and (folder.parent / path).is_file()
    return str(folder.parent if above else folder)


# -------------------------------------------------------------------------------------- records


def _record(name: str, row: Row, origin: str, root: str) -> Record:
    """One official row as a record; RecordError for what cannot be asked."""
    form = FORMS[name]
    images = _images(form, row)
    question = next((row[key] for key in form.question if row.get(key)), form.default_question)
    if question is None:
        raise RecordError(origin, f"no {' or '.join(form.question)}")
    question, ordered = _placed(_asked(name, row, str(question)), images)
    answer = next((row[key] for key in form.answer if row.get(key) is not None), None)
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    try:
        choices = common.choices(row)
    except common.RowError as error:
        raise RecordError(origin, str(error)) from None
    identifier = next((row[key] for key in form.id if row.get(key) is not None), None)
    if name == "wemath":
        identifier = f"{identifier}_{row.get('key')}"
    dropped = {*form.images, *_NUMBERED_IMAGES, "image", "images", "decoded_image", "choices"}
    fields = {key: value for key, value in row.items() if key not in dropped}
    fields |= {"problem": question, "images": ordered, "answer": answer, "choices": choices}
    if identifier is not None:
        fields["id"] = identifier
    return to_record(fields, origin=origin, root=root)


def _asked(name: str, row: Row, question: str) -> str:
    """The question as it is asked; prompts append the options of a list themselves."""
    if name == "mathvista":  # its query ends with them
        return question.split("\nChoices:")[0]
    if name == "wemath" and row.get("option"):  # one text of all options
        return f"{question}\n{row['option']}"
    return question


def _images(form: Form, row: Row) -> dict[int, Any]:
    """The row's images by their number, from 1."""
    first = next((row[key] for key in form.images if row.get(key) is not None), None)
    listed = first if isinstance(first, list) else [] if first is None else [first]
    images = dict(enumerate(listed, 1))
    if form.numbered and not images:
        for i, key in enumerate(_NUMBERED_IMAGES, 1):
            if row.get(key) is not None:
                images[i] = row[key]
    return images


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
    for number, image in left.items():
        text += f"\nimage {number}: {IMAGE_MARK}"
        ordered.append(image)
    return text, ordered


__all__ = ["FORMS", "Benchmark", "Form", "load", "scoring_row"]
