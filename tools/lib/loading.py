"""What the tools that run a model share: input rows, and a model on the devices of this process."""

import argparse
import dataclasses
import zlib
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from PIL import Image

from srpo_jax.data.batching import Encoded, collate
from srpo_jax.data.buckets import AnyPath, located
from srpo_jax.data.encoders import conversation_images
from srpo_jax.data.errors import RecordError
from srpo_jax.data.files import numbered_jsonl
from srpo_jax.data.hf_folder import read_json
from srpo_jax.data.images import load_image
from srpo_jax.data.processing import Processor
from srpo_jax.learn.state import relayout
from srpo_jax.model import hf
from srpo_jax.model.config import ModelConfig, load_config
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sharding import make_mesh, num_data_shards, param_specs, to_global
from srpo_jax.run.console import percent, progress
from srpo_jax.structs import Batch, Params
from tools.lib import cli

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on its mesh, with its processor."""

    cfg: ModelConfig
    params: Params  # layout "sample"; to sample with only the tower's
    mesh: Mesh
    processor: Processor
    decoder: Params = dataclasses.field(default_factory=dict)  # to sample with, of each layer

    @property
    def shards(self) -> int:
        """Data shards of the mesh; batches hold one row for each."""
        return num_data_shards(self.mesh)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, which files, how many rows at a time."""
    add = parser.add_argument
    add("--hf_dir", required=True, help="Hugging Face Qwen2.5-VL directory")
    add("--input", required=True, help="JSON Lines to read")
    add(
        "--output",
        type=cli.output_file,
        required=True,
        help="JSON Lines to write; a stopped run is continued",
    )
    add("--data_root", help="folder of the images (default: that of --input)")
    add("--batch_size", type=cli.positive, default=8, help="rows at a time (%(default)s)")
    add("--dtype", choices=DTYPES, help="default: float32 on CPU, bfloat16 elsewhere")
    add("--tensor", type=cli.positive, default=1, help="devices that share one copy of the weights")
    add("--min_pixels", type=cli.positive, help="default: --hf_dir's preprocessor_config.json")
    add("--max_pixels", type=cli.positive, help="default: --hf_dir's preprocessor_config.json")


def load_model(args: argparse.Namespace, *, for_sampling: bool = False) -> Model:
    """The model that the arguments of ``add_arguments`` name, on all devices of this process."""
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if dtype == "float32":  # accelerators multiply in a shorter format unless told otherwise
        jax.config.update("jax_default_matmul_precision", "float32")
    cfg = load_config(args.hf_dir, dtype=dtype, param_dtype=dtype)
    low, high = args.min_pixels, args.max_pixels
    if low is None or high is None:
        found = pixel_limits(args.hf_dir)
        low, high = low or found[0], high or found[1]
    processor = Processor(args.hf_dir, min_pixels=low, max_pixels=high)
    if processor.vocab_size > cfg.text.vocab_size:
        raise ValueError(
            f"{args.hf_dir}: the tokenizer has {processor.vocab_size} tokens, config.json has a "
            f"vocab_size of {cfg.text.vocab_size}: they are not of the same model"
        )
    mesh = make_mesh(tensor=args.tensor)
    shardings = param_specs(abstract_params(cfg), mesh, "sample")
    with progress("loading weights", 100, "%") as advance:
        how = {"shardings": shardings, "dtype": dtype, "progress": percent(advance)}
        params = hf.load_params(args.hf_dir, cfg, **how)
    decoder = relayout(params, mesh, dtype=dtype, take=True) if for_sampling else {}
    return Model(cfg, params, mesh, processor, decoder)


def pixel_limits(hf_dir: AnyPath) -> tuple[int, int]:
    """(min_pixels, max_pixels) of a directory's preprocessor_config.json, in either of its forms.

    Raises ValueError, naming the file and the arguments to give instead, where it has none.
    """
    path = located(hf_dir) / "preprocessor_config.json"
    found = read_json(path)
    size = found.get("size") or {}
    low = found.get("min_pixels", size.get("shortest_edge"))
    high = found.get("max_pixels", size.get("longest_edge"))
    if not (isinstance(low, int) and isinstance(high, int)):
        raise ValueError(f"{path}: no pixel limits; give --min_pixels and --max_pixels")
    return low, high


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of an input file."""

    fields: dict[str, Any]
    id: str  # as text; the line's number where it has none
    origin: str  # "file:line" for messages

    @property
    def output_id(self) -> Any:
        """The id as the input has it, or the line's number."""
        return self.fields["id"] if "id" in self.fields else int(self.id)


def read_rows(path: str) -> list[Row]:
    """The lines of a JSON Lines file.

    Raises ValueError for an empty file and, naming both lines, where two have the same id.
    """
    seen: dict[str, Row] = {}
    for number, fields in numbered_jsonl(path):
        row = Row(fields, str(fields.get("id", number)), f"{path}:{number}")
        if row.id in seen:
            raise ValueError(f"{row.origin}: the id {row.id!r} is that of {seen[row.id].origin}")
        seen[row.id] = row
    if not seen:
        raise ValueError(f"{path}: no rows")
    return list(seen.values())


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the rows of a resumed run must have in common: arguments and the input's contents."""
    no_matter = ("debug", "output", "batch_size", "tensor")
    kept = {key: value for key, value in vars(args).items() if key not in no_matter}
    return kept | {"input_crc": zlib.crc32(Path(args.input).read_bytes())}


def data_root(args: argparse.Namespace) -> str:
    """The folder that image paths are relative to and must stay in."""
    return args.data_root or str(Path(args.input).resolve().parent)


def load_conversation(
    row: Row, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """The messages of a row, and their decoded images in the order of the text."""
    messages = row.fields.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RecordError(row.origin, "messages is not a list of objects", "see --help")
    refs = conversation_images(messages, data_root(args), row.origin)
    return messages, [load_image(ref) for ref in refs]


def bucket(size: int, unit: int = 64) -> int:
    """``size`` rounded up to unit * {1, 2, 3, 4, 6, 8, 12, 16, ...}: few shapes, few programs."""
    units, power = -(-max(size, 1) // unit), 1
    while power < units:
        if power * 3 // 2 >= units:
            return power * 3 // 2 * unit
        power *= 2
    return power * unit


def make_batch(model: Model, samples: list[Encoded], size: int) -> Batch[jax.Array]:
    """Encoded samples -> a batch of ``size`` sequences (fillers last) on the mesh, in buckets."""
    per_row = -(-size // model.shards)
    rows = [samples[i : i + per_row] for i in range(0, len(samples), per_row)]
    slots = max(sum(sample.num_slots for sample in row) for row in rows)
    geometry = model.processor.geometry
    batch = collate(
        samples,
        rows=model.shards,
        tokens=bucket(max(sample.num_tokens for sample in samples)),
        patches=bucket(slots, geometry.window_slots) if slots else 0,
        per_row=per_row,
        pad_id=model.processor.pad_id,
        geometry=geometry,
    )
    return to_global(batch, model.mesh)
