"""The data pipeline: records -> shuffled, sharded, encoded batches of fixed shapes, resumable.

Grain shuffles, repeats, shards and runs the encoding in threads or worker processes (stream.py).
``Loader`` turns the stream of encoded records into batches: it sets bad records aside, fits images
into patch budgets, and knows its exact place in the data at any batch.
"""

import operator
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from srpo_jax.data.batching import Encoded, FirstFit, collate_packed
from srpo_jax.data.files import same_content
from srpo_jax.data.images import RecordError
from srpo_jax.data.quarantine import Quarantine
from srpo_jax.data.records import Record, RecordSource
from srpo_jax.data.stream import BadItem, Item, LoaderConfig, Stream
from srpo_jax.structs import Batch, RunError

_MIN_SEEN = 100  # records before the share of bad ones means anything
_LOOK_AHEAD = 8  # records without room before a packed batch counts as full


@dataclass(frozen=True)
class LoadedBatch:
    """One batch of this process.

    Without packing, record i is sequence i and fillers (valid False) come last. ``slots[i]`` is the
    sequence of record i in any case.
    """

    arrays: Batch[np.ndarray]
    records: list[Record]
    slots: np.ndarray  # [len(records)] int32
    passes: np.ndarray  # [len(records)] int32: over the data, before the one that drew the record


