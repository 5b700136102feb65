"""A policy and a teacher that know the puzzles, with every fault of content that models show.

As ``reflection_world:answer`` behind tests/openai_server.py. What is said depends on the request
alone (its image, its seed, its kind), so that a killed and resumed run hears what an undisturbed
one hears. REFLECTION_WORLD names the JSON file that ``write_world`` made.
"""

import hashlib
import json
import os
import random
from pathlib import Path

from srpo_jax.data.fields import Record
from srpo_jax.reflection.settings import Settings
from srpo_jax.reflection.teach import image_parts

_WORLD: dict[str, dict] = {}


def write_world(path: Path, records: list[Record], settings: Settings) -> None:
    """For each image as it is sent: the question's right answer and a solution."""
    world = {}
    for record in records:
        url = image_parts(record, settings)[0]["image_url"]["url"]
        texts = [record.extra.get(name, "") for name in ("caption", "explanation", "deduction")]
        options = list(record.choices) or [record.answer, *(f"{n}" for n in (31, 47, 59))]
        world[_key(url)] = {
            "right": record.answer,
            "options": options,
            "letters": bool(record.choices),
            "solution": " ".join(filter(None, texts)) or "I count the dots and combine them.",
        }
    path.write_text(json.dumps(world))


def _key(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _fact(body: dict) -> dict:
    """What the world knows of the image in a request."""
    if not _WORLD:
        _WORLD.update(json.loads(Path(os.environ["REFLECTION_WORLD"]).read_text()))
    parts = [p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]]
    url = next(p["image_url"]["url"] for p in parts if p["type"] == "image_url")
    return _WORLD[_key(url)]


def answer(body: dict) -> str | dict:
    """A completion for an attempt, or for a reflection where a schema is asked for."""
    fact, rng = _fact(body), random.Random(body["seed"])
    return review(fact, rng) if "response_format" in body else attempt(fact, rng)


def _name(fact: dict, option: str) -> str:
    """What stands for an option: its letter, or itself in an open question."""
    return "ABCDEFGHIJ"[fact["options"].index(option)] if fact["letters"] else option


def attempt(fact: dict, rng: random.Random) -> str | dict:
    """The policy: a third right, sometimes without tags, refusing, silent or cut off."""
    draw = rng.random()
    if draw < 0.02:
        return {"content": None, "refusal": "I cannot help with that."}
    if draw < 0.04:
        return ""
    if draw < 0.06:
        return {"content": "<think>It goes on and", "finish_reason": "length"}
    if draw < 0.08:
        return f"The answer is {fact['right']}."
    said = fact["right"]
    if draw < 0.65:
        said = rng.choice([option for option in fact["options"] if option != said])
    name = _name(fact, said)
    shapes = [f"$\\boxed{{{name}}}$", said]
    shapes += [f"({name})", f"{name}. {said}"] if fact["letters"] else []
    shape = rng.choice(shapes)
    return f"<think>{fact['solution']} So I take {said}.</think>\n<answer>{shape}</answer>"


def review(fact: dict, rng: random.Random) -> str | dict:
    """The teacher: mostly good, otherwise in every way that teachers fail."""
    right = _name(fact, fact["right"])
    good = {
        "reflection": "I named the parts of the picture, but I did not test my rule on each of "
        "them before I used it, so one step rests on a guess.",
        "second_think": f"I check the rule on every part. {fact['solution']}",
        "second_answer": rng.choice([right, f"$\\boxed{{{right}}}$"]),
    }
    draw = rng.random()
    if draw < 0.04:
        return {"content": None, "refusal": "No."}
    if draw < 0.08:
        return ""
    if draw < 0.12:
        return json.dumps(good)[:-20]
    if draw < 0.16:
        return json.dumps({"reflection": good["reflection"]})
    if draw < 0.20:
        return json.dumps({**good, "second_answer": 3})
    if draw < 0.24:
        return json.dumps({**good, "reflection": "  "})
    if draw < 0.36:
        wrong = rng.choice([option for option in fact["options"] if option != fact["right"]])
        return json.dumps({**good, "second_answer": _name(fact, wrong)})
    if draw < 0.44:
        leaked = f"According to the reference answer, the correct answer is {right}."
        return json.dumps({**good, "reflection": leaked})
    if draw < 0.47:
        return json.dumps({**good, "second_think": "</think><answer>A</answer>"})
    return json.dumps(good)
