"""The drawn tasks, and the budgets of their prompts and responses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.demo import partners, tiles


@dataclass(frozen=True)
class Task:
    """How problems are drawn and answered; sizes in pixels and tokens."""

    name: str
    draw: Callable[[np.random.Generator], Any]  # a problem with question, answer and tiles
    fields: Callable[[Any, np.random.Generator], dict[str, Any]]  # the response that SFT imitates
    height: int  # of a picture, tiles.SIDE wide
    prompt_tokens: int
    completion_tokens: int

    @property
    def patches(self) -> int:
        """Of one picture, the padding of its windows included."""
        return -(-self.height // tiles.SIDE) * (tiles.SIDE // 14) ** 2

    @property
    def max_pixels(self) -> int:
        return self.height * tiles.SIDE

    def budgets(self, per_row: int) -> str:
        """The patch budget of rows of so many pictures, as a config argument."""
        return f"({per_row * self.patches},)"


# 15 prompt tokens are used, and a whole response has 31 to 33; 19, and 28 to 31.
DOT_TILES = Task("dot_tiles", tiles.draw_problem, tiles.reflection_fields, tiles.SIDE, 16, 36)
PARTNERS = Task(
    "partners", partners.draw_problem, partners.reflection_fields, 3 * tiles.TILE, 20, 40
)
TASKS = {task.name: task for task in (DOT_TILES, PARTNERS)}
