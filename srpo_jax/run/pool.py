"""Dynamic sampling: which groups teach something, and groups that wait for a later update.

A group whose samples are all right or all wrong has no advantage. With ``filter.resample`` the RL
loop goes on sampling until a step has as many informative groups as its batch holds; those sampled
beyond that wait here for the next step, and lie in the checkpoint meanwhile.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from srpo_jax.data.batching import collate_packed
from srpo_jax.data.images import ImageRef
from srpo_jax.data.processing import Processor
from srpo_jax.data.records import Record
from srpo_jax.run.rollout import Graded, Sampled
from srpo_jax.structs import Batch, Rollout, Verdict

ROLLOUT_FIELDS = tuple(Rollout.__dataclass_fields__)
VERDICT_FIELDS = tuple(Verdict.__dataclass_fields__)


def informative(verdict: Verdict, low: float, high: float) -> np.ndarray:
    """[P] float32: 1 where the share of right final answers of a group lies in [low, high].

    SRPO section 4.1 filters on accuracy; its code averages a composite that counts partial success
    and so keeps groups in which nothing is left to learn (all right in both rounds: 0.75).
    """
    share = np.asarray(verdict.final_correct, np.float32).mean(axis=1)
    return ((share >= low) & (share <= high)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt with its graded completions, on the host."""

    record: Record
    step: int  # in which it was sampled: an earlier one means an older policy
    arrays: dict[str, np.ndarray]  # rollout and verdict fields without the prompt axis


@dataclasses.dataclass(frozen=True)
class Update:
    """What `Pool.take` puts together: this process's part of an update's arrays."""

    batch: Batch
    rollout: Rollout
    verdict: Verdict
    carried: np.ndarray  # [P] bool, sampled by an older policy
    count: int  # groups that are not filler


class Pool:
    """Informative groups of this process that no update has used yet."""

    def __init__(self):
        self.groups: list[Group] = []
        self._filler: dict[str, np.ndarray] = {}

    def add(self, sampled: Sampled, graded: Graded, weight_P: np.ndarray, step: int) -> None:
        """Keep the groups of a round whose weight is not 0."""
        self._filler = {n: np.zeros_like(x[0]) for n, x in _fields(graded).items()}
        for record, p in zip(sampled.records, sampled.slots.tolist(), strict=True):
            if weight_P[p]:
                fields = {n: x[p] for n, x in _fields(graded).items()}
                self.groups.append(Group(record, step, fields))

    def take(
        self,
        step: int,
        encode: Callable[[Record], Any],
        processor: Processor,
        *,
        rows: int,
        per_row: int,
        tokens: int,
        patch_budgets: tuple[int, ...],
        budget_index: Callable[[int], int] = lambda index: index,
    ) -> Update:
        """The oldest groups, as many as fit, collated anew; the rest of the batch is filler.

        Args:
            step: the present one.
            encode: of the prompts; images are decoded again.
            rows, per_row, tokens, patch_budgets: of this process's part of the update.
            budget_index: makes processes agree on the larger of their patch budgets.
        """
        most = max(patch_budgets, default=0)
        table: list[list[tuple[Group, Any]]] = [[] for _ in range(rows)]
        left = []
        for group in self.groups:
            if all(len(row) == per_row for row in table):
                left.append(group)
                continue
            encoded = encode(group.record)
            room = [
                row
                for row in table
                if len(row) < per_row
                and sum(e.num_slots for _, e in row) + encoded.num_slots <= most
            ]
            (room[0].append((group, encoded)) if room else left.append(group))
        needed = max(sum(e.num_slots for _, e in row) for row in table)
        index = budget_index(sum(budget < needed for budget in patch_budgets))
        self.groups = left
        places = [row[i] if i < len(row) else None for row in table for i in range(per_row)]
        chosen = [place[0] for place in places if place]
        batch = collate_packed(
            [[place[1]] if place else [] for place in places],
            rows=rows,
            tokens=tokens,
            patches=patch_budgets[index] if patch_budgets else 0,
            pad_id=processor.pad_id,
            geometry=processor.geometry,
        )
        example = chosen[0].arrays if chosen else self._filler
        blank = {name: np.zeros_like(value) for name, value in example.items()}
        arrays = [place[0].arrays if place else blank for place in places]
        stacked = {name: np.stack([one[name] for one in arrays]) for name in blank}
        return Update(
            batch=batch,
            rollout=Rollout(**{n: stacked[f"rollout/{n}"] for n in ROLLOUT_FIELDS}),
            verdict=Verdict(**{n: stacked[f"verdict/{n}"] for n in VERDICT_FIELDS}),
            carried=np.array([bool(place and place[0].step < step) for place in places]),
            count=len(chosen),
        )

    # --- checkpoint ---

    def state(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """JSON values and arrays from which `load` makes the same pool."""
        values = [
            {"record": _record_values(group.record), "step": group.step} for group in self.groups
        ]
        names = self.groups[0].arrays if self.groups else ()
        return values, {name: np.stack([g.arrays[name] for g in self.groups]) for name in names}

    def load(self, values: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `state`."""
        self.groups = []
        for i, value in enumerate(values):
            fields = value["record"]
            images = tuple(ImageRef(**image) for image in fields["images"])
            record = Record(**{**fields, "images": images, "choices": tuple(fields["choices"])})
            group = {name: array[i] for name, array in arrays.items()}
            self.groups.append(Group(record, value["step"], group))


def _fields(graded: Graded) -> dict[str, np.ndarray]:
    fields = {f"rollout/{n}": np.asarray(getattr(graded.rollout, n)) for n in ROLLOUT_FIELDS}
    return fields | {f"verdict/{n}": np.asarray(getattr(graded.verdict, n)) for n in VERDICT_FIELDS}


def _record_values(record: Record) -> dict[str, Any]:
    """The record as JSON values and bytes; further fields that JSON cannot hold are left out."""
    values = dataclasses.asdict(record)
    kept = {}
    for name, value in values["extra"].items():
        with contextlib.suppress(TypeError, ValueError):
            kept[name] = json.loads(json.dumps(value))
    return values | {"extra": kept}
