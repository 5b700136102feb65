"""What the reflection builder itself costs: CPU and memory for many items, seconds to resume.

    python tests/bench_reflection.py --items 100000

Text-only sums against a local server without delay: whatever time is measured is ours. The run is
stopped half-way by --max_items and resumed. Prints CPU milliseconds an item, peak memory, size of
the state, and the time from the start of the second command to its first request.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def answer(body: dict) -> str:
    """The server: every third sum right; reviews always good."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    a, b = map(int, re.search(r"What is (\d+) plus (\d+)\?", text).groups())
    rng = random.Random(body["seed"])
    if "response_format" in body:
        return json.dumps(
            {
                "reflection": "I added the digits without care for what is carried over.",
                "second_think": f"{a} plus {b}, column by column, is {a + b}.",
                "second_answer": str(a + b),
            }
        )
    said = a + b + (rng.random() > 0.35)
    return f"<think>{a} plus {b} is {said}.</think>\n<answer>$\\boxed{{{said}}}$</answer>"


def command(folder: Path, url: str, *more: str) -> list[str]:
    """The builder's command line."""
    return [
        *(sys.executable, "-m", "tools.build_reflection_data", "run"),
        *("--workdir", str(folder / "work"), "--records", str(folder / "sums.jsonl")),
        *("--policy_model", "p", "--policy_url", url, "--teacher_model", "t"),
        *("--teacher_url", url, "--concurrency", "32", "--share_correct", "-1", *more),
    ]


def served(url: str) -> int:
    """Requests that the server has seen."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as reply:
        return json.load(reply)["answered"]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    items = parser.parse_args().items
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), Path(name) / "port"
        with open(folder / "sums.jsonl", "w") as file:
            for i in range(items):
                row = {"id": f"s{i}", "problem": f"What is {i} plus {7 * i + 3}?"}
                file.write(json.dumps({**row, "answer": str(8 * i + 3)}) + "\n")
        server = subprocess.Popen(
            [
                *(sys.executable, ROOT / "tests/openai_server.py"),
                *("--answer", "tests.bench_reflection:answer", "--port_file", port),
            ],
            cwd=ROOT,
        )
        try:
            while not port.is_file():
                time.sleep(0.05)
            measure(folder, f"http://localhost:{port.read_text()}/v1", items)
        finally:
            server.kill()


def measure(folder: Path, url: str, items: int) -> None:
    """Both halves of the run."""
    start = time.monotonic()
    first = subprocess.run(command(folder, url, "--max_items", str(items // 2)), cwd=ROOT)
    assert first.returncode == 3
    again, before = time.monotonic(), served(url)
    process = subprocess.Popen(command(folder, url, "--max_items", "0"), cwd=ROOT)
    while served(url) == before:
        time.sleep(0.05)
    resumed = time.monotonic() - again
    process.wait()
    assert process.returncode == 0
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)  # builders and their grading workers
    seconds = time.monotonic() - start
    state = sum(p.stat().st_size for p in (folder / "work").glob("state.sqlite*"))
    print(f"items                      {items}")
    print(f"requests                   {served(url)}")
    print(f"CPU an item                {1000 * (usage.ru_utime + usage.ru_stime) / items:.2f} ms")
    print(f"peak memory of one process {usage.ru_maxrss / 1024:.0f} MiB")
    print(f"state on disk              {state / 2**20:.0f} MiB")
    print(f"resume to first request    {resumed:.1f} s")
    print(f"wall time                  {seconds:.0f} s, {items / seconds:.0f} items/s")
    print(f"cores                      {os.cpu_count()}")


if __name__ == "__main__":
    main()
