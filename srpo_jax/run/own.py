"""Reward terms of one's own: what a function and a judge say of a round's groups, as arrays.

A group of which a source says nothing (an exception, a time-out, a NaN) has no reward: it is
counted, told once, and gets weight 0.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.data.records import RecordSource
from srpo_jax.rewards.function import RewardFunction, Samples, Scores
from srpo_jax.rewards.terms import TERMS
from srpo_jax.run import processes
from srpo_jax.run.sections import RewardSettings
from srpo_jax.structs import BLOCKS, RunError, Verdict

# Names of metrics, rows and other terms that no term of one's own may have.
TAKEN = (
    *(
        *TERMS,
        "first",
        "verdict",
        "overlong",
        "price",
        "kl",
        "mean",
        "std",
        "group_std",
        "failed",
        "step",
        "round",
    ),
    *("id", "sample", "gold", "tokens", "completion", "finished", "total", "advantage", "weight"),
)
_RIGHT, _WRONG = r"\boxed{1}", r"\boxed{2}"


class Source(Protocol):
    """Scores groups of samples, or says in words why it does not."""

    def __call__(self, groups: Sequence[Samples]) -> list[Scores | str]: ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class OwnTerms:
    """Terms of all sources, each under the key that configures it; a context manager.

    ``weights`` (name and weight of each term) are known when the sources have been tried.
    """

    def __init__(self, reward: RewardSettings, mesh: Mesh, judge: Source | None = None):
        """RunError where ``reward.function`` names no file."""
        self._reward, self._mesh = reward, mesh
        self._sources: dict[str, Source] = {}
        self.weights: tuple[tuple[str, float], ...] = ()
        if reward.function:
            key = f"reward.function={reward.function}"
            try:
                self._sources[key] = RewardFunction(reward.function, reward.workers, reward.timeout)
            except ValueError as error:
                raise RunError(f"{key}: {error}") from None
        if judge:
            self._sources["reward.judge"] = judge

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms, in the order of the last axis of ``Verdict.own``."""
        return tuple(name for name, _ in self.weights)

    def __enter__(self) -> "OwnTerms":
        return self

    def __exit__(self, *_: Any) -> None:
        for source in self._sources.values():
            source.close()

    def try_on(self, source: RecordSource) -> None:
        """Have made-up samples of the first record scored, before the first step.

        RunError, on every process, where that fails, or a term's name or weight cannot be used.
        """
        if not self._sources:
            return
        samples, weights = made_up(first_record(source)), ()
        for key, score in self._sources.items():
            (scores,) = processes.from_speaker(functools.partial(score, [samples]), self._mesh)
            said = processes.gather(scores if isinstance(scores, str) else [*scores])
            if problem := next((one for one in said if isinstance(one, str)), ""):
                raise RunError(f"{key}: tried on made-up samples: {problem}")
            processes.check_agreement([{f"the terms of {key}": names} for names in said])
            if key == "reward.judge":
                weights += ((said[0][0], self._reward.judge.weight),)
                continue
            try:
                weights += self._reward.own_weights(tuple(said[0]))
            except ValueError as error:
                raise RunError(f"reward.{error}") from None
        names = [name for name, _ in weights]
        for name in names:
            if name in TAKEN or names.count(name) > 1:
                raise RunError(f"a reward term is called {name}, a name in use: rename it")
        self.weights = weights

    def of_round(
        self,
        records: Sequence[Record],
        slots: np.ndarray,
        verdict: Verdict,
        details: Sequence[Mapping[str, Any]],
    ) -> tuple[np.ndarray, dict[int, str]]:
        """[P, G, N] float32, each sample's terms, 0 where it has none; and by prompt, why not.

        ``slots`` are the prompts of the records; ``details`` are those of `rewards.grade`.
        """
        prompts, group = verdict.first_correct.shape
        own_PGN, failures = np.zeros((prompts, group, len(self.names)), np.float32), {}
        places = slots.tolist()
        samples = [
            group_samples(record, verdict, p, details[p * group : (p + 1) * group])
            for record, p in zip(records, places, strict=True)
        ]
        for p, scores in zip(places, self._scores(samples), strict=True):
            if isinstance(scores, str):
                failures[p] = scores
            else:
                own_PGN[p] = np.stack([scores[name] for name in self.names], -1)
        return own_PGN, failures

    def _scores(self, groups: Sequence[Samples]) -> list[Scores | str]:
        """Each group's scores by all terms, or why it has none."""
        merged: list[Scores | str] = [{} for _ in groups]
        for key, source in self._sources.items():
            said = processes.from_speaker(functools.partial(source, groups), self._mesh)
            for i, (before, scores) in enumerate(zip(merged, said, strict=True)):
                if isinstance(before, dict):
                    merged[i] = f"{key}: {scores}" if isinstance(scores, str) else before | scores
        return [self._complete(scores) for scores in merged]

    def _complete(self, scores: Scores | str) -> Scores | str:
        if isinstance(scores, str) or scores.keys() == {*self.names}:
            return scores
        return f"terms are {sorted(scores)}, and were {sorted(self.names)} at the start"


