"""The same work by transformers or TRL, in a process of its own, in turn with ours."""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.bench.measure import stopwatch
from tools.bench.workload import Workload

# Peer -> the phases of ours that it does too.
PEERS = {"hf": ("decode",), "trl": ("step",)}


def compare(
    peer: str, name: str, ours: Callable[[], Any], work: Workload, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of both, run in turn after a warm-up of each, and their ratio pair by pair.

    Raises ValueError where the peer has no such phase or no ``hf_dir`` to read the same weights
    from, RuntimeError with the peer's last line where it fails.
    """
    if name not in PEERS[peer]:
        raise ValueError(f"--peer {peer} does {', '.join(PEERS[peer])}, not {name}")
    if not args.hf_dir:
        raise ValueError(
            "--peer needs --hf_dir, weights that both read: python -m tools.make_hf writes some"
        )
    with _process(peer, work) as theirs:
        theirs()
        pairs = [(stopwatch(ours), theirs()) for _ in range(args.repeats)]
    ratios = [b / a for a, b in pairs]
    text = ", ".join(f"{a:.2f} and {b:.2f} s ({r:.2f}x)" for (a, b), r in zip(pairs, ratios))  # noqa: B905
    print(f"  {name}, ours and {peer} in turn: {text}; median {statistics.median(ratios):.2f}x")
    return {"peer": peer, "pairs": pairs, "ratio": statistics.median(ratios)}


@contextlib.contextmanager
def _process(peer: str, work: Workload) -> Iterator[Callable[[], float]]:
    """-> a function that lets the peer do its work once and returns its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        messages, images = work.messages()
        for p, own in enumerate(images):
            for image in own:
                image.save(Path(folder) / f"{p}.png")
        pixels = (work.processor.min_pixels, work.processor.max_pixels)
        task = {
            "hf_dir": str(Path(work.hf_dir).resolve()),
            "messages": messages,
            "group_size": work.group_size,
            "max_new_tokens": work.max_new_tokens,
            "lengths": work.lengths_PG.reshape(-1).tolist(),
            "dtype": work.model.dtype,
            "pixels": pixels,
        }
        (Path(folder) / "task.json").write_text(json.dumps(task))
        command = [sys.executable, "-m", "tools.bench.peer_process", peer, folder]
        errors = Path(folder) / "errors"
        with (
            errors.open("wb") as log,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            ) as process,
        ):
            assert process.stdin and process.stdout

            def once() -> float:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write("go\n")
                    process.stdin.flush()
                for line in process.stdout:
                    if line.startswith("seconds "):
                        return float(line.split()[1])
                lines = errors.read_text(errors="replace").strip().splitlines() or ["no message"]
                raise RuntimeError(f"the peer {peer} failed: {lines[-1]}")

            try:
                yield once
            finally:
                process.kill()
