"""What watches a run: signals, compilation after warm-up, steps that change nothing."""

import contextlib
import math
import os
import signal
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from srpo_jax.run import processes
from srpo_jax.structs import RunError

COMPILED = "/jax/core/compile/backend_compile_duration"  # what jax calls its event
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # that of what comes right before


# --- signals ---------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal has asked the run to stop; what was being done is given up."""


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a request; the second one acts as it always does.

    Used as a context manager. The loop asks `everywhere` between steps, saves and leaves. A step is
    finished where half of ``grace`` (seconds from the signal on) will do for that, as far as the
    one before it tells; else it is given up at the next `between_phases`, and the other half is
    there to save the state before it.
    """

    def __init__(self, say: Callable[[str], None] = print):
        self.requested, self.grace, self.say = False, 0.0, say
        self._previous: dict[int, Any] = {}
        self._asked = math.inf  # when
        self._begun, self._took = 0.0, math.inf  # the present step, the one before

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one step."""
        self._begun = time.monotonic()
        yield
        self._took = time.monotonic() - self._begun

    def everywhere(self) -> bool:
        """Whether any process was asked to stop (collective)."""
        return processes.any_true([self.requested])[0]

    def between_phases(self) -> None:
        """Stopped where a process was asked to stop and this step would take it too long
        (collective)."""
        if processes.any_true([self.overdue()])[0]:
            raise Stopped

    def overdue(self) -> bool:
        """Whether this process was asked to stop and this step would take it too long."""
        end = max(self._begun + self._took, time.monotonic())
        return self.requested and end > self._asked + self.grace / 2

    def between_batches(self) -> None:
        """Stopped where a process was asked to stop (collective): of work that can go on later."""
        if self.everywhere():
            raise Stopped

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: types.FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested, self._asked = True, time.monotonic()
        told = "stopping"
        if self.grace:
            told = f"finishing this step if {self.grace / 2:g} s will do, then saving"
        self.say(f"{signal.Signals(number).name}: {told}; a second one kills")


# --- compilation -----------------------------------------------------------------------------


class CompileGuard:
    """Fails a step that compiles again what an earlier step of the same bucket had compiled.

    A bucket names the budgets of a step's arrays. Every program may be compiled once for each
    bucket; a second time means that a shape, a dtype or a sharding changed behind its back, which
    costs minutes at full size. All programs are seen, wrapped ones with their argument shapes.
    ``enabled`` False makes it do nothing.
    """

    def __init__(self, enabled: bool = True):
        self._enabled = enabled
        # Called with the name of a program, and False before, True after it is compiled.
        self.tell: Callable[[str, bool], None] = lambda name, over: None
        self._done: set[tuple[str, str]] = set()
        self._events: list[str] = []
        self._shapes: dict[str, str] = {}
        self._thread: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with the shapes of the arguments it compiled for kept for the message."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            mark = len(self._events)
            out = function(*args, **kwargs)
            for name in self._events[mark:]:
                self._shapes[name] = describe((args, kwargs))
            return out

        return watched

    @contextlib.contextmanager
    def step(self, bucket: str) -> Iterator[None]:
        """Guard one step whose arrays have the budgets that ``bucket`` names.

        What is compiled in a step inside this one is that step's alone.

        Raises:
            RunError: a program was compiled for this bucket in an earlier step already.
        """
        outer = self._events, self._thread
        events: list[str] = []
        self._events, self._thread = events, threading.get_ident()
        try:
            yield
        finally:
            self._events, self._thread = outer
        if not self._enabled:
            return
        compiled = {(name, bucket) for name in events}
        again = sorted(name for name, _ in compiled & self._done)
        self._done |= compiled
        if again:
            shapes = "; ".join(
                f"{name} with {self._shapes[name]}" for name in again if name in self._shapes
            )
            raise RunError(
                f"recompiled after warm-up: {', '.join(again)} for bucket {bucket}, which had been "
                f"compiled before{'; ' + shapes if shapes else ''}. An argument's shape, dtype or "
                "sharding changes between steps that should be alike"
            )

    def close(self) -> None:
        """Stop listening."""
        self._thread = None
        with contextlib.suppress(AttributeError, ValueError, AssertionError):
            jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **info: str | int) -> None:
        # Other threads compile too (asynchronous checkpoints): those are none of the step's.
        if event in (COMPILED, LOWERED) and self._thread == threading.get_ident():
            name = str(info.get("fun_name", "a function"))
            self.tell(
                name.removeprefix("jit_").removeprefix("jit(").removesuffix(")"), event == COMPILED
            )
            if event == COMPILED:
                self._events.append(name)


