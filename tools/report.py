"""Report of a training run: one HTML page that opens from disk.

Warnings with what helps, evaluations, curves of every metric laid over those of other runs
(--compare), rollouts group by group, and what differs from the recipe. Images are read from the
data that the rows name by their origin (file:row). --serve shows the page while a run goes on.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer

from srpo_jax.data.fields import Columns
from srpo_jax.data.files import absolute, write_text
from srpo_jax.report import run_page
from srpo_jax.report.rollouts import PICTURES, SAMPLES, Pictures
from srpo_jax.run.recipe import stock
from tools.lib import cli, eval_folders
from tools.lib.record_images import record_images

REFRESH = 60  # seconds between two looks of a browser at a served page


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
    add("--serve", action="store_true", help="serve the page to this machine, and keep it new")
    add("--port", type=cli.positive, default=8300, help="of --serve (%(default)s)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the page, or serve it."""
    if args.serve:
        serve(args)
        return
    out = args.out or absolute(args.workdir) / "report.html"
    html = build(args)
    write_text(out, html)
    print(f"{len(html) / 2**20:.1f} MiB: {out}")


def build(args: argparse.Namespace) -> str:
    """The page, of what the folders hold now."""
    runs = [run_page.read(folder) for folder in (args.workdir, *args.compare)]
    tested = [eval_folders.read(folder) for folder in args.evaluations]
    named = run_page.names([str(absolute(folder)) for folder in args.evaluations])
    return run_page.page(
        runs,
        run_pictures(runs, args.image_root),
        samples=args.rollouts,
        problems=args.images,
        recipe=lambda config: stock(dict(config)),
        evaluations={name: one.summary for name, one in zip(named, tested, strict=True)},
    )


# --- served ------------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> None:
    """The page at 127.0.0.1, until Ctrl-C; a browser asks anew every REFRESH seconds."""
    build(args)  # what is wrong with the folders is said before anything is served
    try:
        server = make_server(functools.partial(current, args), args.port)
    except OSError as error:
        raise RuntimeError(f"--port={args.port}: {error.strerror}; give another one") from error
    with server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


_kept: dict[tuple[int, ...], str] = {}  # the newest page, by the sizes of what it was made of


def current(args: argparse.Namespace) -> str:
    """The page, made anew where a run has got further."""
    files = [absolute(folder) / "metrics.jsonl" for folder in (args.workdir, *args.compare)]
    sizes = tuple(file.stat().length for file in files)
    if sizes not in _kept:
        html = build(args)
        _kept.clear()
        _kept[sizes] = html
    return _kept[sizes]


def make_server(page: Callable[[], str], port: int) -> HTTPServer:
    """Serves nothing but ``page()``, at /, to this machine and under its name only."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A foreign page could else read this one through a name of its own for 127.0.0.1.
            host = self.headers.get("Host", "").partition(":")[0]
            if self.path != "/" or host not in ("127.0.0.1", "localhost"):
                self.send_error(404)
                return
            try:
                html = page().encode("utf-8", "replace")
            except (OSError, ValueError, RuntimeError) as error:
                self.send_error(503, explain=str(error))
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(html)))
            self.send_header("Refresh", str(REFRESH))
            self.end_headers()
            self.wfile.write(html)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a line for each refresh tells nobody anything."""

    return HTTPServer(("127.0.0.1", port), Handler)


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
