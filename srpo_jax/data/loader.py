"""The data pipeline: records -> shuffled, sharded, encoded batches of fixed shapes, resumable.

Grain shuffles, repeats, shards and runs the encoding in threads or worker processes (stream.py).
``Loader`` turns the stream of encoded records into batches: it sets bad records aside, fits images
into patch budgets, and knows its exact place in the data at any batch.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from srpo_jax.data.batching import Encoded, FirstFit, collate_packed
from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.data.files import same_content
from srpo_jax.data.packing import TOO_MANY, Packer, Placed, RowShape, cheapest, placed_in
from srpo_jax.data.quarantine import Quarantine
from srpo_jax.data.records import RecordSource
from srpo_jax.data.stream import BadItem, Item, LoaderConfig, Stream, sizes_of
from srpo_jax.data.workers import Supply
from srpo_jax.structs import Batch, RunError, Stalled

_MIN_SEEN = 100  # records before the share of bad ones means anything
_FALSE_ALARM = 1e-3  # chance that a run is stopped although the share is not too large
_LOOK_AHEAD = 8  # records without room, beyond two batches of them, before a run stops
# The status of a process's batch, of which the largest counts: nobody has data left, some are
# there, the data have ended for one of them, one of them failed, one waited in vain.
_NOTHING, _FILLED, _ENDED, _FAILED, _STALLED = range(5)


@dataclass(frozen=True)
class LoadedBatch:
    """One batch of this process.

    ``slots[i]`` is the sequence of record i; what has none is a filler (valid False).
    """

    arrays: Batch[np.ndarray]
    records: list[Record]
    slots: np.ndarray  # [len(records)] int32
    passes: np.ndarray  # [len(records)] int32: over the data, before the one that drew the record
    padding_share: float  # of the slots of all processes, in rows that any of them uses


def too_many(bad: int, seen: int, share: float) -> bool:
    """Whether ``bad`` of ``seen`` records show that more than ``share`` of all are bad.

    Asked after every batch of a long run, it is wrong with a chance of 0.001 in all, where records
    come at random: the likelihood of the records seen must be 1,000 times as high under the mixture
    of all shares (Beta(1/2, 1/2), less than 2 sqrt(seen) below the best one) as under ``share``.
    (Ville's inequality; no such bound holds for a confidence interval that is looked at again and
    again.)
    """
    if bad <= share * seen or not seen:
        return False
    if not share:
        return True
    good = seen - bad
    gain = bad * math.log(bad / seen / share)
    gain += good * math.log(good / seen / (1 - share)) if good else 0.0
    return gain > math.log(2 * math.sqrt(seen) / _FALSE_ALARM)


class Loader:
    """Iterator of ``LoadedBatch`` over a source. Counts of this process: ``seen``, ``bad``.

    Args:
        encode: record -> Encoded, picklable when ``workers`` > 0; may raise RecordError. It runs
            once for each record that is drawn, never once for each sample of a group.
        config: for evaluation, ``shuffle=False, epochs=1, drop_remainder=False`` gives every record
            exactly once, and fillers at the end.
        check_record: a reason to leave a record out (a gold that cannot be parsed), or None; runs
            in this process, once for each record.
        gather: what every process passed (JSON values); called once a batch by every process.
        quarantine_path: where bad records are listed; ".<process>" is put before the suffix when
            there are several processes.
        say: told, at most once a batch, of records set aside that the list did not hold before.
        on_bad: called with each record that is set aside (None: it cannot be read) and why.
    """

    # One parameter for each thing that goes in or out, all but three of them optional.
    def __init__(
        self,
        source: RecordSource,
        encode: Callable[[Record], Encoded],
        config: LoaderConfig,
        *,
        check_record: Callable[[Record], str | None] | None = None,
        gather: Callable[[Any], list[Any]] | None = None,
        quarantine_path: str | os.PathLike | None = None,
        say: Callable[[str], None] | None = None,
        on_bad: Callable[[Record | None, RecordError], None] | None = None,
    ):
        if len(source) == 0:
            raise RunError("the data hold no records")
        self.config, self.source = config, source
        self._stream, self._check_record = Stream(source, encode, config), check_record
        self._budgets = config.patch_budgets or (0,)
        shards = config.rows // config.rows_per_shard
        self._packer = Packer(shards, config.rows_per_shard, self._budgets[-1])
        self._everyone = gather or (lambda own: [own])
        self._say, self._on_bad = say or (lambda text: None), on_bad or (lambda record, error: None)
        self._listed = ""  # in which files
        if quarantine_path is not None:
            stem, suffix = os.path.splitext(os.fspath(quarantine_path))
            several = config.process_count > 1
            own, every = (f".{config.process_index}", ".*") if several else ("", "")
            quarantine_path = f"{stem}{own}{suffix}"
            self._listed = f" (listed in {stem}{every}{suffix})"
        self.quarantine = Quarantine(quarantine_path)
        self._checked: dict[int, str | None] = {}
        self._iterator: Supply | None = None
        self._waiting: deque[Item] = deque()
        self._position, self._done = 0, False
        self._ahead: set[int] = set()  # positions that other processes had read (`Share.dealt`)
        self.seen, self.bad, self._bad_run = 0, 0, 0
        self._new, self._last_error = 0, ""  # set aside since the last batch, not listed before

    # --- the stream of usable records ---

    def _fault(self, item: Item) -> RecordError | None:
        """Why the item cannot be used, or None."""
        fault = self.config.budgets.fault(item.encoded, item.record.origin)
        if fault is not None or self._check_record is None:
            return fault
        if item.index not in self._checked:  # once a record, not once an epoch
            self._checked[item.index] = self._check_record(item.record)
        reason = self._checked[item.index]
        return None if reason is None else RecordError(item.record.origin, reason)

    def _next_good(self) -> Item | None:
        """The next usable record; bad ones on the way are counted and set aside."""
        if self._iterator is None:
            self._iterator = self._stream.start(self._position)
        for item in self._iterator:
            position, self._position = self._position, self._position + 1
            if position in self._ahead:
                self._ahead.remove(position)
                continue
            self.seen += 1
            error = item.error if isinstance(item, BadItem) else self._fault(item)
            if error is not None:
                self._set_aside(item.record, error)
            elif isinstance(item, Item):
                self._bad_run = 0
                return replace(item, position=position)
        return None

    def _set_aside(self, record: Record | None, error: RecordError) -> None:
        """Count and list a bad record; RunError where there is no other to wait for."""
        self.bad += 1
        self._bad_run += 1
        if self.quarantine.add(error, record.id if record else None):
            self._new += 1
            self._last_error = str(error)[:300]
        self._on_bad(record, error)
        own = -(-len(self.source) // self.config.process_count)
        if self.config.epochs is None and self._bad_run >= own:
            raise RunError(f"all of {self.bad} records are bad{self._listed}; the last: {error}")

    def _settle(self, status: int, **more: Any) -> tuple[int, list[dict[str, Any]]]:
        """The status of the batch over all processes, which also add up their bad records; and what
        each place of the data told ``more``.

        RunError, of every process, where these are more than ``max_bad_share`` allows. The same
        command stops there again, for its records are the same; it goes on from the last checkpoint
        with a larger share, or (`set_state`) with mended records.
        """
        config = self.config
        own = {"place": config.process_index, "status": status, "new": self._new}
        own |= {"seen": self.seen, "bad": self.bad, "last": self._last_error if self._new else ""}
        everyone = self._everyone(own | more)
        self._new = 0
        status = max(told["status"] for told in everyone)
        # Of processes that read the same, the first.
        parts = [*{told["place"]: told for told in reversed(everyone)}.values()]
        if status >= _FAILED:
            return status, parts
        new, seen, bad = (sum(told[name] for told in parts) for name in ("new", "seen", "bad"))
        last = "".join([f"; the last: {told['last']}" for told in parts if told["last"]][-1:])
        if new:
            self._say(f"{new} more bad records, {bad} of {seen} so far{self._listed}{last}")
        enough = seen >= min(_MIN_SEEN, len(self.source))
        if enough and too_many(bad, seen, config.max_bad_share):
            self._done = True
            raise RunError(
                f"{bad} of {seen} records are bad{self._listed}: more than data.max_bad_share="
                f"{config.max_bad_share:g} and chance allow; mend them or raise it, and the same "
                f"command goes on from the last checkpoint{last}"
            )
        return status, parts

    # --- batches ---

    def _gather(self) -> tuple[list[Item], int]:
        """The items of the next batch, as many as there are to be, and this process's status."""
        config = self.config
        fit = FirstFit(
            rows=config.rows,
            per_row=config.per_row,
            tokens=config.token_budget,
            patches=self._budgets[-1],
            pack=config.pack,
            usable_B=None if config.pack else config.usable_B,  # packed, they stand anywhere
        )
        size, ended = int(config.usable_B.sum()), False
        taken: list[tuple[int, Item]] = []  # with the place of each
        skipped = []
        while len(taken) < size:
            item = self._waiting.popleft() if self._waiting else self._next_good()
            if item is None:
                ended = True
                break
            b = fit.place(item.encoded)
            if b >= 0:
                taken.append((b, item))
                continue
            skipped.append(item)  # no room: it goes into the next batch
            if len(skipped) > 2 * size + _LOOK_AHEAD:
                raise RunError(
                    f"data.patch_budgets: {config.per_row} prompts a row need more than "
                    f"{self._budgets[-1]} patches; add a larger budget, or lower "
                    "data.prompts_per_row or max_pixels"
                )
        self._waiting.extendleft(reversed(skipped))
        if ended and config.drop_remainder:
            return [], _ENDED
        if not config.pack:
            taken.sort(key=lambda pair: pair[0])
        return [item for _, item in taken], _FILLED if taken else _NOTHING

    def _ways(self, items: list[Item]) -> tuple[list[Item], list[Placed | None]]:
        """The items, and how they may stand in the batch; None for what cannot hold them."""
        whole = RowShape(self.config.per_row, self.config.token_budget)
        if self.config.pack:
            return items, [*self._packer.ways([item.encoded for item in items], whole)]
        table, number = self._arrange(items), itertools.count()
        items = [item for group in table for item in group]
        groups = [[next(number) for _ in group] for group in table]
        encoded = [item.encoded for item in items]
        return items, [placed_in(whole, groups, encoded, self.config.rows_per_shard)]

    def _needs(self, placed: Placed | None) -> tuple[int, int]:
        """Rows of a shard, and the patch budget of each."""
        return (TOO_MANY, 0) if placed is None else (placed.rows, self._budget(placed.patches))

    def _budget(self, needed: int) -> int:
        """Index of the smallest patch budget that holds ``needed`` slots."""
        return sum(budget < needed for budget in self.config.patch_budgets)

    def _arrange(self, items: list[Item]) -> list[list[Item]]:
        """One item a sequence; full batches balanced over the rows, others filled in order."""
        rows, per_row = self.config.rows, self.config.per_row
        room_M = self.config.usable_B.reshape(rows, per_row).sum(axis=1)
        table: list[list[Item]] = [[] for _ in range(rows)]
        if len(items) == room_M.sum():
            load = np.zeros(rows, np.int64)
            for item in sorted(items, key=lambda i: -i.encoded.num_slots):
                free = [m for m in range(rows) if len(table[m]) < room_M[m]]
                m = min(free, key=lambda m: load[m])
                table[m].append(item)
                load[m] += item.encoded.num_slots
            rest = iter(items)
            in_order = [list(itertools.islice(rest, int(room))) for room in room_M]
            needed = max(sum(i.encoded.num_slots for i in row) for row in in_order)
            if self._budget(needed) <= self._budget(int(load.max())):
                table = in_order
        else:
            row = 0
            for place, item in enumerate(items):
                while len(table[row]) == room_M[row]:
                    row += 1
                if sum(i.encoded.num_slots for i in [*table[row], item]) > self._budgets[-1]:
                    self._waiting.extendleft(reversed(items[place:]))
                    break
                table[row].append(item)
        places = (itertools.zip_longest(range(per_row), row) for row in table)
        return [[] if item is None else [item] for row in places for _, item in row]

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> LoadedBatch:
        """The next batch. RecordErrors never leave; RunError when the data cannot be used.

        Stalled, of every process, where they do not come to one of them.
        """
        if self._done:
            raise StopIteration
        try:
            items, status = self._gather()
            items, ways = self._ways(items)
        except Exception as error:
            self._done = True
            # The other processes must not wait for this one.
            self._settle(_STALLED if isinstance(error, Stalled) else _FAILED)
            raise
        needs, tokens = [*map(self._needs, ways)], sum(item.encoded.num_tokens for item in items)
        status, parts = self._settle(status, needs=needs, tokens=tokens)
        self._done = status != _FILLED
        if status >= _FAILED:
            kind = Stalled if status == _STALLED else RunError
            raise kind("another process could not go on with its data; see its message")
        if self._done:
            raise StopIteration
        return self._batch(items, ways, parts)

    def _batch(
        self, items: list[Item], ways: list[Placed | None], parts: list[dict[str, Any]]
    ) -> LoadedBatch:
        """The items as they stand in the way that costs all processes together the least."""
        config = self.config
        needs_KPX = np.array([told["needs"] for told in parts]).swapaxes(0, 1)
        rows_K, budget_K = needs_KPX.max(axis=1).T.tolist()
        best, placed = cheapest(ways, rows_K)
        slots = rows_K[best] * config.num_shards * placed.shape.places * placed.shape.tokens
        arrays = collate_packed(
            [[items[i].encoded for i in group] for group in placed.groups],
            rows=config.rows,
            tokens=placed.shape.tokens,
            patches=self._budgets[budget_K[best]],
            pad_id=config.pad_id,
            geometry=config.geometry,
        )
        items = [items[i] for group in placed.groups for i in group]
        places = np.array([self._stream.share(item.position) for item in items], np.int64)
        return LoadedBatch(
            arrays,
            [item.record for item in items],
            np.repeat(np.arange(len(placed.groups), dtype=np.int32), [*map(len, placed.groups)]),
            (places // len(self.source)).astype(np.int32),
            1 - sum(told["tokens"] for told in parts) / slots,
        )

    # --- resuming ---

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a saved place to mean anything."""
        held = {name: getattr(self.config, name) for name in ("seed", "shuffle")}
        mix = [list(self.config.mix), list(sizes_of(self.source))] if self.config.mix else []
        return {"records": len(self.source), "mix": mix} | held

    def _fingerprint(self) -> str:
        return getattr(self.source, "fingerprint", str(len(self.source)))

    def _part(self) -> dict[str, int]:
        """What this process's positions count."""
        config = self.config
        place = {"process_index": config.process_index, "process_count": config.process_count}
        return place | {"batch": config.global_batch_size}

    def get_state(self) -> dict[str, Any]:
        """The place right after the last batch, JSON values only; one for each process."""
        return {
            "data": self._fingerprint(),
            **self._identity(),
            **self._part(),
            "position": self._position,
            "waiting": [item.position for item in self._waiting],
            "ahead": sorted(self._ahead),
            "seen": self.seen,
            "bad": self.bad,
            "bad_run": self._bad_run,
        }

    def set_state(self, *states: dict[str, Any], mended: bool = False) -> None:
        """Go on exactly where ``get_state`` stood, with any number of workers.

        Args:
            states: of every place in the data. Where these were others than this run has, or of
                another batch, what is left is dealt out anew: nothing comes twice, nothing is lost.
            mended: allow other contents of as many records, and count bad ones anew.

        Raises:
            ValueError: naming it, when the data or the seed changed.
        """
        part, first = self._part(), states[0]
        same = same_content(first["data"], self._fingerprint())
        found = self._identity() | ({} if same or mended else {"data": self._fingerprint()})
        for name, value in found.items():
            if first.get(name, value) != value:
                raise ValueError(
                    f"the saved place in the data does not fit: {name} was {first[name]!r} and is "
                    f"{value!r}; restore with the same data and settings (mended records go with "
                    "checkpoint.allow_changes=data)"
                )
        own = [one for one in states if part.items() <= {"batch": part["batch"], **one}.items()]
        state: dict[str, Any] = own[0] if own else self._stream.share.dealt(states)
        if not same:
            state = state | {"seen": 0, "bad": 0, "bad_run": 0}
        self.close()
        self._done = False
        self._position = int(state["position"])
        self.seen, self.bad = int(state["seen"]), int(state["bad"])
        self._bad_run = int(state["bad_run"])
        self._ahead = {*state.get("ahead", ())}
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
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None
