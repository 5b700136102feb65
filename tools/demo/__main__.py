"""Both SRPO stages from nothing, in minutes, on a CPU: data, model, training, evaluation, report.

Draws "dot tiles" problems, writes reflections for them by a program that knows the steps, trains a
tokenizer, makes a random Qwen2.5-VL of 1.1 million parameters, runs reflection SFT, then SRPO and a
pure-GRPO control and credit by segments, of equal length from the same checkpoint, evaluates all of
them on problems that nothing was tuned on, and exports to Hugging Face format. Every stage is one
of the package's own commands and is printed. A run that was stopped goes on where it stood.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from srpo_jax import launch
from srpo_jax.data.files import read_jsonl, write_json
from tools import report as run_report
from tools.demo import data, report
from tools.demo.stages import Clock, Stage, run_stages
from tools.demo.tasks import DOT_TILES, Task
from tools.lib import cli, transformers_check


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of everything. Chosen on validation problems of other seeds (``--tune``).

    Seeds differ most in how far SFT gets (README); 900 SFT steps leave RL less to do than 600.
    """

    sft_steps: int = 600
    sft_batch: int = 32
    sft_lr: float = 2e-3
    rl_steps: int = 60
    rl_prompts: int = 32
    group_size: int = 8
    rl_lr: float = 1e-4
    test: int = 1024
    validation: int = 512

    @property
    def sizes(self) -> dict[str, int]:
        """Problems of each split: training never sees one twice."""
        return {
            "sft": self.sft_steps * self.sft_batch,
            "rl": self.rl_steps * self.rl_prompts,
            "validation": self.validation,
            "test": self.test,
        }


QUICK = Plan(
    sft_steps=6, sft_batch=8, rl_steps=2, rl_prompts=4, group_size=4, test=16, validation=8
)


def common(folder: Path, hf_dir: Path, seed: int, task: Task) -> dict[str, Any]:
    """Overrides of every stage."""
    return {
        "hf_dir": hf_dir,
        "seed": seed,
        "max_pixels": task.max_pixels,
        "grading.workers": 1,
        "data.workers": 0,
        "compilation_cache_dir": folder / "compiled",
    }


def sft_stage(folder: Path, seed: int, plan: Plan, task: Task = DOT_TILES) -> Stage:
    """Reflection SFT from random weights; the vision tower learns too."""
    out = folder / "sft"
    return Stage(
        "SFT",
        "srpo_jax.train_sft",
        "configs/sft.py:size=tiny",
        out,
        done=out / "hf",
        steps=plan.sft_steps,
        overrides=common(folder, folder / "init/hf", seed, task)
        | {
            "data.train": folder / "data/sft.parquet",
            "data.global_batch_size": plan.sft_batch,
            "data.prompts_per_row": plan.sft_batch,
            "data.tokens": task.prompt_tokens + task.completion_tokens,
            "data.patch_budgets": task.budgets(plan.sft_batch),
            # From random weights even a wrong first attempt teaches reading and the template.
            "data.mask_wrong_first": "false",
            "steps": plan.sft_steps,
            "freeze": "()",
            "optim.lr": plan.sft_lr,
            "optim.warmup_ratio": 0.05,
            "optim.final_fraction": 0.1,
            "optim.b2": 0.98,
            "optim.weight_decay": 0.01,
            "checkpoint.every": 300,
            "log.tensorboard": False,
            "export_hf_dir": out / "hf",
        },
    )


# RL from the same SFT: the paper's reward, one for the final answer alone, and what makes most of
# equal tokens on this task (docs/study.md): the first round is paid for its own answer.
ARMS = {
    "SRPO": {"reward.profile": "paper"},
    "GRPO": {"reward.profile": "grpo"},
    "segments": {"reward.profile": "balanced", "grpo.credit": "segments"},
}


