"""Scores an evaluation of ours anew under a benchmark's rule, strictly, or by a judge.

Reads a folder of srpo_jax.evaluate and the benchmark that its problems came from; writes
scored.jsonl there, with the first and the final answer's verdicts, and the scores into
summary.json. A judge's run that was stopped goes on where it stood when the same command is run
again. Exit code 3: some judgements did not arrive, run again.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

from srpo_jax.benchmarks import scoring
from srpo_jax.data import lock
from srpo_jax.data.files import write_jsonl
from tools.lib import cli, eval_folders, judge_options


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__,
        "python -m tools.score_eval --workdir runs/eval --benchmark mathverse "
        "--file data/mathverse --mode judge --judge_model gpt-4o",
    )
    add = parser.add_argument
    add("--workdir", required=True, help="folder of an evaluation")
    judge_options.add_scoring(parser)
    add("--file", required=True, help="the benchmark, as eval.file had it")
    add("--image_root", help="as data.root, if it was given")
    add("--bootstrap", type=int, default=1000, help="resamples for the intervals (%(default)s)")
    add("--seed", type=int, default=0, help="of the resampling (%(default)s)")
    judge_options.add_options(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    """Score a folder; the exit code."""
    from srpo_jax.benchmarks.both_answers import ROUNDS, score_rows
    from srpo_jax.benchmarks.load import load
    from srpo_jax.evaluate import write_scores

    found = eval_folders.read(args.workdir)
    source = load(args.benchmark, args.file, image_root=args.image_root, counts=())
    beside = judge_options.default_cache(found.folder / "scored.jsonl")
    args.judge_cache = args.judge_cache or beside
    asked, total = args.mode == scoring.JUDGE, len(found.rows) * len(ROUNDS)
    with (
        lock.hold(found.folder),
        judge_options.open_judge(args, total, "answers") if asked else nullcontext() as judge,
        scoring.open_pool(args.benchmark, args.mode, args.workers, args.timeout) as pool,
    ):
        scored, tables = score_rows(args.benchmark, source, found.rows, args.mode, pool, judge)
        rates = write_scores(found.folder, scored, tables, bootstrap=args.bootstrap, seed=args.seed)
        code = judge_options.conclude(judge, rates)
        write_jsonl(found.folder / "summary.json", [found.summary | {"benchmark": rates}])
    _show(args, rates, found.folder)
    return code


def _show(args: argparse.Namespace, rates: dict, folder: Path) -> None:
    print(
        f"{args.benchmark}, {args.mode}: first {100 * rates['acc@1']:.2f} %, final "
        f"{100 * rates['acc@2']:.2f} % of {rates['samples']} -> {folder / 'scored.jsonl'}"
    )
    for line in judge_options.describe(rates):
        print(f"  {line}")
    for which in ("first", "final"):
        for note in scoring.notes(rates[which]):
            print(f"  {which} answer: {note}")


if __name__ == "__main__":
    cli.run(main, make_parser())
