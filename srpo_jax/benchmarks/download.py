"""Benchmarks from the hub, through the ``datasets`` library, as parquet files for ``load``.

The library is optional (``pip install datasets``). Images stay the published bytes: they are not
decoded on the way.
"""

import os
from pathlib import Path
from typing import Any

from srpo_jax.benchmarks.common import Place
from srpo_jax.data.files import whole


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
