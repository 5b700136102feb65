"""What a program shows while it works: a live table on a terminal, else a line or JSON a step."""

import contextlib
import datetime
import functools
import io
import json
import math
import os
import shutil
import statistics
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

PLAIN_PROGRESS_SECONDS = 10.0  # between two lines of progress where there is no terminal
COMPILE_SECONDS = 5.0  # of a compilation before a line says so where nothing is live
LEAST_BAR = 10  # columns of the table's progress bar; with less room there is none

# Metrics of the table: name, what the reader sees, how.
_TABLE = (
    ("loss", "loss", "{:.4g}"),
    ("reward/mean", "reward", "{:.3f}"),
    ("accuracy/first", "first", "{:.1%}"),
    ("accuracy/final", "final", "{:.1%}"),
    ("fix_rate", "fix", "{:.1%}"),
    ("harm_rate", "harm", "{:.1%}"),
    ("format_rate", "format", "{:.1%}"),
    ("truncated_share", "truncated", "{:.1%}"),
    ("filter/kept_share", "kept", "{:.1%}"),
    ("groups_without_signal", "no signal", "{:.1%}"),
    ("kl", "kl", "{:.2g}"),
    ("grad_norm", "grad norm", "{:.3g}"),
    ("lr", "lr", "{:.2g}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "mfu", "{:.1%}"),
)

_mode = "auto"  # `use`
_muted = False  # `mute`
_live: "Console | None" = None  # that owns the terminal


def use(mode: str) -> None:
    """Show all that follows as ``log.console`` asks: "auto", "plain" or "json".

    In "json" every line of standard output is an object: {"split", "step", metrics} of a step or an
    evaluation, {"fact", values, "text"}, {"progress", "done", "total", "unit", "seconds"}, or
    {"note"} of what has no values.
    """
    global _mode, _muted  # noqa: PLW0603  (there is one standard output)
    _mode, _muted = mode, False


def reach_any_locale() -> None:
    """Letters that a terminal's encoding does not have are written as numbers, and end no run."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not the stream of a test or a notebook
        sys.stdout.reconfigure(errors="backslashreplace")


def mute() -> None:
    """Show no progress from here on: on all processes but the first."""
    global _muted  # noqa: PLW0603
    _muted = True


def say(text: str, fact: str = "", **values: Any) -> None:
    """A line that stays. ``fact`` and ``values`` are what it tells, for "json"; one with a
    ``command`` is left to the terminal to wrap, so that it can be copied.
    """
    if _mode == "json":
        _put_json({"fact": fact, **values, "text": text} if fact else {"note": text})
        return
    if _for_people(sys.stdout) and "command" not in values:
        width = shutil.get_terminal_size().columns
        text = "\n".join(_by_words(line, width) for line in text.split("\n"))
    if _live is not None:
        _live.display.console.print(text, highlight=False, markup=False, soft_wrap=True)
    else:
        _put(text)


def _put(text: str, stream: Any = None) -> None:
    """One write, because several threads may have something to say."""
    stream = stream or sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def _put_json(row: Mapping[str, Any]) -> None:
    # JSON has no NaN, so that it is written as text.
    plain = {name: repr(value) if _odd(value) else value for name, value in row.items()}
    _put(json.dumps(plain, default=str))


def _for_people(stream: Any) -> bool:
    """Whether something live can be shown there."""
    return _mode == "auto" and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Console:
    """Rows of one run, on the first process: in mode "auto" a live table where stdout is a
    terminal, with a plain line kept every ``keep`` steps; else a line a step.
    """

    def __init__(self, total_steps: int, show: tuple[str, ...], keep: int = 10):
        self._total, self._show, self._keep = total_steps, show, keep
        self._row: Mapping[str, Any] = {}
        self._step, self._pace, self._begun = 0, 0.0, time.monotonic()
        self._times: deque[float] = deque(maxlen=20)
        self._work: tuple[str, float] | None = None  # what is compiled, since when
        self._timer: threading.Timer | None = None
        self._bars: list[Any] = []  # below the table
        self.display: Any = None
        if _for_people(sys.stdout):
            self._open()

    def _open(self) -> None:
        global _live  # noqa: PLW0603  (a terminal has one live display)
        from rich.live import Live  # noqa: PLC0415

        table: Any = lambda: self  # noqa: E731  (it draws itself anew each time)
        self.display = Live(get_renderable=table, refresh_per_second=4)
        self.display.start()
        _live = self

    def row(self, step: int, split: str, row: Mapping[str, Any]) -> None:
        """Show a row of metrics; of an evaluation, all that have plain names."""
        if split != "train":
            self._tell_row(step, split, row, [n for n in row if "/" not in n])
            return
        seconds = row.get("time/step") or 0.0
        self._times.append(seconds)
        self._pace = statistics.median(self._times)  # the first ones compile
        self._step, self._row = step, row
        kept = self._keep and (step % self._keep == 0 or step >= self._total)
        if self.display is None or kept:
            self._tell_row(step, split, row, self._show)

    def _tell_row(self, step: int, split: str, row: Mapping[str, Any], names: Any) -> None:
        if _mode == "json":
            _put_json({"split": split, "step": step, **row})
            return
        chosen = [n for n in names if isinstance(row.get(n), int | float)]
        head = f"step {step}/{self._total}" + ("" if split == "train" else f" {split}")
        parts = [head, *(f"{n} {_short(row[n])}" for n in chosen)]
        if split == "train" and (left := self._left()):
            parts.append(f"{left} left")
        width = self.display.console.width if self.display else sys.maxsize
        say("\n".join(packed(parts, width)))

    def begin(self, text: str, **values: Any) -> None:
        """A compilation begins; `end` tells that it is over."""
        self.end()
        self._work = (text, time.monotonic())
        if self.display is None:
            tell = functools.partial(say, text, "compiling", **values)
            self._timer = threading.Timer(COMPILE_SECONDS, tell)
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        """Nothing is compiled."""
        self._work = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Leave the last table as it stands."""
        global _live  # noqa: PLW0603
        self.end()
        if self.display is not None:
            self.display.stop()
            self.display, _live = None, None

    # --- the table ---

    def _left(self) -> str:
        """Time that the steps to come take at the present pace; "" where none are."""
        seconds = round((self._total - self._step) * self._pace)
        return str(datetime.timedelta(seconds=seconds)) if seconds > 0 else ""

    def __rich_console__(self, _: Any, options: Any) -> Iterator[Any]:
        """The table, in as many lines as the terminal's width asks for."""
        from rich.text import Text  # noqa: PLC0415

        width = options.max_width
        yield from self._head(width)
        found = [(label, show, self._row[n]) for n, label, show in _TABLE if _is(self._row, n)]
        lines = [*packed((f"{label} {_said(x, show)}" for label, show, x in found), width)]
        times = [(n[5:], x) for n, x in self._row.items() if n.startswith("time/")]
        if times:
            told = [f"{n} {x:.3g}" for n, x in times if n != "step"]
            lines += packed(["seconds:", *told], width)
        if self._work:
            text, since = self._work
            lines += packed([f"{text}:", _so_far(since)], width)
        elif not self._step and not self._row:
            lines += packed(["the first step:", _so_far(self._begun)], width)
        yield from (Text(line, no_wrap=True) for line in lines)
        yield from self._bars

    def _head(self, width: int) -> Iterator[Any]:
        """Step, bar and pace in one line; where there is no room for a bar, without it."""
        from rich.progress_bar import ProgressBar  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        total, pace = max(self._total, 1), []
        step = f"step {self._step:,}/{self._total:,}"
        if self._pace:
            left = self._left()
            pace = [f"{self._pace:.3g} s/step", f"{left} left" if left else "done"]
        pace = [f"{100 * self._step / total:.0f} %", *pace]
        room = width - len(step) - len("  ".join(pace)) - 4
        if room < LEAST_BAR:
            yield from (Text(line, no_wrap=True) for line in packed([step, *pace], width))
            return
        head = Table.grid(padding=(0, 2))
        head.add_row(step, ProgressBar(total, self._step, width=room), "  ".join(pace))
        yield head

    @contextlib.contextmanager
    def bar(self, label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        """A bar below the table; yields ``advance(n)``."""
        from rich.progress import Progress  # noqa: PLC0415

        bar = Progress(*_columns(total, unit), auto_refresh=False, expand=True)
        task = bar.add_task(label, total=total)
        self._bars.append(bar)
        try:
            yield lambda n=1: bar.advance(task, n)
        finally:
            self._bars.remove(bar)


def packed(items: Iterable[str], width: int) -> Iterator[str]:
    """Lines of at most ``width`` columns with the items in order, two spaces between them.

    An item is not broken; one that is wider is cut, with dots.
    """
    line = ""
    for item in items:
        word = item if len(item) <= width else f"{item[: max(width - 3, 0)]}..."[:width]
        if line and len(line) + 2 + len(word) > width:
            yield line
            line = ""
        line = f"{line}  {word}" if line else word
    if line:
        yield line


def _by_words(line: str, width: int) -> str:
    """A line that is broken between words where it is wider."""
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _is(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), int | float)


def _odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _said(value: float, show: str) -> str:
    return "NaN" if math.isnan(value) else show.format(value)


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else _said(value, "{:.4g}")


def _so_far(since: float) -> str:
    return f"{time.monotonic() - since:.0f} s so far"


# --- bars ------------------------------------------------------------------------------------


def _columns(total: int | None, unit: str) -> tuple[Any, ...]:
    from rich import progress as own  # noqa: PLC0415

    head = ("{task.description}", own.BarColumn(bar_width=None))
    if total is None:
        return *head, own.TimeElapsedColumn()
    done = own.TaskProgressColumn() if unit == "%" else own.MofNCompleteColumn()
    return *head, done, own.TimeRemainingColumn(elapsed_when_finished=True)


@contextlib.contextmanager
def progress(
    label: str, total: int | None = None, unit: str = ""
) -> Iterator[Callable[[int], None]]:
    """Show progress, of work whose amount is not known (``total`` None) the seconds: a bar below a
    run's table or, on a terminal, on stderr; else every ten seconds a line, or a row of JSON.

    Yields ``advance(n)``.
    """
    if _muted:
        yield lambda n=1: None
    elif _live is not None:
        with _live.bar(label, total, unit) as move:
            yield move
    elif _for_people(sys.stderr):
        from rich.console import Console as Terminal  # noqa: PLC0415
        from rich.progress import Progress  # noqa: PLC0415

        with Progress(*_columns(total, unit), console=Terminal(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n=1: bar.advance(task, n)
            if total is None:
                bar.update(task, total=1, completed=1)
    else:
        with _ticking(label, total, unit) as advance:
            yield advance


@contextlib.contextmanager
def _ticking(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Lines by a clock of their own: one layer of a large model may take minutes."""
    begun, count, over, told = time.monotonic(), 0, threading.Event(), False

    def advance(n: int = 1) -> None:
        nonlocal count
        count += n

    def tell(end: str = "") -> None:
        nonlocal told
        told, seconds = True, round(time.monotonic() - begun)
        if _mode == "json":
            held = {"done": count, "total": total, "unit": unit, "seconds": seconds}
            _put_json({"progress": label, **held})
            return
        amount = f"{count}/{total} {unit}, " if total is not None and not end else ""
        _put(f"{label}: {amount}{end}{seconds} s", sys.stderr)

    def tick() -> None:
        while not over.wait(PLAIN_PROGRESS_SECONDS):
            tell()

    clock = threading.Thread(target=tick, daemon=True)
    clock.start()
    try:
        yield advance
    finally:
        over.set()
        clock.join()
    if told:
        tell("done in ")


def percent(advance: Callable[[int], None]) -> Callable[[str, int, int], None]:
    """A callback (what is done, how much, of how much) that moves a bar of 100."""
    shown = 0

    def step(_: str, done: int, total: int) -> None:
        nonlocal shown
        moved = 100 * done // total - shown
        if moved > 0:
            advance(moved)
            shown += moved

    return step
