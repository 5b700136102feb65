"""Timing of one phase: compilation apart, repeats, memory, and the limit that binds it."""

import contextlib
import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from srpo_jax.run.guard import COMPILED

MACHINE_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Phase:
    """Something to run again and again, and the work that one run cannot do without.

    ``run`` returns the arrays to wait for.
    """

    run: Callable[[], Any]
    unit: str  # of ``needed``
    needed: float  # tokens (or patches, records, ...) that one run works on
    flops: float = 0.0  # of the needed work on all devices, rematerialisation left out
    bytes: float = 0.0  # that the needed work moves through one device's memory
    padding: Callable[[], float] | None = None  # share of the computed slots that nothing stood in
    aside: Callable[[], float] = lambda: 0.0  # seconds of the last run that are not the phase's
    parts: Callable[[], dict[str, float]] | None = None  # seconds of the last run, by what it did


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one device reaches, measured: FLOP/s of matrix products, bytes/s of memory."""

    flops: float
    bytes: float


class CompileWatch:
    """Counts the programs that are compiled, and their seconds, inside a with-block."""

    def __init__(self):
        self.seconds, self.programs = 0.0, 0

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
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


def measure(phase: Phase, repeats: int, limits: Limits) -> dict[str, Any]:
    """One phase as JSON values; ``seconds`` holds one number a repeat.

    Two runs warm up (what is donated settles with the second).
    """
    with CompileWatch() as warm:
        for _ in range(2):
            stopwatch(phase.run)
    seconds, parts = [], []
    with CompileWatch() as later:
        for _ in range(repeats):
            seconds.append(stopwatch(phase.run) - phase.aside())
            parts.append(phase.parts() if phase.parts else {})
    median, flops = statistics.median(seconds), phase.flops / jax.device_count()
    found = {
        "seconds": seconds,
        "median": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "tokens_per_s": phase.needed / median,
        "unit": phase.unit,
        "flops_per_s": flops / median,
        "bytes_per_s": phase.bytes / median,
        "compile_seconds": warm.seconds,
        "recompiles": later.programs,
        "peak_gib": peak_bytes() / 2**30,
    }
    by_flops, by_bytes = flops / limits.flops, phase.bytes / limits.bytes
    if bound := max(by_flops, by_bytes):
        found["bound_by"] = "flops" if by_flops >= by_bytes else "bytes"
        found["of_limit"] = bound / median
    if phase.padding:
        found["padding_share"] = phase.padding()
    if phase.parts:
        found["parts"] = {k: statistics.median(one[k] for one in parts) for k in parts[0]}
    return found


def peak_bytes() -> int:
    """Most memory so far: of the device, or of this process where a device does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0)) or (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


COLUMNS = ("seconds", "spread", "per second", "TFLOP/s", "GB/s", "of limit", "padding", "compile",
           "again", "peak GiB")  # fmt: skip


def header() -> str:
    """The titles of `line`."""
    return f"{'phase':12}" + "".join(f"{name:>12}" for name in COLUMNS).replace(
        f"{'per second':>12}", f"{'per second':>26}"
    )


def line(name: str, found: dict[str, Any]) -> str:
    """One phase as a line of the table; below it the parts of its time."""
    limit = f"{found['of_limit']:.0%} {found['bound_by']}" if "of_limit" in found else ""
    padding = f"{found['padding_share']:.1%}" if "padding_share" in found else ""
    cells = (
        f"{found['median']:.3f}",
        f"{found['spread']:.0%}",
        f"{found['tokens_per_s']:,.0f} {found['unit']:<14}".rjust(26),
        f"{found['flops_per_s'] / 1e12:.3f}",
        f"{found['bytes_per_s'] / 1e9:.1f}",
        limit,
        padding,
        f"{found['compile_seconds']:.0f} s",
        f"{found['recompiles']}",
        f"{found['peak_gib']:.2f}",
    )
    text = f"{name:12}" + "".join(f"{cell:>12}" for cell in cells)
    if "parts" in found:
        text += "\n  of it " + ", ".join(f"{k} {v:.3f} s" for k, v in found["parts"].items())
    return text


def machine() -> dict[str, Any]:
    """Matrix products by dtype and a copy, on one device; ``seconds`` are those of the copy."""
    side, chain, elements = (8192, 8, 2**28) if jax.default_backend() != "cpu" else (1536, 1, 2**25)
    device = jax.local_devices()[0]

    @jax.jit
    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(chain):  # what one call costs by itself does not count
            a = a @ b
        return a

    def best(run: Callable[[], Any]) -> list[float]:
        stopwatch(run)
        return [stopwatch(run) for _ in range(MACHINE_REPEATS)]

    flops = {}
    for dtype in ("float32", "bfloat16"):
        x = jax.random.normal(jax.random.key(0), (side, side), dtype) / side**0.5
        x = jax.device_put(x, device)
        flops[dtype] = 2 * side**3 * chain / min(best(lambda x=x: products(x, x)))
    big = jax.device_put(jnp.ones(elements, jnp.float32), device)
    times = 2 * chain
    copy = jax.jit(lambda a: jax.lax.fori_loop(0, times, lambda _, x: x + 1, a))
    seconds = best(lambda: copy(big))
    moved = 2 * big.nbytes * times / min(seconds)
    return {"seconds": seconds, "matmul_flops_per_s": flops, "bytes_per_s": moved}
