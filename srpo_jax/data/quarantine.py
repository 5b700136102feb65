"""Bad records: noted in a file, each once."""

import json

from etils import epath

from srpo_jax.data.errors import RecordError
from srpo_jax.data.files import AnyPath, Growing, read_jsonl


class Quarantine:
    """Bad records, each once, as lines {origin, id, reason} appended to a file (or none).

    What the file holds already, from the run before a restart, is not written again.
    """

    def __init__(self, path: AnyPath | None):
        self.path, self._known = path, set()
        if path is not None and epath.Path(path).exists():
            for entry in read_jsonl(path, skip_broken=True):  # torn: the record will be met again
                self._known.add((entry.get("origin"), entry.get("reason")))

    def add(self, error: RecordError, record_id: str | None) -> bool:
        """Note a bad record; False where it is known."""
        key = (error.origin, error.reason)
        if key in self._known:
            return False
        self._known.add(key)
        entry = {"origin": error.origin, "id": record_id, "reason": error.reason}
        if self.path is not None:
            file = Growing(self.path)
            file.append(json.dumps(entry, ensure_ascii=False))
            file.close()
        return True
