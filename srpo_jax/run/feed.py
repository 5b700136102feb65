"""Records in, batches out: data opened for this process's part of the mesh, and checked first."""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import ColumnError, Record
from srpo_jax.data.files import AnyPath
from srpo_jax.data.loader import LoadedBatch, Loader
from srpo_jax.data.records import Records, open_records, place_of
from srpo_jax.data.stream import LoaderConfig
from srpo_jax.run import processes
from srpo_jax.run.budgets import (
    ALL_SECONDS,
    FIRST,
    FIRST_SECONDS,
    Check,
    Encode,
    Reader,
    check_images,
    look_at,
    training_budgets,
)
from srpo_jax.run.parts import Parts
from srpo_jax.run.sections import DataSettings, GrpoSettings, RunSettings, TrainSettings
from srpo_jax.run.settings import batch_layout
from srpo_jax.structs import Batch, RunError


def open_source(key: str, path: str, data: DataSettings) -> Records:
    """The records of one or several files; what the first ones hold is said on the first process.

    RunError naming the config key where no file is given, or where images or choices would be lost.
    """
    if not path:
        raise RunError(f"{key} is empty: pass --config.{key}=FILE (.jsonl, .parquet, ...)")
    source = open_records(path, data.root or None, columns=data.columns)
    try:
        found = source.summary()
        processes.say(f"{key}: {found}", "records", key=key, **dataclasses.asdict(found))
    except ColumnError as error:
        raise RunError(f"{key}: {error}") from None
    return source


def open_training(
    settings: TrainSettings, parts: Parts, encode: Encode, *, check: Check | None = None
) -> tuple[Loader, int]:
    """The endless loader of ``data.train``, and the number of records; says what they take.

    Records for which ``check`` gives a reason are set aside. RunError where the budgets do not hold
    one image, a batch takes more records than there are, or none of the first ones can be used.
    """
    data, budgets = settings.data, training_budgets(settings)
    source = open_source("data.train", data.train, data)
    if len(source) < data.global_batch_size:
        raise RunError(
            f"data.train={data.train} has {len(source)} records, fewer than a batch of "
            f"data.global_batch_size={data.global_batch_size}: lower that, or add records"
        )
    rule = {"seconds": FIRST_SECONDS, "share": data.max_bad_share}
    reader = Reader(encode, budgets, check)
    told = {
        "room": check_images(parts.processor, encode, budgets),
        "lengths": look_at("data.train", source, reader, most=FIRST, **rule),
    }
    layout = batch_layout(settings, parts.shards)
    each = layout.sequences // layout.updates
    if layout.size > layout.sequences or layout.sharing > 1:
        places = layout.size * layout.sharing // layout.updates
        told["places"] = (
            f"{each} sequences of an update on {layout.shards} data shards: {each} of {places} "
            "places are used"
        )
    for fact, line in told.items():
        if line:
            processes.say(line, fact, key="data.train")
    loader = open_loader(
        parts,
        source,
        encode,
        check=check,
        say=processes.say,
        quarantine_path=settings.workdir / "quarantine.jsonl",
        global_batch_size=layout.sequences,
        rows_per_shard=layout.rows,
        updates=layout.updates,
        sharing=layout.sharing,
        token_budget=budgets.tokens,
        token_key=budgets.token_key,
        patch_budgets=data.patch_budgets,
        pack=getattr(data, "pack", False),
        shuffle=data.shuffle,
        mix=data.mix,
        seed=settings.seed,
        workers=data.workers,
        timeout=data.timeout,
        max_bad_share=data.max_bad_share,
    )
    return loader, len(source)


def check_problems(settings: RunSettings, parts: Parts, source: Any, reader: Reader) -> None:
    """Say what the problems of ``eval.file`` take, and which of them will count as wrong unasked.

    RunError as in `open_training`, before hours of work.
    """
    told = check_images(parts.processor, reader.encode, reader.budgets)
    if told and not isinstance(settings, GrpoSettings):  # there training says the same
        processes.say(told, "room", key="eval.file")
    share = settings.data.max_bad_share
    processes.say(
        look_at("eval.file", source, reader, most=len(source), seconds=ALL_SECONDS, share=share),
        "lengths",
        key="eval.file",
    )


# Each further parameter is one of `Loader`'s.
def open_loader(
    parts: Parts,
    source: Any,
    encode: Encode,
    *,
    check: Check | None = None,
    quarantine_path: AnyPath | None = None,
    say: Callable[[str], None] | None = None,
    on_bad: Callable[[Record | None, RecordError], None] | None = None,
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
        gather=processes.gather,
        # Processes that read the same rows set the same ones aside.
        quarantine_path=quarantine_path if processes.speaks(parts.mesh) else None,
        say=say,
        on_bad=on_bad,
    )


class Ahead:
    """A loader whose next batch may be drawn early, while the device is busy. Nothing else changes:
    until the batch is taken, `get_state` is the place before it, and an error waits as well."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self._drawn: LoadedBatch | Exception | None = None
        self._before: dict[str, Any] = {}

    def draw(self) -> None:
        """Have the next batch ready (collective)."""
        if self._drawn is None:
            self._before = self._loader.get_state()
            try:
                self._drawn = next(self._loader)
            except Exception as error:  # it belongs to the step that takes the batch
                self._drawn = error

    def __next__(self) -> LoadedBatch:
        drawn, self._drawn = self._drawn, None
        if isinstance(drawn, Exception):
            raise drawn
        return next(self._loader) if drawn is None else drawn

    def get_state(self) -> dict[str, Any]:
        """The place right after the last batch that was taken."""
        return self._loader.get_state() if self._drawn is None else self._before


class Subset:
    """Some records of a source, by index."""

    def __init__(self, source: Any, indices: Sequence[int]):
        self._source, self._indices = source, indices
        self.fingerprint = str(getattr(source, "fingerprint", len(source)))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._indices[index]]

    def place_of(self, index: int) -> str:
        """As of the source."""
        return place_of(self._source, self._indices[index])


def without_origins(source: Any, origins: frozenset[str]) -> list[int]:
    """Indices of the records that are not among ``origins``."""

    def known(index: int) -> bool:
        try:
            return source[index].origin in origins
        except RecordError as error:
            return error.origin in origins

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