class Loader:
    """Iterator of ``LoadedBatch`` over a source. Counts: ``seen``, ``bad``.

    Args:
        encode: record -> Encoded, picklable when ``workers`` > 0; may raise RecordError. It runs
            once for each record that is drawn, never once for each sample of a group.
        config: for evaluation, ``shuffle=False, epochs=1, drop_remainder=False`` gives every record
            exactly once, and fillers at the end.
        check_record: a reason to leave a record out (a gold that cannot be parsed), or None; runs
            in this process, once for each record.
        agree: maximum of an integer over all processes; called once a batch by every process.
        quarantine_path: where bad records are listed; ".<process>" is put before the suffix when
            there are several processes.
    """

    def __init__(
        self,
        source: RecordSource,
        encode: Callable[[Record], Encoded],
        config: LoaderConfig,
        *,
        check_record: Callable[[Record], str | None] | None = None,
        agree: Callable[[int], int] | None = None,
        quarantine_path: str | os.PathLike | None = None,
    ):
        if len(source) == 0:
            raise RunError("the data hold no records")
        self.config, self._source = config, source
        self._stream, self._check_record = Stream(source, encode, config), check_record
        self._budgets = config.patch_budgets or (0,)
        # What the processes agree on before each batch, by maximum: 0, nobody has data left; the
        # patch budget (1, 2, ...); the data have ended for one of them; one of them failed.
        self._agree = agree or (lambda status: status)
        self._ended, self._failed = len(self._budgets) + 1, len(self._budgets) + 2
        if quarantine_path is not None and config.process_count > 1:
            stem, suffix = os.path.splitext(os.fspath(quarantine_path))
            quarantine_path = f"{stem}.{config.process_index}{suffix}"
        self.quarantine = Quarantine(quarantine_path)
        self._checked: dict[int, str | None] = {}
        self._iterator: Iterator[Item | BadItem] | None = None
        self._waiting: deque[Item] = deque()
        self._position, self._done = 0, False
        self.seen, self.bad, self._bad_run = 0, 0, 0
        self._last_error: RecordError | None = None

    # --- the stream of usable records ---

    def _fault(self, item: Item) -> RecordError | None:
        """Why the item cannot be used, or None."""
        record, encoded, config = item.record, item.encoded, self.config
        if encoded.num_tokens > config.token_budget:
            return RecordError(
                record.origin,
                f"{encoded.num_tokens} tokens exceed the budget of {config.token_budget}",
            )
        if encoded.num_slots > self._budgets[-1]:
            return RecordError(
                record.origin,
                f"{encoded.num_slots} image patches exceed the budget of {self._budgets[-1]}",
            )
        if self._check_record is None:
            return None
        if item.index not in self._checked:  # once a record, not once an epoch
            self._checked[item.index] = self._check_record(record)
        reason = self._checked[item.index]
        return None if reason is None else RecordError(record.origin, reason)

    def _next_good(self) -> Item | None:
        """The next usable record; bad ones on the way are counted and set aside."""
        if self._iterator is None:
            self._iterator = self._stream.start(self._position)
        for item in self._iterator:
            position, self._position = self._position, self._position + 1
            self.seen += 1
            error = item.error if isinstance(item, BadItem) else self._fault(item)
            if error is None:
                self._bad_run = 0
            else:
                self.bad += 1
                self._bad_run += 1
                self._last_error = error
                self.quarantine.add(error, item.record.id if item.record else None)
            self._check_share()
            if error is None and isinstance(item, Item):
                return replace(item, position=position)
        return None

    def _check_share(self) -> None:
        """RunError when too many records are bad, or all of them."""
        shard = -(-len(self._source) // self.config.process_count)
        enough = self.seen >= min(_MIN_SEEN, shard)
        too_many = enough and self.bad > self.config.max_bad_share * self.seen
        if not too_many and self._bad_run < shard:
            return
        listed = f" (listed in {self.quarantine.path})" if self.quarantine.path else ""
        last = f"; the last one: {self._last_error}" if self._last_error else ""
        raise RunError(
            f"{self.bad} of {self.seen} records are bad{listed}, more than the share of "
            f"{self.config.max_bad_share:g} that max_bad_share allows{last}"
        )

    # --- batches ---

    def _gather(self) -> tuple[list[list[Item]], int]:
        """The items of the next batch, by sequence, and this process's status."""
        config = self.config
        fit = FirstFit(
            rows=config.rows,
            per_row=config.per_row,
            tokens=config.token_budget,
            patches=self._budgets[-1],
            pack=config.pack,
        )
        size = config.rows * config.per_row
        groups: list[list[Item]] = [[] for _ in range(size)]
        count, skipped, item = 0, [], None
        while count < size or config.pack:
            item = self._waiting.popleft() if self._waiting else self._next_good()
            if item is None:
                break
            b = fit.place(item.encoded)
            if b >= 0:
                groups[b].append(item)
                count += 1
                continue
            skipped.append(item)  # no room: it goes into the next batch
            if config.pack and len(skipped) == _LOOK_AHEAD:
                break
            if len(skipped) > 2 * size + _LOOK_AHEAD:
                raise RunError(
                    f"patch_budgets: {config.per_row} prompts a row need more than "
                    f"{self._budgets[-1]} patches; add a larger budget, or raise rows_per_shard or "
                    "lower max_pixels"
                )
        self._waiting.extendleft(reversed(skipped))
        if item is None and config.drop_remainder:
            return groups, self._ended
        if not config.pack:
            groups = self._arrange([g[0] for g in groups if g])
        if not count:
            return groups, 0
        taken_B = np.array([sum(i.encoded.num_slots for i in group) for group in groups])
        needed = int(taken_B.reshape(-1, config.per_row).sum(axis=1).max())
        return groups, 1 + self._budget(needed)

    def _budget(self, needed: int) -> int:
        """Index of the smallest patch budget that holds ``needed`` slots."""
        return sum(budget < needed for budget in self.config.patch_budgets)

    def _arrange(self, items: list[Item]) -> list[list[Item]]:
        """One item a sequence; full batches balanced over the rows, others with fillers last."""
        rows, per_row = self.config.rows, self.config.per_row
        table: list[list[Item]] = [[] for _ in range(rows)]
        if len(items) == rows * per_row:
            load = np.zeros(rows, np.int64)
            for item in sorted(items, key=lambda i: -i.encoded.num_slots):
                free = [m for m in range(rows) if len(table[m]) < per_row]
                m = min(free, key=lambda m: load[m])
                table[m].append(item)
                load[m] += item.encoded.num_slots
            in_order = [items[m * per_row : (m + 1) * per_row] for m in range(rows)]
            needed = max(sum(i.encoded.num_slots for i in row) for row in in_order)
            if self._budget(needed) <= self._budget(int(load.max())):
                table = in_order
        else:
            row = 0
            for place, item in enumerate(items):
                row += len(table[row]) == per_row
                if sum(i.encoded.num_slots for i in [*table[row], item]) > self._budgets[-1]:
                    self._waiting.extendleft(reversed(items[place:]))
                    break
                table[row].append(item)
        return [[item] for row in table for item in row] + [
            [] for _ in range(rows * per_row - sum(map(len, table)))
        ]

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> LoadedBatch:
        """The next batch. RecordErrors never leave; RunError when the data cannot be used."""
        if self._done:
            raise StopIteration
        try:
            groups, status = self._gather()
        except Exception:
            self._done = True
            self._agree(self._failed)  # the other processes must not wait for this one
            raise
        status = self._agree(status)
        self._done = status in (0, self._ended, self._failed)
        if status == self._failed:
            raise RunError("another process could not go on with its data; see its message")
        if self._done:
            raise StopIteration
        arrays = collate_packed(
            [[item.encoded for item in group] for group in groups],
            rows=self.config.rows,
            tokens=self.config.token_budget,
            patches=self._budgets[status - 1],
            pad_id=self.config.pad_id,
            geometry=self.config.geometry,
        )
        slots = np.repeat(np.arange(len(groups), dtype=np.int32), [len(g) for g in groups])
        items = [item for group in groups for item in group]
        # Positions are this process's: all of them together go through the data in turn.
        places = np.array([item.position for item in items], np.int64) * self.config.process_count
        passes = ((places + self.config.process_index) // len(self._source)).astype(np.int32)
        return LoadedBatch(arrays, [item.record for item in items], slots, passes)

    # --- resuming ---

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a saved place to mean anything."""
        data = getattr(self._source, "fingerprint", str(len(self._source)))
        settings = ("seed", "shuffle", "process_index", "process_count")
        return {"data": data} | {name: getattr(self.config, name) for name in settings}

    def get_state(self) -> dict[str, Any]:
        """The place right after the last batch, JSON values only; one for each process."""
        return {
            **self._identity(),
            "position": self._position,
            "waiting": [item.position for item in self._waiting],
            "seen": self.seen,
            "bad": self.bad,
            "bad_run": self._bad_run,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``get_state`` stood, with any number of workers.

        ValueError, naming it, when the data, the seed or the number of processes changed.
        """
        for name, value in self._identity().items():
            same = same_content if name == "data" else operator.eq
            if not same(state[name], value):
                raise ValueError(
                    f"the saved place in the data does not fit: {name} was {state[name]!r} and is "
                    f"{value!r}; restore with the same data and settings"
                )
        self.close()
        self._done = False
        self._position = int(state["position"])
        self.seen, self.bad = int(state["seen"]), int(state["bad"])
        self._bad_run = int(state["bad_run"])
        self._waiting.clear()
        for position in state["waiting"]:
            item = self._stream.item(int(position))
            if isinstance(item, BadItem):
                raise ValueError(
                    f"the saved place in the data does not fit: {item.error} (it was good before)"
                )
            self._waiting.append(item)

    def close(self) -> None:
        """Stop threads and worker processes; iteration may go on afterwards."""
        getattr(self._iterator, "close", lambda: None)()  # an empty stream's has none
        self._iterator = None
