"""The records of a building run by item number, and their fingerprints."""

import bisect
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Columns, Record
from srpo_jax.data.files import same_content
from srpo_jax.data.images import load_image
from srpo_jax.data.records import Records, open_records
from srpo_jax.reflection.duplicates import Print, fingerprint
from srpo_jax.reflection.store import Store
from srpo_jax.rewards.answers import answer_problem

CHUNK = 1_000
_THREADS = 4


class Items:
    """The records of all files, one after the other: ``items[number]``."""

    def __init__(self, files: Iterable[str], data_root: str = "", columns: Iterable[str] = ()):
        """Open all files; ValueError without any, FileNotFoundError for a missing one.

        ``columns`` are foreign names, as ``Columns.parse`` reads them.
        """
        self.files = list(files)
        if not self.files:
            raise ValueError("no records: give --records FILE [FILE ...]")
        named = Columns.parse(columns)
        self._parts: list[Records] = [
            open_records(file, data_root or None, columns=named) for file in self.files
        ]
        self._ends = list(itertools.accumulate(len(part) for part in self._parts))
        self.fingerprint = [part.fingerprint for part in self._parts]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, item: int) -> Record:
        """Record ``item``, its source filled in; RecordError where it cannot be used."""
        which = bisect.bisect_right(self._ends, item)
        record = self._parts[which][item - (self._ends[which - 1] if which else 0)]
        if record.source:
            return record
        return dataclasses.replace(record, source=Path(self.files[which]).stem)


def register(store: Store, items: Items, say: Callable[[str], None]) -> None:
    """Enter every record into the store, with what makes it unusable where something does.

    ValueError where the files are not those that the store was begun with.
    """
    known = store.meta("data")
    if known is not None and not (
        len(known) == len(items.fingerprint) and all(map(same_content, known, items.fingerprint))
    ):
        raise ValueError(
            f"{store.workdir}: the record files have changed since it was begun; use another "
            "--workdir, or restore them"
        )
    store.set_meta("data", items.fingerprint)
    have = store.count("SELECT COUNT(*) FROM items")
    for start in range(have, len(items), CHUNK):
        rows = [_row(items, i) for i in range(start, min(start + CHUNK, len(items)))]
        store.add_items(rows)
    if have < len(items):
        bad = store.count("SELECT COUNT(*) FROM items WHERE problem IS NOT NULL")
        say(f"{len(items)} records, {bad} of them unusable (status shows why)")


def _row(items: Items, item: int) -> tuple[int, str, str, str, str | None]:
    try:
        record = items[item]
    except RecordError as error:
        return item, f"item {item}", "", error.origin, error.reason
    problem = answer_problem(record.answer, record.choices)
    return item, record.id, record.source, record.origin, problem


def make_prints(store: Store, items: Items, say: Callable[[str], None]) -> None:
    """Fingerprint every usable item that has none yet; unreadable images become problems."""
    sql = "SELECT item FROM items WHERE problem IS NULL AND print IS NULL"
    todo = [item for (item,) in store.query(sql)]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(todo), CHUNK):
            part = todo[start : start + CHUNK]
            store.set_prints(list(pool.map(partial(_print, items), part)))
            if len(todo) > CHUNK:
                say(f"fingerprints {start + len(part)}/{len(todo)}")


def _print(items: Items, item: int) -> tuple[str, str | None, int]:
    """A row of ``Store.set_prints``; ``prints`` reads it."""
    try:
        found = print_of(items[item])
    except RecordError as error:
        return "", error.reason, item
    return json.dumps([found.question, [f"{image:x}" for image in found.images]]), None, item


def print_of(record: Record) -> Print:
    """The fingerprint of a record; RecordError where an image cannot be read."""
    images = [load_image(ref) for ref in record.images]
    return fingerprint(record.question, record.choices, images)


def prints(store: Store) -> Iterator[tuple[int, Print]]:
    """(item, fingerprint) of every usable item, in order."""
    rows = store.query(
        "SELECT item, print FROM items WHERE problem IS NULL AND print IS NOT NULL ORDER BY item"
    )
    for item, text in rows:
        question, images = json.loads(text)
        yield item, Print(question, tuple(int(image, 16) for image in images))


def evaluation_prints(
    files: Iterable[str], say: Callable[[str], None], columns: Iterable[str] = ()
) -> dict[str, list[tuple[str, Print]]]:
    """Fingerprints of evaluation files; RecordError for a row that cannot be read, since a copy of
    it could not be found."""
    found: dict[str, list[tuple[str, Print]]] = {}
    for file in files:
        records = open_records(file, require_answer=False, columns=Columns.parse(columns))
        found[file] = [(record.id, print_of(record)) for record in records]
        say(f"{file}: {len(found[file])} evaluation items")
    return found
