"""Partners: dot tiles with something to search for, where a verdict must be looked up.

A picture of 56x84 pixels holds six tiles (tiles.py), one of each colour. The question ``with red
11`` asks which tile has, together with the red one, 11 dots; exactly one has. The first round
counts the red tile and one other, and guesses where that does not fit; the reflection counts the
tile that was named and says whether it fits; the second round keeps one that does, and looks for
the partner among the tiles that are left where it does not. So the check is one look at the
picture, and whoever says "no" without it gives a right answer away.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.demo.tiles import COLOURS

HIT_SHARE = 0.35  # of first looks that find the partner at once, beside those that happen to


@dataclass(frozen=True)
class Problem:
    """One question about one picture; ``tiles`` lists (colour, dots) in raster order."""

    asked: str
    total: int
    tiles: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        return f"with {self.asked} {self.total}"

    @property
    def need(self) -> int:
        """How many dots the partner has."""
        return self.total - dict(self.tiles)[self.asked]

    @property
    def answer(self) -> str:
        return next(c for c, dots in self.tiles if c != self.asked and dots == self.need)


def draw_problem(rng: np.random.Generator) -> Problem:
    """A random problem: all colours in random order, 1 to 9 dots on each, one partner."""
    names = list(COLOURS)
    while True:
        colours = [names[i] for i in rng.permutation(len(names))]
        dots = rng.integers(1, 10, size=len(names)).tolist()
        asked, partner = rng.permutation(len(names))[:2]
        others = dots[:asked] + dots[asked + 1 :]
        if others.count(dots[partner]) == 1:
            tiles = tuple(zip(colours, dots, strict=True))
            return Problem(colours[asked], dots[asked] + dots[partner], tiles)


def first_look(problem: Problem, rng: np.random.Generator) -> tuple[str, str]:
    """(the tile that is counted, the answer) of a hurried first round: one look at one tile, which
    is the answer where it fits; else a guess among the others."""
    others = [colour for colour, _ in problem.tiles if colour != problem.asked]
    if rng.random() < HIT_SHARE:
        return problem.answer, problem.answer
    looked = others[rng.integers(len(others))]
    if looked == problem.answer:
        return looked, looked
    guesses = [colour for colour in others if colour != looked]
    return looked, guesses[rng.integers(len(guesses))]


def reflection_fields(problem: Problem, rng: np.random.Generator) -> dict[str, Any]:
    """The five blocks of a response, written by a program that knows the counts; about half of the
    first answers are wrong. A search ends where a tile fits, after one to three looks."""
    dots, gold, asked = dict(problem.tiles), problem.answer, problem.asked
    looked, first = first_look(problem, rng)
    known, seen, total = dots[asked], dots[first], problem.total
    left = [c for c, _ in problem.tiles if c not in (asked, looked, first, gold)]
    searched = [left[i] for i in rng.permutation(len(left))[: rng.integers(len(left) + 1)]]
    search = " ".join(f"{colour}={dots[colour]}" for colour in (*searched, gold))
    return {
        "first_think": f"{asked}={known} {looked}={dots[looked]}",
        "first_answer": first,
        "reflection": f"{first}={seen} {known + seen} {'yes' if first == gold else 'no'}",
        "second_think": f"{known}+{dots[gold]}={total}" if first == gold else search,
        "second_answer": gold,
        "first_correct": first == gold,
        "teacher": "program",
        "policy": "program",
    }
