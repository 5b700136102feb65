"""Records in, batches out: data opened for this process's part of the mesh, and checked first."""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from srpo_jax.data.batching import Encoded
from srpo_jax.data.files import AnyPath
from srpo_jax.data.loader import LoadedBatch, Loader
from srpo_jax.data.records import Record, open_records
from srpo_jax.data.stream import LoaderConfig
from srpo_jax.run import processes
from srpo_jax.run.parts import Parts
from srpo_jax.run.settings import TrainSettings, rows_per_shard
from srpo_jax.structs import Batch, RunError

Encode = Callable[[Record], Encoded]
Check = Callable[[Record], str | None]  # why a record is left out, or None


def open_source(key: str, path: str, root: str = "") -> Any:
    """The records of a file; RunError naming the config key where none is given."""
    if not path:
        raise RunError(f"{key} is empty: pass --config.{key}=FILE (.jsonl, .parquet, ...)")
    return open_records(path, root or None)


def open_training(
    settings: TrainSettings,
    parts: Parts,
    encode: Encode,
    *,
    tokens: int,
    check: Check | None = None,
) -> tuple[Loader, int]:
    """The endless loader of ``data.train``, and the number of records.

    Args:
        tokens: budget of a sequence.
        check: records for which it gives a reason are set aside.

    Raises:
        RunError: none of the first records can be used.
    """
    data = settings.data
    source = open_source("data.train", data.train, data.root)
    _check_first_records(source, encode, parts, check, (tokens, max(data.patch_budgets, default=0)))
    loader = open_loader(
        parts,
        source,
        encode,
        check=check,
        quarantine_path=settings.workdir / "quarantine.jsonl",
        global_batch_size=data.global_batch_size,
        rows_per_shard=rows_per_shard(data, parts.shards),
        token_budget=tokens,
        patch_budgets=data.patch_budgets,
        pack=getattr(data, "pack", False),
        shuffle=data.shuffle,
        seed=settings.seed,
        workers=data.workers,
        max_bad_share=data.max_bad_share,
    )
    return loader, len(source)


def open_loader(
    parts: Parts,
    source: Any,
    encode: Encode,
    *,
    check: Check | None = None,
    quarantine_path: AnyPath | None = None,
    **settings: Any,
) -> Loader:
    """A loader for this mesh; ``settings`` are the fields of LoaderConfig that it does not tell."""
    processes.agree({"data": str(getattr(source, "fingerprint", len(source)))})
    index, count = processes.data_place(parts.mesh)
    config = LoaderConfig(
        num_shards=parts.shards,
        process_index=index,
        process_count=count,
        pad_id=parts.processor.pad_id,
        geometry=parts.processor.geometry,
        **settings,
    )
    return Loader(
        source,
        encode,
        config,
        check_record=check,
        agree=processes.maximum,
        quarantine_path=quarantine_path,
    )


def _check_first_records(
    source: Any, encode: Encode, parts: Parts, check: Check | None, budgets: tuple[int, int]
) -> None:
    """Encode the first records until one is usable (and passes ``check``); RunError if none is.

    Single bad records are the loader's business; here it is about budgets (tokens of a sequence,
    patches of a row) that no record meets.
    """
    image_token = parts.processor.image_token_id
    tokens, patches = budgets
    problem = "no records"
    for index in range(min(8, len(source))):
        try:
            record = source[index]
            encoded = encode(record)
            problem = check(record) if check else None
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
    raise RunError(f"data.train: none of the first records can be used; the last one: {problem}")


class Subset:
    """Some records of a source, by index."""

    def __init__(self, source: Any, indices: Sequence[int]):
        self._source, self._indices = source, indices
        self.fingerprint = str(getattr(source, "fingerprint", len(source)))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._indices[index]]


def without_origins(source: Any, origins: frozenset[str]) -> list[int]:
    """Indices of the records that are not among ``origins``; unreadable ones are kept."""

    def known(index: int) -> bool:
        try:
            return source[index].origin in origins
        except ValueError:
            return False

    return [index for index in range(len(source)) if not known(index)]


def bucket_of(batch: Batch) -> str:
    """The budgets of a batch in words: what a program is compiled for."""
    patches = f", patches {list(batch.vision.patches.shape[:2])}" if batch.vision else ""
    return f"tokens {list(batch.tokens.shape)}{patches}"


def prompt_keys(loaded: LoadedBatch) -> np.ndarray:
    """[P] uint32: the sampler's key of each prompt; 0 for fillers.

    It is that of the record's id, so that a problem is answered alike whatever stands beside it;
    what comes again in a batch, or in a later pass over the data, gets a key of its own.
    """
    keys = np.zeros(loaded.arrays.tokens.shape[0], np.uint32)
    seen: Counter[str] = Counter()
    for record, slot, done in zip(loaded.records, loaded.slots, loaded.passes, strict=True):
        again = (int(done), seen[record.id])
        seen[record.id] += 1
        text = record.id if again == (0, 0) else f"{record.id}\0{again}"
        keys[slot] = zlib.crc32(text.encode())
    return keys
