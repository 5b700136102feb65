"""What the tools that read evaluations share: the folders that ``srpo_jax.evaluate`` writes.

``samples.jsonl`` has this project's verdicts; ``scored.jsonl``, where there is one, those of a
benchmark's rule on the same completions; ``summary.json`` the rates of both.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from srpo_jax.data.files import read_jsonl

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation's files."""

    folder: Path
    summary: dict[str, Any]
    rows: list[Row]  # this project's verdicts
    scored: list[Row]  # the same rows under the benchmark's verdicts; empty without scored.jsonl

    @property
    def shown(self) -> list[Row]:
        """The rows with the benchmark's verdicts where there are any."""
        return self.scored or self.rows


def read(folder: str | Path, *, summary: bool = True) -> Evaluation:
    """An evaluation from its folder.

    Raises ValueError or FileNotFoundError naming the file that is missing or does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    partial = folder / "samples.jsonl.partial"
    if not (folder / "samples.jsonl").exists():
        why = "is not finished: run it to its end" if partial.exists() else "has no samples.jsonl"
        raise FileNotFoundError(f"{folder} {why}")
    rows = read_jsonl(folder / "samples.jsonl")
    if not rows:
        raise ValueError(f"{folder / 'samples.jsonl'}: no rows")
    path = folder / "scored.jsonl"
    scored = _merged(rows, read_jsonl(path), path) if path.exists() else []
    found = json.loads((folder / "summary.json").read_text("utf-8")) if summary else {}
    return Evaluation(folder, found, rows, scored)


def _key(row: Row) -> tuple[Any, Any]:
    return row.get("origin", row.get("id")), row.get("sample", 0)


def _merged(rows: list[Row], scored: list[Row], path: Path) -> list[Row]:
    """The rows with what scoring added; ``correct`` is the final answer's verdict."""
    by_key = {_key(row): row for row in scored}
    missing = [row for row in rows if _key(row) not in by_key]
    if missing or len(scored) != len(rows):
        raise ValueError(
            f"{path}: {len(scored)} rows, but samples.jsonl beside it has {len(rows)}"
            + (f", among them {_key(missing[0])[0]}" if missing else "")
        )
    out = []
    for row in rows:
        new = by_key[_key(row)]
        final = bool(new["correct"] if "correct" in new else new["final_correct"])
        out.append({**row, **new, "final_correct": final, "correct": final})
    return out
