"""The stream under the loader: which records in which order, read and encoded in parallel."""

import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grain
import numpy as np

from srpo_jax.data.batching import Budgets, Encoded, Layout
from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.data.records import RecordSource, place_of
from srpo_jax.data.vision_arrays import VisionGeometry
from srpo_jax.data.workers import Supply, as_worker
from srpo_jax.structs import RunError

_SHARED_MEMORY = "/dev/shm"
_WINDOW = 64  # draws of a mix that are shuffled among themselves


@dataclass(frozen=True)
class LoaderConfig:
    """What shapes the batches. A batch has ``num_shards * rows_per_shard`` rows over all processes,
    as long as ``global_batch_size`` sequences need; see `Layout`."""

    global_batch_size: int  # sequences, without fillers
    token_budget: int  # T of a sequence
    patch_budgets: tuple[int, ...] = ()  # N of a row: the smallest that fits is used; (): no images
    rows_per_shard: int = 1  # micro-batches
    num_shards: int = 1  # data shards of the whole mesh
    updates: int = 1  # of GRPO that share a batch
    sharing: int = 1  # of them in the same rows
    seed: int = 0
    epochs: int | None = None  # None: for ever
    shuffle: bool = True
    mix: tuple[float, ...] = ()  # weights of the source's ``sizes``; (): as many as there are
    drop_remainder: bool = True  # False: fill the last batch up (evaluation)
    pack: bool = False  # several samples in a sequence, and sequences as few and short as will do
    process_index: int = 0
    process_count: int = 1
    workers: int = 0  # processes that read and encode; 0: threads
    timeout: float = 0.0  # seconds that one record is waited for (`Supply`); 0: for ever
    max_bad_share: float = 0.05
    token_key: str = "data.prompt_tokens"  # what the configuration calls token_budget
    pad_id: int = 0
    geometry: VisionGeometry = field(default_factory=VisionGeometry)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_budgets", tuple(sorted(set(self.patch_budgets))))
        if self.token_budget < 1:
            raise ValueError(f"token_budget={self.token_budget}: must be above 0")
        if self.num_shards % self.process_count:
            raise ValueError(
                f"num_shards={self.num_shards} is not a multiple of the {self.process_count} "
                "processes"
            )
        _ = self.layout  # which checks its numbers
        slots = self.geometry.window_slots
        if any(n < slots or n % slots for n in self.patch_budgets):
            raise ValueError(f"patch_budgets={self.patch_budgets}: positive multiples of {slots}")

    @property
    def budgets(self) -> Budgets:
        """Of one sequence; without images where there are no patch budgets."""
        return Budgets(self.token_budget, max(self.patch_budgets, default=0), self.token_key)

    @functools.cached_property
    def layout(self) -> Layout:
        """Of a batch over all processes."""
        shape = (self.global_batch_size, self.num_shards, self.rows_per_shard)
        return Layout(*shape, self.updates, self.sharing)

    @functools.cached_property
    def usable_B(self) -> np.ndarray:
        """Which places of a batch in this process hold a sequence."""
        return self.layout.places(self.process_index, self.process_count) >= 0

    @property
    def rows(self) -> int:
        """Rows of a batch in this process."""
        return self.rows_per_shard * self.num_shards // self.process_count

    @property
    def per_row(self) -> int:
        """Places of a row."""
        return self.layout.per_row


@dataclass(frozen=True)
class Item:
    """The record at one position of the stream, as a worker encoded it."""

    position: int
    index: int
    record: Record
    encoded: Encoded


@dataclass(frozen=True)
class BadItem:
    """A record that could not be read (None) or encoded, and why."""

    record: Record | None
    error: RecordError


def _load(
    source: RecordSource, encode: Callable[[Record], Encoded], budgets: Budgets, index: int
) -> Item | BadItem:
    """Read and encode record ``index``; a bad record becomes an item with its error."""
    record = None
    try:
        record = source[index]
        if fault := budgets.fault_of_text(record):
            return BadItem(record, fault)
        return Item(-1, index, record, encode(record))
    except RecordError as error:
        return BadItem(record, error)


