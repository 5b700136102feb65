"""Convert Qwen2.5-VL between Hugging Face directories and checkpoints of this project.

import   an HF directory becomes a parameter checkpoint that training takes as config.init_from
export   a checkpoint (of import, or a step or --workdir of training) becomes an HF directory

Both stream: whatever the model's size, the host holds a few blocks of one tensor at a time.
"""

import argparse
import asyncio
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave accelerators alone

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import future

from srpo_jax.data.buckets import AnyPath, located
from srpo_jax.data.files import absolute
from srpo_jax.data.hf_folder import read_json
from srpo_jax.model import hf, peft
from srpo_jax.model.config import ModelConfig, load_config
from srpo_jax.run import checkpoint, console
from srpo_jax.run.adapters import lora_of
from tools.lib import cli

CHUNK_BYTES = 16 << 20  # of a stored chunk; a process that restores a shard reads whole chunks
CHUNKS_AT_ONCE = 4
CACHE_BYTES = 256 << 20  # of decoded chunks while exporting
INDEX_CACHE_BYTES = 64 << 20  # of the key-value store that holds them
DTYPES = ("float32", "bfloat16", "float16")


# --- import ----------------------------------------------------------------------------------


class LeafHandler(ocp.type_handlers.NumpyHandler):
    """Lets Orbax save a leaf that is read in slices, chunk by chunk, as the array that it is."""

    def __init__(self, progress: hf.Progress, total: int):
        super().__init__()
        self._progress, self._done, self._total = progress, 0, total

    async def serialize(
        self,
        values: Sequence[Any],  # HFLeaf
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[Any] | None = None,
    ) -> list[Any]:
        """Start writing all leaves, once Orbax has made the directory."""
        writing = self._write(values, infos)
        return [future.CommitFutureAwaitingContractedSignals(writing, name="hf_leaves")]

    async def _write(
        self, values: Sequence[hf.HFLeaf], infos: Sequence[ocp.type_handlers.ParamInfo]
    ) -> None:
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=bool(info.is_ocdbt_checkpoint),
                global_shape=leaf.shape,
                local_shape=chunk_shape(leaf.shape, leaf.dtype.itemsize),
                dtype=leaf.dtype,
                process_index=0,
            )
            store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
            rest = chunks(leaf)
            while batch := list(itertools.islice(rest, CHUNKS_AT_ONCE)):
                parts = [(index, leaf[index]) for index in batch]
                await asyncio.gather(*(store[index].write(part) for index, part in parts))
                self._done += sum(part.nbytes for _, part in parts)
                self._progress(info.name, self._done, self._total)


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """One layer, and of it a block of at most `CHUNK_BYTES` that is cut along the longest sides."""
    out = [1, *shape[1:]] if len(shape) > 2 else list(shape)
    while math.prod(out) * itemsize > CHUNK_BYTES:
        longest = max(range(len(out)), key=lambda i: out[i])
        out[longest] = -(-out[longest] // 2)
    return tuple(out)


def chunks(leaf: hf.HFLeaf) -> Iterator[tuple[slice, ...]]:
    """The indices of a leaf's chunks, in order."""
    steps = chunk_shape(leaf.shape, leaf.dtype.itemsize)
    sides = [
        [slice(i, min(i + step, size)) for i in range(0, size, step)]
        for size, step in zip(leaf.shape, steps, strict=True)
    ]
    return itertools.product(*sides)


def import_hf(
    hf_dir: AnyPath, out: AnyPath, *, dtype: str | None = None, progress: hf.Progress
) -> None:
    """HF directory -> parameter checkpoint; `srpo_jax.run.checkpoint.load_params` reads it.

    Args:
        hf_dir: HF directory.
        out: checkpoint directory to make.
        dtype: dtype to store; None keeps that of the files.
        progress: called with parameter, bytes done, bytes in all.

    Raises:
        ValueError: the directory does not hold the model of its config.json, or ``out`` exists.
    """
    target = absolute(out)
    if target.exists():
        raise ValueError(f"{target}: exists; give --out a new name, or remove it")
    leaves = hf.open_hf(hf_dir, load_config(hf_dir), dtype=dtype)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (hf.HFLeaf, LeafHandler(progress, total))
    )
    record = {
        "format": checkpoint.FORMAT,
        "config": read_json(located(hf_dir) / "config.json"),
        "processes": 1,
    }
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        meta=ocp.JsonCheckpointHandler(),
    )
    with ocp.Checkpointer(handler) as writer:
        params, meta = ocp.args.PyTreeSave(leaves), ocp.args.JsonSave(record)
        writer.save(target, args=ocp.args.Composite(params=params, meta=meta))


# --- export ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A parameter in a checkpoint; indexing it reads that slice."""

    shape: tuple[int, ...]
    dtype: np.dtype
    store: ts.TensorStore

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.store[index].read().result()


