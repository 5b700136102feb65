"""Writing a Hugging Face directory block by block: safetensors, their index, the files beside."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from srpo_jax.data.buckets import read_bytes
from srpo_jax.data.files import write_json
from srpo_jax.data.hf_folder import added_tokens, end_token_ids, read_json, token_ids
from srpo_jax.model.hf_table import BLOCK_BYTES, DTYPES, Index, Progress, Tensor, assign

INDEX_FILE = "model.safetensors.index.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json, by transformers' version
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
# Copied from the reference beside config.json and generation_config.json.
COPIED_FILES = (
    "tokenizer.json tokenizer_config.json vocab.json merges.txt special_tokens_map.json "
    "added_tokens.json chat_template.json chat_template.jinja preprocessor_config.json "
    "video_preprocessor_config.json processor_config.json LICENSE NOTICE"
).split()


def plan(
    tensors: list[Tensor], dtypes: Mapping[str, np.dtype], max_bytes: int
) -> dict[str, list[Tensor]]:
    """File name -> its tensors, each file below ``max_bytes`` unless one tensor is larger."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor, dtypes)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": s for i, s in enumerate(shards)}


def write_files(
    files: dict[str, list[Tensor]],
    params: Mapping[str, Any],
    dtypes: Mapping[str, np.dtype],
    folder: Path | None,
    progress: Progress | None,
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Write (first process) or only help to gather (``folder`` None) every file.

    ``complete`` is called with each that is written.
    """
    done, total = 0, sum(_nbytes(t, dtypes) for tensors in files.values() for t in tensors)
    for name, tensors in files.items():
        with open(folder / name, "wb") if folder else contextlib.nullcontext() as out:
            if out:
                _write_header(out, tensors, dtypes)
            for tensor in tensors:
                for block in _blocks(params[tensor.row.path], tensor):
                    if out:
                        data = np.empty(block.shape, dtypes[tensor.row.path])
                        assign(data, block)
                        out.write(data.reshape(-1).view(np.uint8).data)
                done += _nbytes(tensor, dtypes)
                if progress:
                    progress(tensor.name, done, total)
        if folder and complete:
            complete(folder / name)
    if folder and len(files) > 1:
        weight_map = {t.name: name for name, tensors in files.items() for t in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _nbytes(tensor: Tensor, dtypes: Mapping[str, np.dtype]) -> int:
    return math.prod(tensor.shape) * dtypes[tensor.row.path].itemsize


def _write_header(out: BinaryIO, tensors: list[Tensor], dtypes: Mapping[str, np.dtype]) -> None:
    """The head of a safetensors file: length, then JSON padded to eight bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + _nbytes(tensor, dtypes)
        header[tensor.name] = {
            "dtype": TAGS[dtypes[tensor.row.path]],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


def _blocks(leaf: Any, tensor: Tensor) -> Iterator[np.ndarray]:
    """One HF tensor in blocks of its leading dimension, each as HF lays it out."""
    row, sizes = tensor.row, tensor.row.sizes(leaf.shape)
    order, lead = "".join(row.groups), row.groups[0][0]
    rest = math.prod(sizes.values()) // sizes[lead] * np.dtype(leaf.dtype).itemsize
    step = max(1, BLOCK_BYTES // rest)
    read = host_reader(leaf)
    for start in range(0, sizes[lead], step):
        stop = min(start + step, sizes[lead])
        index = [slice(start, stop) if a == lead else slice(0, sizes[a]) for a in row.ours]
        if row.stacked:
            index.insert(0, slice(tensor.layer, tensor.layer + 1))
        block = read(tuple(index))
        block = block[0] if row.stacked else block
        yield block.transpose([row.ours.index(axis) for axis in order])


def host_reader(leaf: Any) -> Callable[[Index], np.ndarray]:
    """How to bring a slice of a parameter to the host; collective for arrays across processes."""
    if not isinstance(leaf, jax.Array):
        return leaf.__getitem__
    if leaf.is_fully_addressable and [d.platform for d in leaf.devices()] == ["cpu"]:
        return np.asarray(leaf).__getitem__

    def read(index: Index) -> np.ndarray:
        starts = np.array([i.start for i in index], np.int32)
        part = _slicer(leaf.sharding)(leaf, starts, tuple(i.stop - i.start for i in index))
        return np.asarray(part.addressable_data(0))

    return read


@functools.lru_cache(maxsize=64)
def _slicer(sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    """Slice of an array that lies as ``sharding`` says, replicated."""
    whole = None
    if isinstance(sharding, NamedSharding):
        whole = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(
        lambda x, starts, sizes: jax.lax.dynamic_slice(x, starts, sizes),
        static_argnums=2,
        out_shardings=whole,
    )


# --- the files beside the weights ------------------------------------------------------------


def copy_reference(reference_dir: epath.Path, out_dir: Path, dtypes: set[np.dtype]) -> None:
    """Copy what belongs to a checkpoint beside its weights, with dtype and EOS ids set right."""
    for name in COPIED_FILES:
        if (reference_dir / name).is_file():
            (out_dir / name).write_bytes(read_bytes(reference_dir / name))
    config_text = read_bytes(reference_dir / "config.json").decode()
    config = json.loads(config_text)
    written = _with_dtype(config, dtypes.pop().name) if len(dtypes) == 1 else config
    if written != config:
        config_text = json.dumps(written, indent=2) + "\n"
    (out_dir / "config.json").write_text(config_text)
    generation = reference_dir / "generation_config.json"
    values = read_json(generation)
    eos = end_token_ids(reference_dir, added_tokens(reference_dir))
    if set(eos) != set(token_ids(generation, "eos_token_id")):
        values = {"pad_token_id": eos[-1], **values, "eos_token_id": list(eos)}
        write_json(out_dir / generation.name, values)
    elif values:
        (out_dir / generation.name).write_bytes(read_bytes(generation))


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The dtype wherever config.json names one, but at the top in any case."""
    out = dict(config)
    for name in ("text_config", "vision_config"):
        if isinstance(out.get(name), dict):
            out[name] = out[name] | {key: dtype for key in _DTYPE_KEYS if key in out[name]}
    named = [key for key in _DTYPE_KEYS if key in out] or ["torch_dtype"]
    return out | dict.fromkeys(named, dtype)
