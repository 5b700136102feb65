"""What a run reports: metric rows (console, JSONL, trackers), phase timers, FLOP counts."""

import contextlib
import dataclasses
import json
import math
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from srpo_jax import __version__
from srpo_jax.data.files import (
    AnyPath,
    Growing,
    read_jsonl,
    write_json,
    write_jsonl,
)
from srpo_jax.run import console
from srpo_jax.run.console import Console
from srpo_jax.run.trackers import EXAMPLES, Example, Tracker

# Peak dense bfloat16 FLOP/s of one device, by what `device_kind` holds (makers' data sheets).
# The first match counts, so longer names stand before those they contain.
PEAK_FLOPS = (
    ("TPU7x", 2307e12 / 2),  # half a chip
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p calls itself "TPU v5"
    ("TPU v4", 275e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
)

VERSIONS = "versions.json"  # of what the last start of a run ran with
EVALUATIONS = "evaluations"  # folder of the same few problems' answers at each evaluation


# --- rows ------------------------------------------------------------------------------------


class MetricWriter:
    """Writes metric rows from process 0; on the others every method does nothing.

    ``metrics.jsonl`` is append-only. Each start of a run takes the next ``run`` number; a resumed
    run repeats the steps after its checkpoint, so of rows with equal split and step the last one
    counts (`read_rows`).
    """

    def __init__(
        self,
        workdir: AnyPath,
        *,
        total_steps: int,
        show: Iterable[str] = (),
        console: Console | None = None,
        trackers: Sequence[Tracker] = (),
    ):
        self._on = jax.process_index() == 0
        self._pending: tuple[int, str, Any] | None = None
        if not self._on:
            return
        self._folder = folder = epath.Path(workdir)
        write_json(folder / VERSIONS, versions())
        path = folder / "metrics.jsonl"
        self.run = 1 + _last_run(path.read_text() if path.exists() else "")
        self._file = Growing(path)
        self.console = console or Console(total_steps, tuple(show))
        self._trackers = trackers

    def defer(self, step: int, values: Mapping[str, Any], split: str = "train") -> None:
        """Keep this step's values, on device or host, and write those kept before.

        Reading device values waits for the device; by the time the next step has been dispatched,
        the last one's are usually there.
        """
        self.flush()
        self._pending = (step, split, values)

    def write(self, step: int, values: Mapping[str, Any], split: str) -> None:
        """Write one row now, after any that was deferred."""
        self.flush()
        self._write(step, split, values)

    def keep(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Rows of an evaluation: evaluations/<step>.jsonl, and the first for the trackers."""
        if not self._on or not rows:
            return
        write_jsonl(self._folder / EVALUATIONS / f"{step:06d}.jsonl", rows)
        told = [Example(row["prompt"], row["gold"], row["response"]) for row in rows[:EXAMPLES]]
        self.show(step, "eval", told)

    def show(self, step: int, name: str, examples: Sequence[Example]) -> None:
        """Examples as text and images of the trackers."""
        if self._on and examples:
            for tracker in self._trackers:
                tracker.samples(step, name, examples)

    def flush(self) -> None:
        """Write the deferred row, if any."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._write(*previous)

    def say(self, text: str, fact: str = "", **values: Any) -> None:
        """One line for the reader, see `console.say`."""
        if self._on:
            console.say(text, fact, **values)

    def close(self) -> None:
        """Write what is left and close the files."""
        self.flush()
        if not self._on:
            return
        self.console.close()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        if not self._on:
            return
        row, nonfinite = to_plain(values)
        head = {"run": self.run, "split": split, "step": int(step), "time": round(time.time(), 3)}
        if nonfinite:  # JSON has no NaN: the value is null, and its name stands here
            head["nonfinite"] = [*nonfinite]
        self._file.append(json.dumps({**head, **row}))
        self.console.row(step, split, row | nonfinite)
        numbers = {f"{split}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.numbers(step, numbers)


def versions() -> dict[str, str]:
    """What a run runs with: this package, its git commit in a checkout, jax, Python, devices."""
    found = {"srpo_jax": __version__}
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
            found["commit"] = done.stdout.strip()
    found |= {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    found["python"] = platform.python_version()
    found["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return found


def to_plain(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Numbers as Python values, and by themselves those that are not finite (None in the row)."""
    row: dict[str, Any] = {}
    nonfinite: dict[str, float] = {}
    for name, value in jax.device_get(dict(values)).items():
        row[name] = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        if isinstance(row[name], float):
            row[name] = float(f"{row[name]:.7g}")
            if not math.isfinite(row[name]):
                nonfinite[name], row[name] = row[name], None
    return row, nonfinite


def read_rows(path: AnyPath, split: str | None = None) -> list[dict[str, Any]]:
    """The rows that count, in step order: of rows with equal split and step, the last one.

    A row that was cut off in mid-write is skipped.
    """
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    for row in read_jsonl(path, skip_broken=True):
        kept[row["split"], row["step"]] = row
    rows = sorted(kept.values(), key=lambda row: row["step"])
    return [row for row in rows if split is None or row["split"] == split]


def merge_metrics(rows: list[dict[str, Any]], weigh_by: str) -> dict[str, float]:
    """Metrics of several rounds or updates as one: counts add up, the rest is a weighted mean."""
    rows = [{k: float(v) for k, v in row.items()} for row in rows]
    weights = np.array([max(row.get(weigh_by, 1.0), 1e-9) for row in rows])
    merged = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        if name in ("samples", "tokens", "trained_tokens") or name.endswith(("/count", "/of")):
            merged[name] = values.sum()
        elif name.endswith(("/max", "_max")):
            merged[name] = values.max()
        elif name.endswith("/min"):
            merged[name] = values.min()
        elif name in ("lr", "skipped"):
            merged[name] = values[-1]
        else:
            merged[name] = (values * weights).sum() / weights.sum()
    return {name: float(value) for name, value in merged.items()}


def _last_run(text: str) -> int:
    """The highest run number in metrics.jsonl; rows are read from its end, where it stands."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return int(json.loads(line)["run"])
    return 0


# --- time ------------------------------------------------------------------------------------


class Timers:
    """Seconds spent in named phases of a step; a phase may be entered several times."""

    def __init__(self):
        self._spent: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase: str, behind: Any = None) -> Iterator[None]:
        """Add the time of the with-block to ``phase``.

        Work of the host that costs nothing is told too, as ``hidden/<phase>``: that in a block at
        whose end the device still computes ``behind``, arrays that were asked for before it.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._add(f"time/{phase}", spent)
            leaves = [x for x in jax.tree.leaves(behind) if hasattr(x, "is_ready")]
            if leaves:
                busy = not all(x.is_ready() for x in leaves)
                self._add(f"hidden/{phase}", spent if busy else 0.0)

    def _add(self, name: str, seconds: float) -> None:
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Leave the time of the with-block (an evaluation) out of the step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by ``time/<phase>`` and ``hidden/<phase>``, and ``time/step`` since the last
        call; starts anew."""
        now = time.perf_counter()
        spent = self._spent | {"time/step": now - self._start}
        self._spent, self._start = {}, now
        return spent


# --- FLOPs -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of a model by its parts: 2 per multiply-add, matrix products only.

    Norms, rotary positions, softmax and the embedding look-up are left out, as is usual when
    utilisation is quoted. A backward pass is twice a forward one; recomputation under remat is not
    counted (model FLOPs, not hardware FLOPs).
    """

    text_token: float  # decoder layers, per token, without attention scores
    text_pair: float  # per (query, visible key) pair, all layers
    head_token: float  # vocabulary projection, per token
    patch: float  # vision blocks and patch embedding, per patch, plus the merger
    patch_window_pair: float  # per (query, key) pair, all windowed blocks
    patch_full_pair: float  # per (query, key) pair, all full-attention blocks

    @classmethod
    def of(cls, shapes: Mapping[str, Any], full_blocks: int) -> "ModelFlops":
        """From a parameter dict (or its shapes) and the number of full-attention vision blocks."""

        def size(prefix: str) -> int:
            names = [n for n in shapes if n.startswith(prefix) and n.endswith("/kernel")]
            return sum(math.prod(shapes[n].shape) for n in names)

        layers, _, heads, head_dim = shapes["text/layers/attn/q/kernel"].shape
        vocabulary, width = shapes["text/embed/embedding"].shape
        blocks, _, _, v_heads, v_head_dim = shapes["vision/blocks/attn/qkv/kernel"].shape
        v_pair = 4.0 * v_heads * v_head_dim  # scores and weighted sum
        return cls(
            text_token=2.0 * size("text/layers/"),
            text_pair=4.0 * layers * heads * head_dim,
            head_token=2.0 * vocabulary * width,
            patch=2.0 * (size("vision/patch_embed") + size("vision/blocks/"))
            + 2.0 * size("vision/merger/") / 4,  # the merger runs once for 4 patches
            patch_window_pair=v_pair * (blocks - full_blocks),
            patch_full_pair=v_pair * full_blocks,
        )

    def vision(self, patches: float, window_pairs: float, full_pairs: float) -> float:
        """Forward FLOPs of the tower over so many patches and attention pairs."""
        return (
            self.patch * patches
            + self.patch_window_pair * window_pairs
            + self.patch_full_pair * full_pairs
        )

    def text(self, lengths: Any, prefix: Any = 0, head_tokens: float = 0.0) -> float:
        """Forward FLOPs of causal sequences of these lengths, each after ``prefix`` seen keys."""
        n = np.asarray(lengths, np.float64)
        pairs = np.sum(n * (n + 1) / 2 + n * np.asarray(prefix, np.float64))
        return float(
            self.text_token * n.sum() + self.text_pair * pairs + self.head_token * head_tokens
        )


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device, or None where the kind is not in the table."""
    kind = device_kind.lower()
    return next((flops for name, flops in PEAK_FLOPS if name.lower() in kind), None)


def utilisation(flops: float, seconds: float) -> float | None:
    """Model-FLOPs utilisation of all devices; None (null in the row) on an unknown device."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None or seconds <= 0:
        return None
    return flops / (seconds * peak * jax.device_count())
