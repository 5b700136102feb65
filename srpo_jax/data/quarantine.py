"""Bad records: noted in a file, each once."""

import json
import os
from pathlib import Path

from srpo_jax.data.images import RecordError


class Quarantine:
    """Bad records, each once, as lines {origin, id, reason} appended to a file (or none).

    What the file holds already, from the run before a restart, is not written again.
    """

    def __init__(self, path: str | os.PathLike | None):
        self.path, self._known = path, set()
        if path is None:
            return
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        if os.path.exists(path):
            lines = Path(path).read_bytes().splitlines(keepends=True)
            for line in lines:
                try:
                    entry = json.loads(line)
                    self._known.add((entry["origin"], entry["reason"]))
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash: the record will be met again
            if lines and not lines[-1].endswith(b"\n"):
                self._append("\n")

    def _append(self, text: str) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)

    def add(self, error: RecordError, record_id: str | None) -> bool:
        """Note a bad record; False where it is known."""
        key = (error.origin, error.reason)
        if key in self._known:
            return False
        self._known.add(key)
        entry = {"origin": error.origin, "id": record_id, "reason": error.reason}
        self._append(json.dumps(entry, ensure_ascii=False) + "\n")
        return True
