"""What every command-line tool shares: one-line errors, JSON Lines in and out, progress.

    def main(args: argparse.Namespace) -> None: ...

    if __name__ == "__main__":
        cli.run(main, make_parser())

A tool's ``main`` raises ordinary exceptions whose text names the file, row or key and the remedy;
``run`` prints that text as one line and exits with 1 (with ``--debug``: the traceback). Outputs are
written under a temporary name and renamed when they are whole.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PLAIN_PROGRESS_SECONDS = 10.0  # between two lines of progress where stderr is not a terminal


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser whose ``--help`` ends with ``example``, with ``--debug`` already there."""
    out = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return out


def run(
    main: Callable[[argparse.Namespace], int | None],
    arguments: argparse.ArgumentParser,
    argv: list[str] | None = None,
) -> None:
    """Parse ``argv``, call ``main`` and exit: 0 on success, 1 on an error, 130 on Ctrl-C."""
    args = arguments.parse_args(argv)
    try:
        code = main(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if args.debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code or 0)


def one_line(error: BaseException) -> str:
    """The text of an exception on one line; its type too where the text alone says little."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def positive(text: str) -> int:
    """``type=`` of an argument that must be a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {value}")
    return value


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The objects of a JSON Lines file; see ``numbered_jsonl``."""
    return [row for _, row in numbered_jsonl(path)]


def numbered_jsonl(path: str | os.PathLike) -> list[tuple[int, dict]]:
    """(line number from 1, object) of every line of a JSON Lines file that is not blank.

    Raises ValueError with ``path:line`` where a line is not a JSON object, FileNotFoundError when
    the file is missing.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, found {row!r:.60}")
            rows.append((number, row))
    return rows


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Write objects as JSON Lines under a temporary name, then rename."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it when the block succeeds, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_report(path: str | os.PathLike, summary: dict, page: str) -> None:
    """``path``.json with the summary and ``path``.md with the page; either ending is dropped."""
    base = Path(path)
    base = base.with_suffix("") if base.suffix in (".json", ".md") else base
    text = json.dumps(summary, ensure_ascii=False, indent=2) + "\n"
    for ending, content in ((".json", text), (".md", page)):
        with atomic(base.with_name(base.name + ending)) as temporary:
            temporary.write_text(content, encoding="utf-8")


class ResumableJsonl:
    """JSON Lines output that survives an interruption.

    The rows of an id go as one line to ``<path>.partial``, whose first line holds ``settings``. A
    second run with the same settings finds in ``done`` the ids already there; with other settings
    it refuses, since rows of two runs must not be mixed. ``finish`` writes the rows in the order
    of the given ids, renames, and removes the partial file.
    """

    def __init__(self, path: str | os.PathLike, settings: dict):
        """Resume ``<path>.partial`` if it is there; ValueError when it has other settings."""
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._offsets: dict[str, int] = {}
        self._head = json.dumps({"settings": settings}).encode() + b"\n"
        self._file = None  # made by the first row: a run that fails before it leaves nothing
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
                    f"{self.partial} was started with other settings ({', '.join(changed)}): "
                    "delete it to start anew, or run with the settings it was started with"
                )
            end = len(line)
            for line in iter(file.readline, b""):
                if not line.endswith(b"\n"):
                    break
                self._offsets[str(json.loads(line)["id"])] = end
                end += len(line)
            file.truncate(end)

    def write(self, row_id: Any, rows: list[dict]) -> None:
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

    def finish(self, ids: Iterable[Any]) -> None:
        """Write the rows of ``ids`` in that order to ``path`` and remove the partial file."""
        if self._file is not None:
            self._file.close()
        with contextlib.ExitStack() as files:
            target = files.enter_context(open(files.enter_context(atomic(self.path)), "wb"))
            source = files.enter_context(open(self.partial, "rb")) if self._offsets else None
            for row_id in ids:
                source.seek(self._offsets[str(row_id)])
                for row in json.loads(source.readline())["rows"]:
                    target.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.partial.unlink(missing_ok=True)


@contextlib.contextmanager
def progress(label: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show progress on stderr: a rich bar on a terminal, else a plain line every ten seconds.

    Yields ``advance(n)``.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n=1: bar.advance(task, n)
        return
    start = last = time.monotonic()
    count = 0

    def advance(n: int = 1) -> None:
        nonlocal count, last
        count += n
        now = time.monotonic()
        if now - last >= PLAIN_PROGRESS_SECONDS or count >= total:
            last = now
            print(f"{label}: {count}/{total} {unit} {now - start:.0f} s", file=sys.stderr)

    yield advance
