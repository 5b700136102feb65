"""The answer check in killable worker processes: a check that hangs twice is one wrong answer."""

import dataclasses
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from srpo_jax.rewards.answers import Question, decide
from srpo_jax.rewards.workers import Call, Limits, Workers

_CACHE_SIZE = 200_000  # verdicts
_MEMORY_MB = 2048  # of one worker's own data, beyond which the check fails and not the machine
_EQUAL_MODULE = "srpo_jax.rewards.equality"
_EQUAL = f"{_EQUAL_MODULE}:equal"
_FAILURES = {"timeout": "timeouts", "crash": "crashes", "late": "late"}


class Verifier:
    """Checks answers against golds, in order, with a pool of worker processes and a cache.

    Usable as a context manager; safe to call from several threads, one at a time inside.
    ``timeouts`` and ``crashes`` count the checks that were scored wrong for either reason, ``late``
    those that had no turn before the time of a ``check`` was over, and ``unread`` the answers that
    are wrong because they could not be read to their end.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout: float = 5.0,
        *,
        modules: Sequence[str] = (),
        step_timeout: float = math.inf,
    ):
        """Start ``workers`` processes (they come up in the background).

        ``timeout`` is in seconds of processor time, for one check, to the next whole second;
        ``step_timeout`` in seconds of the clock, for one ``check`` of many. ``modules`` are those
        whose functions ``verify_math`` will name: workers import them, and call their
        ``warm_up()``, before they take a check. ValueError for non-positive values.
        """
        if workers < 1 or timeout <= 0:
            raise ValueError(f"workers={workers} and timeout={timeout} must be positive")
        self.timeouts = self.crashes = self.late = self.unread = 0
        self._told: Counter[str] = Counter()
        self._step_timeout = step_timeout
        self._cache: dict[tuple, bool] = {}
        self._lock = threading.Lock()
        # A worker that computes nothing is waited for much longer than one that does.
        limits = Limits(wall=60.0 + 20 * timeout, cpu=float(timeout), memory_mb=_MEMORY_MB)
        self._pool = Workers(workers, limits, (_EQUAL_MODULE, *modules))

    def check(self, items: Sequence[tuple[Question, str | None]]) -> list[bool | None]:
        """Whether the text of each answer block answers its question, in the order of ``items``.

        Only what plain comparison cannot settle goes to the workers, each distinct pair once. None
        where ``step_timeout`` was over before a check was done.
        """
        end = time.monotonic() + self._step_timeout
        decisions = {
            (asked, answer): decide(asked.gold, answer, asked.choices, asked.tolerance)
            for asked, answer in dict.fromkeys(items)
        }
        found: dict[tuple[Question, str | None], bool | None]
        found = {item: decision is True for item, decision in decisions.items()}
        open_pairs = {item: pair for item, pair in decisions.items() if isinstance(pair, tuple)}
        for tolerance in dict.fromkeys(asked.tolerance for asked, _ in open_pairs):
            own = {item: p for item, p in open_pairs.items() if item[0].tolerance == tolerance}
            options = {"function": _EQUAL, **dataclasses.asdict(tolerance)}
            found |= zip(own, self._verify([*own.values()], options, end), strict=True)
        self.unread += sum(decisions[item] is None for item in items)
        return [found[item] for item in items]

    def verify_math(
        self, pairs: Sequence[tuple[str, str]], *, function: str = _EQUAL, **options: Any
    ) -> list[bool]:
        """Whether (gold, prediction) strings are equal, in order; ``options`` as equality.equal.

        ``function`` ("package.module:name") is called instead, as name(gold, prediction,
        **options), for rules that must not run in this process either. False where
        the check fails, runs out of time or memory, or kills its worker, twice; the latter is not
        remembered. RuntimeError when workers cannot be started, or after close().
        """
        return [bool(ok) for ok in self._verify(pairs, {"function": function, **options}, math.inf)]

    def _verify(
        self, pairs: Sequence[tuple[str, str]], options: dict[str, Any], end: float
    ) -> list[bool | None]:
        """As `verify_math`; None where a check was not done at ``end``."""
        extra = json.dumps(options, sort_keys=True)
        function = options.pop("function")
        with self._lock:
            known = self._cache
            todo = [p for p in dict.fromkeys(pairs) if (*p, extra) not in known]
            calls = [Call(function, pair, options) for pair in todo]
            outcomes = self._pool.run(calls, end - time.monotonic())
            if len(known) + len(todo) > _CACHE_SIZE:
                self._cache = {}
            fresh: dict[tuple, bool | None] = {}
            for pair, outcome in zip(todo, outcomes, strict=True):
                verdict, key = bool(outcome.value), (*pair, extra)
                if name := _FAILURES.get(outcome.failure):  # not remembered
                    setattr(self, name, getattr(self, name) + 1)
                else:
                    self._cache[key] = verdict
                fresh[key] = None if name == "late" else verdict
        return [fresh[key] if (key := (*pair, extra)) in fresh else known[key] for pair in pairs]

    def counts(self) -> dict[str, int]:
        """Since the last call: ``grading/timeouts``, ``grading/crashes``, ``grading/failed`` (both,
        and checks that had no turn) and ``grading/unread``."""
        failed = self.timeouts + self.crashes + self.late
        now = Counter(timeouts=self.timeouts, crashes=self.crashes, failed=failed)
        now["unread"] = self.unread
        told, self._told = self._told, now
        return {f"grading/{name}": count - told[name] for name, count in now.items()}

    def close(self) -> None:
        """Kill the workers; further checks raise."""
        self._pool.close()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
