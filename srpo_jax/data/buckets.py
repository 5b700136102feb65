"""Paths that may lie on a bucket (``gs://...``): what is there, and bytes from any place of it.

All of it goes through ``etils.epath``, and through gcsfs underneath. gcsfs sends a request that
failed in passing (time-outs, broken connections, 408, 429, 5xx) up to six times with growing
pauses; what fails then is an error here too.
"""

import contextlib
import functools
import glob
import importlib.util
import io
import os
import posixpath
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from etils import epath

AnyPath = str | os.PathLike[str]

LIBRARIES = ("gcsfs", "tensorflow")  # of which epath needs one to reach a bucket
BLOCK_BYTES = 8 << 20  # of one request while a file is read from its start to its end


class BucketError(RuntimeError):
    """A bucket cannot be reached, or does not answer; the message names the path and the remedy."""


def on_bucket(path: AnyPath) -> bool:
    """Whether a path is none of this machine's disks."""
    return "://" in os.fspath(path)


def located(path: AnyPath) -> epath.Path:
    """The path, for what works on disks and on buckets alike.

    BucketError for one that nothing here can reach.
    """
    text = os.fspath(path)
    if on_bucket(text):
        if not text.startswith("gs://"):
            raise BucketError(f"{text}: of buckets only gs:// is supported; mount the others")
        if not any(map(importlib.util.find_spec, LIBRARIES)):
            raise BucketError(f"{text}: gs:// paths need gcsfs: pip install gcsfs")
    return epath.Path(text)


def folder_of(path: str) -> str:
    """The folder that a file lies in, from the root."""
    return posixpath.dirname(path) if on_bucket(path) else os.path.dirname(os.path.abspath(path))


def expand(pattern: str) -> list[str]:
    """The paths that a path or glob pattern names, sorted; none where nothing is there."""
    if located(pattern).exists():
        return [pattern]
    if not on_bucket(pattern):
        return sorted(glob.glob(pattern))
    bucket, _, rest = pattern.removeprefix("gs://").partition("/")
    return sorted(map(os.fspath, located(f"gs://{bucket}").glob(rest)))


def is_file(path: AnyPath) -> bool:
    """Whether there is a regular file."""
    if not on_bucket(path):
        return os.path.isfile(path)
    return located(path).exists() and not located(path).is_dir()


def size_of(path: AnyPath) -> int:
    """Bytes of a file; OSError where there is none."""
    # (On disks epath's stat wants a name for the owner, which need not have one.)
    return Ranges(path).size if on_bucket(path) else os.path.getsize(path)


def holds_something(path: AnyPath) -> bool:
    """Whether there is a file, or a folder with something in it."""
    place = located(path)
    return place.exists() and (not place.is_dir() or any(place.iterdir()))


# --- bytes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(path: AnyPath) -> Iterator[None]:
    """Whatever a client of a bucket raises (it has many kinds of errors) as a BucketError."""
    try:
        yield
    except (BucketError, FileNotFoundError, IsADirectoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise BucketError(
            f"{path}: no answer ({type(error).__name__}: {said:.200}); is the bucket open to "
            "you (gcloud auth application-default login)? Run the same command again"
        ) from error


class Ranges(io.RawIOBase):
    """A file on a bucket, read at any place: one request for just the bytes that are wanted.

    Picklable by its path; `at` may be called from several threads.
    """

    def __init__(self, path: AnyPath):
        """OSError where there is no such file, BucketError where it cannot be read."""
        super().__init__()
        self.path, self._place = os.fspath(path), 0
        with answering(self.path), located(path).open("rb") as file:
            self.size = file.seek(0, os.SEEK_END)
            # fsspec's file objects fetch megabytes ahead of each place that is sought.
            self._objects = getattr(file, "fs", None)

    def __reduce__(self) -> tuple:
        return Ranges, (self.path,)

    def at(self, start: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``start``; fewer at the end of the file."""
        end = min(start + length, self.size)
        if end <= start:
            return b""
        with answering(self.path):
            if self._objects is not None:
                return self._objects.cat_file(self.path, start=start, end=end)
            with epath.Path(self.path).open("rb") as file:
                file.seek(start)
                return file.read(end - start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self.size)[whence]
        return self._place

    def readall(self) -> bytes:
        data = self.at(self._place, self.size)
        self._place += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.at(self._place, len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def open_bytes(path: AnyPath, block: int = BLOCK_BYTES) -> BinaryIO:
    """A file to read; of one on a bucket ``block`` bytes are fetched at a time."""
    return io.BufferedReader(Ranges(path), block) if on_bucket(path) else open(path, "rb")


def read_bytes(path: AnyPath) -> bytes:
    """All of a file."""
    with open_bytes(path) as file:
        return file.read()


def reader(path: AnyPath) -> Callable[[int, int], bytes]:
    """``read(start, length)`` of a file, for any thread, and picklable for any process."""
    return Ranges(path).at if on_bucket(path) else functools.partial(_read_local, path)


def _read_local(path: AnyPath, start: int, length: int) -> bytes:
    # Opened for each read: works in any thread and in any worker process.
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(length)
