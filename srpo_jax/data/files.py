"""Files on disk or on a bucket: read line by line, written whole or growing, known by a sample.

A path is local or ``gs://...``; what happens to buckets goes through ``etils.epath``
(data/buckets.py). Two things differ there. An object cannot be renamed in place, but it appears
only when its upload is complete, so that a file is whole as well; a folder is not: its files appear
one by one. And an object cannot grow: `Growing` sends it again, whole.
"""

import contextlib
import hashlib
import itertools
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from srpo_jax.data.buckets import (
    AnyPath,
    answering,
    holds_something,
    located,
    on_bucket,
    open_bytes,
    reader,
    size_of,
)
from srpo_jax.data.errors import RecordError, shown

Row = Mapping[str, Any]

SEND_SECONDS = 30.0  # at least, between two uploads of a file that grows


def absolute(path: AnyPath) -> epath.Path:
    """The path from the root, ``~`` filled in; one on a bucket as it is.

    Raises what `located` does.
    """
    text = os.fspath(path)
    return located(text if on_bucket(text) else os.path.abspath(os.path.expanduser(text)))


def parse_json(line: bytes, origin: str) -> dict[str, Any]:
    """The JSON object of one line (a byte-order mark may lead it); RecordError for other things."""
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        at = isinstance(error, json.JSONDecodeError)
        reason = f"{error.msg}, character {error.pos + 1}" if at else str(error)
        raise RecordError(origin, f"not valid JSON ({reason})", "one JSON object a line") from None
    if not isinstance(fields, dict):
        raise RecordError(
            origin,
            f"a JSON {type(fields).__name__}, not an object: {shown(fields)}",
            "one JSON object a line",
        )
    return fields


def numbered_jsonl(
    path: AnyPath, *, skip_broken: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank.

    Lines end at a line feed and nowhere else: JSON text may hold U+2028 and its like. RecordError
    with ``path:line`` for a line that is no JSON object; ``skip_broken`` passes over such lines, as
    a log has them where its program was killed.
    """
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, parse_json(line, f"{os.fspath(path)}:{number}")
            except RecordError:
                if not skip_broken:
                    raise


def read_jsonl(path: AnyPath, *, skip_broken: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; see ``numbered_jsonl``."""
    return [row for _, row in numbered_jsonl(path, skip_broken=skip_broken)]


@contextlib.contextmanager
def _naming(path: AnyPath) -> Iterator[None]:
    """Errors of the operating system name the file, where only a handle had been at hand too."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


# --- whole -----------------------------------------------------------------------------------


@contextlib.contextmanager
def whole(path: AnyPath) -> Iterator[Path]:
    """A temporary local path for a file, or a folder, that the block makes there.

    When the block succeeds it is synced to disk and takes the place of ``path`` (of a folder: only
    where there is none, or an empty one); when it fails, it is removed. Missing parents are made.
    """
    if on_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / epath.Path(path).name
            yield temporary
            send(temporary, path)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _naming(path):
            yield temporary
            for part in (temporary, *temporary.rglob("*")):
                _sync(part)
            os.replace(temporary, path)
            _sync(path.parent)  # else the new name may be lost with the power
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems cannot do that to a folder
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def remove_left_over(folder: AnyPath) -> None:
    """Remove what `whole` has begun in a folder, or in one in it, by programs that were killed."""
    if on_bucket(folder):
        return
    for path in (*Path(folder).glob(".*.tmp"), *Path(folder).glob("*/.*.tmp")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def send(source: Path, path: AnyPath) -> None:
    """Copy a local file, or the files of a folder, to a bucket.

    FileExistsError for a folder where there is something already, BucketError where it fails.
    """
    target = located(path)
    if source.is_dir():
        if holds_something(target):
            raise FileExistsError(f"{path} exists and is not an empty directory")
        for part in sorted(source.rglob("*")):
            if part.is_file():
                send(part, target / part.relative_to(source).as_posix())
        return
    with answering(path), open(source, "rb") as file:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)


def write_text(path: AnyPath, text: str) -> None:
    """Write ``text`` as UTF-8; what has no place there (half a surrogate pair) becomes "?"."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: AnyPath, value: Any) -> None:
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: AnyPath, rows: Iterable[Row]) -> None:
    """Write one line of JSON for each row."""
    with jsonl_writer(path) as write:
        for row in rows:
            write(row)


@contextlib.contextmanager
def jsonl_writer(path: AnyPath) -> Iterator[Callable[[Row], None]]:
    """Yields ``write(row)``, for rows that arrive one by one."""
    escaped = "backslashreplace"  # as in Growing
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8", errors=escaped) as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


# --- growing ---------------------------------------------------------------------------------


