"""Whether one evaluated model is better than another on the same problems: a paired test.

Reads two folders of srpo_jax.evaluate. Keys: final_correct and first_correct are the verdicts of
this project's grader (samples.jsonl); official is the final answer's under the benchmark's rule,
official_first the first answer's (scored.jsonl).

The interval is a bootstrap over problems; p is McNemar's exact test (with several samples a
problem the sign test), two-sided. With several keys no p is corrected for their number.
"""

import argparse
from typing import Any

from srpo_jax.data.files import write_json
from srpo_jax.report.accounting import BOOTSTRAP, paired
from tools.lib import cli, eval_folders

KEYS = {  # -> which rows, and their field
    "final_correct": ("rows", "final_correct"),
    "first_correct": ("rows", "first_correct"),
    "official": ("scored", "correct"),
    "official_first": ("scored", "first_correct"),
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__, "python -m tools.compare_evals --base runs/eval_sft --new runs/eval_rl"
    )
    parser.add_argument("--base", required=True, help="folder of an evaluation")
    parser.add_argument("--new", required=True, help="folder of another, on the same problems")
    parser.add_argument(
        "--key", action="append", choices=KEYS,
        help="may be repeated (default: final_correct)",
    )  # fmt: skip
    parser.add_argument(
        "--bootstrap", type=cli.positive, default=BOOTSTRAP, help="resamples (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (%(default)s)")
    parser.add_argument("--output", type=cli.output_file, help="also write the numbers as JSON")
    return parser


def main(args: argparse.Namespace) -> None:
    """Compare, and print one table."""
    sides = [eval_folders.read(folder, summary=False) for folder in (args.base, args.new)]
    found = []
    for key in dict.fromkeys(args.key or ["final_correct"]):
        which, field = KEYS[key]
        base, new = rows = [getattr(side, which) for side in sides]
        for side, own in zip(sides, rows, strict=True):
            if not own:
                raise ValueError(f"--key {key}: {side.folder} has no scored.jsonl")
        modes = [{row.get("mode") for row in own} for own in rows]
        if which == "scored" and modes[0] != modes[1]:
            shown = [" and ".join(sorted(map(str, mode))) for mode in modes]
            raise ValueError(f"--key {key}: scored by {shown[0]} in base, by {shown[1]} in new")
        result = paired(base, new, field, bootstrap=args.bootstrap, seed=args.seed)
        found.append(result | {"key": key})
    print(table(found))
    if args.output:
        write_json(args.output, found)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: accuracies in percent, differences in points."""
    lines = [
        "| key | problems | base, % | new, % | difference (95 %) | better | worse | p | test |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in found:
        low, mean, high = (100 * r[name] for name in ("low", "difference", "high"))
        cells = [
            r["key"], f"{r['problems']:,}", f"{100 * r['base']:.1f}", f"{100 * r['new']:.1f}",
            f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", str(r["better"]), str(r["worse"]),
            "< 0.0001" if r["p"] < 1e-4 else f"{r['p']:.4f}", r["test"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, make_parser())
