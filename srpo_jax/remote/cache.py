"""Every reply of a judge in one SQLite file, so that no question is paid for twice.

One row for each request, committed when its reply arrives (write-ahead log): a process killed at
any moment loses only what was in flight, and several may share one file.
"""

import dataclasses
import hashlib
import json
import os
import sqlite3
import time
from pathlib import Path

from srpo_jax.remote.protocol import Reply, Request

VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, refusal TEXT NOT NULL,
    finish_reason TEXT NOT NULL, answered_by TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, cost REAL NOT NULL, seconds REAL NOT NULL,
    time REAL NOT NULL) WITHOUT ROWID;
"""
# In the order of Reply's fields.
_COLUMNS = (
    "text, refusal, finish_reason, answered_by, prompt_tokens, completion_tokens, cost, seconds"
)


def request_key(model: str, request: Request) -> str:
    """SHA-256 of the model's name, the messages and every parameter; not of the server's address.

    A model that moves to another server is the same judge.
    """
    kept = ("messages", "max_tokens", "temperature", "seed", "schema")
    asked = {"model": model} | {name: getattr(request, name) for name in kept}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class JudgeCache:
    """The replies of one file; a context manager."""

    def __init__(self, path: str | os.PathLike):
        """Open or make the file; ValueError where it is something else or of another version."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.path, isolation_level=None, timeout=60)
        try:
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
            if (version, bool(tables)) not in ((0, False), (VERSION, True)):
                raise sqlite3.DatabaseError(f"it is none of version {VERSION}")
            self._db.execute("PRAGMA journal_mode=WAL")
            # Without a sync at each commit a dead machine may lose the last seconds; a dead
            # process loses nothing.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(
                f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={VERSION};COMMIT;"
            )
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"{path}: cannot be used as a cache of judgements ({error})") from None

    def __enter__(self) -> "JudgeCache":
        return self

    def __exit__(self, *_) -> None:
        self._db.close()

    def __len__(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM replies").fetchone()[0]

    def get(self, key: str) -> Reply | None:
        """The reply to a request, None where none is stored."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(*row)

    def put(self, key: str, model: str, reply: Reply) -> None:
        """Commit a reply; one that is already there stays as it is."""
        self._db.execute(
            f"INSERT OR IGNORE INTO replies (key, model, {_COLUMNS}, time) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, model, *dataclasses.astuple(reply), time.time()),
        )
