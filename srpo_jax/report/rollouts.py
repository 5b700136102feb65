"""The files of rollouts/ as compressed parts of groups, and an index by which they are found.

A page of 10^5 completions must neither be drawn at once nor parsed at once: the index has a few
numbers of each group, and its part is unpacked only where these fit what is looked for.
"""

import base64
import functools
import gzip
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from srpo_jax.data.buckets import open_bytes
from srpo_jax.data.files import AnyPath, absolute, numbered_jsonl
from srpo_jax.report.html import pictures_of

Row = dict[str, Any]
Pictures = Callable[[int, Row], Iterable[Image.Image]]  # (number of the run, row) -> its images

SAMPLES = 100_000  # on a page, at most
PICTURES = 1000  # problems shown with their images, at most
PART = 64  # groups that are unpacked together
THUMBNAIL = 256  # pixels of the longer side
_OF_GROUP = ("step", "round", "id", "gold", "question", "choices", "source", "images")
_OF_SAMPLE = (
    "sample", "completion", "tokens", "first_answer", "final_answer", "first_correct",
    "final_correct", "format_ok", "finished", "reflection_ok", "block_tokens", "total", "advantage",
    "weight", "no_reward",
)  # fmt: skip
_NO_TERM = {*_OF_GROUP, *_OF_SAMPLE, "origin", "rest_advantage"}


@dataclass
class Packed:
    """Groups as the page holds them; group i stands in part i // PART."""

    # A list for each of run, step, changes (bit 2 * first right + final right of each sample),
    # low and high (of the reward), short and long (in tokens): one number a group.
    index: dict[str, list[Any]] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)  # base64 of gzip of JSON
    pictures: dict[int, dict[str, Any]] = field(default_factory=dict)  # of problems that have some
    shown: int = 0  # samples
    total: int = 0  # samples in the files


def pack(folders: Sequence[AnyPath], pictures: Pictures, *, samples: int, problems: int) -> Packed:
    """The rollouts of runs.

    Args:
        folders: of each run, its rollouts/; it need not be there.
        pictures: images of a row. Where it raises ValueError or OSError, the reason stands in
            their place.
        samples: at most, of all runs together; of more, every n-th group is taken.
        problems: shown with their images, at most; of more, every n-th.
    """
    out, waiting = Packed(), []
    seen: dict[tuple[int, str], tuple[int, Row]] = {}  # problem -> its place, what names its images
    files = [_files(folder) for folder in folders]
    out.total = sum(_lines(path) for paths in files for path in paths)
    number, each = 0, -(-out.total // samples) if samples else 0
    for run, paths in enumerate(files if samples else ()):
        for rows in (group for path in paths for group in _groups(path)):
            number += 1
            if (number - 1) % each:
                continue
            out.shown += len(rows)
            group, head = {"run": run} | _group(rows), rows[0]
            if head.get("images"):
                named = {name: head[name] for name in ("images", "origin")}
                group["picture"] = seen.setdefault((run, head["origin"]), (len(seen), named))[0]
            _note(out.index, group)
            waiting.append(group)
            if len(waiting) == PART:
                out.parts.append(_compressed(waiting))
                waiting = []
    if waiting:
        out.parts.append(_compressed(waiting))
    every = -(-len(seen) // problems) if seen and problems else 1
    for (run, _), (place, named) in [*seen.items()][::every] if problems else ():
        images = functools.partial(pictures, run, named)
        out.pictures[place] = pictures_of(images, THUMBNAIL)
    return out


def _files(folder: AnyPath) -> Sequence[AnyPath]:
    """In the order of steps: 000001.jsonl, or 000001.0.jsonl and more of several processes."""
    path = absolute(folder)
    return sorted(path.glob("*.jsonl")) if path.exists() else []


def _lines(path: AnyPath) -> int:
    with open_bytes(path) as file:
        return sum(1 for line in file if line.strip())


def _groups(path: AnyPath) -> Iterator[list[Row]]:
    """The rows of a file by the group they belong to; groups stand one behind the other."""
    rows: list[Row] = []
    for _, row in numbered_jsonl(path):
        same = rows and all(row.get(name) == rows[0].get(name) for name in ("step", "round", "id"))
        # A problem that is drawn twice in a round begins anew.
        if rows and not (same and row["sample"] > rows[-1]["sample"]):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _group(rows: list[Row]) -> dict[str, Any]:
    """One group: what its samples share, and each sample with its reward terms."""
    return {name: rows[0][name] for name in _OF_GROUP if name in rows[0]} | {
        "samples": [
            {name: _short(row[name]) for name in _OF_SAMPLE if name in row}
            | {"terms": {name: _short(row[name]) for name in row if _is_term(name, row[name])}}
            for row in rows
        ]
    }


def _is_term(name: str, value: Any) -> bool:
    return name not in _NO_TERM and isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> Any:
    """A float with five digits; None where it is not finite, which JSON does not have."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _note(index: dict[str, list[Any]], group: dict[str, Any]) -> None:
    """Add a group to the index."""
    samples = group["samples"]
    totals, tokens = [s["total"] or 0.0 for s in samples], [s["tokens"] for s in samples]
    changes = {1 << (2 * s["first_correct"] + s["final_correct"]) for s in samples}
    found = {"run": group["run"], "step": group["step"], "changes": sum(changes)}
    found |= {"low": min(totals), "high": max(totals), "short": min(tokens), "long": max(tokens)}
    for name, value in found.items():
        index.setdefault(name, []).append(value)


def _compressed(groups: list[dict[str, Any]]) -> str:
    text = json.dumps(groups, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate is no text, and a model's bytes may have become one.
    data = text.encode("utf-8", "replace")
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()
