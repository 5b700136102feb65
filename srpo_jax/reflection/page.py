"""One HTML page of reflection items, to be read by a person: both rounds, reasons, gold, images.

The page stands alone (images as data URLs, no request leaves it) and treats every text as foreign:
all of it is escaped, and a policy in its head lets only the page's own script run.
"""

import base64
import hashlib
import io
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from srpo_jax.data.files import write_text
from srpo_jax.data.images import to_rgb
from srpo_jax.data.prompts import letter
from srpo_jax.rewards.answers import choice_indices

THUMBNAIL = 512  # pixels of an image's longer side

# Filter buttons show the items that carry the button's tag; without it the page shows everything.
_SCRIPT = """
const bar = document.getElementById("filters");
const shown = document.getElementById("shown");
const items = [...document.querySelectorAll("article")];
bar.hidden = false;
bar.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  let count = 0;
  for (const item of items) {
    item.hidden = !item.dataset.tags.split(" ").includes(button.dataset.tag);
    count += !item.hidden;
  }
  for (const other of bar.querySelectorAll("button"))
    other.setAttribute("aria-pressed", String(other === button));
  shown.textContent = count + " of " + items.length + " items";
});
"""


def write_page(
    path: str | os.PathLike, items: list[dict[str, Any]], title: str, summary: dict[str, Any]
) -> None:
    """Write the page of ``items``.

    Args:
      items: {"id", "question", "choices", "answer", "images": [PIL image], "attempt": {"think",
        "answer", "correct"}, "reflection", "second_think", "second_answer", "accepted", "reasons",
        "teacher"}. A reason may begin with "try 2: "; the filters leave that out.
      summary: what stands at the head of the page, name -> number or text.

    Raises:
      KeyError: an item without one of these.
    """
    shown = [_prepared(item) for item in items]
    reasons = Counter(reason for item in shown for reason in item["kinds"])
    names = {reason: f"reason-{n}" for n, (reason, _) in enumerate(reasons.most_common())}
    for item in shown:
        state = "accepted" if item["accepted"] else "rejected"
        item["tags"] = " ".join(["all", state, *(names[reason] for reason in item["kinds"])])
    accepted = sum(item["accepted"] for item in shown)
    filters = [("all", "all", len(shown)), ("accepted", "accepted", accepted)]
    filters += [("rejected", "rejected", len(shown) - accepted)]
    filters += [(names[reason], reason, count) for reason, count in reasons.most_common()]
    html = _template().render(
        title=title,
        summary=[(name, _value(value)) for name, value in summary.items()],
        items=shown,
        filters=filters,
        script=_SCRIPT,
        script_hash=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
    )
    # A model can write a zero byte, which may not stand in a page.
    write_text(path, html.replace("\0", "\ufffd"))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _prepared(item: dict[str, Any]) -> dict[str, Any]:
    """An item with its images as data URLs, its choices lettered and its reasons without counts."""
    choices = [str(choice) for choice in item["choices"] or ()]
    right = choice_indices(str(item["answer"]), choices) or () if choices else ()
    kinds = [re.sub(r"^try \d+: ", "", reason) for reason in item["reasons"]]
    return {
        **item,
        "images": [_data_url(image) for image in item["images"]],
        "choices": [
            (letter(n) if n < 26 else str(n + 1), text, n in right)
            for n, text in enumerate(choices)
        ],
        "kinds": list(dict.fromkeys(kinds)),
    }


def _data_url(image: Image.Image) -> str:
    """A thumbnail as a data URL: PNG or JPEG, whichever is smaller."""
    image = to_rgb(image)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = []
    for name, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        encoded.append((len(buffer.getvalue()), name.lower(), buffer.getvalue()))
    _, name, data = min(encoded)
    return f"data:image/{name};base64,{base64.b64encode(data).decode()}"


def _value(value: Any) -> str:
    """A value of the summary as text, numbers with separators."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(part)}" for name, part in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
