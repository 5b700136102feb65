"""What a step is assumed to hold before there is a run: lengths, and how they are sampled."""

import argparse
import dataclasses
import math
import re
from collections import Counter

import numpy as np

from srpo_jax.sampling.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How many tokens sequences have: log-normal and cut off at their budget; no mean: full."""

    mean: float | None = None  # before they are cut off
    sigma: float = 0.0

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...], budget: int) -> np.ndarray:
        """int64 in [1, budget]."""
        if self.mean is None:
            return np.full(shape, budget)
        drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, shape)
        return np.clip(drawn.astype(np.int64), 1, budget)

    def __str__(self) -> str:
        return "full" if self.mean is None else f"lognormal:{self.mean:g},{self.sigma:g}"


def parse_lengths(text: str) -> Lengths:
    """``type=`` of an argument: "full" or "lognormal:MEAN,SIGMA"."""
    if text == "full":
        return Lengths()
    number = r"(\d+(?:\.\d*)?|\.\d+)"
    found = re.fullmatch(rf"lognormal:{number},{number}", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither full nor lognormal:MEAN,SIGMA (such as lognormal:870,0.5)"
        )
    return Lengths(float(found[1]), float(found[2]))


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What a device does to sample completions of given lengths."""

    prefills: int
    steps: Counter[tuple[int, int]]  # of each number of slots and window of columns
    moves: Counter[tuple[int, int]]  # from so many slots to so many


def sample(schedule: Schedule, lengths_ZX: np.ndarray) -> Sampled:
    """Runs ``schedule`` to its end as the sampler does; sample x of shard z has that many tokens
    (0: a filler)."""
    done = Sampled(0, Counter(), Counter())
    while not schedule.over:
        while schedule.next_fill() is not None:
            done = dataclasses.replace(done, prefills=done.prefills + 1)
        slots = schedule.width
        if schedule.arrange() is not None:
            done.moves[slots, schedule.width] += 1
        most, stop = schedule.limits().tolist()
        sample_ZJ, now_ZJ = schedule.sample_ZJ, schedule.length_ZJ
        wanted_ZJ = np.take_along_axis(lengths_ZX, sample_ZJ.clip(0), axis=1)
        left_ZJ = np.where(sample_ZJ >= 0, wanted_ZJ - now_ZJ, 0).clip(0)
        # After t steps those with more than t left live: as many as ``stop`` after this many.
        count = min(most, int(np.sort(left_ZJ, axis=1)[:, ::-1][:, stop : stop + 1].max(initial=0)))
        done.steps[schedule.width, schedule.window] += count
        length_ZJ = now_ZJ + np.minimum(left_ZJ, count)
        schedule.look(length_ZJ, left_ZJ <= count, schedule.step + count)
    return done
