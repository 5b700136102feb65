"""Benchmarks from the hub, through the ``datasets`` library, as parquet files for ``load``.

The library is optional (``pip install datasets``). Images stay the published bytes: they are not
decoded on the way.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from srpo_jax.data.files import whole

MMMU_SUBJECTS = (
    "Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory",
    "Basic_Medical_Science", "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science",
    "Design", "Diagnostics_and_Laboratory_Medicine", "Economics", "Electronics",
    "Energy_and_Power", "Finance", "Geography", "History", "Literature", "Manage", "Marketing",
    "Materials", "Math", "Mechanical_Engineering", "Music", "Pharmacy", "Physics", "Psychology",
    "Public_Health", "Sociology",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a set stands: repository, its configurations (None: the only one), and split."""

    repo: str
    split: str
    configs: tuple[str | None, ...] = (None,)


PLACES: dict[str, dict[str, Place]] = {
    "mathvista": {"testmini": Place("AI4Math/MathVista", "testmini")},
    "mathvision": {
        "test": Place("MathLLMs/MathVision", "test"),
        "testmini": Place("MathLLMs/MathVision", "testmini"),
    },
    "mathverse": {"testmini": Place("AI4Math/MathVerse", "testmini", ("testmini",))},
    "mmmu_pro": {
        "standard_10": Place("MMMU/MMMU_Pro", "test", ("standard (10 options)",)),
        "standard_4": Place("MMMU/MMMU_Pro", "test", ("standard (4 options)",)),
        "vision": Place("MMMU/MMMU_Pro", "test", ("vision",)),
    },
    "mmmu": {"validation": Place("MMMU/MMMU", "validation", MMMU_SUBJECTS)},
    "emma": {
        "test": Place("luckychao/EMMA", "test", ("Chemistry", "Coding", "Math", "Physics")),
        "mini": Place("luckychao/EMMA-mini", "test", ("Chemistry", "Coding", "Math", "Physics")),
    },
    "olympiadbench": {
        "maths": Place("Hothan/OlympiadBench", "train", ("OE_MM_maths_en_COMP",)),
        "physics": Place("Hothan/OlympiadBench", "train", ("OE_MM_physics_en_COMP",)),
    },
    "wemath": {"testmini": Place("We-Math/We-Math", "testmini")},
    "mmk12": {"test": Place("FanqingM/MMK12", "test")},
}


def download(place: Place, folder: str | os.PathLike) -> list[Path]:
    """Write one parquet file for each configuration; all of them or none.

    Args:
        place: of PLACES. A ``repo`` may be a local folder too.
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


def _undecoded(feature, datasets):
    """The feature of an image column, or of a column of lists of images, as bytes; else None."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Image):
        return type(feature)(datasets.Image(decode=False))
    return None


__all__ = ["PLACES", "Place", "download"]
