"""Accepted items -> data sets in both targets, split by image, with a data card."""

import contextlib
import hashlib
import importlib.metadata
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from srpo_jax.data.files import jsonl_writer, whole, write_json, write_text
from srpo_jax.data.images import ImageRef, resolve_path
from srpo_jax.data.records import Record, write_array_record
from srpo_jax.reflection import teach
from srpo_jax.reflection.items import Items
from srpo_jax.reflection.settings import Settings
from srpo_jax.reflection.stages import token_counter
from srpo_jax.reflection.store import STAGES, Store

SPLITS = ("train", "validation")
ACCEPTED = (
    "SELECT c.item, MIN(c.try) FROM results c WHERE c.stage = 'check' AND c.ok "
    "GROUP BY c.item ORDER BY c.item"
)


def export(
    store: Store, items: Items, settings: Settings, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write everything accepted so far to ``out`` and return the data card.

    ``out`` holds images/, <target>_<split>.jsonl and .array_record for the targets that can be
    built, card.json and card.md. Files are replaced whole, one by one.
    """
    targets = ("rl_aligned", "paper") if settings.target == "rl_aligned" else ("paper",)
    count = token_counter(settings.tokenizer)
    lengths: dict[str, list[int]] = defaultdict(list)
    mix: Counter = Counter()
    sources: Counter = Counter()
    splits: Counter = Counter()
    seen: set[str] = set()
    with contextlib.ExitStack() as stack:
        writers = {
            (t, s): stack.enter_context(jsonl_writer(out / f"{t}_{s}.jsonl"))
            for t in targets
            for s in SPLITS
        }
        for record, fields, image_files in _accepted(store, items, out, seen):
            split = split_of(record, settings.validation_share, settings.seed)
            splits[split] += 1
            sources[record.source] += 1
            mix["right" if fields["first_correct"] else "wrong"] += 1
            for name in ("first_think", "reflection", "second_think"):
                if fields.get(name):
                    lengths[name].append(count(fields[name]))
            for target in targets:
                writers[target, split](row_of(record, fields, image_files, target))
    for target, split in writers:
        _array_record(out, target, split)
    card = make_card(store, settings, mix, sources, splits, lengths)
    write_json(out / "card.json", card)
    write_text(out / "card.md", card_text(card))
    say(f"{sum(splits.values())} items -> {out} ({dict(splits)}, first attempts {dict(mix)})")
    return card


def _accepted(
    store: Store, items: Items, out: Path, seen: set[str]
) -> Iterator[tuple[Record, dict[str, Any], list[str]]]:
    """Record, reflection fields and image files of every accepted item."""
    for item, trial in list(store.query(ACCEPTED)):
        record = items[item]
        attempt = store.first_attempt(item)
        first, reply = attempt.data, store.result("reflect", item, trial).data
        tried = store.result("attempt", item, attempt.trial).data
        fields = {
            "first_think": first["think"],
            "first_answer": first["answer"],
            "first_correct": bool(first["correct"]),
            "reflection": reply["reflection"],
            "second_think": reply.get("second_think", ""),
            "second_answer": reply.get("second_answer", ""),
            "teacher": reply["model"],
            "policy": tried["model"],
        }
        name = record.id if record.id not in seen else f"{record.id}#{item}"
        seen.add(name)
        fields["id"] = name
        yield record, fields, [copy_image(ref, out / "images") for ref in record.images]


def row_of(
    record: Record, fields: dict[str, Any], images: list[str], target: str
) -> dict[str, Any]:
    """One line of a data set; the paper's target has one think, and the gold as second answer."""
    row = {
        "id": fields["id"],
        "problem": record.question,
        "answer": record.answer,
        "images": images,
        "choices": list(record.choices),
        "source": record.source,
        "target": target,
        **{name: value for name, value in fields.items() if name != "id"},
    }
    if target == "paper":
        row |= {"second_think": "", "second_answer": record.answer}
    return row


def copy_image(ref: ImageRef, folder: Path) -> str:
    """Put an image's own bytes into ``folder`` under their hash; returns its path in the data set.

    Copies beside the data set make it complete: it can be moved, and needs no data root.
    """
    data = _image_bytes(ref)
    suffix = Path(ref.path).suffix.lower() if ref.path else ""
    suffix = suffix if suffix[1:].isalnum() else ".img"
    name = hashlib.sha256(data).hexdigest()[:32] + suffix
    target = folder / name
    if not target.is_file():
        with whole(target) as temporary:
            temporary.write_bytes(data)
    return f"{folder.name}/{name}"


def split_of(record: Record, validation_share: float, seed: int) -> str:
    """train or validation, by the first image's bytes: an image stands in one split only."""
    data = _image_bytes(record.images[0]) if record.images else record.question.encode()
    digest = hashlib.sha256(f"{seed}:split:".encode() + data).digest()
    return SPLITS[int.from_bytes(digest[:8]) < validation_share * 2**64]


def _image_bytes(ref: ImageRef) -> bytes:
    return Path(resolve_path(ref)).read_bytes() if ref.data is None else ref.data


def _array_record(out: Path, target: str, split: str) -> None:
    """The same rows with the image bytes inside."""

    def rows() -> Iterator[dict[str, Any]]:
        with open(out / f"{target}_{split}.jsonl", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                row["images"] = [
                    {"bytes": (out / image).read_bytes(), "path": image} for image in row["images"]
                ]
                yield row

    write_array_record(out / f"{target}_{split}.array_record", rows())


# ------------------------------------------------------------------------------------ the card


def tally(store: Store) -> dict[str, Any]:
    """Counts of every stage: results, usable ones, reasons, errors, tokens and USD."""
    stages = {}
    for stage in STAGES:
        rows = store.query(
            "SELECT ok, reason, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(cost) "
            "FROM results WHERE stage = ? GROUP BY ok, reason ORDER BY ok DESC, reason",
            (stage,),
        )
        found = {"ok": 0, "reasons": {}, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
        for ok, reason, number, before, after, cost in rows:
            if ok:
                found["ok"] += number
            else:
                found["reasons"][reason] = number
            found["prompt_tokens"] += before
            found["completion_tokens"] += after
            found["cost"] += cost
        found["cost"] = round(found["cost"], 6)
        errors = store.query("SELECT kind, count FROM errors WHERE stage = ?", (stage,))
        found["errors"] = dict(sorted(errors))
        stages[stage] = found
    return stages


def account(store: Store) -> dict[str, int]:
    """Where every item stands: each is counted once, and the counts add up to the records."""
    rows = store.query(
        "SELECT CASE WHEN i.problem IS NOT NULL THEN 'unusable record' "
        "WHEN s.item IS NULL THEN 'not selected yet' WHEN NOT s.ok THEN s.reason "
        "WHEN EXISTS (SELECT 1 FROM results c WHERE c.stage = 'check' AND c.item = i.item "
        "AND c.ok) THEN 'accepted' ELSE 'chosen, not accepted' END AS state, COUNT(*) FROM items i "
        "LEFT JOIN results s ON s.stage = 'select' AND s.item = i.item GROUP BY state"
    )
    return dict(sorted(rows))


def make_card(
    store: Store,
    settings: Settings,
    mix: Counter,
    sources: Counter,
    splits: Counter,
    lengths: dict[str, list[int]],
) -> dict[str, Any]:
    """Everything one should know of the data set, as JSON."""
    total = sum(mix.values())
    prompts = teach.Prompts(settings.prompts)
    unit = "tokens" if settings.tokenizer else "characters / 4"
    models = {
        stage: [m for (m,) in store.query(
            "SELECT DISTINCT json_extract(data, '$.model') FROM results WHERE stage = ? "
            "AND json_extract(data, '$.model') IS NOT NULL ORDER BY 1", (stage,))]
        for stage in ("attempt", "judge", "reflect")
    }  # fmt: skip
    return {
        "items": total,
        "splits": dict(sorted(splits.items())),
        "sources": dict(sorted(sources.items())),
        "first_attempts": {**mix, "share_right": round(mix["right"] / total, 4) if total else None},
        "lengths": {"unit": unit, **{name: _spread(v) for name, v in sorted(lengths.items())}},
        "accounted": account(store),
        "stages": tally(store),
        "cost_usd": round(store.cost(), 6),
        "mode": settings.mode,
        "target": settings.target,
        "seed": settings.seed,
        "policy": {"models": models["attempt"], "temperature": settings.attempt_temperature,
                   "prompt": settings.attempt_prompt, "attempts": settings.attempts},
        "teacher": {"models": models["reflect"], "tries": settings.tries},
        "judge": {"models": models["judge"], "min": settings.judge_min},
        "evaluation_files": list(settings.evaluation),
        "prompts_sha256": prompts.hashes(),
        "srpo_jax": _version(),
    }  # fmt: skip


def _version() -> str:
    try:
        return importlib.metadata.version("srpo_jax")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def _spread(values: list[int]) -> dict[str, float]:
    """Mean and percentiles of lengths."""
    cuts = np.percentile(values, [5, 50, 95])
    return {
        "mean": round(float(np.mean(values)), 1),
        **{name: float(cut) for name, cut in zip(("p5", "median", "p95"), cuts, strict=True)},
        "max": int(max(values)),
    }


def card_text(card: dict[str, Any]) -> str:
    """The card in Markdown."""
    lines = ["# Reflection data set", ""]
    mix = card["first_attempts"]
    lines += [
        f"{card['items']} items ({_list(card['splits'])}), target {card['target']}, mode "
        f"{card['mode']}, seed {card['seed']}.",
        f"First attempts: {mix.get('right', 0)} right, {mix.get('wrong', 0)} wrong.",
        f"Policy: {', '.join(card['policy']['models'])}; teacher: "
        f"{', '.join(card['teacher']['models'])}; cost ${card['cost_usd']:.2f}.",
        "",
        "| source | items |",
        "|---|---|",
        *(f"| {name} | {number} |" for name, number in card["sources"].items()),
        "",
        f"| length in {card['lengths']['unit']} | mean | p5 | median | p95 | max |",
        "|---|---|---|---|---|---|",
    ]
    for name, spread in card["lengths"].items():
        if isinstance(spread, dict):
            lines.append(f"| {name} | " + " | ".join(f"{v:g}" for v in spread.values()) + " |")
    lines += ["", "| where every record ended | records |", "|---|---|"]
    lines += [f"| {state} | {number} |" for state, number in card["accounted"].items()]
    lines += ["", "| stage | usable | not usable, by reason |", "|---|---|---|"]
    for stage, found in card["stages"].items():
        if found["ok"] or found["reasons"]:
            lines.append(f"| {stage} | {found['ok']} | {_list(found['reasons']) or '-'} |")
    lines += ["", "| prompt file | SHA-256 |", "|---|---|"]
    lines += [f"| {name} | {digest} |" for name, digest in card["prompts_sha256"].items()]
    return "\n".join(lines) + "\n"


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())
