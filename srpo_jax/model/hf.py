"""Hugging Face weights in and out, through the one table of `srpo_jax.model.hf_table`.

Reading and writing go piece by piece. `open_hf` gives leaves that read only the slice they are
indexed with, so that a process touches the shards it holds and a conversion never holds a model;
`save_hf` takes anything that can be indexed the same way and writes it block by block.
"""

import contextlib
import dataclasses
import functools
import glob
import math
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from srpo_jax.data.buckets import AnyPath, holds_something, located, on_bucket
from srpo_jax.data.files import send, whole
from srpo_jax.model import hf_write
from srpo_jax.model.config import ModelConfig, load_config
from srpo_jax.model.hf_files import Stored, listed, scan
from srpo_jax.model.hf_table import (
    BLOCK_BYTES,
    DTYPES,
    TABLE,
    HFError,
    Index,
    Progress,
    Row,
    assign,
    hf_tensors,
)
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.structs import Params

BEGUN = "EXPORT_IS_NOT_COMPLETE"  # beside what an export sent to a bucket so far
READERS = 8  # layers of a parameter that are read at a time


@dataclasses.dataclass(frozen=True)
class HFLeaf:
    """One parameter of ours inside HF files; indexing it reads that slice as a numpy array."""

    row: Row
    shape: tuple[int, ...]
    dtype: np.dtype
    layers: tuple[Stored, ...]  # one for each layer, or the only one
    told: Callable[[int], None] = lambda nbytes: None  # called with the bytes of each layer read

    def __getitem__(self, index: Index) -> np.ndarray:
        ranges = _ranges(self.shape, index)
        out = np.empty([len(r) for r in ranges], self.dtype)
        if not self.row.stacked:
            assign(out, _read_layer(self.row, self.shape, self.layers[0], ranges))
            self.told(out.nbytes)
            return out

        def read(i: int) -> None:
            stored = self.layers[ranges[0][i]]
            assign(out[i], _read_layer(self.row, self.shape, stored, ranges[1:]))
            self.told(out[i].nbytes)

        # Threads: numpy and safetensors let go of the interpreter while they copy.
        with ThreadPoolExecutor(max(1, min(READERS, len(out)))) as pool:
            list(pool.map(read, range(len(out))))
        return out


def _ranges(shape: tuple[int, ...], index: Index) -> list[range]:
    """What an index takes of each axis."""
    return [range(n)[i] for n, i in zip(shape, index, strict=True)]


def _read_layer(
    row: Row, shape: tuple[int, ...], stored: Stored, ranges: list[range]
) -> np.ndarray:
    """The slice ``ranges`` (ours, without L) of one HF tensor, in the order of our axes."""
    sizes, wanted = row.sizes(shape), dict(zip(row.ours, ranges, strict=True))
    if row.groups[-1] == "X":
        rows = wanted["D"]
        block = stored.read((slice(rows.start, rows.stop),)).reshape(len(rows), -1)
        return block[:, wanted["X"].start : wanted["X"].stop].T
    runs = [_runs([sizes[a] for a in g], [wanted[a] for a in g]) for g in row.groups]
    block = _read_runs(stored.read, runs, ())
    order = "".join(row.groups)
    block = block.reshape([len(wanted[axis]) for axis in order])
    return block.transpose([order.index(axis) for axis in row.ours])


def _runs(sizes: list[int], ranges: list[range]) -> list[slice]:
    """The contiguous stretches of a product dimension that hold the product of ``ranges``."""
    inner = math.prod(sizes[1:])
    if all(len(r) == n for n, r in zip(sizes[1:], ranges[1:], strict=True)):
        return [slice(ranges[0].start * inner, ranges[0].stop * inner)]
    parts = _runs(sizes[1:], ranges[1:])
    return [slice(o * inner + p.start, o * inner + p.stop) for o in ranges[0] for p in parts]


def _read_runs(
    read: Callable[[Index], np.ndarray], runs: list[list[slice]], at: Index
) -> np.ndarray:
    if not runs:
        return read(at)
    parts = [_read_runs(read, runs[1:], (*at, run)) for run in runs[0]]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=len(at))


