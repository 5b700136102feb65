"""Downloads a benchmark from the Hugging Face hub into a folder for eval.file.

One parquet file for each configuration. Images stay the published bytes: they are not decoded on
the way. Needs the datasets library (pip install datasets) and a connection; nothing else here does.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.common import Place
from srpo_jax.benchmarks.load import load
from srpo_jax.data.files import whole
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


def download(place: Place, folder: str | os.PathLike) -> list[Path]:
    """Write one parquet file for each configuration; all of them or none.

    Args:
        place: of a benchmark. A ``repo`` may be a local folder too.
        folder: made here; must not exist.

    Raises:
        ValueError where the library is missing or the folder exists; whatever the library raises
        where the hub cannot be reached or does not have the set.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("downloads need the datasets library: pip install datasets") from None
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists: give another folder, or delete it")
    with whole(folder) as temporary:
        temporary.mkdir()
        for number, config in enumerate(place.configs):
            rows = datasets.load_dataset(place.repo, config, split=place.split)
            for name, feature in rows.features.items():
                if raw := _undecoded(feature, datasets):
                    rows = rows.cast_column(name, raw)
            rows.to_parquet(temporary / f"{number:02d}.parquet")
    return sorted(folder.iterdir())


def _undecoded(feature: Any, datasets: Any) -> Any:
    """The feature of an image column, or of a column of lists of images, as bytes; else None."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Image):
        return type(feature)(datasets.Image(decode=False))
    return None


if __name__ == "__main__":
    cli.run(main, make_parser())
