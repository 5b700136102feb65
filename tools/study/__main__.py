"""Methods compared at equal compute on drawn tasks: is there one whose reflection beats GRPO?

Every arm of a (task, seed) starts from the same SFT and stops at the tokens (sampled plus learned
from) that GRPO spent. Results lie in WORKDIR/results, one small file an arm; what is done is never
done again, and a run that was stopped goes on where it stood. Settings are chosen with
--measure validation, on seeds from 100 on; test problems are measured once.

On one core a data set takes a minute, an SFT start 3 to 6, an arm 2 to 5. All arms, both tasks and
3 seeds are 24 starts and 114 arms: about 7 hours of one core. A folder is one study's; seeds that
ran elsewhere are added by copying the files of their results/.
"""

import argparse
import functools
import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from srpo_jax.data.files import write_json, write_text
from srpo_jax.data.lock import hold
from tools.demo.stages import ROOT, Clock
from tools.demo.tasks import TASKS
from tools.lib import cli
from tools.study import summary
from tools.study.arms import ARMS, FULL, QUICK, Arm, Budget, eval_stage, rl_stage, start_stage
from tools.study.jobs import Job, Run, run_jobs
from tools.study.measure import evaluated, learning_curve, steps_within, tokens_of, training_rows

TUNING_SEEDS = 100  # seeds from here on are for choosing settings
STEPS_LIMIT = 3  # times GRPO's steps: an arm that spends little stops there


def prepare(worker: Run, folder: Path, task: str, seed: int, quick: bool) -> None:
    """Data and random weights; what a stopped start left is drawn anew."""
    for left in ("data", "init"):
        shutil.rmtree(folder / left, ignore_errors=True)
    words = ["--task", task, "--seed", str(seed), "--folder", str(folder), *["--quick"] * quick]
    worker(["-m", "tools.study.prepare", *words], folder / "prepare.log")
    (folder / "prepared").touch()


def start(worker: Run, folder: Path, task: str, seed: int, budget: Budget, name: str) -> None:
    """One SFT start."""
    stage = start_stage(folder, seed, budget.plan, TASKS[task], name)
    worker(stage.arguments, stage.log)
    shutil.rmtree(stage.workdir / "checkpoints", ignore_errors=True)


def train(worker: Run, folder: Path, task: str, seed: int, budget: Budget, arm: Arm) -> None:
    """RL of an arm; all but GRPO go on, or stop, where GRPO's tokens are spent. What a stopped run
    still has to do follows from its rows alone."""
    plan, out, yardstick = budget.plan, folder / arm.name, folder / "grpo.rows.json"

    def wanted(rows: list[dict[str, Any]]) -> int:
        if arm.name == "grpo":
            return plan.rl_steps
        if len(rows) < plan.rl_steps // 2:
            return plan.rl_steps // 2  # enough to see what a step costs
        total = tokens_of(json.loads(yardstick.read_text()))["total"]
        return steps_within(rows, total, STEPS_LIMIT * plan.rl_steps)

    while len(rows := training_rows(out)) < (steps := wanted(rows)):
        stage = rl_stage(folder, seed, plan, TASKS[task], arm, steps)
        worker(stage.arguments, stage.log)
    if arm.name == "grpo":
        write_json(yardstick, rows)


def run_arm(
    worker: Run, folder: Path, seed: int, args: argparse.Namespace, task: str, arm: Arm
) -> None:
    """Train, evaluate in both modes, keep the result, delete what only training needed."""
    budget = QUICK if args.quick else FULL
    began = time.monotonic()
    if arm.overrides:
        train(worker, folder, task, seed, budget, arm)
    found = {}
    for mode in ("sampled", "greedy"):
        stage = eval_stage(folder, seed, budget, TASKS[task], arm, mode, args.measure)
        if not stage.done.exists():
            worker(stage.arguments, stage.log)
        found[mode] = evaluated(stage.workdir)
    rows = training_rows(folder / arm.name)
    seconds = round(time.monotonic() - began, 1)
    compute = tokens_of(rows) | {"steps": len(rows), "seconds": seconds}
    result = {"task": task, "seed": seed, "arm": arm.name, "compute": compute}
    result |= {"curve": learning_curve(rows)} | found
    write_text(result_file(args, task, seed, arm), json.dumps(result) + "\n")
    shutil.rmtree(folder / arm.name / "checkpoints", ignore_errors=True)


def result_file(args: argparse.Namespace, task: str, seed: int, arm: Arm) -> Path:
    """Where an arm's result lies."""
    return Path(args.workdir) / "results" / args.measure / f"{task}-{seed}-{arm.name}.json"


