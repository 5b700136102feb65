"""Both stages on real diagrams with the real vocabulary, from an HF directory to an HF directory.

Writes a Qwen2.5-VL of small width but full vocabulary with random weights as a Hugging Face
directory, builds SFT records (the gold answer in the five-block template) from geometry problems,
and runs the commands that any user would: SFT, then GRPO with groups of 8, which is stopped with
SIGTERM in mid-run and started again, and export. Then it checks what came out; where torch is
installed also that transformers loads the export and that its greedy output equals ours.
"""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srpo_jax.data.files import read_jsonl, write_jsonl
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sizes import Shape
from srpo_jax.run.command import AGAIN
from srpo_jax.run.metrics import read_rows
from tools.lib import cli, transformers_check
from tools.make_hf import TOKEN_KEYS, added_tokens, make_config, write_random_hf

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"
VOCAB = 151_936  # embedding rows of the released 3B
HELD_OUT = 64


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    sft_steps: int = 160  # enough for some of the RL samples to keep the template
    rl_steps: int = 20
    stop_after: int = 8  # RL steps that are logged before SIGTERM
    prompts: int = 4
    group_size: int = 8
    max_new_tokens: int = 96
    width: int = 128
    eval_limit: int = 16
    compared: int = 3  # held-out problems whose greedy output is compared with transformers'


SHORT = Plan(
    sft_steps=4, rl_steps=6, stop_after=1, prompts=2, max_new_tokens=8, width=64, eval_limit=4,
    compared=2,
)  # fmt: skip


class Checks:
    """Prints each check as it passes; the first that fails ends the run."""

    def __init__(self):
        self.passed = 0

    def __call__(self, what: str, ok: bool, found: Any = "") -> None:
        """Print that ``what`` holds; RuntimeError, with what was found, if it does not."""
        if not ok:
            raise RuntimeError(f"check failed: {what}: {found}")
        self.passed += 1
        print(f"  ok: {what}" + (f" ({found})" if found else ""), flush=True)


def write_records(data: Path, out: Path) -> tuple[int, int]:
    """train.jsonl and held_out.jsonl of the English problems; returns their sizes.

    Image paths stay relative to ``data``, which the commands get as data.root. The reflection
    fields hold the gold answer and a sentence each: enough to learn the template from.
    """
    rows = [row for row in read_jsonl(data / "data.jsonl") if row["lang"] == "en"]
    records = [
        {
            "id": row["id"],
            "problem": row["question"],
            "answer": row["answer"],
            "images": [row["image"]],
            "choices": row["choices"],
            "source": row["source"],
            "first_think": f"The diagram gives {row['answer']}.",
            "first_answer": row["answer"],
            "reflection": "I check the diagram again: it holds.",
            "second_think": f"It is {row['answer']}.",
            "second_answer": row["answer"],
            "first_correct": True,
        }
        for row in rows
    ]
    if len(records) <= HELD_OUT:
        raise ValueError(f"{data}/data.jsonl: {len(records)} English records are too few")
    # Every k-th problem is held out: the file is sorted by where the problems are from.
    every = len(records) // HELD_OUT
    held = records[::every][:HELD_OUT]
    names = {row["id"] for row in held}
    write_jsonl(out / "train.jsonl", [r for r in records if r["id"] not in names])
    write_jsonl(out / "held_out.jsonl", held)
    return len(records) - len(held), len(held)


def write_model(tokenizer: Path, out_dir: Path, width: int) -> int:
    """A random model of small width with the released vocabulary; returns its parameters."""
    ids = added_tokens(tokenizer)
    shape = Shape(
        hidden=width,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp=2 * width,
        vocab_size=VOCAB,
        vision_hidden=64,
        vision_depth=4,
        vision_heads=4,
        vision_mlp=128,
        full_blocks=(3,),
        tied=True,
    )
    config = make_config(shape, {key: ids[token] for key, token in TOKEN_KEYS.items()})
    cfg = write_random_hf(out_dir, config, tokenizer, seed=0, dtype="float32", std=0.05)
    return sum(math.prod(leaf.shape) for leaf in abstract_params(cfg).values())


