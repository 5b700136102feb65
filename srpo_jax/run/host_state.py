"""What a process keeps on the host, as bytes in a checkpoint: JSON values and arrays, no pickle."""

import base64
import io
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from srpo_jax.run import processes

Host = tuple[dict[str, Any], dict[str, np.ndarray]]  # JSON values and arrays of one process


def pack_host(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """JSON values (bytes allowed) and arrays as the bytes of one .npz file."""
    text = json.dumps(values, default=_bytes_to_json)
    parts: dict[str, Any] = {f"array/{n}": np.asarray(value) for n, value in arrays.items()}
    out = io.BytesIO()
    np.savez_compressed(out, json=np.frombuffer(text.encode(), np.uint8), **parts)
    return out.getvalue()


def unpack_host(packed: bytes) -> Host:
    """The inverse of `pack_host`."""
    with np.load(io.BytesIO(packed), allow_pickle=False) as parts:
        values = json.loads(parts["json"].tobytes().decode(), object_hook=_bytes_from_json)
        arrays = {n.removeprefix("array/"): parts[n] for n in parts.files if n != "json"}
    return values, arrays


def _bytes_to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, np.integer | np.floating | np.bool_):
        return value.item()
    raise TypeError(f"host state holds a {type(value).__name__}, which JSON cannot hold")


def _bytes_from_json(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["__bytes__"]) if value.keys() == {"__bytes__"} else value


def gathered_item(own: bytes) -> dict[str, np.ndarray]:
    """Every process's bytes as one padded array, which the first process then writes."""
    parts = processes.gather_bytes(own)
    rows = np.zeros((len(parts), max(map(len, parts))), np.uint8)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = np.frombuffer(part, np.uint8)
    return {"sizes": np.array([len(part) for part in parts]), "bytes": rows}


def parts_of(gathered: dict[str, np.ndarray]) -> list[Host]:
    """What each process had packed into a `gathered_item`, in process order."""
    rows = zip(np.asarray(gathered["bytes"]), gathered["sizes"].tolist(), strict=True)
    return [unpack_host(row[:size].tobytes()) for row, size in rows]


def one_a_place(hosts: Sequence[Host]) -> list[Host]:
    """Of processes that read the same data one, in the order of their places in it."""
    places = {h[0].get("data", {}).get("process_index", i): h for i, h in enumerate(hosts)}
    return [places[place] for place in sorted(places)]


def item_checksum(gathered: dict[str, np.ndarray]) -> int:
    """CRC-32 of every process's bytes."""
    return zlib.crc32(b"".join(np.asarray(gathered[name]).tobytes() for name in sorted(gathered)))
