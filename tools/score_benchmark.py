"""Scores of a benchmark's predictions, made anywhere, by its official rule or strictly.

Input rows are JSON objects with the benchmark's own fields, the gold among them, and the model's
"response"; an "extraction" in a row is used as it is (--re_extract: made anew). Output rows are the
same with extraction, prediction, correct and mode; no_answer says why there is no answer by rule,
drawn marks an official random draw, no_judgement says why a judge gave none. Rows without an answer
or a judgement count as wrong.

Modes: official_rule = the benchmark's own rule; strict = this project's grader (options by letter
or text, numbers, expressions), without anything at random; judge = extraction and judgement by the
language model --judge_model. A judge's run that was stopped goes on where it stood when the same
command is run again. Exit code 3: some judgements did not arrive, run again.
"""

import argparse
import sys
from contextlib import nullcontext

from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.common import naming_rows
from srpo_jax.data.files import numbered_jsonl, write_jsonl
from tools.lib import cli, judge_options


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__,
        "python -m tools.score_benchmark --benchmark mathvision --predictions predictions.jsonl "
        "--output scored.jsonl --report scores",
    )
    judge_options.add_scoring(parser)
    parser.add_argument("--predictions", required=True, help="JSON Lines of predictions")
    parser.add_argument("--output", type=cli.output_file, required=True, help="JSON Lines to write")
    parser.add_argument("--report", help="also write the summary as REPORT.json and REPORT.md")
    parser.add_argument(
        "--re_extract", action="store_true", help="ignore the extractions that rows bring"
    )
    judge_options.add_options(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    """Score a file; the exit code."""
    numbered = list(numbered_jsonl(args.predictions))
    if not numbered:
        raise ValueError(f"{args.predictions}: no rows")
    rows = [row for _, row in numbered]
    for number, row in numbered:
        if "response" not in row and row.get("extraction") is None:
            raise ValueError(
                f"{args.predictions}:{number}: no 'response' (the model's text) and no 'extraction'"
            )
    if args.re_extract:
        rows = [{k: v for k, v in row.items() if k != "extraction"} for row in rows]
    asked = args.mode == scoring.JUDGE
    with (
        judge_options.open_judge(args, len(rows), "rows") if asked else nullcontext() as judge,
        scoring.open_pool(args.benchmark, args.mode, args.workers, args.timeout) as pool,
        naming_rows([f"{args.predictions}:{number}" for number, _ in numbered]),
    ):
        scored = scoring.score(args.benchmark, rows, args.mode, pool, judge)
    summary = scoring.accuracies(args.benchmark, args.mode, scored)
    summary["timeouts"], summary["crashes"] = (pool.timeouts, pool.crashes) if pool else (0, 0)
    code = judge_options.conclude(judge, summary)
    write_jsonl(args.output, scored)
    if args.report:
        cli.write_report(args.report, summary, scoring.markdown(summary))
    _show(summary, args.output)
    return code


def _show(summary: dict, output: str) -> None:
    """The accuracies on stdout, what qualifies them on stderr."""
    print(
        f"{summary['benchmark']}, {summary['mode']}: {summary['correct']}/{summary['total']} = "
        f"{summary['accuracy']:.2f} % -> {output}"
    )
    for table, groups in summary["tables"].items():
        if len(groups) > 40:  # such a table is in the report
            continue
        cells = [f"{group} {c['correct']}/{c['total']} = {c['accuracy']:.2f} %"
                 for group, c in groups.items()]  # fmt: skip
        print(f"  {table}: " + "; ".join(cells))
    benchmark = BENCHMARKS[summary["benchmark"]]
    if benchmark.measures and (line := benchmark.measures.line(summary)):
        print(f"  {line}")
    for line in judge_options.describe(summary):
        print(f"  {line}")
    for note in scoring.notes(summary):
        print(f"note: {note}", file=sys.stderr)
    if not summary["complete"]:
        full = ", ".join(f"{count} ({name})" for count, name in benchmark.counts.items())
        print(f"note: {summary['total']} rows; the full benchmark has {full}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, make_parser())