def _to_wire(item: Item | BadItem) -> tuple[Item | BadItem, dict[str, np.ndarray], int]:
    """The item without its pixels and image files, those by name, and this process's id.

    Grain moves arrays between processes through shared memory and the rest through a pipe; a pipe
    full of pixels would block a worker that should end.
    """
    arrays = {}
    if item.record is not None:
        images = item.record.images
        files = {f"file {i}": ref.data for i, ref in enumerate(images) if ref.data}
        arrays |= {name: np.frombuffer(data, np.uint8) for name, data in files.items()}
        bare = tuple(replace(ref, data=None) for ref in images)
        item = replace(item, record=replace(item.record, images=bare))
    if isinstance(item, Item) and item.encoded.num_slots:
        arrays["pixels"] = item.encoded.vision.patches
        vision = replace(item.encoded.vision, patches=arrays["pixels"][:0])
        item = replace(item, encoded=replace(item.encoded, vision=vision))
    return item, arrays, os.getpid()


def _from_wire(
    wire: tuple[Item | BadItem, dict[str, np.ndarray], int],
) -> tuple[Item | BadItem, int]:
    """The item as it was, copied, so that shared memory holds only what is on its way; the id."""
    item, arrays, pid = wire
    if item.record is not None:
        data = [arrays.get(f"file {i}") for i in range(len(item.record.images))]
        images = tuple(
            ref if file is None else replace(ref, data=file.tobytes())
            for ref, file in zip(item.record.images, data, strict=True)
        )
        item = replace(item, record=replace(item.record, images=images))
    if isinstance(item, Item) and "pixels" in arrays:
        vision = replace(item.encoded.vision, patches=np.array(arrays["pixels"]))
        item = replace(item, encoded=replace(item.encoded, vision=vision))
    return item, pid


def _of_thread(item: Item | BadItem) -> tuple[Item | BadItem, int]:
    return item, 0


