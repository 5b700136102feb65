"""Partners: dot tiles with something to search for, where a verdict must be looked up.

A picture of 56x84 pixels holds six tiles (tiles.py), one of each colour. The question ``with red
11`` asks which tile has, together with the red one, 11 dots; exactly one has. The first round reads
the red tile and names a partner at a glance; the reflection counts that partner's dots and says
whether the sum is 11; the second round keeps a partner that holds and names another in place of one
that does not. So a search is hard and its check is one look at one tile, and whoever says "no"
without that look gives a right answer away.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.demo.tiles import COLOURS, WRONG_SHARE

NEAR_SHARE = 0.85  # of the wrong first answers: a tile that nearly fits; the rest are any other


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


def wrong_partner(problem: Problem, rng: np.random.Generator) -> str:
    """The colour that a first look takes for the partner: mostly one of nearly as many dots."""
    wrong = [(c, n) for c, n in problem.tiles if c not in (problem.asked, problem.answer)]
    near = [c for c, n in wrong if abs(n - problem.need) <= 2]
    if near and rng.random() < NEAR_SHARE:
        return near[rng.integers(len(near))]
    return wrong[rng.integers(len(wrong))][0]


def reflection_fields(problem: Problem, rng: np.random.Generator) -> dict[str, Any]:
    """The five blocks of a response, written by a program that knows the counts; half of the first
    answers are wrong."""
    dots, gold = dict(problem.tiles), problem.answer
    first = wrong_partner(problem, rng) if rng.random() < WRONG_SHARE else gold
    known, seen = dots[problem.asked], dots[first]
    return {
        "first_think": f"{problem.asked}={known}",
        "first_answer": first,
        "reflection": f"{first}={seen} {known + seen} {'yes' if first == gold else 'no'}",
        "second_think": f"{problem.total}-{known}={problem.need}",
        "second_answer": gold,
        "first_correct": first == gold,
        "teacher": "program",
        "policy": "program",
    }
