"""What a run shows while it works: a live table on a terminal, a line or JSON a step elsewhere."""

import contextlib
import datetime
import json
import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

PLAIN_PROGRESS_SECONDS = 10.0  # between two lines of progress where stderr is not a terminal
COMPILE_SECONDS = 5.0  # of a compilation before a line says so where nothing is live

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

_live: "Console | None" = None  # that owns the terminal


class Console:
    """Rows and words of one run, on the first process.

    ``mode`` "auto" is a live table where stdout is a terminal, with a plain line kept every
    ``keep`` steps, and else a plain line a step; "plain" and "json" are a line a step anywhere (in
    "json" a line that begins with { is a row or a note).
    """

    def __init__(self, total_steps: int, show: tuple[str, ...], mode: str = "auto", keep: int = 10):
        self._total, self._show, self._keep, self._json = total_steps, show, keep, mode == "json"
        self._row: Mapping[str, Any] = {}
        self._step, self._pace, self._begun = 0, 0.0, time.monotonic()
        self._times: deque[float] = deque(maxlen=20)
        self._work: tuple[str, float] | None = None  # what is compiled, since when
        self._timer: threading.Timer | None = None
        self.display = self._bars = None
        if mode == "auto" and sys.stdout.isatty():
            self._open()

    def _open(self) -> None:
        global _live  # noqa: PLW0603  (a terminal has one live display)
        from rich.live import Live  # noqa: PLC0415
        from rich.progress import Progress  # noqa: PLC0415

        self._bars = Progress(*_columns(), auto_refresh=False)
        self.display = Live(get_renderable=self._table, refresh_per_second=4)
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
        if self._json:
            plain = {k: repr(v) if _odd(v) else v for k, v in row.items()}
            print(json.dumps({"split": split, "step": step, **plain}), flush=True)
            return
        chosen = [n for n in names if isinstance(row.get(n), int | float)]
        head = f"step {step}/{self._total}" + ("" if split == "train" else f" {split}")
        parts = [head, *(f"{n} {_short(row[n])}" for n in chosen)]
        if split == "train" and (left := self._left()):
            parts.append(f"{left} left")
        self.say("  ".join(parts))

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.display is not None:
            self.display.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(json.dumps({"note": text}) if self._json else text, flush=True)

    def begin(self, text: str) -> None:
        """A compilation begins; `end` tells that it is over."""
        self.end()
        self._work = (text, time.monotonic())
        if self.display is None:
            self._timer = threading.Timer(COMPILE_SECONDS, self.say, [text])
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

    def _table(self) -> Any:
        from rich.console import Group  # noqa: PLC0415
        from rich.progress_bar import ProgressBar  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column()
        head.add_column(ratio=1)
        head.add_column()
        pace = f"{100 * self._step / max(self._total, 1):.0f} %"
        if self._pace:
            pace += f"  {self._pace:.3g} s/step  {self._left() or 'done'}"
            pace += " left" if self._left() else ""
        step = f"step {self._step:,}/{self._total:,}"
        head.add_row(step, ProgressBar(max(self._total, 1), self._step), pace)
        lines: list[Any] = [head]
        found = [(label, show, self._row[n]) for n, label, show in _TABLE if _is(self._row, n)]
        lines.append(Text("  ".join(f"{label} {_said(x, show)}" for label, show, x in found)))
        times = [(n[5:], x) for n, x in self._row.items() if n.startswith("time/")]
        if times:
            told = "  ".join(f"{n} {x:.3g}" for n, x in times if n != "step")
            lines.append(Text(f"seconds: {told}"))
        if self._work:
            text, since = self._work
            lines.append(Text(f"{text}: {time.monotonic() - since:.0f} s so far"))
        elif not self._step and not self._row:
            lines.append(Text(f"the first step: {time.monotonic() - self._begun:.0f} s so far"))
        assert self._bars is not None  # made with the display
        return Group(*lines, self._bars) if self._bars.tasks else Group(*lines)

    @contextlib.contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar below the table; yields ``advance(n)``."""
        assert self._bars is not None
        task = self._bars.add_task(label, total=total)
        try:
            yield lambda n=1: self._bars.advance(task, n)  # pyright: ignore[reportOptionalMemberAccess]
        finally:
            self._bars.remove_task(task)


def _is(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), int | float)


def _odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _said(value: float, show: str) -> str:
    return "NaN" if math.isnan(value) else show.format(value)


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else _said(value, "{:.4g}")


# --- bars ------------------------------------------------------------------------------------


def _columns() -> tuple[Any, ...]:
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn  # noqa: PLC0415

    return "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()


@contextlib.contextmanager
def progress(label: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show progress: below a run's table, else on stderr, as a bar on a terminal or as a plain line
    every ten seconds.

    Yields ``advance(n)``.
    """
    if _live is not None:
        with _live.bar(label, total) as move:
            yield move
        return
    if sys.stderr.isatty():
        from rich.console import Console as Terminal  # noqa: PLC0415
        from rich.progress import Progress  # noqa: PLC0415

        with Progress(*_columns(), console=Terminal(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n=1: bar.advance(task, n)
        return
    start = last = time.monotonic()
    count = 0

    def advance(n: int = 1) -> None:
        nonlocal count, last
        count += n
        now = time.monotonic()
        if now - last >= PLAIN_PROGRESS_SECONDS:
            last = now
            print(f"{label}: {count}/{total} {unit} {now - start:.0f} s", file=sys.stderr)

    yield advance


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
