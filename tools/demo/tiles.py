"""Dot tiles: the demo's visual reasoning problems, their pictures and their reflection data.

A picture of 56x56 pixels holds 2x2 tiles of 28x28, each in a colour of its own with 1 to 9 white
dots. One tile is exactly one merged visual token of Qwen2.5-VL (2x2 patches of 14x14), so that
reading a tile is local to one token: that is what makes the task learnable in minutes on a CPU.
A question names two of the four colours: ``sum yellow blue`` or ``diff yellow blue`` (the
absolute difference), so that answers are 0 to 18.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {  # background of a tile, RGB in [0, 1]
    "red": (0.75, 0.15, 0.15),
    "green": (0.15, 0.55, 0.20),
    "blue": (0.15, 0.25, 0.75),
    "yellow": (0.75, 0.65, 0.10),
    "purple": (0.50, 0.20, 0.60),
    "black": (0.12, 0.12, 0.12),
}
TILE = 28
SIDE = 2 * TILE
SPLITS = ("sft", "rl", "validation", "test")  # the order fixes their seeds
WRONG_SHARE = 0.5  # of the reflection records, first attempts that are wrong
MISREAD_SHARE = 0.85  # of the wrong ones: a tile misread; the rest are slips of arithmetic


@dataclass(frozen=True)
class Problem:
    """One question about one picture; ``tiles`` lists (colour, dots) in raster order."""

    op: str
    asked: tuple[str, str]
    tiles: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        return f"{self.op} {self.asked[0]} {self.asked[1]}"

    @property
    def counts(self) -> tuple[int, int]:
        """The true numbers of dots on the two tiles asked for."""
        dots = dict(self.tiles)
        return dots[self.asked[0]], dots[self.asked[1]]

    @property
    def answer(self) -> int:
        return combine(self.op, *self.counts)


def combine(op: str, a: int, b: int) -> int:
    """The answer of ``op`` ("sum" or "diff", the absolute difference) on two readings."""
    return a + b if op == "sum" else abs(a - b)


def draw_problem(rng: np.random.Generator) -> Problem:
    """A random problem: four different colours in random order, 1 to 9 dots on each."""
    names = list(COLOURS)
    colours = [names[i] for i in rng.permutation(len(names))[:4]]
    dots = rng.integers(1, 10, size=4)
    first, second = rng.permutation(4)[:2]
    op = ("sum", "diff")[rng.integers(2)]
    tiles = tuple((c, int(n)) for c, n in zip(colours, dots, strict=True))
    return Problem(op, (colours[first], colours[second]), tiles)


def draw_splits(
    seed: int, sizes: dict[str, int], draw: Callable[[np.random.Generator], Any] | None = None
) -> dict[str, list[Any]]:
    """Problems of every split, each from its own seed; no problem occurs in two splits.

    ``sizes`` maps names of ``SPLITS`` to counts. A problem counts as the same when question and
    tiles are the same, whatever the pixels, so that "unseen" means unseen content.
    """
    draw = draw or draw_problem
    taken: set[Any] = set()
    splits = {}
    # Test and validation first: the training splits give way, never the other way round.
    for name in sorted(sizes, key=SPLITS.index, reverse=True):
        rng = np.random.default_rng([seed, SPLITS.index(name)])
        problems: list[Any] = []
        own: set[Any] = set()
        while len(problems) < sizes[name]:
            problem = draw(rng)
            if problem not in taken:
                problems.append(problem)
                own.add(problem)
        taken |= own
        splits[name] = problems
    return {name: splits[name] for name in sizes}


def render(problems: Sequence[Any], rng: np.random.Generator) -> np.ndarray:
    """Pictures [N, 28 * rows, 56, 3] uint8 of problems with as many ``tiles`` each, two in a row:
    dots on a jittered 3x3 grid, shifted colours, noise."""
    n, count = len(problems), len(problems[0].tiles)
    colour = np.array([[COLOURS[c] for c, _ in p.tiles] for p in problems], np.float32)
    dots = np.array([[k for _, k in p.tiles] for p in problems])
    colour = np.clip(colour + rng.normal(0, 0.04, colour.shape), 0, 1).astype(np.float32)
    # Which cells of the 3x3 grid hold a dot: the first `dots` of a random order.
    order = rng.random((n, count, 9)).argsort(-1)
    present = order < dots[..., None]
    grid = np.stack(np.divmod(np.arange(9), 3), -1) * 8.0 + 5.5
    offset = rng.uniform(-1, 1, (n, count, 1, 2))
    centre = (grid + offset + rng.uniform(-1, 1, (n, count, 9, 2))).astype(np.float32)
    radius = (2.6 * rng.uniform(0.75, 1.25, (n, count, 9))).astype(np.float32)
    axis = np.arange(TILE, dtype=np.float32)
    ink = np.zeros((n, count, TILE, TILE), np.float32)
    for cell in range(9):
        dy = axis[:, None] - centre[:, :, cell, 0, None, None]
        dx = axis[None, :] - centre[:, :, cell, 1, None, None]
        inside = np.clip(radius[:, :, cell, None, None] + 0.5 - np.sqrt(dy**2 + dx**2), 0, 1)
        ink = np.maximum(ink, inside * present[:, :, cell, None, None])
    tiles = colour[:, :, None, None, :] * (1 - ink[..., None]) + ink[..., None]
    image = tiles.reshape(n, -1, 2, TILE, TILE, 3).transpose(0, 1, 3, 2, 4, 5)
    image = image.reshape(n, -1, SIDE, 3)
    image = image + rng.standard_normal(image.shape, np.float32) * 0.03
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def wrong_look(problem: Problem, rng: np.random.Generator) -> tuple[int, int]:
    """(what it says of the first tile, its answer) of a first look that goes wrong.

    Either tile is misread, by one or two dots or as another tile's number, or the arithmetic slips.
    The answer is never the right one.
    """
    a, b = problem.counts
    gold = problem.answer
    if rng.random() >= MISREAD_SHARE:
        slips = [gold + d for d in (-2, -1, 1, 2)]
        return a, int(rng.choice([s for s in slips if 0 <= s <= 18]))
    first_tile = rng.random() < 0.5
    true = a if first_tile else b
    reads = {true - 2, true - 1, true + 1, true + 2, *(dots for _, dots in problem.tiles)}
    looks = [(r, combine(problem.op, r, b)) if first_tile else (a, combine(problem.op, a, r))
             for r in sorted(reads - {true}) if 1 <= r <= 9]  # fmt: skip
    looks = [look for look in looks if look[1] != gold]
    return looks[rng.integers(len(looks))]


def reflection_fields(problem: Problem, rng: np.random.Generator) -> dict[str, Any]:
    """The five blocks of a response, written by a program that knows the counts.

    The first round is a hurried look: it writes one tile down and answers. The reflection reads
    both tiles again and gives a verdict on the first answer; the second round computes from those
    readings. Half of the first answers are wrong.
    """
    a, b = problem.counts
    gold = problem.answer
    seen, first = wrong_look(problem, rng) if rng.random() < WRONG_SHARE else (a, gold)
    large, small = (a, b) if problem.op == "sum" else (max(a, b), min(a, b))
    sign = "+" if problem.op == "sum" else "-"
    one, two = problem.asked
    return {
        "first_think": f"{one}={seen}",
        "first_answer": str(first),
        "reflection": f"{one}={a} {two}={b} {'yes' if first == gold else 'no'}",
        "second_think": f"{large}{sign}{small}={gold}",
        "second_answer": str(gold),
        "first_correct": first == gold,
        "teacher": "program",
        "policy": "program",
    }


def records(
    problems: Sequence[Any],
    seed: int,
    split: str,
    *,
    reflect: bool,
    fields: Callable[[Any, np.random.Generator], dict[str, Any]] = reflection_fields,
    source: str = "dot tiles",
    chunk: int = 1024,
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(record without its image, PNG bytes) of every problem, rendered in chunks; with ``reflect``
    it has a response by ``fields``."""
    rng = np.random.default_rng([seed, SPLITS.index(split), 1])
    for start in range(0, len(problems), chunk):
        part = problems[start : start + chunk]
        for i, (problem, pixels) in enumerate(zip(part, render(part, rng), strict=True)):
            record = {
                "id": f"{split}-{start + i}",
                "problem": problem.question,
                "answer": str(problem.answer),
                "source": source,
            }
            if reflect:
                record |= fields(problem, rng)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG", compress_level=1)
            yield record, png.getvalue()


def write_jsonl(path: Path, rows: Iterator[tuple[dict[str, Any], bytes]]) -> int:
    """Records as JSONL with one PNG file each in ``<name>_images`` beside it; returns the count."""
    folder = path.parent / f"{path.stem}_images"
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with open(path, "w", encoding="utf-8") as out:
        for record, png in rows:
            name = f"{record['id']}.png"
            (folder / name).write_bytes(png)
            out.write(json.dumps({**record, "images": [f"{folder.name}/{name}"]}) + "\n")
            count += 1
    return count


def write_parquet(path: Path, rows: Iterator[tuple[dict[str, Any], bytes]]) -> int:
    """Records as one parquet file with the PNG bytes inside; returns the count."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [{**record, "images": [png]} for record, png in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=512)
    return len(table)
