"""Report of a training run: one HTML page that opens from disk.

Curves of every metric, laid over those of other runs (--compare).
"""

import argparse

from srpo_jax.data.files import absolute, write_text
from srpo_jax.report import run_page
from tools.lib import cli


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(__doc__, "python -m tools.report --workdir runs/rl --compare runs/rl2")
    add = parser.add_argument
    add("--workdir", required=True, help="folder of a training run")
    add("--compare", nargs="+", default=[], metavar="DIR", help="runs to lay over it")
    add("--out", type=cli.output_file, help="the page (default: report.html in --workdir)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the page."""
    out = args.out or absolute(args.workdir) / "report.html"
    runs = [run_page.read(folder) for folder in (args.workdir, *args.compare)]
    html = run_page.page(runs)
    write_text(out, html)
    print(f"{len(html) / 2**20:.1f} MiB: {out}")


if __name__ == "__main__":
    cli.run(main, make_parser())
