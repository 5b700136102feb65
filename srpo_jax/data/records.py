"""Records of image-question-answer data, from one or several files: random access, read lazily.

One record is read when it is asked for (readers.py), and images stay undecoded (``ImageRef``) until
``load_image``.
"""

import base64
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from srpo_jax.data.buckets import expand, folder_of, is_file, located
from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import OWN, ColumnError, Columns, Contents, Record, contents, to_record
from srpo_jax.data.files import content_hash, whole
from srpo_jax.data.readers import OPENERS, Reader, locate, open_tfds

_SAMPLE_BYTES = 64 * 2**20  # read for a summary, about
_SAMPLE_FILES = 8


class RecordSource(Protocol):
    """Anything with random access to records: ``Records``, a list, a subset of either."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@dataclass(frozen=True)
class Summary:
    """What the first records of a source bring."""

    total: int  # records of the source
    looked_at: int
    files: int  # they are of
    images: int  # of these: with images, with choices, with an id, unusable
    choices: int
    ids: int
    bad: int
    unread: tuple[str, ...]  # columns that look like content and are not read

    def __str__(self) -> str:
        files = f" of {self.files} files" if self.files > 1 else ""
        part = self.looked_at < self.total
        looked = f", of the first {self.looked_at:,}{files}: " if part else ": "
        records = "record" if self.total == 1 else "records"
        text = (
            f"{self.total:,} {records}{looked}{self.images:,} with images, {self.choices:,} with "
            f"choices, {self.ids:,} with an id"
        )
        text += f", {self.bad:,} unusable" if self.bad else ""
        unread = ", ".join(self.unread[:5]) + (", ..." if len(self.unread) > 5 else "")
        return text + (f"; not read: {unread}" if unread else "")


class Records:
    """Random access to the records of one or several files: ``len(records)``, ``records[i]``.

    ``fingerprint`` changes when the data do: number of records and of bytes, hash of a sample.
    ``sizes`` counts the records of each source that was named, of which a mix draws by weight.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        roots: list[str],
        *,
        sizes: Sequence[int] = (),
        require_answer: bool = True,
        columns: Columns = OWN,
    ):
        self._readers, self._roots = readers, roots
        self._require_answer, self._columns = require_answer, columns
        self._ends = list(itertools.accumulate(len(reader) for reader in readers))
        self.sizes = tuple(sizes) or (len(self),)
        # A TFDS data set has no path: its version stands for its content.
        sample = content_hash(filter(None, (getattr(reader, "path", None) for reader in readers)))
        self.fingerprint = f"{len(self)}:{sum(reader.num_bytes for reader in readers)}:{sample}"

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        """Record ``index``; RecordError where the row is bad, IndexError out of range."""
        return self._read(index)[1]

    def contents(self, index: int) -> Contents:
        """What row ``index`` brings; raises as ``records[index]``."""
        return contents(*self._read(index), self._columns)

    def _read(self, index: int) -> tuple[dict[str, Any], Record]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        which, within = locate(self._ends, index)
        row, origin = self._readers[which].read(within)
        record = to_record(
            row,
            origin=origin,
            root=self._roots[which],
            require_answer=self._require_answer,
            columns=self._columns,
        )
        return row, record

    def place_of(self, index: int) -> str:
        """Where record ``index`` stands, without reading it."""
        which, within = locate(self._ends, index)
        path = getattr(self._readers[which], "path", None)
        return f"record {within + 1} of {path or 'the data set'}"

    def summary(self, limit: int = 1_000) -> Summary:
        """What the first ``limit`` records bring, of eight files or, of more sources, of one each.

        Fewer where records are large, so that about 64 MiB are read. ColumnError where content of
        one of them stands in a column that nobody reads.
        """
        found, bad = [], 0
        files = self._sample_files()
        for index in self._first(files, limit // len(files)):
            try:
                found.append(self.contents(index))
            except ColumnError:
                raise
            except RecordError:
                bad += 1
        return Summary(
            total=len(self),
            looked_at=len(found) + bad,
            files=len(files),
            images=sum(one.images > 0 for one in found),
            choices=sum(one.choices > 0 for one in found),
            ids=sum(one.has_id for one in found),
            bad=bad,
            unread=tuple(dict.fromkeys(name for one in found for name in one.unread)),
        )

    def _sample_files(self) -> list[int]:
        """Some files, spread evenly, and the first one of each source."""
        starts = itertools.accumulate(self.sizes[:-1], initial=0)
        spread = range(0, len(self._readers), -(-len(self._readers) // _SAMPLE_FILES))
        return sorted({locate(self._ends, start)[0] for start in starts} | {*spread})

    def _first(self, files: Sequence[int], limit: int) -> Iterator[int]:
        """The indices of the first records of each file: ``limit``, or fewer large ones."""
        for which in files:
            reader = self._readers[which]
            affordable = _SAMPLE_BYTES // len(files) * len(reader) // max(1, reader.num_bytes)
            start = self._ends[which] - len(reader)
            yield from range(start, start + min(len(reader), max(1, min(limit, affordable))))


def place_of(source: RecordSource, index: int) -> str:
    """What a record is called where it cannot be read."""
    named = getattr(source, "place_of", None)
    return named(index) if named else f"record {index + 1}"


def open_records(
    path: str | os.PathLike,
    data_root: str | os.PathLike | None = None,
    *,
    require_answer: bool = True,
    columns: Columns = OWN,
) -> Records:
    """Open ``.jsonl``, ``.parquet`` or ``.array_record`` files, or a TFDS data set.

    Args:
        path: one source, or several with commas between them: a file, a glob pattern
            ("train-*.parquet", in sorted order), or "tfds:name:version@data_dir"
            ("tfds:name:version[test]@data_dir" for another split than train).
        data_root: the folder that image paths are relative to and must stay inside; by default
            the folder of the file.
        require_answer: whether a record without an answer is an error.
        columns: foreign names of its fields.

    Raises:
        FileNotFoundError, ValueError: naming what is missing, has no records, or another format.
    """
    path = os.fspath(path)
    if data_root and not located(data_root).is_dir():
        raise FileNotFoundError(f"data_root {data_root}: no such directory")
    readers, roots, sizes = [], [], []
    for source in [path] if os.path.exists(path) else path.split(","):
        if not source.strip():
            raise ValueError(f"{path!r}: nothing is named between two commas; remove one")
        opened = _open_source(source.strip())
        for reader, folder in opened:
            readers.append(reader)
            roots.append(os.fspath(data_root or folder))
        sizes.append(sum(len(reader) for reader, _ in opened))
    return Records(readers, roots, sizes=sizes, require_answer=require_answer, columns=columns)


def _open_source(source: str) -> list[tuple[Reader, str]]:
    """The readers of one source, each with the folder that its images are relative to."""
    data_set = open_tfds(source)
    if data_set is not None:
        return [data_set]
    files = expand(source)
    if not files:
        raise FileNotFoundError(f"{source}: no such file")
    opened = []
    for file in files:
        suffix = Path(file).suffix.partition("-")[0]  # data.array_record-00000-of-00002
        if suffix not in OPENERS or not is_file(file):
            raise ValueError(f"{file}: records are read from files {', '.join(OPENERS)}")
        reader = OPENERS[suffix](file)
        if not len(reader):
            raise ValueError(f"{file}: holds no records; remove it, or leave it out")
        opened.append((reader, folder_of(file)))
    return opened


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