def rl_stage(folder: Path, seed: int, plan: Plan, name: str, task: Task = DOT_TILES) -> Stage:
    """One of `ARMS`."""
    out, per_row = folder / name.lower(), plan.rl_prompts // 2
    return Stage(
        name,
        "srpo_jax.train_grpo",
        "configs/grpo.py:size=tiny",
        out,
        done=out / "hf",
        steps=plan.rl_steps,
        overrides=common(folder, folder / "sft/hf", seed, task)
        | ARMS[name]
        | {
            "reward.right_words": report.WORDS.right,
            "reward.wrong_words": report.WORDS.wrong,
            "data.train": folder / "data/rl.jsonl",
            "data.global_batch_size": plan.rl_prompts,
            "data.prompts_per_row": per_row,
            "data.prompt_tokens": task.prompt_tokens,
            "data.patch_budgets": task.budgets(per_row),
            "steps": plan.rl_steps,
            "sampling.group_size": plan.group_size,
            "sampling.max_new_tokens": task.completion_tokens,
            "sampling.segment": task.completion_tokens,
            "filter.low": 0.0,
            "filter.high": 1.0,
            "grpo.updates_per_rollout": 2,
            "optim.lr": plan.rl_lr,
            "optim.warmup_ratio": 0.05,
            "optim.final_fraction": 0.2,
            "optim.b2": 0.98,
            "checkpoint.every": 20,
            "log.tensorboard": False,
            "export_hf_dir": out / "hf",
        },
    )


