"""Files of records, read lazily row by row: JSONL, parquet, ArrayRecord and TFDS.

Nothing is unpickled, no address is fetched, and images stay as they are.
"""

import bisect
import contextlib
import itertools
import os
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from srpo_jax.data import buckets
from srpo_jax.data.errors import RecordError
from srpo_jax.data.files import parse_json

_TFDS = re.compile(
    r"(?:tfds:)?(?P<name>\w+(?:/[\w.-]+)?):(?P<version>\d+\.\d+\.\d+)"
    r"(?:\[(?P<split>.+)\])?@(?P<dir>.+)"
)
_ROW_GROUP_CACHE_BYTES = 256 * 2**20


class Reader(Protocol):
    """One open file of records. Picklable: worker processes take it along."""

    num_bytes: int

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> tuple[dict[str, Any], str]:
        """Fields and origin ("file:row") of one record; RecordError where it cannot be read."""
        ...


def _double(value: Any) -> Any:
    """A single-precision number as the one that its shortest text names: 0.1, not 0.1000000015."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Which part holds item ``index``, and where in it; ``ends`` counts the items up to its end."""
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


class _Jsonl:
    """Lines of a JSONL file by their byte offsets; blank lines are no records."""

    def __init__(self, path: str):
        self.path, self._read = path, buckets.reader(path)
        table, position = array("q"), 0
        with buckets.open_bytes(path) as file:
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
        origin = f"{self.path}:{row}"
        return parse_json(self._read(start, length), origin), origin


def _single_precision(schema: Any) -> set[str]:
    """The columns of single-precision numbers or lists of them."""
    kinds = ("float", "halffloat")
    return {one.name for one in schema if str(getattr(one.type, "value_type", one.type)) in kinds}


class Parquet:
    """Rows of a parquet file; the row groups read last are kept, up to 256 MiB."""

    def __init__(self, path: str):
        import pyarrow.parquet as pq

        self.path, remote = path, buckets.on_bucket(path)
        file = buckets.Ranges(path) if remote else path
        try:
            self._file = pq.ParquetFile(file, memory_map=not remote, pre_buffer=remote)
        except buckets.BucketError:
            raise
        except Exception as error:  # pyarrow's own error classes
            raise ValueError(f"{path}: not a parquet file ({error})") from None
        table = self._file.metadata
        sizes = (table.row_group(g).num_rows for g in range(table.num_row_groups))
        self.ends = list(itertools.accumulate(sizes))
        self.num_bytes = buckets.size_of(path)
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
        group, within = locate(self.ends, index)
        try:
            table = self._row_group(group).slice(within, 1)
            fields = table.to_pylist()[0]
            for name in _single_precision(table.schema) & fields.keys():
                value = fields[name]
                fields[name] = [*map(_double, value)] if isinstance(value, list) else _double(value)
            return fields, origin
        except buckets.BucketError:
            raise
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
        # A list of one looks like a single value; only of choices a list is all that is meant.
        fields[name] = values[0] if len(values) == 1 and name != "choices" else values
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
            return parse_json(data, origin), origin
        return _parse_example(data, origin), origin


def _on_disk(path: str, title: str) -> None:
    if buckets.on_bucket(path):
        raise ValueError(
            f"{title}: ArrayRecord files are read from disks only: copy it (gcloud storage cp -r), "
            "or give .jsonl or .parquet"
        )


def _open_array_record(path: str) -> _ArrayRecord:
    import grain

    _on_disk(path, path)
    try:
        raw = grain.sources.ArrayRecordDataSource([path])
    except Exception as error:  # array_record raises RuntimeError or ValueError by version
        raise ValueError(f"{path}: not an ArrayRecord file ({error})") from None
    return _ArrayRecord(path, raw, os.path.getsize(path))


def open_tfds(path: str) -> tuple[_ArrayRecord, str] | None:
    """The reader of a data set "tfds:name:version[split]@folder", and its folder; None of others.

    FileNotFoundError where there is none, ValueError for another file format or split.
    """
    match = _TFDS.fullmatch(path)
    if match is None or os.path.exists(path):
        return None
    _on_disk(match["dir"], path)
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
    title = f"tfds:{name}:{match['version']}[{split}]"
    return _ArrayRecord(title, raw, builder.info.dataset_size), match["dir"]


# What opens a file, by its suffix.
OPENERS: dict[str, Callable[[str], Reader]] = {
    ".jsonl": _Jsonl,
    ".parquet": Parquet,
    ".array_record": _open_array_record,
}
