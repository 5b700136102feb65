"""Timing of one phase: compilation apart, repeats, memory, and the limit that binds it."""

import contextlib
import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Phase:
    """Something to run again and again, and the work that one run cannot do without.

    ``run`` returns the arrays to wait for. ``needed`` counts the tokens (or patches, or records)
    that are worked on, ``slots`` those that are computed, padding included.
    """

    name: str
    run: Callable[[], Any]
    unit: str  # of ``needed``
    needed: float
    slots: float | None = None
    flops: float = 0.0  # of the needed work, rematerialisation left out
    bytes: float = 0.0  # that the needed work moves through a device's memory


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one device reaches, measured: FLOP/s of matrix products, bytes/s of memory."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the repeats after warm-up, and what the first run cost beside them."""

    seconds: list[float]
    compile_seconds: float
    recompiles: int
    peak_bytes: int


class CompileWatch:
    """Counts the programs that are compiled, and their seconds, inside a with-block."""

    def __init__(self):
        self.seconds, self.programs = 0.0, 0

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            self.seconds += duration_secs
            self.programs += 1

    def __enter__(self) -> "CompileWatch":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(AttributeError, ValueError, AssertionError):
            jax.monitoring.unregister_event_duration_listener(self._listen)


def stopwatch(run: Callable[[], Any]) -> float:
    """Seconds of one run, with everything that it dispatched."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(run: Callable[[], Any], repeats: int) -> Timing:
    """Two runs to warm up (what is donated settles with the second), then ``repeats`` timed ones."""
    with CompileWatch() as warm:
        for _ in range(2):
            stopwatch(run)
    with CompileWatch() as later:
        seconds = [stopwatch(run) for _ in range(repeats)]
    return Timing(seconds, warm.seconds, later.programs, peak_bytes())


def peak_bytes() -> int:
    """Most memory so far: of the device, or of this process where a device does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0)) or (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def result(phase: Phase, timing: Timing, limits: Limits, devices: int) -> dict[str, Any]:
    """One phase as JSON values; ``seconds`` holds one number a repeat."""
    median = statistics.median(timing.seconds)
    by_flops = phase.flops / devices / limits.flops
    by_bytes = phase.bytes / limits.bytes
    bound = max(by_flops, by_bytes)
    found = {
        "seconds": timing.seconds,
        "median": median,
        "spread": (max(timing.seconds) - min(timing.seconds)) / median,
        "tokens_per_s": phase.needed / median,
        "unit": phase.unit,
        "flops_per_s": phase.flops / devices / median,
        "bytes_per_s": phase.bytes / median,
        "compile_seconds": timing.compile_seconds,
        "recompiles": timing.recompiles,
        "peak_gib": timing.peak_bytes / 2**30,
    }
    if bound:
        found["bound_by"] = "flops" if by_flops >= by_bytes else "bytes"
        found["of_limit"] = bound / median
    if phase.slots:
        found["padding_share"] = 1 - phase.needed / phase.slots
    return found


COLUMNS = ("phase", "seconds", "±", "per second", "TFLOP/s", "GB/s", "of limit", "padding",
           "compile", "again", "peak GiB")  # fmt: skip


def header() -> str:
    """The titles of `line`."""
    return f"{COLUMNS[0]:22}" + "".join(f"{name:>14}" for name in COLUMNS[1:])


def line(name: str, found: dict[str, Any]) -> str:
    """One phase as a line of the table."""
    limit = f"{found['of_limit']:.0%} {found['bound_by']}" if "of_limit" in found else ""
    padding = f"{found['padding_share']:.1%}" if "padding_share" in found else ""
    cells = (
        f"{found['median']:.3f}",
        f"{found['spread']:.0%}",
        f"{found['tokens_per_s']:,.0f} {found['unit']}",
        f"{found['flops_per_s'] / 1e12:.3f}",
        f"{found['bytes_per_s'] / 1e9:.1f}",
        limit,
        padding,
        f"{found['compile_seconds']:.0f} s",
        f"{found['recompiles']}",
        f"{found['peak_gib']:.2f}",
    )
    return f"{name:22}" + "".join(f"{cell:>14}" for cell in cells)


def machine_limits(dtype: str) -> tuple[Limits, dict[str, Any]]:
    """Matrix products of ``dtype`` and copies on one device, timed; the best of five each."""
    accelerator = jax.default_backend() != "cpu"
    side, elements = (8192, 2**28) if accelerator else (1536, 2**25)
    x = jax.device_put(jax.numpy.ones((side, side), dtype), jax.local_devices()[0])
    product = jax.jit(lambda a, b: a @ b)
    big = jax.device_put(jax.numpy.ones((elements,), "float32"), jax.local_devices()[0])
    copy = jax.jit(lambda a: a + 1)
    best = {}
    for name, run in (("product", lambda: product(x, x)), ("copy", lambda: copy(big))):
        best[name] = min(measure(run, 5).seconds)
    limits = Limits(2 * side**3 / best["product"], 2 * 4 * elements / best["copy"])
    found = {"dtype": dtype, "matmul_flops_per_s": limits.flops, "bytes_per_s": limits.bytes}
    return limits, found | {"seconds": [best["product"]]}


def alternating(
    ours: Callable[[], float], theirs: Callable[[], float], repeats: int
) -> Iterator[tuple[float, float]]:
    """(our seconds, their seconds), run in turn, so that a machine's moods meet both."""
    for _ in range(repeats):
        yield ours(), theirs()