# --- order -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Of every ``batch`` positions of the whole stream, one process's: index, index + count, ..."""

    index: int
    count: int
    batch: int

    def __call__(self, position: int) -> int:
        """The place in the whole stream of this process's ``position``."""
        batches, rest = divmod(position, len(range(self.index, self.batch, self.count)))
        return batches * self.batch + self.index + rest * self.count

    def part_of(self, total: int) -> int:
        """How many of ``total`` positions are this process's."""
        batches, rest = divmod(total, self.batch)
        each = len(range(self.index, self.batch, self.count))
        return batches * each + len(range(self.index, rest, self.count))

    def own(self, place: int) -> int | None:
        """The inverse: this process's position of a place in the whole stream, or None."""
        batches, rest = divmod(place, self.batch)
        first, other = divmod(rest, self.count)
        each = len(range(self.index, self.batch, self.count))
        return batches * each + first if other == self.index else None

    def dealt(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Of the places that other processes had come to, all of them: this process's place.

        What nobody had read comes in its order, what waited waits, what one of them had read ahead
        of another is left out (``ahead``); counts go to the first process.
        """
        shares = [
            (Share(one["process_index"], one["process_count"], one.get("batch", self.batch)), one)
            for one in states
            if one["process_index"] < one.get("batch", self.batch)  # others have nothing to read
        ]
        begin, read, waiting = min(old(one["position"]) for old, one in shares), [], []
        for old, one in shares:
            back = map(old, reversed(range(one["position"])))
            read += [*itertools.takewhile(begin.__le__, back), *map(old, one.get("ahead", ()))]
            waiting += map(old, one["waiting"])
        own = {"waiting": map(self.own, sorted(waiting)), "ahead": map(self.own, sorted(read))}
        mine = self.index == 0
        return {
            **{name: [at for at in places if at is not None] for name, places in own.items()},
            **{name: mine * sum(state[name] for state in states) for name in ("seen", "bad")},
            "position": self.part_of(begin),
            "bad_run": 0,
        }


def _at(indices: Any, share: Share, position: int) -> int:
    return int(indices[share(position)])


def _repeated(start: int, count: int, config: LoaderConfig) -> grain.MapDataset:
    """The indices from ``start`` on, pass after pass."""
    indices = grain.MapDataset.range(start, start + count).seed(config.seed)
    indices = indices.shuffle() if config.shuffle else indices
    return indices.repeat(config.epochs)


def _mixed(source: RecordSource, config: LoaderConfig) -> grain.MapDataset:
    """The indices of all sources by weight; RunError where there is not a weight for each."""
    sizes, mix = sizes_of(source), config.mix
    if len(sizes) != len(mix):
        raise RunError(
            f"data.mix={mix}: {len(mix)} weights for {len(sizes)} sources of records; give one for "
            "each of those that data.train names, with commas between them"
        )
    starts = itertools.accumulate(sizes, initial=0)
    endless = replace(config, epochs=None)
    parts = [_repeated(start, n, endless) for start, n in zip(starts, sizes, strict=False)]
    draws: Any = grain.MapDataset.mix(parts, mix)
    if config.shuffle:  # else each of two processes would read one of two sources
        draws = grain.experimental.WindowShuffleMapDataset(
            draws, window_size=_WINDOW, seed=config.seed % 2**31
        )
    return draws if config.epochs is None else draws[: len(source) * config.epochs]


def sizes_of(source: RecordSource) -> tuple[int, ...]:
    """The records of each source that a mix draws of; a source without ``sizes`` is one."""
    return getattr(source, "sizes", None) or (len(source),)


class Stream:
    """This process's share of the records, shuffled anew each epoch; random access by position.

    Repeated first and shared out afterwards: the stream over all processes, and with it each global
    batch, does not depend on how many processes there are.

    With a mix, each source is shuffled and repeated by itself, and of every 64 draws each has its
    share (Grain rounds weights to a hundredth of the smallest). A small source with a large weight
    comes again sooner: a pass over the data, an epoch, is as many draws as there are records. What
    is drawn at a position follows from seed, sizes and weights alone, so that a place is resumed
    exactly by its number.
    """

    def __init__(
        self, source: RecordSource, encode: Callable[[Record], Encoded], config: LoaderConfig
    ):
        self._load = functools.partial(_load, source, encode, config.budgets)
        self._config, self._source = config, source
        indices = _mixed(source, config) if config.mix else _repeated(0, len(source), config)
        batch = config.global_batch_size
        self.share = Share(config.process_index, config.process_count, batch)
        if batch % config.process_count:
            own = grain.MapDataset.range(self.share.part_of(len(indices)))
            self._indices = own.map(functools.partial(_at, indices, self.share))
        else:
            self._indices = indices[config.process_index :: config.process_count]

    def _index(self, position: int) -> int:
        index = self._indices[position]
        assert index is not None  # which a filter would leave where it drops something
        return int(index)

    def item(self, position: int) -> Item | BadItem:
        """The record at one position."""
        item = self._load(self._index(position))
        return item if isinstance(item, BadItem) else replace(item, position=position)

    def start(self, position: int) -> Supply:
        """The items from ``position`` on (they do not know their position).

        RunError where the workers would die of SIGBUS for want of shared memory.
        """
        if self._config.workers:
            self._check_shared_memory()
        return Supply(
            self._begin,
            position,
            workers=self._config.workers,
            timeout=self._config.timeout,
            name=self._name,
        )

    def _name(self, position: int) -> str:
        """What the record at a position is called; it is not read."""
        if position >= len(self._indices):
            return "the end of the data"
        return place_of(self._source, self._index(position))

    def _begin(self, position: int) -> Iterator[tuple[Item | BadItem, int]]:
        """A Grain iterator from ``position`` on: items, and the process that each is from."""
        if position >= len(self._indices):
            return iter(())
        dataset = self._indices[position:].map(self._load)
        if not self._config.workers:
            threads = min(8, os.cpu_count() or 1)
            dataset = dataset.map(_of_thread)
            return iter(dataset.to_iter_dataset(grain.ReadOptions(threads, 2 * threads)))
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's workers refuse to start otherwise
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(self._config.workers, per_worker_buffer_size=2)
        dataset = dataset.map(_to_wire).to_iter_dataset(grain.ReadOptions(1, 2))
        return iter(dataset.mp_prefetch(options, as_worker).map(_from_wire))

    def _check_shared_memory(self) -> None:
        """Containers often have 64 MB of it, a large image takes 12."""
        item = 4 * self._config.geometry.patch_dim * max(self._config.patch_budgets, default=0)
        needed = 5 * item * self._config.workers  # two buffered, one each being made, sent, copied
        if os.path.isdir(_SHARED_MEMORY) and shutil.disk_usage(_SHARED_MEMORY).free < needed:
            raise RunError(
                f"{self._config.workers} workers need {needed >> 20} MiB in {_SHARED_MEMORY}; "
                "start the container with a larger --shm-size, or set workers to 0"
            )
