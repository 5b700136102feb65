"""A reward function of one's own, in a file, called in worker processes for one group at a time.

    def score(completions, records):
        return [float(len(text) < record["budget"]) for text, record in zip(completions, records)]

It names those of ``ARGUMENTS`` that it wants (docs/rewards.md), and returns one number for each
sample, or a dict of several named terms. It may fail: whoever asks is told why, in one line.
"""

import inspect
import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srpo_jax.rewards.workers import Call, Limits, Workers, load

ARGUMENTS = ("prompts", "completions", "blocks", "answers", "verdicts", "records")
Samples = dict[str, list[Any]]  # by ARGUMENTS: one entry for each sample
Scores = dict[str, list[float]]  # by term: one number for each sample
_MAX_WORDS = 300  # characters of an error


class RewardFunction:
    """The function at "FILE.py:NAME", with its worker processes."""

    def __init__(self, place: str, workers: int, timeout: float):
        """``timeout`` is in seconds of the clock, for one call. ValueError where no file is."""
        file, _, name = place.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            raise ValueError("write FILE.py:FUNCTION, as in my_reward.py:score")
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file}")
        self._path, self._name, self._timeout = str(Path(file).resolve()), name, timeout
        self._workers = Workers(workers, Limits(wall=timeout), (self._path,))

    def __call__(self, groups: Sequence[Samples]) -> list[Scores | str]:
        """What the function says of each group of samples, or why it says nothing, in words."""
        place = f"{self._path}:{self._name}"
        calls = [Call(f"{__name__}:scores", (place, samples)) for samples in groups]
        words = {"timeout": f"no answer after {self._timeout:g} s, twice"}
        return [
            f"{self._name}: {words.get(outcome.failure, 'its process ended, twice')}"
            if outcome.failure
            else outcome.value
            for outcome in self._workers.run(calls)
        ]

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()


# ------------------------------------------------------------------------------ worker's side


def scores(place: str, samples: Samples) -> Scores | str:
    """What the function at ``place`` says of the samples; what is wrong with it or that, in words.

    One list of numbers is a term of the function's name.
    """
    file, _, name = place.rpartition(":")
    try:
        function = getattr(load(file), name, None)
        if not callable(function):
            return f"{Path(file).name} has no function {name}"
        wanted = inspect.signature(function).parameters.values()
        given = {} if any(p.kind is p.VAR_KEYWORD for p in wanted) else {p.name for p in wanted}
        if unknown := sorted(set(given) - {*ARGUMENTS}):
            return f"{name} asks for {unknown[0]}: there are {', '.join(ARGUMENTS)}"
        found = function(**{key: samples[key] for key in given or samples})
        terms = found if isinstance(found, dict) else {name: found}
        return _numbers(name, terms, len(samples["completions"]))
    except MemoryError:
        raise
    except Exception as error:
        return in_words(error, file)


def _numbers(function: str, terms: dict[str, Any], count: int) -> Scores | str:
    found: Scores = {}
    for name, values in terms.items():
        if not isinstance(name, str) or not name.isidentifier():
            return f"{function}: a term is called {name!r}: use letters, digits and _"
        try:
            found[name] = [float(value) for value in values]
        except (TypeError, ValueError):
            return f"{function}: term {name} is {_shown(values)}, not a number for each sample"
        if len(found[name]) != count:
            return f"{function}: term {name} has {len(found[name])} numbers for {count} samples"
        for at, value in enumerate(found[name]):
            if not math.isfinite(value):
                return f"{function}: term {name} of sample {at + 1} of {count} is {value}"
    return found or f"{function}: returned no term"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."


def in_words(error: Exception, file: str) -> str:
    """Type and text of an error in one line, with the place in ``file`` where it arose."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_WORDS]
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == file]
    return f"{text} ({Path(file).name}:{lines[-1]})" if lines else text
