"""Random accepted and rejected items, as the inspection page shows them."""

import random
from typing import Any

from srpo_jax.data.records import RecordError, load_image
from srpo_jax.reflection.items import Items
from srpo_jax.reflection.stages import attempt_of
from srpo_jax.reflection.store import Store

_CHECKED = (
    "SELECT s.item FROM results s WHERE s.stage = 'select' AND s.ok AND EXISTS (SELECT 1 FROM "
    "results r WHERE r.stage = 'reflect' AND r.item = s.item) AND {} EXISTS (SELECT 1 FROM "
    "results c WHERE c.stage = 'check' AND c.ok AND c.item = s.item) ORDER BY s.item"
)


def items_to_show(store: Store, items: Items, number: int, rng: random.Random) -> list[dict]:
    """Up to ``number`` items, half of them accepted where there are enough of both kinds."""
    accepted = [item for (item,) in store.query(_CHECKED.format(""))]
    rejected = [item for (item,) in store.query(_CHECKED.format("NOT"))]
    half = min(len(rejected), number // 2)
    good = rng.sample(accepted, min(len(accepted), number - half))
    bad = rng.sample(rejected, min(len(rejected), number - len(good)))
    return [_shown(store, items, item) for item in sorted(good + bad)]


def _shown(store: Store, items: Items, item: int) -> dict[str, Any]:
    """One item: the accepted reply, or the last one, with the reasons of all rejected tries."""
    replies = store.results("reflect", item)
    checks = {check.trial: check for check in store.results("check", item)}
    good = next((r for r in replies if r.trial in checks and checks[r.trial].ok), None)
    reply = (good or replies[-1]).data
    reasons = [
        f"try {r.trial + 1}: {reason}"
        for r in replies
        if (reason := r.reason or (checks[r.trial].reason if r.trial in checks else "not checked"))
    ]
    attempt = attempt_of(store, item, store.results("select", item)[0].data["sample"])
    record = items[item]
    try:
        images = [load_image(ref) for ref in record.images]
    except RecordError:
        images = []
    return {
        "id": record.id,
        "question": record.question,
        "choices": list(record.choices),
        "answer": record.answer,
        "images": images,
        "attempt": attempt,
        "reflection": reply.get("reflection", reply.get("text", "")),
        "second_think": reply.get("second_think", ""),
        "second_answer": reply.get("second_answer", ""),
        "accepted": good is not None,
        "reasons": reasons,
        "teacher": reply.get("model", ""),
    }
