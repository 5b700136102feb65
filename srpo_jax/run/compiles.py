"""What is compiled at the moment, and how long that took in an earlier run of the same folder."""

import json
import time

from srpo_jax.data.files import AnyPath, absolute, write_json
from srpo_jax.run.console import Console

LONG = 1.0  # seconds from which a compilation counts


class CompileNotes:
    """``compiling update (about 40 s, 3 of 7)``: shown while it lasts; seconds and number are those
    of the run before, kept in ``compile_seconds.json``. Without one, only what is known is said.
    """

    def __init__(self, workdir: AnyPath, console: Console):
        self._path, self._console = absolute(workdir) / "compile_seconds.json", console
        self._before: dict[str, float] = {}
        if self._path.exists():
            self._before = json.loads(self._path.read_text())
        self._now: dict[str, float] = {}
        self._begun = time.monotonic()

    def _begin(self, name: str) -> None:
        key = self._key(name)
        known = [f"about {self._before[key]:.0f} s"] if key in self._before else []
        at = len(self._now) + 1
        of = f" of {len(self._before)}" if len(self._before) >= at else ""
        told = ", ".join([*known, f"{at}{of}"])
        values = {"number": at, "of": len(self._before), "seconds_before": self._before.get(key)}
        self._console.begin(f"compiling {name} ({told})", program=name, **values)
        self._begun = time.monotonic()

    def _end(self, name: str) -> None:
        self._console.end()
        seconds = time.monotonic() - self._begun
        if seconds >= LONG:
            self._now[self._key(name)] = round(seconds, 1)

    def tell(self, name: str, over: bool) -> None:
        """What `CompileGuard` calls: before a program is compiled, and when that is over."""
        if over:
            self._end(name)
        else:
            self._begin(name)

    def _key(self, name: str) -> str:
        again = sum(key.partition("#")[0] == name for key in self._now)
        return f"{name}#{again}" if again else name

    def close(self) -> None:
        """Keep the seconds of this run, unless it has compiled less than the one before."""
        if len(self._now) >= max(len(self._before), 1):
            write_json(self._path, self._now)