def open_checkpoint(path: AnyPath) -> dict[str, StoredLeaf]:
    """The parameters of a checkpoint, as leaves that read what they are indexed with.

    Raises:
        CheckpointError: no checkpoint there, or one of another format.
    """
    folder = checkpoint.find_params(path)
    checkpoint.read_meta(folder)
    folder = epath.Path(folder / "params")
    handler = ocp.PyTreeCheckpointHandler()
    metadata = handler.metadata(folder)
    handler.close()
    context = ts.Context(
        {
            "cache_pool": {"total_bytes_limit": CACHE_BYTES},
            "cache_pool#ocdbt": {"total_bytes_limit": INDEX_CACHE_BYTES},
        }
    )
    leaves = {}
    for name, leaf in metadata.tree.items():
        info = ocp.type_handlers.ParamInfo(
            name=name, parent_dir=folder, use_zarr3=metadata.use_zarr3, ts_context=context
        )
        spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
        store = ts.open(ts.Spec(spec), open=True, read=True, context=context).result()
        leaves[name] = StoredLeaf(tuple(leaf.shape), np.dtype(leaf.dtype), store)
    return leaves


def export_hf(
    path: AnyPath,
    hf_dir: AnyPath,
    reference: AnyPath,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: hf.Progress | None = None,
) -> None:
    """Checkpoint -> HF directory, with config, tokenizer and processor files of ``reference``.

    Where the run trained an adapter, it is merged into the weights that it was trained on.

    Raises:
        ValueError: checkpoint and reference are not the same model, or ``hf_dir`` is not empty.
    """
    cfg = load_config(reference)
    lora, leaves = lora_of(checkpoint.read_meta(path)), open_checkpoint(path)
    if lora:
        leaves |= open_base(path, reference, cfg)
    hf.save_hf(
        peft.merged_leaves(leaves, dataclasses.replace(cfg, lora=lora)),
        cfg,
        hf_dir,
        reference,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def open_base(path: AnyPath, reference: AnyPath, cfg: ModelConfig) -> dict[str, Any]:
    """The weights that a run trained an adapter on: those of ``reference``, its hf_dir, or of
    another checkpoint or HF directory, which must still be there."""
    base = checkpoint.read_meta(path)["base"]["path"]
    if base and not (located(base) / "config.json").is_file():
        return dict(open_checkpoint(base))
    return dict(hf.open_hf(base or reference, cfg))


def export_adapter(path: AnyPath, out: AnyPath, reference: AnyPath) -> None:
    """The adapter of a checkpoint -> PEFT directory; ValueError where it has none."""
    meta = checkpoint.read_meta(path)
    if not (lora := lora_of(meta)):
        raise ValueError(f"{path}: holds weights and no adapter; leave --adapter out")
    cfg = load_config(reference, lora=lora)
    base = meta["base"]["path"] or os.fspath(reference)
    peft.save_adapter(open_checkpoint(path), cfg, out, base)


# --- command line ----------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    examples = {
        "import": "python -m tools.convert_hf import --hf_dir Qwen2.5-VL-7B-Instruct --out ckpt",
        "export": "python -m tools.convert_hf export --checkpoint runs/grpo --hf_dir trained "
        "--reference Qwen2.5-VL-7B-Instruct",
    }
    out = cli.base_parser(__doc__, "\n  ".join(examples.values()))
    commands = out.add_subparsers(dest="command", required=True)

    def command(name: str, does: str) -> Callable[..., argparse.Action]:
        sub = commands.add_parser(
            name,
            help=does,
            description=does,
            epilog=f"example:\n  {examples[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # Also after the command, where people look for it.
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
        return sub.add_argument

    add = command("import", "HF directory -> checkpoint")
    add("--hf_dir", required=True, help="HF directory with config.json and safetensors")
    add("--out", required=True, help="checkpoint directory to make")
    add("--dtype", choices=DTYPES, help="dtype to store (default: as in the files)")
    add = command("export", "checkpoint -> HF directory")
    add("--checkpoint", required=True, help="of import, a step's directory, or a --workdir")
    add("--hf_dir", required=True, help="HF directory to make")
    add("--reference", required=True, help="HF directory of the model that was trained")
    add("--dtype", choices=DTYPES, help="dtype to write (default: as in the checkpoint)")
    add("--adapter", action="store_true", help="a run's adapter alone, as a PEFT directory")
    add("--max_shard_gb", type=cli.above_zero, default=5.0, help="size of one safetensors file")
    return out


def main(args: argparse.Namespace) -> None:
    """Run one of the conversions."""
    label = "importing" if args.command == "import" else "exporting"
    with console.progress(label, 100, "%") as advance:
        progress = console.percent(advance)
        if args.command == "import":
            import_hf(args.hf_dir, args.out, dtype=args.dtype, progress=progress)
            made = args.out
        elif args.adapter:
            export_adapter(args.checkpoint, args.hf_dir, args.reference)
            made = args.hf_dir
        else:
            export_hf(
                args.checkpoint,
                args.hf_dir,
                args.reference,
                dtype=args.dtype,
                max_shard_bytes=int(args.max_shard_gb * 1e9),
                progress=progress,
            )
            made = args.hf_dir
    print(made)


if __name__ == "__main__":
    cli.run(main, make_parser())
