"""Where the tensors of a Hugging Face directory stand: safetensors files, on a disk or a bucket."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from srpo_jax.data.buckets import Ranges, on_bucket
from srpo_jax.data.hf_folder import is_lfs_pointer, read_json
from srpo_jax.model.hf_table import BLOCK_BYTES, DTYPES, HFError, Index
from srpo_jax.model.hf_write import INDEX_FILE

SHOWN = 6  # faults that a message tells
HEADER_BYTES = 100_000_000  # at most, by the format
# What a damaged header comes to: no JSON, JSON of another kind or depth, missing or odd values.
_UNREADABLE = (
    *(SafetensorError, OSError, ValueError, LookupError),
    *(TypeError, AttributeError, RecursionError),
)
REQUESTS = 8  # for one tensor on a bucket, at a time


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor stands: the file, its name there, its shape and its safetensors dtype."""

    file: epath.Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    ranges: Ranges | None = None  # on a bucket: the open file, and where the tensor begins
    start: int = 0

    def read(self, index: Index) -> np.ndarray:
        """A slice; from a bucket come whole rows of the first axis, those that are needed.

        A local file is closed again, so that what was mapped does not stay resident.
        """
        ranges = self.ranges
        if ranges is None:
            with _naming(self.file), safe_open(self.file, framework="np") as opened:
                return opened.get_slice(self.key)[index]
        rows = range(self.shape[0])[index[0]] if index else range(1)
        dtype, sizes = DTYPES[self.dtype], self.shape[1:]
        each = math.prod(sizes) * dtype.itemsize
        out = np.empty((len(rows), *sizes), dtype)
        data, first = out.reshape(-1).view(np.uint8), self.start + rows.start * each

        def fetch(at: int) -> None:
            part = ranges.at(first + at, min(BLOCK_BYTES, data.size - at))
            data[at : at + len(part)] = np.frombuffer(part, np.uint8)

        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(fetch, range(0, data.size, BLOCK_BYTES)))
        return out[:, *index[1:]] if index else out.reshape(self.shape)


@contextlib.contextmanager
def _naming(file: epath.Path) -> Iterator[None]:
    """HFError, with the remedy, for a file that is missing or no safetensors."""
    try:
        yield
    except _UNREADABLE as error:
        reason = f"is not readable as safetensors ({error}); download it again"
        if not file.exists():
            reason = "is missing; download it again"
        elif is_lfs_pointer(file):
            reason = "is a Git LFS pointer, not the file; run `git lfs pull` there"
        raise HFError(f"{file}: {reason}") from error


def tensors(file: epath.Path) -> list[Stored]:
    """All tensors of a file."""
    with _naming(file):
        if on_bucket(file):
            return _in_header(file)
        with safe_open(file, framework="np") as opened:
            parts = {key: opened.get_slice(key) for key in opened.keys()}
            return [
                Stored(file, key, tuple(part.get_shape()), part.get_dtype())
                for key, part in parts.items()
            ]


def _in_header(file: epath.Path) -> list[Stored]:
    """All tensors that a file on a bucket names at its start: length, then JSON, then the data."""
    ranges = Ranges(file)
    length = int.from_bytes(ranges.at(0, 8), "little")
    if not 0 < length <= min(HEADER_BYTES, ranges.size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {ranges.size}")
    found = []
    for key, told in json.loads(ranges.at(8, length)).items():
        if key == "__metadata__":
            continue
        shape, dtype, (start, end) = tuple(told["shape"]), told["dtype"], told["data_offsets"]
        size = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - start
        if min(start, *shape) < 0 or end - start != size or 8 + length + end > ranges.size:
            raise ValueError(f"{key} does not lie inside of the file")
        found.append(Stored(file, key, shape, dtype, ranges, 8 + length + start))
    return found


def released_name(key: str) -> str:
    """The name in the released layout of a tensor in either layout."""
    return re.sub(r"^model\.(?=visual\.)|(?<=^model\.)language_model\.", "", key)


def _list_files(hf_dir: epath.Path) -> tuple[list[epath.Path], dict[str, str]]:
    """The safetensors files of a directory, and what its index says of them (may be empty)."""
    index = hf_dir / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise HFError(f"{index}: has no weight_map; download it again")
        return [hf_dir / name for name in sorted(set(weight_map.values()))], weight_map
    if (hf_dir / "model.safetensors").is_file():
        return [hf_dir / "model.safetensors"], {}
    others = sorted(
        path.name
        for pattern in ("pytorch_model*.bin", "*.safetensors", "*.gguf", "*.incomplete")
        for path in hf_dir.glob(pattern)
    )
    raise HFError(
        f"{hf_dir}: neither model.safetensors nor {INDEX_FILE} is there"
        + (f"; it holds {', '.join(others[:3])}" if others else "")
        + "; give the directory of a Qwen2.5-VL checkpoint in safetensors, or download it again"
    )


def scan(hf_dir: epath.Path) -> tuple[dict[str, Stored], list[str]]:
    """Released name -> where it stands, and what is wrong with the index.

    HFError for files that cannot be read: what they hold is not told as missing besides.
    """
    files, weight_map = _list_files(hf_dir)
    stored: dict[str, Stored] = {}
    unreadable, wrong, seen = [], [], {}
    for path in files:
        try:
            for one in tensors(path):
                seen[one.key], name = path.name, released_name(one.key)
                if name in stored:
                    wrong.append(f"{name}: twice, as {stored[name].key} and as {one.key}")
                stored[name] = one
        except HFError as error:
            unreadable.append(str(error))
    if unreadable:
        raise HFError(listed(f"{hf_dir}: weights cannot be read", unreadable))
    for key, file_name in weight_map.items():
        if key in seen and seen[key] != file_name:
            wrong.append(f"{key}: in {seen[key]}, the index says {file_name}")
    return stored, wrong


def listed(head: str, faults: Sequence[str]) -> str:
    """One line of the first faults and how many there are."""
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return f"{head} ({len(faults)} faults): {'; '.join([*faults[:SHOWN], *more])}"