def describe(tree: Any, limit: int = 10) -> str:
    """Shapes and dtypes of the first leaves that are no parameters, in short."""
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    ]
    state = ("params", "frozen", "opt_state")
    inputs = [x for x in leaves if not any(word in x[0] for word in state)] or leaves
    shown = [f"{name} {leaf.dtype}{list(leaf.shape)}" for name, leaf in inputs[:limit]]
    return ", ".join(shown)


# --- steps that change nothing ---------------------------------------------------------------

QUIET_STEPS = 10  # in a row, before a run says so


WINDOW = 25  # steps whose first and final answers are compared with those of as many before
FALLEN = 3.0  # standard errors of that difference, and
MOVED = 0.02  # what counts as falling and as rising


class SandbagWatch:
    """A word where the first answer gets worse while the final one gets better."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._seen: deque[tuple[float, float]] = deque(maxlen=2 * WINDOW)

    def look(self, step: int, metrics: Mapping[str, Any]) -> None:
        """At each step in turn; once it has said so, it begins anew."""
        names = ("accuracy/first", "accuracy/final")
        if not all(name in metrics for name in names):
            return
        self._seen.append((float(metrics[names[0]]), float(metrics[names[1]])))
        if len(self._seen) < 2 * WINDOW:
            return
        seen = np.array(self._seen)
        before, after = seen[:WINDOW], seen[WINDOW:]
        error = np.sqrt((before.var(0, ddof=1) + after.var(0, ddof=1)) / WINDOW)
        moved = after.mean(0) - before.mean(0)
        clear = np.abs(moved) > np.maximum(MOVED, FALLEN * error)
        if clear.all() and moved[0] < 0 < moved[1]:
            self._seen.clear()
            (first, final), (first_now, final_now) = before.mean(0), after.mean(0)
            self._say(
                f"step {step}: in {2 * WINDOW} steps the first answer fell ({first:.3f} to "
                f"{first_now:.3f}) while the final one rose ({final:.3f} to {final_now:.3f}): is "
                "it wrong on purpose, to be mended? Look at fix_rate, reward/i_eff and rollouts/; "
                "reward.profile=balanced pays no more for mending than for keeping"
            )


class NotFinite(RunError):
    """Updates in a row were not finite."""


class Progress:
    """A word where steps in a row teach nothing; an end where updates in a row are not finite."""

    def __init__(self, max_skipped: int, skipped: int, say: Callable[[str], None]):
        """``skipped`` updates had been left out before."""
        self._max_skipped, self._say = max_skipped, say
        self._answers = SandbagWatch(say)
        self.begin(skipped)

    def begin(self, skipped: int) -> None:
        """From a state on of which ``skipped`` updates had been left out."""
        self._skipped, self.skipped_run, self._quiet_run = skipped, 0, 0

    def look(self, step: int, updates: int, metrics: Mapping[str, Any]) -> None:
        """At each step in turn: its number of updates, its metrics (reading waits for the device).

        NotFinite where all of the last ``max_skipped`` updates were left out.
        """
        names = ("skipped", "update_norm", "groups_without_signal")
        found = {
            n: float(x) for n, x in jax.device_get({n: metrics.get(n, 0) for n in names}).items()
        }
        skipped = int(found["skipped"]) - self._skipped
        self._skipped += max(skipped, 0)
        if updates:
            self.skipped_run = self.skipped_run + updates if skipped >= updates else 0
        if self.skipped_run >= self._max_skipped:
            raise NotFinite(
                f"step {step}: none of the last {self.skipped_run} updates was finite "
                "(optim.max_skipped)"
            )
        reason = None if skipped else _nothing_learnt(updates, found)
        self._quiet_run = self._quiet_run + 1 if reason else 0
        if self._quiet_run == QUIET_STEPS:
            self._say(f"step {step}: the last {QUIET_STEPS} steps taught nothing: {reason}")
        self._answers.look(step, metrics)


def _nothing_learnt(updates: int, found: Mapping[str, float]) -> str | None:
    """Why a step has taught nothing, and what helps; None where it has."""
    if not updates:
        return (
            "no group lay between filter.low and filter.high; look at accuracy/final and "
            "rollouts/: are the problems too hard or too easy, or is the format not learnt yet "
            "(stage 1)?"
        )
    if found["groups_without_signal"] == 1:
        return (
            "all samples of each group earned the same reward; look at reward/mean and rollouts/, "
            "or raise sampling.group_size or sampling.temperature"
        )
    if not found["update_norm"]:
        return (
            "the updates changed no parameter; is optim.lr 0, or is there no loss on any token "
            "(data.target, data.tokens)?"
        )
    return None