class Growing:
    """A file that grows by whole lines; a last line that was torn by a kill is cut off first.

    Every line is handed to the operating system at once. On a bucket the file is a local copy,
    which is sent every `SEND_SECONDS` (more rarely where sending takes long) and by ``close``.
    """

    def __init__(self, path: AnyPath):
        """Open or make it, and its parents."""
        self.path, self._copies = path, contextlib.ExitStack()
        self.local = Path(path)
        self._sent, self._pause = time.monotonic(), SEND_SECONDS
        if on_bucket(path):
            folder = self._copies.enter_context(tempfile.TemporaryDirectory())
            self.local = Path(folder) / self.local.name
            if epath.Path(path).exists():
                with open_bytes(path) as file, open(self.local, "wb") as out:
                    shutil.copyfileobj(file, out)
        self.local.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.local, "a+b", buffering=0)
        if self._file.tell():
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = content.rfind(b"\n") + 1
            self._file.truncate(end)

    def append(self, line: str) -> int:
        """Write a line; returns where it starts. OSError, naming the file, where it cannot."""
        start = self._file.seek(0, os.SEEK_END)
        # Half a surrogate pair is written as its JSON escape, which reads back as it was.
        rest = memoryview(line.encode(errors="backslashreplace") + b"\n")
        with _naming(self.path):
            while rest:  # a disk that fills up takes a part
                rest = rest[self._file.write(rest) :]
        if time.monotonic() - self._sent > self._pause:
            self._send()
        return start

    def _send(self) -> None:
        if on_bucket(self.path):
            start = time.monotonic()
            send(self.local, self.path)
            self._sent = time.monotonic()
            self._pause = max(SEND_SECONDS, 10 * (self._sent - start))

    def close(self) -> None:
        """Send what is left, and close."""
        if not self._file.closed:
            self._file.close()
            self._send()
            self._copies.close()


class JsonlLog:
    """JSON Lines output that survives an interruption.

    The rows of an id go as one line to ``<path>.partial``, whose first line holds ``settings``. A
    second run with the same settings finds in ``done`` the ids already there; with other settings
    it refuses, since rows of two runs must not be mixed. ``finish`` writes ``path`` and removes the
    partial file.
    """

    def __init__(self, path: AnyPath, settings: dict[str, Any]):
        """Go on with ``<path>.partial`` if it is there; ValueError when it has other settings."""
        self.path = epath.Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._offsets: dict[str, int] = {}
        self._head = json.dumps({"settings": settings})
        # Made by the first row: a run that fails before it leaves nothing.
        self._file: Growing | None = None
        if self.partial.exists():
            self._load()

    @property
    def done(self) -> set[str]:
        """The ids (as text) whose rows are already in the partial file."""
        return set(self._offsets)

    def _load(self) -> None:
        """Index the rows of an earlier run."""
        self._file = Growing(self.partial)
        with open(self._file.local, "rb") as file:
            line = file.readline()
            if not line:  # torn at its very start: nothing to keep
                self._file.append(self._head)
                return
            found, wanted = self._value(line, "settings", 1), json.loads(self._head)["settings"]
            if found != wanted:
                self._file.close()
                changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
                raise ValueError(
                    f"{self.partial} was begun with other settings ({', '.join(changed)}): "
                    "delete it to start anew, or run with the settings it was begun with"
                )
            end = len(line)
            for number, line in enumerate(iter(file.readline, b""), 2):
                self._offsets[str(self._value(line, "id", number))] = end
                end += len(line)

    def _value(self, line: bytes, name: str, number: int) -> Any:
        """What a line says; ValueError, with the remedy, where it was damaged."""
        try:
            return json.loads(line)[name]
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"{self.partial}:{number}: is damaged; delete that line (its rows are made again) "
                "or, if it is the first, the file"
            ) from None

    def append(self, row_id: Any, rows: list[dict[str, Any]]) -> None:
        """Append all rows of one id."""
        if self._file is None:
            self._file = Growing(self.partial)
            self._file.append(self._head)
        line = json.dumps({"id": row_id, "rows": rows}, ensure_ascii=False)
        self._offsets[str(row_id)] = self._file.append(line)

    def rows(self, ids: Iterable[Any] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of ``ids``, in that order; of all as they came without it."""
        if self._file is None:
            return
        with open(self._file.local, "rb") as file:
            for row_id in list(self._offsets) if ids is None else ids:
                file.seek(self._offsets[str(row_id)])
                yield from json.loads(file.readline())["rows"]

    def close(self) -> None:
        """Keep what is there for another run."""
        if self._file is not None:
            self._file.close()

    def finish(self, ids: Iterable[Any] | None = None) -> None:
        """Write `rows` to ``path`` and remove the partial file."""
        write_jsonl(self.path, self.rows(ids))
        self.close()
        self.partial.unlink(missing_ok=True)


# --- content ---------------------------------------------------------------------------------


def content_hash(paths: Iterable[AnyPath]) -> str:
    """16 hexadecimal digits of files' sizes and of 64 blocks of 4 KiB, evenly spaced, in each.

    Of a file of up to 256 KiB that is all of it; of a larger one a sample, in bounded time.
    """
    digest, block, count = hashlib.blake2b(digest_size=8), 4096, 64
    for path in paths:
        read, size = reader(path), size_of(path)
        digest.update(size.to_bytes(8, "little"))
        if size <= block * count:
            digest.update(read(0, size))
            continue
        starts = [(size - block) * i // (count - 1) for i in range(count)]
        with ThreadPoolExecutor(16) as pool:  # each is a request, which takes its time
            run = pool.map if on_bucket(path) else map
            for data in run(read, starts, itertools.repeat(block)):
                digest.update(data)
    return digest.hexdigest()


def same_content(saved: str, found: str) -> bool:
    """Whether two fingerprints ("records:bytes:hash") are of the same data.

    One that was saved before there were hashes only tells the two numbers.
    """
    return found == saved or (saved.count(":") == 1 and found.startswith(f"{saved}:"))