# --- samples ---------------------------------------------------------------------------------


def first_record(source: RecordSource) -> Record:
    """The first record that can be read."""
    for index in range(min(len(source), 64)):
        with contextlib.suppress(RecordError):
            return source[index]
    return Record("made-up", "How many?", "1")


def group_samples(
    record: Record, verdict: Verdict, p: int, details: Sequence[Mapping[str, Any]]
) -> Samples:
    """The completions of prompt ``p`` as plain values."""
    columns = {k: x[p].tolist() for k, x in vars(verdict).items() if x is not None}
    verdicts = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return _samples(record, [one["text"] for one in details], verdicts, details)


def made_up(record: Record) -> Samples:
    """Five blocks with a right and with a wrong final answer, one round, and nothing at all."""
    texts = dict.fromkeys(BLOCKS, "Seen so far: 1.") | {"first_answer": _WRONG}
    none: dict[str, str | None] = dict.fromkeys(BLOCKS)
    blocks = [
        texts | {"second_answer": _RIGHT},
        texts | {"second_answer": _WRONG},
        none | {"first_think": "Seen: 1.", "first_answer": _RIGHT},
        none,
    ]
    details, verdicts = [], []
    for i, one in enumerate(blocks):
        first, final = (("2", "1"), ("2", "2"), ("1", "1"), (None, None))[i]
        details.append({"blocks": one, "first_answer": first, "final_answer": final})
        numbers = dict.fromkeys(("first_tokens", "first_end", "total_tokens"), 4 * (i < 3))
        flags = dict.fromkeys(("format_ok", "has_second", "reflection_ok", "reflection_new"), i < 2)
        verdicts.append(
            {"first_correct": i == 2, "final_correct": i in (0, 2), "has_first": i < 3, "stated": 0}
            | flags
            | numbers
            | {"block_tokens": [2 * bool(text) for text in one.values()]}
        )
    texts = ["".join(filter(None, one.values())) for one in blocks]
    return _samples(record, texts, verdicts, details)


def _samples(
    record: Record, texts: list[str], verdicts: list[Any], details: Sequence[Mapping[str, Any]]
) -> Samples:
    fields = {**record.extra, **{f.name: getattr(record, f.name) for f in _FIELDS}}
    fields["images"] = [
        os.path.join(image.root, image.path) if image.data is None else image.data
        for image in record.images
    ]
    fields["choices"] = list(record.choices)
    return {
        "prompts": [record.question] * len(texts),
        "completions": texts,
        "blocks": [one["blocks"] for one in details],
        "answers": [{n: one[f"{n}_answer"] for n in ("first", "final")} for one in details],
        "verdicts": verdicts,
        "records": [fields] * len(texts),
    }


_FIELDS = [field for field in dataclasses.fields(Record) if field.name != "extra"]
