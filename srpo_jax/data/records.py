"""Records of image-question-answer data: JSONL, parquet, ArrayRecord and TFDS, read lazily.

One record is read when it is asked for. Nothing is unpickled, no address is fetched, and images
stay undecoded (``ImageRef``) until ``load_image``.
"""

import base64
import binascii
import bisect
import contextlib
import glob
import itertools
import json
import os
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from srpo_jax.data.files import content_hash, whole
from srpo_jax.data.images import ImageRef, RecordError

_TFDS = re.compile(
    r"(?:tfds:)?(?P<name>\w+(?:/[\w.-]+)?):(?P<version>\d+\.\d+\.\d+)"
    r"(?:\[(?P<split>.+)\])?@(?P<dir>.+)"
)
_KNOWN = ("id", "problem", "question", "answer", "images", "image", "choices", "source")
_ROW_GROUP_CACHE_BYTES = 256 * 2**20


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


class RecordSource(Protocol):
    """Anything with random access to records: ``Records``, a list, a subset of either."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


class Reader(Protocol):
    """One open file of records. Picklable: worker processes take it along."""

    num_bytes: int

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> tuple[dict[str, Any], str]:
        """Fields and origin ("file:row") of one record; RecordError where it cannot be read."""
        ...


def _text(value: Any, name: str, origin: str) -> str:
    """A string, or a number as a string; RecordError for anything else."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise RecordError(origin, f"{name} is not UTF-8 text") from None
    if isinstance(value, str):
        return value
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if number and value == value:  # NaN is how tables write "missing"
        return str(value)
    raise RecordError(origin, f"{name} must be text, not {type(value).__name__}")


def _double(value: Any) -> Any:
    """A single-precision number as the one that its shortest text names: 0.1, not 0.1000000015."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def image_ref(value: Any, origin: str, root: str) -> ImageRef:
    """A path, bytes, or a dict of both -> ImageRef. In JSON, bytes are base64 text."""
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path") or ""
        if isinstance(data, str):
            try:
                data = base64.b64decode(data, validate=True)
            except binascii.Error:
                raise RecordError(origin, "image bytes are not base64") from None
        if data:
            return ImageRef(origin, _text(path, "image path", origin), root, data)
        value = path
    if isinstance(value, bytes):
        return ImageRef(origin, data=value)
    if isinstance(value, str) and value:
        return ImageRef(origin, value, root)
    raise RecordError(origin, "an image is neither a path nor bytes")


def to_record(
    fields: dict[str, Any], *, origin: str, root: str = "", require_answer: bool = True
) -> Record:
    """The fields of one row -> Record; RecordError for what cannot be trained or evaluated on.

    ``problem`` and ``question`` mean the same, so do ``images`` and ``image``; each image is a path
    inside ``root``, bytes, or {"bytes", "path"}. Numbers become text.
    """
    question = fields.get("problem")
    question = fields.get("question") if question is None else question
    if question is None:
        raise RecordError(origin, f"no problem or question among {sorted(fields)}", "rename it")
    question = _text(question, "question", origin)
    if not question.strip():
        raise RecordError(origin, "empty question")
    answer = fields.get("answer")
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    missing = answer is None or answer != answer
    answer = "" if missing else _text(answer, "answer", origin).strip()
    if require_answer and not answer:
        raise RecordError(origin, "empty answer")
    images = fields.get("images")
    images = _as_list(fields.get("image") if images is None else images)
    name = fields.get("id")
    return Record(
        id=os.path.basename(origin) if name is None else _text(name, "id", origin),
        question=question,
        answer=answer,
        images=tuple(image_ref(image, origin, root) for image in images),
        choices=tuple(_text(c, "a choice", origin) for c in _as_list(fields.get("choices"))),
        source=_text(fields.get("source") or "", "source", origin),
        extra={k: v for k, v in fields.items() if k not in _KNOWN},
        origin=origin,
    )


def _parse_json(line: bytes, origin: str) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RecordError(origin, f"not valid JSON ({error})", "one JSON object a line") from None
    if not isinstance(fields, dict):
        raise RecordError(origin, f"a JSON {type(fields).__name__}, not an object")
    return fields


def _locate(ends: list[int], index: int) -> tuple[int, int]:
    """Which part holds item ``index``, and where in it; ``ends`` counts the items up to its end."""
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


class _Jsonl:
    """Lines of a JSONL file by their byte offsets; blank lines are no records."""

    def __init__(self, path: str):
        self.path = path
        table, position = array("q"), 0
        with open(path, "rb") as file:
            for row, line in enumerate(file, start=1):
                if line.strip():
                    table.extend((position, len(line), row))
                position += len(line)
        self.table = np.array(table, np.int64).reshape(-1, 3)
        self.num_bytes = position

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> tuple[dict[str, Any], str]:
        start, length, row = self.table[index].tolist()
        # Opened for each read: works in any thread and in any worker process.
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(length)
        origin = f"{self.path}:{row}"
        return _parse_json(line, origin), origin


def _single_precision(schema: Any) -> set[str]:
    """The columns of single-precision numbers or lists of them."""
    kinds = ("float", "halffloat")
    return {one.name for one in schema if str(getattr(one.type, "value_type", one.type)) in kinds}


class Parquet:
    """Rows of a parquet file; the row groups read last are kept, up to 256 MiB."""

    def __init__(self, path: str):
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except Exception as error:  # pyarrow's own error classes
            raise ValueError(f"{path}: not a parquet file ({error})") from None
        table = self._file.metadata
        sizes = (table.row_group(g).num_rows for g in range(table.num_row_groups))
        self.ends = list(itertools.accumulate(sizes))
        self.num_bytes = os.path.getsize(path)
        self._cache, self._lock = OrderedDict(), threading.Lock()

    def __reduce__(self) -> tuple:
        return Parquet, (self.path,)  # a worker process opens the file for itself

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def columns(self) -> set[str]:
        """The names of the table's fields."""
        return set(self._file.schema_arrow.names)

    def _row_group(self, group: int):
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            self._cache[group] = self._file.read_row_group(group, use_threads=False)
            while len(self._cache) > 1 and (
                sum(table.nbytes for table in self._cache.values()) > _ROW_GROUP_CACHE_BYTES
            ):
                self._cache.popitem(last=False)
            return self._cache[group]

    def read(self, index: int) -> tuple[dict[str, Any], str]:
        """Fields and origin of one record."""
        origin = f"{self.path}:{index + 1}"
        group, within = _locate(self.ends, index)
        try:
            table = self._row_group(group).slice(within, 1)
            fields = table.to_pylist()[0]
            for name in _single_precision(table.schema) & fields.keys():
                value = fields[name]
                fields[name] = [*map(_double, value)] if isinstance(value, list) else _double(value)
            return fields, origin
        except Exception as error:  # a damaged page, or text that is not UTF-8
            raise RecordError(origin, f"cannot be read ({error})") from None


