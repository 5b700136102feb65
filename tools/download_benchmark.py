"""Downloads a benchmark from the Hugging Face hub into a folder for eval.file.

Needs the datasets library (pip install datasets) and a connection; nothing else here does.
"""

import argparse

from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.common import Place
from srpo_jax.benchmarks.download import download
from srpo_jax.benchmarks.load import load
from tools.lib import cli


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__,
        "python -m tools.download_benchmark --benchmark mathvista --out data/mathvista",
    )
    add = parser.add_argument
    add("--benchmark", required=True, choices=sorted(BENCHMARKS))
    splits = "; ".join(f"{name}: {', '.join(b.places)}" for name, b in sorted(BENCHMARKS.items()))
    add("--split", help=f"default: the first ({splits})")
    add("--out", required=True, help="folder to make")
    add("--repo", help="another repository with the same fields, or a local folder")
    return parser


def main(args: argparse.Namespace) -> int:
    """Download, then read it back as an evaluation would."""
    splits = BENCHMARKS[args.benchmark].places
    split = args.split or next(iter(splits))
    if split not in splits:
        raise ValueError(f"--split={split}: {args.benchmark} has {', '.join(splits)}")
    place = splits[split]
    if args.repo:
        place = Place(args.repo, place.split, place.configs)
    files = download(place, args.out)
    rows = load(args.benchmark, args.out, counts=())
    print(f"{len(rows)} problems in {len(files)} files -> {args.out}")
    print(f"--config.eval.benchmark={args.benchmark} --config.eval.file={args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main, make_parser())
