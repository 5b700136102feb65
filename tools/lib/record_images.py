"""The images of a row that names the data it came from."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from srpo_jax.benchmarks.load import load
from srpo_jax.data.fields import Columns
from srpo_jax.data.images import load_image
from srpo_jax.data.records import open_records


def record_images(
    root: str | None, columns: Columns
) -> Callable[[dict[str, Any]], Iterable[Image.Image]]:
    """-> images of a row, from the file that its ``origin`` (file:row) names."""

    @lru_cache(maxsize=8)
    def source(benchmark: str | None, path: str) -> Any:
        if benchmark:
            return load(benchmark, path, image_root=root, counts=())
        return open_records(path, root, require_answer=False, columns=columns)

    def images(row: dict[str, Any]) -> list[Image.Image]:
        path, _, number = row["origin"].rpartition(":")
        if not number.isdigit() or not Path(path).is_file():
            raise ValueError(f"{row['origin']} is not there")
        record = source(row.get("benchmark"), path)[int(number) - 1]
        return [load_image(ref) for ref in record.images]

    return images
