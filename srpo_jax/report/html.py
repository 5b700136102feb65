"""What the HTML pages share: one template, thumbnails, and how a problem is shown.

A page stands alone (images as data URLs, no request leaves it; without JavaScript it is a list to
read) and treats every text as foreign: all of it is escaped, and a policy in its head lets only the
page's own script run.
"""

import base64
import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from srpo_jax.data.images import to_rgb
from srpo_jax.data.prompts import letter
from srpo_jax.rewards.answers import choice_indices

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals["file"] = lambda name: (Path(__file__).parent / name).read_text("utf-8")
_TEMPLATES.filters["sha256"] = lambda text: base64.b64encode(
    hashlib.sha256(text.encode()).digest()
).decode()


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder, which extends ``base.html.jinja``.

    The base shows ``title`` and, where the template has no ``main`` of its own, ``items``: each
    the fields of `problem`, and name, note, data
    (attributes of its article), badges [(text, "good" | "bad" | "mixed" | "")] and rounds
    [(heading, right | wrong | None, [(kind, text)])].
    """
    # A model can write a zero byte, which may not stand in a page.
    return _TEMPLATES.get_template(template).render(**values).replace("\0", "\ufffd")


def problem(
    question: str,
    choices: Sequence[Any],
    gold: str,
    images: Callable[[], Iterable[Image.Image]],
    side: int,
) -> dict[str, Any]:
    """The fields of a problem: images as thumbnails, choices lettered and the right ones marked.

    Args:
        question, choices, gold: of the problem.
        images: gives its pictures; where it raises ValueError or OSError, the reason stands in
            their place.
        side: pixels of a thumbnail's longer side.
    """
    texts = [str(choice) for choice in choices]
    right = choice_indices(gold, texts) or () if texts else ()
    return {
        "question": question,
        "gold": gold,
        "choices": [
            (letter(n) if n < 26 else str(n + 1), text, n in right) for n, text in enumerate(texts)
        ],
        **pictures_of(images, side),
    }


def pictures_of(images: Callable[[], Iterable[Image.Image]], side: int) -> dict[str, Any]:
    """``images`` as [(thumbnail, width, height)], and ``image_fault``: why there are none, or None.

    Arguments as for `problem`.
    """
    try:
        shown = [(thumbnail(image, side), *image.size) for image in images()]
    except (ValueError, OSError) as error:
        return {"images": [], "image_fault": str(error)}
    return {"images": shown, "image_fault": None}


def thumbnail(image: Image.Image, side: int) -> str:
    """An image of at most ``side`` pixels as a data URL: PNG, or JPEG where that is smaller."""
    small = to_rgb(image)
    small.thumbnail((side, side))
    texts = []
    for form, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 85})):
        buffer = io.BytesIO()
        small.save(buffer, form, **options)
        data = base64.b64encode(buffer.getvalue()).decode()
        texts.append(f"data:image/{form.lower()};base64,{data}")
    return min(texts, key=len)