def _parse_example(data: bytes, origin: str) -> dict[str, Any]:
    """A serialized tf.train.Example -> fields; single values are unpacked."""
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        # The generated module makes its classes when it is imported.
        example = tf_example_pb2.Example.FromString(data)  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise RecordError(origin, f"neither JSON nor a tf.train.Example ({error})") from None
    fields: dict[str, Any] = {}
    for name, feature in example.features.feature.items():
        values = list(getattr(feature, feature.WhichOneof("kind") or "bytes_list").value)
        values = [*map(_double, values)]  # of a float_list: its numbers are of single precision
        if feature.WhichOneof("kind") == "bytes_list" and name not in ("images", "image"):
            with contextlib.suppress(UnicodeDecodeError):  # a binary feature that nobody asked for
                values = [value.decode("utf-8") for value in values]
        fields[name] = values[0] if len(values) == 1 else values
    return fields


class _ArrayRecord:
    """Anything with random access to serialized records: JSON objects or tf.train.Example."""

    def __init__(self, name: str, raw: Any, num_bytes: int):
        self.name, self.raw, self.num_bytes = name, raw, num_bytes
        self.path = None if name.startswith("tfds:") else name

    def __len__(self) -> int:
        return len(self.raw)

    def read(self, index: int) -> tuple[dict[str, Any], str]:
        origin = f"{self.name}:{index + 1}"
        data = self.raw[index]
        if data[:1] == b"{":
            return _parse_json(data, origin), origin
        return _parse_example(data, origin), origin


def _open_array_record(path: str) -> _ArrayRecord:
    import grain

    try:
        raw = grain.sources.ArrayRecordDataSource([path])
    except Exception as error:  # array_record raises RuntimeError or ValueError by version
        raise ValueError(f"{path}: not an ArrayRecord file ({error})") from None
    return _ArrayRecord(path, raw, os.path.getsize(path))


