"""One HTML page of evaluated items: image, question, gold, both rounds, verdicts; filterable."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from srpo_jax.benchmarks.common import first
from srpo_jax.report.html import problem, render
from srpo_jax.report.verdict import Verdict

Item = dict[str, Any]
Images = Callable[[Item], Iterable[Image.Image]]

LIMIT = 500  # items on a page
THUMBNAIL = 384  # pixels of the longer side
ROUNDS = (
    ("First round", (("think", "first_think"), ("answer", "first_answer"))),
    ("Reflection", (("reflection", "reflection"),)),
    ("Second round", (("think", "second_think"), ("answer", "second_answer"))),
)
_SHOWN = ("extraction", "prediction", "no_answer", "mode", "tokens", "first_confidence")
TAGS = {  # -> kind of badge
    "right": "good",
    "wrong": "bad",
    "fixed": "good",
    "harmed": "bad",
    "no answer": "mixed",
    "truncated": "mixed",
}


def page(
    items: Sequence[Item],
    images: Images | None = None,
    *,
    verdicts: Mapping[str, Verdict] | None = None,
    limit: int = LIMIT,
    seed: int = 0,
) -> str:
    """The page as text.

    Args:
        items: rows of ``samples.jsonl`` or ``scored.jsonl``. Shown where they are there: prompt or
            question, choices, gold or answer, blocks, response, extraction, prediction,
            first_correct, final_correct or correct, no_answer, truncated, tokens, evaluation,
            benchmark, mode and ``categories`` ({table: groups}).
        images: the pictures of an item. Where it raises ValueError or OSError, the reason stands
            in the picture's place.
        verdicts: do the reflections help, by evaluation.
        limit: so many items at most, drawn at random and shown in their order.
        seed: of the draw.
    """
    chosen = sorted(random.Random(seed).sample(range(len(items)), min(limit, len(items))))
    groups: dict[str, int] = {}
    shown = [_view(items[index], images, groups) for index in chosen]
    counts = {tag: sum((tag, TAGS[tag]) in item["badges"] for item in shown) for tag in TAGS}
    return render(
        "eval_page.html.jinja",
        title="Evaluated items",
        items=shown,
        total=len(items),
        counts=counts,
        verdicts=verdicts or {},
        groups=sorted(groups.items()),
    )


def tags(item: Item) -> list[str]:
    """Those of TAGS that hold for an item.

    "no answer": the rule found none, or, for a row that no rule scored, there is no answer block.
    """
    final = bool(item.get("final_correct", item.get("correct")))
    out = ["right" if final else "wrong"]
    before = item.get("first_correct")
    if before is not None and bool(before) != final:
        out.append("fixed" if final else "harmed")
    missing = "mode" not in item and "final_answer" in item and item["final_answer"] is None
    if item.get("no_answer") or missing:
        out.append("no answer")
    if item.get("truncated"):
        out.append("truncated")
    return out


def _view(item: Item, images: Images | None, groups: dict[str, int]) -> Item:
    """What the template shows of an item; new categories are numbered in ``groups``."""
    names = [f"{key}: {item[key]}" for key in ("evaluation", "benchmark") if item.get(key)]
    for table, members in (item.get("categories") or {}).items():
        names += [f"{table}: {member}" for member in members]
    blocks = {name: text for name, text in (item.get("blocks") or {}).items() if text is not None}
    # A response that the blocks do not cover must be seen as a whole.
    whole = not blocks or not item.get("format_ok", True)
    verdicts = item.get("first_correct"), None, item.get("final_correct", item.get("correct"))
    rounds = [
        (heading, verdict, [(kind, blocks.get(name)) for kind, name in parts])
        for verdict, (heading, parts) in zip(verdicts, ROUNDS, strict=True)
    ]
    sample = f", sample {item['sample']}" if item.get("sample") else ""
    own = tags(item)
    numbers = [str(groups.setdefault(name, len(groups))) for name in names]
    return problem(
        str(first(item, "prompt", "question", "problem", default="")),
        item.get("choices") or (),
        str(first(item, "gold", "answer", default="")),
        lambda: images(item) if images else (),
        THUMBNAIL,
    ) | {
        "name": f"{item.get('id', '')}{sample}",
        "note": "; ".join(names),
        "badges": [(tag, TAGS[tag]) for tag in own],
        "data": {"data-tags": "|".join(own), "data-groups": "|".join(numbers)},
        "rounds": rounds if blocks else [],
        "response": item.get("response") if whole else None,
        "scored": "extraction" in item,
        **{key: item.get(key) for key in _SHOWN},
    }
