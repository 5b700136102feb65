"""From a config to the parts that both training stages and the evaluation are made of.

The three entry points share what stands here: the command line, mesh, processor and model config
(`start`), weights (`load_weights`), data (`open_loader`), and the checks before the first step.
"""

import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from srpo_jax.data.loader import Loader, make_loader
from srpo_jax.data.processing import Processor
from srpo_jax.data.records import Record, open_records
from srpo_jax.learn.optim import OptimConfig
from srpo_jax.model import hf, sharding
from srpo_jax.model.config import ModelConfig, load_config
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sizes import size_config
from srpo_jax.run import checkpoint
from srpo_jax.run.runtime import RunError, agree, init_distributed, use_compilation_cache
from srpo_jax.structs import Batch, Params


@dataclasses.dataclass(frozen=True)
class Parts:
    """What every entry point starts from."""

    mesh: Mesh
    model: ModelConfig
    processor: Processor
    shapes: dict[str, jax.ShapeDtypeStruct]  # of all parameters

    @property
    def shards(self) -> int:
        """Data shards of the mesh."""
        return sharding.num_data_shards(self.mesh)


def start(config: Any) -> Parts:
    """Join the other processes, then mesh, processor and model config.

    Raises:
        RunError: hf_dir is missing, holds a model of another size, or its tokenizer does not fit.
    """
    spread = config.distributed
    init_distributed(spread.enabled, spread.coordinator, spread.num_processes, spread.process_id)
    use_compilation_cache(config.compilation_cache_dir)
    if not config.hf_dir:
        raise RunError(
            "hf_dir is empty: pass --config.hf_dir=DIR, a Hugging Face Qwen2.5-VL directory "
            "(config, tokenizer and image processor are read from it, weights too unless "
            "init_from is set)"
        )
    model = load_config(config.hf_dir, **config.model)
    check_size(config.size, model, config.hf_dir)
    processor = Processor(config.hf_dir, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    if processor.vocab_size > model.text.vocab_size:
        raise RunError(
            f"{config.hf_dir}: the tokenizer has {processor.vocab_size} tokens, config.json has a "
            f"vocab_size of {model.text.vocab_size}: they are not of the same model"
        )
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return Parts(mesh, model, processor, abstract_params(model))


def check_size(size: str, model: ModelConfig, hf_dir: str) -> None:
    """RunError where config argument ``size`` and the model in ``hf_dir`` differ."""
    if size == "tiny":
        return
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        found, wanted = getattr(model.text, key), getattr(size_config(size).text, key)
        if found != wanted:
            raise RunError(
                f"{hf_dir}: {key} is {found}, that of size={size} is {wanted}; give the size of "
                "the model after the config file's colon, or size=tiny for any other model"
            )


def optim_config(section: Any) -> OptimConfig:
    """`OptimConfig` from a config's ``optim`` section, key by key."""
    return OptimConfig(**section)


def load_weights(config: Any, parts: Parts, dtype: str, source: str = "") -> tuple[Params, str]:
    """All parameters in the training layout, from ``source``, init_from or hf_dir.

    Returns:
        the parameters, and where they came from: a checkpoint's own directory even where a run's
        --workdir was named, so that a restart finds the same weights while that run goes on.
    """
    shardings = sharding.param_specs(parts.shapes, parts.mesh, "train")
    source = source or config.init_from
    if source and not (Path(source) / "config.json").is_file():
        folder = checkpoint.find_params(source)
        return checkpoint.load_params(folder, shardings, dtype, parts.shapes), str(folder)
    source = source or config.hf_dir
    params = hf.load_params(source, parts.model, shardings=shardings, dtype=dtype)
    return checkpoint.own_buffers(params), str(source)


# --- data ------------------------------------------------------------------------------------


def data_place(mesh: Mesh) -> tuple[int, int]:
    """(index, count) of this process among those that read different data.

    Processes that hold the same data shards (``tensor`` spans them) read the same rows.
    """
    own = sharding.process_shards(mesh)
    count = sharding.num_data_shards(mesh) // len(own)
    if own != list(range(own[0], own[0] + len(own))) or own[0] % len(own):
        raise RunError(f"mesh: this process holds the data shards {own}, which are not one block")
    return own[0] // len(own), count


def rows_per_shard(key: str, sequences: int, per_row: int, shards: int, fill: bool = False) -> int:
    """Micro-batches of a batch of ``sequences``: rows that each data shard holds.

    Args:
        key: config key of ``sequences``, for the message.
        fill: round up (the rest is filled with empty sequences) instead of failing.
    """
    if fill:
        return -(-sequences // (shards * per_row))
    if sequences % (shards * per_row):
        raise RunError(
            f"{key}={sequences} must be a multiple of data shards x prompts_per_row = {shards} x "
            f"{per_row} = {shards * per_row}: change it, data.prompts_per_row, or the mesh"
        )
    return sequences // (shards * per_row)


def check_updates(rows: int, updates: int, sequences: int, shards: int, per_row: int) -> None:
    """RunError, with what to set, where a rollout of ``rows`` micro-batches has no such parts."""
    if rows % updates == 0:
        return
    whole = [n for n in range(1, per_row) if sequences % (shards * n * updates) == 0]
    fewer = max(n for n in range(1, updates + 1) if rows % n == 0)
    remedy = f"--config.grpo.updates_per_rollout={fewer}"
    if whole:
        remedy = (
            f"--config.data.prompts_per_row={whole[-1]} (and data.patch_budgets by the same "
            f"factor), or {remedy}"
        )
    raise RunError(
        f"grpo.updates_per_rollout={updates} must divide the {rows} rows of a data shard "
        f"(data.global_batch_size={sequences} / {shards} data shards / "
        f"data.prompts_per_row={per_row}): set {remedy}"
    )


def open_source(key: str, path: str, root: str = "") -> Any:
    """The records of a file; RunError naming the config key where none is given."""
    if not path:
        raise RunError(f"{key} is empty: pass --config.{key}=FILE (.jsonl, .parquet, ...)")
    return open_records(path, root or None)


class Subset:
    """Some records of a source, by index."""

    def __init__(self, source: Any, indices: Sequence[int]):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._indices[index]]


def without_origins(source: Any, origins: frozenset[str]) -> list[int]:
    """Indices of the records that are not among ``origins``; unreadable ones are kept."""
    kept = []
    for index in range(len(source)):
        try:
            known = source[index].origin in origins
        except ValueError:
            known = False
        if not known:
            kept.append(index)
    return kept


def open_loader(parts: Parts, source: Any, encode: Callable, **settings: Any) -> Loader:
    """`make_loader` for this mesh: which part of the data is this process's, pads, geometry."""
    agree({"data": str(getattr(source, "fingerprint", len(source)))})
    index, count = data_place(parts.mesh)
    return make_loader(
        source,
        encode,
        agree=agree_maximum,
        num_shards=parts.shards,
        process_index=index,
        process_count=count,
        pad_id=parts.processor.pad_id,
        geometry=parts.processor.geometry,
        **settings,
    )


def agree_maximum(value: int) -> int:
    """The largest value over all processes (collective)."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def agree_any(values: Sequence[bool]) -> list[bool]:
    """Element by element, whether any process holds True (collective)."""
    if jax.process_count() == 1:
        return [bool(value) for value in values]
    return np.any(multihost_utils.process_allgather(np.asarray(values, bool)), axis=0).tolist()


def add_up(values: Sequence[float]) -> list[float]:
    """Element by element, the sum over all processes (collective)."""
    if jax.process_count() == 1:
        return [float(value) for value in values]
    return np.sum(multihost_utils.process_allgather(np.asarray(values, np.float32)), 0).tolist()


def bucket_of(batch: Batch) -> str:
    """The budgets of a batch in words: what a program is compiled for."""
    text = f"tokens {list(batch.tokens.shape)}"
    return (
        text if batch.vision is None else f"{text}, patches {list(batch.vision.patches.shape[:2])}"
    )


def prompt_keys(records: Sequence[Record], slots: np.ndarray, size: int) -> np.ndarray:
    """[size] uint32: the sampler's key of each prompt, from its id; 0 for fillers."""
    keys = np.zeros(size, np.uint32)
    for record, slot in zip(records, slots, strict=True):
        keys[slot] = zlib.crc32(record.id.encode())
    return keys


def to_local(tree: Any) -> Any:
    """Global arrays -> numpy arrays with the rows of this process, in order (no communication)."""

    def fetch(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        parts = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)])

    jax.tree.map(lambda x: x.copy_to_host_async() if isinstance(x, jax.Array) else None, tree)
    return jax.tree.map(fetch, tree)


