"""Report of evaluations: tables beside the paper's numbers, and a page of items.

Reads folders of srpo_jax.evaluate and writes report.md, report.json and items.html to --out. The
page's images are read from the data that the rows name by their origin (file:row); where that file
is gone, items stand without images.
"""

import argparse
from pathlib import Path
from typing import Any

from srpo_jax.data.fields import Columns
from srpo_jax.data.files import write_json, write_text
from srpo_jax.report import accounting, eval_page, table
from srpo_jax.report.verdict import of_rates
from tools.lib import cli, eval_folders
from tools.lib.eval_folders import Evaluation
from tools.lib.record_images import record_images


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__, "python -m tools.eval_report --workdir runs/eval_mathvista --out report"
    )
    parser.add_argument(
        "--workdir", required=True, action="append", help="folder of an evaluation; may be repeated"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--items", type=int, default=eval_page.LIMIT, help="on the page (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of their draw (%(default)s)")
    parser.add_argument(
        "--image_root", help="folder that image paths are relative to (default: the data file's)"
    )
    cli.add_columns(parser)
    parser.add_argument("--no_images", action="store_true", help="leave the images out")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the report."""
    if args.items < 0:
        raise ValueError(f"--items must not be negative, is {args.items}")
    found = [eval_folders.read(folder) for folder in dict.fromkeys(args.workdir)]
    named = dict(zip(names(found), found, strict=True))
    accounts = {name: accounting.accounts(one.shown) for name, one in named.items()}
    summaries = {name: one.summary for name, one in named.items()}
    report = {
        "evaluations": {
            name: {"folder": str(one.folder), "summary": one.summary} | accounts[name]
            for name, one in named.items()
        },
        "notes": table.notes(summaries),
        "paper": table.paper(),
    }
    items = [
        row | ({"evaluation": name} if len(named) > 1 else {})
        for name, one in named.items()
        for row in one.shown
    ]
    images = None if args.no_images else record_images(args.image_root, Columns.parse(args.columns))
    verdicts = {name: of_rates(one, name) for name, one in summaries.items()}
    html = eval_page.page(items, images, verdicts=verdicts, limit=args.items, seed=args.seed)
    out = Path(args.out)
    write_text(out / "report.md", markdown(summaries, accounts))
    write_json(out / "report.json", report)
    write_text(out / "items.html", html)
    print(f"{len(named)} evaluations, {len(items)} items -> {out}")


def names(found: list[Evaluation]) -> list[str]:
    """A name for each: its benchmark or else its folder; both where benchmarks repeat."""
    plain = [(one.summary.get("benchmark") or {}).get("name", one.folder.name) for one in found]
    unique = [
        name if plain.count(name) == 1 else f"{name} ({one.folder.name})"
        for name, one in zip(plain, found, strict=True)
    ]
    return [name if unique.count(name) == 1 else f"{name} {i}" for i, name in enumerate(unique, 1)]


def markdown(summaries: dict[str, Any], accounts: dict[str, Any]) -> str:
    """The report for readers."""
    parts = ["# Evaluation", table.markdown(summaries).rstrip()]
    for name, summary in summaries.items():
        sections = [
            _samples(accounts[name]),
            _stops(accounts[name].get("stop")),
            table.categories(summary),
        ]
        if any(sections):
            parts += [f"## {name}", *filter(None, sections)]
    return "\n\n".join(parts) + "\n"


def _samples(found: dict[str, Any]) -> str:
    if "pass@k" not in found:
        return ""
    lines = ["Several samples, final answer, %:", "", "| k | pass@k | maj@k |", "|---:|---:|---:|"]
    for k, share in found["pass@k"].items():
        lines.append(f"| {k} | {100 * share:.1f} | {100 * found['maj@k'][k]:.1f} |")
    return "\n".join(lines)


def _stops(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    lines = [
        "Stopping after the first answer (confident: where the mean probability of its tokens is "
        f"at least {accounting.CONFIDENT}, fixed beforehand; the other thresholds describe the "
        "trade-off and are not to be chosen from):",
        "",
        "| stop | threshold | stopped, % | accuracy, % | tokens |",
        "|---|---:|---:|---:|---:|",
    ]
    points = [*found["points"].items()]
    points += [(f"quantile {point['quantile']:g}", point) for point in found["curve"]]
    for name, point in points:
        threshold = f"{point['threshold']:.3f}" if "threshold" in point else table.NONE
        cells = [name, threshold, f"{100 * point['stopped']:.1f}"]
        cells += [f"{100 * point['accuracy']:.1f}", f"{point['tokens']:,.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, make_parser())