def _check_names(stored: Mapping[str, Stored], cfg: ModelConfig, one_dtype: bool) -> list[str]:
    """One line for each tensor (released name) that is wrong, missing or superfluous.

    ``one_dtype``: also for the layers of a parameter whose dtypes differ.
    """
    wrong, first = [], {}
    wanted = hf_tensors(cfg)
    for tensor in wanted:
        have = stored.get(tensor.name)
        if have is None:
            wrong.append(f"{tensor.name}: missing, wanted {list(tensor.shape)}")
            continue
        if have.shape != tensor.shape:
            wrong.append(f"{tensor.name}: shape {list(have.shape)}, wanted {list(tensor.shape)}")
        if have.dtype not in DTYPES:
            wrong.append(f"{tensor.name}: dtype {have.dtype}, wanted one of {', '.join(DTYPES)}")
        kind = first.setdefault(tensor.row.path, have.dtype)
        if one_dtype and have.dtype != kind and have.dtype in DTYPES:
            wrong.append(f"{tensor.name}: dtype {have.dtype}, layer 0 has {kind}")
    for name in sorted(stored.keys() - {tensor.name for tensor in wanted}):
        wrong.append(f"{name}: superfluous, shape {list(stored[name].shape)}")
    return wrong


def _untie(stored: dict[str, Stored], cfg: ModelConfig) -> list[str]:
    """Drop the copy of a tied embedding, as transformers does; returns what is wrong with it."""
    if not cfg.tie_word_embeddings or "lm_head.weight" not in stored:
        return []
    head = stored.pop("lm_head.weight")
    embed = stored.setdefault("model.embed_tokens.weight", head)
    if embed.shape == head.shape and len(head.shape) == 2:
        step = max(1, BLOCK_BYTES // (4 * max(1, head.shape[1])))
        blocks = (slice(i, min(i + step, head.shape[0])) for i in range(0, head.shape[0], step))
        if all(np.array_equal(embed.read((b,)), head.read((b,))) for b in blocks):
            return []
    return [
        "lm_head.weight: differs from the embedding although tie_word_embeddings is true; "
        "set it to false in config.json (and its text_config) if the head has weights of its own"
    ]


def open_hf(hf_dir: AnyPath, cfg: ModelConfig, *, dtype: Any = None) -> dict[str, HFLeaf]:
    """The parameters of an HF directory, as leaves that read what they are indexed with.

    Args:
        hf_dir: directory with model.safetensors, or with shards and their index.
        cfg: the model that must stand there.
        dtype: dtype to read into; None keeps the stored one.

    Raises:
        HFError: one message with the missing, superfluous, and wrongly shaped or typed tensors.
    """
    hf_dir = located(hf_dir)
    if not hf_dir.is_dir():
        raise HFError(f"{hf_dir}: no such directory")
    stored, wrong = scan(hf_dir)
    # Older files carry this buffer; transformers ignores it as well.
    stored = {k: v for k, v in stored.items() if not k.endswith("rotary_emb.inv_freq")}
    wrong += _untie(stored, cfg)
    wrong += _check_names(stored, cfg, one_dtype=dtype is None)
    if wrong:
        raise HFError(listed(f"{hf_dir} does not hold this model", wrong))
    parts: dict[str, list[Stored]] = {}
    for tensor in hf_tensors(cfg):
        parts.setdefault(tensor.row.path, []).append(stored[tensor.name])
    rows = {row.path: row for row in TABLE}
    return {
        path: HFLeaf(
            rows[path],
            tuple(leaf.shape),
            np.dtype(DTYPES[parts[path][0].dtype] if dtype is None else dtype),
            tuple(parts[path]),
        )
        for path, leaf in abstract_params(cfg).items()
    }


def load_params(
    hf_dir: AnyPath,
    cfg: ModelConfig,
    *,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    dtype: Any = None,
    progress: Progress | None = None,
) -> Params:
    """Read an HF directory into device arrays; each process reads only the slices it holds.

    Args:
        hf_dir: directory with config.json beside safetensors in the released or the nested layout.
        cfg: the model, see `srpo_jax.model.config.load_config`.
        shardings: parameter path -> sharding (`srpo_jax.model.sharding.param_specs`); None puts
            everything on the default device.
        dtype: dtype of the arrays, cast slice by slice; None keeps the stored one.
        progress: called after each layer of a parameter, of what this process reads.

    Raises:
        HFError: one message with every fault, see `open_hf`.
    """
    params, leaves = {}, open_hf(hf_dir, cfg, dtype=dtype)
    if progress:
        leaves = _telling(leaves, shardings or {}, progress)
    for path, leaf in leaves.items():
        if shardings is None:
            # A copy by XLA: a buffer that numpy owns could not be donated.
            params[path] = jnp.array(leaf[(slice(None),) * len(leaf.shape)], copy=True)
        else:
            params[path] = _place(leaf, shardings[path])
    return params


def _telling(
    leaves: Mapping[str, HFLeaf],
    shardings: Mapping[str, jax.sharding.Sharding],
    progress: Progress,
) -> dict[str, HFLeaf]:
    """The leaves, which tell ``progress`` what of this process's part is read."""
    done, lock = 0, threading.Lock()
    whole = {path: {tuple((0, n) for n in leaf.shape)} for path, leaf in leaves.items()}
    held = whole | {path: _held(leaves[path], sharding) for path, sharding in shardings.items()}
    total = sum(
        math.prod(b - a for a, b in part) * leaves[path].dtype.itemsize
        for path, parts in held.items()
        for part in parts
    )

    def told(path: str, nbytes: int) -> None:
        nonlocal done
        with lock:  # layers are read by several threads
            done = min(done + nbytes, total)
            progress(path, done, total)

    return {
        path: dataclasses.replace(leaf, told=functools.partial(told, path))
        for path, leaf in leaves.items()
    }


def _held(leaf: HFLeaf, sharding: jax.sharding.Sharding) -> set[tuple[tuple[int, int], ...]]:
    """Begin and end on each axis of every slice that a device of this process holds."""
    return {
        tuple((r.start, r.stop) for r in _ranges(leaf.shape, index))
        for index in sharding.addressable_devices_indices_map(leaf.shape).values()
        if index is not None
    }


def _place(leaf: HFLeaf, sharding: jax.sharding.Sharding) -> jax.Array:
    """One sharded parameter; what the devices of this process hold is read once."""
    slices = _held(leaf, sharding)
    ends = [
        (min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*slices, strict=True)
    ]
    # They are one block, as meshes are laid out; where they are not, each is read for itself.
    sizes = [math.prod(b - a for a, b in one) for one in (ends, *slices)]
    block = leaf[tuple(slice(a, b) for a, b in ends)] if sizes[0] == sum(sizes[1:]) else None

    def slice_of(index: Index) -> np.ndarray:
        if block is None:
            return leaf[index]
        wanted = zip(_ranges(leaf.shape, index), ends, strict=True)
        return block[tuple(slice(r.start - a, r.stop - a) for r, (a, _) in wanted)]

    # jax's type lets the index be None, which it is for devices of other processes only.
    return jax.make_array_from_callback(
        leaf.shape,
        sharding,
        slice_of,  # pyright: ignore[reportArgumentType]
    )


# --- writing ---------------------------------------------------------------------------------


def save_hf(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    out_dir: AnyPath,
    reference_dir: AnyPath,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
    agree: Callable[[int], int] | None = None,
) -> None:  # eight: one model, where it goes, and four switches that are each off by default
    """Write a directory that transformers and vLLM load, in the released layout.

    Collective: with several processes all call it, and the first one writes. At no time is more
    than one block of one tensor on the host. A temporary directory is renamed when it is complete;
    to a bucket go files one by one (and none lies on the disk longer), config.json as the last.

    Args:
        params: path -> jax array (sharded or not), numpy array, or anything with ``shape``,
            ``dtype`` and slicing to numpy, as `open_hf` gives.
        out_dir: directory to make; may exist when it is empty.
        reference_dir: an HF directory of the same model, whose config, generation_config,
            tokenizer and processor files are copied.
        dtype: dtype to write; None keeps that of each parameter.
        max_shard_bytes: size at which a new safetensors file is begun.
        progress: called after each tensor.
        agree: maximum of an integer over all processes; needed where there are several.

    Raises:
        HFError: parameters, reference and ``cfg`` are not the same model, or out_dir is not empty.
    """
    reference_dir = located(reference_dir)
    _check_params(params, cfg, reference_dir)
    dtypes = {k: np.dtype(p.dtype if dtype is None else dtype) for k, p in params.items()}
    odd = sorted({str(d) for d in dtypes.values()} - {str(d) for d in DTYPES.values()})
    if odd:
        raise HFError(f"cannot write dtype {', '.join(odd)}: give one of {', '.join(DTYPES)}")
    files = hf_write.plan(hf_tensors(cfg), dtypes, max_shard_bytes)
    with new_directory(out_dir, agree) as partial:
        complete = functools.partial(_move, located(out_dir)) if on_bucket(out_dir) else None
        hf_write.write_files(files, params, dtypes, partial, progress, complete)
        if partial:
            hf_write.copy_reference(reference_dir, partial, set(dtypes.values()))


@contextlib.contextmanager
def new_directory(out_dir: AnyPath, agree: Callable[[int], int] | None) -> Iterator[Path | None]:
    """Where the first process writes what becomes ``out_dir``; None in all others (collective)."""
    if agree is None:
        if jax.process_count() > 1:
            raise ValueError("an export on several processes needs agree")
        agree = int
    remote, writes = on_bucket(out_dir), jax.process_index() == 0
    target = located(out_dir if remote else Path(out_dir).resolve())
    new_folder = _new_objects if remote else _new_folder
    with contextlib.ExitStack() as stack:
        yield _begin(lambda: stack.enter_context(new_folder(target)), writes, agree)
    agree(0)  # nobody goes on before all is written


@contextlib.contextmanager
def _new_folder(out_dir: epath.Path) -> Iterator[Path]:
    """The temporary directory that becomes ``out_dir``; HFError where there is something."""
    _refuse_other(out_dir)
    for left in out_dir.parent.glob(f".{glob.escape(out_dir.name)}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)  # a killed export leaves gigabytes
    with whole(out_dir) as partial:
        partial.mkdir()
        yield partial


@contextlib.contextmanager
def _new_objects(out_dir: epath.Path) -> Iterator[Path]:
    """A temporary directory whose files go to ``out_dir`` on a bucket; HFError as above.

    ``BEGUN`` lies there meanwhile. What a killed export left is removed by the next one.
    """
    begun = out_dir / BEGUN
    if begun.exists():
        out_dir.rmtree()
    _refuse_other(out_dir)
    begun.write_text("An export to this folder is not complete.\n")
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            for file in sorted(Path(folder).iterdir(), key=lambda f: f.name == "config.json"):
                _move(out_dir, file)
        begun.unlink()
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong before is told
            out_dir.rmtree()
        raise


def _refuse_other(out_dir: epath.Path) -> None:
    if holds_something(out_dir):
        raise HFError(f"{out_dir}: exists and is not an empty directory; choose another one")


def _move(out_dir: epath.Path, file: Path) -> None:
    """Send a complete file to a bucket: none of them stays on the disk until the last is there."""
    send(file, out_dir / file.name)
    file.unlink()


def _begin(make: Callable[[], Path], writes: bool, agree: Callable[[int], int]) -> Path | None:
    """What ``make`` returns where this process writes; if it fails, no process waits for it."""
    made = error = None
    try:
        made = make() if writes else None
    except Exception as caught:
        error = caught
    if agree(int(error is not None)) and error is None:
        raise HFError("the process that writes could not begin; its error tells why")
    if error is not None:
        raise error
    return made


def _check_params(params: Mapping[str, Any], cfg: ModelConfig, reference_dir: epath.Path) -> None:
    """One error for every difference between the parameters, ``cfg`` and the reference."""
    described = abstract_params(load_config(reference_dir))
    wanted, ours, theirs = (
        {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        for leaves in (abstract_params(cfg), params, described)
    )
    wrong = []
    for found, what in ((ours, "the parameters have"), (theirs, f"{reference_dir} has")):
        for path in sorted(wanted.keys() | found.keys()):
            have, want = found.get(path, "no such parameter"), wanted.get(path, "no such parameter")
            if have != want:
                wrong.append(f"{path}: {what} {have}, the model {want}")
    if wrong:
        raise HFError(listed("cannot export: not one and the same model", wrong))