def say(text: str) -> None:
    """One line on the first process's standard output."""
    if jax.process_index() == 0:
        print(text, flush=True)


# --- checks before the first step --------------------------------------------------------------


def check_first_records(
    key: str,
    source: Any,
    encode: Callable[[Record], Any],
    parts: Parts,
    *,
    tokens: int,
    patches: int,
    check: Callable[[Record], str | None] = lambda record: None,
) -> None:
    """Encode the first records until one is usable (and passes ``check``); RunError if none is.

    Single bad records are the loader's business; here it is about budgets that no record meets.
    """
    image_token = parts.processor.image_token_id
    problem = "no records"
    for index in range(min(8, len(source))):
        try:
            record = source[index]
            encoded = encode(record)
            problem = check(record)
        except ValueError as error:
            problem = str(error)
            continue
        places = int((encoded.token_ids == image_token).sum())
        if places != encoded.vision.num_merged:
            raise RunError(
                f"{encoded.origin}: {places} image tokens, but {encoded.vision.num_merged} merged "
                "image patches: tokenizer and image processor do not belong together"
            )
        if problem is not None:
            problem = f"{encoded.origin}: {problem}"
            continue
        if encoded.num_tokens <= tokens and encoded.num_slots <= patches:
            return
        problem = (
            f"{encoded.origin} has {encoded.num_tokens} tokens and {encoded.num_slots} patches, "
            f"the budgets are {tokens} tokens and {patches} patches a row"
        )
    raise RunError(f"{key}: none of the first records can be used; the last one: {problem}")