def _open_tfds(match: re.Match) -> _ArrayRecord:
    import tensorflow_datasets as tfds

    name, split = match["name"], match["split"] or "train"
    folder = Path(match["dir"]) / name / match["version"]
    if not (folder / "dataset_info.json").is_file():
        raise FileNotFoundError(f"{folder}: no TFDS data set here (no dataset_info.json)")
    builder = tfds.builder_from_directory(folder)
    form = builder.info.file_format
    if form is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{folder}: file format {form and form.value} has no random access; "
            "build the data set with file_format='array_record'"
        )
    try:
        # TFDS would decode images itself, without our checks (and not at all inside a Sequence
        # when TensorFlow is absent): take the serialized examples. Its decorator hides its types.
        method = tfds.decode.DeserializeMethod.RAW_BYTES
        raw = builder.as_data_source(split, deserialize_method=method)  # pyright: ignore[reportCallIssue]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no split {split!r} ({error})") from None
    return _ArrayRecord(f"tfds:{name}:{match['version']}[{split}]", raw, builder.info.dataset_size)


# What opens a file, by its suffix.
OPENERS: dict[str, Callable[[str], Reader]] = {
    ".jsonl": _Jsonl,
    ".parquet": Parquet,
    ".array_record": _open_array_record,
}


class Records:
    """Random access to the records of one or several files: ``len(records)``, ``records[i]``.

    ``fingerprint`` changes when the data do: number of records and of bytes, hash of a sample.
    """

    def __init__(self, readers: Sequence[Reader], roots: list[str], require_answer: bool = True):
        self._readers, self._roots, self._require_answer = readers, roots, require_answer
        self._ends = list(itertools.accumulate(len(reader) for reader in readers))
        # A TFDS data set is none: its version stands for its content.
        files = [getattr(reader, "path", None) for reader in readers]
        sample = content_hash(filter(None, files))
        self.fingerprint = f"{len(self)}:{sum(reader.num_bytes for reader in readers)}:{sample}"

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        """Record ``index``; RecordError where the row is bad, IndexError out of range."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        which, within = _locate(self._ends, index)
        fields, origin = self._readers[which].read(within)
        return to_record(
            fields, origin=origin, root=self._roots[which], require_answer=self._require_answer
        )


def open_records(
    path: str | os.PathLike,
    data_root: str | os.PathLike | None = None,
    *,
    require_answer: bool = True,
) -> Records:
    """Open ``.jsonl``, ``.parquet`` or ``.array_record`` files, or a TFDS data set.

    Args:
        path: a file, a glob pattern ("train-*.parquet", in sorted order), or
            "tfds:name:version@data_dir" ("tfds:name:version[test]@data_dir" for another split
            than train).
        data_root: the folder that image paths are relative to and must stay inside; by default
            the folder of the file.
        require_answer: whether a record without an answer is an error.

    FileNotFoundError or ValueError, naming the file, when it cannot be opened.
    """
    path = os.fspath(path)
    match = _TFDS.fullmatch(path)
    if match:
        root = os.fspath(data_root) if data_root else match["dir"]
        return Records([_open_tfds(match)], [root], require_answer)
    files = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not files:
        raise FileNotFoundError(f"{path}: no such file")
    if data_root and not os.path.isdir(data_root):
        raise FileNotFoundError(f"data_root {data_root}: no such directory")
    readers, roots = [], []
    for file in files:
        suffix = Path(file).suffix.partition("-")[0]  # data.array_record-00000-of-00002
        if suffix not in OPENERS or not os.path.isfile(file):
            raise ValueError(f"{file}: records are read from files {', '.join(OPENERS)}")
        readers.append(OPENERS[suffix](file))
        roots.append(os.fspath(data_root or os.path.dirname(os.path.abspath(file))))
    return Records(readers, roots, require_answer)


def write_array_record(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows of fields (image bytes allowed) as an ArrayRecord file; returns their number.

    Written under a temporary name and renamed, so that nothing half-written remains.
    """
    # A compiled module without types.
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    def portable(value: Any) -> Any:
        if isinstance(value, bytes):
            return {"bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return {**value, **portable(value["bytes"])}
        return [portable(v) for v in value] if isinstance(value, list | tuple) else value

    count = 0
    with whole(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        for row in rows:
            fields = {name: portable(value) for name, value in row.items()}
            writer.write(json.dumps(fields, ensure_ascii=False).encode("utf-8"))
            count += 1
        writer.close()
    return count
