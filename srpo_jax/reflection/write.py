"""Accepted items -> data sets in both targets, split by image, with a data card."""

import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from srpo_jax import __version__
from srpo_jax.data.fields import Record
from srpo_jax.data.files import jsonl_writer, numbered_jsonl, whole, write_json, write_text
from srpo_jax.data.images import ImageRef, image_bytes
from srpo_jax.data.records import write_array_record
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
    mix, sources, splits = Counter(), Counter(), Counter()
    with contextlib.ExitStack() as stack:
        writers = {
            (t, s): stack.enter_context(jsonl_writer(out / f"{t}_{s}.jsonl"))
            for t in targets
            for s in SPLITS
        }
        for record, row in _accepted(store, items, out):
            split = split_of(record, settings.validation_share, settings.seed)
            splits[split] += 1
            sources[record.source] += 1
            mix["right" if row["first_correct"] else "wrong"] += 1
            for name in ("first_think", "reflection", "second_think"):
                if row[name]:
                    lengths[name].append(count(row[name]))
            # The paper's target has one think, and the gold as second answer.
            paper = {"target": "paper", "second_think": "", "second_answer": record.answer}
            for target in targets:
                writers[target, split](row | paper if target == "paper" else row)
    for target, split in writers:
        _array_record(out, target, split)
    card = make_card(store, settings, mix, sources, splits, lengths)
    write_json(out / "card.json", card)
    write_text(out / "card.md", card_text(card))
    say(f"{sum(splits.values())} items -> {out} ({dict(splits)}, first attempts {dict(mix)})")
    return card


def _accepted(store: Store, items: Items, out: Path) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Every accepted item: its record, and its line of the data set that is aligned with RL."""
    seen: set[str] = set()
    for item, trial in list(store.query(ACCEPTED)):
        record, attempt = items[item], store.first_attempt(item)
        first, reply = attempt.data, store.result("reflect", item, trial).data
        name = record.id if record.id not in seen else f"{record.id}#{item}"
        seen.add(name)
        yield (
            record,
            {
                "id": name,
                "problem": record.question,
                "answer": record.answer,
                "images": [copy_image(ref, out / "images") for ref in record.images],
                "choices": list(record.choices),
                "source": record.source,
                "target": "rl_aligned",
                "first_think": first["think"],
                "first_answer": first["answer"],
                "first_correct": bool(first["correct"]),
                "reflection": reply["reflection"],
                "second_think": reply.get("second_think", ""),
                "second_answer": reply.get("second_answer", ""),
                "teacher": reply["model"],
                "policy": store.result("attempt", item, attempt.trial).data["model"],
            },
        )


def copy_image(ref: ImageRef, folder: Path) -> str:
    """Put an image's own bytes into ``folder`` under their hash; returns its path in the data set.

    Copies beside the data set make it complete: it can be moved, and needs no data root.
    """
    data = image_bytes(ref)
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
    data = image_bytes(record.images[0]) if record.images else record.question.encode()
    digest = hashlib.sha256(f"{seed}:split:".encode() + data).digest()
    return SPLITS[int.from_bytes(digest[:8]) < validation_share * 2**64]


def _array_record(out: Path, target: str, split: str) -> None:
    """The same rows with the image bytes inside."""

    def rows() -> Iterator[dict[str, Any]]:
        for _, row in numbered_jsonl(out / f"{target}_{split}.jsonl"):
            images = [{"bytes": (out / i).read_bytes(), "path": i} for i in row["images"]]
            yield row | {"images": images}

    write_array_record(out / f"{target}_{split}.array_record", rows())


# ------------------------------------------------------------------------------------ the card


def tally(store: Store) -> dict[str, Any]:
    """Of every stage: usable results, reasons of the others, tokens, USD and errors."""
    return {stage: _tally(store, stage) for stage in STAGES}


def _tally(store: Store, stage: str) -> dict[str, Any]:
    totals = store.query(
        "SELECT SUM(ok), SUM(prompt_tokens), SUM(completion_tokens), ROUND(TOTAL(cost), 6) "
        "FROM results WHERE stage = ?",
        (stage,),
    )
    reasons = store.query(
        "SELECT reason, COUNT(*) FROM results WHERE stage = ? AND NOT ok GROUP BY reason", (stage,)
    )
    errors = store.query("SELECT kind, count FROM errors WHERE stage = ?", (stage,))
    ok, before, after, cost = next(totals)
    return {
        "ok": ok or 0,
        "reasons": dict(sorted(reasons)),
        "prompt_tokens": before or 0,
        "completion_tokens": after or 0,
        "cost": cost,
        "errors": dict(sorted(errors)),
    }


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
        "srpo_jax": __version__,
    }  # fmt: skip


def _spread(values: list[int]) -> dict[str, float]:
    """Mean and percentiles of lengths."""
    cuts = np.percentile(values, [5, 50, 95])
    return {
        "mean": round(float(np.mean(values)), 1),
        **dict(zip(("p5", "median", "p95"), cuts.tolist(), strict=True)),
        "max": max(values),
    }


def card_text(card: dict[str, Any]) -> str:
    """The card in Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.jinja").render(card=card)