class Commands:
    """Runs the package's commands with output into log files."""

    def __init__(self, out: Path, check: Checks):
        self._out, self._check = out, check

    def start(self, name: str, module: str, *arguments: str) -> subprocess.Popen:
        """The process of ``python -m module arguments``; its output goes to ``<name>.log``."""
        print(f"$ python -m {module} {shlex.join(arguments)}", flush=True)
        with open(self._out / f"{name}.log", "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self, name: str, process: subprocess.Popen, until: Callable[[], bool]) -> None:
        """Until ``until`` holds or the process has ended, with its last line now and then."""
        looked, told = time.monotonic(), ""
        while process.poll() is None and not until():
            time.sleep(0.1)
            if time.monotonic() - looked > 15:
                looked, line = time.monotonic(), self.tail(name, 1)[:110]
                if line != told:
                    print(f"    {name}: {line}", flush=True)
                told = line

    def finish(self, name: str, process: subprocess.Popen, what: str, wanted: int = 0) -> None:
        """Wait for it and check its exit code; it is stopped on Ctrl-C."""
        try:
            self.wait(name, process, lambda: False)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        code = process.returncode
        told = "" if code == wanted else f"{code}\n{self.tail(name)}"
        self._check(f"{what} ends with exit code {wanted}", code == wanted, told)

    def tail(self, name: str, lines: int = 15) -> str:
        """The end of a log."""
        text = (self._out / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.strip().splitlines()[-lines:])


def common(plan: Plan, data: Path, out: Path) -> list[str]:
    """Arguments of both stages."""
    return [
        f"--config.data.root={data}",
        f"--config.eval.file={out / 'held_out.jsonl'}",
        f"--config.eval.limit={plan.eval_limit}",
        f"--config.eval.batch_size={min(8, plan.eval_limit)}",
        "--config.eval.every=1000000",  # at the end only
        "--config.max_pixels=100352",  # 128 merged tokens: time, not memory, is short here
        "--config.data.prompts_per_row=2",
        "--config.data.patch_budgets=(1024,1536)",
        "--config.data.workers=0",
        "--config.grading.workers=1",
        "--config.log.tensorboard=False",
        f"--config.sampling.max_new_tokens={plan.max_new_tokens}",
        f"--config.sampling.segment={min(16, plan.max_new_tokens)}",
    ]


def sft_arguments(plan: Plan, data: Path, out: Path) -> list[str]:
    """SFT from the random directory."""
    return [
        "--config=configs/sft.py:size=tiny",
        f"--workdir={out / 'sft'}",
        f"--config.hf_dir={out / 'init'}",
        f"--config.data.train={out / 'train.jsonl'}",
        *common(plan, data, out),
        f"--config.steps={plan.sft_steps}",
        "--config.optim.lr=3e-3",
        "--config.logit_chunk=64",  # a response has about as many tokens
        "--config.data.global_batch_size=8",
        "--config.data.tokens=1024",
        f"--config.export_hf_dir={out / 'sft_hf'}",
    ]


def rl_arguments(plan: Plan, data: Path, out: Path) -> list[str]:
    """GRPO with the paper's reward from what SFT exported."""
    return [
        "--config=configs/grpo.py:size=tiny",
        f"--workdir={out / 'rl'}",
        f"--config.hf_dir={out / 'sft_hf'}",
        f"--config.data.train={out / 'train.jsonl'}",
        *common(plan, data, out),
        "--config.optim.lr=1e-4",
        f"--config.steps={plan.rl_steps}",
        f"--config.data.global_batch_size={plan.prompts}",
        "--config.data.prompt_tokens=1024",
        f"--config.sampling.group_size={plan.group_size}",
        "--config.grpo.updates_per_rollout=1",
        "--config.grpo.logit_chunk=256",
        "--config.filter.low=0.0",
        "--config.filter.high=1.0",
        "--config.checkpoint.every=1000",  # what is there after SIGTERM was saved because of it
        f"--config.export_hf_dir={out / 'rl_hf'}",
    ]


def run_sft(plan: Plan, data: Path, out: Path, commands: Commands, check: Checks) -> None:
    """Stage 1, and that it learned."""
    process = commands.start("sft", "srpo_jax.train_sft", *sft_arguments(plan, data, out))
    commands.finish("sft", process, "SFT")
    rows = read_rows(out / "sft/metrics.jsonl", "train")
    losses = [row["loss"] for row in rows]
    check("every SFT step is logged", [r["step"] for r in rows] == [*range(1, plan.sft_steps + 1)])
    check("the loss fell", losses[-1] < losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}")
    check("SFT exported", (out / "sft_hf/model.safetensors").exists())


def run_rl(plan: Plan, data: Path, out: Path, commands: Commands, check: Checks) -> None:
    """Stage 2 with a SIGTERM in mid-run, and that nothing was lost by it."""
    arguments, metrics = rl_arguments(plan, data, out), out / "rl/metrics.jsonl"
    process = commands.start("rl", "srpo_jax.train_grpo", *arguments)
    commands.wait("rl", process, lambda: _logged(metrics) >= plan.stop_after)
    print("$ kill -TERM", flush=True)
    process.send_signal(signal.SIGTERM)
    commands.finish("rl", process, "GRPO, stopped by SIGTERM,", AGAIN)
    stopped = _logged(metrics)
    check("it stopped in mid-run", plan.stop_after <= stopped < plan.rl_steps, f"step {stopped}")
    check("nothing was exported yet", not (out / "rl_hf").exists())

    process = commands.start("rl", "srpo_jax.train_grpo", *arguments)
    commands.finish("rl", process, "the same command again")
    lines = read_jsonl(metrics)
    second = [row["step"] for row in lines if row["run"] == 2 and row["split"] == "train"]
    check(
        f"it went on from step {stopped} to {plan.rl_steps}",
        second == list(range(stopped + 1, plan.rl_steps + 1)),
        second,
    )
    rows = read_rows(metrics, "train")
    files = sorted((out / "rl/rollouts").glob("*.jsonl"))
    groups = [Counter(row["id"] for row in read_jsonl(path)) for path in files]
    check(
        f"every one of {plan.rl_steps} steps drew {plan.prompts} groups of {plan.group_size}",
        [len(found) for found in groups] == [plan.prompts] * plan.rl_steps
        and all(set(found.values()) == {plan.group_size} for found in groups),
    )
    rewards = [row["reward/mean"] for row in rows]
    spread = f"mean {min(rewards):.3f} to {max(rewards):.3f}"
    check("every step has a reward", all(isinstance(r, float) for r in rewards), spread)
    rates = [row["format_rate"] for row in rows]
    print(f"  format kept by {100 * sum(rates) / len(rates):.0f} % of the samples", flush=True)
    check("GRPO exported", (out / "rl_hf/model.safetensors").exists())


def _logged(metrics: Path) -> int:
    return len(read_rows(metrics, "train")) if metrics.exists() else 0


def main(args: argparse.Namespace) -> None:
    """The whole run; every check is printed."""
    plan, out = SHORT if args.short else Plan(), Path(args.out).resolve()
    data, tokenizer = Path(args.data).resolve(), Path(args.tokenizer).resolve()
    for path in (data / "data.jsonl", tokenizer / "tokenizer.json"):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; give --data and --tokenizer")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    check = Checks()
    commands = Commands(out, check)
    train, held = write_records(data, out)
    print(f"{train} problems to train on, {held} held out", flush=True)
    count = write_model(tokenizer, out / "init", plan.width)
    print(f"random Qwen2.5-VL of {count:,} parameters, vocabulary {VOCAB:,}", flush=True)
    run_sft(plan, data, out, commands, check)
    run_rl(plan, data, out, commands, check)
    if transformers_check.torch_is_there():
        records = read_jsonl(out / "held_out.jsonl")[: plan.compared]
        tokens = transformers_check.compare(out / "rl_hf", records, data, plan.max_new_tokens)
        check(
            "transformers loads the export; its greedy output equals ours", True, f"{tokens} tokens"
        )
    else:
        print("  not checked: torch is not installed, so transformers cannot load the export")
    print(f"{check.passed} checks passed; everything is in {out}")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(__doc__, "python -m tools.real_input --out runs/real_input")
    add = parser.add_argument
    add("--out", default=os.path.join("runs", "real_input"), help="new folder (%(default)s)")
    add("--data", default=str(SHARED / "geometry3k_formalgeo_1500"), help="folder of data.jsonl")
    add("--tokenizer", default=str(SHARED / "tokenizer_qwen2_5_vl"), help="Qwen2.5-VL's own files")
    add("--short", action="store_true", help="a few steps of everything, for tests")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
