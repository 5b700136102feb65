"""What is asked of policy, judge and teacher."""

import base64
import hashlib
import io
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from PIL import Image

from srpo_jax.data.fields import Record
from srpo_jax.data.images import load_image
from srpo_jax.data.prompts import MESSAGES, question_text, split_at_marks
from srpo_jax.reflection.settings import Settings
from srpo_jax.remote.protocol import Request
from srpo_jax.remote.replies import object_schema

PACKAGE_PROMPTS = Path(__file__).parent / "prompts"
FIELDS = {
    "rl_aligned": ("reflection", "second_think", "second_answer"),
    "paper": ("reflection",),
}
IMAGE_FACTOR = 28  # pixels of a merged vision token's side

# ------------------------------------------------------------------------------------- images


def sent_size(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) at which the policy sees an image: whole merged tokens, area in the limits.

    transformers' ``smart_resize``, written out since importing it takes seconds and 300 MiB.
    """
    sides = [round(side / IMAGE_FACTOR) * IMAGE_FACTOR for side in (width, height)]
    area = sides[0] * sides[1]
    if area > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        sides = [math.floor(side / scale / IMAGE_FACTOR) for side in (width, height)]
        sides = [max(1, side) * IMAGE_FACTOR for side in sides]
    elif area < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        sides = [math.ceil(side * scale / IMAGE_FACTOR) * IMAGE_FACTOR for side in (width, height)]
    return sides[0], sides[1]


def data_url(image: Image.Image, min_pixels: int, max_pixels: int) -> str:
    """An image at the size that the policy sees, as a PNG data URL."""
    size = sent_size(*image.size, min_pixels, max_pixels)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def image_parts(record: Record, settings: Settings) -> list[dict]:
    """The images of a record as parts of a message."""
    return [
        {
            "type": "image_url",
            "image_url": {
                "url": data_url(load_image(ref), settings.min_pixels, settings.max_pixels)
            },
        }
        for ref in record.images
    ]


def request_seed(seed: int, stage: str, item: int, trial: int) -> int:
    """A seed of 31 bits for one request: equal in every run, different for every try."""
    digest = hashlib.sha256(f"{seed}:{stage}:{item}:{trial}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


# ------------------------------------------------------------------------------------ prompts


class Prompts:
    """The prompt files, ours or those of a folder."""

    def __init__(self, folder: str = ""):
        """ValueError where ``folder`` is no directory or lacks a file."""
        self.folder = Path(folder) if folder else PACKAGE_PROMPTS
        self.names = sorted(p.name for p in PACKAGE_PROMPTS.glob("*.jinja"))
        missing = [name for name in self.names if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(f"{self.folder}: no {', '.join(missing)}")
        self._environment = Environment(
            loader=FileSystemLoader(self.folder), undefined=StrictUndefined, autoescape=False
        )

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every prompt file by name."""
        return {
            name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            for name in self.names
        }

    def render(self, name: str, **values: Any) -> str:
        """A prompt with its variables; ValueError naming the file where that fails."""
        try:
            return self._environment.get_template(f"{name}.jinja").render(**values).strip()
        except TemplateError as error:
            raise ValueError(f"{self.folder / name}.jinja: {error}") from None


# ----------------------------------------------------------------------------------- requests


def attempt_request(record: Record, item: int, trial: int, settings: Settings) -> Request:
    """The policy's request: the template's own prompt with the images at their places."""
    messages = MESSAGES[settings.attempt_prompt](record.question, record.images, record.choices)
    images = iter(image_parts(record, settings))
    user = messages[-1]
    if isinstance(user["content"], list):
        user["content"] = [p if p["type"] == "text" else next(images) for p in user["content"]]
    return Request(
        messages=messages,
        max_tokens=settings.attempt_max_tokens,
        temperature=settings.attempt_temperature,
        seed=request_seed(settings.seed, "attempt", item, trial),
    )


def judge_request(
    record: Record, item: int, attempt: dict, settings: Settings, prompts: Prompts
) -> Request:
    """The judge's request: text only, as in the paper."""
    text = prompts.render("judge", **_variables(record, attempt))
    return Request(
        messages=[{"role": "user", "content": text}],
        max_tokens=settings.teacher_max_tokens,
        temperature=0.0,
        seed=request_seed(settings.seed, "judge", item, 0),
        schema=object_schema(["score"], "number"),
        schema_name="rating",
    )


def reflect_request(
    record: Record,
    item: int,
    attempt: dict,
    trial: int,
    settings: Settings,
    prompts: Prompts,
) -> Request:
    """The teacher's request; the gold answer and the verdict are in it in ``gold_given`` only."""
    values = _variables(record, attempt)
    fields = prompts.render(f"fields_{settings.target}", choices=record.choices)
    if settings.mode == "gold_given":
        name, values = "right" if attempt["correct"] else "wrong", {**values, "gold": record.answer}
    else:
        name = "blind"
    text = prompts.render(name, fields=fields, **values)
    user = [*image_parts(record, settings), {"type": "text", "text": text}]
    temperature = None if settings.teacher_temperature < 0 else settings.teacher_temperature
    return Request(
        messages=[
            {"role": "system", "content": prompts.render("system")},
            {"role": "user", "content": user},
        ],
        max_tokens=settings.teacher_max_tokens,
        temperature=temperature,
        seed=request_seed(settings.seed, "reflect", item, trial),
        schema=object_schema(FIELDS[settings.target]),
        schema_name="review",
    )


def _variables(record: Record, attempt: dict) -> dict[str, Any]:
    words = " ".join(split_at_marks(record.question)).strip()
    question = question_text(words, record.choices)
    return {
        "question": question,
        "attempt": attempt["think"],
        "attempt_answer": attempt["answer"],
    }
