"""Dynamic sampling: which groups teach something, and groups that wait for a later update.

A group whose samples are all right or all wrong has no advantage. With ``filter.resample`` the RL
loop goes on sampling until a step has as many informative groups as its batch holds; those sampled
beyond that wait here for the next step, and lie in the checkpoint meanwhile.
"""

import contextlib
import dataclasses
import json
from typing import Any

import jax
import numpy as np

from srpo_jax.data.batching import Encoded, FirstFit, collate_packed
from srpo_jax.data.fields import Record
from srpo_jax.data.images import ImageRef
from srpo_jax.data.processing import Processor
from srpo_jax.run import processes
from srpo_jax.run.feed import Encode
from srpo_jax.run.rollout import Round
from srpo_jax.run.settings import DataSettings
from srpo_jax.structs import Experience, Rollout, Verdict


def informative(verdict: Verdict, low: float, high: float) -> np.ndarray:
    """[P] float32: 1 where the share of right final answers of a group lies in [low, high].

    SRPO section 4.1 filters on accuracy; its code averages a composite that counts partial success
    and so keeps groups in which nothing is left to learn (all right in both rounds: 0.75).
    """
    share = np.asarray(verdict.final_correct, np.float32).mean(axis=1)
    return ((share >= low) & (share <= high)).astype(np.float32)


# What an experience holds of the completions, of all prompts or (in a group) of one.
Samples = tuple[Rollout, Verdict]


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt with its graded completions, on the host."""

    record: Record
    step: int  # in which it was sampled: an earlier one means an older policy
    samples: Samples  # arrays without the prompt axis


class Pool:
    """Informative groups of this process that no update has used yet."""

    def __init__(self, encode: Encode, processor: Processor, data: DataSettings):
        self._encode, self._processor, self._data = encode, processor, data
        self.groups: list[Group] = []
        self._blank: Samples | None = None

    def add(self, one: Round, step: int) -> None:
        """Keep the groups of a round whose weight is not 0."""
        samples = (one.graded.rollout, one.graded.verdict)
        self._blank = jax.tree.map(lambda x: np.zeros_like(x[0]), samples)
        for record, p in zip(one.sampled.records, one.sampled.slots.tolist(), strict=True):
            if one.weight[p]:
                own = jax.tree.map(lambda x, p=p: x[p], samples)
                self.groups.append(Group(record, step, own))

    def take(self, step: int, usable_B: np.ndarray) -> tuple[Experience, np.ndarray]:
        """The oldest groups, as many as fit, collated anew; the rest of the batch is filler.

        Args:
            step: the present one.
            usable_B: which places of this process's part of the update hold a prompt. Processes
                agree on the larger of their patch budgets (collective).

        Returns:
            this process's part of the update, on the host, its prompts with their pixels; and [P]
            bool: sampled by an older policy.
        """
        data = self._data
        places, needed = self._fill(usable_B)
        index = processes.maximum(sum(budget < needed for budget in data.patch_budgets))
        batch = collate_packed(
            [[place[1]] if place else [] for place in places],
            rows=len(places) // data.prompts_per_row,
            tokens=data.prompt_tokens,
            patches=data.patch_budgets[index] if data.patch_budgets else 0,
            pad_id=self._processor.pad_id,
            geometry=self._processor.geometry,
        )
        blank = self._blank
        if blank is None:  # after a restart
            blank = next(jax.tree.map(np.zeros_like, place[0].samples) for place in places if place)
        rollout, verdict = _stack([place[0].samples if place else blank for place in places])
        weight = batch.valid.astype(np.float32)
        carried = np.array([bool(place and place[0].step < step) for place in places])
        return Experience(batch, rollout, verdict, weight=weight), carried

    def _fill(self, usable_B: np.ndarray) -> tuple[list[tuple[Group, Encoded] | None], int]:
        """Groups leave the pool for the first row that has room for them, oldest first.

        Returns what stands at each place, and the most patch slots that a row takes.
        """
        data, most = self._data, max(self._data.patch_budgets, default=0)
        fit = FirstFit(
            rows=len(usable_B) // data.prompts_per_row,
            per_row=data.prompts_per_row,
            tokens=data.prompt_tokens,
            patches=most,
            pack=False,
            usable_B=usable_B,
        )
        places: list[tuple[Group, Encoded] | None] = [None] * len(usable_B)
        left = []
        for group in self.groups:
            place = -1
            if (fit.count_B == 0)[usable_B].any():
                encoded = self._encode(group.record)  # images are decoded again
                place = fit.place(encoded)
            if place < 0:
                left.append(group)
            else:
                places[place] = (group, encoded)
        self.groups = left
        return places, most - int(fit.room_M.min())

    # --- checkpoint ---

    def state(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """JSON values and arrays from which `load` makes the same pool."""
        values = [
            {"record": _record_values(group.record), "step": group.step} for group in self.groups
        ]
        if not self.groups:
            return values, {}
        rollout, verdict = _stack([group.samples for group in self.groups])
        parts = {"rollout": vars(rollout), "verdict": vars(verdict)}
        return values, {f"{part}/{n}": x for part, held in parts.items() for n, x in held.items()}

    def load(self, values: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `state`."""
        self.groups = []
        for i, value in enumerate(values):
            fields = value["record"]
            images = tuple(ImageRef(**image) for image in fields["images"])
            record = Record(**{**fields, "images": images, "choices": tuple(fields["choices"])})
            rollout, verdict = (
                {n.removeprefix(f"{part}/"): x[i] for n, x in arrays.items() if n.startswith(part)}
                for part in ("rollout", "verdict")
            )
            self.groups.append(
                Group(record, value["step"], (Rollout(**rollout), Verdict(**verdict)))
            )


def _stack(samples: list[Samples]) -> Samples:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *samples)


def _record_values(record: Record) -> dict[str, Any]:
    """The record as JSON values and bytes; further fields that JSON cannot hold are left out."""
    values = dataclasses.asdict(record)
    kept = {}
    for name, value in values["extra"].items():
        with contextlib.suppress(TypeError, ValueError):
            kept[name] = json.loads(json.dumps(value))
    return values | {"extra": kept}
