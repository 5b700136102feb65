"""How good the reflections of a model are, by rule and, with --judge_model, by the paper's rubric.

Input rows are JSON objects with the model's "response" in the five-block template, or, for texts
without our tags, with the fields first_think, first_answer, reflection, second_think and
second_answer. Where they are there, "answer" (or "gold"), "choices", "first_correct", "question"
and "id" are used. Output rows are the same with "quality": lengths in words, shares copied from the
first think, whether the reflection states an answer or gives the right one away, its verdict on the
first attempt, and the judge's ratings from 0 to 5 (logic, missing assumptions, clarity,
suggestions). The summary has means with bootstrap 95 % intervals.

A judge's run that was stopped goes on where it stood when the same command is run again. Exit code
3: some judgements did not arrive, run again.
"""

import argparse
import os
import sys

# Nothing here needs an accelerator, and one that is busy training must be left alone.
os.environ["JAX_PLATFORMS"] = "cpu"

from srpo_jax.benchmarks.common import naming_rows
from srpo_jax.data.files import numbered_jsonl, write_jsonl
from srpo_jax.report import quality
from tools.lib import cli, judge_options


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__,
        "python -m tools.score_reflections --input samples.jsonl --output quality.jsonl "
        "--report quality --judge_model gpt-4o",
    )
    parser.add_argument("--input", required=True, help="JSON Lines of responses")
    parser.add_argument("--output", type=cli.output_file, required=True, help="JSON Lines to write")
    parser.add_argument("--report", help="also write the summary as REPORT.json and REPORT.md")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    judge_options.add_options(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    """Score a file; the exit code."""
    numbered = list(numbered_jsonl(args.input))
    if not numbered:
        raise ValueError(f"{args.input}: no rows")
    with naming_rows([f"{args.input}:{number}" for number, _ in numbered]):
        rows = quality.measured([row for _, row in numbered])
    judge = None
    if args.judge_model:
        with judge_options.open_judge(args, len(rows), "rows") as judge:
            rows = quality.rated(rows, judge)
    summary = quality.measure_means(rows, args.seed)
    code = judge_options.conclude(judge, summary)
    write_jsonl(args.output, rows)
    if args.report:
        cli.write_report(args.report, summary, quality.markdown(summary))
    _show(summary, args.output)
    return code


def _show(summary: dict, output: str) -> None:
    """The means on stdout, what qualifies them on stderr."""
    print(f"{summary['reflections']} reflections in {summary['rows']} rows -> {output}")
    for name, m in summary["measures"].items():
        print(f"  {name}: {m['mean']:.3f} ({m['low']:.3f} to {m['high']:.3f}, {m['rows']} rows)")
    for line in judge_options.describe(summary):
        print(f"  {line}")
    if missing := summary["rows"] - summary["reflections"]:
        print(f"note: {missing} rows without a reflection", file=sys.stderr)
    if summary["no_judgement_rows"]:
        text = "reflections without a judgement, in no mean of the rubric"
        print(f"note: {summary['no_judgement_rows']} {text}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, make_parser())