def jobs_of(args: argparse.Namespace, arms: list[Arm]) -> list[Job]:
    """All jobs, seed by seed, so that an early stop leaves whole seeds."""
    jobs, workdir = [], Path(args.workdir).resolve()
    for seed in args.seeds:
        for task in args.tasks:
            folder, budget = workdir / task / f"seed{seed}", QUICK if args.quick else FULL
            name, ready = f"{task} seed {seed}", folder / "prepared"
            work = functools.partial(prepare, folder=folder, task=task, seed=seed, quick=args.quick)
            jobs.append(Job(f"{name}: data", ready, work))
            for one in dict.fromkeys(arm.start for arm in arms):
                work = functools.partial(
                    start, folder=folder, task=task, seed=seed, budget=budget, name=one
                )
                jobs.append(Job(f"{name}: SFT, {one}", folder / one / "hf", work, (ready,)))
            for arm in arms:
                needs = (ready, folder / arm.start / "hf")
                if arm.overrides and arm.name != "grpo":
                    needs += (folder / "grpo.rows.json",)
                work = functools.partial(
                    run_arm, folder=folder, seed=seed, args=args, task=task, arm=arm
                )
                done = result_file(args, task, seed, arm).resolve()
                jobs.append(Job(f"{name}: {arm.name}", done, work, needs))
    return jobs


def chosen_arms(names: list[str]) -> list[Arm]:
    """Arms by name; ValueError for one that is unknown, cannot be run, or lacks its yardstick."""
    for name in names:
        if name not in ARMS:
            raise ValueError(f"--arms {name}: choose of {', '.join(ARMS)}")
        if missing := ARMS[name].missing_keys:
            raise ValueError(f"--arms {name}: this version has no key {missing[0]}; leave it out")
    if "grpo" not in names:
        raise ValueError("--arms: grpo must be among them, its compute is everyone's")
    return [ARMS[name] for name in dict.fromkeys(names)]


def main(args: argparse.Namespace) -> int:
    """Run what is not done, or write the summary."""
    workdir = Path(args.workdir)
    if args.summary:
        print(summary.write(workdir / "results/test", Path(args.docs)))
        return 0
    wrong = [seed for seed in args.seeds if (seed >= TUNING_SEEDS) != (args.measure != "test")]
    if wrong:
        raise ValueError(
            f"--seeds {wrong[0]}: seeds from {TUNING_SEEDS} on are for --measure validation, "
            "those below for --measure test"
        )
    arms = chosen_arms(args.arms)
    clock, jobs = Clock(), jobs_of(args, arms)
    left = sum(not job.done.exists() for job in jobs)
    clock.say(f"{left} of {len(jobs)} jobs to do, {args.jobs} at a time")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what runs is stopped
    with hold(workdir, clock.say):
        failures = run_jobs(jobs, args.jobs, 60 * (args.minutes or math.inf), clock)
    for line in failures:
        print(f"error: {line}")
    left = sum(not job.done.exists() for job in jobs)
    clock.say(f"{left} of {len(jobs)} jobs left" + "; the same command goes on" * bool(left))
    print(summary.table(summary.read(workdir / "results" / args.measure)))
    return 1 if failures else 75 if left else 0


def names(text: str) -> list[str]:
    """``type=`` of a list with commas."""
    return [word for word in text.split(",") if word]


def seeds(text: str) -> list[int]:
    """``type=`` of seeds: 0,1,2 or 0-4."""
    found = []
    for word in names(text):
        low, _, high = word.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def tasks(text: str) -> list[str]:
    """``type=`` of tasks."""
    for word in names(text):
        if word not in TASKS:
            raise argparse.ArgumentTypeError(f"{word}: choose of {', '.join(TASKS)}")
    return names(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__,
        "python -m tools.study --workdir runs/study --seeds 0-2 --jobs 8 --minutes 9",
    )
    add = parser.add_argument
    runnable = ",".join(arm.name for arm in ARMS.values() if not arm.missing_keys)
    add("--workdir", required=True, help="folder of the study")
    add("--arms", type=names, default=names(runnable), help=f"of {', '.join(ARMS)}")
    add("--tasks", type=tasks, default=[*TASKS], help=f"of {', '.join(TASKS)}")
    add("--seeds", type=seeds, default=[0, 1, 2], help="as 0,1,2 or 0-4")
    add("--jobs", type=cli.positive, default=1, help="at the same time, on cores of their own")
    add("--minutes", type=cli.above_zero, help="stop after so many; the same command goes on")
    add("--measure", choices=("test", "validation"), default="test", help="problems measured")
    add("--quick", action="store_true", help="a few tiny steps, to see that all parts work")
    add("--summary", action="store_true", help="write table and figures into --docs, run nothing")
    add("--docs", default=str(ROOT / "docs"), help="folder with study.md (%(default)s)")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
