"""The state of one building run: SQLite, one row for each item, stage and try.

Every answer is committed when it arrives (write-ahead log), so that a process killed at any moment
loses only what was in flight, and readers (``status``, ``export``) work beside a running writer.
"""

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srpo_jax.data import lock

STAGES = ("attempt", "grade", "judge", "select", "reflect", "check")
VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (
    item INTEGER PRIMARY KEY, id TEXT NOT NULL, source TEXT NOT NULL, origin TEXT NOT NULL,
    problem TEXT, print TEXT);
CREATE TABLE IF NOT EXISTS results (
    item INTEGER NOT NULL, stage TEXT NOT NULL, try INTEGER NOT NULL, ok INTEGER NOT NULL,
    reason TEXT NOT NULL, data TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, cost REAL NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (stage, item, try)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS errors (
    stage TEXT NOT NULL, kind TEXT NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (stage, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (
    key TEXT PRIMARY KEY, stage TEXT NOT NULL, batch TEXT NOT NULL, state TEXT NOT NULL,
    members TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Result:
    """What one stage found for one item: ``data`` as JSON, and what it cost in tokens and USD."""

    item: int
    stage: str
    reason: str = ""  # why it is not usable, in words that can be counted
    data: dict[str, Any] = field(default_factory=dict)
    trial: int = 0  # sample number of an attempt, try number of a reflection
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it is usable."""
        return not self.reason


class Store:
    """The database of a work directory. One process writes; any number may read."""

    def __init__(self, workdir: str | os.PathLike, *, write: bool):
        """Open ``workdir/state.sqlite``, made on the first write.

        RuntimeError where another process writes to it, FileNotFoundError where there is nothing
        to read, ValueError for a file of another version.
        """
        self.workdir = Path(workdir)
        path = self.workdir / "state.sqlite"
        self._lock = contextlib.ExitStack()
        if write:
            self._lock.enter_context(lock.hold(self.workdir))
        elif not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; nothing was built in {workdir} yet")
        mode = "rwc" if write else "ro"
        self.db = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=60
        )
        if write:
            self.db.execute("PRAGMA journal_mode=WAL")
            # Without a sync at each commit a dead machine may lose the last seconds; a dead
            # process loses nothing.
            self.db.execute("PRAGMA synchronous=NORMAL")
            self.db.executescript(_SCHEMA)
        found = self.meta("version")
        if found is None and write:
            self.set_meta("version", VERSION)
        elif found != VERSION:
            self.close()
            raise ValueError(f"{path}: of version {found}, this program writes {VERSION}")

    def close(self) -> None:
        """Close the database and let go of the lock."""
        self.db.close()
        self._lock.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------- facts

    def meta(self, key: str, default: Any = None) -> Any:
        """A stored fact, or ``default``."""
        try:
            row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        except sqlite3.OperationalError:  # not our database, or not made yet
            return default
        return default if row is None else json.loads(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        """Store a fact that JSON can hold."""
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    # ------------------------------------------------------------------------------- items

    def add_items(self, rows: Iterable[tuple[int, str, str, str, str | None]]) -> None:
        """Rows of (item, id, source, origin, problem or None), in one transaction."""
        with self._transaction():
            self.db.executemany("INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?, ?, NULL)", rows)

    def set_prints(self, rows: Iterable[tuple[str, str | None, int]]) -> None:
        """Rows of (fingerprint as JSON, problem found while making it or None, item)."""
        with self._transaction():
            self.db.executemany(
                "UPDATE items SET print = ?, problem = COALESCE(problem, ?) WHERE item = ?", rows
            )

    # ----------------------------------------------------------------------------- results

    def put(self, *results: Result) -> None:
        """Commit results; one that is already there stays as it is."""
        now = time.time()
        rows = [
            vars(r) | {"ok": r.ok, "data": json.dumps(r.data, ensure_ascii=False), "now": now}
            for r in results
        ]
        with self._transaction():
            self.db.executemany(
                "INSERT OR IGNORE INTO results VALUES (:item, :stage, :trial, :ok, :reason, :data, "
                ":prompt_tokens, :completion_tokens, :cost, :now)",
                rows,
            )

    def results(self, stage: str, item: int) -> list[Result]:
        """All tries of one item in one stage, in their order."""
        rows = self.db.execute(
            "SELECT reason, data, try, prompt_tokens, completion_tokens, cost FROM results "
            "WHERE stage = ? AND item = ? ORDER BY try",
            (stage, item),
        )
        return [
            Result(item, stage, reason, json.loads(data), *rest) for reason, data, *rest in rows
        ]

    def result(self, stage: str, item: int, trial: int = 0) -> Result:
        """One try of one item in one stage, which must be there."""
        return next(r for r in self.results(stage, item) if r.trial == trial)

    def first_attempt(self, item: int) -> Result:
        """The graded attempt {"think", "answer", "correct"} with which an item was selected."""
        return self.result("grade", item, self.result("select", item).data["sample"])

    def unseen(self, stage: str, after: str) -> list[tuple[int, int]]:
        """(item, try) of the usable results of a stage that have no result of the one after it."""
        rows = self.db.execute(
            "SELECT item, try FROM results a WHERE stage = ? AND ok AND NOT EXISTS (SELECT 1 FROM "
            "results b WHERE b.stage = ? AND b.item = a.item AND b.try = a.try) ORDER BY item, try",
            (stage, after),
        )
        return list(rows)

    def keys(self, stage: str) -> set[tuple[int, int]]:
        """(item, try) of every result of a stage."""
        return set(self.db.execute("SELECT item, try FROM results WHERE stage = ?", (stage,)))

    def query(self, sql: str, parameters: tuple = ()) -> Iterator[tuple]:
        """Rows of a SELECT, fetched as they are asked for."""
        return self.db.execute(sql, parameters)

    def count(self, sql: str, parameters: tuple = ()) -> int:
        """The one number that a SELECT gives."""
        return next(self.query(sql, parameters))[0]

    def cost(self) -> float:
        """USD of everything that arrived."""
        return next(self.query("SELECT TOTAL(cost) FROM results"))[0]

    def begun(self, stage: str) -> bool:
        """Whether there is a result of a stage."""
        return bool(self.count("SELECT EXISTS(SELECT 1 FROM results WHERE stage = ?)", (stage,)))

    def count_error(self, stage: str, kind: str, number: int) -> None:
        """Add to the count of one kind of error."""
        self.db.execute(
            "INSERT INTO errors VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + ?",
            (stage, kind, number, number),
        )

    def clear(self, stages: Iterable[str]) -> int:
        """Delete the results of stages; returns how many."""
        deleted = 0
        with self._transaction():
            for stage in stages:
                deleted += self.db.execute("DELETE FROM results WHERE stage = ?", (stage,)).rowcount
                self.db.execute("DELETE FROM batches WHERE stage = ?", (stage,))
                self.db.execute("DELETE FROM errors WHERE stage = ?", (stage,))
        return deleted

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self.db:  # commits, or rolls back on an error
            self.db.execute("BEGIN IMMEDIATE")
            yield
