"""Files that appear whole, and a JSON Lines log that goes on after an interruption."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

Row = Mapping[str, Any]


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` for a file, or a folder, that the block makes there.

    When the block succeeds it is synced to disk and takes the place of ``path`` (of a folder: only
    where there is none, or an empty one); when it fails, it is removed. Missing parents are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for part in (temporary, *temporary.rglob("*")):
            if part.is_file():
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8; what has no place there (half a surrogate pair) becomes "?"."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write one line of JSON for each row."""
    with jsonl_writer(path) as write:
        for row in rows:
            write(row)


@contextlib.contextmanager
def jsonl_writer(path: str | os.PathLike[str]) -> Iterator[Callable[[Row], None]]:
    """Yields ``write(row)``, for rows that arrive one by one."""
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


class JsonlLog:
    """JSON Lines output that survives an interruption.

    The rows of an id go as one line to ``<path>.partial``, whose first line holds ``settings``. A
    second run with the same settings finds in ``done`` the ids already there; with other settings
    it refuses, since rows of two runs must not be mixed. ``finish`` writes ``path`` and removes the
    partial file.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]):
        """Go on with ``<path>.partial`` if it is there; ValueError when it has other settings."""
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._offsets: dict[str, int] = {}
        self._head = json.dumps({"settings": settings}).encode() + b"\n"
        # Made by the first row: a run that fails before it leaves nothing.
        self._file: IO[bytes] | None = None
        if self.partial.exists():
            self._load()

    @property
    def done(self) -> set[str]:
        """The ids (as text) whose rows are already in the partial file."""
        return set(self._offsets)

    def _load(self) -> None:
        """Index the rows of an earlier run and cut off a line that was torn by its end."""
        with open(self.partial, "r+b") as file:
            line = file.readline()
            if not line.endswith(b"\n"):  # torn at its very start: nothing to keep
                file.truncate(0)
                return
            found, wanted = json.loads(line)["settings"], json.loads(self._head)["settings"]
            if found != wanted:
                changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
                raise ValueError(
                    f"{self.partial} was begun with other settings ({', '.join(changed)}): "
                    "delete it to start anew, or run with the settings it was begun with"
                )
            end = len(line)
            for line in iter(file.readline, b""):
                if not line.endswith(b"\n"):
                    break
                self._offsets[str(json.loads(line)["id"])] = end
                end += len(line)
            file.truncate(end)

    def append(self, row_id: Any, rows: list[dict[str, Any]]) -> None:
        """Append all rows of one id and flush them."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.partial, "ab")
            if self._file.tell() == 0:
                self._file.write(self._head)
        self._offsets[str(row_id)] = self._file.tell()
        line = json.dumps({"id": row_id, "rows": rows}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def rows(self, ids: Iterable[Any] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of ``ids``, in that order; of all as they came without it."""
        if not self._offsets:
            return
        with open(self.partial, "rb") as file:
            for row_id in list(self._offsets) if ids is None else ids:
                file.seek(self._offsets[str(row_id)])
                yield from json.loads(file.readline())["rows"]

    def finish(self, ids: Iterable[Any] | None = None) -> None:
        """Write `rows` to ``path`` and remove the partial file."""
        if self._file is not None:
            self._file.close()
        write_jsonl(self.path, self.rows(ids))
        self.partial.unlink(missing_ok=True)
