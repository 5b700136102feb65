"""One HTML page of random reflection items, to be read by a person: both rounds, reasons, gold."""

import random
import re
from collections import Counter
from typing import Any

from srpo_jax.data.errors import RecordError
from srpo_jax.data.images import load_image
from srpo_jax.reflection.items import Items
from srpo_jax.reflection.store import Store
from srpo_jax.report.html import problem, render

THUMBNAIL = 512  # pixels of an image's longer side
_CHECKED = (
    "SELECT s.item FROM results s WHERE s.stage = 'select' AND s.ok AND EXISTS (SELECT 1 FROM "
    "results r WHERE r.stage = 'reflect' AND r.item = s.item) AND {} EXISTS (SELECT 1 FROM "
    "results c WHERE c.stage = 'check' AND c.ok AND c.item = s.item) ORDER BY s.item"
)


def items_to_show(
    store: Store, items: Items, number: int, rng: random.Random
) -> list[dict[str, Any]]:
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
        "attempt": store.first_attempt(item).data,
        "reflection": reply.get("reflection", reply.get("text", "")),
        "second_think": reply.get("second_think", ""),
        "second_answer": reply.get("second_answer", ""),
        "accepted": good is not None,
        "reasons": reasons,
        "teacher": reply.get("model", ""),
    }


def page(items: list[dict[str, Any]], title: str, summary: dict[str, Any]) -> str:
    """The page as text.

    Args:
        items: of `items_to_show`. A reason may begin with "try 2: "; the filters leave that out.
        title: of the page.
        summary: what stands at its head, name -> number or text.

    Raises:
        KeyError: an item without one of the parts.
    """
    kinds = [
        list(dict.fromkeys(re.sub(r"^try \d+: ", "", reason) for reason in item["reasons"]))
        for item in items
    ]
    reasons = Counter(reason for own in kinds for reason in own).most_common()
    tags = {reason: f"reason-{n}" for n, (reason, _) in enumerate(reasons)}
    accepted = sum(item["accepted"] for item in items)
    filters = [("all", "all", len(items)), ("accepted", "accepted", accepted)]
    filters += [("rejected", "rejected", len(items) - accepted)]
    filters += [(tags[reason], reason, count) for reason, count in reasons]
    return render(
        "reflection_page.html.jinja",
        title=title,
        summary={name: _value(value) for name, value in summary.items()},
        items=[
            _view(item, [tags[reason] for reason in own])
            for item, own in zip(items, kinds, strict=True)
        ],
        filters=filters,
    )


def _view(item: dict[str, Any], tags: list[str]) -> dict[str, Any]:
    """What the template shows of an item."""
    state, kind = ("accepted", "") if item["accepted"] else ("rejected", "bad")
    attempt, texts = item["attempt"], [("think", item["second_think"] or None)]
    if item["second_answer"]:
        texts.append(("answer", item["second_answer"]))
    rounds = [
        ("First attempt", attempt["correct"],
         [("think", attempt["think"] or None), ("answer", attempt["answer"])]),
        ("Reflection", None, [("reflection", item["reflection"] or None)]),
        ("Second attempt", None, texts),
    ]  # fmt: skip
    return problem(
        item["question"], item["choices"], item["answer"], lambda: item["images"], THUMBNAIL
    ) | {
        "name": item["id"],
        "note": item["teacher"],
        "badges": [(state, kind or "good"), *((reason, kind) for reason in item["reasons"])],
        "data": {"data-tags": " ".join(["all", state, *tags])},
        "rounds": rounds if item["second_think"] or item["second_answer"] else rounds[:2],
    }


def _value(value: Any) -> str:
    """A value of the summary as text, numbers with separators."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(part)}" for name, part in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
