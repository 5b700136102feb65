"""Report of a training run: one HTML page that opens from disk.

Warnings with what helps, evaluations, curves of every metric laid over those of other runs
(--compare), rollouts group by group, and what differs from the recipe. Images are read from the
data that the rows name by their origin (file:row).
"""

import argparse
import dataclasses
from collections.abc import Sequence

from srpo_jax.data.fields import Columns
from srpo_jax.data.files import absolute, write_text
from srpo_jax.report import run_page
from srpo_jax.report.rollouts import PICTURES, SAMPLES, Pictures
from srpo_jax.run.recipe import stock
from tools.lib import cli, eval_folders
from tools.lib.record_images import record_images


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(__doc__, "python -m tools.report --workdir runs/rl --compare runs/rl2")
    add = parser.add_argument
    add("--workdir", required=True, help="folder of a training run")
    add("--compare", nargs="+", default=[], metavar="DIR", help="runs to lay over it")
    add("--evaluations", nargs="+", default=[], metavar="DIR", help="of srpo_jax.evaluate")
    add("--out", type=cli.output_file, help="the page (default: report.html in --workdir)")
    add(
        "--rollouts",
        type=cli.count,
        default=SAMPLES,
        metavar="N",
        help="samples on the page, at most, 0: none; of more, every n-th group (%(default)s)",
    )
    add(
        "--images",
        type=cli.count,
        default=PICTURES,
        metavar="N",
        help="problems shown with their images, at most, 0: none (%(default)s)",
    )
    add("--image_root", help="folder that image paths are relative to (default: the data file's)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the page."""
    out = args.out or absolute(args.workdir) / "report.html"
    runs = [run_page.read(folder) for folder in (args.workdir, *args.compare)]
    tested = [eval_folders.read(folder) for folder in args.evaluations]
    named = run_page.names([str(absolute(folder)) for folder in args.evaluations])
    html = run_page.page(
        runs,
        run_pictures(runs, args.image_root),
        samples=args.rollouts,
        problems=args.images,
        recipe=stock,
        evaluations={name: one.summary for name, one in zip(named, tested, strict=True)},
    )
    write_text(out, html)
    print(f"{len(html) / 2**20:.1f} MiB: {out}")


def run_pictures(runs: Sequence[run_page.Run], root: str | None) -> Pictures:
    """The images of rollouts, from the data files that their rows name."""
    known = {one.name for one in dataclasses.fields(Columns)}
    data = [dict(run.config.get("data", {})) for run in runs]
    readers = [
        record_images(
            root or own.get("root") or None,
            Columns(**{k: v for k, v in own.get("columns", {}).items() if k in known}),
        )
        for own in data
    ]
    return lambda run, row: readers[run](row)


if __name__ == "__main__":
    cli.run(main, make_parser())
