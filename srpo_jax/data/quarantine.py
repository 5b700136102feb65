"""Bad records: noted in a file, counted, and found ahead of a run."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass

from srpo_jax.data.batching import Encoded
from srpo_jax.data.records import Record, RecordError, RecordSource, resolve_path


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
            with open(path, "rb") as file:
                lines = file.read().splitlines(keepends=True)
            for line in lines:
                try:
                    entry = json.loads(line)
                    self._known.add((entry["origin"], entry["reason"]))
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash: the record will be met again
            if lines and not lines[-1].endswith(b"\n"):
                self._append("\n")

    def __len__(self) -> int:
        return len(self._known)

    def _append(self, text: str) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)

    def add(self, error: RecordError, record_id: str | None) -> bool:
        """Note a bad record; True where it was not known yet."""
        key = (error.origin, error.reason)
        if key in self._known:
            return False
        self._known.add(key)
        entry = {"origin": error.origin, "id": record_id, "reason": error.reason}
        self._append(json.dumps(entry, ensure_ascii=False) + "\n")
        return True


@dataclass(frozen=True)
class Preflight:
    """What a look at the data before a run found."""

    checked: int
    bad: list[RecordError]
    repeated_ids: list[str]

    def __str__(self) -> str:
        lines = [f"{self.checked} records, {len(self.bad)} bad"]
        lines += [f"  {error}" for error in self.bad[:10]]
        if len(self.bad) > 10:
            lines.append(f"  and {len(self.bad) - 10} more")
        if self.repeated_ids:
            lines.append(f"  {len(self.repeated_ids)} ids occur twice: {self.repeated_ids[:5]}")
        return "\n".join(lines)


def preflight(
    source: RecordSource,
    *,
    encode: Callable[[Record], Encoded] | None = None,
    check_record: Callable[[Record], str | None] | None = None,
    limit: int | None = None,
) -> Preflight:
    """Read every record (or the first ``limit``) and collect what is wrong, without stopping.

    Quick by default: fields, and whether image files are there. With ``encode`` each record is
    also decoded and encoded as in training.
    """
    bad, seen, repeated = [], set(), []
    count = min(len(source), limit or len(source))
    for index in range(count):
        try:
            record = source[index]
            if encode is not None:
                encode(record)
            else:
                for ref in record.images:
                    if ref.data is None:
                        resolve_path(ref)
            reason = check_record(record) if check_record else None
            if reason is not None:
                raise RecordError(record.origin, reason)
        except RecordError as error:
            bad.append(error)
            continue
        if record.id in seen:
            repeated.append(record.id)
        seen.add(record.id)
    return Preflight(count, bad, repeated)
