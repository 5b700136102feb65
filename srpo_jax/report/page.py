"""One HTML page of evaluated items: image, question, gold, both rounds, verdicts; filterable.

The page holds everything it shows and asks no other host for anything; without JavaScript it is a
list to read. All text of models and data is escaped.
"""

import base64
import io
import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

Item = dict[str, Any]
Images = Callable[[Item], Iterable[Image.Image]]

LIMIT = 500  # items on a page
THUMBNAIL = 384  # pixels of the longer side
ROUNDS = (
    ("first", "First round", (("think", "first_think"), ("answer", "first_answer"))),
    ("", "Reflection", (("reflection", "reflection"),)),
    ("final", "Second round", (("think", "second_think"), ("answer", "second_answer"))),
)
TAGS = ("right", "wrong", "fixed", "harmed", "no answer", "truncated")


def page(
    items: Sequence[Item],
    images: Images | None = None,
    *,
    title: str = "Evaluated items",
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
        title: of the page.
        limit: so many items at most, drawn at random and shown in their order.
        seed: of the draw.
    """
    chosen = sorted(random.Random(seed).sample(range(len(items)), min(limit, len(items))))
    groups: dict[str, int] = {}
    shown = [_view(items[index], images, groups) for index in chosen]
    counts = {tag: sum(tag in item["tags"] for item in shown) for tag in TAGS}
    return _template().render(
        title=title,
        items=shown,
        total=len(items),
        counts=counts,
        groups=sorted(groups.items()),
        rounds=ROUNDS,
    )


def tags(item: Item) -> list[str]:
    """Those of TAGS that hold for an item.

    "no answer": the rule found none, or, for a row that no rule scored, there is no answer block.
    """
    final = bool(item["final_correct"] if "final_correct" in item else item.get("correct"))
    out = ["right" if final else "wrong"]
    first = item.get("first_correct")
    if first is not None and bool(first) != final:
        out.append("fixed" if final else "harmed")
    missing = "mode" not in item and "final_answer" in item and item["final_answer"] is None
    if item.get("no_answer") or missing:
        out.append("no answer")
    if item.get("truncated"):
        out.append("truncated")
    return out


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> str:
    """An image of at most ``side`` pixels as a data URL: PNG, or JPEG where that is smaller."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    texts = []
    for form, options in (("PNG", {}), ("JPEG", {"quality": 80})):
        buffer = io.BytesIO()
        small.save(buffer, form, **options)
        data = base64.b64encode(buffer.getvalue()).decode()
        texts.append(f"data:image/{form.lower()};base64,{data}")
    return min(texts, key=len)


def _view(item: Item, images: Images | None, groups: dict[str, int]) -> Item:
    """What the template shows of an item; new categories are numbered in ``groups``."""
    pictures, fault = [], None
    if images is not None:
        try:
            pictures = [(thumbnail(image), image.size) for image in images(item)]
        except (ValueError, OSError) as error:
            fault = str(error)
    names = [f"{key}: {item[key]}" for key in ("evaluation", "benchmark") if item.get(key)]
    for table, members in (item.get("categories") or {}).items():
        names += [f"{table}: {member}" for member in members]
    blocks = {name: text for name, text in (item.get("blocks") or {}).items() if text is not None}
    # A response that the blocks do not cover must be seen as a whole.
    whole = not blocks or not item.get("format_ok", True)
    final = item["final_correct"] if "final_correct" in item else item.get("correct")
    return {
        "id": str(item.get("id", "")),
        "sample": item.get("sample") or 0,
        "tags": tags(item),
        "categories": names,
        "groups": [groups.setdefault(name, len(groups)) for name in names],
        "images": pictures,
        "image_fault": fault,
        "question": _first(item, "prompt", "question", "problem"),
        "choices": list(item.get("choices") or ()),
        "gold": _first(item, "gold", "answer"),
        "blocks": blocks,
        "response": item.get("response") if whole else None,
        "verdicts": {"first": item.get("first_correct"), "final": final},
        "extraction": item.get("extraction"),
        "prediction": item.get("prediction"),
        "scored": "extraction" in item,
        "no_answer": item.get("no_answer"),
        "mode": item.get("mode"),
        "tokens": item.get("tokens"),
        "confidence": item.get("first_confidence"),
    }


def _first(item: Item, *names: str) -> str:
    return next((str(item[name]) for name in names if item.get(name) is not None), "")


@lru_cache(maxsize=1)
def _template():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")
