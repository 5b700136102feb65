"""Does reflection data that the small policy made itself, or a blind teacher, improve its SFT?

From a finished quickstart: builds data on its RL problems in the modes ``self`` (the policy reviews
itself, right reviews are kept) and ``gold_blind`` (a program that does not know the answer), trains
the SFT model on each, and evaluates on the test problems, beside a control that trains for as many
steps on more of the original data. Prints accuracies and paired gains over the SFT start.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.demo import __main__ as demo
from tools.demo import report, teacher, tiles
from tools.demo.stages import ROOT, Clock, Stage, run_stages
from tools.demo.tasks import DOT_TILES
from tools.lib import cli

MODES = ("self", "gold_blind")
CONTROL = "control"


def build(folder: Path, out: Path, mode: str, seed: int, plan: demo.Plan, clock: Clock) -> Path:
    """The data set of one mode; a finished one is kept."""
    data = out / mode / "data"
    if (data / "card.json").exists():
        clock.say(f"{mode}: data done before")
        return data
    command = [
        *(sys.executable, "-m", "tools.build_reflection_data", "run"),
        *("--workdir", str(out / mode), "--records", str(folder / "data/rl.jsonl")),
        *("--policy_hf_dir", str(folder / "sft/hf"), "--attempt_prompt", "srpo"),
        *("--attempt_temperature", "1.0", "--attempt_max_tokens", str(DOT_TILES.completion_tokens)),
        *("--mode", mode, "--seed", str(seed), "--share_correct", "-1", "--batch_size", "128"),
        *("--tries", "8" if mode == "self" else "2", "--grading_workers", "1"),
    ]
    if mode == "self":
        command += ["--teacher_max_tokens", str(DOT_TILES.completion_tokens)]
        subprocess.run(command, cwd=ROOT, check=True)
    else:
        problems = tiles.draw_splits(seed, plan.sizes)["rl"]
        with teacher.serve(teacher.known_pictures(folder / "data/rl.jsonl", problems)) as url:
            more = ["--teacher_model", "program", "--teacher_url", url]
            subprocess.run(command + more, cwd=ROOT, check=True)
    return data


def train_stage(
    folder: Path, out: Path, name: str, seed: int, plan: demo.Plan, steps: int
) -> Stage:
    """SFT that goes on from the SFT model on the data of a mode."""
    base = demo.sft_stage(folder, seed, plan)
    train = folder / "data/sft.parquet"
    if name in MODES:
        train = out / name / "data/rl_aligned_train.jsonl"
    workdir = out / f"sft_{name}"
    overrides: dict[str, Any] = base.overrides | {
        "hf_dir": folder / "sft/hf",
        "seed": seed + 1,  # other batches than those of the SFT before
        "data.train": train,
        "data.mask_wrong_first": "auto" if name in MODES else "false",
        "steps": steps,
        "optim.lr": 5e-4,
        "export_hf_dir": workdir / "hf",
    }
    return Stage(
        f"SFT on {name}", base.module, base.config, workdir, workdir / "hf", steps, overrides
    )


def eval_stage(folder: Path, out: Path, name: str, mode: str, seed: int, plan: demo.Plan) -> Stage:
    """The trained model on the test problems."""
    base = demo.eval_stage(folder, seed, plan, "sft", mode, "test")
    workdir = out / "eval" / f"{name}_{mode}"
    overrides = base.overrides | {"hf_dir": out / f"sft_{name}" / "hf"}
    title = f"evaluate {name}, {report.MODES[mode]}"
    return Stage(title, base.module, base.config, workdir, workdir / "summary.json", 0, overrides)


def main(args: argparse.Namespace) -> None:
    """Build, train, evaluate, compare."""
    demo_dir = Path(args.demo).resolve()
    settings = json.loads((demo_dir / "settings.json").read_text())
    plan, seed = demo.Plan(**settings["plan"]), settings["first_seed"]
    folder, clock = demo_dir / f"seed{seed}", Clock()
    out = Path(args.out).resolve()
    names = (*MODES, CONTROL)
    for mode in MODES:
        build(folder, out, mode, seed, plan, clock)
    for name in names:
        run_stages([train_stage(folder, out, name, seed, plan, args.steps)], clock)
        run_stages([eval_stage(folder, out, name, m, seed, plan) for m in report.MODES], clock)
    print(f"\n{'data':12} {'decoding':9} acc@1  acc@2   gain of acc@2 over the SFT start, 95 %")
    for mode in report.MODES:
        start = folder / f"eval/sft_{mode}_test"
        for name, workdir in [("SFT start", start)] + [
            (name, out / "eval" / f"{name}_{mode}") for name in names
        ]:
            row = report.measure(workdir)
            line = f"{name:12} {mode:9} {row['acc@1']:5.1%}  {row['acc@2']:5.1%}"
            if name != "SFT start":
                gain = report.paired_gain(start, workdir)
                line += f"   {gain['gain']:+.1%} ({gain['low']:+.1%} to {gain['high']:+.1%})"
            print(line)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__, "python -m tools.demo.reflect --demo runs/demo --out runs/reflect"
    )
    parser.add_argument("--demo", default="runs/demo", help="a finished quickstart")
    parser.add_argument("--out", default="runs/reflect", help="folder of this run")
    parser.add_argument("--steps", type=cli.positive, default=120, help="of SFT (%(default)s)")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
