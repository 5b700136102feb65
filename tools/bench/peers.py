"""The same work by transformers or TRL, in a process of its own, in turn with ours."""

import contextlib
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.bench.measure import stopwatch
from tools.bench.workload import Workload

# Peer -> the phases of ours that it does too.
PEERS = {"hf": ("decode", "logprobs", "update"), "trl": ("step",)}
PROGRAM = Path(__file__).with_name("peer_process.py")
ENOUGH = 60.0  # seconds, after which no further pair is begun
Turn = Callable[[str], float]  # lets the peer do a phase once -> its seconds


def compare(ours: Callable[[], Any], peer: Turn, phase: str, repeats: int) -> dict[str, Any]:
    """Seconds of both, run in turn after a warm-up of each, and their ratio pair by pair.

    Where the peer is slow, there are fewer pairs than ``repeats``.
    """
    stopwatch(ours)
    spent, pairs = peer(phase), []
    while len(pairs) < repeats and not (pairs and spent > ENOUGH):
        pairs.append((stopwatch(ours), peer(phase)))
        spent += sum(pairs[-1])
    ratios = [theirs / mine for mine, theirs in pairs]
    return {
        "seconds": [mine for mine, _ in pairs],
        "peer_seconds": [theirs for _, theirs in pairs],
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def line(label: str, peer: str, found: dict[str, Any]) -> str:
    """What `compare` found, pair by pair."""
    pairs = zip(found["seconds"], found["peer_seconds"], found["ratios"], strict=True)
    text = ", ".join(f"{a:.2f} | {b:.2f} s = {r:.2f}x" for a, b, r in pairs)
    return f"{label}, ours | {peer}: {text}; median {found['ratio']:.2f}x"


@contextlib.contextmanager
def start(peer: str, python: str, work: Workload, weights: Path) -> Iterator[Turn]:
    """A process of the peer for the block.

    Its turns raise RuntimeError with the peer's last line where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), work, weights)
        command = [python, str(PROGRAM), peer, folder]
        errors = Path(folder) / "errors"
        with (
            errors.open("wb") as log,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            ) as process,
        ):
            ask, answers = process.stdin, process.stdout
            assert ask and answers

            def turn(phase: str) -> float:
                with contextlib.suppress(BrokenPipeError):
                    ask.write(f"{phase}\n")
                    ask.flush()
                for line in answers:
                    if line.startswith("seconds "):
                        return float(line.split()[1])
                raise RuntimeError(f"the peer {peer} failed: {_reason(errors, python)}")

            try:
                yield turn
            finally:
                process.kill()
                # Of a question that it did not live to read.
                with contextlib.suppress(BrokenPipeError):
                    ask.close()


def write_task(folder: Path, work: Workload, weights: Path) -> None:
    """What the peer has to do: prompts as conversations, images as PNG, the lengths."""
    for p, (_, own) in enumerate(work.conversations):
        for image in own:
            image.save(folder / f"{p}.png")
    task = {
        "hf_dir": str(weights.resolve()),
        "messages": [messages for messages, _ in work.conversations],
        "group_size": work.lengths_PG.shape[1],
        "max_new_tokens": work.max_new_tokens,
        "lengths": work.lengths_PG.reshape(-1).tolist(),
        "dtype": work.model.dtype,
        "pixels": (work.processor.min_pixels, work.processor.max_pixels),
        "end": work.processor.eos_ids[0],
        "forbidden": [*work.processor.eos_ids, *work.processor.forbidden_ids],
    }
    (folder / "task.json").write_text(json.dumps(task))


def _reason(errors: Path, python: str) -> str:
    """The last line that the peer wrote, and a remedy where a package is missing."""
    lines = errors.read_text(errors="replace").strip().splitlines() or ["no message"]
    remedy = ""
    if lines[-1].startswith("ModuleNotFoundError"):
        remedy = f" in {python}: install it there, or name another Python with --peer_python"
    return lines[-1] + remedy
