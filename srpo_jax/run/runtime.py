"""What holds a run together besides numbers: processes, signals, compilation, clear stops."""

import contextlib
import json
import os
import signal
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_AGREEMENT_BYTES = 1024
_COMPILED = "/jax/core/compile/backend_compile_duration"


class RunError(RuntimeError):
    """A run cannot start or go on; the message names the key, the values and the remedy."""


# --- processes -------------------------------------------------------------------------------


def init_distributed(
    enabled: bool, coordinator: str = "", num_processes: int = 0, process_id: int = -1
) -> None:
    """Join the other processes of this run, once, before anything touches a device.

    Args:
        enabled: the config's switch. The variable SRPO_COORDINATOR asks for it too.
        coordinator: ``host:port`` of process 0; empty: SRPO_COORDINATOR, and without that what
            jax finds by itself on a TPU pod, under SLURM or under MPI.
        num_processes: how many; 0: SRPO_NUM_PROCESSES, or found by jax.
        process_id: which one this is; -1: SRPO_PROCESS_ID, or found by jax.

    Raises:
        RunError: some of the three are given and some are not, or joining failed.
    """
    coordinator = coordinator or os.environ.get("SRPO_COORDINATOR", "")
    if not (enabled or coordinator) or jax.distributed.is_initialized():
        return
    num_processes = num_processes or int(os.environ.get("SRPO_NUM_PROCESSES", "0"))
    process_id = process_id if process_id >= 0 else int(os.environ.get("SRPO_PROCESS_ID", "-1"))
    given = [bool(coordinator), num_processes > 0, process_id >= 0]
    if any(given) and not all(given):
        raise RunError(
            f"distributed: coordinator={coordinator!r}, num_processes={num_processes}, "
            f"process_id={process_id}: give all three, or none where jax finds them (TPU, SLURM)"
        )
    try:
        if all(given):
            jax.distributed.initialize(coordinator, num_processes, process_id)
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise RunError(f"distributed: joining the other processes failed: {error}") from error


def agree(values: Mapping[str, Any], *, stop: bool = False) -> bool:
    """Stop with a clear error unless every process holds the same ``values``.

    Called before the first collective of each step: processes that are about to run different
    programs would hang in it without a word.

    Args:
        values: what must be equal, JSON values (config hash, step, bucket, data cursor).
        stop: this process was asked to stop.

    Returns:
        True where any process was asked to stop.

    Raises:
        RunError: naming the first value that differs and what each process holds.
    """
    if jax.process_count() == 1:
        return stop
    text = json.dumps([dict(values), bool(stop)]).encode()
    if len(text) > _AGREEMENT_BYTES:
        raise RunError(f"agreement of {len(text)} bytes, at most {_AGREEMENT_BYTES}: {text!r}")
    row = np.zeros(_AGREEMENT_BYTES, np.uint8)
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    parsed = [json.loads(bytes(r).rstrip(b"\0").decode()) for r in rows]
    check_agreement([held for held, _ in parsed])
    return any(asked for _, asked in parsed)


def check_agreement(held: list[dict[str, Any]]) -> None:
    """Raise RunError for the first key on which the processes' values differ."""
    for key in {key: None for values in held for key in values}:
        seen = [values.get(key) for values in held]
        if any(value != seen[0] for value in seen):
            shown = ", ".join(f"process {i}: {value!r}" for i, value in enumerate(seen))
            raise RunError(
                f"processes disagree on {key}: {shown}. Start all of them with the same config, "
                "code, data files and checkpoint"
            )


# --- signals ---------------------------------------------------------------------------------


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a request; the second one acts as it always does.

    Used as a context manager; the loop reads ``requested`` between steps, saves and leaves.
    """

    def __init__(self, say: Callable[[str], None] = print):
        self.requested = False
        self._say = say
        self._previous: dict[int, Any] = {}

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
        self.requested = True
        self._say(
            f"{signal.Signals(number).name}: finishing this step, then saving; a second one kills"
        )


# --- config --------------------------------------------------------------------------------


def changed_keys(
    saved: dict[str, Any], current: dict[str, Any], free: tuple[str, ...]
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, without those equal to or below a name in ``free``."""
    old, new = flat_config(saved), flat_config(current)
    changed = {}
    for key in sorted(old.keys() | new.keys()):
        if below(key, free):
            continue
        if old.get(key) != new.get(key):
            changed[key] = (old.get(key), new.get(key))
    return changed


def check_config(saved: dict[str, Any], current: dict[str, Any], free: tuple[str, ...]) -> None:
    """Raise RunError naming each key that would make the resumed run another run."""
    changed = changed_keys(saved, current, free)
    if changed:
        listed = "; ".join(f"{k} was {old!r}, is {new!r}" for k, (old, new) in changed.items())
        raise RunError(
            f"the checkpoint to resume was written under another config: {listed}. Set these back, "
            "use a new --workdir, or pass --config.checkpoint.allow_changes=True"
        )


def below(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted config key is one of ``names`` or lies below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat_config(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with dotted keys; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flat_config(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


# --- compilation -----------------------------------------------------------------------------


def use_compilation_cache(folder: str | Path) -> None:
    """Keep compiled programs in ``folder`` for later runs; nothing happens where it is empty."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser().resolve()))


class CompileGuard:
    """Fails a step that compiles again what an earlier step of the same bucket had compiled.

    A bucket names the budgets of a step's arrays. Every program may be compiled once for each
    bucket; a second time means that a shape, a dtype or a sharding changed behind its back, which
    costs minutes at full size. All programs are seen, wrapped ones with their argument shapes.
    ``enabled`` False makes it do nothing.
    """

    def __init__(self, enabled: bool = True):
        self._enabled = enabled
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

        Raises:
            RunError: a program was compiled for this bucket in an earlier step already.
        """
        self._events.clear()
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
        if not self._enabled:
            return
        compiled = {(name, bucket) for name in self._events}
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

    def _listen(self, event: str, _: float, **info: Any) -> None:
        # Other threads compile too (asynchronous checkpoints): those are none of the step's.
        if event == _COMPILED and self._thread == threading.get_ident():
            self._events.append(str(info.get("fun_name", "a function")))


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