def eval_stage(
    folder: Path,
    seed: int,
    plan: Plan,
    name: str,
    mode: str,
    split: str,
    task: Task = DOT_TILES,
) -> Stage:
    """One model's Hugging Face directory on the held-out problems, in one decoding mode."""
    batch = min(128, plan.test)
    out = folder / "eval" / f"{name.lower()}_{mode}_{split}"
    return Stage(
        f"evaluate {name}, {report.MODES[mode]}",
        "srpo_jax.evaluate",
        "configs/eval.py:size=tiny",
        out,
        done=out / "summary.json",
        overrides=common(folder, folder / name.lower() / "hf", seed, task)
        | {
            "eval.file": folder / f"data/{split}.jsonl",
            "eval.temperature": {"sampled": 1.0, "greedy": 0.0}[mode],
            "eval.batch_size": batch,
            "data.prompts_per_row": batch // 4,
            "data.prompt_tokens": task.prompt_tokens,
            "data.patch_budgets": task.budgets(batch // 4),
            "sampling.max_new_tokens": task.completion_tokens,
            "sampling.segment": task.completion_tokens,
        },
    )


def prepare(folder: Path, seed: int, plan: Plan, clock: Clock) -> None:
    """Data, tokenizer and random weights, once."""
    if (folder / "init/hf").exists():
        clock.say("data and random model: done before")
        return
    clock.say(f"drawing {sum(plan.sizes.values()):,} problems and writing reflections for SFT")
    shutil.rmtree(folder / "data", ignore_errors=True)
    data.write_records(folder / "data", seed, plan.sizes)
    known = data.write_model(folder / "data", folder / "init/hf", seed)
    clock.say(f"tokenizer of {known} tokens and a random Qwen2.5-VL written to {folder / 'init'}")


def run_seed(folder: Path, seed: int, plan: Plan, split: str, clock: Clock) -> dict[str, Any]:
    """The whole way for one seed; the rows and gains that were measured."""
    path, started = folder / f"results_{split}.json", clock.seconds()
    if path.exists():
        clock.say("done before")
        return json.loads(path.read_text())
    prepare(folder, seed, plan, clock)
    run_stages([sft_stage(folder, seed, plan)], clock)
    run_stages([rl_stage(folder, seed, plan, name) for name in ARMS], clock)
    stages = {
        (name, mode): eval_stage(folder, seed, plan, name, mode, split)
        for name in report.MODELS
        for mode in report.MODES
    }
    for name in report.MODELS:  # the two decoding modes side by side
        run_stages([stages[name, mode] for mode in report.MODES], clock)
    folders = {key: stage.workdir for key, stage in stages.items()}
    results = {
        "seed": seed,
        "seconds": round(clock.seconds() - started, 1),
        "rows": {
            mode: {name: report.measure(folders[name, mode]) for name in report.MODELS}
            for mode in report.MODES
        },
        "gains": report.gains(folders),
    }
    write_json(path, results)
    return results


def write_page(folder: Path, split: str) -> None:
    """One page of a seed's RL runs and all evaluations; its path is printed."""
    tested = [folder / f"eval/{n.lower()}_{m}_{split}" for n in report.MODELS for m in report.MODES]
    own, *others = (folder / name.lower() for name in ARMS)
    words = ["--workdir", own, "--compare", *others, "--evaluations", *tested]
    words += ["--out", folder / "report.html"]
    run_report.main(run_report.make_parser().parse_args([*map(str, words)]))


def check_export(folder: Path, clock: Clock) -> None:
    """Where torch is installed: transformers loads the export and says what we say."""
    hf_dir, given = folder / "srpo/hf", folder / "data/test.jsonl"
    if not transformers_check.torch_is_there():
        clock.say(
            "torch is not installed, so transformers was not tried on the export; with it: "
            f"{launch.command('transformers_check')} --hf_dir {hf_dir} --input {given}"
        )
        return
    records = read_jsonl(given)[:8]
    tokens = transformers_check.compare(hf_dir, records, given.parent, DOT_TILES.completion_tokens)
    clock.say(f"transformers loads the export; all {tokens} greedy tokens equal ours")


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or go on in one that was begun with the same settings."""
    path = out / "settings.json"
    if path.exists():
        if json.loads(path.read_text()) != settings:
            raise ValueError(
                f"{out} was begun with other settings: give another --out, or delete it"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not a demo's folder: give another --out")
    write_json(path, settings)


def main(args: argparse.Namespace) -> int:
    """Run every seed, write results.json, print table, gains and reading."""
    # Of the stages. On a GPU two of them at a time would each take its memory.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "HF_HUB_OFFLINE": "1"}
    plan = QUICK if args.quick else Plan()
    overrides = dict(item.split("=", 1) for item in args.set)
    plan = dataclasses.replace(
        plan, **{key: type(getattr(plan, key))(value) for key, value in overrides.items()}
    )
    out = Path(args.out).resolve()
    split = "validation" if args.tune else "test"
    settings = {"plan": dataclasses.asdict(plan), "first_seed": args.seed}
    open_folder(out, settings)
    clock, seeds = Clock(), []
    for seed in range(args.seed, args.seed + args.seeds):
        clock.say(f"seed {seed}")
        seeds.append(run_seed(out / f"seed{seed}", seed, plan, split, clock))
    results = {**settings, "split": split, "seeds": seeds}
    write_json(out / f"results_{split}.json", results)
    print(
        f"\n{report.table(seeds, split)}\n\n{report.gain_lines(seeds)}\n\n{report.reading(seeds)}"
    )
    print("\nCurves, rollouts and warnings of each seed, to be opened in a browser:")
    for one in seeds:
        write_page(out / f"seed{one['seed']}", split)
    check_export(out / f"seed{args.seed}", clock)
    clock.say(f"all in {out}; the trained model: {out / f'seed{args.seed}/srpo/hf'}")
    if args.quick:
        print("--quick: far too short to learn anything; the gain was not checked")
        return 0
    broken = report.verdict(seeds)
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    return 1 if broken else 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(__doc__, f"{launch.program()} --seeds 3 --out runs/demo")
    add = parser.add_argument
    add("--out", default="runs/demo", help="folder of the run (%(default)s)")
    add("--seeds", type=int, default=1, help="how many seeds to run, one after another")
    add("--seed", type=int, default=0, help="the first of them")
    add("--quick", action="store_true", help="a few tiny steps, to see that all parts work")
    add("--tune", action="store_true", help="evaluate on validation problems instead of the test")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the plan, for --tune")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