def check_export(out_dir: str, done: bool) -> bool:
    """Whether an export is to be written; RunError before hours of training where it could not."""
    if not out_dir:
        return False
    path = Path(out_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if done:
            return False
        raise RunError(
            f"export_hf_dir={out_dir} exists and is not an empty directory; choose another one"
        )
    return True


def export(params: Params, parts: Parts, config: Any) -> None:
    """Write the Hugging Face directory, in the dtype that hf_dir's config.json names."""
    described = json.loads((Path(config.hf_dir) / "config.json").read_text())
    dtype = described.get("dtype") or described.get("torch_dtype")
    hf.save_hf(
        params, parts.model, config.export_hf_dir, config.hf_dir, dtype=dtype, agree=agree_maximum
    )


# --- command line ------------------------------------------------------------------------------


def main(run: Callable[[Any, str], Any]) -> None:
    """The command line of an entry point: --config, --workdir, --debug; one-line errors."""
    from absl import app, flags, logging  # noqa: PLC0415  (flags exist only in a program)
    from ml_collections import config_flags  # noqa: PLC0415

    config = config_flags.DEFINE_config_file("config", None, "File of configs/, with arguments.")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, results.")
    debug = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    flags.mark_flags_as_required(["config", "workdir"])
    for name in ("config", "workdir", "debug"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # for --help

    def call(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches
        try:
            run(config.value, workdir.value)
        except Exception as error:
            if debug.value:
                raise
            text = " ".join(str(error).split())
            plain = isinstance(error, ValueError | OSError | RuntimeError) and text
            print(f"error: {text if plain else f'{type(error).__name__}: {text}'}", file=sys.stderr)
            sys.stderr.flush()
            # Other processes may be waiting in a collective: leave without their consent.
            os._exit(1) if jax.process_count() > 1 else sys.exit(1)

    app.run(call)
